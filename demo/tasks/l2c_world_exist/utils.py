"""World existence: accuracy, and precision, recall and F1 of the answer yes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2clip_vlm.evaluation.vlm.task_helpers import (
    doc_to_text,
    doc_to_visual,
    exact_match,
    normalise,
)

__all__ = ["doc_to_text", "doc_to_visual", "f1", "precision", "process_results", "recall"]

Item = dict[str, bool]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Scores of one question; an answer that is neither yes nor no is wrong and unparsable."""
    said = normalise(results[0])
    item = {"said": said == "yes", "true": normalise(doc["answer"]) == "yes"}
    return {
        "accuracy": exact_match(doc, results),
        "precision": item,
        "recall": item,
        "f1": item,
        "yes_rate": float(item["said"]),
        "unparsable": float(said not in ("yes", "no")),
        "type": doc["category"],
    }


def _share(items: list[Item], of: str) -> float:
    hits = sum(item["said"] and item["true"] for item in items)
    total = sum(item[of] for item in items)
    return hits / total if total else 0.0


def precision(items: list[Item]) -> float:
    """Share of the answers yes that are right."""
    return _share(items, "said")


def recall(items: list[Item]) -> float:
    """Share of the objects that are there and were found."""
    return _share(items, "true")


def f1(items: list[Item]) -> float:
    """Harmonic mean of precision and recall."""
    p, r = precision(items), recall(items)
    return 2 * p * r / (p + r) if p + r else 0.0
