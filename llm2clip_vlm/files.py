"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; at the end it becomes `path`.

    An error leaves only `path` as it was; so does a kill, but for a hidden folder, which the next
    process that writes `path` on this machine removes. A file replaces an earlier one and is on
    disk when it appears; a folder replaces nothing.

    Args:
        path: Where it goes; the folders above are made.

    Yields:
        A path of which nothing exists yet.

    Raises:
        OSError: `path` is a folder with something in it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(target) as folder:
        partial = folder / target.name
        yield partial
        if partial.is_file():
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.replace(target)


@contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, locked while this process lives; those of killed ones go."""
    # Locks may not reach other machines, so each looks after its own leftovers.
    ours = f".{target.name}.{os.uname().nodename}."
    for leftover in target.parent.glob(f"{glob.escape(ours)}*"):
        with suppress(OSError), _opened(leftover) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            shutil.rmtree(leftover)
    unlocked = Path(tempfile.mkdtemp(prefix=".new.", dir=target.parent))
    folder = target.with_name(f"{ours}{unlocked.name.removeprefix('.new.')}")
    with _opened(unlocked) as handle:
        with suppress(OSError):  # no locks on this file system: nobody removes anything
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield unlocked.rename(folder)
        finally:
            shutil.rmtree(folder)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it.

    Args:
        path: The file; an earlier one is replaced.
        text: All of it.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
