"""Content hashes of files and directories."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_MODEL_FILES = frozenset(
    "config.json adapter_config.json generation_config.json preprocessor_config.json "
    "processor_config.json chat_template.jinja tokenizer.json tokenizer.model "
    "tokenizer_config.json vocab.json merges.txt".split()
)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})

_digests: dict[tuple[str, int, int], str] = {}
_WHOLE_BYTES = 64 * 2**20
_PIECES, _PIECE_BYTES = 8, 2**16

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
    key = (str(target), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
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
    files = list(model_files(folder))
    if not files:
        files = [
            file
            for file in folder.rglob("*")
            if file.is_file() and "/." not in f"/{file.relative_to(folder).as_posix()}"
        ]
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
        if not file.is_file() or (stat := os.stat(file)).st_size != size:
            yield name
        elif stat.st_mtime_ns != date:
            whole = not str(digest).startswith("pieces:")
            if file_state(file, whole=whole)[2] != digest:
                yield name
