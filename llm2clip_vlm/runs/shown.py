"""What a pipeline shows while it runs: a line a step on a terminal, else a plain log."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_BAR = re.compile(r"([^\r\n|%]*?)(\d+)%\|[^|\r\n]*\|(?: *(\S+?)/(\S+?) \[[\d:]+<([\d:?]+))?")
_LOSS = re.compile(r"'loss': '?(-?[\d.]+(?:e[+-]?\d+)?)")
_PLAIN_EVERY_S = 30.0


@dataclass(frozen=True)
class Seen:
    """What the end of a step's log says."""

    title: str
    """Of its last progress bar; training's has none."""
    percent: int
    """Of that bar."""
    total: str = ""
    """Of that bar; empty where it does not say."""
    at: str = ""
    """How many of them."""
    left_s: float | None = None
    """Until the bar's end, as it says."""
    loss: str = ""
    """The last one logged."""

    def __str__(self) -> str:
        counted = f"{self.at}/{self.total}" if self.total else f"{self.percent} %"
        loss = f", loss {float(self.loss):.4g}" if self.loss and not self.title else ""
        return f"{self.title} {counted}{loss}".lstrip()


def seen_in(text: str) -> Seen | None:
    """Read the end of a log.

    Args:
        text: Of the log.

    Returns:
        Its last progress bar and loss; none without a bar.
    """
    bars, losses = _BAR.findall(text), _LOSS.findall(text)
    if not bars:
        return None
    title, percent, at, total, left = bars[-1]
    known = left and "?" not in left
    seconds = (
        reduce(lambda above, part: above * 60 + int(part), left.split(":"), 0) if known else None
    )
    return Seen(title.strip(" :."), int(percent), total, at, seconds, losses[-1] if losses else "")


def in_words(seconds: float) -> str:
    """A time as people say it, such as `2 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Shown:
    """The state of a pipeline's steps, drawn or written.

    Args:
        kinds: Of all steps by name: those of one kind take about as long.
        known_s: How long steps took before, by name.
        jobs: Steps at a time.
    """

    def __init__(self, kinds: Mapping[str, str], known_s: Mapping[str, float], jobs: int) -> None:
        """Args: see the class."""
        self._kinds, self._known, self._jobs = dict(kinds), dict(known_s), jobs
        self._done: set[str] = set()
        self._shares: dict[str, float] = {}
        self._totals: dict[str, str] = {}
        self._started: dict[str, float] = {}
        self._ids: dict[str, TaskID] = {}
        console = Console(highlight=False)
        self._drawn = console.is_interactive
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}", markup=False),
        )
        self._bars = Progress(*columns, console=console, transient=True)
        self._whole = self._bars.add_task("all steps", total=1.0, told="")
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        if self._drawn:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def end(self, name: str, told: str, seconds: float | None = None) -> None:
        """Write what became of a step.

        Args:
            name: Of the step.
            told: What to write.
            seconds: It took; none = it did not run.
        """
        self._done.add(name)
        if seconds is not None:
            self._known[name] = seconds
        if name in self._ids:
            self._bars.remove_task(self._ids.pop(name))
        self._write(f"[{len(self._done)}/{len(self._kinds)}] {name}: {told}")

    def update(self, running: Mapping[str, Seen | None]) -> None:
        """Draw the steps that run, or write them from time to time.

        Args:
            running: Name to what its log says now.
        """
        now = time.monotonic()
        told = {name: self._told(name, seen, now) for name, seen in running.items()}
        share = (len(self._done) + sum(self._shares.get(n, 0.0) for n in running)) / len(
            self._kinds
        )
        left = self._left(running, now)
        whole = "" if left is None else f"about {in_words(left)} left"
        self._bars.update(self._whole, completed=share, told=whole)
        for name, text in told.items():
            if name not in self._ids:
                self._ids[name] = self._bars.add_task(name, total=None, told="")
            known = self._shares.get(name)
            self._bars.update(
                self._ids[name], total=known and 1.0, completed=known or 0.0, told=text
            )
        if not self._drawn and told and now - self._written > _PLAIN_EVERY_S:
            states = "; ".join(f"{name} {text}".rstrip() for name, text in told.items())
            self._write(
                f"[{len(self._done)}/{len(self._kinds)}] {states}; all: {whole or 'not known'}"
            )

    def _write(self, text: str) -> None:
        self._written = time.monotonic()
        if self._drawn:
            self._bars.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _told(self, name: str, seen: Seen | None, now: float) -> str:
        """A step's state in words; its bar is that of training, and never goes back."""
        self._started.setdefault(name, now)
        if seen is None:
            return ""
        if not seen.title and seen.total == self._totals.setdefault(name, seen.total):
            self._shares[name] = max(self._shares.get(name, 0.0), seen.percent / 100)
        left = "" if seen.left_s is None else f", {in_words(seen.left_s)} left"
        return f"{seen}{left}"

    def _usual(self, name: str) -> float | None:
        """Seconds that a step took before, else those of its kind; none = not known."""
        alike = [
            s for other, s in self._known.items() if self._kinds.get(other) == self._kinds[name]
        ]
        return self._known.get(name, fmean(alike) if alike else None)

    def _left(self, running: Mapping[str, Seen | None], now: float) -> float | None:
        """Seconds until the end, from earlier times and what the logs say; none = not known."""
        total = 0.0
        for name in self._kinds.keys() - self._done:
            seen, usual = running.get(name), self._usual(name)
            if seen is not None and not seen.title and seen.left_s is not None:
                total += seen.left_s
            elif usual is None:
                return None
            else:
                total += max(usual - (now - self._started.get(name, now)), 0.0)
        return total / max(min(self._jobs, len(self._kinds) - len(self._done)), 1)
