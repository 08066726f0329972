"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; at the end it becomes `path`.

    A kill leaves a hidden leftover and `path` as it was; an error leaves only `path` as it was. A
    file replaces an earlier one and is on disk when it appears; a folder replaces nothing.

    Args:
        path: Where it goes; the folders above are made.

    Yields:
        A path of which nothing exists yet.

    Raises:
        OSError: `path` is a folder with something in it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it.

    Args:
        path: The file; an earlier one is replaced.
        text: All of it.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
