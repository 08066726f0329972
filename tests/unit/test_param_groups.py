"""Which parameters train, at which rate, with which decay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.trainable import (
    apply_trainable,
    freeze_unused,
    part_name,
    train_last_blocks,
    trainable_table,
)
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.training.adapters import add_lora
from llm2clip_vlm.training.export import export_vision_tower
from llm2clip_vlm.training.param_groups import build_param_groups
from tests.tiny_llms import build_family
from tests.tiny_towers import KINDS, build_tower

FIRST = ("embed", "pre_layrnorm", "cls_token", "pos_embed", "mask_token", "register_tokens")
LRS = {"vision_tower": 1e-5, "visual_projection": 2e-5, "text_adaptor": 3e-5, "logit_scale": 4e-5}


@pytest.fixture
def model(tiny_clip: Path) -> LLM2CLIPModel:
    torch.manual_seed(0)
    tower = load_vision_tower(tiny_clip).model
    return LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=8, projection_dim=8)


class Llava(nn.Module):
    """Names as in `LlavaForConditionalGeneration`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "vision_tower": nn.Linear(2, 2),
                "multi_modal_projector": nn.Linear(2, 2),
                "language_model": nn.Linear(2, 2),
            }
        )
        self.lm_head = nn.Linear(2, 3, bias=False)


def by_name(groups: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    return {name: group for group in groups for name in group["param_names"]}  # type: ignore[attr-defined]


def test_each_part_has_its_rate_and_each_parameter_one_group(model: LLM2CLIPModel) -> None:
    groups = build_param_groups(model, LRS, 0.05)
    found = by_name(groups)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, group in found.items():
        assert group["lr"] == LRS[name.split(".")[0]], name


def test_no_decay_for_biases_norms_and_embeddings(model: LLM2CLIPModel) -> None:
    found = by_name(build_param_groups(model, LRS, 0.05))
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.05}
    assert {name for name, group in found.items() if group["weight_decay"] == 0.0} | decayed == set(
        found
    )
    tower = "vision_tower."
    assert tower + "embeddings.patch_embedding.weight" in decayed
    assert tower + "encoder.layers.0.mlp.fc1.weight" in decayed
    assert "visual_projection.weight" in decayed
    for name in (
        tower + "embeddings.position_embedding.weight",
        tower + "embeddings.class_embedding",
        tower + "encoder.layers.0.mlp.fc1.bias",
        tower + "encoder.layers.0.layer_norm1.weight",
        "text_adaptor.norm.weight",
        "logit_scale",
    ):
        assert name not in decayed, name


def test_layer_decay_counts_from_the_top(model: LLM2CLIPModel) -> None:
    found = by_name(build_param_groups(model, LRS, 0.05, layer_decay=0.5))
    tower, rate = "vision_tower.", LRS["vision_tower"]
    for name, factor in {
        "post_layernorm.weight": 1.0,
        "encoder.layers.2.mlp.fc1.weight": 0.5,
        "encoder.layers.0.mlp.fc1.weight": 0.125,
        "pre_layrnorm.weight": 0.0625,
        "embeddings.patch_embedding.weight": 0.0625,
    }.items():
        assert found[tower + name]["lr"] == pytest.approx(rate * factor), name
    assert found["text_adaptor.head.weight"]["lr"] == LRS["text_adaptor"]


@KINDS
def test_layer_decay_of_every_kind_of_tower(kind: str, tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower(kind, tmp_path)).model
    model = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=8, projection_dim=8)
    groups = build_param_groups(model, dict.fromkeys(LRS, 1.0), 0.05, layer_decay=0.5)
    listed = [name for group in groups for name in group["param_names"]]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    rates = {name: group["lr"] for name, group in by_name(groups).items()}
    inside = {n: rate for n, rate in rates.items() if n.startswith("vision_tower.")}
    for name, rate in inside.items():
        block = re.search(r"\.(?:layers?|blocks)\.(\d)\.", name)
        if block:
            assert rate == pytest.approx(0.5 ** (3 - int(block[1]))), name
        else:
            first = any(part in name for part in FIRST) and ".head." not in name
            assert rate == (0.0625 if first else 1.0), name
    # four blocks' worth of rates and the head's, no more
    assert sorted(set(inside.values())) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert {rate for name, rate in rates.items() if name not in inside} == {1.0}


def test_layer_decay_of_a_part_without_blocks_is_refused() -> None:
    model = nn.ModuleDict({"vision_tower": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no list of blocks"):
        build_param_groups(model, {"vision_tower": 1.0}, 0.0, layer_decay=0.9)


def test_released_code_layer_decay_factor_of_a_large_tower() -> None:
    # 24 layers at 0.85: the patch embedding gets 0.0172 of the rate
    names = nn.ModuleDict(
        {
            "embeddings": nn.Linear(1, 1),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(24))}),
        }
    )
    model = nn.ModuleDict({"vision_tower": names})
    found = by_name(build_param_groups(model, {"vision_tower": 1.0}, 0.0, layer_decay=0.85))
    assert found["vision_tower.embeddings.weight"]["lr"] == pytest.approx(0.0172, abs=5e-5)


def test_longest_prefix_wins_and_frozen_parameters_are_left_out(model: LLM2CLIPModel) -> None:
    apply_trainable(model, ["text_adaptor"])
    groups = build_param_groups(model, {"text_adaptor": 1.0, "text_adaptor.head": 2.0}, 0.0)
    found = by_name(groups)
    assert all(name.startswith("text_adaptor.") for name in found)
    assert found["text_adaptor.head.weight"]["lr"] == 2.0
    assert found["text_adaptor.norm.weight"]["lr"] == 1.0


