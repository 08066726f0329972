"""Comparing two models honestly: within a seed by samples, across seeds by differences.

Within one seed, :func:`paired_bootstrap` and :func:`mcnemar_exact` say whether two checkpoints
differ on these questions. They say nothing about training again: for that the seed is the unit, and
:func:`seed_summary` (exact sign-flip test, t interval), or :func:`unpaired_summary` where the two
sides have other seeds, is the one that may carry a claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.data.records import iter_rows
from llm2clip_vlm.evaluation.retrieval import bootstrap_interval, cluster_codes

EXACT_FLIPS = 20
"""Up to this many differences all sign patterns are written out."""
PIXELS = "pixels:"
"""How the `image_id` of a sample begins whose picture is told by a hash of its pixels."""
EXACT_DIVISIONS = 200_000
"""Up to this many divisions of the seeds into two runs all are written out (8 and 8: 12,870)."""


@dataclass(frozen=True)
class PairedSamples:
    """The same documents answered by two checkpoints."""

    correct_a: np.ndarray
    """float[n] in 0..1."""
    correct_b: np.ndarray
    """float[n] in 0..1."""
    image_ids: list[str]
    """The image of each document, by its pixels where one of the two tells it so."""
    pictures_known: bool = True
    """Whether the images are told by their pixels, not by a column or the document's number."""


def paired_bootstrap(
    correct_a: Sequence[float] | np.ndarray,
    correct_b: Sequence[float] | np.ndarray,
    image_ids: Sequence[Hashable],
    n: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of two accuracies on the same documents, with a 95 % interval.

    Args:
        correct_a: float[docs], 0..1.
        correct_b: float[docs], the same documents in the same order.
        image_ids: Image of each document; whole images are resampled, because questions about one
            image are not independent.
        n: Resamples.
        seed: Seed of the resampling.

    Returns:
        `{"delta": a - b, "ci": [low, high], "n": documents, "images": clusters}`; delta and ci in
        percentage points.

    Raises:
        ValueError: Lengths differ or are zero.
    """
    first, second = _same_length(correct_a, correct_b)
    if len(image_ids) != len(first):
        raise ValueError(f"image_ids: expected {len(first)} entries, got {len(image_ids)}")
    return {
        "delta": 100.0 * float((first - second).mean()),
        "ci": list(bootstrap_interval(first - second, image_ids, n, seed)),
        "n": len(first),
        "images": len(set(image_ids)),
    }


def mcnemar_exact(
    correct_a: Sequence[float] | np.ndarray, correct_b: Sequence[float] | np.ndarray
) -> float:
    """Exact two-sided McNemar test: are the documents that only one got right evenly split?

    It treats documents as independent; with several questions an image it is too optimistic, and
    :func:`paired_bootstrap` is the one to believe.

    Args:
        correct_a: 0 or 1 for each document.
        correct_b: The same documents in the same order.

    Returns:
        p value; 1.0 when no document differs.

    Raises:
        ValueError: Lengths differ, or a value is neither 0 nor 1.
    """
    from scipy.stats import binomtest

    first, second = _same_length(correct_a, correct_b)
    if not is_binary(first, second):
        raise ValueError("mcnemar_exact: expected values 0 or 1; graded scores need the bootstrap")
    only_a, only_b = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def is_binary(*scores: np.ndarray) -> bool:
    """Whether every score is 0 or 1."""
    return all(bool(np.isin(values, (0.0, 1.0)).all()) for values in scores)


def sign_flip_test(deltas: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided sign-flip (permutation) test of mean zero, one difference a unit.

    Exact up to `EXACT_FLIPS` differences other than zero, and for whole numbers (counts of right
    answers) however many there are; else 100,000 patterns are drawn.

    Args:
        deltas: One difference a training seed, or an image.
        seed: Of the patterns drawn.

    Returns:
        Share of sign patterns whose absolute sum is at least the observed one. With n differences
        it cannot be below `2 / 2**n` (n = 8: 0.0078).

    Raises:
        ValueError: No differences, or one that is not finite.
    """
    values = _finite(deltas, at_least=1)
    values = values[values != 0]
    observed = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if len(values) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= observed).mean())
    if (values == np.round(values)).all():
        reach = int(np.abs(values).sum())
        share = np.zeros(2 * reach + 1)
        share[reach] = 1.0
        for value in np.abs(values).astype(int):
            # No sum is beyond the reach, so nothing wraps around.
            share = (np.roll(share, value) + np.roll(share, -value)) / 2
        return float(share[np.abs(np.arange(-reach, reach + 1)) >= observed].sum())
    draws, rng = 100, np.random.default_rng(seed)
    sums = np.concatenate(
        [(rng.integers(0, 2, (1000, len(values))) * 2 - 1) @ values for _ in range(draws)]
    )
    return float(((np.abs(sums) >= observed).sum() + 1) / (len(sums) + 1))


def cluster_sums(values: np.ndarray, image_ids: Sequence[Hashable]) -> np.ndarray:
    """Sum of the values of each image: the units of a test over images."""
    return np.bincount(cluster_codes(image_ids), weights=values)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction for several tests.

    Args:
        p_values: Name to p value.

    Returns:
        Name to the adjusted p value: below alpha exactly where Holm rejects at alpha.

    Paper: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    adjusted, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = least
    return adjusted


