"""Image-text records of any format, read in one pass and then by their number.

A source's files are read once, through its filters. What a record consists of (its key, where the
image lies, its captions) goes into a compact table, in memory for small sources and in a file for
larger ones. The table is never unpickled, shared by worker processes without a copy, and made anew
when a file's size or date, the source's settings or :data:`VERSION` have changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from llm2clip_vlm.config import ImageTextSource
from llm2clip_vlm.data.bad_records import BadRecords, RecordError, Refusals
from llm2clip_vlm.data.images import (
    MAX_IMAGE_BYTES,
    EncodedImage,
    ImageError,
    check_image_name,
    read_image,
)
from llm2clip_vlm.data.records import collect_captions, get_column, iter_records, source_files
from llm2clip_vlm.data.shards import PackedImage

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the table's layout and of the rules by which records are taken or refused."""

INDEX_FILE_FROM_BYTES = 64 * 2**20
"""Sources of this size or more keep their table in a file; smaller ones are read at each start."""

_MAX_KINDS = 63
_FOOTER = 8


@dataclass(frozen=True)
class ImageTextRecord:
    """One image and its captions by kind."""

    key: str
    """Unique within the source."""
    image: Path | PackedImage
    """The image file, below `root`; or where the bytes lie in a shard or table."""
    captions: dict[str, list[str]]
    """Kind (`short`, `long`, or the column's name) to captions, no list empty."""
    root: Path = field(default=Path())
    """Folder that the image may not leave; the image's own folder where not given."""
    source: str = ""
    """Name of the file that the record was read from."""

    @property
    def where(self) -> str:
        """What messages and `dropped.jsonl` call the record."""
        return f"{self.source}:{self.key}" if self.source else self.key

    def encoded(self) -> EncodedImage:
        """The image, its header read and found to be a picture's.

        Raises:
            ImageError: It cannot be read, lies outside `root`, or can be no picture.
        """
        if isinstance(self.image, PackedImage):
            name = f"of {self.where} in {self.image.path.name}"
            if self.image.column is None and self.image.size > MAX_IMAGE_BYTES:
                raise ImageError(
                    f"image {name}: {self.image.size} bytes, expected at most {MAX_IMAGE_BYTES}"
                )
            try:
                data = self.image.read()
            except OSError as error:
                raise ImageError(f"image {name} cannot be read: {error}") from error
        else:
            root = self.image.parent if self.root == Path() else self.root
            below = self.image.is_relative_to(root)
            path = str(self.image.relative_to(root) if below else self.image)
            name, data = f"{path!r} below {root}", read_image(root, path)
        image = EncodedImage(data, name)
        image.require_picture()
        return image

    def open(self) -> Image.Image:
        """Decode the image as RGB.

        Raises:
            ImageError: As :meth:`encoded`, or it does not decode.
        """
        return self.encoded().rgb(strict=True)


