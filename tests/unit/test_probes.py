"""Logistic regression against scikit-learn, the choice of its strength, few-shot draws."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2clip_vlm.evaluation.encoder import probes
from llm2clip_vlm.evaluation.encoder.probes import choose_l2, fit_logistic, linear_probe
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe


def blobs(per_class: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centres = np.random.default_rng(9).normal(size=(3, 6))
    points = centres[labels] + spread * rng.normal(size=(len(labels), 6))
    return torch.from_numpy(points).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("l2", [1e-2, 1.0, 30.0])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(40, 1.0)
    weights = fit_logistic(x, y, 3, l2)
    other = linear_model.LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-9).fit(x, y)
    theirs = torch.from_numpy(np.c_[other.coef_, other.intercept_]).float()

    def objective(w: torch.Tensor) -> float:
        loss = F.cross_entropy(x @ w[:, :-1].T + w[:, -1], y, reduction="sum")
        return float(loss + l2 / 2 * w[:, :-1].square().sum())

    assert objective(weights) == pytest.approx(objective(theirs), rel=1e-3)
    assert objective(weights) < objective(torch.zeros(3, 7))
    again = fit_logistic(x, y, 3, l2, weights)
    assert objective(again) <= objective(weights) * (1 + 1e-5)


def test_the_strength_is_found_to_an_eighth_of_a_decade() -> None:
    asked = []

    def accuracy(l2: float) -> float:
        asked.append(l2)
        return -abs(np.log10(l2) - 1.37)

    assert choose_l2(accuracy) == pytest.approx(10**1.375)
    assert min(asked) == pytest.approx(1e-6) and max(asked) == pytest.approx(1e6)
    assert len(asked) == len(set(asked)) <= 16


def probe(tmp_path: Path, **more: Any) -> Any:
    x, y = blobs(12, 1.2)
    features = {}
    for part, seed in (("train", 0), ("test", 1)):
        x, y = blobs(12, 1.2, seed)
        rows = [{"image": f"{part}-{i}.png", "label": f"class {c}"} for i, c in enumerate(y)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        features |= {Path(r["image"]).stem: v for r, v in zip(rows, x, strict=True)}

    def pool(records: Any) -> Any:
        return torch.stack([features[Path(r.image).stem] for r in records]), "images"

    seed, places = more.pop("seed", 0), more.pop("places", {})
    task = {"task": "linear_probe"} | more
    task |= {part: {"data": str(tmp_path / f"{part}.jsonl")} for part in ("train", "test")}
    task |= places
    recipe = EncoderEvalRecipe.model_validate(
        {"stage": "run_encoder", "output_dir": "x", "model": "x", "tasks": [task], "seed": seed}
    )
    tower = SimpleNamespace(model=SimpleNamespace(device="cpu"))
    encoder: Any = SimpleNamespace(pool=pool, tower=tower)
    return linear_probe(recipe.tasks[0], encoder, recipe)  # type: ignore[arg-type]


def test_images_that_were_trained_on_are_no_test(tmp_path: Path) -> None:
    """As where `train` lacks the `where` that chooses a split of the one file."""
    whole = {"data": str(tmp_path / "test.jsonl")}
    with pytest.raises(ValueError, match=r"36 of 36 test images are .* train, too, test-0\.png"):
        probe(tmp_path, places={"train": whole})


def test_a_probe_with_all_and_with_few_images(tmp_path: Path) -> None:
    found = probe(tmp_path, shots=[1, 8], draws=8)
    low, high = found["top1"]["ci"]
    assert 40 < low < found["top1"]["score"] < high <= 100 and found["chance_top1"] < 34
    assert found["images"] == {"train": 36, "test": 36}
    assert found["samples"][""][0] == [f"test.jsonl:{line}" for line in range(1, 37)]
    few = found["shots"]
    assert len(few["1"]["draws"]) == 8 and few["1"]["top1"] < few["8"]["top1"]
    assert "CLIP A.3" in found["protocol"] and len(found["data_hash"]) == 64
    other = probe(tmp_path, shots=[1], draws=1, seed=3, validation=0.5)
    assert other["shots"]["1"]["draws"] != few["1"]["draws"][:1] and "50%" in other["protocol"]
    with pytest.raises(ValueError, match="'class 0' has 12"):
        probe(tmp_path, shots=[12])


def test_the_share_for_validation_is_what_the_strength_is_chosen_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fit(features: Any, *rest: Any) -> Any:
        sizes.append(len(features))
        return fit_logistic(features, *rest)

    monkeypatch.setattr("llm2clip_vlm.evaluation.encoder.probes.fit_logistic", fit)
    probe(tmp_path, validation=0.5)
    assert set(sizes[:-1]) == {18} and sizes[-1] == 36


def test_the_strength_is_chosen_on_images_that_it_was_not_fitted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[torch.Tensor] = []
    judged: list[tuple[int, bool]] = []

    def fit(features: Any, *rest: Any) -> Any:
        fitted.append(features)
        return fit_logistic(features, *rest)

    def right(features: Any, *rest: Any) -> Any:
        shared = (features[:, None] == fitted[-1][None]).all(-1).any()
        judged.append((len(features), bool(shared)))
        return probes_right(features, *rest)

    probes_right = probes._right
    monkeypatch.setattr(probes, "fit_logistic", fit)
    monkeypatch.setattr(probes, "_right", right)
    found = probe(tmp_path, validation=0.25, shots=[1, 6], draws=1)
    assert found["chance_top1"] == pytest.approx(100 / 3)
    assert not any(shared for _, shared in judged)
    # a quarter of 36; then of each of three classes one, and four (no more, though six are fitted)
    assert {number for number, _ in judged} == {9, 3, 12, 36}
    assert {len(features) for features in fitted} == {27, 36, 3, 18}


def test_few_images_are_of_their_class_and_apart() -> None:
    labels = np.repeat([0, 1, 2], 12)
    fit, choose = probes._few(np.random.default_rng(0), labels, 6, ["a", "b", "c"])
    assert np.bincount(labels[fit]).tolist() == [6, 6, 6]
    assert np.bincount(labels[choose]).tolist() == [4, 4, 4]
    assert not set(fit) & set(choose)
    fit, choose = probes._few(np.random.default_rng(0), labels, 1, ["a", "b", "c"])
    assert (len(fit), len(choose)) == (3, 3)
