"""Vision towers: what they tell, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models import llm2clip
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.trainable import apply_trainable, freeze_unused
from llm2clip_vlm.models.vision.resolution import (
    image_processor_class,
    processed_size_px,
    resize_positions,
    resize_processor,
)
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.training.adapters import add_lora
from llm2clip_vlm.training.export import export_vision_tower
from llm2clip_vlm.training.param_groups import build_param_groups
from tests.tiny_towers import KINDS, PREFIX_TOKENS, build_tower


def test_clip_tower_tells_its_shape(tiny_clip: Path) -> None:
    tower = load_vision_tower(tiny_clip)
    assert (tower.hidden_size, tower.num_patches, tower.patch_size_px) == (32, 16, 8)
    assert (tower.image_size_px, tower.num_hidden_layers, tower.has_cls_token) == (32, 3, True)
    pixels = torch.randn(2, 3, 32, 32)
    out = tower.model(pixels, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 17, 32)
    assert len(out.hidden_states) == 4
    want = CLIPModel.from_pretrained(tiny_clip).vision_model(pixels).pooler_output
    assert torch.equal(out.pooler_output, want)


def test_dtype_is_the_checkpoints_unless_given(tiny_clip: Path) -> None:
    assert load_vision_tower(tiny_clip).model.dtype == torch.float32
    assert load_vision_tower(tiny_clip, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_export_is_a_clip_vision_model_with_published_names(
    tiny_clip: Path, tmp_path: Path
) -> None:
    source = load_vision_tower(tiny_clip)
    model = LLM2CLIPModel.from_vision_tower(source.model, text_embed_dim=8, projection_dim=8)
    export_vision_tower(model, source.image_processor, tmp_path / "v")
    loaded, info = CLIPVisionModel.from_pretrained(tmp_path / "v", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    # transformers < 5.8, hence unmodified LLaVA, knows only these names
    names = load_file(tmp_path / "v" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in names)
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model"
    assert config["architectures"] == ["CLIPVisionModel"]
    assert str(tiny_clip) not in json.dumps(config)
    processor = json.loads((tmp_path / "v" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"].startswith("CLIPImageProcessor")
    again = load_vision_tower(tmp_path / "v")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.model(pixels)[0], source.model(pixels)[0])


def test_tower_of_a_saved_llm2clip(tiny_clip: Path, tmp_path: Path) -> None:
    source = load_vision_tower(tiny_clip)
    model = LLM2CLIPModel.from_vision_tower(source.model, text_embed_dim=8, projection_dim=8)
    model.save_pretrained(tmp_path)
    source.image_processor.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path)
    assert type(tower.model).__name__ == "CLIPVisionModel"
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(tower.model(pixels)[0], source.model.eval()(pixels)[0])


@KINDS
def test_every_kind_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower(kind, tmp_path / "xyz"))
    prefix = PREFIX_TOKENS[kind]
    assert (tower.hidden_size, tower.num_hidden_layers, tower.grid) == (32, 3, 4)
    assert (tower.num_patches, tower.patch_size_px, tower.image_size_px) == (16, 8, 32)
    assert (tower.num_prefix_tokens, tower.has_cls_token) == (prefix, prefix > 0)
    assert tower.image_mean == tuple(tower.image_processor.image_mean)
    assert tower.image_std == tuple(tower.image_processor.image_std)
    out = tower.model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == 4 * [(2, prefix + 16, 32)]
    assert out.pooler_output.shape == (2, 32)
    assert not tower.model.training


@KINDS
def test_every_kind_goes_through_stage_2s_model(kind: str, tmp_path: Path) -> None:
    source = load_vision_tower(build_tower(kind, tmp_path / "xyz"))
    model = LLM2CLIPModel.from_vision_tower(source.model, text_embed_dim=8, projection_dim=6)
    pixels = torch.randn(2, 3, 32, 32)
    want = model.eval().get_image_features(pixels)
    model.save_pretrained(tmp_path / "model")
    source.image_processor.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again.get_image_features(pixels), want)
    exported = export_vision_tower(again, source.image_processor, tmp_path / "tower")
    for folder in (tmp_path / "model", exported):
        tower = load_vision_tower(folder)
        assert torch.equal(tower.model(pixels).pooler_output, source.model(pixels).pooler_output)
        assert tower.num_prefix_tokens == source.num_prefix_tokens
    model.train()(pixels, torch.randn(2, 8), return_loss=True).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.endswith("mask_token") for name in unused)


@KINDS
@pytest.mark.parametrize("training", ["full", "frozen", "lora"])
def test_every_kind_trains_fully_frozen_and_by_lora(
    kind: str, training: str, tmp_path: Path
) -> None:
    source = load_vision_tower(build_tower(kind, tmp_path))
    model = LLM2CLIPModel.from_vision_tower(source.model, text_embed_dim=8, projection_dim=6)
    tuner = None
    if training == "lora":
        tuner = add_lora(model.vision_tower, LoraSection(r=2, alpha=4, dropout=0.0))
    parts = {"visual_projection", "text_adaptor", "logit_scale", "vision_tower"}
    apply_trainable(model, parts - ({"vision_tower"} if training == "frozen" else set()))
    pixels, text = torch.randn(4, 3, 32, 32), torch.randn(4, 8)
    freeze_unused(model.eval(), lambda: model(pixels, text, return_loss=True).loss)
    groups = build_param_groups(model, dict.fromkeys(parts, 0.05), 0.0, layer_decay=0.85)
    optimizer = torch.optim.SGD(groups)
    for _ in range(2):  # LoRA's first step moves one of its two matrices only
        model(pixels, text, return_loss=True).loss.backward()
        optimizer.step()
    want = model.get_image_features(pixels)
    if tuner is not None:
        tuner.merge_and_unload()
    torch.testing.assert_close(model.get_image_features(pixels), want, atol=1e-5, rtol=1e-5)
    changed = [
        name
        for name, tensor in model.vision_tower.state_dict().items()
        if not torch.equal(tensor, source.model.state_dict()[name])
    ]
    assert bool(changed) == (training != "frozen")
    assert training != "lora" or all(name.endswith("weight") for name in changed)


@KINDS
def test_every_kind_takes_another_resolution(kind: str, tmp_path: Path) -> None:
    folder = build_tower(kind, tmp_path / "xyz")
    small, large = load_vision_tower(folder), load_vision_tower(folder, image_size_px=48)
    assert (large.image_size_px, large.num_patches, large.grid) == (48, 36, 6)
    pixels = large.image_processor(Image.new("RGB", (60, 50), "red"), return_tensors="pt")
    tokens = large.model(pixels["pixel_values"]).last_hidden_state.shape[1]
    assert tokens == 36 + small.num_prefix_tokens
    export_vision_tower(large.model, large.image_processor, tmp_path / "large")
    again = load_vision_tower(tmp_path / "large")
    assert again.num_patches == 36
    assert torch.equal(again.model(**pixels)[0], large.model(**pixels)[0])
    same = load_vision_tower(folder, image_size_px=32)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(same.model(pixels)[0], small.model(pixels)[0])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_interpolation_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = build_tower(kind, tmp_path)
    pixels = torch.randn(1, 3, 48, 48)
    want = load_vision_tower(folder).model(pixels, interpolate_pos_encoding=True)
    got = load_vision_tower(folder, image_size_px=48).model(pixels)
    torch.testing.assert_close(got.pooler_output, want.pooler_output)


def test_a_smaller_grid_averages() -> None:
    table = torch.cat([torch.zeros(1, 4), torch.arange(16.0)[:, None].expand(16, 4)])
    small = resize_positions(table[None], 4, 2)
    assert small.shape == (1, 5, 4)
    assert torch.equal(small[0, 0], table[0])
    torch.testing.assert_close(small[0, 1:].mean(), torch.tensor(7.5))


def test_a_cropped_margin_stays_at_another_size() -> None:
    crop = {"height": 224, "width": 224}
    for given, want in (
        ({"shortest_edge": 256}, {"shortest_edge": 512}),
        ({"height": 256, "width": 256}, {"height": 512, "width": 512}),  # timm's `squash`
    ):
        processor = image_processor_class("CLIPImageProcessor")(size=given, crop_size=crop)
        resize_processor(processor, 448)
        assert {name: processor.size[name] for name in want} == want
        assert processed_size_px(processor) == 448


def test_a_size_between_patches_is_refused(tiny_clip: Path) -> None:
    with pytest.raises(ModelError, match="36 is no multiple"):
        load_vision_tower(tiny_clip, image_size_px=36)


@torch.no_grad()
def test_naflex_at_its_own_grid_is_a_siglip(tmp_path: Path) -> None:
    folder = build_tower("siglip2", tmp_path)
    tower = load_vision_tower(folder)
    assert isinstance(tower.model, SiglipVisionModel)
    photo = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    naflex = Siglip2VisionModel.from_pretrained(folder).eval()
    inputs = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")
    pixels = tower.image_processor(photo, return_tensors="pt")["pixel_values"]
    want, got = naflex(**inputs), tower.model(pixels)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooler_output, want.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "eva02", "timm"])
def test_a_missing_weight_or_a_cut_file_is_refused(kind: str, tmp_path: Path) -> None:
    folder = build_tower(kind, tmp_path / "tower")
    file = folder / "model.safetensors"
    weights = load_file(file)
    norm = next(name for name in weights if "norm1.weight" in name)
    del weights[norm]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of .*norm1\.weight"):
        load_vision_tower(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"tower(: cannot be loaded as|/model\.safetensors: damaged or cut off)"
    ):
        load_vision_tower(folder)


def test_dino_takes_the_size_of_its_processor(tmp_path: Path) -> None:
    config = json.loads((build_tower("dinov2", tmp_path) / "config.json").read_text())
    assert config["image_size"] == 32
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {"crop_size": {"height": 24, "width": 24}}
    path.write_text(json.dumps(values))
    tower = load_vision_tower(tmp_path)
    assert (tower.image_size_px, tower.num_patches) == (24, 9)
    path.write_text(json.dumps(values | {"crop_size": {"height": 28, "width": 28}}))
    with pytest.raises(ModelError, match="28 px images, the tower expects a multiple of its 8 px"):
        load_vision_tower(tmp_path)


class OtherConfig(PreTrainedConfig):
    model_type = "other_tower"
    image_size: int = 16
    patch_size: int = 8


class OtherTower(PreTrainedModel):
    """Somebody else's tower: registers, but no CLS token; `broken` leaves the states out."""

    config_class = OtherConfig
    broken = False

    def __init__(self, config: OtherConfig) -> None:
        super().__init__(config)
        self.patch = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        x = self.patch(pixel_values).flatten(2).mT
        states = None if self.broken else (x, self.blocks[0](x))
        return BaseModelOutputWithPooling(x, x.mean(1), states)


