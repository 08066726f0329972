"""Caption separability (caption retrieval accuracy, CRA): do captions of one image find each other?

Paper: LLM2CLIP v6 appendix table A1 (COCO, 5,000 images), whose protocol is not stated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from llm2clip_vlm.metrics.retrieval import RecallResult, recall_at_k

PROTOCOL = "first caption as query, all other captions but its own text as gallery, hit@1"
"""The released material defines caption retrieval accuracy in two ways that differ by 40 points, so
every result names its protocol."""


def caption_task(captions: Sequence[Sequence[str]]) -> tuple[list[Any], ...]:
    """Queries, gallery, right answers, and pairs that do not count (:data:`PROTOCOL`).

    Args:
        captions: At least two captions of each image, all different.

    Returns:
        Each image's first caption (queries); all other captions (gallery); for each query the
        gallery rows of its image, and those of equal text in others; query and gallery row of a
        text that another image has, too, which any encoder finds and which is no answer.
    """
    gallery = [text for texts in captions for text in texts[1:]]
    rows: dict[str, set[int]] = {}
    for row, text in enumerate(gallery):
        rows.setdefault(text, set()).add(row)
    positives = [set().union(*map(rows.__getitem__, texts[1:])) for texts in captions]
    queries = [texts[0] for texts in captions]
    own = [(query, row) for query, text in enumerate(queries) for row in rows.get(text, ())]
    return queries, gallery, positives, own


def caption_separability(
    captions: Sequence[Sequence[str]],
    embed: Callable[[list[str]], Tensor],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> RecallResult:
    """The share of first captions that find another caption of their image first.

    Args:
        captions: See :func:`caption_task`.
        embed: All texts, queries first, to unit vectors.
        bootstrap: Resamples for the interval; 0 = no interval.
        seed: Seed of the resampling.
    """
    queries, gallery, positives, left_out = caption_task(captions)
    one, other = embed(queries + gallery).tensor_split([len(queries)])
    return recall_at_k(one, other, positives, 1, left_out, bootstrap=bootstrap, seed=seed)
