"""YAML the 1.2 way, within limits: small files, finite nesting, anchors that do not explode."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from llm2clip_vlm.files import read_text

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}
_RESOLVERS = {None: [(_TAG + name, re.compile(rule)) for name, rule in _SCALARS.items()]}
LARGEST_BYTES = 200_000
"""Size of a file with its anchors and references written out; the largest recipe has 5,000."""
DEEPEST = 40


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, in one message.

    Attributes:
        problems: One `dotted.key: what was expected and what was got` each.
    """

    def __init__(self, source: str | Path, *problems: str) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"recipe {source}: {count}", *problems]))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.value:
        text = name.tag == f"{_TAG}str"
        if not text or name.value in found:
            wrong = "given twice" if text else "not text; put it in quotes"
            what = repr(name.value) if isinstance(name, yaml.ScalarNode) else "of several parts"
            raise yaml.constructor.ConstructorError(
                None, None, f"key {what} is {wrong}", name.start_mark
            )
        found[name.value] = loader.construct_object(value, deep=True)
    return found


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value.lower().startswith(("0x", "0o")) else 10)


class _Loader(yaml.SafeLoader):
    """PyYAML with YAML 1.2's core schema."""

    yaml_implicit_resolvers = _RESOLVERS
    yaml_constructors = {
        **{
            tag: yaml.SafeLoader.yaml_constructors[tag]
            for tag in (None, *(_TAG + name for name in ("null", "bool", "float", "str", "seq")))
        },
        f"{_TAG}map": _mapping,
        f"{_TAG}int": _integer,
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1  # as deep nesting takes PyYAML seconds, it ends here
        if self.depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        found = super().compose_node(parent, index)
        self.depth -= 1
        return found


class Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal (a text that looks like a number is quoted)."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out, each where it stands."""
        return True


def parse_yaml(text: str, source: str | Path) -> Any:
    """Read one YAML document.

    Raises:
        RecipeError: It is no YAML, or larger or deeper than a person writes; begins with `source`.
    """
    open_brackets = accumulate(1 if c in "[{" else -1 for c in re.findall(r"[][{}]", text))
    if max(open_brackets, default=0) > 3 * DEEPEST:  # PyYAML would scan it for seconds
        raise RecipeError(source, f"not valid YAML: nested more than {DEEPEST} deep")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise RecipeError(source, f"not valid YAML: {error}") from None
    loader.name = str(source)
    try:
        if (node := loader.get_single_node()) is None:
            return None
        size, depth = _expanded(node, {})
        if size > LARGEST_BYTES:
            raise ValueError(f"anchors make more than {LARGEST_BYTES:,} characters of it")
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        return loader.construct_document(node)
    except RecursionError:
        raise RecipeError(source, "not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise RecipeError(source, f"not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Characters and values of a node once its anchors are written out, and how deep it is."""
    if id(node) not in known:
        known[id(node)] = (-1, 0)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else [item])]
        found = [_expanded(part, known) for part in parts]
        if any(size < 0 for size, _ in found):
            raise ValueError("a recursive anchor, which refers to itself")
        size = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        depth = 1 + max((depth for _, depth in found), default=0)
        known[id(node)] = 1 + size + sum(size for size, _ in found), depth
    return known[id(node)]


def parse_value(text: str, source: str) -> Any:
    """A value from a command line, written as YAML but without comments (`runs/exp #3`).

    Raises:
        RecipeError: It is no YAML; the message begins with `source`.
    """
    value = parse_yaml(text, source)
    cut = isinstance(value, str) and " #" in text and text.strip()[:1] not in "'\""
    return text.strip() if cut else value


def read_yaml(path: str | Path) -> Any:
    """A YAML file that is no recipe, with the same limits.

    Raises:
        RecipeError: It cannot be read, or is no YAML.
    """
    try:
        text = read_text(path, limit_bytes=LARGEST_BYTES)
    except ValueError as error:
        raise RecipeError(path, str(error)) from None
    return parse_yaml(text, path)
