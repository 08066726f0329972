"""Content hashes of files, directories and recipes."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llm2clip_vlm.recipe.reading import to_plain

_MODEL_FILES = frozenset(
    "config.json adapter_config.json generation_config.json preprocessor_config.json "
    "processor_config.json chat_template.jinja chat_template.json tokenizer.json tokenizer.model "
    "tokenizer_config.json special_tokens_map.json added_tokens.json spiece.model vocab.json "
    "vocab.txt merges.txt".split()
)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})

_digests: dict[tuple[str, int, int], str] = {}
_WHOLE_BYTES = 64 * 2**20
_PIECES, _PIECE_BYTES = 8, 2**16

# Keys that change where a run writes or what it says, never what it computes.
_NEUTRAL_KEYS = frozenset(
    "base output_dir notes deviations hang_timeout_s max_bad_records max_bad_fraction "
    "feature_cache variables".split()
)
_NEUTRAL_TRAINER_KEYS = frozenset(
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor disable_tqdm "
    "log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter "
    "logging_steps logging_strategy per_device_train_batch_size report_to run_name "
    "save_on_each_node save_steps save_strategy save_total_limit".split()
)
_NEUTRAL_SOURCE_KEYS = frozenset(("cache_dir", "cache_gib", "index_dir"))

FileState = list[Any]
"""Size, modification time in ns, and hash of a file."""


class HandoffError(ValueError):
    """A stage's output does not fit the stage that wants to read it."""


def hash_json(value: Any) -> str:
    """sha256 of a value as sorted JSON; what JSON does not have goes in as text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """sha256 of a file's content, cached in this process by its size and time."""
    target = Path(path).resolve()
    stat = target.stat()
    if (key := (str(target), stat.st_size, stat.st_mtime_ns)) not in _digests:
        with target.open("rb") as handle:
            _digests[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _digests[key]


def fingerprint_dir(path: str | Path) -> str:
    """sha256 over names and contents of the files that make a directory what it is.

    For a model directory these are its weights, configs and tokenizer (directly in it); for any
    other directory every file below it but hidden ones.

    Raises:
        HandoffError: No such directory, or nothing in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise HandoffError(f"expected a directory at {folder}, found none")
    if not (files := list(model_files(folder))):
        below = ((file, f"/{file.relative_to(folder).as_posix()}") for file in folder.rglob("*"))
        files = [file for file, name in below if file.is_file() and "/." not in name]
    if not files:
        raise HandoffError(f"expected files in {folder}, found none to take a fingerprint of")
    digest = hashlib.sha256()
    for file in sorted(files):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{fingerprint_file(file)}\n".encode())
    return digest.hexdigest()


def model_files(folder: Path) -> Iterator[Path]:
    """The files directly in a directory that make it a model: weights, configs, tokenizer."""
    for file in folder.iterdir():
        if file.is_file() and (file.suffix in _WEIGHT_SUFFIXES or file.name in _MODEL_FILES):
            yield file


def file_state(path: Path, *, whole: bool = False) -> FileState:
    """State by which a file is recognised.

    Args:
        path: The file.
        whole: Hash all of it however large it is; otherwise eight pieces stand for what is larger
            than 64 MiB, such as a shard of images.
    """
    stat = path.stat()
    if whole or stat.st_size <= _WHOLE_BYTES:
        return [stat.st_size, stat.st_mtime_ns, fingerprint_file(path)]
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for piece in range(_PIECES):
            handle.seek((stat.st_size - _PIECE_BYTES) * piece // (_PIECES - 1))
            digest.update(handle.read(_PIECE_BYTES))
    return [stat.st_size, stat.st_mtime_ns, f"pieces:{digest.hexdigest()}"]


def file_states(files: Iterable[Path], *, whole: bool = False) -> dict[str, FileState]:
    """States of several files by their path, see :func:`file_state`."""
    listed = [file for file in files if file.is_file()]
    with ThreadPoolExecutor(8) as pool:
        states = pool.map(lambda file: file_state(file, whole=whole), listed)
        return dict(zip(map(str, listed), states, strict=True))


def changed_files(states: Mapping[str, FileState], folder: Path | None = None) -> Iterator[str]:
    """Find files that are gone or have changed.

    A file of the same size and date counts as unchanged; one of another date is hashed again, so a
    copy of a folder counts as the same.

    Args:
        states: Result of :func:`file_states`.
        folder: Folder that their paths are relative to.
    """
    for name, (size, date, digest) in states.items():
        file = Path(name) if folder is None else folder / name
        if not file.is_file() or (stat := file.stat()).st_size != size:
            yield name
        elif stat.st_mtime_ns != date:
            whole = not str(digest).startswith("pieces:")
            if file_state(file, whole=whole)[2] != digest:
                yield name


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
    files, start = manifest.get("files", {}), f"{below}/" if below else ""
    inside = {name: state for name, state in files.items() if name.startswith(start)}
    return list(changed_files(inside, Path(directory)))


def data_files(path: str | Path) -> list[Path]:
    """The files that a path or pattern names; `**` is any number of folders."""
    files = [path] if os.path.isfile(path) else sorted(glob.glob(str(path), recursive=True))
    return [Path(file) for file in files]


def recipe_hash(recipe: BaseModel | Mapping[str, Any]) -> str:
    """sha256 of what a recipe computes: sorted JSON without paths of output, notes and logging.

    Args:
        recipe: A recipe, or its plain form as a manifest keeps it.
    """
    return hash_json(meaning(recipe))


def meaning(recipe: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that decide the result."""
    plain = to_plain(recipe) if isinstance(recipe, BaseModel) else recipe
    kept = {key: _without_places(plain[key]) for key in plain.keys() - _NEUTRAL_KEYS}
    if trainer := kept.get("trainer"):
        kept["trainer"] = {key: trainer[key] for key in trainer.keys() - _NEUTRAL_TRAINER_KEYS}
    return kept


def _without_places(value: Any) -> Any:
    """A value without the folders that its sources of data keep things in."""
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, dict):
        return {key: value[key] for key in value.keys() - _NEUTRAL_SOURCE_KEYS}
    return value


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first dotted key at which two plain values differ, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    return key, old, new
