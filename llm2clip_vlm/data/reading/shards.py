"""Images inside larger files: webdataset shards, Parquet and Arrow tables.

In an image's place a row gets a :class:`PackedImage`: where the bytes lie. Nothing is extracted to
disk, no member's name is ever used as a path, and links inside a tar are not followed.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

from llm2clip_vlm.data.reading.bad_records import RecordError, Refusals
from llm2clip_vlm.data.reading.images import MAX_IMAGE_BYTES, ImageError
from llm2clip_vlm.data.reading.table import file_states
from llm2clip_vlm.remote.addresses import CHANGED
from llm2clip_vlm.remote.ranges import File, RemoteFile

IMAGE_SUFFIXES = frozenset("jpg jpeg png webp gif bmp tif tiff avif heic jp2 jxl ppm".split())
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_GNU_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
TEXT_SUFFIXES = frozenset(("txt", "caption", "text"))
MAX_TEXT_BYTES = 4 * 2**20
"""A longer text or JSON member is refused unread."""

_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # others stand for a name that is no UTF-8
_ROW_GROUPS_KEPT = 4
_MAX_EXTENSION_BYTES = 2**14  # of a pax or GNU header: a long name, a few attributes
_MAX_EXTENSIONS = 16  # one after the other, before a member
_MAX_COLUMN_BYTES = 128 * 2**20
_MAX_RATIO = 100
_MAX_ROWS_A_BYTE = 8
_BATCH_ROWS = 64
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class PackedImage:
    """Place of an image's bytes in a larger file."""

    path: File
    start: int
    """First byte in a tar; row group of a Parquet file, record batch of an Arrow file."""
    size: int
    """Number of bytes in a tar; row within the row group or batch."""
    column: str | None = None
    """Column of a table. None: a tar."""
    item: tuple[int, int] = (0, 1)
    """Position in the cell and number of its images, where a cell may hold several."""
    state: Any = field(default=None, compare=False, repr=False)
    """What `file_states` said of the file when its rows were read. None: they are read now."""

    def read(self) -> bytes:
        """The encoded image; workers may call it at the same time.

        Raises:
            ImageError: It is too large, the row holds no bytes, or the file cannot be read or has
                changed: another record's picture may lie there now.
            RemoteError: An address cannot be read; that makes no record a bad one.
        """
        try:
            if self.state is not None and file_states([self.path]) != [self.state]:
                raise OSError(CHANGED)
            return self._member() if self.column is None else self._cell(self.column)
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"image in {self.path.name} cannot be read: {error}") from error

    def _member(self) -> bytes:
        if self.size > MAX_IMAGE_BYTES:
            raise OSError(f"{self.size} bytes, expected at most {MAX_IMAGE_BYTES}")
        if isinstance(self.path, RemoteFile):
            return self.path.read(self.start, self.size)
        with self.path.open("rb") as handle:
            handle.seek(self.start)
            data = handle.read(self.size)
        if len(data) != self.size:
            raise OSError(f"it ends after {len(data)} of {self.size} bytes")
        return data

    def is_copy(self, other: PackedImage) -> bool:
        """Whether both have the same bytes; those at an address are fetched for it, and kept.

        Raises:
            ImageError: See :meth:`read`.
        """
        return (self.column is not None or self.size == other.size) and self.read() == other.read()

    def count(self) -> int:
        """Number of images in a table's cell: 0 where it is null or an empty list.

        Raises:
            ImageError: It cannot be read.
        """
        if self.column is None:
            return 1
        try:
            values = self._values(self.column)
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"image in {self.path.name} cannot be read: {error}") from error
        parts = [cell.values() if isinstance(cell, dict) else [cell] for cell in values]
        return sum(any(part is not None for part in cell) for cell in parts)

    def _values(self, column: str) -> list[Any]:
        value = _column(self.path, self.start, column, _state(self.path))[self.size].as_py()
        return value if isinstance(value, list) else [value]

    def _cell(self, column: str) -> bytes:
        values, (number, expected) = self._values(column), self.item
        if len(values) != expected:
            raise OSError(f"{len(values)} image(s) in {column!r}, {expected} expected")
        value = values[number]
        cell = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(cell, bytes) and len(cell) > MAX_IMAGE_BYTES:
            raise OSError(f"{len(cell)} bytes, expected at most {MAX_IMAGE_BYTES}")
        if not isinstance(cell, bytes):
            raise OSError(f"column {column!r} holds no bytes in row {self.size}")
        return cell


