"""Write JSON schemas of all recipes for editors, and name them in every shipped recipe.

Editors with the YAML language server complete keys, show their docstrings and mark what is wrong.
What only a whole recipe can tell (required keys, which `base:` may give) is left to the program.

    python tools/write_schemas.py     (or: make schema)
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.recipe.explain import MODELS
from llm2clip_vlm.recipe.suite import ExpectedScores

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "recipes" / "schema"
REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""What may stand for any value: `${another.key}`."""
_PROGRAM = re.compile(r"\b(?:stages|eval|demo)/(\w+)\.py")
_LINE = "# yaml-language-server: $schema="


def models() -> dict[str, type[BaseModel]]:
    """Every program that reads a recipe, the demo's included, and what the recipe is read by."""
    sys.path.append(str(ROOT / "demo"))
    from world.recipe import LanguageModelRecipe  # its program would import torch

    return {
        **MODELS,
        "base_language_model": LanguageModelRecipe,
        "ab": load_program(find_program("ab")).AbRecipe,
        "prepare_real": load_program(find_program("prepare_real")).PrepareRecipe,
        "expected": ExpectedScores,
    }


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema as a file may be written: in parts, and with references."""
    schema: dict[str, Any] = _loosened(model.model_json_schema())
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _loosened(part: Any, *, named: bool = False) -> Any:
    """Without required keys and titles; a value that is no free text may be a reference.

    Args:
        part: Of a schema.
        named: Its keys are names of properties or definitions.
    """
    if isinstance(part, list):
        return [_loosened(item) for item in part]
    if not isinstance(part, dict):
        return part
    inside = {"properties", "$defs"}
    kept = {
        name: _loosened(item, named=name in inside and not named)
        for name, item in part.items()
        if named or name not in {"required", "title", "discriminator"}
    }
    if not named:
        for name, value in kept.get("properties", {}).items():
            kept["properties"][name] = _or_reference(value)
        for name in {"additionalProperties", "items"} & kept.keys():
            kept[name] = _or_reference(kept[name])
    return kept


def _or_reference(value: Any) -> Any:
    if not isinstance(value, dict) or (value.get("type") == "string" and len(value) == 1):
        return value
    said = {key: value.pop(key) for key in ("description", "default") if key in value}
    return said | {"anyOf": [value, REFERENCE]}


def shipped() -> Iterator[tuple[Path, str]]:
    """Every shipped recipe and suite, and the program that reads it."""
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        if file.parent.name != "accelerate":
            comment = "\n".join(re.findall(r"(?m)^#.*", file.read_text(encoding="utf-8")))
            yield file, next(n for n in _PROGRAM.findall(comment) if n != "draw_world")
    for folder, program in (
        ("eval/suites", "run_lmms"),
        ("demo/suites", "run_lmms"),
        ("eval/expected", "expected"),
    ):
        for file in sorted((ROOT / folder).glob("*.yaml")):
            yield file, program


def with_schema(file: Path, program: str) -> str:
    """The text of a recipe whose first line names its schema."""
    place = os.path.relpath(SCHEMAS / f"{program}.json", file.parent)
    text = file.read_text(encoding="utf-8")
    rest = text.partition("\n")[2] if text.startswith(_LINE) else text
    return f"{_LINE}{place}\n{rest}"


def texts() -> dict[Path, str]:
    """Every file that this program writes, and what belongs into it."""
    made = {
        SCHEMAS / f"{name}.json": json.dumps(schema_of(model), indent=1, ensure_ascii=False) + "\n"
        for name, model in models().items()
    }
    return made | {file: with_schema(file, program) for file, program in shipped()}


def main() -> None:
    """Write what is not current."""
    SCHEMAS.mkdir(exist_ok=True)
    for file, text in texts().items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
