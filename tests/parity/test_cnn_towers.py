"""Convolutional towers: they come in, compute what they did, and train by stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.trainable import apply_trainable, train_last_blocks
from llm2clip_vlm.models.vision.patch_dropout import PatchDropout
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.training.param_groups import build_param_groups
from tests.tiny_towers import build_tower

Weights = dict[str, Tensor]

# EfficientNet-Lite0: kernel, stride, expansion, channels, blocks; after Tan and Le (1905.11946),
# without squeeze-and-excitation and with ReLU6.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3))
STAGES += ((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))


class Lite:
    """The net written out; it makes its own random weights as it first runs."""

    def __init__(self) -> None:
        self.weights: Weights = {}

    def get(self, name: str, *shape: int, about: float = 0.0) -> Tensor:
        if name not in self.weights:
            spread = 0.1 if about or len(shape) == 1 else (2 / torch.Size(shape[1:]).numel()) ** 0.5
            self.weights[name] = about + spread * torch.randn(shape)
        return self.weights[name]

    def layer(
        self, x: Tensor, conv: str, norm: str, out: int, k: int, s: int, deep: bool
    ) -> Tensor:
        """TensorFlow's SAME: the odd pixel of padding lies behind; BatchNorm's epsilon is 1e-3."""
        groups = x.shape[1] if deep else 1
        weight = self.get(f"{conv}.weight", out, x.shape[1] // groups, k, k)
        need = max((-(-x.shape[-1] // s) - 1) * s + k - x.shape[-1], 0)
        x = F.pad(x, [need // 2, need - need // 2] * 2)
        x = F.conv2d(x, weight, stride=s, groups=groups)
        mean, bias = (self.get(f"{norm}.{part}", out) for part in ("running_mean", "bias"))
        var = self.get(f"{norm}.running_var", out, about=1.0)
        self.weights.setdefault(f"{norm}.num_batches_tracked", torch.tensor(7))
        return F.batch_norm(
            x, mean, var, self.get(f"{norm}.weight", out, about=1.0), bias, eps=1e-3
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = F.relu6(self.layer(x, "_conv_stem", "_bn0", 32, 3, 2, False))
        number = 0
        for kernel, first, widen, out, count in STAGES:
            for place in range(count):
                at, wide, before = f"_blocks.{number}.", x.shape[1] * widen, x
                stride = 1 if place else first
                if widen > 1:
                    x = F.relu6(self.layer(x, f"{at}_expand_conv", f"{at}_bn0", wide, 1, 1, False))
                x = self.layer(x, f"{at}_depthwise_conv", f"{at}_bn1", wide, kernel, stride, True)
                x = self.layer(F.relu6(x), f"{at}_project_conv", f"{at}_bn2", out, 1, 1, False)
                x = x + before if place else x
                number += 1
        return F.relu6(self.layer(x, "_conv_head", "_bn1", 1280, 1, 1, False))


@torch.no_grad()
def test_efficientnet_lite_comes_in(tmp_path: Path, timm: Any) -> None:
    torch.manual_seed(0)
    net, pixels = Lite(), torch.randn(2, 3, 96, 96)
    net(pixels)
    file = tmp_path / "efficientnet-lite0.pth"
    weights = net.weights | {"_fc.weight": torch.ones(3, 1280), "_fc.bias": torch.ones(3)}
    torch.save(weights, file)
    found = convert(file, tmp_path / "out", settings={"image_size": 96})
    assert found["format"] == "tf_efficientnet_lite0" and set(found["keys"]["left_out"]) == {
        "visual._fc"
    }
    tower = load_vision_tower(tmp_path / "out")
    assert (tower.num_patches, tower.image_size_px, tower.has_cls_token) == (9, 96, False)
    assert tower.image_mean[0] == pytest.approx(127 / 255)
    assert tower.image_std[0] == pytest.approx(128 / 255)
    want = net(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower.model(pixels).last_hidden_state, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_open_clips_convnext_comes_in(tmp_path: Path, open_clip: Any) -> None:
    torch.manual_seed(0)
    visual = open_clip.timm_model.TimmModel("test_convnext", 16, 64, pool="", proj="linear").eval()
    for parameter in visual.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    weights = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    weights |= {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "logit_scale": torch.ones(())}
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    vision = {"timm_model_name": "test_convnext", "timm_proj": "linear", "image_size": 64}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision}}
    config |= {"preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    found = convert(folder, tmp_path / "out")
    assert found["opened_with"].startswith("timm") and found["format"] == "test_convnext"
    assert set(found["keys"]["left_out"]) == {"visual.head", "transformer.resblocks", "logit_scale"}
    tower = load_vision_tower(tmp_path / "out")
    assert (tower.num_patches, tower.image_size_px, tower.image_mean[0]) == (4, 64, 0.4)
    pixels = torch.randn(2, 3, 64, 64)
    pooled = tower.model(pixels).pooler_output
    torch.testing.assert_close(pooled, visual.trunk(pixels))
    torch.testing.assert_close(pooled @ visual.head.proj.weight.T, visual(pixels))


@pytest.mark.slow
def test_an_unknown_or_incomplete_cnn_is_refused_or_named(tmp_path: Path, timm: Any) -> None:
    weights = timm.create_model("test_convnext").state_dict()
    torch.save(weights, tmp_path / "convnext.pth")
    with pytest.raises(ModelError, match=r"timm's convnext_tiny or .* --set architecture=NAME"):
        convert(tmp_path / "convnext.pth", tmp_path / "no")
    named = {"architecture": "test_convnext"}
    found = convert(tmp_path / "convnext.pth", tmp_path / "named", settings=named)
    assert found["keys"]["left_out"] == {"visual.head": 2}
    del weights["stages.3.blocks.0.gamma"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ModelError, match=r"of the last: \['stages.3.blocks.0.gamma'\]"):
        convert(tmp_path / "cut.pth", tmp_path / "no", settings=named)
    torch.save({"_conv_stem.weight": torch.ones(1)}, tmp_path / "lite.pth")
    with pytest.raises(ModelError, match="do not fit timm's tf_efficientnet_lite0 or"):
        convert(tmp_path / "lite.pth", tmp_path / "no")
    with pytest.raises(ModelError, match="expected image_size or architecture of a CNN, got hid"):
        convert(tmp_path / "lite.pth", tmp_path / "no", settings={"hidden_act": "gelu"})


def test_layers_are_stages(tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower("timm_convnext", tmp_path / "tower")).model
    model = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=8, projection_dim=8)
    lrs = dict.fromkeys(("vision_tower", "visual_projection", "text_adaptor", "logit_scale"), 1.0)
    groups = build_param_groups(model, lrs, 0.0, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    at = "vision_tower.timm_model."
    assert rates[f"{at}stem.0.weight"] == 0.5**5
    assert [rates[f"{at}stages.{n}.blocks.0.conv_dw.weight"] for n in range(4)] == [
        0.5 ** (4 - n) for n in range(4)
    ]
    assert rates[f"{at}head.norm.weight"] == 1.0
    apply_trainable(model, ["vision_tower"])
    train_last_blocks(model, "vision_tower", 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        name.startswith((f"{at}stages.2", f"{at}stages.3", f"{at}head")) for name in trained
    )


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """Also inside another model, which sets a flag on its parts."""
    tower: Any = load_vision_tower(build_tower("timm_resnet", tmp_path / "tower")).model
    holder: Any = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=8, projection_dim=8).eval()
    pixels, found = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        if enable:
            holder.activation_checkpointing_enable()
            assert holder.vision_tower.timm_model.grad_checkpointing
        holder.zero_grad()
        holder.get_image_features(pixels)[:, 0].sum().backward()
        found.append(holder.vision_tower.timm_model.conv1[0].weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_any_multiple_of_the_stride_is_a_size(tmp_path: Path) -> None:
    folder = build_tower("timm_cnn", tmp_path / "tower")
    tower = load_vision_tower(folder, image_size_px=48)
    found = tower.model(torch.randn(1, 3, 48, 48)).last_hidden_state
    assert found.shape[1] == tower.num_patches == 36
    with pytest.raises(ModelError, match="no multiple of"):
        load_vision_tower(folder, image_size_px=50)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    written["pretrained_cfg"]["input_size"] = [3, 30, 30]
    file.write_text(json.dumps(written))
    with pytest.raises(ModelError, match="size is a multiple of the stride"):
        load_vision_tower(folder)
    with pytest.raises(ValueError, match="no patches to drop"):
        PatchDropout(tower.model, 0.5, 0)


def test_convolutions_get_channels_last(tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower("timm_cnn", tmp_path / "tower")).model
    seen = []
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tower(torch.randn(2, 3, 32, 32))
    assert len(seen) > 5
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "local-dir:/etc"},
        {"architecture": "no_such_net"},
        {"model_args": {"pretrained": True}},
        {"model_args": {"checkpoint_path": "/etc/passwd"}},
    ],
)
def test_a_config_cannot_fetch_or_open_anything(change: dict[str, Any], tmp_path: Path) -> None:
    folder = build_tower("timm_cnn", tmp_path / "tower")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=r"has no|is no part of an architecture"):
        load_vision_tower(folder)
