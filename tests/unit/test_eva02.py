"""EVA02-CLIP against a reference written another way, and against timm where it is installed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import llm2clip_vlm
from llm2clip_vlm.interop.keys import translate
from llm2clip_vlm.interop.layouts.vits import EVA02
from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig, Eva02VisionModel

SIZES = pytest.mark.parametrize("size", [224, 336])
from tests.peers import library


def build(size: int = 28, **values: int) -> Eva02VisionModel:
    """Two blocks whose norms and biases are not the identity."""
    arguments = {
        "hidden_size": 48,
        "intermediate_size": int(48 * 2.6667),
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": size,
        **values,
    }
    torch.manual_seed(0)
    model = Eva02VisionModel(Eva02VisionConfig(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tower_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found, unknown = translate(weights, EVA02)
    assert not unknown
    return {name.removeprefix("vision_tower."): tensor for name, tensor in found.items()}


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def naive(w: dict[str, Tensor], pixels: Tensor, heads: int, patch: int) -> Tensor:
    """The definition step by step in float64: complex rotation, explicit softmax, one head a time.

    A pair (2j, 2j+1) of the first half of a head turns by y * theta^(-2j/half), one of the second
    half by x * theta^(-2j/half); positions run from 0 in steps of 16/grid.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    n_grid = pixels.shape[-1] // patch
    cut = pixels.double().unfold(2, patch, patch).unfold(3, patch, patch)
    flat = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), n_grid**2, -1)
    patches = flat @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(pixels), 1, -1), patches], 1) + w["pos_embed"]
    head_dim = x.shape[-1] // heads
    half = head_dim // 2
    angles = torch.zeros(n_grid**2 + 1, head_dim // 2, dtype=torch.float64)  # CLS turns by 0
    for row in range(n_grid):
        for column in range(n_grid):
            for pair in range(half // 2):
                frequency = 10000.0 ** (-2 * pair / half)
                angles[1 + row * n_grid + column, pair] = row * 16 / n_grid * frequency
                angles[1 + row * n_grid + column, half // 2 + pair] = (
                    column * 16 / n_grid * frequency
                )
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        b = f"blocks.{i}."
        y = layer_norm(x, w, b + "norm1")
        q = y @ w[b + "attn.q_proj.weight"].T + w[b + "attn.q_proj.bias"]
        k = y @ w[b + "attn.k_proj.weight"].T
        v = y @ w[b + "attn.v_proj.weight"].T + w[b + "attn.v_proj.bias"]
        outputs = []
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            scores = rotated(q[..., part]) @ rotated(k[..., part]).mT / math.sqrt(head_dim)
            outputs.append(scores.softmax(-1) @ v[..., part])
        y = layer_norm(torch.cat(outputs, -1), w, b + "attn.inner_attn_ln")
        x = x + y @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        y = layer_norm(x, w, b + "norm2")
        gate = y @ w[b + "mlp.w1.weight"].T + w[b + "mlp.w1.bias"]
        gate = gate * torch.sigmoid(gate)
        y = gate * (y @ w[b + "mlp.w2.weight"].T + w[b + "mlp.w2.bias"])
        y = layer_norm(y, w, b + "mlp.ffn_ln")
        x = x + y @ w[b + "mlp.w3.weight"].T + w[b + "mlp.w3.bias"]
    return layer_norm(x, w, "norm")


@SIZES
@pytest.mark.parametrize("patch", [14, 16])
@torch.no_grad()
def test_equals_the_definition_written_naively(size: int, patch: int) -> None:
    model = build(size, patch_size=patch)
    want = naive(model.state_dict(), images(size), heads=3, patch=patch)
    out = model(images(size))
    torch.testing.assert_close(out.last_hidden_state.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])


@SIZES
@torch.no_grad()
def test_equals_timm(size: int) -> None:
    timm = library("timm")
    theirs = timm.create_model(
        "eva02_large_patch14_clip_336",
        num_classes=0,
        img_size=size,
        embed_dim=48,
        depth=2,
        num_heads=3,
    ).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = build(size)
    published = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(tower_weights(published))
    want = theirs.forward_features(images(size))
    torch.testing.assert_close(ours(images(size)).last_hidden_state, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours(images(size)).pooler_output, theirs(images(size)), atol=1e-5, rtol=1e-5
    )


def test_default_config_is_the_published_large_model() -> None:
    with torch.device("meta"):
        model = Eva02VisionModel(Eva02VisionConfig())
    # with LLM2CLIP's head (1024 x 1280 + 1280) the 305 M of the released file
    assert sum(p.numel() for p in model.parameters()) == 304_957_632 - 1025 * 1280


@torch.no_grad()
def test_published_names_load() -> None:
    model = build()
    weights = model.state_dict()
    upstream: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        bare = name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")
        upstream[f"visual.{bare}"] = tensor
    fused = {name: tensor for name, tensor in upstream.items() if "_proj." not in name}
    for i in range(2):
        rows = [weights[f"blocks.{i}.attn.{part}_proj.weight"] for part in "qkv"]
        fused[f"visual.blocks.{i}.attn.qkv.weight"] = torch.cat(rows)
    for given in (upstream, fused):
        found = tower_weights(given)
        assert set(found) == set(weights)
        assert all(torch.equal(found[name], weights[name]) for name in weights)


@torch.no_grad()
def test_automodel_round_trip_and_hidden_states(tmp_path: Path) -> None:
    llm2clip_vlm.register()
    model = build()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Eva02VisionConfig)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, Eva02VisionModel)
    pixels = images(28)
    out = again(pixels, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, model(pixels).last_hidden_state)
    assert [state.shape for state in out.hidden_states] == 3 * [(2, 5, 48)]
    assert torch.equal(again.norm(out.hidden_states[-1]), out.last_hidden_state)
    # LLaVA asks for layer 0 with the number itself
    assert again(pixels, output_hidden_states=0).hidden_states is not None
    assert model(pixels).hidden_states is None
    assert len(model(pixels, return_dict=False)) == 2


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(images(28)).pooler_output.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(*grads)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of 28 x 28 px, got \(42, 42\)"):
        build()(images(42))


def test_a_new_model_starts_with_small_positions() -> None:
    torch.manual_seed(0)
    model = Eva02VisionModel(
        Eva02VisionConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=8)
    )
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attn.q_proj.bias.abs().max() == 0
