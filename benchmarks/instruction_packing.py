"""FLOPs and CPU time per trained token in stage 4: packed, against padded batches.

A regression check, ours against ours; `instruction_tuning.py` compares with other trainers.
Baselines: (a) random batches, padded to their longest sample; (b) LLaVA's `group_by_length`:
megabatches of all processes, dealt to processes so that their tokens are even, padded. Both have
8 processes x 16 samples, logits of all positions; ours has the same 128 samples a step, logits of
all positions (`packed`) or of trained ones (`sliced`, what `VlmTrainer` does).

The lengths are those of `conversation_mix.py` with 576 visual tokens, cut at 2,048 and divided by
8, so that a CPU can train them. The model is a Llama whose head has 5 % of its weights. The tower
is left out: it sees the same pictures in each arm.

FLOPs are counted, over all steps, for what an arm computes: padding included, attention by the
square of what a row is padded to, or of each sample where it is packed. Time is CPU time of the
forward and backward passes, in one process, process by process; `time_ratio_grouped` takes of each
micro-step the slowest process, for which the others wait. `fill` is the share of the processes'
room in a micro-step (the longest row, for each) that holds tokens.

    python benchmarks/instruction_packing.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from arms import finish
from conversation_mix import draw_lengths
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import InstructionCollator
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.models.vlm import vlm_loss
from llm2clip_vlm.models.vlm.document_attention import install_document_attention

GOALS = {"ratio": 1.6, "time_ratio_grouped": 1.15, "fill": 0.95}
RANKS, SIZE, MAX_TOKENS, VISUAL, SCALE = 8, 16, 2048, 576, 8
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

Step = list[list[list[int]]]
"""Micro-step, process, samples."""


def sample(length: int, trained: int, seed: int) -> dict[str, Any]:
    """Random tokens, the last of them trained."""
    ids = torch.randint(8, TEXT["vocab_size"], (length,), generator=torch.manual_seed(seed))
    labels = ids.clone()
    labels[: length - trained] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "sample_id": str(seed)}


def random_steps(lengths: Sequence[int]) -> list[Step]:
    """Baseline (a)."""
    order = np.random.default_rng(1).permutation(len(lengths))
    return [
        [[[int(i) for i in own] for own in np.split(part, RANKS)]]
        for part in np.split(order, len(order) // (RANKS * SIZE))
    ]


def grouped_steps(lengths: Sequence[int]) -> list[Step]:
    """Baseline (b): a process takes the next longest sample when it has the fewest tokens."""
    draw, steps = np.random.default_rng(1), []
    order = draw.permutation(len(lengths))
    for start in range(0, len(order) - RANKS * SIZE + 1, RANKS * SIZE):
        ranks: list[list[int]] = [[] for _ in range(RANKS)]
        for i in sorted(order[start : start + RANKS * SIZE], key=lambda i: -lengths[i]):
            open_ones = [rank for rank in ranks if len(rank) < SIZE]
            min(open_ones, key=lambda rank: sum(lengths[j] for j in rank)).append(int(i))
        steps.append([ranks])
    return steps


def packed_steps(lengths: Sequence[int], rows: int) -> tuple[list[Step], int]:
    """Ours, and the micro-batches of a step."""
    batches = PackedBatches(
        lengths,
        [1] * len(lengths),
        global_batch_size=RANKS * SIZE,
        max_tokens=rows * MAX_TOKENS // SCALE,
        world_size=RANKS,
    )
    steps = [batches.rows(s) for s in batches.steps(0) if len(s) == RANKS * SIZE]
    chunks = range(0, batches.accumulation * RANKS, RANKS)
    return [[step[n : n + RANKS] for n in chunks] for step in steps], batches.accumulation


def flops(
    steps: list[Step], mix: Sequence[tuple[int, int]], *, padded: bool, sliced: bool
) -> float:
    """Model FLOPs, forward and backward, for each trained token."""
    width, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    block = layers * (4 * width**2 + 3 * width * TEXT["intermediate_size"])
    total = trained = 0.0
    for batch in (batch for step in steps for ranks in step for batch in ranks):
        own = [mix[i][0] for i in batch]
        computed = [max(own)] * len(own) if padded else own
        wanted = sum(mix[i][1] for i in batch)
        total += 6 * block * sum(computed) + 6 * width * layers * sum(n * n for n in computed)
        total += 6 * width * TEXT["vocab_size"] * (wanted if sliced else sum(computed))
        trained += wanted
    return total / trained


def make_model(sliced: bool) -> Any:
    """A Llama as LLaVA holds it; `sliced` = logits of trained tokens alone, however few words."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=7,
        vision_feature_layer=-1,
    )
    model: Any = LlavaForConditionalGeneration(config).train()
    install_document_attention(model)  # of packed rows alone
    if sliced:
        vlm_loss.SMALL_VOCABULARY = 0  # the model is small all over, its head in proportion
        vlm_loss.install_supervised_loss(model)
    return model