class _Member(tarfile.TarInfo):
    """A member whose extension headers are refused where they are too long, or too many."""

    def _proc_member(self, shard: Any) -> Any:
        extends = self.type in (*_PAX, *_GNU_NAMES)
        shard.extensions = getattr(shard, "extensions", 0) + 1 if extends else 0
        if extends and self.size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(
                f"an extension header of {self.size} bytes, expected at most {_MAX_EXTENSION_BYTES}"
            )
        if shard.extensions > _MAX_EXTENSIONS:
            raise tarfile.ReadError(f"more than {_MAX_EXTENSIONS} extension headers of one member")
        return super()._proc_member(shard)  # type: ignore[misc]


def tar_rows(path: File, bad: Refusals) -> Iterator[tuple[str, dict[str, Any]]]:
    """The samples of a webdataset shard (img2dataset's layout: `key.jpg`, `key.txt`, `key.json`).

    Members belong together by their name up to the last dot, wherever in the shard they lie. A
    JSON member's fields become columns; a text member's column is called like its suffix; `image`
    is the image member and nothing else, and `id` is the key unless the JSON has one.

    Args:
        path: An uncompressed tar file.
        bad: Takes samples with a member that is damaged or occurs twice, and a shard's early end
            (the samples that are complete up to there are used).

    Yields:
        The sample's key and its row, in the shard's order.

    Raises:
        RecordError: This is no uncompressed tar file.
    """
    samples: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    end, size = "", path.stat().st_size
    try:
        with (
            path.open("rb") as handle,
            tarfile.open(fileobj=handle, mode="r:", tarinfo=_Member) as shard,
        ):
            while True:
                try:
                    member = shard.next()
                except (tarfile.ReadError, ValueError) as error:
                    end = str(error)
                    break
                if member is None:
                    end = missing_end(handle, shard.offset)
                    break
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = name.rpartition(".")
                key = f"{folder}{slash}{stem}"
                if not 0 <= member.size <= size - member.offset_data:
                    end = f"inside {member.name}"
                    samples.pop(key, None)
                    break
                if not (stem and dot and suffix) or stem.startswith("._"):  # macOS's doubles
                    continue
                try:
                    _take(samples.setdefault(key, {}), suffix.lower(), member, handle, path)
                except ValueError as error:
                    broken.setdefault(key, f"{member.name}: {error}")
    except tarfile.ReadError as error:
        raise RecordError(
            f"{path}: no uncompressed tar file ({error}); a .tar.gz has to be unpacked by gunzip"
        ) from error
    if end:
        bad.add(str(path), f"the shard ends too early: {end}")
    for key, parts in samples.items():
        if key in broken:
            bad.add(f"{path}:{key}", broken[key])
        elif parts:
            own = parts.pop("json", {})
            yield key, {"id": key, **own, **parts, "image": parts.get("image")}


def _take(
    parts: dict[str, Any], suffix: str, member: tarfile.TarInfo, handle: IO[bytes], path: File
) -> None:
    """Add a member to its sample: where the image lies, a text, or the JSON object."""
    part = "image" if suffix in IMAGE_SUFFIXES else suffix
    if part not in {"image", "json", *TEXT_SUFFIXES}:
        return
    if not member.isreg() or member.issparse():
        raise RecordError("a link, device or sparse file, expected a regular one")
    if part in parts:
        raise RecordError(f"the sample's {part} occurs twice")
    if part == "image":
        parts[part] = PackedImage(path, member.offset_data, member.size)
        return
    if member.size > MAX_TEXT_BYTES:
        raise RecordError(f"{member.size} bytes of text, expected at most {MAX_TEXT_BYTES}")
    handle.seek(member.offset_data)
    text = handle.read(member.size).decode("utf-8-sig")
    try:
        parts[part] = json.loads(text) if part == "json" else text
        if _HALF.search(json.dumps(parts[part], ensure_ascii=False)):
            raise RecordError("damaged text (half a character)")
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise RecordError(f"no JSON ({error})") from error
    if part == "json" and not isinstance(parts[part], dict):
        raise RecordError(f"{type(parts[part]).__name__}, expected an object")


def missing_end(handle: IO[bytes], offset: int) -> str:
    """Find what is wrong after a tar's last member; `tarfile` takes any damage there for the end.

    Args:
        handle: The file.
        offset: Where the last member ends.

    Returns:
        Empty where nothing is wrong.
    """
    handle.seek(offset)
    if (block := handle.read(tarfile.BLOCKSIZE)) == bytes(tarfile.BLOCKSIZE):
        return f"data behind its end at byte {offset}" if any(handle.read(2**16)) else ""
    return f"{'a damaged header' if block else 'no end marker'} at byte {offset}"


