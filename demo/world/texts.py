"""The drawn world in text alone: what its base language model reads before any stage.

A language model of a million parameters that starts on whole captions stays on the plateau of
guessing from marginals. It leaves it when it first learns to bind, from bare lists, and then meets
longer and freer text (`docs/experiments.md`, rung 1). Each kind here is one step of that way.

All scenes come from the `text` split; none of them is ever drawn as a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from world.scenes import (
    CELLS,
    Scene,
    Thing,
    draw_scene,
    long_caption,
    questions,
    scene_list,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Segments = list[tuple[str, bool]]
"""A document in pieces: text, and whether the model is trained on it."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|user|> ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASK_CAPTION = "describe the image ."
ASK_SHORT = "answer the question using a single word or phrase ."
"""The suffix that LLaVA, and lmms-eval's prompts after it, put behind short questions."""
SHORT_SHARE = 0.15
"""Share of the questions that end with :data:`ASK_SHORT`."""

_VALUE: dict[str, Callable[[Thing], str]] = {
    "shape": lambda t: t.shape,
    "color": lambda t: t.colour,
    "pattern": lambda t: t.pattern,
    "where": lambda t: CELLS[t.cell],
}
_KEYS = ("shape", "color", "where")
_FIXED = ("pattern color shape where",)
_FREE = (*_FIXED, "where pattern color shape", "where color shape pattern")
"""Orders of an object's values."""


def _shuffled(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    return [scene.things[i] for i in rng.permutation(len(scene.things))]


def _pick(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[rng.integers(len(scene.things))]


def _key_and_value(rng: np.random.Generator) -> tuple[str, str]:
    key = _KEYS[rng.integers(len(_KEYS))]
    others = [name for name in _VALUE if name != key]
    return key, others[rng.integers(len(others))]


def _pairs(scene: Scene, rng: np.random.Generator) -> Segments:
    """`ring purple cross red ? cross red`: one key, one value, nothing between."""
    key, value = _key_and_value(rng)
    facts = [f"{_VALUE[key](t)} {_VALUE[value](t)}" for t in _shuffled(scene, rng)]
    segments: Segments = [("<s> " + " ".join(facts), False)]
    for _ in range(8):
        thing = _pick(scene, rng)
        segments += [(f"? {_VALUE[key](thing)}", False), (_VALUE[value](thing), True)]
    return segments


def _tuples(
    scene: Scene, rng: np.random.Generator, orders: tuple[str, ...], chat: bool
) -> Segments:
    """`striped red cross northwest , ... color cross red`: which value is asked, by name."""
    facts = [
        " ".join(_VALUE[name](t) for name in orders[rng.integers(len(orders))].split())
        for t in _shuffled(scene, rng)
    ]
    segments: Segments = [("<s> " + " , ".join(facts) + " ,", False)]
    for _ in range(8):
        thing = _pick(scene, rng)
        key, value = _key_and_value(rng)
        ask = f"{value} {_VALUE[key](thing)}" + (" ? <|assistant|>" if chat else "")
        segments += [(ask, False), (_VALUE[value](thing), True)]
    return segments


def as_asked(question: str, rng: np.random.Generator) -> str:
    """A question as it stands in training text: some end with :data:`ASK_SHORT`."""
    return f"{question} {ASK_SHORT}" if rng.random() < SHORT_SHARE else question


def _asked(scene: Scene, rng: np.random.Generator, context: str) -> Segments:
    """A description, then one question of each kind in the chat template."""
    segments: Segments = [("<s>", False)]
    for turn, question in enumerate(questions(scene, rng)):
        text = f"{context} " * (turn == 0) + as_asked(question.question, rng)
        segments.append((f"<|user|> {text} <|assistant|>", False))
        segments.append((f"{question.answer} <|end|>", True))
    return segments


def _simple(scene: Scene, rng: np.random.Generator) -> str:
    return " ".join(
        f"a {t.pattern} {t.colour} {t.shape} in the {CELLS[t.cell]} ."
        for t in _shuffled(scene, rng)
    )


def _retell(scene: Scene, rng: np.random.Generator) -> Segments:
    """A description, and the same scene told in other words."""
    return [
        (f"<s> <|user|> {long_caption(scene, rng, 'full')} {ASK_CAPTION} <|assistant|>", False),
        (f"{long_caption(scene, rng, 'full')} <|end|>", True),
    ]


KINDS: dict[str, Callable[[Scene, np.random.Generator], Segments]] = {
    "pairs": _pairs,
    "tuples": lambda scene, rng: _tuples(scene, rng, _FIXED, chat=False),
    "tuples_free": lambda scene, rng: _tuples(scene, rng, _FREE, chat=False),
    "tuples_chat": lambda scene, rng: _tuples(scene, rng, _FREE, chat=True),
    "list": lambda scene, rng: _asked(scene, rng, scene_list(scene)),
    "simple": lambda scene, rng: _asked(scene, rng, _simple(scene, rng)),
    "seen": lambda scene, rng: _asked(scene, rng, long_caption(scene, rng, "pairs")),
    "long": lambda scene, rng: _asked(scene, rng, long_caption(scene, rng, "full")),
    "retell": _retell,
    "caption": lambda scene, rng: [
        ("<s>", False),
        (f"{long_caption(scene, rng, 'full')} <|end|>", True),
    ],
}
"""Kinds of documents, from bare to free."""


def document(kind: str, rng: np.random.Generator) -> Segments:
    """One document about a new scene of the `text` split.

    Args:
        kind: One of :data:`KINDS`.
        rng: Where scene and wording come from.

    Returns:
        The document in pieces.

    Raises:
        ValueError: The kind does not exist.
    """
    if kind not in KINDS:
        raise ValueError(f"kind of document: expected one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](draw_scene(rng, "text"), rng)


def build_tokenizer(
    specials: dict[str, str], window_tokens: int, *, more: str = ""
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's words; it reads in lower case.

    Args:
        specials: `pad`, `unk`, `bos`, `eos` and any further special tokens by name; their ids are
            0, 1, 2, ... in this order.
        window_tokens: Longest text.
        more: Words beyond those of captions and questions.

    Returns:
        The tokenizer; it puts bos and eos around a text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials.values(), *vocabulary(), *more.split()]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=specials["unk"]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    bos, eos = specials["bos"], specials["eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, ids[bos]), (eos, ids[eos])]
    )
    named = {f"{name}_token": specials[name] for name in ("pad", "unk", "bos", "eos")}
    further = [token for name, token in specials.items() if f"{name}_token" not in named]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=further,
        model_max_length=window_tokens,
        padding_side="right",
        **named,
    )
