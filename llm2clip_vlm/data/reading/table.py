"""One Arrow table for the records of a source: in memory, or in a file that all processes map.

A table is a stream of record batches, and 32 bytes after its end: the SHA-256 of all before
them. Its rows are the usable records, then what was refused, then one with
the facts (which files it was made of). `record` holds JSON, because names of files need not be
UTF-8 and an Arrow string must be; token ids, lengths and the like have columns of their own.
`Dataset.from_generator` of `datasets` would write the same batches, but in parts of 500 MB below a
folder of its own, beside its locks, and take 2.5 s to import; here a table is one file that appears
whole, with its hash.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm2clip_vlm.data.reading.bad_records import RecordError, Refused
from llm2clip_vlm.data.reading.text_rows import UNDECODED
from llm2clip_vlm.files import map_hashed, opened, written_hashed
from llm2clip_vlm.remote.ranges import File, RemoteFile
from llm2clip_vlm.runs.hashes import hash_json

logger = logging.getLogger(__name__)

TABLE_FILE_FROM_BYTES = 16 * 2**20
"""Sources of this size or more keep their table in a file; smaller ones are read at each start."""

Rows = Callable[[Refused, dict[str, Any]], Iterator[dict[str, Any]]]
"""Yields the usable records, one by one or as :class:`Columns`, and collects what it refused and
what else is worth keeping."""

_BATCH = 4096
_PLAIN = json.JSONEncoder(ensure_ascii=False)
# What `_PLAIN.encode` makes for each value anew, in half of its time.
_encoder = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _PLAIN.default, json.encoder.encode_basestring, None, ": ", ", ", False, False, True
)


class Columns(dict[str, Any]):
    """Several rows of a table: a list for each column, `record` as JSON."""


class Table:
    """The records of one source.

    Args:
        source: A file that :func:`arrow_table` wrote, or a buffer of the same.
        files: Files of the source, of which :attr:`files` tells.

    Raises:
        ValueError: The file is damaged, or has changed since it was written.
    """

    def __init__(self, source: Any, files: Sequence[File] = ()) -> None:
        import pyarrow

        self._source = source
        self.files = files
        content = map_hashed(source) if isinstance(source, Path) else source
        self._table = pyarrow.ipc.open_stream(content).read_all()
        self._chunks = {name: self._table.column(name).chunks for name in self._table.column_names}
        self._batch = len(self._chunks["record"][0])
        end = self._table.num_rows - 1
        self.facts: dict[str, Any] = self.record(end)
        """Facts noted while it was made; `files` has name, size and date of each."""
        self._length: int = self.facts["rows"]
        self.refused = [(where, why) for where, why in map(self.record, range(len(self), end))]
        """`(where, why)` of what could not be used."""

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> Any:
        """Let workers that are spawned map the file, too."""
        return Table, (self._source, self.files)

    def record(self, row: int) -> Any:
        """Read what was kept of a record."""
        return json.loads(self._cell("record", row).as_py())

    def items(self, name: str, row: int) -> npt.NDArray[Any]:
        """A record's list in a column of lists; not to be written to."""
        return np.asarray(self._cell(name, row).values.to_numpy(zero_copy_only=False))

    def cells(self, name: str) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of a binary column, some thousand records at a time, as they lie on disk."""
        for chunk in self._chunks[name]:
            yield np.frombuffer(chunk.buffers()[2] or b"", np.uint8)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers."""
        parts = self._table.column(name).slice(0, len(self)).chunks
        # by numpy: Arrow's pool keeps memory
        return np.concatenate([part.to_numpy() for part in parts])

    def _cell(self, name: str, row: int) -> Any:
        # All batches but the last have as many rows: no search, where `Dataset[i]` takes 75 us.
        return self._chunks[name][row // self._batch][row % self._batch]


def arrow_table(
    files: Sequence[File],
    index_dir: str | None,
    settings: Callable[[], Any],
    features: Mapping[str, Any],
    rows: Rows,
    *,
    keep: bool = True,
) -> Table:
    """Reads the records of a source, or opens the file where they were read before.

    One process at a time reads a large source; the others wait and map what it wrote.

    Args:
        files: Files of the source, of which :attr:`files` tells.
        index_dir: Folder of tables. None: `.llm2clip-index` beside the files.
        settings: Gives what the table depends on beside the files; each has its own file.
        features: Columns beside `record`: name to the type of a number or `binary`, or a list of
            one type for a column of lists (`{"length": "int64", "ids": ["int32"]}`).
        rows: Yields the usable records: `record`, what JSON can hold, and these columns.
        keep: Large sources have a file.

    Raises:
        RecordError: See `rows`; or the table cannot be written.
    """
    if not (keep and is_large(files)):
        import pyarrow

        sink = pyarrow.BufferOutputStream()
        _write(sink, features, files, rows)
        return Table(sink.getvalue(), files)
    folder = Path(index_dir) if index_dir else files[0].parent / ".llm2clip-index"
    path = folder / f"{files[0].stem}-{hash_json(settings())[:16]}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if path.is_file():
                try:
                    table = Table(path, files)
                    here = any(map(os.path.isfile, table.facts.get("absent", ())))
                    if table.facts["files"] == file_states(files) and not here:
                        return table
                    logger.info("%s: the data have changed; it is made again", path)
                except ValueError:
                    logger.warning("%s is damaged; it is made again", path)
            with written_hashed(path) as handle:
                _write(handle, features, files, rows)
    except OSError as error:
        raise RecordError(
            f"the table of {files[0]} cannot be written to {folder} ({error}); set `index_dir` to "
            "a folder that can be"
        ) from error
    logger.info("made %s", path)
    return Table(path, files)


def _write(sink: Any, features: Mapping[str, Any], files: Sequence[File], rows: Rows) -> None:
    import pyarrow as pa

    kinds = {
        name: pa.list_(pa.type_for_alias(kind[0]))
        if isinstance(kind, list)
        else pa.type_for_alias(kind)
        for name, kind in features.items()
    }
    schema = pa.schema({"record": pa.string(), **kinds})
    refused = Refused()
    facts: dict[str, Any] = {"files": file_states(files), "rows": 0}

    def whole() -> Iterator[dict[str, Any]]:
        for row in rows(refused, facts):
            facts["rows"] += len(row["record"]) if isinstance(row, Columns) else 1
            yield row
        for pair in refused.rows:
            yield {"record": pair}
        facts["absent"] = refused.absent
        yield {"record": facts}

    # Columns of numbers and text from the start: lists of thousands of rows with lists in them
    # would have Python's garbage collector look through all that the process holds.
    left: dict[str, list[Any]] = {name: [] for name in schema.names}

    def write(writer: Any, count: int) -> None:
        while len(left["record"]) >= count:
            arrays = [pa.array(left[each.name][:_BATCH], each.type) for each in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            for values in left.values():
                del values[:_BATCH]

    with pa.ipc.new_stream(sink, schema) as writer:
        for row in whole():
            some: Mapping[str, list[Any]] = row
            if not isinstance(row, Columns):
                some = {name: [row.get(name)] for name in left} | {"record": [_json(row["record"])]}
            for name in left:
                left[name] += some[name]
            write(writer, _BATCH)
        write(writer, 1)


def _json(value: Any) -> str:
    text = "".join(_encoder(value, 0))
    return text if text.isascii() or not UNDECODED.search(text) else json.dumps(value)


def file_states(files: Sequence[File]) -> list[list[Any]]:
    """Name, size and date of each file, or what an address is recognised by."""
    return [
        [*file.state]
        if isinstance(file, RemoteFile)
        else [str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns]
        for file in files
    ]


def is_large(files: Sequence[File]) -> bool:
    """Whether a table of these files is worth its own file; of an address it always is."""
    size = sum(file.stat().st_size for file in files)
    return size >= TABLE_FILE_FROM_BYTES or any(isinstance(file, RemoteFile) for file in files)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let in one process of this machine after another; where nothing can be locked, all."""
    with opened(folder) as handle:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
