"""MkDocs hook: writes the reference pages from what the program itself says.

Commands come from their parsers, recipes from their models, so that no page of the reference can be
older than the code.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from mkdocs.structure.files import File, Files

from llm2clip_vlm import __all__ as public
from llm2clip_vlm.cli import STAGES, main
from llm2clip_vlm.recipe.explain import MODELS, recipe_help


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("commands", _commands()), ("recipes", _recipes()), ("python", _python())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def _commands() -> str:
    overview = _help("--help")
    names = re.findall(r"^    (\w+)", overview, re.MULTILINE)
    pages = [f"## {name}\n\n```text\n{_help(name, '--help')}```\n" for name in names]
    return "\n".join(["# Commands\n", f"```text\n{overview}```\n", *pages])


def _help(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(words)
    return said.getvalue()


def _recipes() -> str:
    parts = ["# Recipes\n\nEvery key: its type, limits and default, and what it does."]
    titles = {"run_encoder": "eval, an encoder", "run_lmms": "eval, a suite"}
    for name in dict.fromkeys([name for name in STAGES if name in MODELS] + list(MODELS)):
        model = MODELS[name]
        purpose = STAGES.get(name, (model.__doc__ or "").partition("\n")[0])
        title = titles.get(name, name)
        parts.append(f"## {title}\n\n{purpose}\n\n```text\n{recipe_help(model)}\n```")
    return "\n\n".join(parts)


def _python() -> str:
    names = [name for name in public if not name.startswith("_")]
    parts = ["# Python\n\nThe public names of `llm2clip_vlm`; each module has more."]
    return "\n\n".join([*parts, *(f"::: llm2clip_vlm.{name}" for name in names)])
