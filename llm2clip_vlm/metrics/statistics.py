"""Comparing two models honestly: within a seed by samples, across seeds by differences.

Within one seed, :func:`paired_bootstrap` and :func:`mcnemar_exact` say whether two checkpoints
differ on these questions. They say nothing about training again: for that the seed is the unit, and
:func:`seed_summary` (exact sign-flip test, t interval), or :func:`unpaired_summary` where the two
sides have other seeds, is the one that may carry a claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

Scores = Sequence[float] | np.ndarray
"""Numbers in a row."""

FEW_IMAGES = 50
"""Below this many images percentiles of a bootstrap are too narrow (five: 85 % instead of 95)."""


def cluster_codes(groups: Sequence[Hashable]) -> np.ndarray:
    """Number the groups 0, 1, ... in order of appearance.

    Returns:
        int[n], the number of each entry's group.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_interval(
    values: Scores, groups: Sequence[Hashable], resamples: int, seed: int, least: float = 0.0
) -> tuple[float, float]:
    """95 % interval of the mean when whole groups are drawn with replacement.

    Percentiles of the draws; below :data:`FEW_IMAGES` groups they are moved away from the mean by
    what Student's t and the lost degree of freedom ask for. Where all groups have one mean (all
    right, or one image), draws are all alike and show no width; then at most a share of images is
    otherwise that would be missed by as many trials in 2.5 % of cases, and as otherwise as can be:
    where all are wrong, or right, that is the exact interval of a share.

    Args:
        values: [n], 0..1 or differences of such, with `least=-1`.
        groups: [n], each value's image: values of one image are not independent.
        resamples: Number of draws.
        seed: Seed of the draws; the same seed and groups give the same draws.
        least: Least value that there can be: -1 for differences, even where none is negative.

    Returns:
        `(low, high)` in per cent.
    """
    codes, values = cluster_codes(groups), np.asarray(values, dtype=np.float64)
    counted = np.stack([np.bincount(codes, weights=values), np.bincount(codes)], axis=1)
    means = counted[:, 0] / counted[:, 1]
    if np.ptp(means) < 1e-9:
        unseen = 1 - 0.025 ** (1 / len(means))
        ends = 100.0 * (means[0] + unseen * np.array([least - means[0], 1 - means[0]]))
    else:
        figure = lambda sums: 100.0 * sums[:, 0] / sums[:, 1]  # noqa: E731
        ends = np.array(bootstrap_of_sums(counted, figure, resamples, seed))
        if values.min() >= least and values.max() <= 1:  # so is their mean
            ends = ends.clip(100.0 * least, 100.0)
    return float(ends[0]), float(ends[1])


def percentile_interval(draws: np.ndarray, found: float, images: int) -> np.ndarray:
    """Low and high end of what bootstrap draws over so many images say about a figure.

    Returns:
        `[low, high]`; of one image alone, whose draws are all alike, infinities.
    """
    ends: np.ndarray = np.percentile(draws, [2.5, 97.5])
    if images == 1:
        return np.array([-np.inf, np.inf])
    if images < FEW_IMAGES:
        from scipy.stats import norm, t

        wider = t.ppf(0.975, images - 1) / norm.ppf(0.975) * np.sqrt(images / (images - 1))
        ends = found + wider * (ends - found)
    return ends


def bootstrap_of_sums(
    counts: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> tuple[float, float]:
    """95 % interval of a figure of counts that are summed over images, such as a mean IoU.

    Args:
        counts: `[images, ...]`.
        figure: Makes figures `[draws]` of sums `[draws, ...]`.
        resamples: Number of draws of the images with replacement.
        seed: Seed of the draws.

    Returns:
        `(low, high)` in the figure's unit, as of :func:`percentile_interval`.
    """
    images, counted, rng = len(counts), counts.astype(np.float64), np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, 500):  # all at once may not fit into memory
        size = min(500, resamples - start)
        weights = rng.multinomial(images, np.full(images, 1.0 / images), size=size)
        drawn.append(figure(np.tensordot(weights.astype(np.float64), counted, axes=1)))
    whole = float(figure(counted.sum(axis=0)[None])[0])
    low, high = percentile_interval(np.concatenate(drawn), whole, images)
    return float(low), float(high)


