"""Image-text and text-text retrieval: hit@k, safe against ties, with clustered intervals.

R@k is that of the CLIP papers: the share of queries that have *any* of their positives
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

from llm2clip_vlm.metrics.statistics import bootstrap_interval

TIE_TOLERANCE = 1e-6
"""Scores of unit vectors that are closer than this are a tie: equal rows of a matrix product may
differ in the last bit, depending on where they stand."""

_CHUNK_ELEMENTS = 2**24  # of the product, which is slow in small parts
_PART_ELEMENTS = 2**20  # compared four times, in the cache


Rivals = tuple[np.ndarray, np.ndarray]
"""Wrong items above the best positive of each query, and wrong items that tie with it."""


@dataclass(frozen=True)
class RecallResult:
    """Result of :func:`recall_at_k`."""

    recall: dict[int, float]
    """k -> per cent of queries with a positive in the first k, ties counted against the model."""
    ci: dict[int, tuple[float, float]]
    """k -> 95 % percentile bootstrap interval in per cent; empty when `bootstrap=0`."""
    hits: dict[int, np.ndarray]
    """k -> bool[n], one value a query."""
    tie_rate: float
    """Share of queries whose best positive ties with a wrong item."""
    chance: dict[int, float] = field(default_factory=dict)
    """k -> per cent expected from a gallery in random order."""
    gallery: int = 0
    """Items in the gallery."""


def recall_at_k(
    query_embeds: Tensor | np.ndarray,
    gallery_embeds: Tensor | np.ndarray,
    positives: Sequence[Collection[int] | int] | None = None,
    ks: Sequence[int] | int = (1, 5, 10),
    left_out: Sequence[tuple[int, int]] = (),
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> RecallResult:
    """Share of queries that find one of their positives among the k best.

    Items are ranked by the raw dot product in fp32 (pass unit vectors for the cosine), on the CPU.
    The rank of a query is the number of wrong items that score at least as high as its best
    positive; other positives of the query do not count.

    Args:
        query_embeds: float[n, d].
        gallery_embeds: float[m, d].
        positives: Gallery rows (or the one row) that are right for each query. None: row i
            is right for query i.
        ks: Cut-offs.
        left_out: Query and gallery row of pairs that are neither right nor wrong.
        bootstrap: Resamples for the interval; 0 = no interval.
        seed: Seed of the resampling of queries.

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
    gallery = _as_matrix(gallery_embeds, "gallery_embeds")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_embeds and gallery_embeds: expected one width, got {queries.shape[1]} and "
            f"{gallery.shape[1]}"
        )
    cutoffs = (ks,) if isinstance(ks, int) else tuple(ks)
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, got {ks!r}")
    pairs = _as_pairs(positives, len(queries), len(gallery))
    every = np.concatenate([pairs, np.array(left_out, np.int64).reshape(-1, 2).T], axis=1)
    order = np.argsort(every[0], kind="stable")
    right, every = order < pairs.shape[1], every[:, order]
    rivals, _ = _count_rivals(queries, gallery, every, both=False, right=right)
    groups = range(len(queries))
    return _result(rivals, pairs[0], len(gallery), cutoffs, groups, bootstrap, seed)


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
    wrong, places = gallery_size - np.asarray(num_positives), np.arange(min(k, gallery_size))
    miss = np.clip(wrong - places[:, None], 0, None) / (gallery_size - places[:, None])
    return 100.0 * float(1.0 - miss.prod(axis=0).mean())


