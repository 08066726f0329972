"""LLM2CLIPModel: pooling, saving, registration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, CLIPModel, SiglipVisionConfig

import llm2clip_vlm
from llm2clip_vlm.losses.contrastive import contrastive_loss
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_vlm.models.vision.towers import load_vision_tower
from tests.tiny_towers import build_tower


@pytest.fixture
def model(tiny_clip: Path) -> LLM2CLIPModel:
    torch.manual_seed(0)
    tower = load_vision_tower(tiny_clip).model
    return LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=24, projection_dim=16).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return pixels, torch.randn(3, 24, generator=generator)


def test_image_side_is_the_pretrained_tower_pooled_and_projected(
    model: LLM2CLIPModel, tiny_clip: Path
) -> None:
    pixels, _ = inputs()
    pooled = CLIPModel.from_pretrained(tiny_clip).vision_model(pixels).pooler_output
    want = F.normalize(pooled @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model.get_image_features(pixels), want)
    assert model.visual_projection.bias is None


def test_head_starts_with_the_std_of_openai_clip() -> None:
    torch.manual_seed(0)
    config = LLM2CLIPConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "image_size": 32,
            "patch_size": 8,
        },
        text_embed_dim=8,
        projection_dim=512,
    )
    std = LLM2CLIPModel(config).visual_projection.weight.std().item()
    assert std == pytest.approx(64**-0.5, rel=0.02)


def test_forward(model: LLM2CLIPModel) -> None:
    pixels, text = inputs()
    out = model(pixels, text, return_loss=True)
    assert out.image_embeds.shape == out.text_embeds.shape == (3, 16)
    torch.testing.assert_close(out.text_embeds.norm(dim=-1), torch.ones(3))
    assert out.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    want = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
    assert torch.equal(out.loss, want)
    assert model(pixels, text).loss is None


def test_round_trip_is_exact_through_automodel_and_twice(
    model: LLM2CLIPModel, tmp_path: Path
) -> None:
    llm2clip_vlm.register()
    llm2clip_vlm.register()
    model.save_pretrained(tmp_path / "a")
    assert (
        AutoConfig.from_pretrained(tmp_path / "a").vision_config.model_type == "clip_vision_model"
    )
    once, info = AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert isinstance(once, LLM2CLIPModel)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    once.save_pretrained(tmp_path / "b")
    twice = LLM2CLIPModel.from_pretrained(tmp_path / "b")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name
    pixels, text = inputs()
    for key in ("image_embeds", "text_embeds", "logit_scale"):
        assert torch.equal(model(pixels, text)[key], twice.eval()(pixels, text)[key]), key
    names = set(load_file(tmp_path / "b" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "a" / "model.safetensors")) == set(model.state_dict())


def test_config_keeps_its_fields_and_no_path_of_this_machine(
    model: LLM2CLIPModel, tmp_path: Path, tiny_clip: Path
) -> None:
    model.config.adaptor_expansion = 3
    model.config.save_pretrained(tmp_path)
    again = LLM2CLIPConfig.from_pretrained(tmp_path)
    assert (again.text_embed_dim, again.projection_dim, again.adaptor_expansion) == (24, 16, 3)
    assert str(tiny_clip) not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_every_size_of_the_config_shapes_the_model() -> None:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LLM2CLIPConfig(
        vision_config=vision,
        text_embed_dim=8,
        projection_dim=6,
        adaptor_num_blocks=1,
        adaptor_expansion=3,
        logit_scale_init_value=1.5,
    )
    model = LLM2CLIPModel(config)
    assert type(model.vision_tower).__name__ == "SiglipVisionModel"
    assert model.visual_projection.weight.shape == (6, 16)
    assert model.text_adaptor.blocks[0].fc1.weight.shape == (24, 8)
    assert len(model.text_adaptor.blocks) == 1
    assert model.logit_scale.item() == 1.5
    assert model.get_image_features(torch.randn(2, 3, 16, 16)).shape == (2, 6)


def test_a_tower_without_pooling_head_is_refused() -> None:
    vision = SiglipVisionConfig(hidden_size=16, num_attention_heads=2, vision_use_head=False)
    with pytest.raises(ValueError, match="pooling head"):
        LLM2CLIPModel(LLM2CLIPConfig(vision_config=vision))


def test_gradient_checkpointing_changes_no_gradient(model: LLM2CLIPModel) -> None:
    pixels, text = inputs()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(pixels, text, return_loss=True).loss.backward()
        weight = model.vision_tower.get_parameter("encoder.layers.0.mlp.fc1.weight")
        assert weight.grad is not None
        grads.append(weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_rotary_frequencies_stay_in_fp32(tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower("dinov3", tmp_path), torch.bfloat16).model
    model = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=8, projection_dim=8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    (name, table), *_ = model.vision_tower.named_buffers()
    assert (name, table.dtype) == ("rope_embeddings.inv_freq", torch.float32)
    assert torch.equal(table, tower.get_buffer(name))
