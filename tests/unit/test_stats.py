"""Tests against values worked out by hand, by enumeration, or by scipy."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm2clip_vlm.evaluation.vlm.samples import load_samples, pair_samples, questions
from llm2clip_vlm.metrics.statistics import (
    EXACT_FLIPS,
    binomial_interval,
    bootstrap_interval,
    cluster_sums,
    holm,
    jackknife_error,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    percentile_interval,
    seed_summary,
    sign_flip_test,
    unpaired_summary,
)


def test_the_exact_interval_of_a_share() -> None:
    assert binomial_interval(0, 10) == pytest.approx((0.0, 100 * (1 - 0.025**0.1)))
    assert binomial_interval(10, 10) == pytest.approx((100 * 0.025**0.1, 100.0))
    assert binomial_interval(5, 10) == pytest.approx((18.71, 81.29), abs=0.01)


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


def test_images_that_all_say_one_thing_are_no_certainty() -> None:
    """Two pictures that one model alone gets right (p = 0.5) had +100 [100, 100]."""
    two = paired_bootstrap([1, 1], [0, 0], [0, 1])
    assert two["ci"] == pytest.approx([200 * 0.025**0.5 - 100, 100]) and two["ci"][0] < 0
    equal = paired_bootstrap([1, 0, 1], [1, 0, 1], [0, 1, 2])["ci"]
    assert equal == pytest.approx([-100 * (1 - 0.025 ** (1 / 3)), 100 * (1 - 0.025 ** (1 / 3))])
    assert np.ptp(paired_bootstrap([1] * 5000, [1] * 5000, range(5000))["ci"]) < 0.2
    assert bootstrap_interval([1, 0], ["x", "x"], 1000, 0) == pytest.approx((1.25, 98.75))
    assert bootstrap_interval([0.5] * 4, range(4), 1000, 0) == pytest.approx(
        (19.88, 80.12), abs=0.01
    )


def test_an_interval_of_differences_does_not_end_at_zero() -> None:
    """A model that is never worse on six pictures is as far from zero as its mirror image."""
    better, worse = [1, 1, 0, 0, 0, 0], [0] * 6
    low, high = paired_bootstrap(better, worse, range(6))["ci"]
    assert (low, high) == pytest.approx((-14.6, 81.2), abs=0.1)
    assert paired_bootstrap(worse, better, range(6))["ci"] == pytest.approx([-high, -low])


def test_none_of_a_few_is_no_certainty() -> None:
    """No right one of ten pictures, two questions each, is not apart from four of ten."""
    none = bootstrap_interval([0] * 20, [n // 2 for n in range(20)], 1000, 0)
    assert none == pytest.approx((0.0, 30.85), abs=0.01)
    assert none[1] > bootstrap_interval([1] * 4 + [0] * 6, range(10), 1000, 0)[0]
    assert bootstrap_interval([1.0], ["x"], 1000, 0) == pytest.approx((2.5, 100.0))


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


def test_sign_flips_are_counted_up_to_the_limit_and_drawn_beyond() -> None:
    values = [0.5 * (n % 4) + 0.25 for n in range(EXACT_FLIPS)]
    flipped = [-value if n % 5 == 0 else value for n, value in enumerate(values)]
    sums = Counter({0.0: 1})
    for value in values:
        sums = sums_after(sums, value)
    at_least = sum(count for s, count in sums.items() if abs(s) >= abs(sum(flipped)))
    assert sign_flip_test(flipped) == at_least / 2**EXACT_FLIPS
    # Drawn, the observed pattern is one of them: 100,000 draws never give p = 0.
    assert sign_flip_test([0.1] * 60) == pytest.approx(1 / 100_001)


def sums_after(sums: Counter[float], value: float) -> Counter[float]:
    """How often each sum is reached with one more value of either sign."""
    found: Counter[float] = Counter()
    for before, count in sums.items():
        found[before + value] += count
        found[before - value] += count
    return found


def test_unpaired_p_and_welch_by_hand() -> None:
    draw = np.random.default_rng(0)
    for sizes in [(4, 3), (2, 5), (3, 3)] * 4:
        a, b = (draw.integers(0, 9, n).astype(float).tolist() for n in sizes)
        found, both, delta = unpaired_summary(a, b), [*a, *b], np.mean(a) - np.mean(b)
        divisions = list(itertools.combinations(range(len(both)), len(a)))
        as_far = 0
        for chosen in divisions:
            rest = [both[i] for i in range(len(both)) if i not in chosen]
            moved = np.mean([both[i] for i in chosen]) - np.mean(rest)
            as_far += abs(moved) >= abs(delta) - 1e-9
        assert found["p"] == pytest.approx(as_far / len(divisions))
        assert found["delta"] == pytest.approx(delta)
    a, b = [3.0, 5.0, 9.0, 6.0], [1.0, 4.0, 2.0]
    found, delta = unpaired_summary(a, b), np.mean(a) - np.mean(b)
    # Welch: squared errors add up; Satterthwaite's degrees of freedom.
    from scipy.stats import t

    errors = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 2)
    half = t.ppf(0.975, freedom) * sum(errors) ** 0.5
    assert found["ci"] == pytest.approx([delta - half, delta + half])
    # Equally far in both directions, and ties, count: 2 of 6 divisions.
    assert unpaired_summary([0.1, 0.2], [0.3, 0.4])["p"] == pytest.approx(2 / 6)
    # 12 and 12 are 2.7 million divisions: 20,000 are drawn, and the observed one is there.
    drawn = unpaired_summary(np.arange(12.0), np.arange(12.0) + 100)
    assert drawn["p"] == pytest.approx(1 / 20_001)


def test_jackknife_by_hand() -> None:
    # sqrt((n - 1) / n * sum of squares around the mean): 2 / 3 * 2.
    assert jackknife_error([[1.0, 2.0, 3.0]]) == (pytest.approx((4 / 3) ** 0.5), 3)
    assert jackknife_error([[1.0, None, 3.0]]) == (pytest.approx(1.0), 2)
    assert jackknife_error([[1.0, None, None]]) == (None, 1)
    # The mean of two metrics; where the second has no picture of a group it is as it was.
    found = jackknife_error([[1.0, 2.0, 3.0], [4.0, None, 6.0]], [2.0, 5.0])
    assert found == (pytest.approx((2 / 3 * 2) ** 0.5), 3)


def test_a_question_is_as_right_as_its_worst_turn() -> None:
    turns = [
        {"doc_id": n, "question_id": "q", "turn": n, "correct": c, "unparsable": u}
        | {"answer": "AB"[n], "target": "AA"[n]}
        for n, (c, u) in enumerate([(1.0, 0.0), (0.0, 1.0)])
    ]
    for order in (turns, turns[::-1]):
        (whole,) = questions(order)
        assert (whole["doc_id"], whole["correct"], whole["unparsable"]) == (0, 0.0, 1.0)
        assert (whole["answer"], whole["target"]) == ("A | B", "A | A")
    assert questions(turns[1:]) == []


def test_percentiles_of_few_images_are_widened() -> None:
    draws = np.linspace(30.0, 50.0, 1001)
    assert percentile_interval(draws, 40.0, 50) == pytest.approx([30.5, 49.5])
    from scipy import stats

    low, high = percentile_interval(draws, 42.0, 5)
    wider = stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975) * np.sqrt(5 / 4)
    assert low == pytest.approx(42 - wider * 11.5) and high == pytest.approx(42 + wider * 7.5)