EXACT_FLIPS = 20
"""Up to this many differences all sign patterns are written out."""

EXACT_DIVISIONS = 200_000
"""Up to this many divisions of the seeds into two runs all are written out (8 and 8: 12,870)."""


def accuracy(
    right: Sequence[bool] | np.ndarray, groups: Sequence[Hashable], resamples: int, seed: int
) -> dict[str, Any]:
    """Per cent right with its interval, whole groups (images) resampled.

    Returns:
        `{"score", "ci"}`; `ci` is None without resamples.
    """
    found = list(bootstrap_interval(right, groups, resamples, seed)) if resamples else None
    return {"score": 100.0 * float(np.mean(right)), "ci": found}


def paired_bootstrap(
    correct_a: Scores,
    correct_b: Scores,
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
        "ci": list(bootstrap_interval(first - second, image_ids, n, seed, least=-1.0)),
        "n": len(first),
        "images": len(set(image_ids)),
    }


def mcnemar_exact(correct_a: Scores, correct_b: Scores) -> float:
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


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper-Pearson).

    Args:
        successes: Number of times that it happened.
        trials: Number of times that it could have, at least one.

    Returns:
        `(low, high)` in per cent.
    """
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci()
    return 100.0 * float(found.low), 100.0 * float(found.high)


def is_binary(*scores: np.ndarray) -> bool:
    """Whether every score is 0 or 1."""
    return all(bool(np.isin(values, (0.0, 1.0)).all()) for values in scores)


def sign_flip_test(deltas: Scores, seed: int = 0) -> float:
    """Two-sided sign-flip (permutation) test of mean zero, one difference a unit.

    Exact up to `EXACT_FLIPS` differences other than zero, and for whole numbers (counts of right
    answers) however many there are; else 100,000 patterns are drawn.

    Args:
        deltas: One difference a training seed, or an image.
        seed: Seed of the patterns drawn.

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
        # All sums of +-a +-b ...: [0] -> [a, -a] -> [a + b, -a + b, a - b, -a - b] -> ...
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= observed).mean())
    if (values == np.round(values)).all():
        reach = int(np.abs(values).sum())
        share = np.zeros(2 * reach + 1)
        share[reach] = 1.0  # share[reach + s]: of the sign patterns so far, those of the sum s
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


def mean_interval(deltas: Scores) -> tuple[float, float]:
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
    """Summary of an A/B across seeds.

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
    """Summary of a comparison of runs with different seeds.

    Args:
        a: Scores in per cent, one a seed; at least two.
        b: Scores of the other run.

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
        without: Value of each metric without each group. None: the group is empty.
        whole: Value of each metric with all groups; needed for several.

    Returns:
        The standard error, and the number of groups. None: there are fewer than two groups.
    """
    used = [k for k in range(len(without[0])) if any(row[k] is not None for row in without)]
    if len(used) < 2:
        return None, len(used)
    # A metric without pictures in a group is, without that group, what it is with all of them.
    values = [
        [(row[k], all_of) for k in used]
        for row, all_of in zip(without, whole or [0.0], strict=True)
    ]
    means = np.mean([[all_of if v is None else v for v, all_of in row] for row in values], axis=0)
    return float(math.sqrt((len(used) - 1) * means.var())), len(used)


def _same_length(correct_a: Scores, correct_b: Scores) -> tuple[np.ndarray, np.ndarray]:
    first = np.asarray(correct_a, dtype=np.float64)
    second = np.asarray(correct_b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            "paired scores: expected two lists of one length above 0, got shapes "
            f"{first.shape} and {second.shape}"
        )
    return first, second


def _finite(deltas: Scores, at_least: int) -> np.ndarray:
    values = np.asarray(deltas, dtype=np.float64)
    if values.ndim != 1 or len(values) < at_least or not np.isfinite(values).all():
        raise ValueError(f"deltas: expected at least {at_least} finite differences, got {deltas!r}")
    return values
