"""Recipes: YAML files read into typed models, with one clear error for everything that is wrong.

YAML is read the 1.2 way: `1e-3` is a number, `no` is a word, a key given twice is refused. A file
may name one parent (`base: other.yaml`, relative to itself) whose mappings it extends and whose
lists it replaces; `a.b=value` on the command line overrides both; `${a.b}` in a text stands for
another value of the finished recipe (`$${` writes a plain `${`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llm2clip_vlm.recipe_schema import (
    MISSING,
    Problem,
    RecipeError,
    all_keys,
    default_at,
    did_you_mean,
    explain,
    join,
    recipe_help,
    where_from,
)

__all__ = [
    "Problem",
    "RecipeError",
    "load_recipe",
    "recipe_help",
    "save_resolved",
    "to_plain",
]

T = TypeVar("T", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_RESOLVERS = {None: [(_TAG + name, pattern) for name, pattern in _SCALARS.items()]}
_REFERENCE = re.compile(r"\$?\$\{([^{}]*)\}")


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalar rules of YAML 1.2's core schema; used only up to the node graph."""

    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal (a text that looks like a number is quoted)."""

    yaml_implicit_resolvers = _RESOLVERS


def load_recipe(path: str | Path, model: type[T], overrides: Sequence[str] = ()) -> T:
    """Read, merge, interpolate and check a recipe.

    Args:
        path: The YAML file.
        model: The pydantic model that reads it, such as `Stage1Recipe`.
        overrides: `dotted.key=value` items, the value written as YAML; a list item is addressed by
            its index (`train.0.path=x.jsonl`).

    Returns:
        The recipe, with `base` resolved away.

    Raises:
        RecipeError: Anything wrong in the file, its parents or the overrides; all problems that
            can be seen at once are listed, each with its dotted key and the line it comes from.
    """
    data, origins = _load_merged(Path(path), ())
    for override in overrides:
        _override(data, origins, override)
    data = _Interpolation(data, model, origins, str(path)).value(data, "", ())
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(str(path), explain(error, data, model, origins, str(path))) from None


def to_plain(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as mappings, lists and scalars, every default written out."""
    plain: dict[str, Any] = _bare(recipe.model_dump())
    return plain


def _bare(value: Any) -> Any:
    """As JSON would have it, but infinities stay (pydantic's JSON mode makes them null)."""
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save_resolved(recipe: BaseModel, path: str | Path) -> None:
    """Write the whole recipe so that `load_recipe` gives an equal one.

    Args:
        recipe: What a stage runs with.
        path: The file to write, atomically; folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(
        _escape(to_plain(recipe)),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _load_merged(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """One file on top of its parents, and where each value came from."""
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(str(item) for item in (*children, resolved))
        raise RecipeError(str(path), [Problem("base", f"a recipe is its own parent: {chain}")])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        wanted_by = f" (named by `base:` in {children[-1]})" if children else ""
        problem = Problem("", f"cannot read this file{wanted_by}: {error}")
        raise RecipeError(str(path), [problem]) from None
    data, origins = _parse(text, str(path), "", with_lines=True)
    data = {} if data is None else data
    if not isinstance(data, dict):
        message = f"expected a mapping of keys, got {type(data).__name__}"
        raise RecipeError(str(path), [Problem("", message)])
    base = data.pop("base", None)
    if base is None:
        return data, origins
    if not isinstance(base, str):
        message = f"expected the path of one parent recipe, got {base!r}"
        raise RecipeError(str(path), [Problem("base", message, where_from("base", origins, ""))])
    parent, parent_origins = _load_merged(path.parent / base, (*children, resolved))
    _merge(parent, data, "", parent_origins)
    return parent, {**parent_origins, **origins}


def _merge(into: dict[str, Any], top: dict[str, Any], key: str, origins: dict[str, str]) -> None:
    """Extend mappings, replace everything else, and forget the origin of what is replaced."""
    for name, value in top.items():
        below = join(key, name)
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value, below, origins)
            continue
        into[name] = value
        for known in [item for item in origins if item.startswith(f"{below}.")]:
            del origins[known]


def _parse(text: str, source: str, key: str, *, with_lines: bool) -> tuple[Any, dict[str, str]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{source}:{mark.line + 1}" if mark is not None and with_lines else source
        reason = getattr(error, "problem", None) or str(error)
        raise RecipeError(source, [Problem(key, f"not valid YAML: {reason}", line)]) from None
    finally:
        loader.dispose()
    if node is None:
        return None, {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []

    def place(node: yaml.Node) -> str:
        return f"{source}:{node.start_mark.line + 1}" if with_lines else source

    def plain(node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Any:
        origins.setdefault(key, place(node))
        if node in above:
            problems.append(Problem(key, "an alias that contains itself", place(node)))
            return None
        if isinstance(node, yaml.MappingNode):
            return mapping(node, key, above)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [plain(item, join(key, str(at)), (*above, node)) for at, item in items]
        try:
            return _scalar(node.tag.removeprefix(_TAG), node.value)
        except KeyError:
            problems.append(Problem(key, f"the tag {node.tag} is not allowed here", place(node)))
            return None

    def mapping(node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            if name_node.tag != f"{_TAG}str":
                message = f"key {name_node.value!r} is not text; put it in quotes"
                problems.append(Problem(key, message, place(name_node)))
                continue
            name = name_node.value
            below = join(key, name)
            if name in result:
                message = f"key given twice, first in line {lines[name]}"
                problems.append(Problem(below, message, place(name_node)))
            lines[name] = name_node.start_mark.line + 1
            origins[below] = place(name_node)
            result[name] = plain(value_node, below, (*above, node))
        return result

    data = plain(node, key, ())
    if problems:
        raise RecipeError(source, problems)
    return data, origins


def _scalar(kind: str, text: str) -> Any:
    """A scalar's value. Raises KeyError for any tag outside the core schema."""
    if kind == "int":
        return int(text, 0) if text.lower().startswith(("0x", "0o")) else int(text, 10)
    if kind == "float":
        bare = text.lower()
        return float(bare.replace(".inf", "inf").replace(".nan", "nan"))
    return {"str": text, "bool": text.lower() == "true", "null": None}[kind]


