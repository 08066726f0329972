"""The score gate: is a result within noise of the published one, and if not, what differs?

A published row was measured with another model and often another harness. The gate says which
numbers two equally good models could both have given, and lists where the run departs from the
published protocol. It is no proof of equality, and no comparison of towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip_vlm.metrics.statistics import jackknife_error
from llm2clip_vlm.recipe.suite import ExpectedColumn, ExpectedScores

Z_95 = 1.96
"""Normal quantile for the binomial's noise."""


def gate(
    expected: ExpectedScores, row: str, results: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compares one checkpoint's results with a published row, column by column.

    Args:
        expected: The published table.
        row: One of its models, a key of `expected.rows`.
        results: Name -> result, from :func:`~llm2clip_vlm.evaluation.vlm.jobs.run_suite`.

    Returns:
        `{column, ours, published, noise, noise_of, verdict, differs}` of each column of the row
        (`ours`, `noise` and `noise_of` are None where it was not run): numbers on the published
        scale, `noise` the 95 % half-width of the difference of two independent runs as uncertain
        as this one, `noise_of` its source (`pictures`: the metric's own jackknife over pictures;
        `binomial`: as if questions were independent and the metric a share of them, for results
        that do not have it), `verdict` one of `within noise`, `above`, `below`, `not run`, and
        what differs from the published protocol.

    Raises:
        ValueError: A result without the column's metric.
    """
    entries = []
    for name, published in expected.rows[row].items():
        column = expected.columns[name]
        entry: dict[str, Any] = {"column": name, "published": published, "ours": None}
        entry |= {"noise": None, "noise_of": None, "verdict": "not run"}
        entries.append(entry)
        if missing := [result for result in column.results if result not in results]:
            entry["differs"] = [f"no {', '.join(missing)}"]
            continue
        ours = [results[result] for result in column.results]
        share = sum(_share(result, column) for result in ours) / len(ours)
        entry["noise"], entry["noise_of"] = _noise(ours, column, share)
        entry["ours"] = share * column.value_full
        delta = entry["ours"] - published
        side = "above" if delta > 0 else "below"
        entry["verdict"] = "within noise" if abs(delta) <= entry["noise"] else side
        differs = [text for result in ours for text in _differs(result, column, expected)]
        entry["differs"] = list(dict.fromkeys(differs))
    return entries


def _noise(
    ours: Sequence[Mapping[str, Any]], column: ExpectedColumn, share: float
) -> tuple[float, str]:
    """95 % half-width of the difference of two runs on the published scale, and its source."""
    errors = [result.get("metric_errors", {}).get(column.metric) for result in ours]
    if all(found and found["se"] is not None for found in errors):
        whole = [result["metrics"][column.metric] for result in ours]
        error, groups = jackknife_error([found["without"] for found in errors if found], whole)
        if error is not None and error > 0:
            from scipy.stats import t

            width = t.ppf(0.975, groups - 1) * math.sqrt(2) * error
            return float(width / column.metric_full * column.value_full), "pictures"
    spread = math.sqrt(2 * min(max(share * (1 - share), 1e-4), 0.25) / column.n)
    return Z_95 * spread * column.value_full, "binomial"


def _share(result: Mapping[str, Any], column: ExpectedColumn) -> float:
    metrics = result["metrics"]
    if column.metric not in metrics:
        raise ValueError(
            f"result {result['task']}: expected the metric {column.metric}, got {sorted(metrics)}"
        )
    return float(metrics[column.metric]) / column.metric_full


def _differs(
    result: Mapping[str, Any], column: ExpectedColumn, expected: ExpectedScores
) -> list[str]:
    """List where a result departs from the published protocol."""
    prompt, used = result["prompt_example"], result["settings"]["image_processor"]
    texts = [f"prompt lacks {text!r}" for text in column.prompt_has if text not in prompt]
    texts += [f"prompt has {text!r}" for text in column.prompt_lacks if text in prompt]
    if expected.image_processor and not used.startswith(expected.image_processor):
        texts.append(f"image processor {used}, not {expected.image_processor}")
    asked = column.n // len(column.results)
    n = result.get("metric_errors", {}).get(column.metric, result)["n"]
    if n != asked:
        texts.append(f"{n} questions, not {asked}")
    if declared := result.get("deviation"):
        texts.append(declared)
    return texts


def gate_table(rows: list[dict[str, Any]], source: str) -> str:
    """The comparison as lines of text."""
    lines = [f"score gate against {source}"]
    for row in rows:
        ours = "" if row["ours"] is None else f"{row['ours']:8.1f} +- {row['noise']:.1f}"
        ours += " (binomial)" if row["noise_of"] == "binomial" else ""
        differs = f"  ({'; '.join(row['differs'])})" if row["differs"] else ""
        lines.append(
            f"{row['column']:<16} {row['published']:8.1f} {ours:>16}  {row['verdict']}{differs}"
        )
    return "\n".join(lines)
