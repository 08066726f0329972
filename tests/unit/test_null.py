"""Two equally good models: every road of `compare` and of the score gate errs as often as it says.

Each road is simulated under the null: false positives 5 % and coverage 95 %, within the noise of
the simulation. Fast tests hold exact small cases.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip_vlm.evaluation.report.comparison import _differences, compare
from llm2clip_vlm.evaluation.report.comparison_pages import flipped
from llm2clip_vlm.evaluation.report.inputs import Measured, Run
from llm2clip_vlm.evaluation.vlm.samples import metric_errors, samples_of
from llm2clip_vlm.evaluation.vlm.score_gate import gate
from llm2clip_vlm.metrics.statistics import bootstrap_interval, jackknife_error, unpaired_summary
from llm2clip_vlm.recipe.suite import ExpectedScores


def run(name: str, seeds: dict[int | None, Any]) -> Run:
    """A run in memory: seed to a score, or to right answers [pictures, questions]."""
    scores = {}
    for seed, found in seeds.items():
        right = np.atleast_2d(found)
        samples = [
            {"doc_id": n, "image_id": f"pixels:{n // right.shape[1]}", "question": "q"}
            | {"target": "a", "correct": float(value)}
            for n, value in enumerate(right.ravel() if right.size > 1 else [])
        ]
        value = 100 * float(right.mean())
        scores[seed] = Measured("t", value, Path(name), samples, {})
    return Run(name, [], scores={"t": scores})


def row(a: Run, b: Run) -> dict[str, Any]:
    found: dict[str, Any] = compare([a, b], [("a", "b")], 400)["ab"]["t"]["a-b"]
    return found


def near(count: int, trials: int, share: float, *, least: float | None = None) -> None:
    """Within 3.5 standard errors of the simulation of a share, or not above it but above least."""
    noise = 3.5 * math.sqrt(share * (1 - share) / trials)
    low = share if least is None else least
    assert low - noise <= count / trials <= share + noise, (count, trials, share)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_paired_seeds(seeds: int, ties: bool) -> None:
    rng, wrong, covered, trials = np.random.default_rng(seeds), 0, 0, 1500
    for _ in range(trials):
        scores = 0.7 + 0.02 * rng.normal(size=(2, seeds)) + 0.02 * rng.normal(size=seeds)
        a, b = (np.round(50 * s) / 50 if ties else s for s in scores)
        found = row(run("a", dict(enumerate(a))), run("b", dict(enumerate(b))))
        wrong += found["p"] < 0.05
        covered += found["ci"][0] - 1e-9 <= 0 <= found["ci"][1] + 1e-9
    near(wrong, trials, 0.05, least=0.0)  # exact, and steps of 2 / 2**n
    if not ties:
        near(wrong, trials, math.floor(0.05 * 2**seeds / 2) * 2 / 2**seeds)
        near(covered, trials, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 3), (3, 8), (5, 7), (8, 8)])
def test_other_seeds(sizes: tuple[int, int]) -> None:
    rng, wrong, covered, trials = np.random.default_rng(0), 0, 0, 300
    for _ in range(trials):
        a, b = (0.7 + 0.02 * rng.normal(size=n) for n in sizes)
        named = {100 + n: value for n, value in enumerate(b)}
        found = row(run("a", dict(enumerate(a))), run("b", named))
        wrong += found["p"] < 0.05
        covered += found["ci"][0] <= 0 <= found["ci"][1]
    near(wrong, trials, 0.05, least=0.0)
    near(covered, trials, 0.97, least=0.95)  # Welch's is a little wide with few seeds


@pytest.mark.slow
@pytest.mark.parametrize(("pictures", "questions"), [(400, 1), (150, 4), (20, 3), (8, 3)])
def test_questions_of_one_picture(pictures: int, questions: int) -> None:
    rng, wrong, covered, trials = np.random.default_rng(0), 0, 0, 400
    for _ in range(trials):
        shape = (pictures, questions)
        hard = rng.normal(size=shape)
        models = [
            (0.6 * rng.normal(size=(pictures, 1)) + 0.8 * rng.normal(size=shape) + hard) < 0.7
            for _ in range(2)
        ]
        found = row(*(run(n, {None: m}) for n, m in zip("ab", models, strict=True)))
        wrong += found["p"] < 0.05
        covered += found["ci"][0] - 1e-9 <= 0 <= found["ci"][1] + 1e-9
    near(wrong, trials, 0.05, least=0.01)  # whole answers: steps, never above 5 %
    near(covered, trials, 0.97, least=0.93)


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [3, 5, 8, 12, 20, 49, 80])
def test_graded_scores_of_few_pictures(pictures: int) -> None:
    rng, covered, trials = np.random.default_rng(pictures), 0, 1500
    for _ in range(trials):
        low, high = bootstrap_interval(rng.normal(size=pictures), range(pictures), 600, 0)
        covered += low <= 0 <= high
    near(covered, trials, 0.95, least=0.935)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    a, b = (dict(enumerate(m + 0.01 * rng.normal(size=8))) for m in (0.75, 0.70))
    assert row(run("a", a), run("b", b))["p"] == 2 / 2**8
    other = {10 + seed: value for seed, value in b.items()}
    assert row(run("a", a), run("b", other))["p"] == pytest.approx(2 / math.comb(16, 8))
    right = rng.random((300, 2)) < 0.6
    better = right | (rng.random((300, 2)) < 0.15)
    assert row(run("a", {None: better}), run("b", {None: right}))["p"] < 1e-6


def test_one_run_against_several_is_never_tested() -> None:
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 8):
        several = run("a", dict(enumerate(rng.random(seeds))))
        for one in (run("b", {None: 0.1}), run("b", {7: 0.1})):
            assert row(several, one)["p"] is None is row(several, one)["ci"]


def test_permutation_by_hand() -> None:
    # Three and three: of 20 divisions only the two extreme ones are as far apart.
    assert unpaired_summary([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])["p"] == pytest.approx(2 / 20)
    assert unpaired_summary([1.0, 1.0], [1.0, 1.0]) == {"delta": 0.0, "ci": [0.0, 0.0], "p": 1.0}
    many = unpaired_summary(np.arange(15.0), np.arange(15.0) + 0.1)
    assert 0.8 < many["p"] <= 1.0


# The score gate


def two_level(items: list[dict[str, Any]]) -> float:
    """MME's points: for each subtask questions right and pictures with both right."""
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        kinds[item["category"]][item["question_id"]].append(item["score"])
    total = 0.0
    for pairs in kinds.values():
        assert all(len(pair) == 2 for pair in pairs.values())
        points = [50 * sum(pair) + 100 * (sum(pair) == 2) for pair in pairs.values()]
        total += float(np.mean(points))
    return total


