"""Seconds until a resumed run has its first batch, at optimizer step N.

Ours: the plan of 665,000 samples (`PackedBatches`), its cursor, and the Trainer's own way of going
on (`accelerate.skip_first_batches`), on one of 8 processes. Baseline: the same with the Trainer's
own sampler, which draws every batch before the cursor. Samples are not loaded in either; the plan
itself is made once at any start and given apart (`plan_s`). N counts over epochs of about 5,200
steps; `epoch_end` is the last step of one, where a cursor has most to skip.

    python benchmarks/resume_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from arms import finish, take_turns
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from llm2clip_vlm.data.conversation.packing import PackedBatches

RANKS, STEP = 8, 128


class Indices(list[int]):
    """A dataset whose samples cost nothing."""


def first_batch(sampler: Any, epoch: int, done: int, data: Indices) -> Any:
    """As `Trainer._run_epoch` begins a resumed epoch."""
    loader = prepare_data_loader(
        DataLoader(data, batch_sampler=sampler, collate_fn=list), num_processes=1, process_index=0
    )
    loader = skip_first_batches(loader, done)
    sampler.set_epoch(epoch)
    return next(iter(loader))


def undisturbed(sampler: PackedBatches, epoch: int, number: int) -> list[int]:
    """The same batch of an epoch that nothing interrupted."""
    sampler.resume(epoch, 0)
    sampler.set_epoch(epoch)
    return list(next(islice(iter(sampler), number, None)))


class StockShard(BatchSamplerShard):
    """The Trainer's sampler of one process; batches of 16."""

    def __init__(self, count: int) -> None:
        self.generator = Generator()
        order = RandomSampler(range(count), generator=self.generator)
        super().__init__(BatchSampler(order, STEP // RANKS, False), RANKS, 0)

    def set_epoch(self, epoch: int) -> None:
        """Seeds the order."""
        self.generator.manual_seed(epoch)


def main() -> None:
    """Print seconds at each N and how much they grow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=665_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20,000 samples, 3 repeats")
    args = parser.parse_args()
    count, repeats = (20_000, 3) if args.quick else (args.samples, args.repeats)
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(6.7, 0.25, count), 576, 2048).astype(int)
    images = (draw.random(count) > 0.06).astype(int)
    started = time.process_time()
    ours = PackedBatches(
        lengths.tolist(), images.tolist(), global_batch_size=STEP, max_tokens=4096, world_size=RANKS
    )
    plan_s = time.process_time() - started
    stock, data = StockShard(count), Indices(range(count))
    steps = len(ours) // ours.accumulation
    positions = {str(n): divmod(n, steps) for n in (10, 10**4, 10**6)} | {"end": (0, steps - 1)}

    def arm(sampler: Any, epoch: int, step: int) -> Any:
        if sampler is stock:
            return lambda: first_batch(stock, epoch, step, data)
        done = step * ours.accumulation

        def resumed() -> Any:
            ours.resume(epoch, done)
            return first_batch(ours, epoch, done, data)

        return resumed

    arms = {f"ours {n}": arm(ours, *at) for n, at in positions.items()}
    arms |= {f"stock {n}": arm(stock, *at) for n, at in positions.items()}
    for call in arms.values():
        call()
    same = [
        arm(ours, *at)() == undisturbed(ours, at[0], at[1] * ours.accumulation)
        for at in (positions["10"], positions["end"])
    ]
    seconds = take_turns(arms, repeats)
    medians = {name: round(statistics.median(own["cpu"]), 4) for name, own in seconds.items()}
    rounds = zip(seconds["ours 1000000"]["cpu"], seconds["ours 10"]["cpu"], strict=True)
    grown = sorted(round(a / b, 3) for a, b in rounds)
    finish(
        "resume_cost",
        ours={n: medians[f"ours {n}"] for n in positions},
        baseline={n: medians[f"stock {n}"] for n in positions},
        ratio=round(medians["ours 1000000"] / medians["ours 10"], 4),
        spread=[grown[0], grown[-1]],
        ratio_epoch_end=round(medians["ours end"] / medians["ours 10"], 4),
        baseline_ratio_epoch_end=round(medians["stock end"] / medians["stock 10"], 4),
        plan_s=round(plan_s, 3),
        equal=all(same),
        goals={"ratio": "flat"},
        settings={
            "unit": "CPU seconds to the first batch",
            "samples": count,
            "samples_a_step": STEP,
            "processes": RANKS,
            "micro_batches": ours.accumulation,
            "steps_an_epoch": steps,
            "repeats": repeats,
        },
    )


if __name__ == "__main__":
    main()
