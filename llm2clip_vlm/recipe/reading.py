"""Recipes: YAML files read into typed models, with one clear error for everything that is wrong.

YAML is read the 1.2 way: `1e-3` is a number, `no` is a word, a key given twice is refused. A file
may name one parent (`base: other.yaml`, relative to itself, or a shipped one: `llava15/stage3`)
whose mappings it extends and whose lists it replaces; `a.b=value` on the command line overrides
both; `${a.b}` in a text stands for another value of the finished recipe (`$${` writes a plain
`${`). A text that names a shipped file or folder (`recipes/...`, `eval/...`) means that one unless
the working directory has it. Files are limited in size and depth, anchors and references in what
they make; numbers are finite; secrets (tokens, passwords) are refused: recipes lie beside results.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
import os
import re
import reprlib
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llm2clip_vlm.files import (
    find_recipe,
    find_shipped,
    parent_of,
    read_text,
    recipe_names,
    write_atomically,
)
from llm2clip_vlm.recipe.yaml_files import DEEPEST, LARGEST_BYTES, Dumper, parse_value, parse_yaml
from llm2clip_vlm.recipe.yaml_files import RecipeError as RecipeError  # noqa: PLC0414

T = TypeVar("T", bound=BaseModel)

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_SECRET_KEY = re.compile(
    r"(?i).*(hub|api|auth|access|refresh|bearer|session|push_to_hub|wandb|comet|hf)_?-?tokens?"
    r"|(?!.*(pad|bos|eos|unk|cls|sep|mask|image|video|audio|box|start|end|begin|special)_token$)"
    r".*_?token|.*(api|access|private|secret|encryption)_?-?key|.*(secret|passw(or)?d|passphrase"
    r"|credentials?)(s|_.*)?"
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
    r"|://[^/\s:@]*:[^/\s:@]+@"
)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean ...?` with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean `{near[0]}`?" if near else ""


def load_recipe(path: str | Path, model: type[T], overrides: Sequence[str] = ()) -> T:
    """Read, merge, interpolate and check a recipe.

    Args:
        path: The YAML file, or what `find_recipe` finds by its name.
        model: The pydantic model that reads it, such as `Stage1Recipe`.
        overrides: `dotted.key=value` items, the value written as YAML; a list item is addressed by
            its index (`train.0.path=x.jsonl`).

    Returns:
        The recipe, with `base` resolved away.

    Raises:
        RecipeError: Lists all that can be seen at once, in the file, its parents and overrides.
    """
    data = resolved(path, model, overrides)
    if wrong := list(_refused(data)):
        raise RecipeError(path, *wrong)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(path, *_explained(error, data, model)) from None


def resolved(path: str | Path, model: type[BaseModel], overrides: Sequence[str] = ()) -> Any:
    """Read, merge and interpolate a recipe as :func:`load_recipe` does, but check no key."""
    data = _overridden(read_layers(Path(find_recipe(str(path)))), overrides)
    whole = "steps" in data and "steps" not in model.model_fields
    if strange := _of_another_stage("pipeline" if whole else data.get("stage"), model):
        raise RecipeError(path, strange)
    return _interpolated(data, model, path)


def overridden(recipe: T, overrides: Sequence[str]) -> T:
    """A copy of a recipe with other values, as :func:`load_recipe` takes them.

    Raises:
        ValueError: There are no such keys, or they take no such values.
    """
    return type(recipe).model_validate(_overridden(to_plain(recipe), overrides))


def _overridden(data: Any, overrides: Sequence[str]) -> Any:
    for override in overrides:
        key, equals, text = override.partition("=")
        last = key.rpartition(".")[2]
        secret = _SECRET_KEY.fullmatch(last) or _SECRET_VALUE.search(override)
        source = f"override `{key[:200] if secret or len(override) > 200 else override}`"
        if not equals or not all(key.split(".")) or key.count(".") > DEEPEST:
            raise RecipeError(source, f"{key:.200}: expected `dotted.key=value` (no blanks)")
        data = _with(data, key.split("."), parse_value(text, source), source)
    return data


def _of_another_stage(given: Any, model: type[BaseModel]) -> str | None:
    """What a recipe says of its stage if another program reads it; every key would be wrong."""
    field = model.model_fields.get("stage")
    known = typing.get_args(field.annotation) if field else ()
    if not isinstance(given, str) or given in known:
        return None
    command = "eval" if given == "run_encoder" else f"train {given}"
    wanted = known[0] if known else f"a {model.__name__}, which has no `stage`"
    return (
        f"stage: expected {wanted}, got {given}; a recipe of that stage is started with "
        f"`llm2clip-vlm {command}`"
    )


def to_plain(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as mappings, lists and scalars, defaults written out (of a text encoder: none)."""
    return recipe.model_dump()


