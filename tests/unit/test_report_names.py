"""Names of models and tasks in charts: drawn as they are, whatever they mean elsewhere."""

from __future__ import annotations

import xml.dom.minidom
from html import escape

import pytest

from llm2clip_vlm.evaluation.report.charts import (
    Line,
    Mark,
    bar_chart,
    forest_chart,
    line_chart,
    standalone,
)

NAMES = [
    r"$\frac{1}{2}$", r"$\frac{1", "a$b$c", "$5 and $6", "x_1^2", "_hidden", "<script>x</script>",
    "a & b", 'q"uote', "font-family: x", "#1f77b4", "{}", "%s", "\\", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "\x1b[31m", "half \ud83d", "a\0b", "tip z", 'id="x'])
def test_a_name_is_drawn_literally(name: str) -> None:
    mark = Mark(name, 1.0, (0.5, 2.0), note=name)
    charts = [
        bar_chart({name: [mark]}, name),
        line_chart([Line(name, [1, 2], [1.0, 2.0]), Line("b", [1, 2], [2.0, 1.0], 1)], name),
        forest_chart({name: [mark]}, name, (name, name)),
    ]
    for chart in charts:
        xml.dom.minidom.parseString(standalone(chart))
        assert "<script" not in chart
        if name in NAMES:
            assert f">{escape(name, quote=False)}" in chart or f"{escape(name)}" in chart
