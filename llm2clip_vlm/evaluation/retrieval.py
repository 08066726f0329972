"""Image-text and text-text retrieval: hit@k, safe against ties, with clustered intervals.

R@k here is what the CLIP papers call so: the share of queries that have *any* of their positives
among the k best of the gallery. Ties count against the model, because embeddings that collapsed to
one point would otherwise score 100 %.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6
"""Scores of unit vectors that are closer than this are a tie: equal rows of a matrix product may
differ in the last bit, depending on where they stand."""

_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class RecallResult:
    """What :func:`recall_at_k` found."""

    recall: dict[int, float]
    """k -> per cent of queries with a positive in the first k, ties counted against the model."""
    ci: dict[int, tuple[float, float]]
    """k -> 95 % percentile bootstrap interval in per cent; empty when `bootstrap=0`."""
    hits: dict[int, np.ndarray]
    """k -> bool[n], one value a query."""
    expected: dict[int, float]
    """k -> per cent expected when ties are broken at random."""
    tie_rate: float
    """Share of queries whose best positive ties with a wrong item."""
    chance: dict[int, float] = field(default_factory=dict)
    """k -> per cent expected from a gallery in random order."""


def recall_at_k(
    query_embeds: Tensor | np.ndarray,
    gallery_embeds: Tensor | np.ndarray,
    positives: Sequence[Collection[int] | int] | None = None,
    ks: Sequence[int] | int = (1, 5, 10),
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> RecallResult:
    """Share of queries that find one of their positives among the k best.

    Items are ranked by the raw dot product in fp32 (pass unit vectors for the cosine). The rank of
    a query is the number of wrong items that score at least as high as its best positive; other
    positives of the query do not count.

    Args:
        query_embeds: float[n, d].
        gallery_embeds: float[m, d].
        positives: For each query, the gallery rows (or the one row) that are right; none = row i
            is right for query i.
        ks: Cut-offs.
        bootstrap: Resamples for the interval; 0 = no interval.
        seed: Seed of the resampling.
        groups: For each query, its image. Resampling draws whole images, since captions of one
            image fail together. None = each query for itself.

    Returns:
        Recall, intervals and hits for each k.

    Raises:
        ValueError: Shapes disagree, a query has no positive, an index is outside the gallery, or a
            value is not finite.

    Example:
        >>> recall_at_k(torch.eye(3), torch.eye(3), ks=1, bootstrap=0).recall[1]
        100.0
    """
    queries = _as_matrix(query_embeds, "query_embeds")
    gallery = _as_matrix(gallery_embeds, "gallery_embeds").to(queries.device)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_embeds and gallery_embeds: expected one width, got {queries.shape[1]} and "
            f"{gallery.shape[1]}"
        )
    cutoffs = (ks,) if isinstance(ks, int) else tuple(ks)
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, got {ks!r}")
    right = _as_index_sets(positives, len(queries), len(gallery))
    better, ties, equals = _count_rivals(queries, gallery, right)
    hits = {k: (better + ties) < k for k in cutoffs}
    expected = {k: 100.0 * float(_hit_chance(better, ties, equals, k).mean()) for k in cutoffs}
    intervals = _intervals(hits, groups, bootstrap, seed) if bootstrap else {}
    sizes = np.array([len(items) for items in right])
    return RecallResult(
        recall={k: 100.0 * float(hit.mean()) for k, hit in hits.items()},
        ci=intervals,
        hits=hits,
        expected=expected,
        tie_rate=float((ties > 0).mean()),
        chance={k: chance_recall(len(gallery), sizes, k) for k in cutoffs},
    )


def chance_recall(
    gallery_size: int, num_positives: Sequence[int] | np.ndarray, k: int = 1
) -> float:
    """R@k in per cent that a gallery in random order gives.

    Args:
        gallery_size: Items in the gallery.
        num_positives: Right items of each query.
        k: Cut-off.

    Returns:
        Mean over queries of `1 - C(gallery - positives, k) / C(gallery, k)`, in per cent.
    """
    counts = np.asarray(num_positives)
    nothing = np.zeros(len(counts), dtype=np.int64)
    return 100.0 * float(_hit_chance(nothing, gallery_size - counts, counts, k).mean())


def retrieval_report(
    image_embeds: Tensor | np.ndarray,
    text_embeds: Mapping[str, Tensor | np.ndarray],
    text_image_index: Mapping[str, Sequence[int]],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Retrieval in both directions for each kind of caption.

    Args:
        image_embeds: float[images, d].
        text_embeds: Kind of caption -> float[texts, d]. Rows are normalised here.
        text_image_index: Kind of caption -> row of `image_embeds` that each text describes.
        bootstrap: Resamples by image for the intervals.
        seed: Seed of the resampling.

    Returns:
        `{kind: {"i2t": {...}, "t2i": {...}}}`, each with `r1`, `r5`, `r10` (per cent), `ci` and
        `ci_r10` (95 % intervals of R@1 and R@10 as `[low, high]`), `chance_r1`, `chance_r10`,
        `tie_rate`, `queries` and `gallery`. Images without a text of that kind are no i2t query
        but stay in the t2i gallery.

    Raises:
        ValueError: A kind has no texts, or its index does not fit.
    """
    images = _as_matrix(image_embeds, "image_embeds")
    images = torch.nn.functional.normalize(images, dim=-1)
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, embeds in text_embeds.items():
        texts = torch.nn.functional.normalize(_as_matrix(embeds, f"text_embeds[{kind!r}]"), dim=-1)
        owners = [int(row) for row in text_image_index[kind]]
        if len(owners) != len(texts) or not owners:
            raise ValueError(
                f"text_image_index[{kind!r}]: expected one image row for each of {len(texts)} "
                f"texts, got {len(owners)}"
            )
        captions: dict[int, list[int]] = {}
        for text_row, image_row in enumerate(owners):
            captions.setdefault(image_row, []).append(text_row)
        asked = sorted(captions)
        i2t = recall_at_k(
            images[asked],
            texts,
            [captions[row] for row in asked],
            bootstrap=bootstrap,
            seed=seed,
            groups=asked,
        )
        t2i = recall_at_k(texts, images, owners, bootstrap=bootstrap, seed=seed, groups=owners)
        report[kind] = {
            "i2t": _summary(i2t, len(asked), len(texts)),
            "t2i": _summary(t2i, len(texts), len(images)),
        }
    return report