def mme(rng: np.random.Generator) -> dict[str, Any]:
    """A result of a model of MME's size, with a fixed skill for each subtask."""
    sizes = [30, 30, 30, 30, 147, 170, 200, 200, 200, 20]
    logged, pictures = [], {}
    for kind, (size, skill) in enumerate(zip(sizes, np.linspace(0.7, 0.95, 10), strict=True)):
        for picture, pair in enumerate(rng.random((size, 2)) < skill):
            for right in pair:
                key = f"{kind}/{picture}"
                pictures[len(logged)] = key
                value = {"question_id": key, "category": str(kind), "score": float(right)}
                logged.append(item(len(logged), points=value))
    return result(logged, pictures, {"points": two_level})


def item(doc: int, **values: Any) -> dict[str, Any]:
    plain = {"doc_id": doc, "doc": {"question": "q"}, "target": "a", "filtered_resps": ["a"]}
    return {**plain, **values}


def result(logged: list[Any], pictures: dict[int, str], metrics: dict[str, Any]) -> dict[str, Any]:
    """What the worker writes, of these samples."""
    samples = samples_of(logged, [*metrics], metrics, pictures)
    values = {n: float(f([i[n] for i in logged])) for n, f in metrics.items()}
    errors = metric_errors(logged, samples, values, metrics)
    settings = {"image_processor": "x"}
    return {"task": "t", "metrics": values, "n": len(samples), "metric_errors": errors} | {
        "prompt_example": "",
        "settings": settings,
    }


def f1(items: list[dict[str, Any]]) -> float:
    hit = sum(i["said"] and i["score"] for i in items)
    return 2 * hit / (sum(i["said"] for i in items) + sum(i["truth"] for i in items))


