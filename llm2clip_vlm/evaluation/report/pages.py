"""Pages of results: templates filled with facts, everything they show inside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from llm2clip_vlm.evaluation.report.charts import chart_css

THUMBNAIL_PX = 192
"""Longest side of a picture in a page."""


def render(template: str, **facts: Any) -> str:
    """A filled template; texts in an HTML page are escaped, charts and colours are not.

    Args:
        template: File below `templates/`.
        facts: What it names; the time of writing is there as `now`.
    """
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return _environment().get_template(template).render(now=now, **facts)


def data_uri(picture: Image.Image) -> str:
    """A picture inside a page: PNG where it is small, else a JPEG of :data:`THUMBNAIL_PX`."""
    small = max(picture.size) <= THUMBNAIL_PX
    if not small:
        picture = picture.copy()
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def clock(seconds: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def rows(table: Mapping[str, Mapping[str, Any]], *keys: str) -> list[list[Any]]:
    """Rows of a table: each name with the values of some of its keys."""
    return [[name, *(found[key] for key in keys)] for name, found in table.items()]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llm2clip_vlm.evaluation.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clock": clock,
        "data_uri": data_uri,
        "interval": lambda ends: "[{:+.1f}, {:+.1f}]".format(*ends) if ends else "-",
        "mean": fmean,
        "p_value": lambda p: "-" if p is None else f"{p:.2g}",
        "rows": rows,
    }
    environment.globals["colours"] = chart_css()
    return environment
