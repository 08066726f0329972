"""Tests against values worked out by hand, by enumeration, or by scipy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from llm2clip_vlm.evaluation.stats import (
    cluster_sums,
    holm,
    load_samples,
    mcnemar_exact,
    mean_interval,
    pair_samples,
    paired_bootstrap,
    rounded,
    seed_summary,
    sign_flip_test,
)


def test_paired_bootstrap_delta_and_clusters() -> None:
    rng = np.random.default_rng(0)
    image_a, image_b = rng.random(80) < 0.7, rng.random(80) < 0.5
    a, b = np.repeat(image_a, 6), np.repeat(image_b, 6)
    images = np.repeat(np.arange(80), 6).tolist()
    clustered = paired_bootstrap(a, b, images, n=2000, seed=1)
    naive = paired_bootstrap(a, b, list(range(480)), n=2000, seed=1)
    assert clustered["delta"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert clustered["images"] == 80 and clustered["n"] == 480
    assert np.ptp(clustered["ci"]) > 1.9 * np.ptp(naive["ci"])
    assert clustered == paired_bootstrap(a, b, images, n=2000, seed=1)
    assert clustered["ci"] != paired_bootstrap(a, b, images, n=2000, seed=2)["ci"]
    swapped = paired_bootstrap(b, a, images, n=2000, seed=1)
    assert swapped["delta"] == pytest.approx(-clustered["delta"])


def test_paired_bootstrap_of_equal_models_is_zero() -> None:
    assert paired_bootstrap([1, 0, 1], [1, 0, 1], [0, 1, 2], n=100)["ci"] == [0.0, 0.0]


def test_mcnemar_by_hand() -> None:
    # Four documents of which one is right: all four for a, so 2 of 16 splits are as uneven.
    assert mcnemar_exact([1, 1, 1, 1, 0], [0, 0, 0, 0, 0]) == pytest.approx(2 / 16)
    assert mcnemar_exact([1, 1, 0, 1], [0, 0, 1, 1]) == 1.0
    assert mcnemar_exact([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_exact([0.5], [1.0])


def test_sign_flip_is_exact() -> None:
    values = np.array([0.5, 1.5, -0.25, 2.0, 0.75, 1.0])
    count = sum(
        abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-12
        for signs in itertools.product((-1, 1), repeat=len(values))
    )
    assert sign_flip_test(values) == pytest.approx(count / 2 ** len(values))
    assert sign_flip_test([1.0] * 8) == pytest.approx(2 / 256)
    assert sign_flip_test([3.0, -3.0]) == 1.0
    # 0.1 + 0.2 in another order is another float: equal sums must still count as equal.
    assert sign_flip_test([0.1, 0.2, 0.3]) == pytest.approx(2 / 8)


def test_sign_flip_beyond_twenty() -> None:
    rng = np.random.default_rng(0)
    # Whole numbers are counted exactly: with one question an image it is McNemar's test.
    assert sign_flip_test([1.0] * 25) == pytest.approx(2 / 2**25)
    a, b = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    assert sign_flip_test(a - b) == pytest.approx(mcnemar_exact(a, b))
    assert sign_flip_test([1.0, -1.0] * 12 + [0.0]) == 1.0
    mixed = rng.integers(-3, 5, 60)
    drawn = sign_flip_test(mixed + rng.normal(0, 1e-6, 60))  # patterns drawn
    assert drawn == pytest.approx(sign_flip_test(mixed), abs=0.005)
    assert drawn != sign_flip_test(mixed + rng.normal(0, 1e-6, 60), seed=1)
    # Differences of nothing change nothing.
    assert sign_flip_test([0.5, 1.5] + [0.0] * 50) == sign_flip_test([0.5, 1.5])


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"x": 0.6, "y": 0.9}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}


def test_units_are_images() -> None:
    assert cluster_sums(np.array([1.0, -1.0, 0.5]), ["x", "y", "x"]).tolist() == [1.5, -1.0]
    assert rounded({"a": [0.12345678, "b"], "c": 3}, 3) == {"a": [0.123, "b"], "c": 3}


def test_mean_interval_against_scipy() -> None:
    from scipy import stats

    values = [1.0, 2.0, 4.0, 3.5]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match="finite"):
        sign_flip_test([np.nan])


def test_seed_summary_has_the_fields_of_ab_json() -> None:
    found = seed_summary([2.0, 3.0, 1.0, 2.0, 2.5, 1.5, 2.0, 2.0])
    assert found["delta"] == 2.0 and found["p"] == pytest.approx(2 / 256)
    assert found["ci"][0] < 2.0 < found["ci"][1] and len(found["deltas_by_seed"]) == 8
    json.dumps(found)


def sample(doc_id: int, correct: float, question: str = "q") -> dict:
    return {
        "doc_id": doc_id,
        "image_id": f"i{doc_id // 2}",
        "question": question,
        "type": "t",
        "target": "yes",
        "correct": correct,
    }


def test_samples_are_paired_by_document_not_by_line(tmp_path: Path) -> None:
    file = tmp_path / "x.samples.jsonl"
    rows = [sample(0, 1.0, "odd\u2028line"), sample(1, 0.0)]
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    first = load_samples(file)
    paired = pair_samples(first, [sample(1, 1.0), sample(0, 0.0, "odd\u2028line")])
    assert paired.correct_a.tolist() == [1, 0] and paired.correct_b.tolist() == [0, 1]
    with pytest.raises(ValueError, match="different data"):
        pair_samples(first, [sample(0, 1.0), sample(1, 0.0, "another")])
    with pytest.raises(ValueError, match="same documents"):
        pair_samples(first, first[:1])
    with pytest.raises(ValueError, match="no such file"):
        load_samples(tmp_path / "absent.jsonl")
