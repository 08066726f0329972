"""Frozen is frozen: what does not train has no dropout and moves no statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, TrainingArguments

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.trainable import (
    apply_trainable,
    frozen_modules,
    running_statistics,
    set_evaluation_mode,
)
from llm2clip_vlm.training.encoder import encoder_trainer, frozen_tower
from llm2clip_vlm.training.strict_resume import StrictResumeMixin, StrictTrainer
from llm2clip_vlm.training.text import text_trainer
from llm2clip_vlm.training.vlm import vlm_trainer as trainers


class Parts(nn.Module):
    """A frozen part with everything that a mode changes, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.tower(x)
        self.seen.append(features.detach())
        return {"loss": (self.head(features)[:, 0] - labels).square().mean()}


@pytest.mark.parametrize("parts", [["head"], ["head", "tower"], ["tower.0", "head"]])
def test_a_frozen_part_stays_as_it_is(parts: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Parts()
    apply_trainable(model, parts)
    norm: Any = model.tower[1]
    before = norm.running_mean.clone()
    rows = [{"x": torch.arange(4.0) + i, "labels": torch.tensor(1.0)} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    StrictTrainer(model, args, train_dataset=rows).train()  # type: ignore[arg-type]
    assert torch.equal(before, norm.running_mean)  # of what trains, too
    assert not norm.training
    assert norm.weight.requires_grad == ("tower" in parts)
    assert model.head[1].training
    if parts == ["head"]:
        torch.testing.assert_close(model.seen[0], model.seen[2])
    assert model.tower[0].training == (parts != ["head"])


def test_any_norm_with_running_statistics_stays_in_evaluation_mode() -> None:
    """timm's EvoNorm-B0 is no BatchNorm of torch's."""
    norm = nn.Linear(2, 2)
    norm.register_buffer("running_var", torch.ones(2))
    model = nn.Sequential(nn.Linear(2, 2), norm).train()
    set_evaluation_mode(frozen_modules(model))
    assert (model[0].training, norm.training) == (True, False)


def test_statistics_that_moved_are_not_exported(tmp_path: Path) -> None:
    """Whatever moved them: training mode, a checkpoint of an older version."""
    trainer: Any = object.__new__(encoder_trainer.EncoderTrainer)
    trainer.model = nn.Sequential(nn.BatchNorm1d(2))
    trainer.statistics = running_statistics(trainer.model)
    trainer.save_model = lambda folder: (Path(folder) / "saved").touch()
    trainer.export(tmp_path)
    assert (tmp_path / "saved").exists()
    trainer.model(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"0.running_mean: 2 of 2 running statistics are no more"):
        trainer.export(tmp_path)


def test_every_trainer_of_the_package_does_it() -> None:
    for trainer in (
        encoder_trainer.EncoderTrainer,
        text_trainer.CaptionContrastiveTrainer,
        trainers.VlmTrainer,
        StrictTrainer,
    ):
        assert issubclass(trainer, StrictResumeMixin)
        found = trainer.compute_loss_context_manager
        assert found is StrictResumeMixin.compute_loss_context_manager


def test_a_frozen_tower_still_computes_activations_again() -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        attention_dropout=0.5,
    )
    tower = CLIPVisionModel(config)
    tower.gradient_checkpointing_enable()
    model = LLM2CLIPModel.from_vision_tower(tower, text_embed_dim=4, projection_dim=4)
    model.vision_tower.gradient_checkpointing_enable()
    apply_trainable(model, ["text_adaptor"])
    model.train()
    assert model.vision_tower in frozen_modules(model)
    set_evaluation_mode(frozen_modules(model))
    layer = model.vision_tower.encoder.layers[0]
    assert layer.training and not layer.self_attn.training
    assert model.text_adaptor.training
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        model.get_image_features(pixels), model.eval().get_image_features(pixels)
    )


def test_all_ranks_take_the_features_that_the_first_one_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share out the rest: lists of other lengths, if another run wrote in between, would not
    fit together."""
    frozen = object.__new__(frozen_tower.FrozenTower)
    frozen.folder = tmp_path
    frozen._write({b"a" * 32: torch.ones(2)})
    seen = [*tmp_path.iterdir()]
    frozen._write({b"b" * 32: torch.zeros(2)})
    assert len(frozen._read()) == 2
    monkeypatch.setattr(frozen_tower, "shared_out", lambda parts, work: [seen])
    assert list(frozen._read()) == [b"a" * 32]
