"""Progress of a pipeline: a line for each step on a terminal, elsewhere a plain log."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import reduce
from statistics import fmean
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from llm2clip_vlm.recipe.pipeline import PipelineStep

_BAR = re.compile(r"([^\r\n|%]*?)(\d+)%\|[^|\r\n]*\|(?: *(\S+?)/(\S+?) \[[\d:]+<([\d:]+)?)?")
_LOSS = re.compile(r"'loss': '?(-?[\d.]+(?:e[+-]?\d+)?)")
_PLAIN_EVERY_S = 30.0


class Seen(NamedTuple):
    """The last progress bar of a step's log, and the last loss."""

    title: str
    """Its title; training's has none."""
    percent: int
    """Its share in per cent."""
    at: str = ""
    """Its count; empty where it has none."""
    total: str = ""
    """Its end."""
    left: str = ""
    """Time until its end, such as `1:02:03`."""
    loss: str = ""
    """The loss; empty where none was logged."""

    def __str__(self) -> str:
        counted = f"{self.at}/{self.total}" if self.total else f"{self.percent} %"
        loss = f", loss {float(self.loss):.4g}" if self.loss and not self.title else ""
        left = f", {self.left} left" if self.left else ""
        return f"{self.title} {counted}{loss}{left}".lstrip()


def seen_in(text: str) -> Seen | None:
    """Read the end of a log. None: it has no progress bar."""
    bars, losses = _BAR.findall(text), ["", *_LOSS.findall(text)]
    if not bars:
        return None
    title, percent, at, total, left = bars[-1]
    return Seen(title.strip(" :."), int(percent), at, total, left, losses[-1])


class Shown:
    """The state of a pipeline's steps, drawn or written.

    Args:
        steps: Each step by its name; those that one step of the recipe stands for (`for_each`)
            take about as long.
        known_s: Seconds that steps took before, by name.
        jobs: Steps at a time.
    """

    def __init__(
        self, steps: Mapping[str, PipelineStep], known_s: Mapping[str, float], jobs: int
    ) -> None:
        """Args: see the class."""
        self._steps, self._known, self._jobs = dict(steps), dict(known_s), jobs
        self._done: set[str] = set()
        console = Console(highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}", markup=False),
        )
        hidden = not console.is_interactive
        self.bars = Progress(*columns, console=console, transient=True, disable=hidden)
        """A context: on a terminal the bars are drawn in it."""
        self._ids = {"": self.bars.add_task("all steps", total=len(self._steps), state="")}
        self._written = time.monotonic()

    def end(self, name: str, outcome: str, seconds: float | None = None) -> None:
        """Write what became of a step.

        Args:
            name: Name of the step.
            outcome: Text to write.
            seconds: Its time. None: it did not run.
        """
        self._done.add(name)
        if seconds is not None:
            self._known[name] = seconds
        if name in self._ids:
            self.bars.remove_task(self._ids.pop(name))
        self._write(f"{name}: {outcome}")

    def update(self, running: Mapping[str, Seen | None]) -> None:
        """Draw the steps that run, or write them from time to time.

        Args:
            running: Name to what its log says now.
        """
        tasks = self.bars._tasks
        for name, seen in running.items():
            if name not in self._ids:
                self._ids[name] = self.bars.add_task(name, total=None, state="", main=None)
            task = tasks[self._ids[name]]
            if seen and not seen.title and task.fields["main"] in (None, seen.total):
                # training's own bar, never another one's, and never back
                share = max(task.completed, seen.percent / 100)
                self.bars.update(task.id, total=1.0, completed=share, main=seen.total)
            self.bars.update(task.id, state=str(seen or ""))
        done = len(self._done) + sum(tasks[self._ids[name]].completed for name in running)
        left = self._left(running)
        whole = "" if left is None else f"about {timedelta(seconds=round(left))} left"
        self.bars.update(self._ids[""], completed=done, state=whole)
        if self.bars.disable and time.monotonic() - self._written > _PLAIN_EVERY_S:
            states = [f"{name} {seen or ''}".rstrip() for name, seen in running.items()]
            self._write("; ".join([*states, f"all: {whole or 'time left not known'}"]))

    def _write(self, text: str) -> None:
        self._written = time.monotonic()
        counted = f"[{len(self._done)}/{len(self._steps)}]"
        self.bars.console.print(f"{counted} {text}", markup=False, soft_wrap=True)

    def _left(self, running: Mapping[str, Seen | None]) -> float | None:
        """Seconds until the end, from what the logs say and earlier times. None: not known."""
        alone, sharing = 0.0, []
        for name in self._steps.keys() - self._done:
            seen = running.get(name)
            if seen and not seen.title and seen.left:
                left = reduce(lambda above, part: above * 60 + int(part), seen.left.split(":"), 0.0)
            elif (usual := self._usual(name)) is None:
                return None
            else:
                elapsed = self.bars._tasks[self._ids[name]].elapsed if name in self._ids else 0.0
                left = max(usual - (elapsed or 0.0), 0.0)
            if self._steps[name].all_cores:
                alone += left
            else:
                sharing.append(left)
        # nothing ends before the longest does
        return alone + max(sum(sharing) / self._jobs, *sharing, 0.0)

    def _usual(self, name: str) -> float | None:
        """Seconds that a step took before, or its like did, or did elsewhere at this pace."""
        step = self._steps[name]
        took = [(self._steps[n], s) for n, s in self._known.items() if n in self._steps]
        alike = [s for other, s in took if other.name == step.name]
        if alike:
            return self._known.get(name, fmean(alike))
        if step.seconds is None:
            return None
        both = [(s, other.seconds) for other, s in took if other.seconds]
        pace = sum(here for here, _ in both) / sum(there for _, there in both) if both else 1.0
        return step.seconds * pace


def told(cost: dict[str, float]) -> str:
    """A job's cost in words."""
    more = f"{cost['cpu_seconds']:.0f} CPU s, {cost['peak_memory_gb']:.1f} GB"
    return f"done in {cost['seconds']:.0f} s ({more})"
