"""World captions: which attributes of which objects does a generated caption name?

An object is matched by colour and shape together; each match is one unit, and each further
attribute named for it (the pattern) is one more. Precision, recall and F1 count units over all
pictures, so that inventing objects costs as much as leaving them out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip_vlm.evaluation.vlm.task_helpers import doc_to_visual

__all__ = [
    "doc_to_target",
    "doc_to_text",
    "doc_to_visual",
    "f1",
    "precision",
    "process_docs",
    "process_results",
    "recall",
]

DETERMINERS = frozenset({"a", "an", "the", "one", "another"})
"""A word that opens a new noun phrase: attributes before it belong to the object before it."""

_SENTENCE = re.compile(r"[.;!?\n]+")
_WORD = re.compile(r"[^\W_]+")

Item = dict[str, float]


def process_docs(dataset: Any) -> Any:
    """Add the vocabulary of each attribute, gathered over all pictures, to every document."""
    rows = dataset["attributes"]
    kinds: list[set[str]] = []
    for things in rows:
        for thing in things:
            kinds += [set() for _ in range(len(thing) - len(kinds))]
            for kind, value in enumerate(thing):
                kinds[kind].add(value)
    vocabulary = json.dumps([sorted(values) for values in kinds])
    return dataset.add_column("vocabulary", [vocabulary] * len(dataset))


def doc_to_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """The same request for every picture."""
    return str(kwargs["prompt"])


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """What is in the picture, for the samples file."""
    return " , ".join(" ".join(thing) for thing in doc["attributes"])


def find_objects(
    caption: str, kinds: Sequence[Sequence[str]], synonyms: Mapping[str, str]
) -> list[tuple[str | None, ...]]:
    """Objects that a caption names.

    In a sentence with one shape word, all its attribute words belong to it. With several, an
    attribute belongs to the next shape, unless a determiner stands between: then to the one before.

    Args:
        caption: Free text.
        kinds: Words of each attribute: colours, shapes, then any others.
        synonyms: Word -> canonical word.

    Returns:
        Triples (colour or None, shape, other attributes or None), one for each object.
    """
    kind_of = {word: kind for kind, words in enumerate(kinds) for word in words}
    found = []
    for sentence in _SENTENCE.split(caption.lower()):
        words = [synonyms.get(word, word) for word in _WORD.findall(sentence)]
        shapes = [place for place, word in enumerate(words) if kind_of.get(word) == 1]
        for index, place in enumerate(shapes):
            start = _phrase_start(words, shapes[index - 1] + 1 if index else 0, place)
            end = len(words)
            if index + 1 < len(shapes):
                end = _phrase_start(words, place + 1, shapes[index + 1])
            thing: list[str | None] = [None] * len(kinds)
            thing[1] = words[place]
            # Words before the shape first, nearest first: "a striped red star" over "star ... red".
            for word in words[start:place][::-1] + words[place + 1 : end]:
                kind = kind_of.get(word)
                if kind is not None and thing[kind] is None:
                    thing[kind] = word
            found.append(tuple(thing))
    return found


def _phrase_start(words: Sequence[str], low: int, shape: int) -> int:
    """Where the noun phrase of the shape at `shape` begins, not before `low`."""
    if low == 0:
        return 0
    openings = [place for place in range(low, shape) if words[place] in DETERMINERS]
    return openings[-1] if openings else low


def _units(things: Sequence[Sequence[str | None]]) -> tuple[Counter[Any], Counter[Any]]:
    objects: Counter[Any] = Counter()
    attributes: Counter[Any] = Counter()
    for colour, shape, *others in things:
        objects[(colour, shape)] += 1
        for kind, value in enumerate(others):
            if value is not None:
                attributes[(colour, shape, kind, value)] += 1
    return objects, attributes


def _item(said: Counter[Any], true: Counter[Any]) -> Item:
    hits, n_said, n_true = (said & true).total(), said.total(), true.total()
    score = 2 * hits / (n_said + n_true) if n_said + n_true else 0.0
    return {"score": score, "hits": hits, "said": n_said, "true": n_true}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Units of one caption; one without any shape word is unparsable."""
    synonyms = {word: value for word, value in doc["synonyms"].items() if value is not None}
    things = find_objects(results[0], json.loads(doc["vocabulary"]), synonyms)
    said_objects, said_attributes = _units(things)
    true_objects, true_attributes = _units(doc["attributes"])
    everything = _item(said_objects + said_attributes, true_objects + true_attributes)
    return {
        "attribute_f1": everything,
        "attribute_precision": everything,
        "attribute_recall": everything,
        "object_f1": _item(said_objects, true_objects),
        "unparsable": float(not things),
        "type": f"{len(doc['attributes'])}_objects",
    }


def _total(items: list[Item], name: str) -> float:
    return sum(item[name] for item in items)


def precision(items: list[Item]) -> float:
    """Share of named units that are in the pictures."""
    said = _total(items, "said")
    return _total(items, "hits") / said if said else 0.0


def recall(items: list[Item]) -> float:
    """Share of the pictures' units that are named."""
    return _total(items, "hits") / _total(items, "true")


def f1(items: list[Item]) -> float:
    """Harmonic mean of precision and recall, over all pictures."""
    total = _total(items, "said") + _total(items, "true")
    return 2 * _total(items, "hits") / total if total else 0.0
