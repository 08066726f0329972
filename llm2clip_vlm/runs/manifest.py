"""Manifests: what one stage leaves for the next, and what a run may write over or go on from.

`manifest.json` is written last, so its presence means that the stage finished. It holds the
resolved recipe and its hash, the state of every parent (data files too), hashes of the models
written beside it, size, date and hash of every file that the stage left, versions, seeds and time,
and its own hash. The next stage verifies it and refuses a mismatch by naming the field; a
checkpoint that has no manifest (made elsewhere) is taken as it is.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.constants import MANIFEST_NAME, SEAL_NAME
from llm2clip_vlm.files import let_read, listed, read_json, write_atomically
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe, save_resolved, to_plain
from llm2clip_vlm.remote.addresses import is_remote, look_up
from llm2clip_vlm.runs import hashes
from llm2clip_vlm.runs.card import CARD_NAME
from llm2clip_vlm.runs.hashes import HandoffError, fingerprint_dir, fingerprint_file, recipe_hash

__all__ = ["HandoffError", "fingerprint_dir", "fingerprint_file", "recipe_hash"]

RESOLVED_NAME = "recipe.resolved.yaml"
"""File with the recipe that an output directory was made with."""
PARENTS_NAME = "parents.json"
"""File with the states of a run's parents."""

_SCHEMA = 1
_PACKAGES = (
    "torch transformers accelerate deepspeed peft datasets tokenizers safetensors numpy pillow "
    "lmms_eval llm2clip-vlm"
)
# No outputs: what a run may write anew without computing anything anew.
_NO_OUTPUTS = frozenset(
    {MANIFEST_NAME, PARENTS_NAME, RESOLVED_NAME}
    | set("checkpoints composed failures features dropped.jsonl encode_cost.jsonl".split())
)


