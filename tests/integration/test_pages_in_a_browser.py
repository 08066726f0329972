"""The pages in headless Chromium: no console error, nothing cut off on a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm2clip_vlm import cli
from llm2clip_vlm.evaluation.report.comparison_pages import encoder_page
from llm2clip_vlm.evaluation.report.examples import Example
from llm2clip_vlm.evaluation.report.pages import render
from tests.report_fixtures import (
    load_program,
    report_recipe,
    write_json,
    write_run,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

NAME = "a_run_that_nobody_gave_a_short_name-llava-v1.5-13b-learning-rate-2e-5-3-epochs-seed-0"

CUT_OFF = """() => {
  const root = document.documentElement, found = [];
  if (root.scrollWidth > root.clientWidth) found.push(`page: ${root.scrollWidth} px wide`);
  for (const e of document.querySelectorAll("body *"))
    if (!e.closest("svg") && e.scrollWidth > e.clientWidth + 1
        && getComputedStyle(e).overflowX !== "visible") found.push(`${e.className} scrolls`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, e = text.parentElement;
    if (!text.data.trim() || e.closest("title, details:not([open]) > :not(summary)")) continue;
    const box = e.closest(".sides span, .track, td, th, .label, .value, .card, .tile, dd, dt, svg,"
      + "main, header").getBoundingClientRect();
    const range = document.createRange();
    range.selectNodeContents(text);
    for (const r of range.getClientRects())
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 4
          || r.right > root.clientWidth)
        found.push(`${text.data.trim()}: ${r.left}..${r.right} in ${box.left}..${box.right}`);
  }
  return found;
}"""

ARROWS = """() => [...document.querySelectorAll(".differences .panel")].map((panel) => {
  const zero = panel.querySelector(".zero").getBoundingClientRect().left;
  return [...panel.querySelectorAll(".sides .track span")].map((e) => {
    const range = document.createRange();
    range.selectNodeContents(e);
    const box = range.getBoundingClientRect();
    return [box.left - zero, box.right - zero];
  });
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Path]:
    root = write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1, 2), pictures=4)
    program = load_program(repo_root, "report")
    effect = {"delta": 9.0, "ci": [7.0, 11.0], "p": 0.0078, "deltas_by_seed": [8.0, 10.0]}
    ab = {
        "date": "2031-02-03",
        "seeds": [0, 1],
        "git": {"commit": None, "dirty": None},
        "data": "",
        "titles": {"x": "A benchmark with a title of many words, in pictures of Flickr"},
        "ab": {"x": {"llm2clip-control_long": {**effect, "n_seeds": 2}}},
    }
    write_json(root / "ab.json", ab)
    (root / "base").rename(root / NAME)
    recipe = report_recipe(root)
    recipe["towers"][NAME] = str(root / NAME)
    del recipe["towers"]["base"]
    recipe["tower_notes"] = {NAME: NAME * 3}
    facts = program.collect(
        program.load_recipe(write_json(root / "r.yaml", recipe), program.ReportRecipe)
    )
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    said = {name: (f"{name} " * 20, score) for name, score in (("llm2clip", 1.0), (NAME, 0.5))}
    example = Example(Image.fromarray(noise), "What is that?", "w" * 200, said)
    facts.retrieved, facts.answers = [example], [example]
    report = root / "report.html"
    report.write_text(render("report.html", facts=facts, charts=program.charts(facts)))
    runs = [f"{root}/eval/base-s{{seed}}", f"{NAME}={root}/eval/llm2clip-s{{seed}}"]
    assert cli.main(["compare", *runs, "--out", str(root / "compared")]) == 0
    result = {"task": "segmentation", "protocol": "windows " * 9, "seconds": 1.0, "miou": 40.0}
    result |= {"data_hash": "d" * 64, "ci": [30.0, 55.0], "chance_miou": 5.0}
    whole: dict[str, Any] = {"model": f"/models/{NAME}", "fingerprints": {"model": "f" * 64}}
    whole["results"] = {"segmentation": result | {"iou": {NAME: 12.5, "sky": 90.0, "sea": None}}}
    write_json(root / "encoder/results.json", whole)
    encoder = root / "encoder/encoder.html"
    encoder.write_text(encoder_page(root / "encoder", whole))
    return {"report": report, "compare": root / "compared/compare.html", "encoder": encoder}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("name", ["report", "compare", "encoder"])
def test_nothing_is_cut_off_at_any_width_light_and_dark(
    pages: dict[str, Path], browser: Any, name: str
) -> None:
    papers, said = set(), list[str]()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url))
        for width in (390, 768, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"file://{pages[name]}")
            assert page.evaluate(CUT_OFF) == [], (scheme, width)
            bars = page.locator(".bars").evaluate_all("all => all.map((e) => e.offsetHeight)")
            assert bars and min(bars) > 30
            for left, right in page.evaluate(ARROWS):
                assert -12 < left[1] <= 0 <= right[0] < 12, "arrows point away from zero"
        assert page.evaluate("[...document.images].every((i) => i.naturalWidth)") and said == []
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(papers) == 2


def test_a_name_at_the_head_of_a_column_is_broken_between_its_words(
    tmp_path: Path, browser: Any
) -> None:
    root = write_run(tmp_path, seeds=(0,), pictures=4)
    runs = [f"{name}={root}/eval/{name.split('-')[0]}-s0" for name in ("llm2clip", "base")]
    runs[1] = runs[1].replace("base=", "control_long-s0=")
    assert cli.main(["compare", *runs, "--out", str(root / "compared")]) == 0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"file://{root}/compared/compare.html")
    broken = """all => all.flatMap((e) => [...e.childNodes]).flatMap((text) =>
      [...(text.data || "").matchAll(/[^-_]+/g)].filter((word) => {
        const range = document.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        return range.getClientRects().length > 1;
      }).map((word) => word[0]))"""
    assert page.locator("th.name").evaluate_all(broken) == []
    page.close()


def test_what_is_cut_off_is_seen(tmp_path: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    for style in ("width: 500px", "width: 100px; overflow: hidden; white-space: nowrap"):
        (tmp_path / "x.html").write_text(f"<main style='{style}'>{'word ' * 40}<td></td></main>")
        page.goto(f"file://{tmp_path}/x.html")
        assert page.evaluate(CUT_OFF)
    page.close()
