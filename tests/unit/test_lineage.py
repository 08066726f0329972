"""What a projector or an adapter belongs to: refused beside anything else, by the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, certify
from llm2clip_vlm.models.checkpoint_files import check_sizes, read_config_file
from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.lineage import LINEAGE_NAME, read_lineage, settings_of, weights_of
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.adapters import load_adapter, merged_state, save_adapter
from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable
from tests.tiny import build_clip, build_llm


@pytest.fixture
def trained(tmp_path: Path, tiny_clip: Path, tiny_llm: Path) -> Path:
    """A VLM whose projector is its own."""
    save_vlm(*build_vlm(tiny_clip, tiny_llm, seed=5), tmp_path / "vlm")
    return tmp_path / "vlm"


def test_a_checkpoint_tells_what_it_is_made_of(trained: Path) -> None:
    found = read_lineage(trained)
    assert found is not None
    assert set(found) == {
        *("vision_tower", "language_model", "multi_modal_projector", "chat_template"),
        *("vision_feature_layer", "vision_feature_select_strategy", "image_mode"),
    }
    assert (found["vision_feature_layer"], found["image_mode"][:11]) == ("-2", "square [32,")
    model, _ = load_vlm(trained, dtype=torch.bfloat16)
    assert weights_of(model.state_dict())["vision_tower"] == found["vision_tower"]
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[3] += 1
    assert weights_of(model.state_dict())["vision_tower"] != found["vision_tower"]


def test_a_projector_goes_to_its_own_tower(trained: Path, tiny_clip: Path, tiny_llm: Path) -> None:
    model, _ = build_vlm(tiny_clip, tiny_llm, projector=trained, seed=0)
    want = load_vlm(trained)[0].state_dict()
    name = "model.multi_modal_projector.linear_2.weight"
    assert torch.equal(model.state_dict()[name], want[name])


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("vision_tower", {}),
        ("language_model", {}),
        ("chat_template", {"chat_template": "vicuna_v1"}),
        ("vision_feature_layer", {"vision_feature_layer": -1}),
        ("vision_feature_select_strategy", {"vision_feature_select_strategy": "full"}),
        ("image_mode", {"image_aspect_ratio": "pad"}),
    ],
)
def test_it_is_refused_beside_anything_else(
    trained: Path, tiny_clip: Path, tiny_llm: Path, tmp_path: Path, field: str, change: Any
) -> None:
    """T11, T12."""
    tower = build_clip(tmp_path / "t", seed=9) if field == "vision_tower" else tiny_clip
    llm = build_llm(tmp_path / "l", seed=9) if field == "language_model" else tiny_llm
    with pytest.raises(HandoffError, match=f"vlm: {field}: it was made with .*, here is"):
        build_vlm(tower, llm, projector=trained, **change)


def test_a_projector_without_lineage_is_refused(
    trained: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    (trained / LINEAGE_NAME).unlink()
    with pytest.raises(ModelError, match=r"lineage\.json, found none"):
        build_vlm(tiny_clip, tiny_llm, projector=trained)
    load_vlm(trained)  # somebody else's checkpoint is taken as it is


@pytest.mark.parametrize("load", [load_vlm, load_checkpoint])
def test_a_changed_setting_is_refused(load: Any, trained: Path) -> None:
    """For training and for `eval`, `chat` and `app`."""
    config = trained / "config.json"
    values = json.loads(config.read_text()) | {"vision_feature_layer": -1}
    config.write_text(json.dumps(values))
    with pytest.raises(HandoffError, match="vision_feature_layer: it was made with -2, here is -1"):
        load(str(trained))


def adapted(trained: Path, **lora: Any) -> Any:
    model, processor = load_vlm(trained)
    section = LoraSection(**{"r": 2, "alpha": 4, "dropout": 0.0, **lora})
    recipe = Stage4Recipe(
        output_dir="x",
        checkpoint="x",
        data=[],
        trainable={"vision_tower": 1e-3, "multi_modal_projector": 1e-3, "language_model": 1e-3},
        vision_tower_lora=section,
        language_model_lora=section,
    )
    prepare_trainable(model, recipe)
    return model, processor


def test_adapters_of_tower_and_llm_come_back_and_merge(trained: Path, tmp_path: Path) -> None:
    """T30, T33: what trains is the adapters and the projector; any directory name will do."""
    model, processor = adapted(trained)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "projector" in n for n in names)
    parts = {n.split(".")[1] for n in names}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    # the block above layer -2 is not used
    assert not any("vision_tower" in n and ".layers.2." in n for n in names)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(model, model.state_dict(), tmp_path / "xyz", "base")
    again, _ = adapted(trained)
    load_adapter(again, tmp_path / "xyz", "base")
    ids = torch.tensor([[7] * 16 + [9, 10, 11]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        want = model.eval()(**inputs).logits
        assert torch.equal(again.eval()(**inputs).logits, want)
        state = merged_state(model, model.state_dict())
        save_vlm(model, processor, tmp_path / "merged", state_dict=state)
        merged = load_vlm(tmp_path / "merged")[0]
        torch.testing.assert_close(merged(**inputs).logits, want, atol=1e-5, rtol=1e-4)


def test_an_adapter_belongs_to_its_base(trained: Path, tmp_path: Path) -> None:
    model, _ = adapted(trained)
    save_adapter(model, model.state_dict(), tmp_path / "a", "base")
    with pytest.raises(HandoffError, match="base: it was made with base, here is other"):
        load_adapter(model, tmp_path / "a", "other")
    with pytest.raises(HandoffError, match="scaling: it was made with"):
        load_adapter(adapted(trained, alpha=8)[0], tmp_path / "a", "base")


def test_every_setting_of_the_pictures_is_recorded(trained: Path) -> None:
    model, processor = load_vlm(trained)
    seen = {settings_of(model, processor)["image_mode"]}
    for name, value in (("image_mean", [0.1] * 3), ("image_std", [0.2] * 3), ("do_pad", True)):
        setattr(processor.image_processor, name, value)
        seen.add(settings_of(model, processor)["image_mode"])
    assert len(seen) == 4
    before = settings_of(model, processor)["chat_template"]
    processor.chat_template += " "
    assert settings_of(model, processor)["chat_template"] != before


def test_a_weights_fingerprint_follows_name_shape_and_value() -> None:
    values = torch.arange(6.0)
    base = {"model.vision_tower.a": values.view(2, 3), "model.vision_tower.b": values + 1}
    one = weights_of(base)
    assert one == weights_of(dict(reversed(base.items())))
    assert one == weights_of({name: value.bfloat16() for name, value in base.items()})
    changed = [
        base | {"model.vision_tower.a": values.view(3, 2)},
        base | {"model.vision_tower.a": values.view(2, 3) + 1},
        {"model.vision_tower.a": base["model.vision_tower.b"]}
        | {"model.vision_tower.b": base["model.vision_tower.a"]},
        {"model.vision_tower.c": base["model.vision_tower.a"]}
        | {"model.vision_tower.b": base["model.vision_tower.b"]},
    ]
    assert len({weights_of(state)["vision_tower"] for state in [base, *changed]}) == 5
    parts = weights_of({"lm_head.weight": values, "model.image_newline": values})
    assert set(parts) == {"language_model", "multi_modal_projector"}


@pytest.mark.parametrize(("largest", "most"), [(10.0, 1e-4), (0.5, 1e-5)])
def test_certificates_let_rounding_through_and_no_more(
    tmp_path: Path, largest: float, most: float
) -> None:
    """A share of the largest value, at least of 1."""
    want = torch.tensor([0.0, -largest], dtype=torch.float64)
    for difference, good in ((0.95 * most, True), (1.05 * most, False)):
        got = want + torch.tensor([difference, 0.0], dtype=torch.float64)
        evidence = Evidence("a test", {"logits": want}, {"logits": got})
        if good:
            found = certify(tmp_path, "export", tmp_path, evidence)["checks"]["logits"]
            assert found == {
                "max_difference": pytest.approx(difference),
                "largest_value": largest,
            }
        else:
            with pytest.raises(ModelError, match="differ by"):
                certify(tmp_path, "export", tmp_path, evidence)


def test_sizes_at_the_border(tmp_path: Path) -> None:
    def read(**config: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_config_file(tmp_path)

    for key, most in (("image_size", 1 << 14), ("num_labels", 1 << 16), ("hidden_size", 1 << 24)):
        assert read(part={key: most})
        with pytest.raises(ValueError, match=f"part.{key}: expected a size of at most {most:,}"):
            read(part={key: most + 1})
    assert read(hidden_size=1) and read(head_dim=0)
    for key, value in (("hidden_size", 0), ("head_dim", -1), ("num_hidden_layers", 0)):
        with pytest.raises(ValueError, match=f"{key}: expected a size of 1 or more"):
            read(**{key: value})
    assert read(rms_norm_eps=1e-5)
    for value in (None, 1.5):
        with pytest.raises(ValueError, match=r"text\.layer_norm_eps: expected a"):
            read(text={"layer_norm_eps": value})
    weights = dict.fromkeys("abc", torch.empty(0))
    check_sizes({"num_hidden_layers": 3}, weights, tmp_path)
    with pytest.raises(ValueError, match="num_hidden_layers: 4 of them cannot be filled"):
        check_sizes({"num_hidden_layers": 4}, weights, tmp_path)