def mean_interval(deltas: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % Student-t interval of the mean across training seeds.

    Args:
        deltas: At least two differences.

    Returns:
        `(low, high)` in the unit of `deltas`.

    Raises:
        ValueError: Fewer than two differences, or one that is not finite.
    """
    from scipy import stats

    values = _finite(deltas, at_least=2)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def seed_summary(deltas: Sequence[float]) -> dict[str, Any]:
    """What an A/B across seeds reports.

    Args:
        deltas: Differences of the two towers, one a seed, in percentage points.

    Returns:
        `{"delta", "ci", "p", "deltas_by_seed"}` for `docs/results/ab.json`.
    """
    return {
        "delta": float(np.mean(deltas)),
        "ci": list(mean_interval(deltas)),
        "p": sign_flip_test(deltas),
        "deltas_by_seed": [float(delta) for delta in deltas],
    }


def unpaired_summary(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """What a comparison of runs with different seeds reports.

    Args:
        a: Scores in per cent, one a seed; at least two.
        b: The other run's.

    Returns:
        `{"delta", "ci", "p"}`: Welch's t interval, and the permutation test of which seeds belong
        to which run (exact up to :data:`EXACT_DIVISIONS` divisions; else a tenth are drawn).
    """
    from scipy import stats

    first, second = _finite(a, at_least=2), _finite(b, at_least=2)
    both, n = np.concatenate([first, second]), len(first)
    if math.comb(len(both), n) <= EXACT_DIVISIONS:
        sums = np.array([sum(chosen) for chosen in itertools.combinations(both, n)])
    else:
        rng = np.random.default_rng(0)
        sums = np.array([rng.permutation(both)[:n].sum() for _ in range(EXACT_DIVISIONS // 10)])
        sums = np.append(sums, first.sum())
    moved = np.abs(sums / n - (both.sum() - sums) / len(second))
    delta = float(first.mean() - second.mean())
    p = float((moved >= abs(delta) - 1e-9 * np.abs(both).max()).mean())
    interval = [delta, delta]
    if first.std() + second.std() > 0:
        found = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
        interval = [float(found.low), float(found.high)]
    return {"delta": delta, "ci": interval, "p": p}


def jackknife_error(
    without: Sequence[Sequence[float | None]], whole: Sequence[float] | None = None
) -> tuple[float | None, int]:
    """Standard error of a metric, or of the mean of several, by leaving out groups of pictures.

    Args:
        without: For each metric, its value without each group; None: it has nothing in it.
        whole: Each metric's value with all groups; needed for several.

    Returns:
        The standard error (None where fewer than two groups tell it), and the number of groups.
    """
    used = [k for k in range(len(without[0])) if any(row[k] is not None for row in without)]
    if len(used) < 2:
        return None, len(used)
    values = [
        [(row[k], all_of) for k in used]
        for row, all_of in zip(without, whole or [0.0], strict=True)
    ]
    means = np.mean([[all_of if v is None else v for v, all_of in row] for row in values], axis=0)
    return float(math.sqrt((len(used) - 1) * means.var())), len(used)


def rounded(value: Any, places: int = 6) -> Any:
    """A JSON value with its numbers cut to so many places."""
    if isinstance(value, float):
        return round(value, places)
    if isinstance(value, Mapping):
        return {key: rounded(item, places) for key, item in value.items()}
    return [rounded(item, places) for item in value] if isinstance(value, list) else value


def load_samples(path: str | Path) -> list[dict[str, Any]]:
    """Read a `<task>.samples.jsonl` of `eval/run_lmms.py` or `eval/run_encoder.py`.

    Returns:
        One sample a question: the turns of one question are joined by :func:`questions`.

    Raises:
        RecordError: The file is missing or damaged.
        ValueError: It holds no sample, one document twice, or a score that is no number.
    """
    samples = list(iter_rows(path))
    if not samples:
        raise ValueError(f"{path}: expected one sample a line, got an empty file")
    seen: set[Any] = set()
    for sample in samples:
        if sample["doc_id"] in seen:
            raise ValueError(f"{path}: document {sample['doc_id']} is there twice; evaluate again")
        seen.add(sample["doc_id"])
        score = sample["correct"]
        if not isinstance(score, int | float) or not math.isfinite(score):
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
        samples_a: From :func:`load_samples`.
        samples_b: The same task on the same data.

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
    told = samples_a if hashed[0] else [others[sample["doc_id"]] for sample in samples_a]
    return PairedSamples(
        correct_a=np.array([sample["correct"] for sample in samples_a], dtype=np.float64),
        correct_b=np.array([others[s["doc_id"]]["correct"] for s in samples_a], dtype=np.float64),
        image_ids=[str(sample["image_id"]) for sample in told],
        pictures_known=any(hashed),
    )


def _same_length(
    correct_a: Sequence[float] | np.ndarray, correct_b: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    first = np.asarray(correct_a, dtype=np.float64)
    second = np.asarray(correct_b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            "paired scores: expected two lists of one length above 0, got shapes "
            f"{first.shape} and {second.shape}"
        )
    return first, second


def _finite(deltas: Sequence[float] | np.ndarray, at_least: int) -> np.ndarray:
    values = np.asarray(deltas, dtype=np.float64)
    if values.ndim != 1 or len(values) < at_least or not np.isfinite(values).all():
        raise ValueError(f"deltas: expected at least {at_least} finite differences, got {deltas!r}")
    return values
