"""Charts: rows of marks that a template draws, and curves that matplotlib does.

A page draws a :class:`Chart` as HTML (`templates/pieces.html`), so that its texts wrap and its bars
follow the width of the window; `templates/differences.svg` is the same as a file. Every colour is
one of `templates/colours.css` and is written as its CSS variable, so that the same drawing follows
a light or dark surrounding; texts stay texts. Marks carry their numbers as tooltips, and colour
never stands alone: bars are labelled, lines differ in dash.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

_DASHES = ("-", "--", ":", "-.", (0, (4, 2, 1, 2, 1, 2)), (0, (1, 3)))
_TEMPLATES = Path(__file__).parent / "templates"
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'.replace('"', "'")


@dataclass(frozen=True)
class Mark:
    """A bar, a dot, or a row of a forest plot."""

    label: str
    """Whose value it is."""
    value: float
    """In the chart's unit."""
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
    """As long as `x`."""
    colour: int = 0
    """Number of the series."""


@dataclass(frozen=True)
class Chart:
    """Rows of marks along an axis: bars from zero, or differences around it."""

    title: str
    """For readers who do not see the chart."""
    groups: Mapping[str, Sequence[Mark]]
    """Heading to its rows, from top to bottom; of differences each group has its own axis."""
    limit: float | None = None
    """Right end of the axis, if no value is beyond it; None = from the values."""
    guesses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Heading to what needs no model (chance, a rule) and its value: lines across the group's rows,
    named below the heading."""
    sides: tuple[str, str] | None = None
    """What it means to lie left and right of zero; None = values from 0 up, drawn as bars."""

    def ticks(self, heading: str) -> list[float]:
        """Round numbers along a group's axis, its ends among them.

        Of differences, neither side of zero has less than about a quarter of the axis.
        """
        rows = self.groups[heading] if self.sides else [m for g in self.groups.values() for m in g]
        values = [0.0, *(v for m in rows for v in (m.value, *m.points, *(m.interval or ())))]
        values += [v for rules in self.guesses.values() for v in rules.values()]
        low, high = min(values), max(self.limit or 0.0, *values)
        if low == high:  # nothing but zeros
            high = 1.0
        if self.sides:
            low, high = min(low, -high / 3), max(high, -low / 3)
        span = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(span))
        step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= span * (1 - 1e-9))
        return [step * n for n in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def line_chart(lines: Sequence[Line], title: str) -> str:
    """Curves over steps, with a legend where they have names.

    Args:
        lines: At least one point each.
        title: For readers who do not see the chart.

    Returns:
        An `<svg>` element, about half as wide as the others.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(380 / 72, 230 / 72))
        axes = figure.add_axes((0.12, 0.17, 0.85, 0.79))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("step", loc="right", color=_colour("muted"), size=12)
        named: dict[str, Any] = {}
        for line in lines:
            look: Any = {"color": _colour(f"c{line.colour}"), "ls": _DASHES[line.colour], "lw": 2}
            [curve] = axes.plot(line.x, line.y, **look)
            _tip(f"{line.label}: {line.y[0]:.3f} → {line.y[-1]:.3f}", curve)
            named.setdefault(short(drawable(line.label)), curve)
        if any(named):
            axes.legend(named.values(), named, loc="upper right", handlelength=2.6)
        return _svg(figure, title)


def chart_css() -> str:
    """The colours: what a page or file with charts must include once."""
    return (_TEMPLATES / "colours.css").read_text(encoding="utf-8")


@cache
def _light() -> dict[str, str]:
    """CSS variable to its colour on light, the one that is drawn with."""
    return dict(reversed(re.findall(r"--(\w+): (#\w+)", chart_css())))


def _colour(name: str) -> str:
    return _light()[name]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    colours: Any = {"text.color": _colour("ink"), "grid.color": _colour("line")}
    colours |= dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _colour("muted"))
    with mpl.rc_context(colours, fname=_TEMPLATES / "charts.mplstyle"):
        yield


def _tip(text: str, artist: Any) -> None:
    """Give an artist a tooltip: matplotlib writes the id, :func:`_svg` makes it a title."""
    artist.set_gid(f"tip {drawable(text)}")


def short(text: str, most: int = 26) -> str:
    """A name that fits beside an axis: what is too much leaves its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def drawable(text: str) -> str:
    """A name without what neither a font nor XML has: control characters, half characters."""
    return re.sub(
        r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text
    )


def _svg(figure: Any, title: str) -> str:
    """The drawing as an element whose ids are its own."""
    buffer = io.StringIO()
    absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=absent)
    _, size, body = re.split(r'<svg .*?(viewBox="[^"]*").*?>', buffer.getvalue(), flags=re.DOTALL)
    body = re.sub(r'id="tip ([^"]*)">', r"><title>\1</title>", body)
    own = re.sub(r"\W+", "-", title)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\1{own}-", body)
    body = re.sub(r'(<[^<>]*)font-family: [^;"<>]*', rf"\1font-family: {_FONT}", body)
    for name, light in _light().items():
        body = body.replace(light, f"var(--{name})")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="chart" role="img" aria-label="{escape(drawable(title))}" {size}>{body.strip()}'
    )
