"""Result and sample records made of lmms-eval's samples and metrics."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import logging
import math
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.evaluation.vlm.jobs import EvaluationError
from llm2clip_vlm.evaluation.vlm.task_helpers import normalise
from llm2clip_vlm.metrics.statistics import bootstrap_interval, jackknife_error

PIXELS = "pixels:"
"""Prefix of an `image_id` that is a hash of the picture's pixels."""

logger = logging.getLogger(__name__)

CLOSED_SET = 64
"""A task with at most this many different targets is a closed set: any other answer is
unparsable."""

MEANINGLESS = frozenset({"pope_yes_ratio"})
"""Metrics that are not reported: this one is the share of yes among the *targets*."""

GROUPS = 50
"""Groups of pictures of the jackknife."""

TURNS_AT = 1_000_000
"""MMBench numbers the further turns of question i with i plus multiples of this."""

_IMAGE_KEYS = "image_id imageId image_source image data_id docId question_id id".split()
"""Columns that name a document's picture, the surest first; questions of one picture share it (GQA:
imageId, SEED-Bench: data_id, DocVQA: docId)."""


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `simple_evaluate`'s `results[task]`, without filters' names and errors.

    Raises:
        EvaluationError: Several filters give a metric several values.
    """
    found = {}
    for key, value in results.items():
        name, _, _ = key.partition(",")
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        # No document of its kind (a video, say): no number either.
        if number and math.isfinite(value) and "_stderr" not in name and name not in MEANINGLESS:
            if name in found:
                raise EvaluationError(f"{name}: a value for each of several filters: {[*results]}")
            found[name] = float(value)
    return found


def samples_of(
    logged: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    aggregations: Mapping[str, Callable[..., Any]] | None = None,
    pictures: Mapping[int, str] | None = None,
    *,
    whole: bool = False,
) -> list[dict[str, Any]]:
    """Make one record a document, in document order.

    Args:
        logged: `simple_evaluate`'s `samples[task]`.
        metrics: Names of the task's metrics, in the order of its YAML.
        aggregations: Aggregations of the task, by metric: they mark a document whose values do
            not say themselves whether it was answered right.
        pictures: `doc_id` to a hash of the pixels that the model saw; they identify pictures in
            place of the task's columns.
        whole: The metric is one of all documents together (CIDEr weighs words by how rare they are
            among them): a document alone has no value.

    Returns:
        `{doc_id, id, image_id, question, type, answer, target, correct, unparsable}`; `correct` is
        the document's value of the first metric that has one, 0..1, None with `whole`; `unparsable`
        is None where the task's answers are open. Where a question is asked in several turns
        (MMBench) also `{question_id, turn}`.

    Raises:
        EvaluationError: A document has no value of any metric, none that is a number, one that is
            not from 0 to 1 (NaN is not), or is there twice.
    """
    samples = []
    counts = Counter(entry["doc_id"] for entry in logged)
    if twice := sorted(doc for doc, count in counts.items() if count > 1):
        raise EvaluationError(f"documents {twice[:5]} were answered twice")
    turns = {entry["doc_id"]: _turn(entry, metrics) for entry in logged}
    in_turns = any(turn for _, turn in turns.values())
    for item in sorted(logged, key=lambda entry: entry["doc_id"]):
        doc = item["doc"]
        image = next((doc[key] for key in _IMAGE_KEYS if isinstance(doc.get(key), str | int)), None)
        if pictures is not None:
            seen = pictures.get(item["doc_id"], f"none, document {item['doc_id']}")
            image = f"{PIXELS}{seen}"
        target = item["target"]
        question, turn = turns[item["doc_id"]]
        samples.append(
            {
                "doc_id": item["doc_id"],
                "id": doc.get("id"),
                "image_id": str(item["doc_id"] if image is None else image),
                "question": _question(item),
                "type": str(item.get("type") or doc.get("type") or doc.get("category") or ""),
                "answer": item["filtered_resps"][0],
                "target": target,
                "correct": None if whole else _score(item, metrics, aggregations or {}),
                "unparsable": item.get("unparsable"),
            }
            | ({"question_id": question, "turn": turn} if in_turns else {})
        )
    references = (s["target"] if isinstance(s["target"], list) else [s["target"]] for s in samples)
    targets = {normalise(str(target)) for several in references for target in several}
    closed = not whole and len(targets) <= min(CLOSED_SET, len(samples) // 2)
    for sample in samples:
        if sample["unparsable"] is None and closed:
            sample["unparsable"] = float(normalise(sample["answer"]) not in targets)
    return samples


def _question(item: Mapping[str, Any]) -> str:
    asked = item["doc"].get("question")
    if isinstance(asked, str):
        return asked
    return next((value for value in item["arguments"] if isinstance(value, str)), "")


def _score(
    item: Mapping[str, Any], metrics: Sequence[str], aggregations: Mapping[str, Callable[..., Any]]
) -> float:
    for name in metrics:
        value = item.get(name)
        if isinstance(value, Mapping):
            found = value.get("score", value.get("is_correct"))
            value = _alone(value, aggregations.get(name)) if found is None else found
        if isinstance(value, int | float | np.number | np.bool_):
            if not 0 <= (score := round(float(value), 12)) <= 1:
                where = f"document {item['doc_id']}: {name}"
                raise EvaluationError(f"{where}: expected a score from 0 to 1, got {value}")
            return score
    raise EvaluationError(f"document {item['doc_id']}: no value of {', '.join(metrics)}")


def _turn(item: Mapping[str, Any], metrics: Sequence[str]) -> tuple[str | None, int]:
    """MMBench's question and turn: an index above a million is a further turn of a question."""
    values = (item[name] for name in metrics if isinstance(item.get(name), Mapping))
    index = next((value["index"] for value in values if "index" in value), None)
    if not isinstance(index, int | np.integer):
        return None, 0
    return str(index % TURNS_AT), int(index) // TURNS_AT


