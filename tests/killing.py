"""Kills a stage program as `kill -9` does, and starts it again."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence

import pytest

Main = Callable[[Sequence[str]], None]

_random = random.Random(0)
MOMENTS = [
    pytest.param(share, marks=[pytest.mark.slow] if number > 1 else [])
    for number, share in enumerate(_random.random() for _ in range(20))
]
"""Shares of a run's time at which it is killed: two of them always, twenty in `make test-all`."""


def run_apart(main: Main, argv: Sequence[str], kill_after_s: float | None = None) -> float:
    """Runs a program in a process of its own, and kills it if it takes longer than it may.

    The process is a fork: nothing is imported again, so a tiny run takes a second or two. This
    process must not have computed with torch's threads before; one thread a process is the rule.

    Returns:
        Seconds that it ran.
    """
    started = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=main, args=(list(argv),))
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
        process.join()
    else:
        assert process.exitcode == 0
    return time.monotonic() - started
