"""Adapters: what is exported is what was trained, for every layer that an adapter can be on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.training.adapters import (
    Rounding,
    add_adapter,
    add_lora,
    load_adapter,
    merge_adapter,
    merged_state,
    save_adapter,
)
from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable
from tests.tiny import llama_config, llm_tokenizer
from tests.tiny_towers import build_tower

LANGUAGE = (
    ["q_proj"],
    ["q_proj", "embed_tokens"],
    "all-linear",
    r".*\.(up|down)_proj",
    ["layers.1.self_attn.k_proj"],
)
TOWER = {
    "clip": (["patch_embedding", "q_proj"], ["position_embedding", "fc1"], "all-linear"),
    "siglip": (["patch_embedding", "out_proj"], "all-linear"),
    "dinov2": (["projection"], "all-linear"),
    "eva02": ("all-linear", ["proj"]),
}


def adapted(checkpoint: Path, part: str, targets: Any, **more: Any) -> tuple[Any, Any]:
    model, processor = load_vlm(checkpoint)
    lora = LoraSection(r=4, alpha=16, dropout=0.0, target_modules=targets)
    recipe = Stage4Recipe(
        output_dir="x",
        checkpoint="x",
        data=[],
        trainable={"multi_modal_projector": 1e-3, part: 1e-3},
        **{f"{part}_lora": lora},
    )
    prepare_trainable(model, recipe)
    return model, processor


def train_a_bit(model: nn.Module) -> None:
    """Moves all adapters away from zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def inputs_of(model: Any) -> dict[str, Any]:
    visual = [model.config.image_token_index] * model.config.image_seq_length
    ids = torch.tensor([[*visual, 9, 10, 11, 12]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}


def check_export(checkpoint: Path, part: str, targets: Any, tmp_path: Path) -> None:
    model, processor = adapted(checkpoint, part, targets)
    train_a_bit(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        before = load_vlm(checkpoint)[0](**inputs).logits
        live = model.eval()(**inputs).logits
        assert (live - before).abs().max() > 1e-3
        save_vlm(
            model, processor, tmp_path / "out", state_dict=merged_state(model, model.state_dict())
        )
        again = load_vlm(tmp_path / "out")[0](**inputs).logits
        torch.testing.assert_close(again, live, atol=2e-5, rtol=1e-4)
        save_adapter(model, model.state_dict(), tmp_path / "adapter", "base")
        other, _ = adapted(checkpoint, part, targets)
        load_adapter(other, tmp_path / "adapter", "base")
        assert torch.equal(other.eval()(**inputs).logits, live)


@pytest.mark.parametrize("targets", LANGUAGE)
def test_an_exported_language_model_has_its_adapter(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, targets: Any
) -> None:
    save_vlm(*build_vlm(tiny_clip, tiny_llm), tmp_path / "vlm")
    check_export(tmp_path / "vlm", "language_model", targets, tmp_path)


@pytest.mark.parametrize(
    ("kind", "targets"), [(kind, targets) for kind, all_ in TOWER.items() for targets in all_]
)
def test_an_exported_tower_has_its_adapter(
    tiny_llm: Path, tmp_path: Path, kind: str, targets: Any
) -> None:
    save_vlm(*build_vlm(build_tower(kind, tmp_path / kind), tiny_llm), tmp_path / "vlm")
    check_export(tmp_path / "vlm", "vision_tower", targets, tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "o_proj"]])
