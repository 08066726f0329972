"""The teacher, representation inheritance, the running average, and the last steps' patches."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from transformers import CLIPModel, TrainerControl, TrainerState

from llm2clip_vlm.models.clip import ClipTokens, load_clip
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.vision.patch_dropout import PatchDropout
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.encoder import InheritanceSection, Stage2bRecipe
from llm2clip_vlm.training.callbacks import PatchDropoutTail, WeightAverage
from llm2clip_vlm.training.encoder.distillation import (
    TowerTeacher,
    inherit_space,
    inherit_text_tower,
    prepare_keeping,
    probe_embeds,
)
from tests.tiny import WORDS
from tests.tiny_towers import build_tower

DIM = 12


@pytest.fixture
def model(tiny_clip: Path) -> LLM2CLIPModel:
    torch.manual_seed(0)
    tower = load_vision_tower(tiny_clip).model
    return LLM2CLIPModel.from_vision_tower(
        tower, text_embed_dim=DIM, projection_dim=32, adaptor_num_blocks=1
    )


def lookup(texts: list[str]) -> Tensor:
    """A bag of words: what an LLM's embedding of a caption stands for here."""
    words = torch.randn(len(WORDS), DIM, generator=torch.Generator().manual_seed(0))
    return torch.stack(
        [words[[WORDS.index(word) for word in text.split()]].sum(0) for text in texts]
    )


def args_of(folder: Path) -> Any:
    return SimpleNamespace(output_dir=str(folder), device=torch.device("cpu"))


def recipe(tiny_clip: Path, **values: Any) -> Stage2bRecipe:
    return Stage2bRecipe(
        output_dir="out",
        vision_tower=str(tiny_clip),
        embedding_cache="cache",
        train=[],
        **values,
    )


def test_the_untrained_student_pays_nothing(model: LLM2CLIPModel) -> None:
    pixels = torch.randn(4, 3, 32, 32)
    for loss in ("cosine", "relational"):
        teacher = TowerTeacher(model, loss, weight=2.0)
        targets = teacher(pixels)
        assert not targets.requires_grad
        embeds = model.get_image_features(pixels)
        assert teacher.penalty(embeds, targets, gather=False).item() == pytest.approx(0, abs=1e-6)
        moved = F.normalize(embeds + 0.1 * torch.randn_like(embeds), dim=-1)
        one = TowerTeacher(model, loss, weight=1.0).penalty(moved, targets, gather=False)
        two = teacher.penalty(moved, targets, gather=False)
        assert two.item() == pytest.approx(2 * one.item()) and one > 0


def test_inherit_space_starts_as_clip(
    model: LLM2CLIPModel, tiny_clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = CLIPModel.from_pretrained(tiny_clip)
    inherit_space(model, clip)
    assert not caplog.records
    pixels = torch.randn(2, 3, 32, 32)
    want = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(model.eval().get_image_features(pixels), want)
    assert torch.equal(model.logit_scale, clip.logit_scale)
    narrow = LLM2CLIPModel.from_vision_tower(
        model.vision_tower, text_embed_dim=DIM, projection_dim=8
    )
    with pytest.raises(ValueError, match="projects 32 to 32 dimensions, the model 32 to 8"):
        inherit_space(narrow, clip)
    with torch.no_grad():
        clip.vision_model.post_layernorm.weight.mul_(2)
    inherit_space(model, clip)
    (warning,) = caplog.messages
    assert "inherit_text: the CLIP: 1 tensors of vision_tower are not those" in warning
    assert "post_layernorm.weight" in warning


def test_heads_of_another_tower_are_told(
    model: LLM2CLIPModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    model.take_heads(tmp_path)
    assert not caplog.messages
    with torch.no_grad():
        next(model.vision_tower.parameters()).mul_(2)
    model.take_heads(tmp_path)
    (warning,) = caplog.messages
    assert f"heads_from: {tmp_path}: 1 tensors of vision_tower are not those" in warning


def test_the_adaptor_learns_the_text_tower(model: LLM2CLIPModel, tiny_clip: Path) -> None:
    clip, tokenizer, _ = load_clip(str(tiny_clip))
    tokens = ClipTokens(tokenizer)
    captions = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("circle", "square", "star")]
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings = InheritanceSection(steps=250, batch_size=16, learning_rate=5e-3)
    arguments: Any = {"seed": 1, "device": torch.device("cpu")}
    long = " ".join(["red"] * 20)  # beyond the window: CLIP sees its beginning only
    assert tokens.fits("red star") and not tokens.fits(long)
    cosine = inherit_text_tower(
        model, clip, tokens, [*captions, long], lookup, settings, **arguments
    )
    assert cosine > 0.98
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[0] for name in changed} == {"text_adaptor"}
    with torch.no_grad():
        got = model.get_text_features(lookup(captions))
        want = F.normalize(clip.get_text_features(**tokens(captions)).pooler_output, dim=-1)
    assert F.cosine_similarity(got, want).min() > 0.95
    with pytest.raises(ValueError, match="none of 1 captions fits CLIP's window of 16 tokens"):
        inherit_text_tower(model, clip, tokens, [long], lookup, settings, **arguments)


