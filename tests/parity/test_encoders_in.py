"""LLM2CLIP's, open_clip's and timm's encoders come in and compute what they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.models.towers import load_vision_tower
from tests.parity import reference

Weights = dict[str, Tensor]


def upstream(weights: Weights) -> Weights:
    """EVA-CLIP's bare biases."""
    names = {".q_proj.bias": ".q_bias", ".v_proj.bias": ".v_bias"}
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        renamed[name] = tensor
    return renamed


def fused(weights: Weights) -> Weights:
    """One `qkv` and bare biases."""
    found = upstream(weights)
    for n in range(reference.DEPTH):
        at = f"blocks.{n}.attn."
        rows = [found.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        found[at + "qkv.weight"] = torch.cat(rows)
    return found


TOWERS: dict[str, tuple[Callable[[], Weights], Callable[[Weights, Tensor], Tensor], str]] = {
    "openai_clip": (reference.openai, reference.openai_features, "visual."),
    "eva02": (reference.eva02, reference.eva02_features, "visual."),
    "eva02 upstream": (lambda: upstream(reference.eva02()), reference.eva02_features, "visual."),
    "eva02 fused": (lambda: fused(reference.eva02()), reference.eva02_features, "visual."),
    "siglip_timm": (reference.siglip, reference.siglip_features, "visual.trunk."),
}


def official(kind: str) -> tuple[Weights, Tensor]:
    """A training checkpoint of LLM2CLIP, and its image features on `pixels()`."""
    make, features, prefix = TOWERS[kind]
    tower = make()
    plain = reference.eva02() if kind.startswith("eva02") else tower
    weights = {prefix + name: tensor for name, tensor in tower.items()}
    out = 48 if kind != "siglip_timm" else reference.WIDTH
    weights |= reference.adaptor("text.text_adaptor.", out=out)
    weights |= {"logit_scale": torch.tensor(4.2)}
    return weights, features(plain, reference.pixels())


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("wrapper", ["module", "state_dict", "safetensors"])
@torch.no_grad()
def test_official_training_checkpoint(kind: str, wrapper: str, tmp_path: Path) -> None:
    weights, want = official(kind)
    file = tmp_path / "any name"
    if wrapper == "safetensors":
        save_file(weights, file)
    else:
        torch.save({wrapper: {f"module.{k}": t for k, t in weights.items()}, "step": 3}, file)
    certificate = convert(file, tmp_path / "out")
    assert certificate["format"] == kind.split(maxsplit=1)[0]
    assert not certificate["keys"]["missing"] and not certificate["keys"]["unexpected"]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    # Measured against float64: at most 4e-7 of values up to 2.
    features = model.visual_projection(model.vision_tower(reference.pixels()).pooler_output)
    close(features, want, 1e-5)
    close(
        model.get_image_features(reference.pixels()), want / want.norm(dim=-1, keepdim=True), 1e-5
    )
    vectors = torch.randn(5, 24, generator=torch.Generator().manual_seed(6))
    # Measured: at most 2e-7.
    text = reference.adaptor_features(weights, "text.text_adaptor.", vectors)
    close(model.get_text_features(vectors), text, 1e-5)
    assert model.logit_scale.item() == pytest.approx(4.2)
    tower = load_vision_tower(tmp_path / "out" / "vision_tower")
    assert torch.equal(
        tower.model(reference.pixels()).pooler_output,
        model.vision_tower(reference.pixels()).pooler_output,
    )
    assert tower.image_mean[0] == (0.5 if kind == "siglip_timm" else pytest.approx(0.48145466))
