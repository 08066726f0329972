"""The run that an output directory holds: its recipe and parents, and whether it may go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.constants import MANIFEST_NAME, SEAL_NAME
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe, save_resolved, to_plain
from llm2clip_vlm.runs.hashes import HandoffError, fingerprint_dir
from llm2clip_vlm.runs.manifest import (
    PARENTS_NAME,
    RESOLVED_NAME,
    changed_outputs,
    changed_parent,
    data_files,
    meaning,
    parent_state,
    read_manifest,
    recipe_hash,
)


def refuse_changed_outputs(directory: str | Path) -> None:
    """Refuse to write over files that have been changed since a stage wrote them.

    Args:
        directory: The stage's output directory. Missing files may be made again.

    Raises:
        HandoffError: Names the file.
    """
    manifest = read_manifest(directory)
    there = changed_outputs(directory, manifest) if manifest else []
    for name in there:
        if (Path(directory) / name).exists():
            raise HandoffError(
                f"{Path(directory) / name} was changed after {(manifest or {})['stage']} wrote it, "
                "and would be written over: put it back, or delete it to have it made again"
            )


def claim_output_dir(recipe: BaseModel) -> Path:
    """Write the resolved recipe beside the results to come, or refuse a directory in use.

    A run that left neither a checkpoint nor a manifest, such as one that was refused for its data,
    has nothing to lose and makes room.

    Args:
        recipe: A recipe with `output_dir`.

    Returns:
        The output directory, which exists.

    Raises:
        HandoffError: The directory holds a run made with another recipe; the message names the
            first key that differs.
    """
    folder = Path(to_plain(recipe)["output_dir"])
    path = folder / RESOLVED_NAME
    progress = (folder / MANIFEST_NAME, *folder.glob(f"checkpoints/checkpoint-*/{SEAL_NAME}"))
    if path.is_file() and any(file.is_file() for file in progress):
        try:
            earlier = load_recipe(path, type(recipe))
        except RecipeError as error:
            raise HandoffError(
                f"{folder} holds a run whose recipe this version does not read; choose another "
                f"output_dir, or delete the folder ({error})"
            ) from None
        if recipe_hash(earlier) != recipe_hash(recipe):
            key, old, new = _difference(meaning(earlier), meaning(recipe))
            raise HandoffError(
                f"{folder} holds a run with another recipe: {key}: was {old!r}, is now {new!r}; "
                "choose another output_dir, or delete the folder"
            )
    save_resolved(recipe, path)
    return folder


def claim_parents(
    directory: str | Path, parents: Mapping[str, str | Path], *, resumes: bool
) -> dict[str, dict[str, Any]]:
    """Note what a run begins with, or refuse to go on with a run that began with something else.

    A checkpoint of other weights or data would be taken for a result of these. Call it in one
    process.

    Args:
        directory: The run's output directory.
        parents: Name to path. Models are compared by their files, a stage's other output (a cache
            may grow) by the fingerprints in its manifest, data files by size and hash.
        resumes: Whether the run goes on from a checkpoint.

    Returns:
        The states of the parents that are data files, by name.

    Raises:
        HandoffError: Names the parent, and the file.
    """
    path = Path(directory) / PARENTS_NAME
    earlier = _noted(path) if path.is_file() else {}
    finished = (Path(directory) / MANIFEST_NAME).is_file()
    other = "choose another output_dir, or delete the folder"
    content: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    for name, parent in parents.items():
        before = earlier.get(name)
        if manifest := read_manifest(parent):
            content[name] = manifest["fingerprints"]
        elif (Path(parent) / "config.json").is_file():
            content[name] = fingerprint_dir(parent)
        elif isinstance(before, dict) and "files" in before and (resumes or finished):
            if before["path"] != str(parent) or (changed := changed_parent(before)) is not None:
                what = parent if before["path"] != str(parent) else changed
                raise HandoffError(
                    f"{directory} holds a run that began with other data ({name}): {what} has "
                    f"been changed, added or removed since; put it back, {other}"
                )
            content[name] = data[name] = before
        elif not Path(parent).is_dir() and data_files(parent):
            content[name] = data[name] = parent_state(parent)
        if resumes and name in content and name in earlier and content[name] != before:
            raise HandoffError(
                f"{directory} holds a run that began with another {name}: {parent} has "
                f"been made anew since; {other}"
            )
    write_atomically(path, json.dumps(content, indent=1))
    return data


def _noted(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        return dict(read_json(path))
    raise HandoffError(
        f"{path} is damaged, so what the run began with is unknown; put it back, choose "
        "another output_dir, or delete the folder"
    )


def _difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first dotted key at which two plain values differ, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return _difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    return key, old, new