def write_manifest(
    output_dir: str | Path,
    *,
    stage: str,
    recipe: BaseModel,
    parents: Mapping[str, str | Path | Mapping[str, Any]],
    fingerprints: Mapping[str, str],
    seconds: float,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Mark a stage as finished. Call it last, in one process.

    Args:
        output_dir: The stage's output directory; the models lie in its sub-directories.
        stage: The stage's name.
        recipe: The recipe that it ran with.
        parents: Name to path (a stage's output, a model directory, a file) or hub id of what it
            read, or to the :func:`parent_state` that it had when it was read.
        fingerprints: What the next stage must be able to compare, such as `text_encoder`.
        seconds: Wall time of the stage.
        extra: Anything else worth keeping; must be JSON.

    Returns:
        The manifest's path.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    let_read(folder)
    plain = to_plain(recipe)
    manifest = {
        "schema": _SCHEMA,
        "stage": stage,
        "recipe": plain,
        "recipe_hash": recipe_hash(plain),
        "parents": {
            name: dict(parent) if isinstance(parent, Mapping) else parent_state(parent)
            for name, parent in parents.items()
        },
        "fingerprints": dict(fingerprints),
        "outputs": {
            part.name: fingerprint_dir(part)
            for part in sorted(folder.iterdir())
            if part.is_dir() and part.name != "checkpoints" and any(hashes.model_files(part))
        },
        "files": _output_states(folder),
        "versions": versions(),
        "seeds": {"seed": plain.get("seed")},
        "seconds": round(seconds, 3),
        "extra": dict(extra or {}),
    }
    manifest["sha256"] = hashes.hash_json(manifest)
    path = folder / MANIFEST_NAME
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def _output_states(folder: Path) -> dict[str, hashes.FileState]:
    """State of every file that a stage left, by its path below the folder."""
    left: list[Path] = []
    for part in sorted(folder.iterdir()):
        if part.name not in _NO_OUTPUTS and not part.name.startswith((".", "part-")):
            left += sorted(part.rglob("*")) if part.is_dir() else [part]
    left = [file for file in left if file.name != CARD_NAME]  # people write into it
    models = {file.parent for file in left} - {folder}
    weights = [file for part in models for file in hashes.model_files(part)]
    states = hashes.file_states(left) | hashes.file_states(weights, whole=True)
    return {Path(name).relative_to(folder).as_posix(): state for name, state in states.items()}


def versions(*more: str) -> dict[str, str]:
    """Installed versions of what computes here, and of any other distributions named."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES.split(), *more):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def parent_state(path: str | Path) -> dict[str, Any]:
    """State of a parent for a manifest: the hash of its manifest, else its fingerprint or files.

    Args:
        path: A directory, a file or a pattern (sizes, dates and hashes of the files), an address
            (sizes and tags), or a hub id (kept by name only: there is nothing to hash).
    """
    target = Path(path)
    state: dict[str, Any] = {"path": str(path)}
    if (manifest := find_manifest(target)) is not None:
        state["manifest_hash"] = fingerprint_file(manifest)
    elif target.is_dir():
        state["fingerprint"] = fingerprint_dir(target)
    elif is_remote(path):
        state["remote"] = [[*file] for file in look_up(str(path))]
    elif files := hashes.data_files(path):
        state["files"] = hashes.file_states(files)
    return state


def changed_parent(state: Mapping[str, Any]) -> str | None:
    """Find a path that has changed in a parent. None: there is none.

    Args:
        state: Result of :func:`parent_state`, then; or `pictures`, states of some files.
    """
    path = state["path"]
    if "pictures" in state:  # some of many; what was deleted after its use changes no result
        return next((n for n in hashes.changed_files(state["pictures"]) if Path(n).is_file()), None)
    if "files" in state:
        now = {str(file) for file in hashes.data_files(path)}
        differing = [*sorted(now ^ state["files"].keys()), *hashes.changed_files(state["files"])]
        return differing[0] if differing else None
    if parent_state(path) != state:
        return path
    if (manifest := find_manifest(Path(path))) is None:
        return None
    folder = manifest.parent
    below = "" if folder == Path(path) else Path(path).name
    changed = hashes.changed_outputs(folder, read_manifest(folder) or {}, below)
    return str(folder / changed[0]) if changed else None


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """Read the manifest in a stage's output directory. None: there is no such file.

    Raises:
        HandoffError: The file is not a manifest that this version reads.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = read_json(path, object)
    except ValueError as error:
        raise HandoffError(f"{path} is not JSON ({error}); run that stage again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != _SCHEMA:
        raise HandoffError(
            f"{path}: schema: expected {_SCHEMA}, got {schema!r}; run that stage again with this "
            "version"
        )
    own = hashes.hash_json({key: value for key, value in manifest.items() if key != "sha256"})
    if manifest.get("sha256", own) != own:
        raise HandoffError(f"{path} is damaged or was changed by hand; run that stage again")
    return manifest


def find_manifest(path: Path) -> Path | None:
    """The manifest of a stage's output, or of the stage that wrote the model directory `path`."""
    for folder in (path, path.parent):
        if path.is_dir() and (folder / MANIFEST_NAME).is_file():
            return folder / MANIFEST_NAME
    return None


def verify_parent(directory: str | Path, *stages: str) -> dict[str, Any] | None:
    """Check that a directory is unchanged and comes from one of these stages.

    Args:
        directory: A stage's output directory, or a model directory directly below it.
        stages: Stages that may have written it. None: any.

    Returns:
        The manifest. None: no stage of this project wrote the checkpoint.

    Raises:
        HandoffError: Another stage wrote it, or the model's files are not those that it left.
    """
    folder = Path(directory)
    if (path := find_manifest(folder)) is None:
        return None
    manifest = read_manifest(path.parent) or {}
    if stages and manifest["stage"] not in stages:
        raise HandoffError(
            f"{folder}: stage: expected {' or '.join(stages)}, got {manifest['stage']} (from "
            f"{path}); name the output of the right stage"
        )
    if path.parent != folder and (recorded := manifest["outputs"].get(folder.name)):
        changed = hashes.changed_outputs(path.parent, manifest, folder.name)
        if not changed and fingerprint_dir(folder) != recorded:
            changed = ["files"]
        if changed:
            raise HandoffError(
                f"{folder}: outputs.{folder.name}: {listed(changed)} changed after "
                f"{manifest['stage']} wrote them; put them back, or run that stage again"
            )
    return manifest


def refuse_bidirectional(config: Any, where: str | Path) -> None:
    """Refuse a text encoder where a decoder is needed.

    Args:
        config: The language model's config.
        where: Path of the model, for the message.

    Raises:
        HandoffError: `config.is_causal` is false: the model attends to the future and would read
            the answer that it is trained to give.
    """
    if getattr(config, "is_causal", None) is False:
        raise HandoffError(
            f"{where}: is_causal: expected a causal decoder, got false: this is a bidirectional "
            "text encoder (stage 1); give the language model that stage 1 started from"
        )


def is_complete(directory: str | Path, recipe: BaseModel) -> bool:
    """Whether a stage finished here with this recipe and these parents.

    Args:
        directory: The stage's output directory.
        recipe: The recipe that it would run with now.

    Returns:
        True if the manifest is there, its recipe computes the same, every file that it lists is
        what it was, and no parent has changed.
    """
    manifest = read_manifest(directory)
    if manifest is None or recipe_hash(manifest["recipe"]) != recipe_hash(recipe):
        return False
    parents = manifest.get("parents", {}).values()
    return not hashes.changed_outputs(directory, manifest) and not any(map(changed_parent, parents))


def refuse_changed_outputs(directory: str | Path) -> None:
    """Refuse to write over files that have been changed since a stage wrote them.

    Args:
        directory: The stage's output directory. Missing files may be made again.

    Raises:
        HandoffError: Names the file.
    """
    folder, manifest = Path(directory), read_manifest(directory) or {}
    for name in hashes.changed_outputs(folder, manifest):
        if (folder / name).exists():
            raise HandoffError(
                f"{folder / name} was changed after {manifest['stage']} wrote it, and would be "
                "written over: put it back, or delete it to have it made again"
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
            key, old, new = hashes.first_difference(hashes.meaning(earlier), hashes.meaning(recipe))
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
            may grow) by the fingerprints in its manifest, data files by size and hash (or tag).
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
        elif any(Path(parent).glob("*config.json")):
            content[name] = fingerprint_dir(parent)
        elif isinstance(before, dict) and "files" in before and (resumes or finished):
            changed = changed_parent(before) if before["path"] == str(parent) else parent
            if changed is not None:
                raise HandoffError(
                    f"{directory} holds a run that began with other data ({name}): {changed} has "
                    f"been changed, added or removed since; put it back, {other}"
                )
            content[name] = data[name] = before
        elif is_remote(parent) or (not Path(parent).is_dir() and hashes.data_files(parent)):
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
