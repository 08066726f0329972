"""Stage 2b with what keeps CLIP's knowledge: every option acts, and a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.runs.manifest import HandoffError
from tests.integration.test_stage2b import Recipe, data, recipe, run, same, weights
from tests.tiny import build_clip
from tests.tiny_towers import build_tower

__all__ = ["data", "recipe"]  # fixtures

ALL: dict[str, Any] = {
    "projection_dim": 32,
    "inherit_text": {"steps": 3, "batch_size": 8},
    "self_distillation": {"teacher": "average", "loss": "cosine", "weight": 2.0},
    "weight_average": {"decay": 0.5},
    "patch_dropout": 0.5,
    "patch_dropout_tail": 0.25,
}


def test_each_option_changes_the_tower(recipe: Recipe) -> None:
    plain = run(recipe("plain", projection_dim=32, trainer={"max_steps": 2}))
    changes = {name: ALL[name] for name in ("inherit_text", "weight_average", "patch_dropout")}
    changes["self_distillation"] = ALL["self_distillation"] | {"teacher": "frozen"}
    for name, value in changes.items():
        values: dict[str, Any] = {"projection_dim": 32, name: value}
        out = run(recipe(name, **values, trainer={"max_steps": 2}))
        assert not same(weights(out / "vision_tower"), weights(plain / "vision_tower")), name
        LLM2CLIPModel.from_pretrained(out / "model")


def test_another_clip_to_inherit_from_is_noticed(recipe: Recipe, tmp_path: Path) -> None:
    """A finished run would have had nothing to do, an unfinished one would have gone on."""
    clip = build_clip(tmp_path / "clip", seed=5)
    inherits = {"inherit_text": {"clip": str(clip), "steps": 1, "batch_size": 8}}
    path = recipe(**inherits, projection_dim=32, trainer={"max_steps": 4})
    first = weights(run(path) / "model")
    build_clip(clip, seed=6)
    with pytest.raises(HandoffError, match="began with another inherit_text"):
        run(path)
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert not same(weights(run(path) / "model"), first)


def test_a_killed_run_resumes_to_the_same_weights(recipe: Recipe) -> None:
    whole, cut = run(recipe("whole", **ALL)), recipe("cut", **ALL)
    out = run(cut)
    for name in ("model", "vision_tower", "checkpoints/checkpoint-8"):
        shutil.rmtree(out / name)
    (out / "manifest.json").unlink()
    run(cut)
    assert same(weights(out / "model"), weights(whole / "model"))


@pytest.mark.parametrize("kind", ["eva02", "siglip", "dinov3"])
def test_other_towers_go_through_the_stage(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    tower = build_tower(kind, tmp_path / "xyz")
    changes = ALL | {"inherit_text": None, "vision_tower": str(tower), "layer_decay": 0.85}
    out = run(recipe(kind, **changes, image_size_px=48, trainer={"max_steps": 2}))
    model = LLM2CLIPModel.from_pretrained(out / "model").eval()
    assert model.get_image_features(torch.randn(1, 3, 48, 48)).shape == (1, 32)
