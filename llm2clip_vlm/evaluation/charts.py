"""Charts as inline SVG, without a plotting library.

The same drawing serves a page and a file: colours are CSS variables, so that it follows a light or
dark surrounding, and every mark carries its numbers as a tooltip. Colours never stand alone: bars
and dots are labelled or differ in shape, lines differ in dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6
"""Colours of the palette; further series repeat them."""

CHART_CSS = """
:root { --ink: #1b1f24; --muted: #59636e; --bg: #ffffff; --panel: #f5f7f9; --line: #d8dee4;
  --c0: #0a58ca; --c1: #b45309; --c2: #6b7280; --c3: #0f766e; --c4: #86379e; --c5: #a11d4b;
  --good: #146c43; --bad: #b02a37; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --muted: #9ba6b2; --bg: #12161b; --panel: #1a2027; --line: #303a45;
    --c0: #6ea8fe; --c1: #ffa257; --c2: #a6b0bb; --c3: #4fd1b8; --c4: #d49bf0; --c5: #ff8fb1;
    --good: #63d297; --bad: #ff8a94; } }
.chart { font: 13px/1.3 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart text { fill: var(--ink); } .chart .m { fill: var(--muted); }
.chart .h { font-weight: 600; } .chart .s { font-size: 12px; }
.chart .grid { stroke: var(--line); } .chart .zero { stroke: var(--ink); stroke-width: 1.2; }
.chart .rail { stroke: var(--line); stroke-dasharray: 1 4; stroke-linecap: round; }
.chart .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.chart .halo { stroke: var(--bg); stroke-width: 4; stroke-linecap: square; opacity: .75; }
.chart .seed { fill: var(--bg); fill-opacity: .5; stroke: var(--ink); stroke-opacity: .75; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
"""
"""Style of the charts; a page that shows them includes it once."""

_WIDTH = 760
_DASHES = ("", "7 4", "2 4", "9 3 2 3", "4 2", "1 3")


@dataclass(frozen=True)
class Mark:
    """A bar or a dot."""

    label: str
    """Whose value it is."""
    value: float
    """In the chart's unit."""
    interval: tuple[float, float] | None = None
    """Low and high."""
    colour: int = 0
    """Number of the series."""
    points: Sequence[float] = ()
    """Single values behind the mean, such as one a seed."""
    note: str = ""
    """Goes into the tooltip."""

    @property
    def tip(self) -> str:
        """Text of the tooltip."""
        between = f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]" if self.interval else ""
        return f"{self.label}: {self.value:.1f}{between}{' · ' if self.note else ''}{self.note}"


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str
    """Its name."""
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    """As long as `x`."""
    colour: int = 0
    """Number of the series."""


@dataclass(frozen=True)
class Effect:
    """A row of a forest plot."""

    label: str
    """What is compared."""
    delta: float
    """Difference."""
    interval: tuple[float, float]
    """Low and high."""
    points: Sequence[float] = ()
    """One difference a seed."""
    note: str = ""
    """Written at the end of the row."""
    strong: bool = True
    """False for a row of lower rank (one question type)."""


def bar_chart(groups: Mapping[str, Sequence[Mark]], title: str, limit: float | None = None) -> str:
    """Horizontal bars in groups, with whiskers for intervals.

    Args:
        groups: Heading to its bars, values from 0 up.
        title: For readers who do not see the chart.
        limit: Right end of the axis; none = from the values.

    Returns:
        An `<svg>` element.
    """
    marks = [mark for bars in groups.values() for mark in bars]
    top = max([m.interval[1] if m.interval else m.value for m in marks], default=1.0)
    ticks = nice_ticks(0.0, limit or max(top, 1e-9))
    left, right = 150.0, _WIDTH - 64.0
    scale = _Scale(ticks[0], ticks[-1], left, right)
    height = sum(30 + 24 * len(bars) for bars in groups.values()) + 26
    parts = _axis(ticks, scale, height - 22)
    y = 4.0
    for heading, bars in groups.items():
        parts.append(_text(0, y + 17, heading, "h"))
        y += 26
        parts += _grid(ticks, scale, y, y + 24 * len(bars))
        for bar in bars:
            middle, end = y + 10, scale(bar.value)
            parts.append(f"<g><title>{escape(bar.tip)}</title>")
            parts.append(_text(left - 8, middle + 4, bar.label, "m", "end"))
            parts.append(
                f'<rect x="{left:.1f}" y="{y + 1:.1f}" width="{max(end - left, 0.5):.1f}" '
                f'height="18" rx="2" fill="{_colour(bar.colour)}"/>'
            )
            parts += [_ring(scale(point), middle) for point in bar.points]
            reach = max([end, *(scale(p) for p in bar.points)])
            if bar.interval:
                low, high = (scale(v) for v in bar.interval)
                parts.append(_whisker(low, high, middle))
                reach = max(reach, high)
            parts.append(_text(reach + 7, middle + 4, f"{bar.value:.1f}", "h"))
            parts.append("</g>")
            y += 24
        y += 4
    return _svg(height, title, parts)


def dot_chart(rows: Mapping[str, Sequence[Mark]], title: str) -> str:
    """One row a name, one dot a series on it; series differ in colour and shape.

    Args:
        rows: Name to its dots, from 0 to 100; a series keeps its colour over all rows.
        title: For readers who do not see the chart.

    Returns:
        An `<svg>` element, the legend on top.
    """
    ticks = nice_ticks(0.0, 100.0)
    left, right = 190.0, _WIDTH - 24.0
    scale = _Scale(0.0, 100.0, left, right)
    height = 34 + 30 * len(rows) + 26
    parts, x = _axis(ticks, scale, height - 22), left
    seen: dict[str, int] = {}
    parts += _grid(ticks, scale, 30, height - 22)
    for mark in (mark for marks in rows.values() for mark in marks):
        seen.setdefault(mark.label, mark.colour)
    for label, colour in seen.items():
        parts.append(_shape(x + 6, 12, colour))
        parts.append(_text(x + 17, 16, label))
        x += 34 + 7.4 * len(label)
    for number, (name, marks) in enumerate(rows.items()):
        y = 34 + 30 * number + 15
        parts.append(_text(left - 10, y + 4, name, "", "end"))
        parts.append(f'<line class="rail" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        for place, mark in enumerate(marks):
            # Spread over the row's height, so that equal values stay visible.
            at = y + (place - (len(marks) - 1) / 2) * 6
            parts.append(f"<g><title>{escape(f'{name} · {mark.tip}')}</title>")
            if mark.interval:
                low, high = (scale(v) for v in mark.interval)
                parts.append(
                    f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{at:.1f}" y2="{at:.1f}" '
                    f'stroke="{_colour(mark.colour)}" stroke-width="2" opacity=".55"/>'
                )
            parts.append(_shape(scale(mark.value), at, mark.colour))
            parts.append("</g>")
    return _svg(height, title, parts)


def line_chart(lines: Sequence[Line], title: str, x_label: str = "step") -> str:
    """Curves over a common axis, with a legend where they have names; equal names share an entry.

    Args:
        lines: At least one point each.
        title: For readers who do not see the chart.
        x_label: Below the axis.

    Returns:
        An `<svg>` element, about half as wide as the others.
    """
    width, height, left, bottom = 380.0, 230.0, 44.0, 36.0
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 4), nice_ticks(min(ys), max(ys), 4)
    x_of = _Scale(min(xs), max(*xs, min(xs) + 1e-9), left, width - 12)
    y_of = _Scale(y_ticks[0], y_ticks[-1], height - bottom, 10)
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "m s", "end"))
    for tick in x_ticks:
        if min(xs) <= tick <= max(xs):
            parts.append(_text(x_of(tick), height - bottom + 16, f"{tick:g}", "m s", "middle"))
    parts.append(_text(width - 12, height - 4, x_label, "m s", "end"))
    legend: list[str] = []
    for line in lines:
        dash = _DASHES[line.colour % len(_DASHES)]
        points = " ".join(
            f"{x_of(x):.1f},{y_of(y):.1f}"
            for x, y in _thinned(list(zip(line.x, line.y, strict=True)))
        )
        stroke = f'stroke="{_colour(line.colour)}" stroke-dasharray="{dash}"'
        parts.append(
            f"<g><title>{escape(line.label)}: {line.y[0]:.3f} → {line.y[-1]:.3f}</title>"
            f'<polyline class="line" {stroke} points="{points}"/></g>'
        )
        if line.label and line.label not in legend:
            y = 18 + 16 * len(legend)
            legend.append(line.label)
            parts.append(_text(width - 50, y + 4, line.label, "s", "end"))
            parts.append(f'<path class="line" {stroke} d="M{width - 44} {y}h30"/>')
    return _svg(height, title, parts, width)


