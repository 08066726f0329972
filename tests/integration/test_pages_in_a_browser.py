"""The pages in headless Chromium: no console error, every chart drawn, no wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm import cli
from tests.report_fixtures import (
    ab_recipe,
    load_program,
    report_recipe,
    write_json,
    write_run,
)

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PROBE = """<script>
window.addEventListener("load", () => {
  const visible = (e) => {
    const box = e.getBoundingClientRect();
    return box.width > 200 && box.height > 40;
  };
  const charts = [...document.querySelectorAll("svg.chart")];
  const marks = charts.map((c) => [...c.querySelectorAll("path, use")].filter(
    (e) => e.getBoundingClientRect().width > 4).length);
  document.title = JSON.stringify({
    charts: charts.length, shown: charts.filter(visible).length, marks: Math.min(...marks),
    images: [...document.images].filter((i) => i.complete && i.naturalWidth > 0).length,
    broken: [...document.images].filter((i) => !i.naturalWidth).length,
    wide: document.documentElement.scrollWidth, window: window.innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector(".chart text")).fill });
});
</script>"""


def look(page: Path, width: int = 900, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Open a copy of a page that measures itself; the measurements, and what the console said."""
    copy = page.with_suffix(".probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), "utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", *scheme,
            f"--window-size={width},2000", "--virtual-time-budget=5000", "--dump-dom", f"file://{copy}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(title[0]) if title else {}, console


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Path]:
    root = write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1, 2))
    ab = write_json(root / "ab.yaml", ab_recipe(root))
    assert load_program(repo_root, "ab").main([str(ab)]) == 0
    recipe = write_json(root / "report.yaml", report_recipe(root))
    assert load_program(repo_root, "report").main([str(recipe)]) == 0
    runs = [f"{root}/eval/{name}-s{{seed}}" for name in ("llm2clip", "base")]
    assert cli.main(["compare", *runs, "--out", str(root / "compared")]) == 0
    return {"report": root / "out/report.html", "compare": root / "compared/compare.html"}


@pytest.mark.parametrize(("name", "charts", "images"), [("report", 9, 0), ("compare", 1, 8)])
def test_the_page_opens_cleanly(
    pages: dict[str, Path], name: str, charts: int, images: int
) -> None:
    seen, console = look(pages[name])
    assert console == []
    assert seen["charts"] == charts == seen["shown"] and seen["marks"] >= 2
    assert seen["images"] >= images and seen["broken"] == 0
    phone, console = look(pages[name], width=500, dark=True)
    assert console == [] and phone["shown"] == charts
    assert phone["wide"] <= phone["window"]
    assert phone["paper"] != seen["paper"] and phone["ink"] != seen["ink"]


def test_an_error_on_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    page.write_text(
        "<head></head><body><script>undefinedName.x</script><img src='none.png'></body>"
    )
    _, console = look(page)
    assert any("undefinedName" in line for line in console)