def pope(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Three splits that ask about the same pictures."""
    found = []
    skill = rng.normal(size=120)
    for _ in range(3):
        logged, pictures = [], {}
        for picture in range(120):
            for question in range(6):
                truth = question % 2
                right = 0.8 * skill[picture] + 0.6 * rng.normal() < 1.0
                pictures[len(logged)] = str(picture)
                value = {
                    "score": float(right),
                    "truth": truth,
                    "said": truth if right else 1 - truth,
                }
                logged.append(item(len(logged), f1=value))
        found.append(result(logged, pictures, {"f1": f1}))
    return found


def verdicts(column: dict[str, Any], model: Any, trials: int, full: float) -> int:
    """How often a run is called above or below another one of the same model.

    Each run is in one pair: one that is far off would count twice else.
    """
    rng, called = np.random.default_rng(1), 0
    made = [[r] if isinstance(r, dict) else r for r in (model(rng) for _ in range(2 * trials))]
    for ours, theirs in zip(made[::2], made[1::2], strict=True):
        published = float(np.mean([other["metrics"][column["metric"]] for other in theirs])) / full
        table = {"source": "x", "columns": {"C": column}, "rows": {"m": {"C": published}}}
        names = dict(zip(column["results"], ours, strict=True))
        (row,) = gate(ExpectedScores.model_validate(table), "m", names)
        assert row["noise_of"] == "pictures"
        called += row["verdict"] != "within noise"
    return called


@pytest.mark.slow
def test_the_gate_calls_mme_in_5_percent() -> None:
    column = {"results": ["mme"], "metric": "points", "metric_full": 2000, "value_full": 2000}
    near(verdicts({**column, "n": 2114}, mme, 50, 1.0), 50, 0.05)


@pytest.mark.slow
def test_the_gate_adds_up_splits_of_the_same_pictures() -> None:
    column = {"results": ["a", "b", "c"], "metric": "f1", "n": 2160, "value_full": 1.0}
    near(verdicts(column, pope, 80, 1.0), 80, 0.05)


def test_the_jackknife_of_a_mean_is_its_clustered_error() -> None:
    rng = np.random.default_rng(0)
    right = (0.6 * rng.normal(size=(4000, 1)) + 0.8 * rng.normal(size=(4000, 3))) < 0.5
    logged = [item(n, acc=float(value)) for n, value in enumerate(right.ravel())]
    found = result(logged, {n: str(n // 3) for n in range(12_000)}, {"acc": np.mean})
    error = found["metric_errors"]["acc"]
    expected = right.mean(axis=1).std() / math.sqrt(4000)
    assert error["n"] == 12_000 and error["se"] == pytest.approx(expected, rel=0.3)
    assert error["se"] > 1.25 * right.std() / math.sqrt(12_000)
    # The mean of a metric with itself moves as it does alone; text alone has no picture.
    both = jackknife_error([error["without"]] * 2, [found["metrics"]["acc"]] * 2)
    assert both[0] == pytest.approx(error["se"]) and both[1] == 50
    alone = result(logged[:1], {}, {"acc": np.mean})["metric_errors"]["acc"]
    assert alone["se"] is None and alone["n"] == 1
    odd = [item(0, points={"question_id": "q", "category": "c", "score": 1.0})]
    assert (
        metric_errors(odd, samples_of(odd, ["points"]), {"points": 1.0}, {"points": two_level})[
            "points"
        ]["se"]
        is None
    )


def test_what_seeds_can_give_at_least_and_who_is_higher() -> None:
    a, b = run("a", {0: 0.5, 1: 0.6, 2: 0.7}), run("b", {0: 0.4, 1: 0.6, 2: 0.65})
    assert row(a, b)["least_p"] == 2 / 2**3
    b.scores["same"] = a.scores["same"] = a.scores["t"]  # a tie is neither won nor lost
    a.scores["worse"], b.scores["worse"] = b.scores["t"], a.scores["t"]
    for one in (a, b):  # two seeds only
        one.scores["few"] = {seed: one.scores["t"][seed] for seed in (0, 1)}
    wins = compare([a, b], [("a", "b")], 10)["wins"]["a-b"]
    assert (wins["benchmarks"], wins["tested"], wins["higher"], wins["lower"]) == (4, 4, 2, 1)
    assert (wins["least_p"], wins["n_seeds"]) == (0.25, 3)
    # One benchmark of one seed: nothing is claimed of training again.
    right = np.arange(12).reshape(6, 2) % 3 == 0
    a.scores["one"], b.scores["one"] = (
        run("x", {None: found}).scores["t"] for found in (right, ~right)
    )
    assert compare([a, b], [("a", "b")], 10)["wins"]["a-b"]["n_seeds"] == 1


def test_flips_at_half_of_the_seeds() -> None:
    """Half right counts as right; the clearest first."""
    a = run("a", {0: [[1, 1, 1, 0]], 1: [[0, 0, 1, 0]]})
    b = run("b", {0: [[0, 1, 0, 1]], 1: [[0, 1, 0, 0]]})
    found = [(flip["doc_id"], flip["better"], flip["rates"]) for flip in flipped(a, b, "t")]
    assert found == [(2, "a", [1.0, 0.0]), (0, "a", [0.5, 0.0]), (3, "b", [0.0, 0.5])]


def test_each_setting_that_differs_is_named() -> None:
    identity = ("spec_hash", "protocol", "data_hash", "list_hash")
    settings = "limit overrides data settings judge generation_kwargs prompt_example versions"
    for key in settings.split():
        one, two = ({"spec_hash": n, "other": n, key: n} for n in (0, 1))
        assert _differences(one, two) == ["spec_hash", key]
        assert _differences(one, two | {"spec_hash": 0}) == []  # made by one specification
    for key in identity:
        assert _differences({key: 0, "data": {"a": 1}}, {key: 1, "data": {"a": 2}}) == [
            key,
            "data.a",
        ]