def _alone(value: Mapping[str, Any], aggregation: Callable[..., Any] | None) -> float | None:
    """A task's metric for one document alone, between 0 and 1."""
    if aggregation is None:
        return None
    found = float(_aggregate(aggregation, [{**value, "index": 0} if "index" in value else value]))
    # Above 100 where a judge likes an answer better than its reference.
    return min(found / 100, 1.0) if found > 1 else found


def _aggregate(aggregation: Callable[..., Any], values: list[Any]) -> Any:
    """Compute a task's metric; files that it writes and tables that it prints are dropped."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.chdir(scratch),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        wants_args = "args" in inspect.signature(aggregation).parameters
        given = [argparse.Namespace(output_path=scratch)] if wants_args else []
        return aggregation(values, *given)


def metric_errors(
    logged: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    aggregations: Mapping[str, Callable[..., Any]],
) -> dict[str, dict[str, Any]]:
    """Estimate how far each metric would move with other pictures: a jackknife of the metric.

    Pictures are dealt into :data:`GROUPS` groups by their hash (the same in every result, so that
    metrics of several results on the same pictures can be added up), and the metric is computed
    without each group.

    Args:
        logged: `simple_evaluate`'s `samples[task]`.
        samples: Samples from :func:`samples_of`.
        metrics: Result of :func:`metrics_of`.
        aggregations: Aggregations of the task, by metric.

    Returns:
        Metric to `{n, se, without}`: questions, standard error in the metric's unit (None: it is
        not known), and the metric without each group (None: no picture in it).
    """
    pictures = {sample["doc_id"]: sample["image_id"] for sample in samples}
    joined = {sample["doc_id"]: sample["correct"] for sample in questions(samples)}
    found = {}
    for name in metrics.keys() & aggregations.keys():
        given = [item for item in logged if item.get(name) is not None]
        aggregation = aggregations[name]
        if any(_turn(item, [name])[1] for item in given):
            # MMBench takes seconds a time; it is the share of questions with every turn right.
            given = [item for item in given if item["doc_id"] in joined]
            share = float(np.mean([joined[item["doc_id"]] for item in given]))
            scale = metrics[name] / share if share else 1.0
            given = [{**item, name: scale * joined[item["doc_id"]]} for item in given]
            aggregation = np.mean
        whole: dict[Any, int] = {}
        groups = []
        for item in given:
            group = zlib.crc32(str(pictures[item["doc_id"]]).encode()) % GROUPS
            question = item[name].get("question_id") if isinstance(item[name], Mapping) else None
            question = _turn(item, [name])[0] or question
            # Rows of one question are never parted: MME asserts both of a pair.
            groups.append(group if question is None else whole.setdefault(question, group))
        without: list[float | None] = [None] * GROUPS
        try:
            for group in set(groups) if len(set(groups)) > 1 else ():
                rest = [i[name] for i, of in zip(given, groups, strict=True) if of != group]
                without[group] = float(_aggregate(aggregation, rest))
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            logger.warning("%s: no standard error: %s", name, error)
            without = [None] * GROUPS
        asked = [turn == 0 for turn in (_turn(item, [name])[1] for item in given)]
        found[name] = {"n": sum(asked), "se": jackknife_error([without])[0], "without": without}
    return found


def summarise(samples: Sequence[Mapping[str, Any]], whole: float | None = None) -> dict[str, Any]:
    """Counts and per-type scores of a task's samples.

    Args:
        samples: Samples from :func:`samples_of`.
        whole: The task's metric, where it is one of all documents together; the score is 100 times
            it, without an interval.

    Returns:
        `{n, n_images, n_empty, n_unparsable, score, score_ci, by_type: {type: {score, n}}}`; `n`
        is questions, `n_empty` those with an empty answer in any turn; scores are the mean of
        `correct` in per cent (all turns of a question right, where it has several), the interval
        from 1,000 bootstrap draws by image.
    """
    # Joined, the answers of turns are not empty: " |  | ".
    empty = {s.get("question_id") or s["doc_id"] for s in samples if not s["answer"].strip()}
    samples = questions(samples)
    correct = [sample["correct"] for sample in samples]
    images = [sample["image_id"] for sample in samples]
    known = [sample["unparsable"] for sample in samples if sample["unparsable"] is not None]
    counts = {
        "n": len(samples),
        "n_images": len(set(images)),
        "n_empty": sum((s.get("question_id") or s["doc_id"]) in empty for s in samples),
        "n_unparsable": int(sum(known)) if known else None,
    }
    if whole is not None:
        score = 100.0 * whole
        by_whole = {"": {"score": score, "n": len(samples)}}
        return counts | {"score": score, "score_ci": None, "by_type": by_whole}
    by_type: dict[str, list[float]] = {}
    for sample in samples:
        by_type.setdefault(sample["type"], []).append(sample["correct"])
    return counts | {
        "score": 100.0 * float(np.mean(correct)),
        "score_ci": list(bootstrap_interval(correct, images, 1000, seed=0)),
        "by_type": {
            kind: {"score": 100.0 * float(np.mean(values)), "n": len(values)}
            for kind, values in sorted(by_type.items())
        },
    }


@dataclass(frozen=True)
class PairedSamples:
    """Answers of two checkpoints to the same documents."""

    correct_a: np.ndarray
    """float[n] in 0..1."""
    correct_b: np.ndarray
    """float[n] in 0..1."""
    image_ids: list[str]
    """The image of each document, by its pixels where one of the two knows them."""
    pictures_known: bool = True
    """Whether pixels identify the images, not a column or the document's number."""


