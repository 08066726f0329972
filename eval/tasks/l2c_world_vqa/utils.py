"""World VQA: exact match; the runner splits it by question type from the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2clip_vlm.evaluation.vlm.task_helpers import doc_to_text, doc_to_visual, exact_match

__all__ = ["doc_to_text", "doc_to_visual", "process_results"]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 or 0.0 for one question."""
    return {"accuracy": exact_match(doc, results)}
