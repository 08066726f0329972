"""The GPUs that `llm2clip-vlm plan` knows, and its options; torch comes where none is named."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from llm2clip_vlm.files import read_text
from llm2clip_vlm.options import number
from llm2clip_vlm.recipe.reading import did_you_mean

GPUS = {
    "b200-180gb": (180, 2250),
    "h200-141gb": (141, 989),
    "h100-80gb": (80, 989),
    "a100-80gb": (80, 312),
    "a100-40gb": (40, 312),
    "l40s-48gb": (48, 362),
    "rtx6000ada-48gb": (48, 364),
    "a6000-48gb": (48, 155),
    "rtx5090-32gb": (32, 210),
    "rtx4090-24gb": (24, 165),
    "rtx3090-24gb": (24, 71),
    "a10-24gb": (24, 125),
    "l4-24gb": (24, 121),
    "t4-16gb": (16, 65),
}
"""Memory in GB and dense bf16 TFLOP/s (T4: fp16), from NVIDIA's data sheets without sparsity."""


@dataclass(frozen=True)
class Machine:
    """Where a run would go."""

    gpu: str = "h100-80gb"
    gpus: int = 1
    zero: int = 0
    offload: bool = False
    told: str = ""
    """Where the GPU is from, if nobody named it."""


def find_machine(
    gpu: str | None, gpus: int, zero: int | None, offload: bool, source: str
) -> Machine:
    """A machine as the command line says it; ZeRO as the recipe's launch line has it.

    Without a name the GPU is that of this machine, else an H100.

    Raises:
        ValueError: An unknown GPU.
    """
    here = None if gpu else _gpu_here()
    assumed = "assumed: no known GPU is here; `plan --gpu NAME` names one"
    told = "this machine's" if here else "" if gpu else assumed
    gpu = gpu or here or Machine.gpu
    if gpu not in GPUS:
        raise ValueError(f"no GPU `{gpu}`{did_you_mean(gpu, GPUS)} (known: {', '.join(GPUS)})")
    named = re.search(r"accelerate/zero(\d)", read_text(source))
    chosen = zero if zero is not None else int(named[1]) if named and gpus > 1 else 0
    return Machine(gpu, gpus, chosen, offload, told)


def _gpu_here() -> str | None:
    """This machine's first GPU by its name in the table. None: there is none, or no such."""
    import torch

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    words = re.sub("[^a-z0-9]", "", seen.name.lower())  # "NVIDIA A100-SXM4-40GB" has a10 in it, too
    for name, (gb, _) in GPUS.items():
        if name.rpartition("-")[0] in words and abs(seen.total_memory / gb - 1e9) < 0.12e9:
            return name
    return None


def add_options(made: argparse.ArgumentParser) -> None:
    """Give a parser the words of `llm2clip-vlm plan` beside its recipe."""
    add, count, share = made.add_argument, number(1), number(0.001, 1, float)
    add("--gpu", help=f"{', '.join(GPUS)} (default: that of this machine, else h100-80gb)")
    add("--gpus", type=count, default=1, help="how many (default: 1)")
    add("--zero", type=int, choices=range(4), help="default: as the recipe's launch line says")
    add("--offload", action="store_true", help="ZeRO keeps optimizer states on the CPU")
    add("--mfu", type=share, default=0.35, help="share of the GPUs' bf16 rate (default: 0.35)")
    add("--price", type=number(0, kind=float), help="of a GPU hour")
    add("--samples", type=count, help="instead of the data's, such as where they are not here yet")
    add("--tokens", type=count, help="of a text, instead of the data's")
    add("--json", action="store_true", help="numbers for a program")
