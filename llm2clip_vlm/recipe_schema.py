"""What a recipe model knows about its keys: errors in its words, its defaults, its help text."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

MISSING = object()
"""What `default_at` returns where a recipe has no value."""

_KINDS = {
    str: "text",
    bool: "true/false",
    int: "integer",
    float: "number",
    dict: "mapping",
    list: "list",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe."""

    key: str
    """Dotted key; empty for the file as a whole."""
    message: str
    """What was expected and what was got."""
    where: str = ""
    """`file:line`, or the override."""

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        return f"{self.key}: {self.message}{place}" if self.key else f"{self.message}{place}"


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, in one message.

    Attributes:
        source: The file or override that was read.
        problems: One entry each.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n  ".join([f"recipe {source}: {count}", *map(str, self.problems)]))


def join(key: str, name: str) -> str:
    """The dotted key of `name` below `key`."""
    return f"{key}.{name}" if key else name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def where_from(key: str, origins: dict[str, str], fallback: str) -> str:
    """Where the value at `key`, or the nearest mapping above it, was written."""
    parts = key.split(".")
    for depth in range(len(parts), 0, -1):
        found = origins.get(".".join(parts[:depth]))
        if found is not None:
            return found
    return fallback


def all_keys(data: Any, key: str = "") -> Iterator[str]:
    """Every dotted key of a plain recipe."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = ((str(index), item) for index, item in enumerate(data))
    for name, value in items:
        yield join(key, name)
        yield from all_keys(value, join(key, name))


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation: through unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in sections(part)]


def default_at(data: Any, model: type[BaseModel], parts: Sequence[str]) -> Any:
    """The value at a dotted key: the recipe's own, else its model's default.

    Args:
        data: The merged recipe, plain.
        model: The model that will read it.
        parts: The dotted key, split.

    Returns:
        The value, or `MISSING` (also below a section that is not set).
    """
    models: list[type[BaseModel]] = [model]
    for part in parts:
        fields = [item.model_fields[part] for item in models if part in item.model_fields]
        if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, dict):
            defaults = [field for field in fields if not field.is_required()]
            if not defaults:
                return MISSING
            data = defaults[0].get_default(call_default_factory=True)
            data = data.model_dump() if isinstance(data, BaseModel) else data
        else:
            return MISSING
        if fields:
            models = [item for field in fields for item in sections(field.annotation)]
    return data


def explain(
    error: ValidationError,
    data: dict[str, Any],
    model: type[BaseModel],
    origins: dict[str, str],
    source: str,
) -> list[Problem]:
    """Turn pydantic's errors into problems that name dotted keys, lines and near misses.

    Args:
        error: What validation raised.
        data: The plain recipe that was validated.
        model: The model that refused it.
        origins: Dotted key to `file:line`.
        source: The recipe file, where nothing nearer is known.

    Returns:
        One problem per mistake; where a value may be one of several kinds, only the complaints of
        the kind that fits best.
    """
    plain: list[tuple[str, dict[str, Any]]] = []
    forks: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = {}
    for item in error.errors(include_url=False):
        key, fork, branch = _locate(item["loc"], item["type"], data)
        entry = (key, dict(item))
        if branch is None:
            plain.append(entry)
        else:
            forks.setdefault(fork, {}).setdefault(branch, []).append(entry)
    problems = [_problem(key, item, model, origins, source) for key, item in plain]
    for fork, branches in forks.items():
        deeper = [found for found in branches.values() if any(key != fork for key, _ in found)]
        if deeper:
            best = min(deeper, key=len)
            problems.extend(_problem(key, item, model, origins, source) for key, item in best)
            continue
        found = [item for items in branches.values() for _, item in items]
        wanted = " or ".join(dict.fromkeys(_expected(item) for item in found))
        message = f"expected {wanted}, got {_got(found[0]['input'])}"
        problems.append(Problem(fork, message, where_from(fork, origins, source)))
    return problems


def _locate(steps: tuple[int | str, ...], kind: str, data: Any) -> tuple[str, str, str | None]:
    """Split pydantic's location into the dotted key, the union above it, and the union's branch."""
    parts: list[str] = []
    fork, branch = "", None
    for depth, step in enumerate(steps):
        is_item = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if is_item or (isinstance(data, dict) and step in data):
            data = data[step]
            parts.append(str(step))
        elif kind == "missing" and depth == len(steps) - 1:
            parts.append(str(step))
        elif step != "[key]" and branch is None:
            fork, branch = ".".join(parts), str(step)
    return ".".join(parts), fork, branch


def _problem(
    key: str,
    item: dict[str, Any],
    model: type[BaseModel],
    origins: dict[str, str],
    source: str,
) -> Problem:
    place = where_from(key, origins, source)
    if item["type"] == "missing":
        return Problem(key, "required, but not given", place)
    if item["type"] == "extra_forbidden":
        above, _, name = key.rpartition(".")
        models = [model]
        for part in above.split("."):
            below = [m for item in models for m in _below(item, part)]
            models = below or models
        known = dict.fromkeys(name for section in models for name in section.model_fields)
        hint = did_you_mean(name, known) or f"; known here: {', '.join(known)}"
        return Problem(key, f"unknown key{hint}", place)
    if item["type"] == "value_error":
        return Problem(key, str(item["msg"]).removeprefix("Value error, "), place)
    return Problem(key, f"expected {_expected(item)}, got {_got(item['input'])}", place)


def _below(model: type[BaseModel], part: str) -> list[type[BaseModel]]:
    field = model.model_fields.get(part)
    return sections(field.annotation) if field is not None else []


def _expected(item: dict[str, Any]) -> str:
    if item["type"] in {"model_type", "dict_type"}:
        return "a mapping"
    return str(item["msg"]).removeprefix("Input should be ").replace("a valid string", "text")


def _got(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{shown} ({_KINDS.get(type(value), type(value).__name__)})"


def recipe_help(model: type[BaseModel]) -> str:
    """Every key that a recipe may hold: dotted name, type, default, and its docstring.

    Args:
        model: A recipe model.

    Returns:
        Text of two lines or more a key; `N` stands for an index and `KEY` for a name of your own.
    """
    return "\n".join(_help_lines(model, "", ()))


def _help_lines(
    model: type[BaseModel], prefix: str, above: tuple[type[BaseModel], ...]
) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = join(prefix, name)
        yield f"{key}: {_type_name(field.annotation)}{_limits(field)}{_default(field)}"
        for line in (field.description or "").splitlines():
            yield f"    {line.strip()}"
        shown: dict[str, None] = {}
        for section, path in _nested(field.annotation, key):
            if section in above:
                continue
            lines = list(_help_lines(section, path, (*above, section)))
            shown.update(dict.fromkeys(_blocks(lines)))
        yield from (line for block in shown for line in block.split("\n"))


def _blocks(lines: list[str]) -> Iterator[str]:
    """Join each key's line with the indented lines that explain it."""
    block: list[str] = []
    for line in lines:
        if block and not line.startswith(" "):
            yield "\n".join(block)
            block = []
        block.append(line)
    if block:
        yield "\n".join(block)


def _nested(annotation: Any, key: str) -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, key
        return
    origin = typing.get_origin(annotation)
    below = {list: f"{key}.N", dict: f"{key}.KEY"}.get(typing.cast(Any, origin), key)
    for part in typing.get_args(annotation):
        yield from _nested(part, below)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(_type_name(part) for part in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(part) for part in arguments)}]"
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).removeprefix("typing.")


def _limits(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  (required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f" = {'null' if value is None else repr(value)}"
