"""Tables made of a source's files, kept in a file until the data or the settings change."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.files import written_whole

logger = logging.getLogger(__name__)

TABLE_FILE_FROM_BYTES = 64 * 2**20
"""Sources of this size or more keep their table in a file; smaller ones are read at each start."""


class Table(Protocol):
    """What is kept."""

    made_of: list[list[Any]]
    """As :func:`file_states` was when it was made."""


T = TypeVar("T", bound=Table)


def file_states(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and date of each file."""
    return [[str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files]


def is_large(files: Sequence[Path]) -> bool:
    """Whether a table of these files is worth a file of its own."""
    return sum(file.stat().st_size for file in files) >= TABLE_FILE_FROM_BYTES


_READ: set[tuple[str, int, int, int]] = set()  # found to be as written, by this process


def require_unchanged(path: Path, digest: Callable[[], Any], stated: Any) -> None:
    """Compare a table's file with the hash in it, once in each process.

    Args:
        path: The file.
        digest: Computes the hash of what lies there.
        stated: The hash that it was written with.

    Raises:
        ValueError: They differ.
    """
    stat = path.stat()
    read = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if read not in _READ and digest() != stated:
        raise ValueError(f"{path} has changed since it was written; delete it: it is made again")
    _READ.add(read)


def kept_table(
    files: Sequence[Path],
    index_dir: str | None,
    suffix: str,
    settings: Any,
    read: Callable[[Path], T],
    write: Callable[[Path], None],
) -> T:
    """A table from its file, which one of several processes makes first where it has to be.

    Args:
        files: The source's.
        index_dir: Folder of tables; none = `.llm2clip-index` beside the files.
        suffix: Of the table's file.
        settings: What the table depends on beside the files; each has a table of its own.
        read: Opens a table; raises ValueError, KeyError or TypeError where it is damaged.
        write: Makes a table.

    Raises:
        RecordError: The table cannot be written.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    folder = Path(index_dir) if index_dir else files[0].parent / ".llm2clip-index"
    path = folder / f"{files[0].stem}-{digest.hexdigest()[:16]}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if path.is_file():
                try:
                    table = read(path)
                    if table.made_of == file_states(files):
                        return table
                    logger.info("%s: the data have changed; it is made again", path)
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s is damaged; it is made again", path)
            with written_whole(path) as partial:
                write(partial)
    except OSError as error:
        raise RecordError(
            f"the table of {files[0]} cannot be written to {folder} ({error}); set `index_dir` to "
            "a folder that can be"
        ) from error
    logger.info("made %s", path)
    return read(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine after another; where nothing can be locked, each for itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