def retrieval_report(
    image_embeds: Tensor | np.ndarray,
    text_embeds: Mapping[str, Tensor | np.ndarray],
    text_image_index: Mapping[str, Sequence[int]],
    bootstrap: int = 1000,
    seed: int = 0,
    hits: dict[str, tuple[Sequence[int], np.ndarray]] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Retrieval in both directions for each kind of caption.

    Args:
        image_embeds: float[images, d].
        text_embeds: Kind of caption -> float[texts, d]. Rows are normalised here.
        text_image_index: Kind of caption -> row of `image_embeds` that each text describes.
        bootstrap: Resamples by image for the intervals.
        seed: Seed of the resampling.
        hits: Takes each query's image and whether R@1 counts it, by `.<kind>.<direction>`.

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
        # Pairs in the order of their images; one pass over the scores serves both directions.
        order = np.argsort(owners, kind="stable")
        asked, rows = np.unique(np.array(owners)[order], return_inverse=True)
        if asked[0] < 0 or asked[-1] >= len(images):
            raise ValueError(
                f"text_image_index[{kind!r}]: expected rows of {len(images)} images, got "
                f"{asked[0]} to {asked[-1]}"
            )
        pairs = np.stack([asked[rows], order])
        of_images, of_texts = _count_rivals(images, texts, pairs, both=True)
        of_asked = (of_images[0][asked], of_images[1][asked])
        ks, draws = (1, 5, 10), (bootstrap, seed)
        i2t = _result(of_asked, rows, len(texts), ks, asked.tolist(), *draws)
        t2i = _result(of_texts, np.arange(len(texts)), len(images), ks, owners, *draws)
        if hits is not None:
            hits[f".{kind}.i2t"] = (asked.tolist(), i2t.hits[1])
            hits[f".{kind}.t2i"] = (owners, t2i.hits[1])
        report[kind] = {"i2t": _summary(i2t), "t2i": _summary(t2i)}
    return report


def _result(
    rivals: Rivals,
    owners: np.ndarray,
    gallery_size: int,
    cutoffs: Sequence[int],
    groups: Sequence[Hashable],
    bootstrap: int,
    seed: int,
) -> RecallResult:
    """Summarise rivals; `owners` has the query of each positive."""
    better, ties = rivals
    hits = {k: (better + ties) < k for k in cutoffs}
    ci = {
        k: bootstrap_interval(hit, groups, bootstrap, seed) for k, hit in hits.items() if bootstrap
    }
    sizes = np.bincount(owners, minlength=len(better))
    return RecallResult(
        recall={k: 100.0 * float(hit.mean()) for k, hit in hits.items()},
        ci=ci,
        hits=hits,
        tie_rate=float((ties > 0).mean()),
        chance={k: chance_recall(gallery_size, sizes, k) for k in cutoffs},
        gallery=gallery_size,
    )


def _summary(result: RecallResult) -> dict[str, Any]:
    return {
        **{f"r{k}": value for k, value in result.recall.items()},
        "ci": list(result.ci[1]) if result.ci else None,
        "ci_r10": list(result.ci[10]) if result.ci else None,
        "chance_r1": result.chance[1],
        "chance_r10": result.chance[10],
        "tie_rate": result.tie_rate,
        "queries": len(result.hits[1]),
        "gallery": result.gallery,
    }


def _as_matrix(embeds: Tensor | np.ndarray, name: str) -> Tensor:
    # On the CPU: TF32 products of a GPU would hide ties.
    matrix = torch.as_tensor(embeds).detach().float().cpu()
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(
            f"{name}: expected float[n, d] with n and d > 0, got {tuple(matrix.shape)}"
        )
    if not torch.isfinite(torch.stack(matrix.aminmax())).all():  # NaN is passed on
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return matrix


def _as_pairs(
    positives: Sequence[Collection[int] | int] | None, queries: int, gallery: int
) -> np.ndarray:
    """`int[2, pairs]`: a query and one of its positives, in the order of the queries."""
    given: Sequence[Any] = range(queries) if positives is None else positives
    if len(given) != queries:
        raise ValueError(
            f"positives: expected one entry for each of {queries} queries, got {len(given)}"
        )
    pairs = []
    for number, entry in enumerate(given):
        items = sorted(set(entry)) if isinstance(entry, Collection) else [int(entry)]
        if not items or items[0] < 0 or items[-1] >= gallery:
            raise ValueError(
                f"positives[{number}]: expected rows of a gallery of {gallery}, got {entry!r}"
            )
        pairs += [(number, int(item)) for item in items]
    return np.array(pairs).T


def _count_rivals(
    queries: Tensor, gallery: Tensor, pairs: np.ndarray, *, both: bool, right: Any = True
) -> tuple[Rivals, Rivals]:
    """Rivals of each query and, with `both`, of each gallery item as a query.

    The scores are computed once, some rows at a time, and compared with two bounds a query: a tie
    lies between them. `pairs` is in the order of its first row; those that are not `right` count as
    no rivals, and not as the best positive either.

    A query with the scores `[0.9, 0.7, 0.9, 0.8]` whose positives are items 0 and 3 has the best
    positive 0.9. Above 0.9 + slack is nothing; above 0.9 - slack are items 0 and 2, of which item 0
    is a positive: no rival above, one tie. Its rank is 1, so R@1 misses it and R@5 does not.
    """
    own = np.concatenate(
        [
            torch.linalg.vecdot(queries[row], gallery[column]).numpy()
            for row, column in zip(
                *(torch.from_numpy(side).split(2**11) for side in pairs), strict=True
            )
        ]
    )
    sides = [_Side(queries, gallery, np.where(right, own, -np.inf), pairs[0], axis=1)]
    if both:
        sides.append(_Side(gallery, queries, own, pairs[1], axis=0))
    step = max(1, _CHUNK_ELEMENTS // len(gallery))
    part = min(max(1, _PART_ELEMENTS // len(gallery)), np.iinfo(np.uint8).max)
    made = np.empty((min(step, len(queries)), len(gallery)), np.float32)
    found = np.empty((min(part, len(queries)), len(gallery)), np.bool_)
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        # numpy takes three quarters of torch's time, and new pages for each chunk would take more
        scores = np.matmul(queries[start:stop].numpy(), gallery.T.numpy(), out=made[: stop - start])
        mine = slice(*np.searchsorted(pairs[0], [start, stop]))
        own[mine] = scores[pairs[0, mine] - start, pairs[1, mine]]
        for at in range(0, len(scores), part):
            for side in sides:
                side.add(scores[at : at + part], start + at, found)
    return sides[0].rivals(own), sides[-1].rivals(own)


class _Side:
    """Counts for the queries of one direction, which are one axis of the scores.

    Args:
        queries: Those of the direction.
        gallery: What they search.
        own: Score of each pair.
        index: Query of each pair.
        axis: 1 where a row of the scores has one query's, 0 where a column has.
    """

    def __init__(
        self, queries: Tensor, gallery: Tensor, own: np.ndarray, index: np.ndarray, *, axis: int
    ) -> None:
        best = np.full(len(queries), -np.inf, np.float32)
        np.maximum.at(best, index, own)
        slack = (TIE_TOLERANCE * queries.norm(dim=1) * gallery.norm(dim=1).max()).numpy()
        self.index, self.axis = index, axis
        self.bounds = ((np.greater, best + slack), (np.greater_equal, best - slack))
        self.above = np.zeros((2, len(queries)), np.int64)

    def add(self, scores: np.ndarray, start: int, found: np.ndarray) -> None:
        """Compare some rows of the scores; `found` is room for as many."""
        rows = slice(start, start + len(scores))
        for count, (compare, bound) in zip(self.above, self.bounds, strict=True):
            # both ways to count take a third of the time of `count_nonzero` along an axis
            if self.axis:
                hits = compare(scores, bound[rows, None], out=found[: len(scores)])
                count[rows] = [np.count_nonzero(row) for row in hits]
            else:
                hits = compare(scores, bound, out=found[: len(scores)])
                np.add(count, hits.view(np.uint8).sum(axis=0, dtype=np.uint8), out=count)

    def rivals(self, own: np.ndarray) -> Rivals:
        """Wrong items above, wrong items that tie; `own` are the pairs' scores as compared."""
        above, ties = (
            count - np.bincount(self.index[compare(own, bound[self.index])], minlength=len(count))
            for count, (compare, bound) in zip(self.above, self.bounds, strict=True)
        )
        return above, ties - above
