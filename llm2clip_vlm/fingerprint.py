"""Content hashes of files and directories."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_MODEL_FILES = frozenset(
    "config.json adapter_config.json generation_config.json preprocessor_config.json "
    "processor_config.json chat_template.jinja tokenizer.json tokenizer.model "
    "tokenizer_config.json vocab.json merges.txt".split()
)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})

_digests: dict[tuple[str, int, int], str] = {}


class HandoffError(ValueError):
    """A stage's output does not fit the stage that wants to read it."""


def fingerprint_file(path: str | Path) -> str:
    """sha256 of a file's content, remembered within this process by its size and time."""
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