class Arm:
    """Trains one step after the other and keeps what each cost."""

    def __init__(self, model: Any, data: list[Any], steps: list[Step], collator: Any) -> None:
        self.model, self.data, self.steps, self.collator = model, data, steps, collator
        self.cpu: list[float] = []
        """CPU seconds per trained token, of all processes together."""
        self.slowest: list[float] = []
        """Of the slowest process of each micro-step."""

    def run(self, number: int) -> float:
        """Forward and backward passes of a step; returns its token mean of the loss."""
        self.model.zero_grad()
        step = self.steps[number % len(self.steps)]
        batches = [[self.collator([self.data[i] for i in own]) for own in ranks] for ranks in step]
        flat = [batch for ranks in batches for batch in ranks]
        trained = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in flat)
        total, slowest, loss = 0.0, 0.0, 0.0
        for ranks in batches:
            spent = []
            for batch in ranks:
                batch.pop("sample_ids")
                start = time.process_time()
                part = self.model(**batch, use_cache=False, num_items_in_batch=trained).loss
                part.backward()
                spent.append(time.process_time() - start)
                loss += float(part.detach())
            total += sum(spent)
            slowest += max(spent)
        self.cpu.append(total / trained)
        self.slowest.append(slowest / trained)
        return loss


def main() -> None:
    """Print FLOPs and time per trained token of all arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=12_800, help="of which FLOPs are counted")
    parser.add_argument("--rows", type=int, default=4, help="micro-batch, in rows of 2,048 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    parser.add_argument("--quick", action="store_true", help="1,280 samples, 1 step")
    args = parser.parse_args()
    count, repeats = (1_280, 1) if args.quick else (args.samples, args.repeats)
    drawn = draw_lengths(count, VISUAL, MAX_TOKENS)
    mix = [(round(tokens / SCALE), max(1, round(own / SCALE))) for tokens, own in drawn]
    lengths = [length for length, _ in mix]
    data = [sample(*own, seed) for seed, own in enumerate(mix)]
    packed, accumulation = packed_steps(lengths, args.rows)
    steps = {"random": random_steps(lengths), "grouped": grouped_steps(lengths)}
    model, padding = make_model(False), InstructionCollator(0)
    arms = {name: Arm(model, data, own, padding) for name, own in steps.items()}
    arms["packed"] = Arm(model, data, packed, PackedCollator())
    arms["sliced"] = Arm(make_model(True), data, packed, PackedCollator())
    same = Arm(model, data, packed, padding)  # ours, each micro-batch padded
    results = {}
    for name, arm in (("padded", same), ("packed", arms["packed"]), ("sliced", arms["sliced"])):
        loss = arm.run(0)
        grads = [p.grad.clone() for p in arm.model.model.language_model.parameters()]
        results[name] = loss, torch.cat([grad.flatten() for grad in grads])
    apart = [
        max(
            abs(results[name][0] - results["padded"][0]),
            float((results[name][1] - results["padded"][1]).abs().max()),
        )
        for name in ("packed", "sliced")
    ]
    for number in range(repeats + 1):
        for arm in arms.values():
            arm.run(number)
    for arm in arms.values():  # without the comparison and the warm-up
        arm.cpu, arm.slowest = arm.cpu[-repeats:], arm.slowest[-repeats:]

    counted = {
        name: flops(arm.steps, mix, padded=arm.collator is padding, sliced=name == "sliced")
        for name, arm in arms.items()
    }

    def times(baseline: str, ours: str, kind: str) -> tuple[float, list[float]]:
        one, two = getattr(arms[baseline], kind), getattr(arms[ours], kind)
        rounds = [round(a / b, 3) for a, b in zip(one, two, strict=True)]
        return round(statistics.median(one) / statistics.median(two), 4), sorted(rounds)[
            :: max(1, len(rounds) - 1)
        ]

    held = [[sum(lengths[i] for i in own) for own in ranks] for step in packed for ranks in step]
    tokens = sum(map(sum, held))
    grouped, spread = times("grouped", "sliced", "slowest")
    finish(
        "instruction_packing",
        ours=round(counted["sliced"]),
        baseline=round(counted["random"]),
        ratio=round(counted["random"] / counted["sliced"], 4),
        ratio_packing_alone=round(counted["random"] / counted["packed"], 4),
        ratio_grouped=round(counted["grouped"] / counted["sliced"], 4),
        time_ratio_grouped=grouped,
        spread=spread,
        time_ratio_grouped_packing_alone=times("grouped", "packed", "slowest")[0],
        cpu_ratio_grouped=times("grouped", "sliced", "cpu")[0],
        cpu_ratio_random=times("random", "sliced", "cpu")[0],
        fill=round(tokens / (RANKS * sum(map(max, held))), 4),
        fill_of_budget=round(tokens / (len(held) * RANKS * args.rows * MAX_TOKENS // SCALE), 4),
        loss_and_gradient_difference=max(apart),
        equal=max(apart) < 1e-5,
        goals=GOALS,
        settings={
            "unit": "FLOPs per trained token",
            "samples": count,
            "mean_tokens": round(SCALE * sum(lengths) / count),
            "trained": round(sum(own for _, own in mix) / sum(lengths), 4),
            "micro_batches": accumulation,
            "rows_a_micro_batch": args.rows,
            "text": TEXT,
            "steps_timed": repeats,
        },
    )


if __name__ == "__main__":
    main()
