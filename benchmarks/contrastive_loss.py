"""Memory and time of the contrastive loss, forward and backward: ours against the dense one.

The dense loss is what CLIP's own code does, in fp32: one logit matrix, cross entropy of its rows
and of its columns. Both get the same embeddings (width 768, pairs 0.15 of cosine above the others,
as in a trained CLIP, whose pairs lie at 0.25 to 0.3 and other captions at 0.1 to 0.15) and a
trained model's scale of 100. Gradients are compared with a dense computation in float64; beside it
on pairs 0.3 above the others, where nearly nothing is left to learn and fp32 keeps few digits of
what is left, whoever computes it.

    python benchmarks/contrastive_loss.py [--quick]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from arms import finish, ratio, take_turns
from torch import Tensor

from llm2clip_vlm.losses.contrastive import contrastive_loss

WIDTH, SCALE, GAP, SATURATED_GAP = 768, 100.0, 0.15, 0.3
GOALS = {"ratio": 0.3, "time_ratio": 1.0, "gradient_error": 5e-6}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The baseline."""
    logits = scale * image @ text.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


LOSSES: dict[str, Loss] = {"ours": contrastive_loss, "dense": dense}


def embeds(
    batch: int, dtype: torch.dtype = torch.float32, gap: float = GAP
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and scale that want gradients."""
    torch.manual_seed(0)
    image = torch.randn(batch, WIDTH)
    text = gap * image + torch.randn(batch, WIDTH)
    pair = [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (image, text)]
    return pair[0], pair[1], torch.tensor(SCALE, dtype=dtype, requires_grad=True)


def gradients(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of all three inputs."""
    return torch.autograd.grad(loss(*inputs), inputs)


def peak_mib(arm: str, batch: int) -> float:
    """Memory that the arm needs on top of its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch), "--memory-of", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_peak(arm: str, batch: int) -> None:
    """Prints the growth of this process's peak in MiB."""
    gradients(LOSSES[arm], embeds(64))  # what the first call loads is not the loss's
    inputs = embeds(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients(LOSSES[arm], inputs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def errors(batch: int, gap: float) -> dict[str, float]:
    """Of each arm the largest relative error of a gradient."""
    exact = gradients(dense, embeds(batch, torch.float64, gap))
    found = {}
    for arm, loss in LOSSES.items():
        pairs = zip(gradients(loss, embeds(batch, gap=gap)), exact, strict=True)
        worst = max(((got - want).norm() / want.norm()).item() for got, want in pairs)
        found[arm] = float(f"{worst:.2e}")
    return found


def main() -> None:
    """Print memory, time and error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="batch 4096, 3 repeats")
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, repeats = (4096, 3) if args.quick else (args.batch, args.repeats)
    if args.memory_of:
        measure_peak(args.memory_of, batch)
        return
    memory = {arm: [peak_mib(arm, batch) for _ in range(2)] for arm in LOSSES}
    peaks = {arm: statistics.median(values) for arm, values in memory.items()}
    for arm, values in memory.items():
        print(f"{arm:6s} {peaks[arm]:7.0f} MiB beyond its inputs {[round(v) for v in values]}")
    small, inputs = embeds(64), embeds(batch)
    for loss in LOSSES.values():
        gradients(loss, small)
    arms = {arm: lambda loss=loss: gradients(loss, inputs) for arm, loss in LOSSES.items()}
    seconds = take_turns(arms, repeats)
    for arm, values in seconds.items():
        cpu, wall = (statistics.median(values[kind]) for kind in ("cpu", "wall"))
        print(f"{arm:6s} {cpu:7.2f} s of CPU, {wall:.2f} s of wall")
    error, saturated = errors(batch, GAP), errors(batch, SATURATED_GAP)
    with torch.no_grad():
        left = [dense(*embeds(batch, gap=gap)).item() for gap in (GAP, SATURATED_GAP)]
    print(f"relative error of the gradients against float64 (loss {left[0]:.3g}): {error}")
    print(f"the same where the loss is {left[1]:.2g}: {saturated}")
    time_ratio, time_spread = ratio(seconds, "ours", "dense")
    rounds = [a / b for a, b in zip(memory["ours"], memory["dense"], strict=True)]
    finish(
        "contrastive_loss",
        ours=round(peaks["ours"]),
        baseline=round(peaks["dense"]),
        ratio=round(peaks["ours"] / peaks["dense"], 4),
        spread=[round(min(rounds), 4), round(max(rounds), 4)],
        time_ratio=time_ratio,
        time_spread=time_spread,
        wall_ratio=ratio(seconds, "ours", "dense", "wall")[0],
        gradient_error=error["ours"],
        gradient_error_saturated=saturated,
        loss=round(left[0], 4),
        equal=error["ours"] <= GOALS["gradient_error"],
        goals=GOALS,
        settings={
            "batch": batch,
            "width": WIDTH,
            "scale": SCALE,
            "dtype": "float32",
            "repeats": repeats,
            "unit": "MiB beyond the inputs",
            "baseline": "one fp32 logit matrix, cross entropy of rows and columns",
        },
    )


if __name__ == "__main__":
    main()
