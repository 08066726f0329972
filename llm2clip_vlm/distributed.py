"""Processes of one run: rank, gathering with gradient, DeepSpeed on machines without a GPU.

Everything works unchanged in a single process without a process group.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
Result = TypeVar("Result")


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def find_device(asked: str | torch.device | None) -> str:
    """The device that was asked for. None: `cuda` if there is one, else `cpu`.

    Raises:
        ValueError: A GPU, and torch sees none.
    """
    there = torch.cuda.is_available()
    device = str(asked or ("cuda" if there else "cpu"))
    if device.startswith("cuda") and not there:
        raise ValueError(f"device {device}: torch sees no CUDA GPU here; expected cpu")
    return device


def rank() -> int:
    """This process's number, from the process group or, before it exists, from the launcher."""
    return dist.get_rank() if is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, from the process group or, before it exists, from the launcher."""
    return dist.get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def say(text: object) -> None:
    """Print a line of a stage program's narration, once for all processes."""
    if is_main():
        print(text, flush=True)


def barrier() -> None:
    """Wait for all processes; without a process group do nothing."""
    if is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def max_over_ranks(*values: int, device: torch.device | str = "cpu") -> list[int]:
    """The largest of all ranks' values, on every rank; the values themselves in a single process.

    Args:
        *values: Values of this rank, as many on every rank.
        device: Where the process group's backend wants its tensors.
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def shared_out(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """Results of `work` for all parts, which the ranks share; on all ranks, in order.

    Args:
        parts: The same on all ranks.
        work: Makes a result, which is exchanged, so tensors should be on the CPU.
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return [work(part) for part in parts]
    mine = [work(part) for part in parts[rank() :: world_size()]]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return [found[n % world_size()][n // world_size()] for n in range(len(parts))]


def await_files(folder: str | Path, patience_s: float = 180.0) -> None:
    """Wait until this machine sees the files that the main process sees. Call it on all ranks.

    On network file systems what one machine writes or renames can appear late on the others.

    Args:
        folder: Written by the main process, before it calls this.
        patience_s: How long to wait for them.

    Raises:
        FileNotFoundError: A file has not appeared, or has another size.
    """

    def sizes() -> dict[str, int]:
        names = (os.path.join(place, n) for place, _, files in os.walk(folder) for n in files)
        return {os.path.relpath(n, folder): os.path.getsize(n) for n in names if os.path.exists(n)}

    (wanted,) = shared_out([None], lambda _: sizes())
    deadline = time.monotonic() + patience_s
    while late := wanted.items() - sizes().items():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{folder}/{min(late)[0]}: rank 0 has written it, but {socket.gethostname()} (rank "
                f"{rank()}) does not see it after {patience_s:g} s; the machines must share the "
                "file system of output_dir"
            )
        time.sleep(0.2)


def teardown() -> None:
    """Leave the process group together; call it as the last line of a program.

    Without it finished multi-process runs sometimes abort at interpreter exit.
    """
    if is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate a tensor over all ranks along dimension 0, keeping the gradient.

    The backward pass sums the gradients of *all* ranks for the owner's shard. Data-parallel
    training averages parameter gradients over ranks, so a loss whose mean over the ranks is the
    global loss (each rank computes the whole of it, or the mean over its own rows) needs no
    factor of the world size: parameters before and after the gather get exactly the gradient of
    one process with the global batch.

    Args:
        tensor: `[b, ...]`, the same shape on every rank.

    Returns:
        `[world_size * b, ...]` in rank order; the argument itself in a single process.

    Raises:
        RuntimeError: A launcher announced several processes, but there is no process group yet.
    """
    if world_size() == 1:
        return tensor
    if not is_initialized():
        raise RuntimeError(
            f"WORLD_SIZE is {world_size()} but no process group exists; build the training "
            "arguments (which start it) before the first forward pass"
        )
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor))


def prepare_cpu_deepspeed() -> None:
    """Make DeepSpeed usable without a GPU; call before `TrainingArguments` are built.

    Starts DeepSpeed's communication over gloo (otherwise it is never started, or takes the world
    for one process), and leaves out its shared-memory operator, which would be compiled for a
    minute at the first start. In a single process that no launcher started, the launcher's
    variables are set first. Does nothing where CUDA is available.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from torch.distributed.elastic.utils.distributed import get_free_port

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(get_free_port()))
    deepspeed.init_distributed("gloo")
