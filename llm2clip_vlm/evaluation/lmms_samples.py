"""lmms-eval's samples and metrics turned into our own result and sample records."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.lmms_job import EvaluationError
from llm2clip_vlm.evaluation.retrieval import bootstrap_interval
from llm2clip_vlm.evaluation.task_helpers import normalise

CLOSED_SET = 64
"""A task with at most this many different targets is a closed set: any other answer is
unparsable."""

MEANINGLESS = frozenset({"pope_yes_ratio"})
"""Metrics that are not reported: this one is the share of yes among the *targets*."""

_IMAGE_KEYS = "image_id imageId image_source image data_id docId question_id id".split()
"""Columns that name a document's picture, the surest first; questions of one picture share it (GQA:
imageId, SEED-Bench: data_id, DocVQA: docId)."""


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `simple_evaluate`'s `results[task]`, without filters' names and errors."""
    found = {}
    for key, value in results.items():
        name, _, _ = key.partition(",")
        number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        if number and "_stderr" not in name and name not in MEANINGLESS:
            found[name] = float(value)
    return found


def samples_of(
    logged: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    aggregations: Mapping[str, Callable[..., Any]] | None = None,
) -> list[dict[str, Any]]:
    """One record a document, in document order.

    Args:
        logged: `simple_evaluate`'s `samples[task]`.
        metrics: Names of the task's metrics, in the order of its YAML.
        aggregations: The task's own, by metric: they mark a document whose values do not say
            themselves whether it was answered right.

    Returns:
        `{doc_id, id, image_id, question, type, answer, target, correct, unparsable}`; `correct` is
        the document's value of the first metric that has one, 0..1; `unparsable` is None where
        the task's answers are open.

    Raises:
        EvaluationError: A document has no value of any metric.
    """
    samples = []
    for item in sorted(logged, key=lambda entry: entry["doc_id"]):
        doc = item["doc"]
        image = next((doc[key] for key in _IMAGE_KEYS if isinstance(doc.get(key), str | int)), None)
        target = item["target"]
        samples.append(
            {
                "doc_id": item["doc_id"],
                "id": doc.get("id"),
                "image_id": str(item["doc_id"] if image is None else image),
                "question": _question(item),
                "type": str(item.get("type") or doc.get("type") or doc.get("category") or ""),
                "answer": item["filtered_resps"][0],
                "target": target,
                "correct": _score(item, metrics, aggregations or {}),
                "unparsable": item.get("unparsable"),
            }
        )
    targets = {normalise(str(sample["target"])) for sample in samples}
    closed = len(targets) <= min(CLOSED_SET, len(samples) // 2)
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
    item: Mapping[str, Any],
    metrics: Sequence[str],
    aggregations: Mapping[str, Callable[..., Any]],
) -> float:
    for name in metrics:
        value = item.get(name)
        if isinstance(value, Mapping):
            found = value.get("score", value.get("is_correct"))
            value = _alone(value, aggregations.get(name)) if found is None else found
        if isinstance(value, int | float):
            return float(value)
    raise EvaluationError(f"document {item['doc_id']}: no value of {', '.join(metrics)}")


def _alone(value: Mapping[str, Any], aggregation: Callable[..., Any] | None) -> float | None:
    """What a task's metric is for one document alone, between 0 and 1."""
    if aggregation is None:
        return None
    # MMBench takes an index above a million for another turn of a question; it writes files, too.
    alone = [{**value, "index": 0} if "index" in value else value]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        wants_args = "args" in inspect.signature(aggregation).parameters
        given = [argparse.Namespace(output_path=scratch)] if wants_args else []
        found = float(aggregation(alone, *given))
    return found / 100 if found > 1 else found


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and per-type scores of a task's samples.

    Args:
        samples: From :func:`samples_of`.

    Returns:
        `{n, n_empty, n_unparsable, score, score_ci, by_type: {type: {score, n}}}`; scores are the
        mean of `correct` in per cent, the interval from 1,000 bootstrap draws by image.
    """
    correct = [sample["correct"] for sample in samples]
    images = [sample["image_id"] for sample in samples]
    known = [sample["unparsable"] for sample in samples if sample["unparsable"] is not None]
    by_type: dict[str, list[float]] = {}
    for sample in samples:
        by_type.setdefault(sample["type"], []).append(sample["correct"])
    return {
        "n": len(samples),
        "n_empty": sum(not sample["answer"].strip() for sample in samples),
        "n_unparsable": int(sum(known)) if known else None,
        "score": 100.0 * float(np.mean(correct)),
        "score_ci": list(bootstrap_interval(correct, images, 1000, seed=0)),
        "by_type": {
            kind: {"score": 100.0 * float(np.mean(values)), "n": len(values)}
            for kind, values in sorted(by_type.items())
        },
    }
