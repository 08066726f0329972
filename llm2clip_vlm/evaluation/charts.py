"""Charts as SVG, drawn by matplotlib and coloured by the page that shows them.

Every colour is one of `templates/colours.css` and is written as its CSS variable, so that the same
drawing follows a light or dark surrounding; texts stay texts. Marks carry their numbers as
tooltips, and colour never stands alone: bars are labelled, dots differ in shape, lines in dash.
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

_SHAPES = "osD^vP"
_DASHES = ("-", "--", ":", "-.", (0, (4, 2, 1, 2, 1, 2)), (0, (1, 3)))
_WIDTH = 760.0
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
    """Number of the series."""
    points: Sequence[float] = ()
    """Single values behind the mean, such as one a seed."""
    note: str = ""
    """Goes into the tooltip; a forest plot also writes it at the end of the row."""
    strong: bool = True
    """False for a row of lower rank (one question type)."""


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


def bar_chart(groups: Mapping[str, Sequence[Mark]], title: str, limit: float | None = None) -> str:
    """Horizontal bars in groups, with whiskers for intervals and rings for single values.

    Args:
        groups: Heading to its bars, values from 0 up.
        title: For readers who do not see the chart.
        limit: Right end of the axis; none = from the values.

    Returns:
        An `<svg>` element.
    """
    height = sum(30.0 + 24 * len(bars) for bars in groups.values())
    with _style():
        sheet = _Sheet(_WIDTH, height, left=150, right=64)
        y = 0.0
        for heading, bars in groups.items():
            sheet.text(heading, 0, y + 13, shift=-150, weight="bold")
            y += 38
            for bar in bars:
                sheet.text(bar.label, 0, y, shift=-8, ha="right", color=_colour("muted"))
                [patch] = sheet.axes.barh(y, bar.value, 18, color=_series(bar.colour)).patches
                sheet.tip(patch, _tip(bar))
                sheet.interval(bar, y)
                reach = max([bar.value, *bar.points, *(bar.interval or ())])
                sheet.text(f"{bar.value:.1f}", reach, y, shift=7, xycoords="data", weight="bold")
                y += 24
            y -= 8
        sheet.axes.set_xlim(0, limit)
        return sheet.svg(title)


def dot_chart(rows: Mapping[str, Sequence[Mark]], title: str) -> str:
    """One row a name, one dot a series on it; series differ in colour and shape.

    Args:
        rows: Name to its dots, from 0 to 100; a series keeps its colour over all rows.
        title: For readers who do not see the chart.

    Returns:
        An `<svg>` element, the legend on top.
    """
    with _style():
        sheet = _Sheet(_WIDTH, 30.0 * len(rows), left=190, right=24, top=30)
        sheet.axes.set_xlim(-1, 101)
        seen: dict[str, Any] = {}
        for number, (name, marks) in enumerate(rows.items()):
            y = 30.0 * number + 15
            sheet.axes.axhline(y, color=_colour("line"), dashes=(1, 4))
            sheet.text(name, 0, y, shift=-10, ha="right")
            for place, mark in enumerate(marks):
                # Spread over the row's height, so that equal values stay visible.
                at = y + (place - (len(marks) - 1) / 2) * 6
                colour, shape = _series(mark.colour), _SHAPES[mark.colour % len(_SHAPES)]
                look = {"color": colour, "marker": shape, "markeredgecolor": _colour("bg"), "lw": 0}
                [dot] = sheet.axes.plot([mark.value], [at], ms=9, clip_on=False, **look)
                sheet.tip(dot, f"{name} · {_tip(mark)}")
                seen.setdefault(mark.label, dot)
        place = (0, 1.0, 1.0, 0.1)
        sheet.axes.legend(seen.values(), seen, loc="lower left", bbox_to_anchor=place, ncols=9)
        return sheet.svg(title)


def line_chart(lines: Sequence[Line], title: str, x_label: str = "step") -> str:
    """Curves over a common axis, with a legend where they have names.

    Args:
        lines: At least one point each.
        title: For readers who do not see the chart.
        x_label: Below the axis.

    Returns:
        An `<svg>` element, about half as wide as the others.
    """
    with _style():
        sheet = _Sheet(380, 180, left=44, right=12, top=10, bottom=40)
        sheet.axes.yaxis.set_visible(True)
        sheet.axes.invert_yaxis()
        sheet.axes.grid(axis="x", visible=False)
        sheet.axes.set_xlabel(x_label, loc="right", color=_colour("muted"), size=12)
        named: dict[str, Any] = {}
        for line in lines:
            dash = _DASHES[line.colour % len(_DASHES)]
            [curve] = sheet.axes.plot(line.x, line.y, color=_series(line.colour), ls=dash, lw=2)
            sheet.tip(curve, f"{line.label}: {line.y[0]:.3f} → {line.y[-1]:.3f}")
            if line.label:
                named.setdefault(line.label, curve)
        sheet.axes.set_ylim(auto=True)
        sheet.axes.autoscale(axis="y")
        if named:
            sheet.axes.legend(named.values(), named, loc="upper right", handlelength=2.6)
        return sheet.svg(title)


def forest_chart(panels: Mapping[str, Sequence[Mark]], title: str, labels: tuple[str, str]) -> str:
    """Differences with intervals around a line at zero.

    Args:
        panels: Heading to its rows, from top to bottom; each panel has its own axis.
        title: For readers who do not see the chart.
        labels: What it means to lie left and right of zero.

    Returns:
        An `<svg>` element.
    """
    sides = f"← {labels[0]} · {labels[1]} →"
    with _style():
        heights = [52.0 + 28 * len(rows) for rows in panels.values()]
        sheet = _Sheet(_WIDTH, *heights, left=190, right=230)
        for panel, (heading, rows) in zip(sheet.panels, panels.items(), strict=True):
            sheet.axes = panel
            sheet.axes.axvline(0, color=_colour("ink"), lw=1.2)
            sheet.text(heading, 0, 12, shift=-190, weight="bold")
            sheet.text(sides, 1, 34, ha="right", color=_colour("muted"), size=12)
            for y, row in enumerate(rows):
                at = 62.0 + 28 * y
                look: dict[str, Any] = {} if row.strong else {"color": _colour("muted"), "size": 12}
                sheet.text(row.label, 0, at, shift=-12, ha="right", **look)
                sheet.interval(row, at)
                shape = {"ms": 9, "color": _series(0)} if row.strong else {"color": _series(2)}
                sheet.tip(*sheet.axes.plot([row.value], [at], "D", mew=0, **shape), _tip(row))
                low, high = row.interval or (float("nan"),) * 2
                text = f"{row.value:+.1f} [{low:+.1f}, {high:+.1f}]".removesuffix(" [+nan, +nan]")
                sheet.text(text, 1, at, shift=14, **look)
                sheet.text(row.note, 1, at, shift=229, ha="right", color=_colour("muted"), size=12)
        return sheet.svg(title)


def standalone(svg: str) -> str:
    """A chart as a file of its own: colours and background inside.

    Args:
        svg: What a chart function returned.
    """
    view = r'viewBox="0 0 ([\d.]+) ([\d.]+)">'

    def framed(size: re.Match[str]) -> str:
        width, height = (float(size[n]) for n in (1, 2))
        return (
            f'viewBox="-16 -8 {width + 32:g} {height + 16:g}"><style>{chart_css()}</style>'
            '<rect x="-16" y="-8" width="100%" height="100%" style="fill: var(--bg)"/>'
        )

    return re.sub(view, framed, svg, count=1) + "\n"


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

    colours = {"text.color": _colour("ink"), "grid.color": _colour("line")}
    colours |= dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _colour("muted"))
    with mpl.rc_context(colours, fname=_TEMPLATES / "charts.mplstyle"):
        yield


class _Sheet:
    """A figure of panels below each other; rows are placed in points from a panel's top."""

    def __init__(
        self,
        width: float,
        *heights: float,
        left: float,
        right: float,
        top: float = 0,
        bottom: float = 28,
    ) -> None:
        from matplotlib.figure import Figure

        whole = sum(top + height + bottom for height in heights)
        self.figure = Figure(figsize=(width / 72, whole / 72), facecolor="none")
        self.panels, at = [], whole
        for height in heights:
            at -= top + height
            size = (width - left - right) / width, height / whole
            panel = self.figure.add_axes((left / width, at / whole, *size))
            panel.set_ylim(height, 0)
            panel.yaxis.set_visible(False)
            self.panels.append(panel)
            at -= bottom
        self.axes = self.panels[0]
        self.tips: list[str] = []

    def text(
        self,
        text: str,
        x: float,
        y: float,
        shift: float = 0,
        xycoords: str = "axes fraction",
        **look: Any,
    ) -> None:
        """A text `shift` points right of `(x, y)`."""
        look = {"va": "center_baseline", **look}
        place = {"xycoords": (xycoords, "data"), "textcoords": "offset points"}
        self.axes.annotate(text, (x, y), (shift, 0), annotation_clip=False, **place, **look)

    def interval(self, mark: Mark, y: float) -> None:
        """Whisker and rings of a mark; a halo keeps the whisker visible on any colour."""
        if mark.interval:
            low, high = mark.interval
            for look in (
                {"color": _colour("bg"), "lw": 4, "alpha": 0.75},
                {"color": _colour("ink")},
            ):
                self.axes.plot([low, high], [y, y], marker="|", ms=8, **look)
        ring = {"mfc": _colour("bg") + "80", "mec": _colour("ink"), "mew": 1, "ms": 6}
        self.axes.plot(mark.points, [y] * len(mark.points), "o", clip_on=False, **ring)

    def tip(self, artist: Any, text: str) -> None:
        """Give an artist a tooltip."""
        artist.set_gid(f"tip{len(self.tips)}")
        self.tips.append(text)

    def svg(self, title: str) -> str:
        """The drawing as an element whose ids are its own."""
        buffer = io.StringIO()
        absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", metadata=absent)
        _, root, body = re.split(r"(<svg .*?>)", buffer.getvalue(), maxsplit=1, flags=re.DOTALL)
        view = re.findall(r'viewBox="[^"]*"', root)[0]
        own = re.sub(r"\W+", "-", title)
        body = re.sub(r'(id="|url\(#|href="#)', rf"\1{own}-", body)
        body = re.sub(r"font-family: [^;]*", f"font-family: {_FONT}", body)
        for number, tip in enumerate(self.tips):
            body = body.replace(f'id="{own}-tip{number}">', f"><title>{escape(tip)}</title>")
        for name, light in _light().items():
            body = body.replace(light, f"var(--{name})")
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'class="chart" role="img" aria-label="{escape(title)}" {view}>{body.strip()}'
        )


def _series(colour: int) -> str:
    return _colour(f"c{colour % 6}")


def _tip(mark: Mark) -> str:
    between = f" [{mark.interval[0]:.1f}, {mark.interval[1]:.1f}]" if mark.interval else ""
    return f"{mark.label}: {mark.value:.1f}{between}{' · ' if mark.note else ''}{mark.note}"
