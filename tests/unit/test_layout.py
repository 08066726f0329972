"""The floor plan: small folders, small files, pages that name what is there, plain sentences."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("llm2clip_vlm", "stages", "eval", "demo")
MODULES, LINES = 12, 400
CODE = {("llm2clip_vlm", "stages", "eval"): 23_320, ("demo",): 1_500}
"""Most lines of code in these folders together; raising it needs a reason in the commit."""
_NAMES = [path.stem for path in (ROOT / "llm2clip_vlm").iterdir() if path.suffix in ("", ".py")]
# What begins a sentence that does not stand alone, and "None" in another than the fixed form.
FRAGMENT = re.compile(
    r"\A(?:As|By|For|From|In|Of|To|Whose|With)\b"
    r"|^\s+[\w*]+: (?:As|By|For|From|In|Of|To|Whose|With)\b"
    r"|[;,(] ?[Nn]one (?:=|if|where|when) |; none: |\bNone = ",
    re.MULTILINE,
)
NAMED = re.compile(rf"`((?:{'|'.join(_NAMES)})(?:/[\w/]*)?\.py)`")


def folders() -> list[Path]:
    found = [folder for name in SHIPPED for folder in (ROOT / name, *(ROOT / name).rglob("*"))]
    return [f for f in found if f.is_dir() and any(f.glob("*.py")) and f.name != "__pycache__"]


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_is_small(folder: Path) -> None:
    modules = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(modules) <= MODULES, f"{folder.relative_to(ROOT)}: {sorted(modules)}"
    for file in folder.glob("*.py"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= LINES, f"{file.relative_to(ROOT)} has {lines} lines, at most {LINES}"


def code_lines(file: Path) -> int:
    """Lines that hold code: no blanks, comments or strings that stand alone."""
    words = {line for node in ast.walk(ast.parse(file.read_text())) for line in text_lines(node)}
    with file.open("rb") as opened:
        tokens = list(tokenize.tokenize(opened.readline))[1:]  # the first is the encoding
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = [t for t in tokens if t.type not in (*empty, tokenize.ENDMARKER)]
    return len({line for t in code for line in range(t.start[0], t.end[0] + 1)} - words)


def text_lines(node: ast.AST) -> range:
    match node:
        case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
            return range(first, last + 1)
    return range(0)


@pytest.mark.parametrize("folders", CODE, ids="+".join)
def test_code_does_not_grow(folders: tuple[str, ...]) -> None:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lines = sum(map(code_lines, files))
    assert lines <= CODE[folders], f"{lines} lines of code, at most {CODE[folders]}: remove some"


@pytest.mark.parametrize("name", SHIPPED)
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    """And say what None means as "None: ...". Only the file's own sentences are looked at."""
    for file in (ROOT / name).rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts = (node.value for node in nodes if isinstance(node, ast.Expr))
        for text in texts:
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found = FRAGMENT.search(text.value)
                where = f"{file.relative_to(ROOT)}:{text.lineno}"
                assert not found, f"{where}: {found[0].strip()!r}, see CONTRIBUTING.md"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_name_modules_that_are_there(page: Path) -> None:
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / "llm2clip_vlm" / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/*.json")), ids=lambda p: p.name)
def test_a_committed_result_names_no_path_of_a_machine(path: Path) -> None:
    assert not re.findall(r'"(?:/|~|[A-Z]:\\)[^"]*"', path.read_text())
