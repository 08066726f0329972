"""Kills a stage program as `kill -9` does, and starts it again."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

Main = Callable[[Sequence[str]], None]

PRELOADED = [
    "peft",
    "transformers.trainer",
    "stages.stage1_text_encoder",
    "stages.stage2a_cache_text",
    "stages.stage2b_vision_encoder",
    "stages.stage3_projector",
    "stages.stage4_instruction",
]

_random = random.Random(0)
MOMENTS = [
    pytest.param(share, marks=[pytest.mark.slow] if number > 0 else [])
    for number, share in enumerate(_random.random() for _ in range(20))
]
"""Shares of a run's time at which it is killed: one of them always, twenty in `make test-all`."""


def start_apart(
    main: Main, argv: Sequence[str], env: Mapping[str, str] | None = None
) -> multiprocessing.process.BaseProcess:
    """Starts a program in a process of its own.

    It is forked from a server that has imported the stages and computed nothing, so a tiny run
    takes a second or two. A fork of the test process itself would inherit torch's thread pool
    without its threads, and fail now and then ("Invalid thread pool!").

    Args:
        main: The program.
        argv: Its arguments.
        env: More of its environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    warm_up = context.Process(target=int)  # the server's imports count for no run
    warm_up.start()
    warm_up.join()
    process = context.Process(target=_run, args=(main, list(argv), dict(env or {})))
    process.start()
    return process


def _run(main: Main, argv: list[str], env: dict[str, str]) -> None:
    os.environ.update(env)
    main(argv)


def run_apart(main: Main, argv: Sequence[str], kill_after_s: float | None = None) -> float:
    """Runs a program in a process of its own, and kills it if it takes longer than it may.

    Returns:
        Seconds that it ran.
    """
    process = start_apart(main, argv)
    started = time.monotonic()
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
        process.join()
    else:
        assert process.exitcode == 0, process.exitcode
    return time.monotonic() - started


def start_ranks(main: Main, argv: Sequence[str], count: int) -> list[Any]:
    """Starts a program in so many processes of one group, which share a step."""
    port = str(get_free_port())
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        start_apart(main, argv, env | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(count)
    ]


def kill_within(main: Main, argv: Sequence[str], folder: Path, after_s: float) -> None:
    """Runs a program and kills it before it has ended: each try has half the time of the last.

    Args:
        main: The program.
        argv: Its arguments.
        folder: All that it writes, with its manifest as the last; cleared where it has ended.
        after_s: When to kill it at first.
    """
    run_apart(main, argv, after_s)
    while list(folder.rglob("manifest.json")):
        shutil.rmtree(folder)
        after_s /= 2
        run_apart(main, argv, after_s)
