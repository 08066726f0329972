"""Charts as SVG, drawn by matplotlib and coloured by the page that shows them.

Every colour is one of `templates/colours.css` and is written as its CSS variable, so that the same
drawing follows a light or dark surrounding; texts stay texts. Marks carry their numbers as
tooltips, and colour never stands alone: bars are labelled, lines differ in dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

_DASHES = ("-", "--", ":", "-.", (0, (4, 2, 1, 2, 1, 2)), (0, (1, 3)))
_DASHED = ("- -", "· · ·", "- ·")
"""How the first dashes are written."""
_WIDTH = 760.0
_ROW = 28.0
_BELOW = 28.0
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


def bar_chart(
    groups: Mapping[str, Sequence[Mark]],
    title: str,
    limit: float | None = None,
    guesses: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Horizontal bars in groups, with whiskers for intervals and rings for single values.

    Args:
        groups: Heading to its bars, values from 0 up.
        title: For readers who do not see the chart.
        limit: Right end of the axis; none = from the values.
        guesses: Heading to what needs no model (chance, a rule) and its value: lines across the
            group's bars, named beside the heading.

    Returns:
        An `<svg>` element.
    """
    with _style():
        height = sum(30.0 + 24 * len(bars) for bars in groups.values())
        figure, [axes] = _rows(height, left=150, right=64)
        y = -8.0
        for heading, bars in groups.items():
            _text(axes, heading, 0, y + 21, -150, weight="bold")
            y += 22
            _guesses(axes, (guesses or {}).get(heading, {}), y, y + 24 * len(bars))
            for bar in bars:
                y += 24
                _text(axes, bar.label, 0, y, -8, ha="right", color=_colour("muted"))
                _tip(bar.words(), *axes.barh(y, bar.value, 18, color=_colour(f"c{bar.colour}")))
                _interval(axes, bar, y)
                reach = max([bar.value, *bar.points, *(bar.interval or ())])
                _text(axes, f"{bar.value:.1f}", reach, y, 7, "data", weight="bold")
            y += 8
        axes.set_xlim(0, limit)
        return _svg(figure, title)


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
            named.setdefault(_drawable(line.label), curve)
        if any(named):
            axes.legend(named.values(), named, loc="upper right", handlelength=2.6)
        return _svg(figure, title)


def forest_chart(panels: Mapping[str, Sequence[Mark]], title: str, labels: tuple[str, str]) -> str:
    """Differences with intervals around a line at zero.

    Args:
        panels: Heading to its rows, from top to bottom; each panel has its own axis.
        title: For readers who do not see the chart.
        labels: What it means to lie left and right of zero.

    Returns:
        An `<svg>` element.
    """
    with _style():
        heights = [52.0 + _ROW * len(rows) for rows in panels.values()]
        figure, found = _rows(*heights, left=190, right=230)
        for axes, (heading, rows) in zip(found, panels.items(), strict=True):
            axes.axvline(0, color=_colour("ink"))
            _text(axes, heading, 0, 12, -190, weight="bold")
            quiet: dict[str, Any] = {"color": _colour("muted"), "size": 12}
            _text(axes, f"← {labels[0]} · {labels[1]} →", 1, 34, ha="right", **quiet)
            for y, row in enumerate(rows, start=1):
                at, look = 34 + _ROW * y, {} if row.strong else quiet
                _text(axes, row.label, 0, at, -12, ha="right", **look)
                _interval(axes, row, at)
                shape = {"ms": 9 if row.strong else 6, "mew": 0}
                colour = _colour("c0" if row.strong else "c2")
                _tip(row.words("+.1f"), *axes.plot([row.value], [at], "D", color=colour, **shape))
                _text(axes, row.figures("+.1f"), 1, at, 14, **look)
                _text(axes, row.note, 1, at, 229, ha="right", **quiet)
        return _svg(figure, title)


def standalone(svg: str) -> str:
    """A chart as a file of its own: colours, a margin and a background inside.

    Args:
        svg: What a chart function returned.
    """
    head, width, height, rest = re.split(r'viewBox="0 0 ([\d.]+) ([\d.]+)">', svg, maxsplit=1)
    return (
        f'{head}viewBox="-16 -8 {float(width) + 32:g} {float(height) + 16:g}">'
        f"<style>{chart_css()}</style>"
        f'<rect x="-16" y="-8" width="100%" height="100%" style="fill: var(--bg)"/>{rest}\n'
    )


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


def _rows(*heights: float, left: float, right: float, top: float = 0) -> tuple[Any, list[Any]]:
    """A figure of panels below each other, in which y is points from a panel's top."""
    from matplotlib.figure import Figure

    whole = sum(heights) + (top + _BELOW) * len(heights)
    figure, panels, at = Figure(figsize=(_WIDTH / 72, whole / 72)), [], whole
    for height in heights:
        at -= top + height
        size = (_WIDTH - left - right) / _WIDTH, height / whole
        panels.append(figure.add_axes((left / _WIDTH, at / whole, *size), ylim=(height, 0)))
        panels[-1].yaxis.set_visible(False)
        at -= _BELOW
    return figure, panels


def _text(
    axes: Any, text: str, x: float, y: float, shift: float = 0, unit: str = "axes fraction",
    **look: Any,
) -> None:  # fmt: skip
    """A text `shift` points right of `(x, y)`."""
    place = {"xycoords": (unit, "data"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(
        _drawable(text), (x, y), (shift, 0), **place, **({"va": "center_baseline"} | look)
    )


def _guesses(axes: Any, values: Mapping[str, float], top: float, bottom: float) -> None:
    """Lines across a group of bars, named right of its heading."""
    names = [f"{_DASHED[n]} {name} {value:.1f}" for n, (name, value) in enumerate(values.items())]
    _text(axes, "   ".join(names), 1, top - 1, 64, ha="right", color=_colour("muted"), size=12)
    for number, (name, value) in enumerate(values.items(), start=1):
        look = {"color": _colour("ink"), "ls": _DASHES[number], "lw": 1.5, "clip_on": False}
        line = axes.plot([value] * 2, [top + 12, bottom + 12], zorder=4, **look)
        _tip(f"{name}: {value:.1f}", *line)


def _interval(axes: Any, mark: Mark, y: float) -> None:
    """Whisker and rings; a halo keeps the whisker visible on any colour."""
    for look in ({"color": _colour("bg"), "lw": 4}, {"color": _colour("ink")}):
        axes.plot(mark.interval or (), [y, y] if mark.interval else (), "|-", ms=8, **look)
    ring = {"mfc": _colour("bg") + "80", "mec": _colour("ink"), "mew": 1, "clip_on": False}
    axes.plot(mark.points, [y] * len(mark.points), "o", **ring)


def _tip(text: str, artist: Any) -> None:
    """Give an artist a tooltip: matplotlib writes the id, :func:`_svg` makes it a title."""
    artist.set_gid(f"tip {_drawable(text)}")


def _drawable(text: str) -> str:
    """A name without what neither a font nor XML has: control characters, half characters."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


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
        f'class="chart" role="img" aria-label="{escape(_drawable(title))}" {size}>{body.strip()}'
    )
