"""Pages of results: templates filled with facts, everything they show inside them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from llm2clip_vlm.evaluation.report.charts import drawable, short

THUMBNAIL_PX = 192
"""Longest side of a picture in a list of examples."""

_MARKDOWN = (
    (r"([\\`*|~$\[\]]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[#>+=-])", r"\\\1"),
    (r"^(\d+)([.)])", r"\1\\\2"),
    (r"&(?=#?\w+;)", "&amp;"),
    (r"<(?=\S)", "&lt;"),
)
"""What Markdown or HTML would read as more than text, and how it is written as text."""


def render(template: str, **facts: Any) -> str:
    """A filled template; texts in a page or drawing are escaped, curves and colours are not.

    Args:
        template: File below `templates/`.
        facts: What it names; the time of writing is there as `now`.
    """
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return drawable(_environment().get_template(template).render(now=now, **facts))


def data_uri(picture: Image.Image, side: int = THUMBNAIL_PX) -> str:
    """A picture inside a page: PNG where it is small, else a JPEG with the longest side given."""
    small = max(picture.size) <= THUMBNAIL_PX
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def markdown(text: str) -> str:
    """A text on one line that Markdown and its tables show as it is."""
    text = " ".join(text.split())
    for pattern, replacement in _MARKDOWN:
        text = re.sub(pattern, replacement, text)
    return text


def clock(seconds: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def rows(table: Mapping[str, Mapping[str, Any]], *keys: str) -> list[list[Any]]:
    """Rows of a table: each name with the values of some of its keys."""
    return [[name, *(found[key] for key in keys)] for name, found in table.items()]


def share(value: float, ticks: Sequence[float], start: float = 0.0, length: float = 100.0) -> float:
    """Where a value lies along an axis."""
    return round(start + length * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llm2clip_vlm.evaluation.report"),
        autoescape=select_autoescape(("html", "svg")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clock": clock,
        "data_uri": data_uri,
        "interval": lambda ends: "[{:+.1f}, {:+.1f}]".format(*ends) if ends else "-",
        "md": markdown,
        "mean": fmean,
        "p_value": lambda p: "-" if p is None else f"{p:.2g}",
        "rows": rows,
        "short": short,
        "share": share,
    }
    return environment
