"""A tower of another package, from its loader to a VLM that is saved and loaded."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.vision import towers
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from tests.vlm_fixtures import run_here, write_llava, write_recipe


class PlainConfig(PreTrainedConfig):
    """As another package writes it: neither width nor depth has the name that LLaVA uses."""

    model_type = "plain_tower"

    def __init__(self, width: int = 32, depth: int = 3, **given: Any) -> None:
        super().__init__(**given)
        self.image_size, self.patch_size, self.width, self.depth = 32, 8, width, depth


class PlainTower(PreTrainedModel):
    config_class = PlainConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.width, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(3))
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: Any = None, **kwargs: Any) -> Any:
        states = [self.embed(pixel_values).flatten(2).transpose(1, 2)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean(1),
            hidden_states=tuple(states),
        )


@pytest.fixture
def plain(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that installs `PlainTower` with another `load`, and gives its checkpoint."""
    AutoConfig.register("plain_tower", PlainConfig, exist_ok=True)
    AutoModel.register(PlainConfig, PlainTower, exist_ok=True)
    PlainTower(PlainConfig()).save_pretrained(tmp_path / "plain")
    shutil.copy(tiny_clip / "preprocessor_config.json", tmp_path / "plain")

    def install(load: Any = PlainTower.from_pretrained) -> Path:
        monkeypatch.setattr(
            towers, "register", lambda: {"plain_tower": lambda path, dtype: load(path, dtype=dtype)}
        )
        return tmp_path / "plain"

    return install


def test_another_packages_tower_becomes_a_vlm(plain: Any, tiny_llm: Path, tmp_path: Path) -> None:
    tower = load_vision_tower(plain())
    assert (tower.hidden_size, tower.num_hidden_layers, tower.has_cls_token) == (32, 3, False)
    model, processor = build_vlm(plain(), tiny_llm)
    assert all("blocks.2" in name for name in freeze_unused_vision(model))
    save_vlm(model, processor, tmp_path / "vlm")
    again, _ = load_vlm(tmp_path / "vlm")
    assert len(freeze_unused_vision(again)) == 2


def _changed(**config: Any) -> Any:
    def load(path: str, dtype: Any) -> Any:
        model = PlainTower.from_pretrained(path, dtype=dtype)
        for name, value in config.items():
            setattr(model.config, name, value)
        return model

    return load


def _broken(path: str, dtype: Any) -> Any:
    model: Any = PlainTower.from_pretrained(path, dtype=dtype)
    model.forward = lambda **given: {}["depth"]
    return model


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (lambda path, dtype: None, r"cannot load it .*expected a PreTrainedModel, got NoneType"),
        (lambda path, dtype: {}["weights"], r"cannot load it \(KeyError: 'weights'\)"),
        (_changed(image_size=[32, 32]), r"image_size is \[32, 32\], expected one number"),
        (_changed(patch_size=(8, 8)), r"patch_size is \(8, 8\), expected one number"),
        (_broken, r"PlainTower does not take \(pixel_values=\[1, 3, 32, 32\].*KeyError"),
    ],
    ids=["nothing", "a failure", "a pair of sides", "patches of two sides", "a broken forward"],
)
def test_a_tower_that_breaks_is_named(plain: Any, load: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told) as refused:
        load_vision_tower(plain(load), image_size_px=32)
    assert str(plain()) in str(refused.value)


def test_a_loader_that_overlooks_the_dtype_is_helped(plain: Any) -> None:
    folder = plain(lambda path, dtype: PlainTower.from_pretrained(path))
    assert load_vision_tower(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_vision_tower(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_vision_tower(folder).model.dtype == torch.float32


def test_a_tower_that_llava_cannot_call_is_refused_before_training(
    plain: Any, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PlainTower.forward
    monkeypatch.setattr(
        PlainTower,
        "forward",
        lambda self, pixel_values, output_hidden_states=None: whole(self, pixel_values),
    )
    assert load_vision_tower(plain()).num_patches == 16  # enough for stage 2b
    with pytest.raises(ModelError, match=r"plain: LLaVA calls its tower with return_dict"):
        build_vlm(plain(), tiny_llm)


def test_a_tower_without_pooled_output_has_no_image_embeddings(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LLM2CLIPModel.from_vision_tower(
        load_vision_tower(plain()).model, text_embed_dim=8, projection_dim=8
    )
    pixels, whole = torch.zeros(2, 3, 32, 32), PlainTower.forward
    assert model.get_image_features(pixels).shape == (2, 8)
    for pooled, told in ((None, "None"), (torch.zeros(2, 5), r"\[2, 5\]")):

        def forward(self: Any, *args: Any, _pooled: Any = pooled, **given: Any) -> Any:
            out = whole(self, *args, **given)
            out["pooler_output"] = _pooled
            return out

        monkeypatch.setattr(PlainTower, "forward", forward)
        with pytest.raises(ModelError, match=rf"PlainTower: expected pooler_output .*got {told}"):
            model.get_image_features(pixels)


@pytest.fixture
def installed(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the docs' example package, which is installed as far as Python can tell."""
    source = repo_root / "docs" / "examples" / "tower_package"
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    facts = tmp_path / "site" / "patch_mlp_tower-0.1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in points.items()]
    (facts / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    for folder in (source / "src", tmp_path / "site"):
        monkeypatch.syspath_prepend(str(folder))
    importlib.import_module("patch_mlp_tower").write(tmp_path / "tower")
    return tmp_path / "tower"


def test_the_example_package_goes_through_stages_3_and_4(
    installed: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    tower = load_vision_tower(installed)
    assert (tower.num_hidden_layers, tower.num_patches, tower.num_prefix_tokens) == (3, 16, 0)
    write_llava(tmp_path)
    common = {"data": [{"path": str(tmp_path / "llava.json")}]}
    three = write_recipe(
        tmp_path / "three.yaml",
        output_dir=str(tmp_path / "three"),
        vlm={"vision_tower": str(installed), "language_model": str(tiny_llm)},
        trainable={"multi_modal_projector": 1e-2},
        **common,
    )
    run_here("stage3_projector", three)
    four = write_recipe(
        tmp_path / "four.yaml",
        output_dir=str(tmp_path / "four"),
        checkpoint=str(tmp_path / "three" / "model"),
        trainable={"vision_tower": {"lr": 1e-3, "last_blocks": 1}, "multi_modal_projector": 1e-2},
        **common,
    )
    run_here("stage4_instruction", four)
    before, after = (load_vlm(tmp_path / name / "model")[0] for name in ("three", "four"))
    moved = {
        name
        for name, weight in after.model.vision_tower.state_dict().items()
        if not torch.equal(weight, before.model.vision_tower.state_dict()[name])
    }
    assert moved and all("blocks.1." in name for name in moved), "-2 does not use the last block"


def test_a_tower_that_lacks_something_is_told_all_of_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = importlib.import_module("patch_mlp_tower").load(str(installed), "auto")
    for name in ("image_size", "patch_size"):
        delattr(model.config, name)
    monkeypatch.setattr(towers, "register", lambda: {"patch_mlp": lambda path, dtype: model})
    monkeypatch.setattr(towers, "AutoModel", SimpleNamespace(_model_mapping={}))
    with pytest.raises(towers.ModelError) as refused:
        load_vision_tower(installed)
    for told in ("no image_size", "no patch_size", "AutoConfig and AutoModel", "tower_package"):
        assert told in str(refused.value)
