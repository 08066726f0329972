"""`llm2clip-vlm app` in headless Chromium, through the page itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import REPO_ROOT
from tests.play_fixtures import write_finished
from tests.tiny import write_image

pytest.importorskip("gradio", reason="needs the extra `app` (gradio)")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra `dev`)")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    return write_finished(tmp_path_factory.mktemp("app"), tiny_llm)


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(run.parent / "cache")}
    command = [sys.executable, "-m", "llm2clip_vlm.cli", "app", str(run), "--device", "cpu"]
    app = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPO_ROOT
    )
    try:
        assert app.stdout is not None
        first = app.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+/", first)
        assert found is not None, first
        yield found[0]
    finally:
        app.terminate()
        app.wait(timeout=60)


class Visit:
    """A browser on the page; what it asked for and what its console said."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.said, self.hosts = page, list[str](), set[str]()
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        page.set_default_timeout(120_000)
        page.goto(url)
        self.tab("chat")

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.said.append(message.text)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def upload(self, picture: Path) -> None:
        self.page.locator("input[type=file]:visible, input[type=file]").first.set_input_files(
            str(picture)
        )

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        wide: int = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wide


@pytest.fixture
def visit(url: str) -> Iterator[Visit]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        visit = Visit(browser.new_page(viewport={"width": 1280, "height": 900}), url)
        yield visit
        browser.close()
    assert visit.said == []
    assert visit.hosts - {None} == {"127.0.0.1"}  # no other host is asked for anything


def test_the_page_is_used_from_a_desk_and_a_phone(visit: Visit, run: Path, tmp_path: Path) -> None:
    page, picture = visit.page, write_image(tmp_path / "a.png", 3, size_px=64)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        visit.tab("chat")
        page.locator("input[type=file]").first.set_input_files(str(picture))
        question = page.get_by_label("question")
        question.fill("what color is it ?")
        question.press("Enter")
        page.get_by_role("button", name="left is better").wait_for()
        answers = page.locator("[data-testid=bot]")
        assert answers.count() == 2 and all(text.strip() for text in answers.all_inner_texts())
        assert visit.overflow() <= 0
        page.get_by_role("button", name="left is better").click()
        page.get_by_text("exact 95 % interval").wait_for()

        visit.tab("search")
        page.get_by_label("words", exact=True).fill("a red dog")
        page.get_by_label("words", exact=True).press("Enter")
        page.locator(".grid-wrap img:visible").nth(11).wait_for()
        assert page.locator(".grid-wrap img:visible").count() == 12
        assert visit.overflow() <= 0

        visit.tab("look")
        page.locator("input[type=file]").last.set_input_files(str(picture))
        page.get_by_label("words, with commas").fill("dog, circle")
        page.get_by_label("words, with commas").press("Enter")
        page.get_by_text(re.compile(r"^dog -?\d.* / ")).first.wait_for()
        assert page.locator(".grid-wrap img:visible").count() == 4
        assert visit.overflow() <= 0

        visit.tab("runs")
        page.get_by_text("stage4_instruction").filter(visible=True).first.wait_for()
        page.locator("canvas:visible, svg.marks:visible").first.wait_for()
        assert visit.overflow() <= 0
        page.reload()
        visit.tab("chat")
    votes = [json.loads(line) for line in (run / "votes.jsonl").read_text().splitlines()]
    assert [vote["vote"] for vote in votes] == ["left", "left"]
    assert {votes[0]["left"], votes[0]["right"]} == {"vlm/mine", "vlm/rival"}
    (turn,) = votes[0]["turns"][0]
    assert turn[0] == "what color is it ?" and turn[1]


def test_a_file_that_is_no_picture_is_a_message(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    page = visit.page
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "a.png"))
    page.get_by_label("question").fill("what ?")
    page.get_by_label("question").press("Enter")
    page.get_by_text("image 'a.png' does not decode").first.wait_for()


def test_a_conversation_that_was_cleared_has_no_vote(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("question").fill("what ?")
    page.get_by_label("question").press("Enter")
    vote = page.get_by_role("button", name="left is better")
    vote.wait_for()
    page.get_by_label("Clear").first.click()
    vote.wait_for(state="hidden", timeout=10_000)
    assert page.get_by_text("Which answers are better").count() == 0


def test_a_phone_shows_whole_captions_and_all_pictures(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.set_viewport_size({"width": 390, "height": 900})
    visit.tab("search")
    page.get_by_label("words", exact=True).press("Enter")
    page.get_by_text("type some words").first.wait_for()
    visit.tab("look")
    picture = write_image(tmp_path / "a.png", 3, size_px=64)
    page.locator("input[type=file]").last.set_input_files(str(picture))
    words = page.get_by_label("words, with commas")
    words.fill(", ".join(["a dog in the snow beside a circle"] * 9))
    words.press("Enter")
    page.locator(".grid-wrap img:visible").nth(17).wait_for()
    cut = "[...document.querySelectorAll('.caption-label, .grid-wrap')].filter(shown => "
    cut += (
        "shown.scrollWidth > shown.clientWidth + 1 || shown.scrollHeight > shown.clientHeight + 1)"
    )
    assert page.evaluate(cut + ".map(shown => shown.className)") == []
