"""Ways to start: a folder of recipes, several GPUs, words that the shell completes."""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llm2clip_vlm.files import find_recipe, find_shipped, read_text, recipe_names, written_whole
from llm2clip_vlm.recipe.reading import did_you_mean, load_recipe
from llm2clip_vlm.recipe.stages import RECIPES

_SHARDED = {"stage3_projector": "zero2", "stage4_instruction": "zero3"}
"""Stages that need more than data parallelism, and accelerate's file of `recipes/accelerate`."""


def launch(program: Path, words: Sequence[str], gpus: int, file: str | None = None) -> int:
    """Replace this process by accelerate's launcher, with a stage on several GPUs.

    Args:
        program: Program of a stage.
        words: Recipe and overrides.
        gpus: Number of processes, one for each GPU of this machine.
        file: Settings for accelerate. None: those of the stage (4-bit weights are not sharded).

    Raises:
        ValueError: There are not so many GPUs, no such file, or the program is the pipeline, whose
            steps have launchers of their own.
    """
    import torch

    if program.stem not in RECIPES:
        raise ValueError(
            "--gpus: a pipeline's steps name their launcher themselves (`launch` in its recipe)"
        )
    there = torch.cuda.device_count()
    if gpus > there:
        raise ValueError(f"--gpus {gpus}: torch sees {there} of them here")
    config = settings_of(program.stem, words, file)
    count = ["--config_file", config, "--num_processes", str(gpus), "--num_machines", "1"]
    # Not the command `accelerate`, which imports a timm that it finds, and that a torchvision.
    command = [sys.executable, "-m", "accelerate.commands.launch", *count, str(program), *words]
    print(shlex.join(command), flush=True)
    os.execv(sys.executable, command)


def settings_of(stage: str, words: Sequence[str], file: str | None = None) -> str:
    """Find accelerate's settings with which a stage starts on several GPUs; see :func:`launch`."""
    whole = getattr(load_recipe(words[0], RECIPES[stage], words[1:]), "load_in_4bit", False)
    name = file or ("ddp" if whole else _SHARDED.get(stage, "ddp"))
    config = find_recipe(name if file and os.path.isfile(file) else f"accelerate/{name}")
    if not os.path.isfile(config):
        known = [path.stem for path in Path(find_shipped("recipes/accelerate")).glob("*.yaml")]
        raise ValueError(f"--accelerate {name}: no such file{did_you_mean(name, known)}")
    return config


def sharding(stage: str, words: Sequence[str], file: str | None) -> list[str]:
    """Say in words of `plan` how :func:`launch` would split a stage: ZeRO, and offload."""
    text = read_text(settings_of(stage, words, file)) if stage in RECIPES else ""
    offload = ["--offload"] * ("offload_optimizer_device: cpu" in text)
    return ["--zero", *(re.findall(r"zero_stage: *(\d)", text)[:1] or "0"), *offload]


def begin(directory: Path, name: str) -> None:
    """Make a folder with a family of recipes, all that they name, and a README of what to type.

    The files keep their names, so that what is changed there is what runs from there.

    Args:
        directory: The folder; new or empty.
        name: A folder of `recipes/` with a README, or how it begins.

    Raises:
        ValueError: There is no such family, or the folder holds something.
    """
    root, families = _families()
    found = [family for family in families if family.startswith(name)]
    if len(found) != 1:
        near = did_you_mean(name, families)
        raise ValueError(f"--recipe {name}: expected one of {families}{near}")
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    if os.path.lexists(directory):
        raise ValueError(f"{directory}: expected a new or an empty folder, got one with content")
    (family,) = found
    todo, done = [f"recipes/{p.relative_to(root)}" for p in (root / family).rglob("*.*")], set()
    with written_whole(directory) as folder:
        while todo:
            shipped = todo.pop()
            file = Path(find_shipped(shipped, here=False))
            if shipped in done or not file.is_file():
                continue
            done.add(shipped)
            place = folder / ("README.md" if file.name == "README.md" else shipped)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            todo += _named(shipped, read_text(file))
    print(f"{len(done)} files in {directory}; next: cd {directory}, and what its README.md says")


def _families() -> tuple[Path, list[str]]:
    """Where the shipped recipes lie, and the folders of them that `init` copies."""
    root = Path(find_shipped("recipes/accelerate", here=False)).parent
    return root, sorted(path.parent.name for path in root.glob("*/README.md"))


def _named(name: str, text: str) -> Iterator[str]:
    """Settings that a shipped file names, by its place or beside it."""
    yield from re.findall(r"\b(?:recipes|eval)/[\w./-]+\.(?:yaml|jinja)\b", text)
    for beside in re.findall(r"(?m)(?:\$schema=|^base: *)(\S+)", text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(name), beside))


def completion(
    parser: argparse.ArgumentParser,
    own: Mapping[str, argparse.ArgumentParser],
    shell: str,
    stages: Sequence[str],
) -> str:
    """A script that completes the command's words: commands, options, stages, shipped recipes.

    Args:
        parser: Parser of the command.
        own: Those of its commands that have one of their own.
        shell: `bash` or `zsh`.
        stages: Names of stages.
    """
    import shtab

    recipes = " ".join(sorted({name for name in recipe_names(Path()) if "/" in name}))
    known = {
        "bash": f"_l2c_recipe() {{ compgen -W '{recipes}' -- $1; compgen -f -- $1; }}",
        "zsh": f"_l2c_recipe() {{ compadd -- {recipes}; _files; }}",
    }
    todo, taught = [parser], dict.fromkeys(known, "_l2c_recipe")
    for action in (a for made in todo for a in made._actions):
        if isinstance(action, argparse._SubParsersAction):
            action.choices.update({name: own[name] for name in action.choices if name in own})
            todo += action.choices.values()
        elif action.dest == "stage":
            action.choices = list(stages)
        elif action.dest == "recipe" and action.option_strings:  # of `init`
            action.choices = _families()[1]
        elif not action.option_strings or action.type is Path or action.metavar in ("DIR", "FILE"):
            recipe = action.dest in {"recipe", "overrides"} or "RECIPE" in str(action.metavar)
            vars(action)["complete"] = taught if recipe else shtab.FILE
    return shtab.complete(parser, shell, preamble=known[shell])
