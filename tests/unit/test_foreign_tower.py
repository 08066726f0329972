"""A tower of another package, from its loader to a VLM that is saved and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip_vlm.models.vision import towers
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision


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


def test_another_packages_tower_becomes_a_vlm(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.register("plain_tower", PlainConfig, exist_ok=True)
    AutoModel.register(PlainConfig, PlainTower, exist_ok=True)
    load = lambda path, dtype: PlainTower.from_pretrained(path, dtype=dtype)  # noqa: E731
    monkeypatch.setitem(towers.LOADERS, "plain_tower", load)
    PlainTower(PlainConfig()).save_pretrained(tmp_path / "plain")
    shutil.copy(tiny_clip / "preprocessor_config.json", tmp_path / "plain")
    tower = load_vision_tower(tmp_path / "plain")
    assert (tower.hidden_size, tower.num_hidden_layers, tower.has_cls_token) == (32, 3, False)
    model, processor = build_vlm(tmp_path / "plain", tiny_llm)
    assert all("blocks.2" in name for name in freeze_unused_vision(model))
    save_vlm(model, processor, tmp_path / "vlm")
    again, _ = load_vlm(tmp_path / "vlm")
    assert len(freeze_unused_vision(again)) == 2
