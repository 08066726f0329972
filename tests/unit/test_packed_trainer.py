"""Packing through the Trainer: neighbours stay apart, a resumed run goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from llm2clip_vlm.data.conversation.instruction import InstructionCollator
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.models.trainable import apply_trainable
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.recipe.vlm import PartTraining
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer

PARTS = {"multi_modal_projector": PartTraining(lr=1e-2), "language_model": PartTraining(lr=1e-2)}


class Samples(list[dict[str, Any]]):
    """Sixteen pictures with text of unequal length, every fourth of text alone."""

    def __init__(self, image_id: int) -> None:
        draw = torch.Generator().manual_seed(0)
        for n in range(16):
            words = torch.randint(8, 20, (5 + n % 5,), generator=draw)
            images = int(n % 4 != 3)
            ids = torch.cat([torch.full((16 * images,), image_id), words])
            labels = torch.where(ids == image_id, -100, ids)
            item = {"input_ids": ids, "labels": labels, "sample_id": str(n)}
            if images:
                item["pixel_values"] = torch.randn(1, 3, 32, 32, generator=draw)
            self.append(item)

    def batches(self, **values: Any) -> PackedBatches:
        return PackedBatches(
            [len(item["input_ids"]) for item in self],
            [int("pixel_values" in item) for item in self],
            **{"global_batch_size": 8, "max_tokens": 60, "epochs": 3, **values},
        )


def make(
    tiny_clip: Path, tiny_llm: Path, folder: Path, collator: Any = None, **arguments: Any
) -> VlmTrainer:
    model, processor = build_vlm(tiny_clip, tiny_llm)
    apply_trainable(model, PARTS)
    samples = Samples(processor.image_token_id)
    batches = samples.batches()
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        gradient_accumulation_steps=batches.accumulation,
        per_device_train_batch_size=1,
        use_cpu=True,
        logging_steps=1,
        max_steps=5,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **arguments},
    )
    packed = PackedCollator() if collator is None else collator
    return VlmTrainer(model, args, samples, packed, processor, batches=batches, parts=PARTS)


def curve(trainer: VlmTrainer, **values: Any) -> list[float]:
    trainer.train(**values)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_packed_and_padded_micro_batches_train_the_same(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    packed = make(tiny_clip, tiny_llm, tmp_path / "a")
    padded = make(tiny_clip, tiny_llm, tmp_path / "b", InstructionCollator(0))
    assert curve(packed) == pytest.approx(curve(padded), abs=1e-5)
    for (name, one), other in zip(
        packed.model.named_parameters(), padded.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0, msg=name)


def test_t71_a_changed_document_leaves_its_neighbours_logits(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """In a training step of the Trainer, whose cache setting, mask and attention are meant."""
    trainer = make(tiny_clip, tiny_llm, tmp_path)
    batches = list(trainer.get_train_dataloader())
    batch = max(batches, key=lambda batch: int((batch["position_ids"] == 0).sum()))
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 1
    text = starts[1] - 1  # last token of the first document
    found: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        found.append(states.detach())

    trainer.model.lm_head.register_forward_pre_hook(note, with_kwargs=True)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    for word in (8, 9):
        inputs = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
        inputs["input_ids"][0, text] = word
        trainer.training_step(trainer.model, inputs, torch.tensor(10))
    one, other = found
    torch.testing.assert_close(one[:, starts[1] :], other[:, starts[1] :], atol=0, rtol=0)
    assert (one[:, text] - other[:, text]).abs().max() > 1e-4


@pytest.mark.parametrize("workers", [0, 2])
def test_t40_t41_a_resumed_run_goes_on_with_the_batches_that_come(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, workers: int
) -> None:
    """Within an epoch and at its end (two steps an epoch: the 3rd is the second one's first)."""
    whole = make(
        tiny_clip, tiny_llm, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=None
    )
    expected = curve(whole)
    for step in (1, 2):
        again = make(tiny_clip, tiny_llm, tmp_path, dataloader_num_workers=workers)
        checkpoint = str(tmp_path / "checkpoints" / f"checkpoint-{step}")
        assert curve(again, resume_from_checkpoint=checkpoint) == expected


def test_a_run_that_began_padded_is_not_resumed_packed(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """Its samples would come in another order, some twice and some never."""
    curve(make(tiny_clip, tiny_llm, tmp_path, save_strategy="steps", save_steps=2))
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    assert int((folder / "packing.json").read_text()) > 1  # samples that are dealt at a time
    (folder / "packing.json").write_text("false")
    with pytest.raises(HandoffError, match="checkpoint-2 was trained padded, now"):
        make(tiny_clip, tiny_llm, tmp_path).train(resume_from_checkpoint=str(folder))