def table_rows(
    path: File, bad: Refusals, columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet or Arrow file; columns of bytes become :class:`PackedImage`.

    Args:
        path: `.parquet`, or `.arrow` as `datasets` saves it. An image column is binary, or a
            struct with the field `bytes` (Hugging Face's image feature).
        bad: Takes rows whose text is not UTF-8.
        columns: Columns to read. None: all.

    Yields:
        Position, counted from 1, and one mapping a row.

    Raises:
        RecordError: The file is damaged, or has no such column.
    """
    import pyarrow
    from pyarrow import parquet

    first = 1
    try:
        if path.suffix == ".arrow":
            for group, batch in enumerate(_arrow_batches(str(path), _state(path))):
                packed, plain = _columns(path, batch.schema, columns)
                yield from _rows(path, group, batch.select(plain), packed, bad, first)
                first += batch.num_rows
            return
        with parquet.ParquetFile(_readable(path)) as table:
            packed, plain = _columns(path, table.schema_arrow, columns)
            count, size = table.metadata.num_rows, path.stat().st_size
            if count > max(_MAX_ROWS_A_BYTE * size, 2**20):
                raise OSError(f"{path}: {count} rows in {size} bytes")
            for group in range(table.num_row_groups):
                _require_measure(path, table.metadata.row_group(group), plain)
                at = 0  # a batch at a time: cells of a dictionary may repeat what is large
                for rows in table.iter_batches(_BATCH_ROWS, [group], plain):
                    yield from _rows(path, group, rows, packed, bad, first, at)
                    at, first = at + rows.num_rows, first + rows.num_rows
                if not plain:
                    first += table.metadata.row_group(group).num_rows
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise RecordError(
            f"{path}: cannot be read as {path.suffix[1:].capitalize()} ({error})"
        ) from error


def _readable(path: File) -> Any:
    """What pyarrow opens; of an address the ranges that it asks for are kept."""
    return path.open("rb", keep=True) if isinstance(path, RemoteFile) else path


def _require_measure(path: File, group: Any, columns: list[str]) -> None:
    """Refuse a Parquet row group by whose own figures few bytes of the file unpack to many.

    Raises:
        OSError: A column unpacks beyond all measure, or a byte of it stands for many rows.
    """
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if unpacked > max(_MAX_COLUMN_BYTES, _MAX_RATIO * packed):
            raise OSError(
                f"{path}: {column.path_in_schema} unpacks from {packed} to {unpacked} bytes"
            )


def _rows(
    path: File, group: int, rows: Any, packed: list[str], bad: Refusals, first: int, at: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    if rows.nbytes > _MAX_COLUMN_BYTES:
        raise OSError(f"{rows.nbytes} bytes in {rows.num_rows} rows")
    try:
        plain = rows.to_pylist()
    except UnicodeDecodeError:  # of one text, or several
        plain = [None] * rows.num_rows
    for number, row in enumerate(plain):
        try:
            own = row if row is not None else rows.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            bad.add(f"{path}:{first + number}", f"the row cannot be read as UTF-8 ({error})")
            continue
        images = {name: PackedImage(path, group, at + number, name) for name in packed}
        yield first + number, own | images


def _columns(path: File, schema: Any, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the wanted columns: those that hold bytes, and the others."""
    from pyarrow import types

    def is_packed(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            return is_packed(kind.value_type)
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    if missing := {*wanted} - {*schema.names}:
        raise RecordError(
            f"{path}: no column {sorted(missing)[0]!r}; the columns are {', '.join(schema.names)}"
        )
    named = [column for column in schema if not wanted or column.name in wanted]
    packed = [column.name for column in named if is_packed(column.type)]
    return packed, [column.name for column in named if column.name not in packed]


def _state(path: File) -> Any:
    """What changes with a file's contents; an address has it in itself."""
    if isinstance(path, RemoteFile):
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=_ROW_GROUPS_KEPT)
def _column(path: File, group: int, column: str, state: Any) -> Any:
    """One column of a row group or batch: neighbours in it are read once."""
    import pyarrow
    from pyarrow import parquet

    try:
        if path.suffix == ".arrow":
            return _arrow_batches(str(path), state)[group].column(column)
        with parquet.ParquetFile(_readable(path)) as table:
            _require_measure(path, table.metadata.row_group(group), [column])
            return table.read_row_group(group, columns=[column], use_threads=False).column(column)
    except (pyarrow.ArrowException, MemoryError) as error:
        raise OSError(f"{path}: row group {group} cannot be read ({error})") from error


@lru_cache(maxsize=16)
def _arrow_batches(path: str, state: Any) -> list[Any]:
    """Record batches of a file in stream format, mapped into memory and validated.

    Arrow believes offsets and lengths: a damaged one ends the process, or shows other memory.
    """
    import pyarrow

    source = pyarrow.memory_map(path)
    with pyarrow.ipc.open_stream(source) as reader:
        batches = list(reader)
        whole = source.tell() == source.size()
        source.seek(max(source.size() - len(_ARROW_END), 0))
        if not whole or source.read() != _ARROW_END:
            raise pyarrow.ArrowInvalid("no end mark at its end; was it cut off?")
    for batch in batches:
        batch.validate(full=True)
    return batches
