"""Everything that a recipe names and that must be there before anything is built or downloaded.

Light to import: `train` asks before it loads torch, and every stage's program asks again before it
claims its output directory.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.files import find_shipped
from llm2clip_vlm.recipe.base import DataSource, ImageSource, LoraSection, RunRecipe, Section
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.reading import load_recipe, read_layers
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.yaml_files import read_yaml
from llm2clip_vlm.remote.addresses import is_remote, missing_remote
from llm2clip_vlm.runs.hashes import data_files
from llm2clip_vlm.runs.manifest import RESOLVED_NAME, is_complete

_MODELS = frozenset(
    "checkpoint clip heads_from language_model projector text_encoder tokenizer vision_tower "
    "write_through".split()
)
"""Keys whose text is a model directory or a hub id."""
_OF_A_MODEL = ("config.json", "tokenizer_config.json", "modules.json")
_PLACES = ("annotations", "classes", "data", "images")
_WRITTEN_AGAIN = ("checkpoint", "clip", "language_model", "vision_tower")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LEAST_DISK_BYTES = 64 << 20
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",)}
_HUB_TIMEOUT_S = 3.0


class InputsError(ValueError):
    """What a run needs and is not there: one line for each thing."""

    def __init__(self, problems: list[str]) -> None:
        count = "1 thing is" if len(problems) == 1 else f"{len(problems)} things are"
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{count} missing; nothing was started and nothing written:{lines}")
        self.problems = problems
        """Each begins with the recipe's dotted key."""


def require_inputs(recipe: RunRecipe, source: str | Path = "") -> None:
    """Refuse a run that would miss something later.

    Args:
        recipe: A stage's recipe.
        source: Its file; recipes beside it are asked which of them writes what is missing.

    Raises:
        InputsError: Lists everything.
    """
    if problems := list(missing_inputs(recipe, source)):
        raise InputsError(problems)


def missing_inputs(
    recipe: RunRecipe, source: str | Path = "", made: Sequence[str] = ()
) -> Iterator[str]:
    """Name each data file, folder, model, cache, package and space that is not there.

    Args:
        recipe: A stage's recipe.
        source: See :func:`require_inputs`.
        made: Folders that are still written to: what would lie below one is not missed.
    """
    for path, problem in _missing(recipe, source):
        if not any(path and Path(path).is_relative_to(place) for place in made):
            yield problem


Missing = tuple[str, str]
"""A path that is not there (or no text, where none would help), and the problem in words."""


def _missing(recipe: RunRecipe, source: str | Path) -> Iterator[Missing]:
    leaves = list(_leaves(recipe))
    for key, value in leaves:
        if isinstance(value, DataSource):
            yield from _missing_data(key, value)
        elif isinstance(value, str):
            yield from _missing_named(key, value, recipe, source)
    for key, value in recipe:
        other = key == "sources" and getattr(recipe, "zero_shot", None)  # has texts, too
        if value == [] and not other and type(recipe).model_fields[key].is_required():
            yield "", f"{key}: expected at least one, got an empty list"
    if any(isinstance(value, LoraSection) for _, value in leaves):
        yield from _absent("lora", "an adapter", ("peft",))
    if getattr(recipe, "load_in_4bit", False):
        yield from _absent("load_in_4bit", "true", ("bitsandbytes",))
    yield from _missing_for_trainer(recipe)
    yield from _missing_room(recipe)


def require_benchmarks(recipe: EncoderEvalRecipe) -> None:
    """Refuse an evaluation of an encoder that would miss something in a later task.

    Raises:
        InputsError: Lists models, files and folders that are not there.
    """
    problems = []
    for key, value in _leaves(recipe):
        name = key.rpartition(".")[2]
        if not isinstance(value, str) or is_remote(value):
            continue
        if name in _MODELS | {"model"} and (problem := missing_model(value)):
            problems.append(f"{key}: {problem}")
        elif name in _PLACES and not (os.path.exists(value) or glob.glob(value)):
            problems.append(f"{key}: {value}: no such file or folder (from {Path.cwd()})")
    if problems:
        raise InputsError(problems)


def require_steps(jobs: Sequence[Any], out: str) -> None:
    """Refuse a pipeline whose later steps cannot run, before earlier ones take hours.

    Args:
        jobs: The pipeline's, in their order.
        out: Its folder, below which its steps write.

    Raises:
        FileNotFoundError: There is no such program.
        RecipeError: A recipe cannot be read.
        InputsError: Lists what is missing, of the stages before which no other program runs: that
            may write anything.
    """
    read: list[RunRecipe | None] = []
    for job in jobs:
        job.command()
        model, path = RECIPES.get(job.step.program), Path(job.recipe[0] if job.step.recipe else out)
        there = os.path.isfile(path) or not path.is_relative_to(out)
        if there:
            read_layers(path)
        read.append(load_recipe(path, model, job.recipe[1:]) if model and there else None)
    made = [out, *(recipe.output_dir for recipe in read if recipe)]
    problems, before = [], set[str]()
    for job, recipe in zip(jobs, read, strict=True):
        if recipe is None or not before.issuperset(job.needs):
            break
        before.add(job.name)
        lost = [f"{job.name}: {each}" for each in missing_inputs(recipe, job.recipe[0], made)]
        problems += lost if lost and not is_complete(recipe.output_dir, recipe) else []
    if problems:
        raise InputsError(problems)


