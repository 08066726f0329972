"""Names of models and tasks in charts: drawn as they are, whatever they mean elsewhere."""

from __future__ import annotations

import xml.dom.minidom
from dataclasses import replace
from html import escape, unescape

import pytest

from llm2clip_vlm.evaluation.report.charts import Chart, Curves, Line, Mark, drawable
from llm2clip_vlm.evaluation.report.pages import render
from tests.report_fixtures import drawn_piece

NAMES = [
    r"$\frac{1}{2}$", r"$\frac{1", "a$b$c", "$5 and $6", "x_1^2", "_hidden", "<script>x</script>",
    "a & b", 'q"uote', "font-family: x", "#1f77b4", "{}", "%s", "\\", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "\x1b[31m", "half \ud83d", "a\0b", "tip z", 'id="x'])
def test_a_name_is_drawn_literally(name: str) -> None:
    chart = Chart(name, {name: [Mark(name, 1.0, (0.5, 2.0), note=name)]}, sides=(name, name))
    bars = replace(chart, sides=None, guesses={name: {name: 1.0}})
    curves = [Line(name, [1, 2], [1.0, 2.0]), Line("b", [1, 2], [2.0, 1.0], 1)]
    drawn = [
        render("differences.svg", chart=chart),
        drawable(drawn_piece(Curves(name, curves), "curves")),
        *(drawable(drawn_piece(which)) for which in (chart, bars)),
    ]
    for number, text in enumerate(drawn):
        assert "<script" not in text
        if number < 2:
            xml.dom.minidom.parseString(text)
        if name in NAMES:
            assert f">{escape(name, quote=False)}" in text or unescape(text).count(name) > 2