def words_of(argv: Sequence[str] | None, usage: str | None) -> list[str]:
    """Split the arguments of a recipe program: RECIPE and `key=value` overrides.

    Args:
        argv: Arguments. None: those of the process.
        usage: Text that `--help`, or no argument at all, prints before the program ends.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(usage, file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    return words


def save_resolved(recipe: BaseModel, path: str | Path) -> None:
    """Write the whole recipe, atomically, so that `load_recipe` gives an equal one."""
    text = yaml.dump(to_plain(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    write_atomically(path, text.replace("${", "$${"))


def _refused(value: Any, key: str = "") -> Iterator[str]:
    """Find values that no recipe may hold; a secret itself is not repeated."""
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}".removeprefix(".")
            if isinstance(item, str) and item and _SECRET_KEY.fullmatch(name):
                yield f"{inner}: {_NO_SECRETS}"
            else:
                yield from _refused(item, inner)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _refused(item, f"{key}.{at}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: expected a finite number, got {value}"
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        yield f"{key}: {_NO_SECRETS}"


_NO_SECRETS = (
    "a secret has no place in a recipe, which is written beside the results; log in (`hf auth "
    "login`) or set the library's environment variable (HF_TOKEN, WANDB_API_KEY)"
)


def read_layers(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe on top of its parents, whatever it is for; `children` are what named it.

    Raises:
        RecipeError: A file cannot be read, or the parents go round in a circle.
    """
    wanted_by = f" (named by `base:` in {children[-1]})" if children else ""
    try:
        resolved = path.resolve()
        text = read_text(path, limit_bytes=LARGEST_BYTES)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).removeprefix(f"{path}: ").removeprefix("cannot read this file: ")
        if not os.path.lexists(path):
            why = f"there is no such file{did_you_mean(str(path), recipe_names(path.parent))}"
        raise RecipeError(path, f"cannot read this file{wanted_by}: {why}") from None
    if resolved in children:
        chain = " -> ".join(str(item) for item in (*children, resolved))
        raise RecipeError(path, f"base: a recipe is its own parent: {chain}")
    if len(children) > DEEPEST:
        raise RecipeError(path, f"base: expected at most {DEEPEST} parents, got more")
    data = {} if (given := parse_yaml(text, path)) is None else given
    if not isinstance(data, dict):
        raise RecipeError(path, f"expected a mapping of keys, got {shown(data)}")
    if (base := data.pop("base", None)) is None:
        return data
    if not isinstance(base, str):
        raise RecipeError(path, f"base: expected the path of one parent, got {shown(base)}")
    return dict(_merged(read_layers(parent_of(path, base), (*children, resolved)), data))