def test_prepare_keeping_does_what_the_recipe_says(
    model: LLM2CLIPModel, tiny_clip: Path, tmp_path: Path
) -> None:
    def prepare(resumes: bool = False, **values: Any) -> Any:
        captions = ["red star", "blue circle"]
        arguments: Any = (model, 1, lambda: captions, lookup, "cpu")
        return prepare_keeping(recipe(tiny_clip, **values), *arguments, resumes=resumes)

    nothing = prepare()
    assert (nothing.teacher, nothing.average, nothing.callbacks) == (None, None, [])
    fixed = prepare(self_distillation={"teacher": "frozen", "loss": "relational", "weight": 3.0})
    assert (fixed.teacher.loss, fixed.teacher.weight) == ("relational", 3.0)
    assert fixed.teacher.model is not model
    moving = prepare(
        self_distillation={"teacher": "average"}, weight_average={"export": False, "decay": 0.5}
    )
    assert moving.teacher.model is moving.callbacks[0].model
    assert moving.average is None
    assert prepare(weight_average={}).average is not None
    dropped = prepare(patch_dropout=0.5, patch_dropout_tail=0.25).callbacks
    assert dropped[0].share == 0.25
    model.vision_tower.encoder._forward_pre_hooks.clear()
    prepare(inherit_text={"steps": 1, "batch_size": 2})
    clip = CLIPModel.from_pretrained(tiny_clip)
    assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
    # a resumed run has inherited already: the adaptor comes from the checkpoint
    before = model.text_adaptor.head.weight.clone()
    prepare(resumes=True, inherit_text={"steps": 1, "batch_size": 2})
    assert torch.equal(model.text_adaptor.head.weight, before)
    siglip = build_tower("siglip", tmp_path / "siglip")
    with pytest.raises(ValueError, match="is a 'siglip_vision_model' model, expected a CLIPModel"):
        prepare(inherit_text={"clip": str(siglip)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"self_distillation": {"teacher": "average"}}, "add `weight_average`"),
        ({"weight_average": {"export": False}}, "no self_distillation uses"),
        (
            {"weight_average": {}, "trainer": {"load_best_model_at_end": True}},
            "load_best_model_at_end: expected without `weight_average`",
        ),
    ],
)
def test_an_average_that_serves_nothing_is_refused(
    tiny_clip: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(tiny_clip, **values)


def test_weight_average_by_hand_saved_and_resumed(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, decay=0.5)
    state, control, args = TrainerState(), TrainerControl(), args_of(tmp_path)
    average.on_train_begin(args, state, control, model=model)
    want = 0.0
    for step in range(1, 5):
        torch.nn.init.constant_(model.weight, float(step))
        state.global_step = step
        average.on_step_end(args, state, control, model=model)
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
    assert average.model.weight.item() == pytest.approx(want)
    (tmp_path / "checkpoint-4").mkdir()
    average.save(tmp_path / "checkpoint-4", model)
    again = WeightAverage(model, decay=0.5)
    again.on_train_begin(args, state, control, model=model)
    assert torch.equal(again.model.weight, average.model.weight)
    bias = model.bias.clone()
    again.copy_to(model)
    assert model.weight.item() == pytest.approx(want)
    assert torch.equal(model.bias, bias)
    state.global_step = 7
    with pytest.raises(ValueError, match=r"checkpoint-7/average\.safetensors is missing"):
        again.on_train_begin(args, state, control, model=model)


def test_the_last_steps_see_whole_images(model: LLM2CLIPModel, tmp_path: Path) -> None:
    dropout = PatchDropout(model.vision_tower, 0.5, 1)
    tail = PatchDropoutTail(dropout, 0.3)
    seen = []
    for step in range(10):
        state = TrainerState(global_step=step, max_steps=10)
        tail.on_step_begin(args_of(tmp_path), state, TrainerControl())
        seen.append(dropout.rate)
    assert seen == 7 * [0.5] + 3 * [0.0]


def test_fields_reach_the_resolved_recipe(tiny_clip: Path) -> None:
    values = recipe(tiny_clip, weight_average={}, inherit_text={}).model_dump()
    assert values["weight_average"] == {"decay": 0.999, "export": True}
    assert math.isclose(values["inherit_text"]["learning_rate"], 1e-3)
    assert json.dumps(values["patch_dropout_tail"]) == "0.1"


def dropping(clip: Path) -> LLM2CLIPModel:
    """A model whose tower has dropout, as it is while it trains."""
    tower = load_vision_tower(clip).model
    made = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=DIM, projection_dim=32)
    for module in made.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    pixels = torch.randn(2, 3, 32, 32)
    made.train()
    with torch.no_grad():
        assert not torch.equal(made.get_image_features(pixels), made.get_image_features(pixels))
    return made