def forest_chart(rows: Sequence[Effect], title: str, labels: tuple[str, str]) -> str:
    """Differences with intervals around a line at zero.

    Args:
        rows: From top to bottom.
        title: For readers who do not see the chart.
        labels: What it means to lie left and right of zero.

    Returns:
        An `<svg>` element.
    """
    values = [v for row in rows for v in (*row.interval, *row.points, row.delta, 0.0)]
    ticks = nice_ticks(min(values), max(values))
    left, right = 200.0, _WIDTH - 236.0
    scale = _Scale(ticks[0], ticks[-1], left, right)
    height = 30 + 28 * len(rows) + 26
    zero = scale(0.0)
    parts = _axis(ticks, scale, height - 22) + _grid(ticks, scale, 24, height - 22)
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="24" y2="{height - 22}"/>')
    # A heading of a side is left out where the side is too narrow to hold it.
    if zero - left > 6.6 * len(labels[0]):
        parts.append(_text(zero - 8, 15, f"← {labels[0]}", "m s", "end"))
    parts.append(_text(zero + 8, 15, f"{labels[1]} →", "m s"))
    for number, row in enumerate(rows):
        y = 30 + 28 * number + 14
        low, high = (scale(v) for v in row.interval)
        text = f"{row.delta:+.1f} [{row.interval[0]:+.1f}, {row.interval[1]:+.1f}]"
        parts.append(f"<g><title>{escape(f'{row.label}: {text} {row.note}')}</title>")
        parts.append(_text(left - 12, y + 4, row.label, "" if row.strong else "m s", "end"))
        parts.append(_whisker(low, high, y))
        parts += [_ring(scale(point), y) for point in row.points]
        x, size = scale(row.delta), 6.5 if row.strong else 4.5
        diamond = f"{x - size:.1f},{y} {x:.1f},{y - size} {x + size:.1f},{y} {x:.1f},{y + size}"
        parts.append(f'<polygon points="{diamond}" fill="{_colour(0 if row.strong else 2)}"/>')
        parts.append(_text(right + 14, y + 4, text, "" if row.strong else "m s"))
        parts.append(_text(_WIDTH, y + 4, row.note, "m s", "end"))
        parts.append("</g>")
    return _svg(height, title, parts)


