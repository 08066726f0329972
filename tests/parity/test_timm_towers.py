"""timm's ViTs as towers, from their own layout through stage 2b, beside timm itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.vision.timm_vision import timm_config
from llm2clip_vlm.models.vision.towers import load_vision_tower
from tests.integration.test_keeping import ALL
from tests.integration.test_stage2b import Recipe, data, recipe, run, same, weights
from tests.tiny_towers import CNNS, build_tower

__all__ = ["data", "recipe"]  # fixtures


@pytest.mark.parametrize("kind", ["timm", "timm_eva", "timm_siglip", *CNNS])
@torch.no_grad()
def test_a_tower_gives_what_timm_gives(kind: str, tmp_path: Path) -> None:
    folder = build_tower(kind, tmp_path / "tower")
    tower = load_vision_tower(folder, torch.float32)
    pixels = torch.randn(2, 3, tower.image_size_px, tower.image_size_px)
    inner: Any = tower.model.timm_model
    found = tower.model(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(found.pooler_output, inner(pixels))
    if kind in CNNS:
        maps = inner.forward_features(pixels)
        torch.testing.assert_close(found.last_hidden_state, maps.flatten(2).transpose(1, 2))
    assert len(found.hidden_states) == tower.num_hidden_layers + 1
    tower.model.save_pretrained(tmp_path / "again")
    tower.image_processor.save_pretrained(tmp_path / "again")
    again = load_vision_tower(tmp_path / "again").model
    assert torch.equal(again(pixel_values=pixels).pooler_output, found.pooler_output)
    assert same(again.state_dict(), tower.model.state_dict())  # statistics of BatchNorm, too


@pytest.mark.parametrize("sides", [{"patch_size": [8, 4]}, {"img_size": [32, 64]}])
def test_patches_or_images_that_are_no_squares_are_refused(
    sides: dict[str, Any], timm: Any
) -> None:
    """Of patches of 8x4 px half were taken for registers (17 before a grid of 4 x 4)."""
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2} | sides
    written = {"architecture": "vit_tiny_patch16_224", "model_args": given, "pretrained_cfg": {}}
    with pytest.raises(ModelError, match="expected squares"):
        timm_config(written, "tower")


@pytest.mark.parametrize(
    "kind",
    [
        "timm",
        "timm_cnn",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("timm_eva", "timm_siglip")),
    ],
)
def test_a_tower_goes_through_stage_2b_and_resumes(
    kind: str, recipe: Recipe, tmp_path: Path
) -> None:
    tower = build_tower(kind, tmp_path / "tower")
    trainer = {"max_steps": 4, "save_steps": 2}
    options = {k: v for k, v in ALL.items() if kind not in CNNS or "patch" not in k}
    changes = options | {"inherit_text": None, "vision_tower": str(tower), "trainer": trainer}
    whole, cut = run(recipe("whole", **changes)), recipe("cut", **changes)
    out = run(cut)
    for name in ("model", "vision_tower", "checkpoints/checkpoint-4"):
        shutil.rmtree(out / name)
    (out / "manifest.json").unlink()
    run(cut)
    assert same(weights(out / "model"), weights(whole / "model"))
    load_vision_tower(out / "vision_tower")
    frozen = run(recipe("frozen", vision_tower=str(tower), tower_training="frozen"))
    original = load_vision_tower(tower, torch.float32).model.state_dict()
    assert same(original, load_vision_tower(frozen / "vision_tower").model.state_dict())
    if kind in CNNS:
        return  # no linear layers
    lora = {"r": 2, "alpha": 4, "target_modules": "all-linear"}
    run(recipe("lora", vision_tower=str(tower), tower_training="lora", tower_lora=lora))