def load_other(path: str, dtype: Any) -> Any:
    return OtherTower.from_pretrained(path, dtype=dtype)


def test_another_package_adds_a_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    def install(value: str) -> None:
        point = EntryPoint("other_tower", value, llm2clip.TOWER_ENTRY_POINTS)
        monkeypatch.setattr(llm2clip, "entry_points", lambda group: [point])

    AutoConfig.register("other_tower", OtherConfig, exist_ok=True)
    AutoModel.register(OtherConfig, OtherTower, exist_ok=True)
    monkeypatch.setitem(sys.modules, "other_package", sys.modules[__name__])
    OtherTower(OtherConfig()).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'other_tower' is not a known vision tower"):
        load_vision_tower(tmp_path)
    install("other_package:load_other")
    tower = load_vision_tower(tmp_path)
    assert (tower.num_patches, tower.hidden_size, tower.has_cls_token) == (4, 4, False)
    monkeypatch.setattr(OtherTower, "broken", True)
    with pytest.raises(ModelError, match="OtherTower gives no hidden_states"):
        load_vision_tower(tmp_path)
    install("other_package:missing")
    with pytest.raises(ValueError, match="'other_tower' of another package"):
        load_vision_tower(tmp_path)


def test_a_language_model_is_no_tower(tiny_llm: Path) -> None:
    with pytest.raises(ModelError, match="'llama' is not a known vision tower"):
        load_vision_tower(tiny_llm)


def test_missing_weights_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights .*encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_vision_tower(tmp_path / "clip")


def test_weights_of_another_size_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 48
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"do not fit|another shape"):
        load_vision_tower(tmp_path / "clip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no readable config.json"),
        ("preprocessor_config.json", "no image processor"),
    ],
)
def test_missing_files_are_named(tiny_clip: Path, tmp_path: Path, name: str, message: str) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "clip" / name).unlink()
    with pytest.raises(ModelError, match=message):
        load_vision_tower(tmp_path / "clip")


def test_processor_of_another_size_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config["crop_size"] = {"height": 24, "width": 24}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="makes 24x24 px images, the tower expects 32 px"):
        load_vision_tower(tmp_path / "clip")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_processor_whose_pictures_are_not_square_is_refused(kind: str, tmp_path: Path) -> None:
    path = build_tower(kind, tmp_path) / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {"do_center_crop": False}
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"makes 4\dx32 px images, the tower expects .*, square"):
        load_vision_tower(tmp_path)
