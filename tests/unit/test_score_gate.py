"""The score gate against a small table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from llm2clip_vlm.evaluation.vlm.score_gate import gate, gate_table
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe
from llm2clip_vlm.recipe.suite import ExpectedScores

ROOT = Path(__file__).resolve().parents[2]
TABLE = {
    "source": "a paper",
    "image_processor": "LlavaImageProcessor",
    "columns": {
        "GQA": {"results": ["gqa"], "n": 1000, "prompt_has": ["single word"]},
        "POPE": {"results": ["pope_a", "pope_b"], "metric": "f1", "n": 2000},
        "MME": {
            "results": ["mme"],
            "metric": "p",
            "metric_full": 2000,
            "value_full": 2000,
            "n": 2000,
        },
    },
    "rows": {"model": {"GQA": 62.0, "POPE": 80.0, "MME": 1500.0}},
}


def result(metric: str, value: float, n: int = 1000, **changed: Any) -> dict[str, Any]:
    return {
        "task": "t",
        "metrics": {metric: value},
        "n": n,
        "prompt_example": "What? A single word.",
        "settings": {"image_processor": "LlavaImageProcessorPil"},
        **changed,
    }


@pytest.fixture
def expected() -> ExpectedScores:
    return ExpectedScores.model_validate(TABLE)


def test_within_noise_above_below_and_not_run(expected: ExpectedScores) -> None:
    results = {
        "gqa": result("exact_match", 0.65),
        "pope_a": result("f1", 0.70),
        "pope_b": result("f1", 0.74),
    }
    gqa, pope, mme = gate(expected, "model", results)
    assert gqa["ours"] == pytest.approx(65.0) and gqa["verdict"] == "within noise"
    # two runs of 1,000 questions at 65 %: 1.96 * sqrt(2 * .65 * .35 / 1000)
    assert gqa["noise"] == pytest.approx(4.18, abs=0.01) and gqa["differs"] == []
    assert pope["ours"] == pytest.approx(72.0) and pope["verdict"] == "below"
    assert mme == {"column": "MME", "published": 1500.0, "ours": None, "noise": None} | {
        "noise_of": None,
        "verdict": "not run",
        "differs": ["no mme"],
    }
    text = gate_table([gqa, pope, mme], expected.source)
    assert "a paper" in text and "not run  (no mme)" in text and "below" in text


def test_the_published_scale(expected: ExpectedScores) -> None:
    row = gate(expected, "model", {"mme": result("p", 1700.0, n=2000)})[2]
    assert row["ours"] == 1700.0 and row["verdict"] == "above"
    assert row["noise"] == pytest.approx(1.96 * 2000 * (2 * 0.85 * 0.15 / 2000) ** 0.5)


def test_noise_is_that_of_the_metric_itself(expected: ExpectedScores) -> None:
    """Two results on the same pictures move together: their mean is as uncertain as each."""
    without = [0.72 + 0.001 * (group % 5 - 2) for group in range(50)]
    error = (49 * np.var(without)) ** 0.5
    kept = {"f1": {"n": 1000, "se": error, "without": without}}
    results = {name: result("f1", 0.72, metric_errors=kept) for name in ("pope_a", "pope_b")}
    row = gate(expected, "model", results)[1]
    assert row["noise_of"] == "pictures" and row["differs"] == []
    assert row["noise"] == pytest.approx(100 * t.ppf(0.975, 49) * 2**0.5 * error)
    # Three of fifty groups hold a picture.
    few = {"f1": {"n": 1000, "se": 0.1, "without": [0.7, 0.72, 0.74] + [None] * 47}}
    results = {name: result("f1", 0.72, metric_errors=few) for name in ("pope_a", "pope_b")}
    half = 100 * t.ppf(0.975, 2) * 2**0.5 * (2 * np.var([0.7, 0.72, 0.74])) ** 0.5
    assert gate(expected, "model", results)[1]["noise"] == pytest.approx(half)
    none = {"f1": {"n": 900, "se": None, "without": [None] * 50}}
    results["pope_a"] = result("f1", 0.72, metric_errors=none, deviation="another split")
    row = gate(expected, "model", results)[1]
    assert row["noise_of"] == "binomial" and "(binomial)" in gate_table([row], "x")
    assert row["differs"] == ["900 questions, not 1000", "another split"]


def test_what_differs_is_named(expected: ExpectedScores) -> None:
    settings = {"image_processor": "CLIPImageProcessorPil"}
    other = result("exact_match", 0.62, n=8, prompt_example="What?", settings=settings)
    (row, *_) = gate(expected, "model", {"gqa": other})
    assert row["differs"] == [
        "prompt lacks 'single word'",
        "image processor CLIPImageProcessorPil, not LlavaImageProcessor",
        "8 questions, not 1000",
    ]


def test_errors_name_what_there_is(expected: ExpectedScores) -> None:
    with pytest.raises(ValueError, match=r"expected the metric exact_match, got \['f1'\]"):
        gate(expected, "model", {"gqa": result("f1", 0.5)})


def test_the_shipped_table_loads_and_unknown_columns_are_refused(tmp_path: Path) -> None:
    shipped = load_recipe(ROOT / "eval/expected/llava15.yaml", ExpectedScores)
    assert shipped.rows["llava15_7b"]["GQA"] == 62.0 and len(shipped.rows) == 14
    crops = load_recipe(ROOT / "eval/expected/llava_next.yaml", ExpectedScores)
    assert crops.columns == shipped.columns and crops.image_processor == "LlavaNextImageProcessor"
    assert crops.rows["open_llava_next_vicuna7b"]["TextVQA"] == 67.2
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("source: x\ncolumns: {A: {results: [a], n: 1}}\nrows: {m: {B: 1.0}}\n")
    with pytest.raises(RecipeError, match="are no columns"):
        load_recipe(wrong, ExpectedScores)


def test_a_prompt_must_not_have_what_the_paper_lacks(expected: ExpectedScores) -> None:
    expected.columns["GQA"].prompt_lacks = ["OCR", "A single"]
    (row, *_) = gate(expected, "model", {"gqa": result("exact_match", 0.62)})
    assert row["differs"] == ["prompt has 'A single'"]


def test_a_perfect_score_has_some_noise(expected: ExpectedScores) -> None:
    (row, *_) = gate(expected, "model", {"gqa": result("exact_match", 1.0)})
    assert row["noise"] == pytest.approx(1.96 * (2 * 1e-4 / 1000) ** 0.5 * 100)
    assert row["verdict"] == "above"
