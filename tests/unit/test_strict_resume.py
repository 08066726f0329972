"""Resuming loads every weight of a Llava, or stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.runs.hashes import HandoffError
from llm2clip_vlm.training import strict_resume
from llm2clip_vlm.training.checkpoints import newest_whole, seal_checkpoint
from llm2clip_vlm.training.strict_resume import LossError, StrictTrainer


class Samples(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(1, 20, (6,), generator=generator)
        ids = torch.cat([torch.full((4,), 31), text])
        return {
            "input_ids": ids,
            "labels": torch.cat([torch.full((4,), -100), text]),
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
        }


def build(tied: bool) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31, tie_word_embeddings=tied
    )
    model = LlavaForConditionalGeneration(config)
    freeze_unused_vision(model)
    return model


def train(
    kind: type[Trainer], folder: Path, tied: bool, resume: bool = False, **changes: Any
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        **{"save_steps": 3, **changes},
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = kind(model=build(tied), args=args, train_dataset=Samples())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return dict(trainer.model.state_dict())


def test_what_gets_no_gradient_stops_the_first_step(tmp_path: Path) -> None:
    model = build(False)
    model.model.vision_tower.post_layernorm.weight.requires_grad = True  # of no use to LLaVA
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    with pytest.raises(ValueError, match=r"does not reach: \['model.vision_tower.post_layernorm.w"):
        StrictTrainer(model, args, train_dataset=Samples()).train()  # type: ignore[arg-type]


def test_the_end_of_a_schedule_is_counted_by_the_highest_rate(tmp_path: Path) -> None:
    """By that of the first group, a tower's 2e-5, a head of 1e-3 would have ended at 5e-4."""
    for kind, end in (("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        args = TrainingArguments(
            output_dir=str(tmp_path),
            lr_scheduler_type=kind,
            lr_scheduler_kwargs={end: 1e-5},
            use_cpu=True,
            report_to=[],
        )
        trainer = StrictTrainer(model, args, train_dataset=Samples())
        rates = zip(model, (2e-5, 1e-3), strict=True)
        groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in rates]
        trainer.parameter_groups = lambda _, groups=groups: groups  # type: ignore[method-assign]
        trainer.create_optimizer_and_scheduler(4)
        for _ in range(4):
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert trainer.lr_scheduler.get_last_lr() == pytest.approx([2e-7, 1e-5])


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would train on, and log the losses of other steps."""
    step = LlavaForConditionalGeneration.forward

    def spoilt(self: Any, *args: Any, **given: Any) -> Any:
        output = step(self, *args, **given)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", spoilt)
    with pytest.raises(LossError, match="step 1: expected a finite loss, got nan"):
        train(StrictTrainer, tmp_path, False)


@pytest.mark.parametrize("tied", [False, True])
def test_stop_and_resume_equals_the_uninterrupted_run(tmp_path: Path, tied: bool) -> None:
    want = state(train(StrictTrainer, tmp_path, tied))
    got = state(train(StrictTrainer, tmp_path, tied, resume=True))
    assert all(torch.equal(want[name], got[name]) for name in want)
    # the checkpoint is an ordinary Llava directory nevertheless
    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint-6", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(want[name], tensor) for name, tensor in loaded.state_dict().items())


def test_the_plain_trainer_has_the_trap(tmp_path: Path) -> None:
    """If this fails, transformers has mended it, and the mixin may go."""
    want = state(train(Trainer, tmp_path, False))
    got = state(train(Trainer, tmp_path, False, resume=True))
    assert not all(torch.equal(want[name], got[name]) for name in want)


def test_an_incomplete_checkpoint_stops_the_resume(tmp_path: Path) -> None:
    train(StrictTrainer, tmp_path, False)
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    weights = load_file(file)
    name, tensor = weights.popitem()
    save_file(weights | {"extra": tensor}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"1 missing keys .*1 unexpected keys") as caught:
        train(StrictTrainer, tmp_path, False, resume=True)
    assert name in str(caught.value)


def test_a_run_does_not_go_on_with_other_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is gone makes a sample less, and all others would come in another order."""
    train(StrictTrainer, tmp_path, False)
    monkeypatch.setattr(Samples, "__len__", lambda self: 7)
    with pytest.raises(HandoffError, match="checkpoint-3 was trained on 8 samples, now there are"):
        train(StrictTrainer, tmp_path, False, resume=True)


def test_a_run_does_not_go_on_with_other_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another picture under the name of the first is no other number of samples."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"red")
    monkeypatch.setattr(Samples, "some_pictures", lambda self: [picture], raising=False)
    train(StrictTrainer, tmp_path, False)
    picture.write_bytes(b"red")
    train(StrictTrainer, tmp_path, False, resume=True)
    picture.write_bytes(b"tan")
    with pytest.raises(HandoffError, match=r"a\.png has been changed or removed since .*-3 was"):
        train(StrictTrainer, tmp_path, False, resume=True)


def test_processes_with_other_samples_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that one machine lacks: each would deal its own order to all of them."""
    monkeypatch.setattr(strict_resume, "max_over_ranks", lambda *values, device: [8, -7])
    with pytest.raises(ValueError, match="same samples on all processes, got 7 to 8, 8 on "):
        train(StrictTrainer, tmp_path, False)


def test_names_are_restored_afterwards(tmp_path: Path) -> None:
    trainer = train(StrictTrainer, tmp_path, False)
    assert isinstance(trainer.model, LlavaForConditionalGeneration)
    trainer.model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert "model.language_model.norm.weight" in saved
    assert "language_model.model.norm.weight" in load_file(tmp_path / "b" / "model.safetensors")


def test_the_one_before_goes_when_the_next_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, *rest: Any) -> None:
        if folder.name == "checkpoint-6":
            raise KeyboardInterrupt
        seal_checkpoint(folder)

    monkeypatch.setattr(strict_resume.checkpoints, "seal_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(StrictTrainer, tmp_path, False, save_total_limit=1)
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    # a recipe may save at other steps when it goes on
    train(StrictTrainer, tmp_path, False, resume=True, save_total_limit=1, save_steps=5)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert TrainerState.load_from_json(tmp_path / "checkpoint-6/trainer_state.json").save_steps == 5


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T43."""
    save = torch.save

    def full(thing: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-6" in str(path):
            raise OSError(28, "No space left on device")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(StrictTrainer, tmp_path, False)
    assert (tmp_path / "checkpoint-6").is_dir()
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-3")