def _summary(result: RecallResult, queries: int, gallery: int) -> dict[str, Any]:
    return {
        **{f"r{k}": value for k, value in result.recall.items()},
        "ci": list(result.ci[1]) if result.ci else None,
        "ci_r10": list(result.ci[10]) if result.ci else None,
        "chance_r1": result.chance[1],
        "chance_r10": result.chance[10],
        "tie_rate": result.tie_rate,
        "queries": queries,
        "gallery": gallery,
    }


def _as_matrix(embeds: Tensor | np.ndarray, name: str) -> Tensor:
    matrix = torch.as_tensor(embeds).detach().float()
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(f"{name}: expected float[n, d] with n > 0, got {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return matrix


def _as_index_sets(
    positives: Sequence[Collection[int] | int] | None, queries: int, gallery: int
) -> list[list[int]]:
    given: Sequence[Any] = range(queries) if positives is None else positives
    if len(given) != queries:
        raise ValueError(
            f"positives: expected one entry for each of {queries} queries, got {len(given)}"
        )
    sets = []
    for number, entry in enumerate(given):
        items = np.unique(np.atleast_1d(np.asarray(_plain(entry), dtype=np.int64)))
        if not len(items) or items[0] < 0 or items[-1] >= gallery:
            raise ValueError(
                f"positives[{number}]: expected rows of a gallery of {gallery}, got {entry!r}"
            )
        sets.append(items.tolist())
    return sets


def _plain(entry: Any) -> Any:
    return sorted(entry) if isinstance(entry, set | frozenset) else entry


def _count_rivals(
    queries: Tensor, gallery: Tensor, right: list[list[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each query: wrong items above its best positive, wrong ones and positives that tie."""
    widest = gallery.norm(dim=-1).max()
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // len(gallery))
    better, ties, equals = [], [], []
    for start in range(0, len(queries), rows_per_chunk):
        chunk = queries[start : start + rows_per_chunk]
        scores = chunk @ gallery.T
        sets = right[start : start + rows_per_chunk]
        rows = [row for row, items in enumerate(sets) for _ in items]
        columns = [item for items in sets for item in items]
        mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        mask[rows, columns] = True
        best = scores.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
        slack = TIE_TOLERANCE * chunk.norm(dim=-1, keepdim=True) * widest
        tied = (scores - best).abs() <= slack
        better.append(((scores > best + slack) & ~mask).sum(1))
        ties.append((tied & ~mask).sum(1))
        equals.append((tied & mask).sum(1))
    first, second, third = (torch.cat(part).cpu().numpy() for part in (better, ties, equals))
    return first, second, third


def _hit_chance(better: np.ndarray, ties: np.ndarray, equals: np.ndarray, k: int) -> np.ndarray:
    """Probability that a right item stands among the first k.

    `better` wrong items stand before; then come `ties` wrong and `equals` right ones, shuffled.
    """
    miss = np.ones(len(better))
    free = k - better
    for place in range(int(max(0, free.max(initial=0)))):
        left = ties + equals - place
        draw = (place < free) & (left > 0)
        miss = np.where(draw, miss * np.clip(ties - place, 0, None) / np.maximum(left, 1), miss)
    return 1.0 - miss


def _intervals(
    hits: Mapping[int, np.ndarray], groups: Sequence[Hashable] | None, bootstrap: int, seed: int
) -> dict[int, tuple[float, float]]:
    queries = len(next(iter(hits.values())))
    if groups is not None and len(groups) != queries:
        raise ValueError(
            f"groups: expected one entry for each of {queries} queries, got {len(groups)}"
        )
    codes = cluster_codes(groups if groups is not None else range(queries))
    found = {}
    for k, hit in hits.items():
        means = bootstrap_means(hit.astype(np.float64), codes, bootstrap, seed)
        low, high = np.percentile(100.0 * means, [2.5, 97.5])
        found[k] = (float(low), float(high))
    return found


def cluster_codes(groups: Sequence[Hashable] | range) -> np.ndarray:
    """Number the groups 0, 1, ... in order of appearance.

    Returns:
        int[n], the number of each entry's group.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_means(values: np.ndarray, codes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `values` when whole clusters are drawn with replacement.

    Args:
        values: float[n].
        codes: int[n], each value's cluster, from :func:`cluster_codes`.
        resamples: How many draws.
        seed: Seed of the draws; the same seed and clusters give the same draws.

    Returns:
        float[resamples].
    """
    sums = np.bincount(codes, weights=values)
    counts = np.bincount(codes).astype(np.float64)
    rng = np.random.default_rng(seed)
    clusters = len(sums)
    means = []
    for start in range(0, resamples, 500):
        size = min(500, resamples - start)
        weights = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=size)
        means.append(weights @ sums / (weights @ counts))
    return np.concatenate(means)