class IndexFile(Sequence[ImageTextRecord]):
    """The table of one source: a line of JSON a record, and where each begins.

    Args:
        path: A file that :func:`write_table` wrote, or the bytes of one.
        source: What it was made from.

    Raises:
        ValueError: This is no complete table.
    """

    def __init__(self, path: Path | bytes, source: ImageTextSource) -> None:
        self._path = path
        self._source = source
        self._open()

    def _open(self) -> None:
        self._buffer: bytes | mmap.mmap
        if isinstance(self._path, bytes):
            self._buffer = self._path
        else:
            with self._path.open("rb") as handle:
                self._buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._buffer[-_FOOTER:], "little")
        self.header: dict[str, Any] = json.loads(self._buffer[-_FOOTER - length : -_FOOTER])
        count, at = self.header["count"], self.header["arrays_at"]
        self._starts = np.frombuffer(self._buffer, np.int64, count + 1, at)
        self.kind_bits = np.frombuffer(self._buffer, np.int64, count, at + 8 * (count + 1))
        self.kinds: list[str] = self.header["kinds"]
        self._files = [Path(name) for name, _, _ in self.header["files"]]
        self._root = _image_root(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.kind_bits)

    @overload
    def __getitem__(self, index: int) -> ImageTextRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageTextRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageTextRecord | list[ImageTextRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        line = self._buffer[self._starts[index] : self._starts[index + 1]]
        key, source, image, captions = json.loads(line)
        if isinstance(image, str):
            return ImageTextRecord(key, self._root / image, captions, self._root, source)
        packed = PackedImage(self._files[image[0]], *image[1:])
        return ImageTextRecord(key, packed, captions, self._root, source)


class ImageTextRecords(Sequence[ImageTextRecord]):
    """Records of several sources, or a selection of them, each read when it is asked for.

    Args:
        parts: One after the other.
        positions: Which of them, in which order; none = all.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[ImageTextRecord]],
        positions: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        total = int(self._ends[-1]) if parts else 0
        self._positions = np.arange(total) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> ImageTextRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageTextRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageTextRecord | list[ImageTextRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = int(self._positions[index])
        part = int(np.searchsorted(self._ends, position, side="right"))
        return self._parts[part][position - int(self._ends[part])]

    def take(self, chosen: Sequence[int] | npt.NDArray[Any]) -> ImageTextRecords:
        """A selection, by positions or as a mask.

        Args:
            chosen: Positions, or one boolean a record.
        """
        return ImageTextRecords(self._parts, self._positions[np.asarray(chosen)])

    def has_kinds(self, wanted: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Which records have a caption of one of these kinds."""
        names = set(wanted)
        found = [
            part.kind_bits & sum(1 << i for i, kind in enumerate(part.kinds) if kind in names) != 0
            if isinstance(part, IndexFile)
            else np.array([not names.isdisjoint(record.captions) for record in part], dtype=bool)
            for part in self._parts
        ]
        return np.concatenate(found)[self._positions]

    def kinds(self) -> set[str]:
        """All kinds of captions."""
        found: set[str] = set()
        for part in self._parts:
            if isinstance(part, IndexFile):
                found.update(part.kinds)
            else:
                found.update(kind for record in part for kind in record.captions)
        return found


def read_image_text(source: ImageTextSource, bad: BadRecords) -> ImageTextRecords:
    """Read the records of a source. Images are not opened yet.

    Args:
        source: The file or files, their columns and filters.
        bad: Takes rows without an image, a key or a caption, and keys that occur twice.

    Returns:
        Records in file order; rows that `group_by` joins are one record with the first row's image.

    Raises:
        RecordError: A file cannot be read, or too many records are bad.
    """
    files = source_files(source.path)
    if sum(file.stat().st_size for file in files) < INDEX_FILE_FROM_BYTES:
        handle = BytesIO()
        write_table(source, files, handle)
        index = IndexFile(handle.getvalue(), source)
    else:
        index = _indexed(source, files)
    refused = index.header["bad"]
    bad.take(len(index) + len(refused), refused)
    return ImageTextRecords([index])


def _indexed(source: ImageTextSource, files: Sequence[Path]) -> IndexFile:
    """The source's table from its file, written first where there is none, or an outdated one."""
    settings = source.model_dump(exclude={"weight", "index_dir"}) | {"version": VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(source.index_dir) if source.index_dir else files[0].parent / ".llm2clip-index"
    path = folder / f"{files[0].stem}-{digest}.index"
    if path.is_file():
        try:
            index = IndexFile(path, source)
            if index.header["files"] == _states(files) and index.header["version"] == VERSION:
                return index
            logger.info("%s: the data have changed; indexing them again", path)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; indexing the data again", path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".partial-", delete=False) as handle:
            partial = Path(handle.name)
            try:
                write_table(source, files, handle)
                handle.flush()
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"the index of {source.path} cannot be written to {folder} ({error}); set `index_dir` "
            "to a folder that can be"
        ) from error
    logger.info("indexed %s: %s", source.path, path)
    return IndexFile(path, source)


def write_table(source: ImageTextSource, files: Sequence[Path], handle: IO[bytes]) -> None:
    """Read a source's records and write them as a table.

    Args:
        source: The files with their filters.
        files: What `source.path` stands for.
        handle: Where to.

    Raises:
        RecordError: A file cannot be read, or none of its records can be used.
    """
    states = _states(files)
    numbers = {str(file): number for number, file in enumerate(files)}
    bad = _Refused()
    kinds: dict[str, int] = {}
    starts, bits, position = [0], [], 0
    for key, name, image, captions in _records(source, bad):
        place: str | list[Any] = image
        if isinstance(image, PackedImage):
            column = [] if image.column is None else [image.column]
            place = [numbers[str(image.path)], image.start, image.size, *column]
        line = json.dumps([key, name, place, captions], ensure_ascii=False)
        position += handle.write(line.encode(errors="surrogatepass") + b"\n")
        starts.append(position)
        bits.append(sum(1 << kinds.setdefault(kind, len(kinds)) for kind in captions))
        if len(kinds) > _MAX_KINDS:
            raise RecordError(
                f"{source.path}: more than {_MAX_KINDS} kinds of captions ({', '.join(kinds)}); "
                "a mapping-valued column's keys are kinds, such as `short` and `long`"
            )
    padding = -position % 8
    handle.write(bytes(padding))
    handle.write(np.array(starts, np.int64).tobytes() + np.array(bits, np.int64).tobytes())
    header = {
        "version": VERSION,
        "files": states,
        "count": len(bits),
        "arrays_at": position + padding,
        "kinds": list(kinds),
        "bad": bad.rows,
    }
    footer = json.dumps(header).encode()
    handle.write(footer + len(footer).to_bytes(_FOOTER, "little"))


@dataclass
class _Refused:
    """Collects bad records; whether there are too many is decided when all are known."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Keep one."""
        self.rows.append((where, why))


def _records(
    source: ImageTextSource, bad: Refusals
) -> Iterator[tuple[str, str, Any, dict[str, list[str]]]]:
    """Key, file, image and captions of each record that can be used."""
    seen: set[str] = set()
    root = _image_root(source)
    for group in iter_records(source, bad, columns=[source.image_field]):
        first = group.rows[0]
        image = get_column(first, source.image_field)
        identity = get_column(first, source.id_field)
        key = group.key if source.group_by or identity is None else str(identity)
        try:
            if not isinstance(image, PackedImage) and not (isinstance(image, str) and image):
                raise RecordError(
                    f"column {source.image_field!r} holds {image!r}, expected a path"
                    if image is not None
                    else f"no image in {source.image_field!r}, expected a path or bytes"
                )
            if key in seen:
                raise RecordError(f"the key {key!r} ({source.id_field}) occurs twice")
            if isinstance(image, str):
                check_image_name(root, image)
            captions = collect_captions(group, source.fields)
        except (RecordError, ImageError) as error:
            bad.add(group.where, str(error))
            continue
        seen.add(key)
        yield key, group.where.partition(":")[0], image, captions


def _states(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and date of each file."""
    return [[str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files]


def _image_root(source: ImageTextSource) -> Path:
    return Path(source.image_root) if source.image_root else Path(source.path).parent
