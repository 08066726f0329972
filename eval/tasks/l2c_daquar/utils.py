"""DAQUAR: accuracy by sets of answers (Malinowski and Fritz 2014, without WUPS), and exact match.

WUPS, the softer score of the same paper, needs WordNet and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2clip_vlm.evaluation.vlm.task_helpers import (
    doc_to_text,
    doc_to_visual,
    exact_match,
    normalise,
)

__all__ = ["doc_to_text", "doc_to_visual", "process_docs", "process_results"]


def process_docs(dataset: Any) -> Any:
    """Leave out training questions, where a column tells."""
    if "split" not in dataset.column_names:
        return dataset
    return dataset.filter(lambda split: split != "train", input_columns="split")


def answer_set(text: str) -> set[str]:
    """The answers of a list, whose order says nothing."""
    return {normalise(part.replace("_", " ")) for part in text.rstrip(" .").split(",")} - {""}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """1.0 or 0.0 for one question, and its kind."""
    listed = doc["answers"] if isinstance(doc["answers"], list) else [doc["answers"]]
    wanted, kind = answer_set(",".join(listed)), doc.get("kind") or "question"
    if not wanted:
        raise ValueError(f"question {doc['question']!r}: expected answers, got {doc['answers']!r}")
    return {
        "accuracy": float(answer_set(results[0]) == wanted),
        "exact_match": exact_match(doc, results),
        "type": kind,
    }