def standalone(svg: str) -> str:
    """A chart as a file of its own: style and background inside.

    Args:
        svg: What a chart function returned.
    """
    head, _, rest = svg.partition(">")
    head = re.sub(
        r'viewBox="0 0 ([\d.]+) ([\d.]+)"',
        lambda m: f'viewBox="-16 -8 {float(m[1]) + 32:g} {float(m[2]) + 16:g}"',
        head,
    )
    paper = '<rect x="-16" y="-8" width="100%" height="100%" style="fill: var(--bg)"/>'
    return f"{head}><style>{CHART_CSS}</style>{paper}{rest}\n"


def stacked(charts: Mapping[str, str]) -> str:
    """Charts below each other in one, each under its heading.

    Args:
        charts: Heading to what a chart function returned.

    Returns:
        An `<svg>` element.
    """
    parts, y = [], 8.0
    for heading, svg in charts.items():
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert size is not None
        parts.append(_text(0, y + 16, heading, "h"))
        place = f'<svg y="{y + 26:g}" width="{size[1]}" height="{size[2]}" '
        parts.append(svg.replace("<svg ", place, 1))
        y += 26 + float(size[2]) + 12
    return _svg(y, ", ".join(charts), parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose a range, about `count` of them."""
    span = high - low if high - low > 1e-9 else max(abs(high), 1.0)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


class _Scale:
    """A linear map from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.factor = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _thinned(points: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    every = math.ceil(len(points) / most)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def _whisker(low: float, high: float, y: float) -> str:
    path = f'd="M{low:.1f} {y - 4}v8M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 4}v8"'
    # The halo keeps the whisker visible on a bar of any colour.
    return f'<path class="halo" {path}/><path class="whisker" {path}/>'


def _ring(x: float, y: float) -> str:
    return f'<circle class="seed" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def _shape(x: float, y: float, colour: int) -> str:
    size = 5.0
    fill = f'fill="{_colour(colour)}" stroke="var(--bg)" stroke-width="1"'
    if colour % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {fill}/>'
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((-1.25, 0), (0, -1.25), (1.25, 0), (0, 1.25)),
        3: ((0, -1.2), (1.2, 1), (-1.2, 1)),
    }[colour % 4]
    points = " ".join(f"{x + size * 0.9 * a:.1f},{y + size * 0.9 * b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" {fill}/>'


def _axis(ticks: Sequence[float], scale: _Scale, y: float) -> list[str]:
    return [_text(scale(tick), y + 15, f"{tick:g}", "m s", "middle") for tick in ticks]


def _grid(ticks: Sequence[float], scale: _Scale, top: float, bottom: float) -> list[str]:
    return [f'<path class="grid" d="M{scale(tick):.1f} {top:.1f}V{bottom:.1f}"/>' for tick in ticks]


def _svg(height: float, title: str, parts: Sequence[str], width: float = _WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
