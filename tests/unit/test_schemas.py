"""The JSON schemas of recipes: current, named by every shipped recipe, and valid for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip_vlm.recipe.yaml_files import parse_yaml, read_yaml
from tools import write_schemas

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema validates what editors would")


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return write_schemas.texts()


def test_what_lies_there_is_current(texts: dict[Path, str]) -> None:
    stale = [
        str(file.relative_to(write_schemas.ROOT))
        for file, text in texts.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `make schema`"
    assert set(write_schemas.SCHEMAS.iterdir()) <= texts.keys()


def test_every_shipped_recipe_is_valid(texts: dict[Path, str]) -> None:
    schemas = {f.stem: json.loads(t) for f, t in texts.items() if f.suffix == ".json"}
    checks = {name: jsonschema.Draft7Validator(schema) for name, schema in schemas.items()}
    for check in checks.values():
        check.check_schema(check.schema)
    for file, program in write_schemas.shipped():
        wrong = [
            f"{'.'.join(map(str, e.path))}: {e.message}"
            for e in checks[program].iter_errors(read_yaml(file))
        ]
        assert not wrong, file


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("vlm: {vision_tower: x}", True),
        ("seed: ${variables.seed}", True),
        ("seed: many", False),
        ("vlm: {vision_towr: x}", False),
        ("vlm: {image_aspect_ratio: round}", False),
        ("data: [{path: x, limit: 0}]", False),
    ],
)
def test_a_schema_knows_right_from_wrong(texts: dict[Path, str], text: str, right: bool) -> None:
    schema = json.loads(texts[write_schemas.SCHEMAS / "stage3_projector.json"])
    assert jsonschema.Draft7Validator(schema).is_valid(parse_yaml(text, "x")) == right


def test_a_schema_carries_the_docstrings(texts: dict[Path, str]) -> None:
    schema = json.loads(texts[write_schemas.SCHEMAS / "stage3_projector.json"])
    assert "LLaVA's `plain` template" in schema["properties"]["plain"]["description"]