def _missing_named(key: str, value: str, recipe: RunRecipe, source: Any) -> Iterator[Missing]:
    """What a text in a recipe names, by the key that it stands at."""
    if (name := key.rpartition(".")[2]) in _MODELS:
        if problem := missing_model(value, source):
            yield value, f"{key}: {problem}"
    elif name == "embedding_cache" and getattr(recipe, "write_through", None) is None:
        if not os.path.isfile(Path(value) / "header.json"):
            told = "" if os.path.isdir(value) else _written_by(value, source)
            yield value, f"{key}: {value}: no cache of stage 2a there{told}"
    elif name == "chat_template" and value.endswith(".jinja") and not os.path.isfile(value):
        yield value, f"{key}: {value}: no such file (from {Path.cwd()})"
    elif value == "flash_attention_2":
        yield from _absent(key, value, ("flash_attn", "kernels"))


def _leaves(section: Section, above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys with their values; sources and adapters stay whole."""
    for name, value in section:
        key = f"{above}{name}"
        several = isinstance(value, list)
        items = {f"{key}.{n}": item for n, item in enumerate(value)} if several else {key: value}
        for part, item in items.items():
            if isinstance(item, Section) and not isinstance(item, DataSource | LoraSection):
                yield from _leaves(item, f"{part}.")
            else:
                yield part, item


def _missing_data(key: str, source: DataSource) -> Iterator[Missing]:
    path = source.path
    if source.dataset:
        yield from _absent(key, f"dataset {source.dataset}", ("datasets",))
    elif is_remote(path):
        if problem := missing_remote(path):
            yield "", f"{key}.path: {problem}"
    elif not any(map(os.path.isfile, data_files(path))):
        told = f"{key}.path: {path}: no such file (from {Path.cwd()}); correct the path, or fetch"
        yield path, f"{told} the data (docs/data-formats.md)"
    elif path.endswith((".yaml", ".yml")):  # LLaVA-NeXT's mixture; what else is wrong in it its
        listed = read_yaml(path)  # reader says
        entries = listed.get("datasets") if isinstance(listed, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            named = entry.get("json_path") if isinstance(entry, dict) else None
            if isinstance(named, str) and not os.path.isfile(named):
                yield named, f"{key}.path: {path}: {named}: no such file (from {Path.cwd()})"
    root = source.image_root if isinstance(source, ImageSource) else None
    if root is not None and not os.path.isdir(root):
        yield root, f"{key}.image_root: {root}: no such folder (from {Path.cwd()})"


def missing_model(path: str, source: str | Path = "") -> str | None:
    """Say why a model cannot be loaded from here, as far as its folder or the hub tells.

    Args:
        path: Directory or hub id.
        source: See :func:`require_inputs`.
    """
    folder = Path(path)
    config = folder / "config.json"  # `Path.is_file` raises where a name is too long
    if os.path.isfile(config) and "timm_vision" in config.read_text("utf-8"):
        return next((told for _, told in _absent(path, "a tower of timm", ("timm",))), None)
    if os.path.isfile(folder):
        return None  # a GGUF, or a file of weights: its reader knows better
    if os.path.isdir(folder):
        if any((folder / name).is_file() for name in _OF_A_MODEL):
            return None
        inner = [part.name for part in sorted(folder.iterdir()) if (part / "config.json").is_file()]
        if (folder / MANIFEST_NAME).is_file() and not inner:
            return None  # another stage's output: who reads its manifest says so
        hint = f"; did you mean {folder / inner[0]}?" if inner else _written_by(path, source)
        return f"{path}: no config.json in this folder{hint}"
    if writer := _written_by(path, source):
        return f"{path}: no such folder{writer}"
    beside = "/" in path and os.path.isdir(folder.parent)
    if beside or not _HUB_ID.fullmatch(path) or path.startswith(("runs/", "models/")):
        return f"{path}: no such folder (from {Path.cwd()}); correct the path, or write it first"
    return _missing_on_hub(path)


@cache
def _missing_on_hub(name: str) -> str | None:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    beside = Path(found).parent.iterdir() if isinstance(found, str) else ()
    if any(file.suffix in (".safetensors", ".bin") for file in beside):
        return None
    told = f"{name}: no such folder (from {Path.cwd()}), "
    status = None if constants.HF_HUB_OFFLINE else ask_hub(f"api/models/{name}/auth-check")
    if status is None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        return (
            f"{told}not in the hub's cache, and {why}; where there is a network: hf download {name}"
        )
    if status in (401, 403):
        return (
            f"{told}and the hub lets this machine read no model of that name: correct it, or ask "
            f"for access at {constants.ENDPOINT}/{name} and log in (`hf auth login`)"
        )
    return f"{told}and the hub has no model of that name; correct it" if status == 404 else None


@cache
def ask_hub(path: str) -> int | None:
    """Ask the hub for something, with the token that is stored here.

    Args:
        path: Below its address.

    Returns:
        The status of its answer. None: no answer within some seconds.
    """
    from huggingface_hub import constants, get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{constants.ENDPOINT}/{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def writer_of(path: str | Path, source: str | Path = "") -> tuple[str, Path] | None:
    """Find the recipe, and the stage, that writes something.

    Args:
        path: Something at or below the recipe's `output_dir`.
        source: A recipe; those beside it come before the shipped ones.

    Returns:
        Stage and recipe. None: no recipe that is known here.
    """
    shipped = Path(find_shipped("recipes/llava15")).parent
    files = sorted(Path(source).parent.glob("*.yaml")) if str(source) else []
    for file in [*files, *sorted(shipped.glob("*/*.yaml"))]:
        stage, output = stage_and_output(file)
        if stage and output and Path(path).is_relative_to(output):
            return stage, file
    return None


@cache
def stage_and_output(file: Path) -> tuple[str | None, str | None]:
    """A recipe's `stage` and `output_dir`, or its parents'; of one that cannot be read None."""
    keys: dict[str, Any] = {}
    with suppress(ValueError):
        keys = read_layers(file)
    stage, output = keys.get("stage"), keys.get("output_dir")
    return stage and str(stage), output and str(output)


def reader_of(stage: str, source: str | Path) -> str | None:
    """The recipe of a stage, beside another one, that reads what that one writes. None: not known.

    Args:
        stage: The stage that comes next.
        source: The other recipe.
    """
    written = stage_and_output(Path(source))[1] or "no output"
    for file in sorted(Path(source).parent.glob("*.yaml")):
        if stage_and_output(file)[0] == stage:
            with suppress(ValueError):
                names = map(Path, re.findall(r'": "([^"]*)"', json.dumps(read_layers(file))))
                if any(name.is_relative_to(written) for name in names):
                    return _shown(file)
    return None


def _written_by(path: str, source: str | Path) -> str:
    if (writer := writer_of(path, source)) is None:
        return ""
    return f"; run that stage first: llm2clip-vlm train {writer[0]} {_shown(writer[1])}"


def _shown(path: Path) -> str:
    shipped = f"recipes/{path.parent.name}/{path.name}"
    return shipped if find_shipped(shipped) == str(path) else str(path)


def _absent(key: str, wanted: str, packages: tuple[str, ...]) -> Iterator[Missing]:
    if not any(importlib.util.find_spec(package) for package in packages):
        name = packages[0]
        yield "", f"{key}: {wanted}, but {name} is not installed: pip install {name}"


def _missing_for_trainer(recipe: RunRecipe) -> Iterator[Missing]:
    trainer = recipe.trainer
    report = trainer.get("report_to") or []
    for name in report if isinstance(report, list) else [report]:
        if isinstance(name, str) and name not in ("none", "all"):
            yield from _absent("trainer.report_to", name, _TRACKERS.get(name, (name,)))
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in {"1", "true", "yes"}
    if launched or trainer.get("deepspeed") is not None:
        yield from _absent("trainer.deepspeed", "ZeRO", ("deepspeed",))
    settings = trainer.get("deepspeed")
    if isinstance(settings, str) and not Path(settings).is_file():
        yield settings, f"trainer.deepspeed: {settings}: no such file (from {Path.cwd()})"
    if trainer.get("use_liger_kernel"):
        yield from _absent("trainer.use_liger_kernel", "true", ("liger_kernel",))
    if re.search("bnb|(?<!torch_)8bit", str(trainer.get("optim", ""))):
        yield from _absent("trainer.optim", str(trainer["optim"]), ("bitsandbytes",))


def _missing_room(recipe: RunRecipe) -> Iterator[Missing]:
    """Whether the output directory can be written, and has room for what is certain to be."""
    out = Path(recipe.output_dir)
    there = next(place for place in (out, *out.absolute().parents) if os.path.isdir(place))
    if not os.access(there, os.W_OK | os.X_OK):
        yield "", f"output_dir: {out}: no permission to write in {there}; choose another folder"
        return
    if any((out / name).exists() for name in (MANIFEST_NAME, RESOLVED_NAME)):
        return  # what a run has begun may be there already
    needed = _LEAST_DISK_BYTES + sum(
        os.path.getsize(file)
        for key, value in _leaves(recipe)
        if key.rpartition(".")[2] in _WRITTEN_AGAIN and isinstance(value, str)
        for file in glob.glob(f"{glob.escape(value)}/*.safetensors")
    ) * (2 if hasattr(recipe, "vlm") else 1)  # composed, and exported beside it
    if (free := shutil.disk_usage(there).free) < needed:
        told = f"output_dir: {out}: {free / 1e9:.1f} GB are free there, and the models that will be"
        told += f" written take {needed / 1e9:.1f} GB; free space, or choose another folder"
        yield "", told
