"""Sources that a recipe names by an address: their files, and rows that are read from them once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip_vlm.data.reading.bad_records import RecordError, Refusals, Refused
from llm2clip_vlm.data.reading.shards import PackedImage
from llm2clip_vlm.data.reading.table import Table, arrow_table
from llm2clip_vlm.recipe.base import DataSource
from llm2clip_vlm.remote.addresses import look_up
from llm2clip_vlm.remote.range_cache import RangeCache
from llm2clip_vlm.remote.ranges import File, RemoteFile

VERSION = 2
"""Version of what is kept of a file, and of the rules by which its rows are read."""

Rows = Iterator[tuple[int | str, dict[str, Any]]]
"""Line, key or position of each row, and the row."""

_AHEAD = 8


def remote_files(source: DataSource) -> list[File]:
    """The files of a source that lies elsewhere; nothing of them is fetched.

    Args:
        source: Gives the address, and the folder and size of the cache.

    Raises:
        RemoteError: See :func:`~llm2clip_vlm.remote.addresses.look_up`.
        RecordError: The cache's folder cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(source.cache_dir or f"{home}/llm2clip_vlm").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"{source.path}: no folder to keep it in ({error}); set `cache_dir`"
        ) from error
    kept = RangeCache(folder, int(source.cache_gib * 2**30))
    return [RemoteFile(state, kept) for state in look_up(source.path)]


def each_file(
    files: Sequence[File], read: Callable[[File, Refusals], Rows], bad: Refusals
) -> Iterator[tuple[File, Rows]]:
    """Files with their rows, those elsewhere read through once, some of them beside each other.

    Of these the rows are kept here, with the places of their images: other filters, stages and
    processes need nothing of the file again. Parquet is read by its columns each time.

    Args:
        files: Here or elsewhere.
        read: Reads the rows of one.
        bad: Takes rows that cannot be used.

    Raises:
        RemoteError: A file cannot be read.
        RecordError: See `read`.
    """
    for first in range(0, len(files), _AHEAD):
        some = files[first : first + _AHEAD]
        kept = [f for f in some if isinstance(f, RemoteFile) and f.suffix != ".parquet"]
        with ThreadPoolExecutor(_AHEAD) as pool:
            tables = dict(zip(kept, pool.map(partial(_table, read), kept), strict=True))
        for file in some:
            yield file, _rows(file, tables[file], bad) if file in tables else read(file, bad)


def _table(read: Callable[[File, Refusals], Rows], file: RemoteFile) -> Table:
    def rows(refused: Refused, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for place, row in read(file, refused):
            images = {n: (v.start, v.size) for n, v in row.items() if isinstance(v, PackedImage)}
            yield {"record": [place, {n: v for n, v in row.items() if n not in images}, images]}

    # Not in the folder of the source's own table, whose lock is held while this one is made.
    folder = str(file.parent / "rows")
    return arrow_table([file], folder, lambda: [VERSION, str(file)], {}, rows)


def _rows(file: File, table: Table, bad: Refusals) -> Rows:
    for where, why in table.refused:
        bad.add(where, why)
    for number in range(len(table)):
        place, row, images = table.record(number)
        yield place, row | {name: PackedImage(file, *lies) for name, lies in images.items()}
