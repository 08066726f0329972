"""Every kind of vision tower in a VLM: tokens counted right, saved and loaded exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from llm2clip_vlm.data.conversation.messages import VisualTokens
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.lineage import settings_of
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from tests.tiny_towers import KINDS, PREFIX_TOKENS, build_tower


def example(processor: Any) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    image = Image.new("RGB", (50, 40), "red")
    return dict(processor(images=image, text=text, add_special_tokens=False, return_tensors="pt"))


@KINDS
def test_every_kind_makes_a_vlm(kind: str, tmp_path: Path, tiny_llm: Path) -> None:
    folder = build_tower(kind, tmp_path / "xyz")
    strategy: Any = "default" if PREFIX_TOKENS[kind] else "full"
    model, processor = build_vlm(folder, tiny_llm, vision_feature_select_strategy=strategy)
    inputs = example(processor)
    tokens = 16 + max(PREFIX_TOKENS[kind] - 1, 0)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    assert model.config.image_seq_length == VisualTokens(processor).fixed == tokens
    with torch.no_grad():
        want = model(**inputs).logits
    save_vlm(model, processor, tmp_path / "vlm")
    again, reread = load_vlm(tmp_path / "vlm")
    with torch.no_grad():
        assert torch.equal(again(**example(reread)).logits, want)
    # what stays trainable is exactly what gets a gradient
    freeze_unused_vision(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    for name, parameter in model.model.vision_tower.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("kind", ["siglip", "eva02"])
def test_several_layers_are_concatenated(kind: str, tmp_path: Path, tiny_llm: Path) -> None:
    folder = build_tower(kind, tmp_path / "xyz")
    arguments: dict[str, Any] = {"vision_feature_select_strategy": "full"}
    one, _ = build_vlm(folder, tiny_llm, vision_feature_layer=-1, **arguments)
    model, processor = build_vlm(folder, tiny_llm, vision_feature_layer=[0, -1], **arguments)
    projector = model.model.multi_modal_projector.linear_1
    assert projector.in_features == 2 * one.model.multi_modal_projector.linear_1.in_features
    inputs = example(processor)
    seen: list[torch.Tensor] = []
    projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        states = model.model.vision_tower(
            inputs["pixel_values"], output_hidden_states=True
        ).hidden_states
    assert torch.equal(seen[0], torch.cat([states[0], states[-1]], -1))
    save_vlm(model, processor, tmp_path / "vlm")
    assert load_vlm(tmp_path / "vlm")[0].config.vision_feature_layer == [0, -1]


@pytest.mark.parametrize("size_px", [None, 48])
def test_a_crop_that_is_not_made_does_not_count(
    size_px: int | None, tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    """As of towers that see a picture whole: `crop_size` may say anything then."""
    folder = tmp_path / "whole"
    shutil.copytree(tiny_clip, folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    side = processor.crop_size["height"]
    processor.size, processor.do_center_crop = {"height": side, "width": side}, False
    processor.crop_size = {"height": 4 * side, "width": 4 * side}
    processor.save_pretrained(folder)
    model, processor = build_vlm(folder, tiny_llm, image_size_px=size_px)
    inputs = example(processor)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    visual = VisualTokens(processor)
    assert visual.fixed == tokens
    assert visual.size_px == inputs["pixel_values"].shape[-2:]
    assert torch.isfinite(model(**inputs).logits).all()
    modes = settings_of(model, processor)["image_mode"]
    assert modes.startswith(f"square [{size_px or side}, {size_px or side}]")
    if size_px:  # vLLM counts by it
        assert processor.image_processor.crop_size["height"] == size_px


def test_another_resolution(tiny_clip: Path, tiny_llm: Path) -> None:
    model, processor = build_vlm(tiny_clip, tiny_llm, image_size_px=48)
    inputs = example(processor)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("layers", [[], [-2, 9]])
def test_a_layer_that_does_not_exist_is_refused(
    layers: list[int], tiny_clip: Path, tiny_llm: Path
) -> None:
    with pytest.raises(ModelError, match="has 4 hidden states"):
        build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layers)
