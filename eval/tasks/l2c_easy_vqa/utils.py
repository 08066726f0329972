"""easy-VQA: exact match, split into yes/no, colour and shape questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2clip_vlm.evaluation.task_helpers import (
    doc_to_text,
    doc_to_visual,
    exact_match,
    normalise,
)

__all__ = ["doc_to_text", "doc_to_visual", "process_results"]

SHAPES = frozenset({"circle", "rectangle", "triangle"})


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """1.0 or 0.0 for one question, and the kind of its answer."""
    answer = normalise(doc["answer"])
    kind = "shape" if answer in SHAPES else "colour"
    kind = "yes_no" if answer in ("yes", "no") else kind
    return {"accuracy": exact_match(doc, results), "type": kind}