def _override(data: dict[str, Any], origins: dict[str, str], override: str) -> None:
    """Apply one `dotted.key=value` in place."""
    source = f"override `{override}`"
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        message = "expected `dotted.key=value`, such as `trainer.max_steps=10`"
        raise RecipeError(source, [Problem(key, message)])
    value, fresh = _parse(text, source, key, with_lines=False)
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                message = f"expected an index below {len(node)}, got {part!r}"
                raise RecipeError(source, [Problem(here, message)])
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            above = ".".join(parts[:depth])
            message = f"`{above}` holds {node!r}, which has no keys; override `{above}` as a whole"
            raise RecipeError(source, [Problem(here, message)])
        if last:
            node[index] = value
        elif isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        if not last:
            node = node[index]
    for known in [item for item in origins if item.startswith(f"{key}.")]:
        del origins[known]
    origins.update(fresh)
    origins[key] = source


class _Interpolation:
    """Replaces `${dotted.key}` by the value that the finished recipe has there."""

    def __init__(
        self, root: dict[str, Any], model: type[BaseModel], origins: dict[str, str], source: str
    ) -> None:
        self.root = root
        self.model = model
        self.origins = origins
        self.source = source

    def value(self, value: Any, key: str, trail: tuple[str, ...]) -> Any:
        """A copy of `value` (which lies at `key`) without references."""
        if isinstance(value, dict):
            return {name: self.value(item, join(key, name), trail) for name, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, join(key, str(at)), trail) for at, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole and not value.startswith("$$"):
            return self._referred(whole[1], key, trail)
        return _REFERENCE.sub(lambda match: self._piece(match, key, trail), value)

    def _piece(self, match: re.Match[str], key: str, trail: tuple[str, ...]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        found = self._referred(match[1], key, trail)
        if isinstance(found, bool):
            return str(found).lower()
        if not isinstance(found, str | int | float):
            self._refuse(key, f"`${{{match[1]}}}` inside a text must be a scalar, got {found!r}")
        return str(found)

    def _referred(self, reference: str, key: str, trail: tuple[str, ...]) -> Any:
        if reference in trail:
            chain = " -> ".join((*trail, reference))
            self._refuse(key, f"`${{{reference}}}` refers to itself: {chain}")
        found = default_at(self.root, self.model, reference.split("."))
        if found is MISSING:
            hint = did_you_mean(reference, all_keys(self.root))
            self._refuse(key, f"`${{{reference}}}` names no value of this recipe{hint}")
        return self.value(found, reference, (*trail, reference))

    def _refuse(self, key: str, message: str) -> None:
        place = where_from(key, self.origins, self.source)
        raise RecipeError(self.source, [Problem(key, message, place)])
