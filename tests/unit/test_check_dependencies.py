"""The dependency checker finds what is declared in vain and what is not declared."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROJECT = """
[project]
dependencies = ["numpy>=1", "PyYAML"]
[project.optional-dependencies]
train = ["peft"]
dev = ["pytest", "ruff"]
[tool.llm2clip.dependencies]
imports = { yaml = "PyYAML" }
tools = { ruff = "Makefile" }
by_hand = ["timm"]
"""


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checker", ROOT / "tools/check_dependencies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "Makefile").write_text("check:\n\truff check\n")
    for folder in ("llm2clip_vlm", "stages", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "llm2clip_vlm" / "a.py").write_text(
        "import json\nimport numpy.linalg\nfrom llm2clip_vlm import b\n\n"
        "def f():\n    import peft\n"
    )
    (tmp_path / "llm2clip_vlm" / "b.py").write_text("from yaml import safe_load\n")
    (tmp_path / "tests" / "test_a.py").write_text("import pytest\nimport llm2clip_vlm\n")
    return tmp_path


def test_a_clean_project_passes(checker: ModuleType, project: Path) -> None:
    assert checker.check(project) == []


def test_an_undeclared_import_fails(checker: ModuleType, project: Path) -> None:
    (project / "stages" / "s.py").write_text("x = 1\nimport scipy.stats\n")
    assert checker.check(project) == ["stages/s.py:2: `scipy` is imported but scipy is undeclared"]


def test_what_users_install_by_hand_is_imported_late(checker: ModuleType, project: Path) -> None:
    (project / "llm2clip_vlm" / "c.py").write_text("def f():\n    import timm\n")
    assert checker.check(project) == []
    (project / "llm2clip_vlm" / "c.py").write_text("import timm\n")
    assert checker.check(project) == [
        "llm2clip_vlm/c.py:1: `timm` is imported but timm is undeclared"
    ]


def test_an_unused_declaration_fails(checker: ModuleType, project: Path) -> None:
    (project / "llm2clip_vlm" / "b.py").write_text("")
    assert checker.check(project) == ["pyproject.toml: pyyaml is declared but nothing imports it"]


def test_what_only_tests_need_belongs_to_dev(checker: ModuleType, project: Path) -> None:
    (project / "llm2clip_vlm" / "b.py").write_text("")
    (project / "tests" / "test_b.py").write_text("import yaml\n")
    assert checker.check(project) == ["pyproject.toml: only tests import pyyaml: move it to `dev`"]


def test_the_library_imports_extras_late(checker: ModuleType, project: Path) -> None:
    (project / "llm2clip_vlm" / "b.py").write_text("import yaml\nimport peft\n")
    assert "b.py:2: `peft` comes with the extra `train`" in checker.check(project)[0]


def test_shipped_code_does_not_import_dev_tools(checker: ModuleType, project: Path) -> None:
    (project / "stages" / "s.py").write_text("import pytest\n")
    assert checker.check(project) == [
        "stages/s.py:1: `pytest` is imported but pytest is undeclared"
    ]


def test_a_tool_must_be_run(checker: ModuleType, project: Path) -> None:
    (project / "Makefile").write_text("")
    assert checker.check(project) == ["pyproject.toml: Makefile does not run ruff"]
