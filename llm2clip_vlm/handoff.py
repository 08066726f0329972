"""What one stage leaves for the next: a manifest that says how the output was made.

`manifest.json` is written last, so its presence means that the stage finished. It holds the
resolved recipe and its hash, the state of every parent, hashes of the models written beside it,
versions, seeds and time. The next stage verifies it and refuses a mismatch by naming the field; a
checkpoint that has no manifest (somebody else's) is taken as it is.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.fingerprint import (
    HandoffError,
    fingerprint_dir,
    fingerprint_file,
    model_files,
)
from llm2clip_vlm.recipe import RecipeError, load_recipe, save_resolved, to_plain

# What later stages need of a parent, under one address.
__all__ = ["HandoffError", "fingerprint_dir", "fingerprint_file"]

RESOLVED_NAME = "recipe.resolved.yaml"
"""File with the recipe that an output directory was made with."""
PARENTS_NAME = "parents.json"
"""File with the content of what a run began with."""

_SCHEMA = 1
_PACKAGES = (
    "torch transformers accelerate deepspeed peft datasets tokenizers safetensors numpy pillow "
    "lmms_eval llm2clip-vlm"
)
# Keys that change where a run writes or what it says, never what it computes.
_NEUTRAL_KEYS = frozenset(
    "base output_dir notes deviations hang_timeout_s max_bad_records max_bad_fraction".split()
)
_NEUTRAL_TRAINER_KEYS = frozenset(
    "disable_tqdm log_level log_level_replica log_on_each_node logging_first_step "
    "logging_nan_inf_filter logging_steps logging_strategy report_to run_name save_on_each_node "
    "save_steps save_strategy save_total_limit".split()
)


def recipe_hash(recipe: BaseModel | Mapping[str, Any]) -> str:
    """sha256 of what a recipe computes: sorted JSON without paths of output, notes and logging.

    Args:
        recipe: A recipe, or its plain form as a manifest keeps it.
    """
    text = json.dumps(_meaning(recipe), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _meaning(recipe: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    plain = to_plain(recipe) if isinstance(recipe, BaseModel) else recipe
    kept = {key: plain[key] for key in plain.keys() - _NEUTRAL_KEYS}
    if trainer := kept.get("trainer"):
        kept["trainer"] = {key: trainer[key] for key in trainer.keys() - _NEUTRAL_TRAINER_KEYS}
    return kept


def write_manifest(
    output_dir: str | Path,
    *,
    stage: str,
    recipe: BaseModel,
    parents: Mapping[str, str | Path],
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
            read.
        fingerprints: What the next stage must be able to compare, such as `text_encoder`.
        seconds: Wall time of the stage.
        extra: Anything else worth keeping; must be JSON.

    Returns:
        The manifest's path.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = to_plain(recipe)
    world = {"world.seed": plain["world"]["seed"]} if plain.get("world") else {}
    manifest = {
        "schema": _SCHEMA,
        "stage": stage,
        "recipe": plain,
        "recipe_hash": recipe_hash(plain),
        "parents": {name: parent_state(path) for name, path in parents.items()},
        "fingerprints": dict(fingerprints),
        "outputs": {
            part.name: fingerprint_dir(part)
            for part in sorted(folder.iterdir())
            if part.is_dir() and part.name != "checkpoints" and any(model_files(part))
        },
        "versions": versions(),
        "seeds": {"seed": plain.get("seed"), **world},
        "seconds": round(seconds, 3),
        "extra": dict(extra or {}),
    }
    path = folder / MANIFEST_NAME
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def versions(*more: str) -> dict[str, str]:
    """Installed versions of what computes here, and of any other distributions named."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES.split(), *more):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def parent_state(path: str | Path) -> dict[str, str]:
    """What a manifest keeps of a parent: its manifest's hash, else its fingerprint.

    Args:
        path: A directory, a file, a pattern (its files' names and sizes: shards are too large to
            hash), or a hub id (kept by name only: there is nothing to hash).
    """
    target = Path(path)
    state = {"path": str(path)}
    manifest = _find_manifest(target)
    if manifest is not None:
        state["manifest_hash"] = fingerprint_file(manifest)
    elif target.is_dir():
        state["fingerprint"] = fingerprint_dir(target)
    elif target.is_file():
        state["fingerprint"] = fingerprint_file(target)
    elif glob.has_magic(str(path)):
        files = [(name, Path(name).stat().st_size) for name in sorted(glob.glob(str(path)))]
        state["fingerprint"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return state


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """The manifest in a stage's output directory; none where there is no such file.

    Raises:
        HandoffError: The file is not a manifest that this version reads.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HandoffError(f"{path} is not JSON ({error}); run that stage again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != _SCHEMA:
        raise HandoffError(
            f"{path}: schema: expected {_SCHEMA}, got {schema!r}; run that stage again with this "
            "version"
        )
    return manifest


def _find_manifest(path: Path) -> Path | None:
    """The manifest of a stage's output, or of the stage that wrote the model directory `path`."""
    for folder in (path, path.parent):
        if path.is_dir() and (folder / MANIFEST_NAME).is_file():
            return folder / MANIFEST_NAME
    return None


def verify_parent(directory: str | Path, *stages: str) -> dict[str, Any] | None:
    """Check that a directory is what the next stage takes it for.

    Args:
        directory: A stage's output directory, or a model directory directly below it.
        stages: Those that may have written it; none = any.

    Returns:
        The manifest; none for a checkpoint that no stage of this project wrote.

    Raises:
        HandoffError: Another stage wrote it, or the model's files are not those that it left.
    """
    folder = Path(directory)
    path = _find_manifest(folder)
    manifest = read_manifest(path.parent) if path else None
    if path is None or manifest is None:
        return None
    if stages and manifest["stage"] not in stages:
        raise HandoffError(
            f"{folder}: stage: expected {' or '.join(stages)}, got {manifest['stage']} (from "
            f"{path}); name the output of the right stage"
        )
    recorded = manifest["outputs"].get(folder.name) if path.parent != folder else None
    if recorded is not None and (actual := fingerprint_dir(folder)) != recorded:
        raise HandoffError(
            f"{folder}: outputs.{folder.name}: expected {recorded}, got {actual}: files were "
            f"changed after {manifest['stage']} wrote them; run that stage again"
        )
    return manifest


def refuse_bidirectional(config: Any, where: str | Path) -> None:
    """Refuse a text encoder where a decoder is needed.

    Args:
        config: The language model's config.
        where: Its path, for the message.

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
        True if the manifest is there, its recipe computes the same, every model that it lists is
        still there, and no parent has been written anew.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest["recipe_hash"] != recipe_hash(recipe):
        return False
    if any(not (Path(directory) / name).is_dir() for name in manifest["outputs"]):
        return False
    return all(parent_state(state["path"]) == state for state in manifest["parents"].values())


def claim_output_dir(recipe: BaseModel) -> Path:
    """Write the resolved recipe beside the results to come, or refuse a directory in use.

    Safe to call in every process of a launch.

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
    if path.is_file():
        try:
            earlier = load_recipe(path, type(recipe))
        except RecipeError as error:
            raise HandoffError(
                f"{folder} holds a run whose recipe this version does not read; choose another "
                f"output_dir, or delete the folder ({error})"
            ) from None
        if recipe_hash(earlier) != recipe_hash(recipe):
            key, old, new = _difference(_meaning(earlier), _meaning(recipe))
            raise HandoffError(
                f"{folder} holds a run with another recipe: {key}: was {old!r}, is now {new!r}; "
                "choose another output_dir, or delete the folder"
            )
    save_resolved(recipe, path)
    return folder


def claim_parents(
    directory: str | Path, parents: Mapping[str, str | Path], *, resumes: bool
) -> None:
    """Note what a run begins with, or refuse to go on with what began with something else.

    A checkpoint of other weights would be taken for a result of these. Call it in one process.

    Args:
        directory: The run's output directory.
        parents: Name to path. Models are compared by their files, a stage's other output (a cache
            may grow) by the fingerprints in its manifest, anything else not at all.
        resumes: From a checkpoint.

    Raises:
        HandoffError: Names the parent.
    """
    path = Path(directory) / PARENTS_NAME
    content: dict[str, Any] = {}
    for name, parent in parents.items():
        if manifest := read_manifest(parent):
            content[name] = manifest["fingerprints"]
        elif (Path(parent) / "config.json").is_file():
            content[name] = fingerprint_dir(parent)
    known = resumes and path.is_file()
    earlier = json.loads(path.read_text(encoding="utf-8")) if known else {}
    for name in earlier.keys() & content.keys():
        if earlier[name] != content[name]:
            raise HandoffError(
                f"{directory} holds a run that began with another {name}: {parents[name]} was made "
                "anew since; choose another output_dir, or delete the folder"
            )
    write_atomically(path, json.dumps(content, indent=1))


def _difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first dotted key at which two plain values differ, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return _difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    return key, old, new
