"""Samples per CPU-second in stage 3: packed, logits of trained tokens, against a plain Trainer.

The model is a LLaVA whose head has the share of the language model's weights that Qwen2.5-0.5B's
has (28 %); tower and language model are frozen. Lengths are in LLaVA-558k's proportion: as many
visual tokens for each sample (here 144), captions of a log-normal length, 8 % of all tokens
trained. The baseline is `transformers.Trainer` on the same model and samples: a padded batch of 32
(as LLaVA's `pretrain.sh`), logits of all positions. Both train the same global batch; the losses
must agree.

    python benchmarks/projector_pretraining.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from arms import finish, ratio, take_turns
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import InstructionCollator
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.models.trainable import apply_trainable
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.recipe.vlm import PartTraining
from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer

VISUAL, IMAGE, STEPS = 144, 7, 2
GOALS = {"ratio": 1.5}
TEXT = {
    "vocab_size": 9728,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 168,
    "patch_size": 14,
}


class Samples(list[dict[str, Any]]):
    """Pictures with captions, in memory."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(0)
        texts = np.clip(np.round(draw.lognormal(np.log(12), 0.5, count)), 4, 60).astype(int)
        generator = torch.Generator().manual_seed(0)
        for number, text in enumerate(texts):
            words = torch.randint(10, TEXT["vocab_size"], (int(text),), generator=generator)
            ids = torch.cat([torch.full((VISUAL,), IMAGE), words])
            labels = ids.masked_fill(ids == IMAGE, IGNORE_INDEX)
            pixels = torch.randn(1, 3, 168, 168, generator=generator)
            item = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
            self.append({**item, "sample_id": str(number)})
        self.lengths = [len(item["input_ids"]) for item in self]


class PlainCollator(InstructionCollator):
    """Without the names of the samples, which a plain model does not take."""

    def __call__(self, items: Any) -> dict[str, Tensor]:
        """Makes a batch."""
        batch = super().__call__(items)
        batch.pop("sample_ids")
        return batch


def make_arms(samples: Samples, samples_a_row: int) -> dict[str, Callable[[], float]]:
    """Arm to a function that trains `STEPS` steps of the whole batch and returns the loss."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=VISUAL,
    )
    fresh: Any = LlavaForConditionalGeneration(config)
    apply_trainable(fresh, ["multi_modal_projector"])
    freeze_unused_vision(fresh)
    folder = tempfile.mkdtemp()

    def arguments(size: int, accumulation: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            learning_rate=1e-6,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )

    def plain() -> float:
        trainer = Trainer(
            copy.deepcopy(fresh),
            arguments(len(samples), 1),
            data_collator=PlainCollator(0),
            train_dataset=samples,  # type: ignore[arg-type]
        )
        return trainer.train().training_loss

    def ours() -> float:
        batches = PackedBatches(
            samples.lengths,
            [1] * len(samples),
            global_batch_size=len(samples),
            max_tokens=samples_a_row * (VISUAL + 20),
            epochs=STEPS,
        )
        trainer = VlmTrainer(
            copy.deepcopy(fresh),
            arguments(1, batches.accumulation),
            samples,
            PackedCollator(),
            None,
            batches=batches,
            parts={"multi_modal_projector": PartTraining(lr=1e-6)},
        )
        return trainer.train().training_loss

    return {"plain": plain, "ours": ours}


def main() -> None:
    """Print samples per CPU-second of both arms and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--samples-a-row", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 samples, 3 repeats")
    args = parser.parse_args()
    count, repeats = (8, 3) if args.quick else (args.samples, args.repeats)
    samples = Samples(count)
    arms = make_arms(samples, args.samples_a_row)
    losses = {name: arm() for name, arm in arms.items()}
    seconds = take_turns(arms, repeats)
    found, spread = ratio(seconds, "plain", "ours")
    rates = {
        name: round(count * STEPS / statistics.median(seconds[name]["cpu"]), 3) for name in arms
    }
    tokens = sum(samples.lengths)
    trained = sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in samples)
    finish(
        "projector_pretraining",
        ours=rates["ours"],
        baseline=rates["plain"],
        ratio=found,
        spread=spread,
        wall_ratio=ratio(seconds, "plain", "ours", "wall")[0],
        equal=abs(losses["ours"] - losses["plain"]) < 1e-4,
        loss_difference=abs(losses["ours"] - losses["plain"]),
        goals=GOALS,
        settings={
            "unit": "samples per CPU-second",
            "samples": count,
            "trained": round(trained / tokens, 4),
            "padding_of_baseline": round(1 - tokens / (max(samples.lengths) * count), 4),
            "samples_a_row": args.samples_a_row,
            "text": TEXT,
            "vision": VISION,
            "repeats": repeats,
        },
    )


if __name__ == "__main__":
    main()
