"""Charts: rows of marks and curves, which templates draw.

A page draws them as HTML (`templates/pieces.html`), so that texts wrap and bars follow the width of
the window; `templates/differences.svg` is a file of its own. Every colour is one of
`templates/colours.css` and is written as its CSS variable, so that the same drawing follows a light
or dark surrounding; texts stay texts. Marks carry their numbers as tooltips, and colour never
stands alone: bars are labelled, lines differ in dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mark:
    """A bar, a dot, or a row of a forest plot."""

    label: str
    """Name of what has the value."""
    value: float
    """Value in the chart's unit."""
    interval: Sequence[float] | None = None
    """Low and high."""
    colour: int = 0
    """Number of the series, below 6."""
    points: Sequence[float] = ()
    """Single values behind the mean, such as one a seed."""
    note: str = ""
    """Goes into the tooltip; a forest plot also writes it at the end of the row."""
    strong: bool = True
    """False for a row of lower rank (one question type)."""

    def figures(self, form: str = ".1f") -> str:
        """Value and interval."""
        between = ", ".join(format(end, form) for end in self.interval or ())
        return f"{self.value:{form}}" + (f" [{between}]" if between else "")

    def words(self, form: str = ".1f") -> str:
        """All of it, for a tooltip."""
        return f"{self.label}: {self.figures(form)}{' · ' if self.note else ''}{self.note}"


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str
    """Its name; equal names share an entry of the legend."""
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    """Values, as many as in `x`."""
    colour: int = 0
    """Number of the series, below 6."""


@dataclass(frozen=True)
class Curves:
    """Lines over steps, at least one."""

    title: str
    """Text for readers who do not see the chart."""
    lines: Sequence[Line]
    """At least one point each."""

    def ticks(self, side: str) -> list[float]:
        """Round numbers along the axis of `x` or `y`, its ends among them."""
        values = [value for line in self.lines for value in getattr(line, side)]
        return round_numbers(min(values), max(values))


@dataclass(frozen=True)
class Chart:
    """Rows of marks along an axis: bars from zero, or differences around it."""

    title: str
    """Text for readers who do not see the chart."""
    groups: Mapping[str, Sequence[Mark]]
    """Heading to its rows, from top to bottom; of differences each group has its own axis."""
    limit: float | None = None
    """Right end of the axis, if no value is beyond it. None: from the values."""
    guesses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Heading to what needs no model (chance, a rule) and its value: lines across the group's rows,
    named below the heading."""
    sides: tuple[str, str] | None = None
    """What it means to lie left and right of zero. None: values from 0 up, drawn as bars."""

    def ticks(self, heading: str) -> list[float]:
        """Round numbers along a group's axis, its ends among them.

        Of differences, neither side of zero has less than about a quarter of the axis.
        """
        rows = self.groups[heading] if self.sides else [m for g in self.groups.values() for m in g]
        values = [0.0, *(v for m in rows for v in (m.value, *m.points, *(m.interval or ())))]
        values += [v for rules in self.guesses.values() for v in rules.values()]
        low, high = min(values), max(self.limit or 0.0, *values)
        if self.sides:
            high += low == high  # nothing but zeros
            low, high = min(low, -high / 3), max(high, -low / 3)
        return round_numbers(low, high)


def round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers at equal distances, from `low` or less to `high` or more."""
    high += low == high
    span = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(span))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= span * (1 - 1e-9))
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def short(text: str, most: int = 26) -> str:
    """A name that fits beside an axis: what is too much leaves its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def drawable(text: str) -> str:
    """A name without what neither a font nor XML has: control characters, half characters."""
    return re.sub(
        r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text
    )
