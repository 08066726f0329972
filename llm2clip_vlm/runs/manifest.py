"""The manifest that one stage leaves for the next: it says how the output was made.

`manifest.json` is written last, so its presence means that the stage finished. It holds the
resolved recipe and its hash, the state of every parent (data files too), hashes of the models
written beside it, size, date and hash of every file that the stage left, versions, seeds and time,
and its own hash. The next stage verifies it and refuses a mismatch by naming the field; a
checkpoint that has no manifest (made elsewhere) is taken as it is.
"""

from __future__ import annotations

import contextlib
import glob
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.files import let_read, read_json, write_atomically
from llm2clip_vlm.recipe.reading import to_plain
from llm2clip_vlm.remote.addresses import is_remote, look_up
from llm2clip_vlm.runs.card import CARD_NAME
from llm2clip_vlm.runs.hashes import (
    FileState,
    HandoffError,
    changed_files,
    file_states,
    fingerprint_dir,
    fingerprint_file,
    hash_json,
    model_files,
)

# What later stages need of a parent, under one address.
__all__ = ["HandoffError", "fingerprint_dir", "fingerprint_file"]

RESOLVED_NAME = "recipe.resolved.yaml"
"""File with the recipe that an output directory was made with."""
PARENTS_NAME = "parents.json"
"""File with the states of a run's parents."""

_SCHEMA = 1
_PACKAGES = (
    "torch transformers accelerate deepspeed peft datasets tokenizers safetensors numpy pillow "
    "lmms_eval llm2clip-vlm"
)
# Beside a manifest, but no output: what a run may write anew without computing anything anew.
_NO_OUTPUTS = frozenset(
    {MANIFEST_NAME, PARENTS_NAME, RESOLVED_NAME}
    | set("checkpoints composed failures features dropped.jsonl encode_cost.jsonl".split())
)
# Keys that change where a run writes or what it says, never what it computes.
_NEUTRAL_KEYS = frozenset(
    "base output_dir notes deviations hang_timeout_s max_bad_records max_bad_fraction "
    "feature_cache variables".split()
)
_NEUTRAL_TRAINER_KEYS = frozenset(
    "disable_tqdm log_level log_level_replica log_on_each_node logging_first_step "
    "logging_nan_inf_filter logging_steps logging_strategy per_device_train_batch_size report_to "
    "run_name save_on_each_node save_steps save_strategy save_total_limit".split()
)


def recipe_hash(recipe: BaseModel | Mapping[str, Any]) -> str:
    """sha256 of what a recipe computes: sorted JSON without paths of output, notes and logging.

    Args:
        recipe: A recipe, or its plain form as a manifest keeps it.
    """
    return hash_json(meaning(recipe))


def meaning(recipe: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that decide the result."""
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
            if part.is_dir() and part.name != "checkpoints" and any(model_files(part))
        },
        "files": _output_states(folder),
        "versions": versions(),
        "seeds": {"seed": plain.get("seed")},
        "seconds": round(seconds, 3),
        "extra": dict(extra or {}),
    }
    manifest["sha256"] = _own_hash(manifest)
    path = folder / MANIFEST_NAME
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hash_json({key: value for key, value in manifest.items() if key != "sha256"})


def _output_states(folder: Path) -> dict[str, FileState]:
    """State of every file that a stage left, by its path below the folder."""
    left: list[Path] = []
    for part in sorted(folder.iterdir()):
        if part.name not in _NO_OUTPUTS and not part.name.startswith((".", "part-")):
            left += sorted(part.rglob("*")) if part.is_dir() else [part]
    left = [file for file in left if file.name != CARD_NAME]  # people write into it
    weights = {
        file for part in {file.parent for file in left} - {folder} for file in model_files(part)
    }
    states = file_states([file for file in left if file not in weights])
    states |= file_states([file for file in left if file in weights], whole=True)
    return {Path(name).relative_to(folder).as_posix(): state for name, state in states.items()}


def changed_outputs(
    directory: str | Path, manifest: Mapping[str, Any], below: str = ""
) -> list[str]:
    """Find outputs of a stage that are gone or have changed.

    Args:
        directory: The stage's directory.
        manifest: Its manifest.
        below: Part of the directory to look at; empty = all.

    Returns:
        Paths below the directory.
    """
    states: dict[str, FileState] = manifest.get("files", {})
    inside = {name: s for name, s in states.items() if not below or name.startswith(f"{below}/")}
    return list(changed_files(inside, Path(directory)))


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
    manifest = _find_manifest(target)
    if manifest is not None:
        state["manifest_hash"] = fingerprint_file(manifest)
    elif target.is_dir():
        state["fingerprint"] = fingerprint_dir(target)
    elif is_remote(path):
        state["remote"] = [[*file] for file in look_up(str(path))]
    elif files := data_files(path):
        state["files"] = file_states(files)
    return state


def data_files(path: str | Path) -> list[Path]:
    """The files that a parent's path or pattern names."""
    files = [path] if Path(path).is_file() else sorted(glob.glob(str(path)))
    return [Path(file) for file in files]


def changed_parent(state: Mapping[str, Any]) -> str | None:
    """Find what has changed in a parent.

    Args:
        state: Result of :func:`parent_state`, then.

    Returns:
        A path. None: nothing has changed.
    """
    path = state["path"]
    if "files" in state:
        now = {str(file) for file in data_files(path)}
        differing = [*sorted(now ^ state["files"].keys()), *changed_files(state["files"])]
        return differing[0] if differing else None
    if parent_state(path) != state:
        return path
    manifest = _find_manifest(Path(path))
    if manifest is not None:
        below = "" if manifest.parent == Path(path) else Path(path).name
        for name in changed_outputs(manifest.parent, read_manifest(manifest.parent) or {}, below):
            return str(manifest.parent / name)
    return None


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
    own = _own_hash(manifest)
    if manifest.get("sha256", own) != own:
        raise HandoffError(f"{path} is damaged or was changed by hand; run that stage again")
    return manifest


def _find_manifest(path: Path) -> Path | None:
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
    if changed_outputs(directory, manifest):
        return False
    return all(changed_parent(state) is None for state in manifest.get("parents", {}).values())
