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
from pydantic import BaseModel

from llm2clip_vlm import __all__ as public
from llm2clip_vlm.cli import STAGES, main
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import recipe_help
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.suite import SuiteRecipe


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
    models: dict[str, type[BaseModel]] = {
        **{name: RECIPES[name] for name in STAGES if name in RECIPES},
        "pipeline": PipelineRecipe,
        "eval, an encoder": EncoderEvalRecipe,
        "eval, a suite": SuiteRecipe,
    }
    for name, model in models.items():
        purpose = STAGES.get(name, (model.__doc__ or "").partition("\n")[0])
        parts.append(f"## {name}\n\n{purpose}\n\n```text\n{recipe_help(model)}\n```")
    return "\n\n".join(parts)


def _python() -> str:
    names = [name for name in public if not name.startswith("_")]
    parts = ["# Python\n\nThe public names of `llm2clip_vlm`; each module has more."]
    return "\n\n".join([*parts, *(f"::: llm2clip_vlm.{name}" for name in names)])
