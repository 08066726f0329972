"""Patch dropout: training only, prefix kept, positions stay with their patches, every tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2clip_vlm.models.vision.patch_dropout import PatchDropout, keep_patches
from llm2clip_vlm.models.vision.towers import load_vision_tower
from tests.tiny_towers import KINDS, PREFIX_TOKENS, build_tower


def test_kept_patches_are_ordered_and_differ_by_image() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(4 * 17 * 1.0).view(4, 17, 1)
    kept = keep_patches(tokens, 0.5, 1)
    assert kept.shape == (4, 8)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() <= 15
    assert len({tuple(row) for row in kept.tolist()}) > 1
    assert keep_patches(tokens, 0.99, 1).shape == (4, 1)


@KINDS
def test_every_kind_of_tower(kind: str, tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower(kind, tmp_path))
    model, pixels = tower.model, torch.randn(3, 3, 32, 32)
    whole = model(pixels).last_hidden_state
    names = set(model.state_dict())
    dropout = PatchDropout(model, 0.5, tower.num_prefix_tokens)
    assert set(model.state_dict()) == names
    assert torch.equal(model(pixels).last_hidden_state, whole)
    model.train()
    torch.manual_seed(0)
    out = model(pixels)
    assert out.last_hidden_state.shape == (3, PREFIX_TOKENS[kind] + 8, 32)
    assert out.pooler_output.shape == (3, 32)
    out.pooler_output.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mask_token" not in n)
    dropout.set_rate(0.0)
    assert model(pixels).last_hidden_state.shape == whole.shape


@KINDS
def test_positions_stay_with_their_patches(kind: str, tmp_path: Path) -> None:
    """Dropping nothing but shuffling (rate of almost 0) gives the same pooled output."""
    tower = load_vision_tower(build_tower(kind, tmp_path))
    model = tower.model
    if kind == "dinov3":
        model.config.pos_embed_rescale = None  # it jitters positions while training
    pixels = torch.randn(2, 3, 32, 32)
    want = model(pixels).pooler_output
    PatchDropout(model, 1e-6, tower.num_prefix_tokens)
    got = model.train()(pixels).pooler_output
    if kind.startswith("timm"):  # timm rounds the number of kept patches down
        assert got.shape == want.shape
    else:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_tower_without_encoder_is_refused() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    flat = torch.nn.Module()
    flat.blocks = plain
    with pytest.raises(ValueError, match="no encoder module"):
        PatchDropout(flat, 0.5, 1)
