"""hit@k against brute force, ties, clustered intervals, chance."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from llm2clip_vlm.metrics import retrieval
from llm2clip_vlm.metrics.retrieval import chance_recall, recall_at_k, retrieval_report
from llm2clip_vlm.metrics.statistics import bootstrap_interval


def unit(rng: np.random.Generator, rows: int, width: int = 8) -> torch.Tensor:
    vectors = torch.from_numpy(rng.normal(size=(rows, width))).float()
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_matches_brute_force_with_several_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 40), unit(rng, 60)
    positives = [set(rng.choice(60, rng.integers(1, 5), replace=False)) for _ in range(40)]
    monkeypatch.setattr(retrieval, "_CHUNK_ELEMENTS", 60 * 7)  # chunks of 7 queries
    found = recall_at_k(queries, gallery, positives, ks=(1, 3, 10), bootstrap=0)
    order = (queries @ gallery.T).argsort(dim=1, descending=True).numpy()
    for k in (1, 3, 10):
        expected = [bool(set(row[:k]) & good) for row, good in zip(order, positives, strict=True)]
        assert found.hits[k].tolist() == expected
        assert found.recall[k] == pytest.approx(100 * np.mean(expected))
    assert found.ci == {} and found.tie_rate == 0


def test_collapsed_embeddings_score_nothing() -> None:
    same = torch.ones(20, 4)
    found = recall_at_k(same, same, ks=(1, 5), bootstrap=0)
    assert found.recall == {1: 0.0, 5: 0.0}
    assert found.tie_rate == 1.0


def test_own_positives_that_tie_do_not_hurt_and_wrong_ones_do() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    assert recall_at_k(query, gallery, [{0, 1}], ks=1, bootstrap=0).recall[1] == 100.0
    tied = recall_at_k(query, gallery, [[0]], ks=(1, 2), bootstrap=0)
    assert tied.recall == {1: 0.0, 2: 100.0}


def test_duplicates_in_a_large_gallery_are_ties_wherever_they_stand() -> None:
    rng = np.random.default_rng(1)
    rows = unit(rng, 501, 96)
    gallery = torch.cat([rows, rows])
    found = recall_at_k(rows, gallery, list(range(501)), ks=1, bootstrap=0)
    assert found.recall[1] == 0.0 and found.tie_rate == 1.0


def test_the_interval_resamples_images_not_queries() -> None:
    rng = np.random.default_rng(2)
    images = 50
    gallery = torch.eye(images)
    wrong = rng.random(images) < 0.4
    target = np.where(wrong, (np.arange(images) + 1) % images, np.arange(images))
    queries = gallery[np.repeat(target, 5)]
    owners = np.repeat(np.arange(images), 5).tolist()
    alone = recall_at_k(queries, gallery, owners, ks=1, seed=3)

    def by_image(bootstrap: int, seed: int) -> tuple[float, float]:
        found = retrieval_report(gallery, {"k": queries}, {"k": owners}, bootstrap, seed)
        return tuple(found["k"]["t2i"]["ci"])

    low, high = by_image(1000, 3)
    assert high - low > 1.8 * (alone.ci[1][1] - alone.ci[1][0])  # sqrt(5) = 2.2: they fail together
    assert low < alone.recall[1] < high
    few = [by_image(7, seed) for seed in (3, 3, 4)]
    assert few[0] == few[1] != few[2]


def test_chance() -> None:
    assert chance_recall(100, [1, 1], 1) == pytest.approx(1.0)
    assert chance_recall(100, [5], 10) == pytest.approx(41.62, abs=0.01)
    rng = np.random.default_rng(3)
    found = recall_at_k(unit(rng, 2000), unit(rng, 50), rng.integers(0, 50, 2000), bootstrap=0)
    assert found.recall[10] == pytest.approx(found.chance[10], abs=4)


def test_report_has_both_directions_and_ragged_captions() -> None:
    images = torch.eye(4)
    texts = {"short": images[[0, 0, 1, 3]] * 7.0, "long": images[[1, 0, 2, 3]]}
    index = {"short": [0, 0, 1, 2], "long": [0, 1, 2, 3]}
    report = retrieval_report(images, texts, index, bootstrap=50)
    short = report["short"]
    assert short["i2t"]["r1"] == pytest.approx(200 / 3) and short["i2t"]["queries"] == 3
    assert short["t2i"]["r1"] == pytest.approx(75.0) and short["t2i"]["gallery"] == 4
    assert report["long"]["t2i"]["r1"] == 50.0
    assert len(short["t2i"]["ci"]) == 2 and short["t2i"]["chance_r1"] == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": [[0]]}, "one entry for each of 2 queries"),
        ({"positives": [[0], []]}, r"positives\[1\]"),
        ({"positives": [[0], [2]]}, "gallery of 2"),
        ({"query_embeds": torch.full((2, 2), torch.nan)}, "finite"),
        ({"query_embeds": torch.eye(3)[:2]}, "one width"),
        ({"ks": (0,)}, "at least 1"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"query_embeds": torch.eye(2), "gallery_embeds": torch.eye(2), **change}
    with pytest.raises(ValueError, match=message):
        recall_at_k(**arguments)


def resampled(values: np.ndarray, draws: int = 20000) -> np.ndarray:
    """Percentiles of the mean, one value at a time drawn with replacement."""
    rng = np.random.default_rng(99)
    rows = values[rng.integers(len(values), size=(draws, len(values)))]
    ends: np.ndarray = np.percentile(100 * rows.mean(axis=1), [2.5, 97.5])
    return ends


@pytest.mark.parametrize("groups", [6, 49, 50, 200])
def test_the_interval_has_its_size(groups: int) -> None:
    from scipy.stats import t

    values = np.random.default_rng(5).normal(size=groups)
    low, high = bootstrap_interval(values, list(range(groups)), 20000, 1)
    mean, ends = 100 * values.mean(), resampled(values)
    wider = 1.0
    if groups < 50:  # Student's t instead of 1.96, and the standard deviation's lost degree
        wider = t.ppf(0.975, groups - 1) / 1.959964 * (groups / (groups - 1)) ** 0.5
    want = mean + wider * (ends - mean)
    assert [low, high] == pytest.approx(want.tolist(), abs=0.015 * (want[1] - want[0]))


def test_report_of_embeddings_of_any_norm_by_hand() -> None:
    rng = np.random.default_rng(4)
    images, texts = unit(rng, 12), unit(rng, 24)
    owners = [row // 2 for row in range(24)]
    hits: dict = {}
    norms = torch.linspace(0.5, 8.0, 12)[:, None]
    found = retrieval_report(
        images * norms, {"c": texts * 3.0}, {"c": owners}, bootstrap=400, seed=2, hits=hits
    )["c"]
    scores = images @ texts.T
    own = torch.tensor(owners)
    ranks = {"i2t": [], "t2i": []}
    for i in range(12):
        best = scores[i][own == i].max()
        ranks["i2t"].append(int((scores[i][own != i] > best).sum()))
    for j in range(24):
        ranks["t2i"].append(int((scores[:, j] > scores[own[j], j]).sum()))
    for way, places in ranks.items():
        for k in (1, 5, 10):
            share = 100 * np.mean([place < k for place in places])
            assert found[way][f"r{k}"] == pytest.approx(share), (way, k)
        units = list(range(12)) if way == "i2t" else owners
        for name, k in (("ci", 1), ("ci_r10", 10)):
            right = [place < k for place in places]
            assert found[way][name] == pytest.approx(bootstrap_interval(right, units, 400, 2))
        assert hits[f".c.{way}"][0] == units
        assert hits[f".c.{way}"][1].tolist() == [place < 1 for place in places]
    assert (found["i2t"]["queries"], found["i2t"]["gallery"]) == (12, 24)
    assert (found["t2i"]["queries"], found["t2i"]["gallery"]) == (24, 12)


def test_defaults_and_chance_of_a_gallery_smaller_than_k() -> None:
    assert chance_recall(4, [1], 10) == 100.0
    for function in (recall_at_k, retrieval_report):
        given = inspect.signature(function).parameters
        assert (given["bootstrap"].default, given["seed"].default) == (1000, 0)
    assert inspect.signature(recall_at_k).parameters["ks"].default == (1, 5, 10)


@pytest.mark.parametrize(("chunk", "part"), [(1, 1), (70, 1), (200, 60), (10**6, 37)])
def test_the_pieces_in_which_scores_are_compared_change_nothing(
    monkeypatch: pytest.MonkeyPatch, chunk: int, part: int
) -> None:
    rng = np.random.default_rng(6)
    images, texts = unit(rng, 23).round(decimals=1) + 0.01, unit(rng, 31).round(decimals=1) + 0.01
    index = rng.integers(0, 23, 31).tolist()
    whole = retrieval_report(images, {"c": texts}, {"c": index}, bootstrap=0)
    monkeypatch.setattr(retrieval, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(retrieval, "_PART_ELEMENTS", part)
    assert retrieval_report(images, {"c": texts}, {"c": index}, bootstrap=0) == whole


def test_more_rivals_than_a_byte_counts() -> None:
    point = torch.ones(257, 4)  # 257 items that tie, one of them right: 256 is 0 in eight bits
    found = retrieval_report(point, {"c": point}, {"c": range(257)}, bootstrap=0)["c"]
    assert found["t2i"]["r1"] == found["i2t"]["r1"] == 0.0
