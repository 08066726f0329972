"""Models of all recipes, and their keys explained: on one screen, or one key in full."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llm2clip_vlm.recipe.base import RecipeFile
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import did_you_mean, elsewhere, fields_below, models_in, shown
from llm2clip_vlm.recipe.report import ReportRecipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.suite import SuiteRecipe

MODELS: dict[str, type[RecipeFile]] = {
    **RECIPES,
    "pipeline": PipelineRecipe,
    "run_encoder": EncoderEvalRecipe,
    "run_lmms": SuiteRecipe,
    "report": ReportRecipe,
}
"""Every program of the library that reads a recipe."""

_SCREEN_LINES, _WIDTH = 36, 100
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_ITEM = re.compile(r"\.(\d+|N|KEY)(?=\.|$)")
"""A part of a dotted key that names an item, not a key."""

_ANNOTATED = re.compile(r"Annotated\[(.*?), FieldInfo\(.*?\)\](?:\)\])?")


def recipe_screen(model: type[BaseModel]) -> str:
    """Describe the keys of a recipe on one screen: in groups, with default and purpose.

    Args:
        model: A recipe model.

    Returns:
        A line a key; one that has keys of its own is followed by `...`. Where that is more than a
        screen, keys that several recipes share stand close together, without their purpose.
    """
    groups: list[tuple[str, dict[str, FieldInfo]]] = []
    for kind in model.__mro__:
        names = inspect.get_annotations(kind).keys() - {"stage"}
        if own := {name: field for name, field in model.model_fields.items() if name in names}:
            groups.append((inspect.cleandoc(kind.__doc__ or "").split("\n")[0], own))
    lines: list[str] = []
    for close in range(len(groups) + 1):  # the most general ones first
        lines = []
        for place, (title, fields) in enumerate(groups):
            lines.append(title)
            lines += _close(fields) if place >= len(groups) - close else map(_line, fields.items())
        if len(lines) <= _SCREEN_LINES:
            break
    return "\n".join(lines)


def _line(item: tuple[str, FieldInfo]) -> str:
    name, field = item
    more = "..." if any(models_in(field.annotation)) else ""
    purpose = re.split(r"(?<=\w)[.;] |\.$", " ".join((field.description or "").split()))[0]
    line = f"  {name + more:<23} {_default(field):<12} {purpose}"
    return line if len(line) <= _WIDTH else line[: _WIDTH - 4].rpartition(" ")[0] + " ..."


def _close(fields: dict[str, FieldInfo]) -> list[str]:
    told = ", ".join(f"{name}\0=\0{_default(field)}" for name, field in fields.items())
    lines = textwrap.wrap(told.replace(" ", "\1").replace(",\1", ", "), _WIDTH - 2)
    return [f"  {line}".replace("\0", " ").replace("\1", " ") for line in lines]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    value = str(value).lower() if isinstance(value, bool) else value
    return "{...}" if isinstance(value, BaseModel) else shown(value).strip("'") or "''"


def recipe_help(model: type[BaseModel], key: str = "") -> str:
    """Describe keys in full: dotted name, type, limits, default, and docstring.

    Args:
        model: A recipe model.
        key: One of them, with all below it; empty = every key.

    Returns:
        Two lines or more a key; `N` stands for an index and `KEY` for any name.

    Raises:
        ValueError: There is no such key.
    """
    wanted, lines = _ITEM.sub("", key), []
    for name, field in fields_below(model):
        plain = _ITEM.sub("", name)
        if wanted and plain != wanted and not plain.startswith(f"{wanted}."):
            continue
        kind = re.sub(r"[a-z_\d]+\.", "", inspect.formatannotation(field.annotation))
        kind = _ANNOTATED.sub(r"\1", kind)
        limits = [
            f" {sign} {getattr(limit, attribute)}"
            for limit in field.metadata
            for attribute, sign in _SIGNS.items()
            if hasattr(limit, attribute)
        ]
        default = field.get_default(call_default_factory=True)
        told = "" if isinstance(default, BaseModel) else f" = {shown(default)}"
        told = " (required)" if field.is_required() else told
        lines.append(f"{name}: {kind}{','.join(limits)}{told}")
        lines.append(textwrap.indent(inspect.cleandoc(field.description or ""), "    "))
    if not lines:
        known = {_ITEM.sub("", name): field.annotation for name, field in fields_below(model)}
        for above, annotation in known.items():
            part = wanted.removeprefix(f"{above}.").split(".")[0]
            names = get_args(annotation)[0] if get_origin(annotation) is dict else None
            if wanted.startswith(f"{above}.") and (names is str or part in get_args(names)):
                return recipe_help(model, above)  # the rest is an item of a mapping
        hint = did_you_mean(key, known) or elsewhere(key, model) or "; `help STAGE` lists them"
        raise ValueError(f"no key `{key}`{hint}")
    return "\n".join(lines)
