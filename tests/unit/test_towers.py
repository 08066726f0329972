"""Vision towers: what they tell, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.towers import TowerError, load_vision_tower
from llm2clip_vlm.training.export import export_vision_tower


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


def test_siglip_has_no_cls_token(tmp_path: Path) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path)
    assert (tower.has_cls_token, tower.num_patches) == (False, 4)
    assert tower.model(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 4, 16)


def test_a_language_model_is_no_tower(tiny_llm: Path) -> None:
    with pytest.raises(TowerError, match="'llama' is not a known vision tower"):
        load_vision_tower(tiny_llm)


def test_missing_weights_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match=r"1 weights .*encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_vision_tower(tmp_path / "clip")


def test_weights_of_another_size_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 48
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match=r"do not fit|another shape"):
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
    with pytest.raises(TowerError, match=message):
        load_vision_tower(tmp_path / "clip")


def test_processor_of_another_size_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config["crop_size"] = {"height": 24, "width": 24}
    path.write_text(json.dumps(config))
    with pytest.raises(TowerError, match="makes 24 px images, the tower expects 32 px"):
        load_vision_tower(tmp_path / "clip")
