"""Compare what `pyproject.toml` declares with what the code imports; part of `make check`.

Fails if a declared dependency is imported nowhere, if an import is declared nowhere, or if the
library imports at its top level what only an extra brings. Tools that are run, not imported, are
listed in `[tool.llm2clip.dependencies]` with the file that runs them.

    python tools/check_dependencies.py [ROOT]
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHIPPED = ("llm2clip_vlm", "stages", "eval", "demo")
"""Folders that travel in the wheel."""
OTHERS = ("benchmarks", "tests", "tools")
"""Folders that only a checkout has: they may use every extra."""
OPTIONAL_EXTRAS = ("train", "eval", "timm", "app", "remote")


def normal(name: str) -> str:
    """A distribution's name as indexes compare it: `PyYAML>=6` is `pyyaml`."""
    bare = re.match(r"[A-Za-z0-9._-]+", name)
    assert bare is not None, name
    return re.sub(r"[-_.]+", "-", bare[0]).lower()


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (top-level package, line, whether it is imported when the module is)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if lazy:
            inside.update(ast.walk(node))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        for name in names:
            yield name.split(".")[0], node.lineno, node not in inside  # type: ignore[attr-defined]


def check(root: Path) -> list[str]:
    """Everything that is wrong, a line each."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    extras: dict[str, list[str]] = project["project"].get("optional-dependencies", {})
    own: dict[str, Any] = project.get("tool", {}).get("llm2clip", {}).get("dependencies", {})
    renamed = {name: normal(target) for name, target in own.get("imports", {}).items()}
    tools = {normal(name): place for name, place in own.get("tools", {}).items()}
    core = {normal(item) for item in project["project"].get("dependencies", [])}
    by_extra = {name: {normal(item) for item in items} for name, items in extras.items()}
    optional = set().union(*(by_extra.get(name, set()) for name in OPTIONAL_EXTRAS))
    everything = core.union(*by_extra.values())

    plugins = {Path(name) for name in own.get("plugins", [])}
    by_hand = set(own.get("by_hand", []))
    problems = [
        f"pyproject.toml: plugins: there is no {name}"
        for name in plugins
        if not (root / name).is_file()
    ]
    used: dict[str, set[str]] = {}
    files = [file for folder in (*SHIPPED, *OTHERS) for file in (root / folder).rglob("*.py")]
    # Packages that lie beside programs (`demo/world`) count as local, too.
    local = {*SHIPPED, *OTHERS, *(n for file in files for n in (file.stem, file.parent.name))}
    for file in sorted(files):
        place = file.relative_to(root)
        shipped = place.parts[0] in SHIPPED
        for name, line, at_import in imports_of(file):
            if name in sys.stdlib_module_names or name in local:
                continue
            if name in by_hand and not at_import:
                continue
            package = renamed.get(name, normal(name))
            used.setdefault(package, set()).add(place.parts[0])
            allowed = core | optional if shipped else everything
            if package not in allowed:
                problems.append(f"{place}:{line}: `{name}` is imported but {package} is undeclared")
            elif at_import and package not in core and _lazy(place) and place not in plugins:
                extra = ", ".join(key for key, items in by_extra.items() if package in items)
                problems.append(
                    f"{place}:{line}: `{name}` comes with the extra `{extra}`: import it inside "
                    "the function that needs it"
                )
    for package in sorted(everything):
        if package in tools:
            if not (root / tools[package]).is_file():
                problems.append(f"pyproject.toml: {package} is run by {tools[package]}, not there")
            elif _command(package) not in (root / tools[package]).read_text(encoding="utf-8"):
                problems.append(f"pyproject.toml: {tools[package]} does not run {package}")
        elif package not in used:
            problems.append(f"pyproject.toml: {package} is declared but nothing imports it")
        elif package in core | optional and not used[package] & set(SHIPPED):
            folders = ", ".join(sorted(used[package]))
            problems.append(f"pyproject.toml: only {folders} import {package}: move it to `dev`")
    return problems


def _command(package: str) -> str:
    """What a tool's package is called where it is run."""
    return {"import-linter": "lint-imports"}.get(package, package)


def _lazy(place: Path) -> bool:
    """Whether a file must import without any extra."""
    return place.parts[0] == "llm2clip_vlm"


def main() -> int:
    """Print the problems; exit code 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    problems = check(root)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