def test_a_rate_for_nothing_and_a_parameter_without_rate_are_refused(
    model: LLM2CLIPModel,
) -> None:
    with pytest.raises(ValueError, match=r"\['vison_tower'\] name no parameter .*'vision_tower'"):
        build_param_groups(model, LRS | {"vison_tower": 1.0}, 0.0)
    with pytest.raises(ValueError, match="'logit_scale' lies below none"):
        build_param_groups(model, {k: v for k, v in LRS.items() if k != "logit_scale"}, 0.0)
    with pytest.raises(ValueError, match=r"\['projector'\]"):
        apply_trainable(model, ["projector"])


def test_parts_of_a_llava_and_its_lm_head() -> None:
    model = Llava()
    apply_trainable(model, {"language_model": 1e-5})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "model.language_model.weight",
        "model.language_model.bias",
        "lm_head.weight",
    }
    apply_trainable(model, ["multi_modal_projector"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "model.multi_modal_projector.weight",
        "model.multi_modal_projector.bias",
    }
    assert part_name("module.model.vision_tower.x") == "vision_tower.x"
    assert part_name("vision_model.x") == "vision_model.x"
    assert set(by_name(build_param_groups(model, {"multi_modal_projector": 1.0}, 0.0))) == trained


def test_table(model: LLM2CLIPModel) -> None:
    apply_trainable(model, ["text_adaptor", "visual_projection"])
    table = trainable_table(model, LRS).splitlines()
    assert table[0].split() == ["part", "parameters", "trainable", "lr"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert rows["vision_tower"][1:] == ["0", "-"]
    assert rows["visual_projection"] == ["256", "256", "2e-05"]
    total = sum(p.numel() for p in model.parameters())
    assert rows["total"][0] == f"{total:,}"


def test_lora_trains_alone_and_merges_into_a_plain_tower(
    model: LLM2CLIPModel, tiny_clip: Path, tmp_path: Path
) -> None:
    source = load_vision_tower(tiny_clip)
    tuner = add_lora(model.vision_tower, LoraSection(r=2, alpha=4, dropout=0.0))
    apply_trainable(model, LRS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tower = {name for name in trained if name.startswith("vision_tower.")}
    # q, k, v, out, fc1, fc2 of three layers, two matrices each
    assert len(tower) == 36 and all("lora_" in name for name in tower)
    assert by_name(build_param_groups(model, LRS, 0.0, layer_decay=0.5))[
        "vision_tower.encoder.layers.2.mlp.fc1.lora_A.default.weight"
    ]["lr"] == pytest.approx(5e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(2, 3, 32, 32)
    adapted = model.eval().vision_tower(pixels).pooler_output
    with pytest.raises(ValueError, match="merge the LoRA adapter"):
        export_vision_tower(model, source.image_processor, tmp_path)
    tuner.merge_and_unload()
    assert not any("lora_" in name for name in model.state_dict())
    export_vision_tower(model, source.image_processor, tmp_path)
    exported = load_vision_tower(tmp_path).model(pixels).pooler_output
    torch.testing.assert_close(exported, adapted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(exported, source.model(pixels).pooler_output, atol=1e-2)


def test_parameters_that_the_loss_does_not_reach_are_frozen() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    frozen = freeze_unused(model, lambda: model["used"](torch.ones(1, 2)).sum())
    assert frozen == ["unused.weight", "unused.bias"]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert all(p.grad is None for p in model.parameters())


def test_finding_what_the_loss_reaches_leaves_batchnorm_as_it_was() -> None:
    """Two pictures of a pass before training shifted a pretrained tower's statistics by a tenth."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_unused(model, lambda: model(torch.randn(4, 3)).square().sum())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@KINDS
def test_no_decay_names_of_every_kind_of_tower(kind: str, tmp_path: Path) -> None:
    """Weight decay is on matrices of layers: on no bias, norm, position, CLS, mask or register."""
    tower = load_vision_tower(build_tower(kind, tmp_path)).model
    model = nn.ModuleDict({"vision_tower": tower})
    found = by_name(build_param_groups(model, {"vision_tower": 1.0}, 0.05))
    parameters = dict(model.named_parameters())
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.05}
    bare = (
        "bias",
        "norm",
        "pos_embed",
        "position_embedding",
        "class_embedding",
        "cls_token",
        "mask_token",
        "register_tokens",
        "reg_token",
        "probe",
        "latent",
        "lambda",
        "scale",
    )
    for name, parameter in parameters.items():
        bare_name = parameter.ndim <= 1 or any(part in name for part in bare)
        assert (name in decayed) is not bare_name, (name, tuple(parameter.shape))
    assert len(decayed) >= 3 * 4 and set(found) == set(parameters)


def test_last_blocks_of_a_language_model_keep_its_norm_and_head() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )
    model = nn.ModuleDict({"language_model": llm.model, "lm_head": llm.lm_head})
    apply_trainable(model, {"language_model": 1e-5})
    train_last_blocks(model, "language_model", 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {name.split(".")[2] for name in trained if ".layers." in name}
    assert blocks == {"1", "2"}
    assert {"language_model.norm.weight", "lm_head.weight"} <= trained
    assert not any("embed_tokens" in name or ".layers.0." in name for name in trained)
    with pytest.raises(ValueError, match="expected at most 2, the blocks that train, got 3"):
        train_last_blocks(model, "language_model", 3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_a_mixture_are_decayed(family: str, tmp_path: Path) -> None:
    """Transformers keeps them in one tensor, whose name does not end with `weight`."""
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(build_family(family, tmp_path))
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("experts" in name)
    found = by_name(build_param_groups(llm, {"layers": 1e-3}, 0.1))
    assert len(found) >= 4
    for name, group in found.items():
        assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1), name