def _merged(below: Any, above: Any) -> Any:
    """Mappings extended, everything else replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{name: _merged(below.get(name), item) for name, item in above.items()}}


def _with(data: Any, parts: Sequence[str], value: Any, source: str) -> Any:
    """A copy of `data` with `value` at a dotted key."""
    if not parts:
        return value
    part, *rest = parts
    if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
        at = int(part)
        return [*data[:at], _with(data[at], rest, value, source), *data[at + 1 :]]
    if isinstance(data, list):
        raise RecipeError(source, f"{part}: expected an index below {len(data)}")
    if not isinstance(data, dict | None):
        raise RecipeError(source, f"{part}: {shown(data)} is there, which has no keys")
    data = data or {}
    return {**data, part: _with(data.get(part), rest, value, source)}


# --- the model and its keys ---------------------------------------------------------------------


def fields_below(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """List every key that a recipe may hold, those of a section behind it.

    Args:
        model: A recipe model.
        above: Prefix of its keys.

    Yields:
        Name and field; in a name `N` stands for an index and `KEY` for any name.
    """
    for name, field in model.model_fields.items():
        yield f"{above}{name}", field
        kind = typing.get_origin(field.annotation)
        item = ".N" if kind is list else ".KEY" if kind is dict else ""
        for section in dict.fromkeys(models_in(field.annotation)):
            yield from fields_below(section, f"{above}{name}{item}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models inside an annotation: through unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def _below(model: type[BaseModel] | None, part: str) -> type[BaseModel] | None:
    """The model of a part; an item of a list or mapping has the one of the whole."""
    field = model.model_fields.get(part) if model else None
    return next(models_in(field.annotation), None) if field else model


def _interpolated(data: Any, model: type[BaseModel], source: str | Path) -> Any:
    """A copy without `${dotted.key}`: the finished recipe's own values, else the defaults."""

    def value_at(key: str) -> Any:
        found: Any = data
        section: type[BaseModel] | None = model
        for part in key.split("."):
            field = section.model_fields.get(part) if section else None
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, dict) and field is not None and not field.is_required():
                found = field.get_default(call_default_factory=True)
                found = found.model_dump() if isinstance(found, BaseModel) else found
            else:
                hint = did_you_mean(key, [*data, *model.model_fields])
                raise RecipeError(source, f"${{{key}}}: names no value of this recipe{hint}")
            section = _below(section, part)
        return found

    made = 0

    def refer(key: str, trail: tuple[str, ...]) -> Any:
        if key in trail:
            raise RecipeError(source, f"${{{key}}}: refers to itself: {' -> '.join(trail)}")
        return fill(value_at(key), (*trail, key))

    def spend(value: Any) -> Any:
        nonlocal made
        made += 1 + (len(value) if isinstance(value, str) else 0)
        if made > LARGEST_BYTES:
            why = f"references (`${{...}}`) make more than {LARGEST_BYTES:,} characters of it"
            raise RecipeError(source, why)
        return value

    def piece(match: re.Match[str], trail: tuple[str, ...]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        found = refer(match[1], trail)
        if not isinstance(found, str | int | float):
            raise RecipeError(source, f"{match[0]}: inside a text it must be a scalar")
        return str(found).lower() if isinstance(found, bool) else str(found)

    def fill(value: Any, trail: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name.replace("$${", "${"): fill(item, trail) for name, item in value.items()}
        if isinstance(value, list):
            return [fill(item, trail) for item in value]
        if not isinstance(value, str):
            return spend(value)
        if "${" in _REFERENCE.sub("", value):
            raise RecipeError(
                source,
                f"{shown(value)}: a reference `${{...}}` that has no end or another one inside; "
                "`$${` stands for the signs themselves",
            )
        whole = _REFERENCE.fullmatch(value)
        if whole and not value.startswith("$$"):
            return refer(whole[1], trail)
        return spend(find_shipped(_REFERENCE.sub(lambda match: piece(match, trail), value)))

    return fill(data, ())


def _explained(error: ValidationError, data: Any, model: type[BaseModel]) -> list[str]:
    """Pydantic's errors as `dotted.key: message`, without the names of a union's branches."""
    problems: dict[str, str] = {}
    kinds: dict[str, list[str]] = {}
    for item in error.errors(include_url=False)[:20]:  # each looks for a near word
        here: Any = data
        parts: list[str] = []
        for depth, step in enumerate(item["loc"], 1):
            inside = (isinstance(here, dict) and step in here) or (
                isinstance(here, list) and step in range(len(here))
            )
            if inside:
                here = here[step]
            elif item["type"] != "missing" or depth < len(item["loc"]):
                continue
            parts.append(str(step))
        key, message = ".".join(parts), item["msg"]
        if item["type"] == "missing":
            problems[key] = "required, but not given"
        elif item["type"] == "extra_forbidden":
            section: type[BaseModel] | None = model
            for part in parts[:-1]:
                section = _below(section, part)
            known = list(section.model_fields) if section else []
            hints = (did_you_mean(parts[-1], known, cutoff) for cutoff in (0.9, 0.6))
            hint = next(hints) or elsewhere(parts[-1], model) or next(hints)
            problems[key] = f"unknown key{hint or f'; known here: {known}'}"
        elif item["type"] == "value_error":
            problems[key] = message.removeprefix("Value error, ")
        else:
            wanted = re.sub("a valid dictionary( or instance of .*)?", "a mapping", message)
            kinds.setdefault(key, []).append(wanted.removeprefix("Input should be "))
            problems[key] = f"expected {' or '.join(kinds[key])}, got {shown(item['input'])}"
    # Only errors inside a mapping are reported where a union was given one.
    return [
        f"{key}: {message}" if key else message
        for key, message in problems.items()
        if not any(other.startswith(f"{key}.") for other in problems)
    ]


def elsewhere(word: str, model: type[BaseModel]) -> str:
    """`; did you mean ...?` where a key of this name stands in another section, or nothing."""
    if word in {"lr", "learning_rate"} and "trainable" in model.model_fields:
        return "; each part that trains has its own, such as `trainable.multi_modal_projector`"
    if "trainer" in model.model_fields and word in trainer_keys():
        return f"; did you mean `trainer.{word}`?"
    found = (key for key, _ in fields_below(model) if key.endswith(f".{word}"))
    return "".join(f"; did you mean `{key}`?" for key in itertools.islice(found, 1))


def trainer_keys() -> dict[str, str]:
    """Fields of `TrainingArguments` and their types, off its source: importing takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    text = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    return dict(re.findall(r"^    ([a-z]\w*): (.*?) = ", text, re.MULTILINE))


def shown(value: Any) -> str:
    """Format a value for a message; long ones are cut."""
    return "null" if value is None else reprlib.repr(value)