def test_teacher_and_what_is_saved_have_no_dropout(tiny_clip: Path) -> None:
    model = dropping(tiny_clip)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = copy.deepcopy(model).eval().get_image_features(pixels)
    arguments: Any = (model, 1, list, lookup, "cpu")
    for values in (
        {"self_distillation": {"teacher": "frozen"}},
        {"self_distillation": {"teacher": "average"}, "weight_average": {"export": False}},
    ):
        keeping = prepare_keeping(recipe(tiny_clip, **values), *arguments, resumes=False)
        model.train()
        torch.testing.assert_close(keeping.teacher.model.get_image_features(pixels), want)
    expected = probe_embeds(copy.deepcopy(model).eval())
    torch.testing.assert_close(keeping.finish(model.train()), expected)


def test_inheriting_follows_its_seed_its_rate_and_its_schedule(
    model: LLM2CLIPModel, tiny_clip: Path
) -> None:
    captions = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("circle", "square", "star")]

    def bias(own: list[str], seed: int = 1, **values: Any) -> Tensor:
        ours = copy.deepcopy(model)
        chosen = recipe(tiny_clip, inherit_text=values, seed=seed)
        prepare_keeping(chosen, ours, 1, lambda: own, lookup, "cpu", resumes=False)
        return (ours.text_adaptor.head.bias - model.text_adaptor.head.bias).detach()

    few = {"steps": 1, "batch_size": 2}
    assert torch.equal(bias(captions, **few), bias(captions, **few))
    assert not torch.equal(bias(captions, **few), bias(captions, seed=2, **few))
    one = ["red star"]  # always the same batch: AdamW moves by the learning rate in each step
    for steps, moved in ((1, 1.0), (2, 1.5)):  # the cosine's factors are 1, then 1 and 1/2
        found = bias(one, steps=steps, batch_size=2, learning_rate=1e-4).abs().median()
        assert found.item() == pytest.approx(moved * 1e-4, rel=0.1)


def test_a_sigmoid_model_keeps_its_scale(tiny_clip: Path) -> None:
    tower = load_vision_tower(tiny_clip).model
    sigmoid = LLM2CLIPModel.from_vision_tower(
        tower, text_embed_dim=DIM, projection_dim=32, logit_bias_init_value=-10.0,
        logit_scale_init_value=1.0,
    )  # fmt: skip
    inherit_space(sigmoid, CLIPModel.from_pretrained(tiny_clip))
    assert sigmoid.logit_scale.item() == 1.0