def load_samples(path: str | Path) -> list[dict[str, Any]]:
    """Read a `<task>.samples.jsonl` of `eval/run_lmms.py` or `eval/run_encoder.py`.

    Returns:
        One sample a question: the turns of one question are joined by :func:`questions`.

    Raises:
        RecordError: The file is missing or damaged.
        ValueError: It holds no sample, one document twice, or a score that is not from 0 to 1.
    """
    samples = list(iter_rows(path))
    if not samples:
        raise ValueError(f"{path}: expected one sample a line, got an empty file")
    counts = Counter(sample["doc_id"] for sample in samples)
    for sample in samples:
        if counts[sample["doc_id"]] > 1:
            raise ValueError(f"{path}: document {sample['doc_id']} is there twice; evaluate again")
        score = sample["correct"]
        # None: a metric of all documents together
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
            raise ValueError(
                f"{path}: document {sample['doc_id']}: expected a score from 0 to 1, got {score}; "
                "evaluate again"
            )
    return questions(samples)


def questions(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the turns of one question, as MMBench asks it: right only if every turn is.

    Args:
        samples: Those with a `question_id` are turns; the first of each has `turn` 0.

    Returns:
        One sample a question, with the first turn's fields; as MMBench's own score does, turns
        without their first one (a run over the first documents only) are left out.
    """
    found: dict[Any, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample.get("turn") or 0):
        key = sample.get("question_id")
        if key is None:
            found[None, sample["doc_id"]] = dict(sample)
        elif not sample["turn"]:
            found[key] = dict(sample)
        elif whole := found.get(key):
            whole["correct"] = min(whole["correct"], sample["correct"])
            whole["answer"] = f"{whole['answer']} | {sample['answer']}"
            whole["target"] = f"{whole['target']} | {sample['target']}"
            if whole["unparsable"] is not None:
                whole["unparsable"] = max(whole["unparsable"], sample["unparsable"])
    return list(found.values())


def pair_samples(
    samples_a: Sequence[Mapping[str, Any]], samples_b: Sequence[Mapping[str, Any]]
) -> PairedSamples:
    """Align the samples of two checkpoints by document.

    Args:
        samples_a: Result of :func:`load_samples`.
        samples_b: Samples of the same task on the same data.

    Returns:
        Scores in the order of `samples_a`.

    Raises:
        ValueError: The documents differ in number, question, target or picture: not the same data.
    """
    others = {sample["doc_id"]: sample for sample in samples_b}
    if len(others) != len(samples_a):
        raise ValueError(
            f"samples: expected the same documents, got {len(samples_a)} and {len(others)}; "
            "evaluate both checkpoints with one suite and one --limit"
        )
    hashed = [
        all(str(sample["image_id"]).startswith(PIXELS) for sample in side)
        for side in (samples_a, samples_b)
    ]
    keys = ["question", "target"] + ["image_id"] * (hashed[0] == hashed[1])
    for sample in samples_a:
        other = others.get(sample["doc_id"])
        if other is None or any(sample[k] != other[k] for k in keys):
            raise ValueError(
                f"samples: document {sample['doc_id']} differs between the two runs "
                f"({sample['question']!r}): they were made on different data"
            )
    known = samples_a if hashed[0] else [others[sample["doc_id"]] for sample in samples_a]
    return PairedSamples(
        correct_a=np.array([sample["correct"] for sample in samples_a], dtype=np.float64),
        correct_b=np.array([others[s["doc_id"]]["correct"] for s in samples_a], dtype=np.float64),
        image_ids=[str(sample["image_id"]) for sample in known],
        pictures_known=any(hashed),
    )
