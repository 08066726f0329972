"""The site of the docs: it builds without a warning, and its reference is the program's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm2clip_vlm.cli import STAGES
from llm2clip_vlm.recipe.stages import RECIPES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=repo_root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return out


def test_every_page_is_built_and_in_the_navigation(site: Path, repo_root: Path) -> None:
    pages = {
        p.relative_to(repo_root / "docs").with_suffix("") for p in (repo_root / "docs").glob("*.md")
    }
    home = (site / "index.html").read_text()
    for page in pages:
        assert (site / page).with_suffix(".html").is_file()
        assert f'href="{page}.html"' in home or page.name == "index", f"{page} is not in mkdocs.yml"


def test_the_reference_has_every_command_stage_and_public_name(site: Path) -> None:
    import llm2clip_vlm

    commands = (site / "reference/commands.html").read_text()
    for command in ("train", "help", "doctor", "embed", "export", "convert", "eval", "compare"):
        assert f'id="{command}"' in commands
    recipes = (site / "reference/recipes.html").read_text()
    for stage in STAGES.keys() & RECIPES.keys():
        assert f'id="{stage}"' in recipes
        assert "output_dir: " in recipes
    python = (site / "reference/python.html").read_text()
    for name in llm2clip_vlm.__all__:
        assert name.startswith("_") or f"llm2clip_vlm.{name}" in python, name


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for mark in ('src="http', 'href="https://fonts.', "@import"):
            assert mark not in text, f"{page.name}: {mark}"