def test_a_merged_text_encoder_is_the_trained_one(
    tiny_llm: Path, tmp_path: Path, targets: Any, use_dora: bool
) -> None:
    lora = LoraSection(r=4, alpha=16, dropout=0.0, target_modules=targets, use_dora=use_dora)
    model = add_adapter(AutoModel.from_pretrained(tiny_llm), lora)
    train_a_bit(model)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        live = model.eval()(input_ids=ids).last_hidden_state
        merged, rounding = merge_adapter(model, torch.float32)
        merged.save_pretrained(tmp_path / "out")
        again = AutoModel.from_pretrained(tmp_path / "out")(input_ids=ids).last_hidden_state
    torch.testing.assert_close(again, live, atol=2e-5, rtol=1e-4)
    assert rounding.share == 0.0


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "eva02"])
def test_a_merged_tower_is_the_trained_one(kind: str, use_dora: bool, tmp_path: Path) -> None:
    from llm2clip_vlm.models.vision.towers import load_vision_tower

    tower = load_vision_tower(build_tower(kind, tmp_path / kind)).model
    lora = LoraSection(r=4, alpha=16, dropout=0.0, use_dora=use_dora)
    tuner = add_lora(tower, lora)
    train_a_bit(tower)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        live = tower.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
        tuner.merge_and_unload()
        merged = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_merged_is_refused_by_name(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    save_vlm(*build_vlm(tiny_clip, tiny_llm), tmp_path / "vlm")
    with pytest.raises(ValueError, match=r"language_model_lora.target_modules: .*\['lm_head'\]"):
        adapted(tmp_path / "vlm", "language_model", ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"LayerNorm.*not supported"):
        adapted(tmp_path / "vlm", "vision_tower", ["q_proj", "layer_norm1"])
    tied = LlamaForCausalLM(llama_config(len(llm_tokenizer())))
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "llm")
    llm_tokenizer().save_pretrained(tmp_path / "llm")
    save_vlm(*build_vlm(tiny_clip, tmp_path / "llm"), tmp_path / "tied")
    adapted(tmp_path / "tied", "language_model", ["q_proj"])
    with pytest.raises(ValueError, match=r"embed_tokens: its weight is another layer's, too"):
        adapted(tmp_path / "tied", "language_model", ["q_proj", "embed_tokens"])
    for target in ("embed_tokens", "lm_head"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
        with pytest.raises(ValueError, match=f"{target}: its weight is another layer's, too"):
            add_adapter(model, LoraSection(target_modules=[target]))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4))
    with pytest.raises(ValueError, match="grouped channels"):
        add_lora(grouped, LoraSection(r=4, target_modules=["0"]))


def test_bf16_rounding_is_stated(tiny_llm: Path) -> None:
    """A change of half a per cent of a bf16 weight loses about a third of itself."""
    model = add_adapter(
        AutoModel.from_pretrained(tiny_llm, dtype=torch.bfloat16),
        LoraSection(r=4, alpha=8, dropout=0.0),
    )
    layer = model.base_model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
        ratio = 0.005 * before.float().norm() / layer.get_delta_weight("default").norm()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(ratio)
    exact = before.float() + layer.get_delta_weight("default").detach()
    merged, rounding = merge_adapter(model, torch.bfloat16)
    weight = merged.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, exact.to(torch.bfloat16))
    assert 0.2 < rounding.share < 0.5
    assert f"rounding loses {rounding.share:.1%}" in str(rounding)
    assert merged.rotary_emb.inv_freq.dtype == torch.float32
    assert json.dumps({"share": Rounding().share}) == '{"share": 0.0}'


def test_the_share_that_rounding_loses_by_hand() -> None:
    """Steps of bf16 between 1 and 2 are 2**-7: of 3 / 512 the nearest is 4 / 512."""
    rounding = Rounding()
    assert rounding.share == 0.0
    saved = rounding.saved(torch.ones(2), torch.ones(2) + 3 / 512, torch.bfloat16)
    assert saved.tolist() == [1 + 4 / 512] * 2
    assert rounding.share == pytest.approx(1 / 3)
    rounding.saved(torch.zeros(1), torch.tensor([4 / 512]), torch.bfloat16)  # loses nothing
    assert rounding.share == pytest.approx((2 / (2 * 9 + 16)) ** 0.5)
    assert "in bfloat16: rounding loses 24.3% of" in str(rounding)
