"""Image-text records of any format, read in one pass and then by their number.

A source's files are read once, through its filters. What a record consists of (its key, where the
image lies, its captions) goes into a compact table, in memory for small sources and in a file for
larger ones. The table is never unpickled, shared by worker processes without a copy, and made anew
when a file's size or date, the source's settings or :data:`VERSION` have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llm2clip_vlm.config import ImageTextSource
from llm2clip_vlm.data.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.caption_draw import caption_id
from llm2clip_vlm.data.images import (
    MAX_IMAGE_BYTES,
    EncodedImage,
    ImageError,
    check_image_name,
    read_image,
)
from llm2clip_vlm.data.records import (
    RowGroup,
    collect_captions,
    get_column,
    iter_records,
    source_files,
)
from llm2clip_vlm.data.shards import PackedImage
from llm2clip_vlm.files import written_whole

logger = logging.getLogger(__name__)

VERSION = 2
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
    """File that the record was read from."""
    place: str = ""
    """Its line, position or key in that file."""

    @property
    def where(self) -> str:
        """What messages and `dropped.jsonl` call the record."""
        return ":".join(dict.fromkeys(filter(None, (self.source, self.place, self.key))))

    @property
    def identity(self) -> int:
        """A number for what is drawn at random; the folder has no part in it."""
        name = self.source.rpartition("/")[2]
        return caption_id(f"{name}:{self.key}" if name else self.key)

    def encoded(self) -> EncodedImage:
        """The image, its header read and found to be a picture's.

        Raises:
            ImageError: It cannot be read, lies outside `root`, or can be no picture.
        """
        if isinstance(self.image, PackedImage):
            name = f"of {self.where}"
            if self.image.column is None and (size := self.image.size) > MAX_IMAGE_BYTES:
                raise ImageError(f"image {name}: {size} bytes, expected at most {MAX_IMAGE_BYTES}")
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


class IndexFile:
    """The table of one source: a line of JSON a record, and where each begins.

    Args:
        table: A file that :func:`write_table` wrote, or the bytes of one.
        source: What it was made from.

    Raises:
        ValueError: This is no complete table.
    """

    def __init__(self, table: Path | bytes, source: ImageTextSource) -> None:
        self._made_of = (table, source)
        self._buffer: bytes | mmap.mmap
        if isinstance(table, bytes):
            self._buffer = table
        else:
            with table.open("rb") as handle:
                self._buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._buffer[-_FOOTER:], "little")
        self.header: dict[str, Any] = json.loads(self._buffer[-_FOOTER - length : -_FOOTER])
        count, at = self.header["count"], self.header["arrays_at"]
        self._starts = np.frombuffer(self._buffer, np.int64, count, at)
        self.kind_bits = np.frombuffer(self._buffer, np.int64, count, at + 8 * count)
        self._files = [Path(name) for name, _, _ in self.header["files"]]
        self._root = _image_root(source)

    def __reduce__(self) -> Any:
        return IndexFile, self._made_of

    def __len__(self) -> int:
        return len(self.kind_bits)

    def __getitem__(self, row: int) -> ImageTextRecord:
        start = int(self._starts[row])
        line = self._buffer[start : self._buffer.find(b"\n", start)]
        key, number, place, image, captions = json.loads(line)
        file = self._files[number]
        found = self._root / image if isinstance(image, str) else PackedImage(file, *image)
        return ImageTextRecord(key, found, captions, self._root, str(file), place or key)


class ImageTextRecords(Sequence[ImageTextRecord]):
    """Records of several sources, or a selection of them, each read when it is asked for.

    Args:
        parts: One after the other.
        positions: Which of them, in which order; none = all.
    """

    def __init__(
        self,
        parts: Sequence[IndexFile | Sequence[ImageTextRecord]],
        positions: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self._positions = np.arange(self._starts[-1]) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = self._positions[index]
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._parts[part][int(position - self._starts[part])]

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
            part.kind_bits & sum(1 << i for i, k in enumerate(part.header["kinds"]) if k in names)
            if isinstance(part, IndexFile)
            else [not names.isdisjoint(record.captions) for record in part]
            for part in self._parts
        ]
        return np.concatenate(found)[self._positions].astype(bool)

    def kinds(self) -> set[str]:
        """All kinds of captions."""
        return {
            kind
            for part in self._parts
            for kind in (
                part.header["kinds"]
                if isinstance(part, IndexFile)
                else chain.from_iterable(record.captions for record in part)
            )
        }


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
    if not len(index):
        raise RecordError(f"{source.path}: all of its {len(refused)} records are bad")
    return ImageTextRecords([index])


def _indexed(source: ImageTextSource, files: Sequence[Path]) -> IndexFile:
    """The source's table from its file, written first where there is none, or an outdated one."""
    settings = source.model_dump(exclude={"weight", "index_dir"}) | {"version": VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(source.index_dir) if source.index_dir else files[0].parent / ".llm2clip-index"
    path = folder / f"{files[0].stem}-{digest}.index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):  # of several processes one makes it
            if path.is_file():
                try:
                    index = IndexFile(path, source)
                    if index.header["files"] == _states(files):
                        return index
                    logger.info("%s: the data have changed; indexing them again", path)
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s is damaged; indexing the data again", path)
            with written_whole(path) as partial, partial.open("w+b") as handle:
                write_table(source, files, handle)
    except OSError as error:
        raise RecordError(
            f"the index of {source.path} cannot be written to {folder} ({error}); set `index_dir` "
            "to a folder that can be"
        ) from error
    logger.info("indexed %s: %s", source.path, path)
    return IndexFile(path, source)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_table(source: ImageTextSource, files: Sequence[Path], handle: IO[bytes]) -> None:
    """Read a source's records and write them as a table.

    Args:
        source: The files with their filters.
        files: What `source.path` stands for.
        handle: Where to; also read.

    Raises:
        RecordError: A file cannot be read, or none of its records can be used.
    """
    states = _states(files)
    numbers = {file: number for number, file in enumerate(files)}
    refused = Refused()
    kinds: dict[str, int] = {}
    starts, bits, keys = array("q"), array("q"), array("q")
    position = 0
    for name, group, image, captions in _records(source, refused):
        at: Any = image
        if isinstance(image, PackedImage):
            at = [image.start, image.size, *([image.column] if image.column else [])]
        keys.append(caption_id(name) if name else ~len(keys))  # without an id none can occur twice
        key = name or f"{group.file.name}:{group.place}"
        place = "" if group.place == key else group.place
        line = json.dumps([key, numbers[group.file], place, at, captions], ensure_ascii=False)
        starts.append(position)
        bits.append(sum(1 << kinds.setdefault(kind, len(kinds)) for kind in captions))
        position += handle.write(line.encode(errors="surrogatepass") + b"\n")
        if len(kinds) > _MAX_KINDS:
            raise RecordError(
                f"{source.path}: more than {_MAX_KINDS} kinds of captions ({', '.join(kinds)})"
            )

    def record(row: int) -> list[Any]:
        handle.seek(starts[row])
        return list(json.loads(handle.readline()))

    # 24 bytes a record are held in memory, and no key
    order = np.argsort(np.frombuffer(keys, np.int64), kind="stable")
    ordered = np.frombuffer(keys, np.int64)[order]
    kept = np.ones(len(keys), dtype=bool)
    for at in np.flatnonzero(ordered[1:] == ordered[:-1]).tolist():
        (before, *_), (key, number, place, *_) = record(order[at]), record(order[at + 1])
        if before == key:
            kept[order[at + 1]] = False
            refused.add(f"{files[number]}:{place or key}", f"the key {key!r} occurs twice")
    handle.seek(position)
    padding = -position % 8
    handle.write(bytes(padding))
    for column in (starts, bits):
        handle.write(np.frombuffer(column, np.int64)[kept].tobytes())
    header = {
        "version": VERSION,
        "files": states,
        "count": int(kept.sum()),
        "arrays_at": position + padding,
        "kinds": list(kinds),
        "bad": refused.rows,
    }
    footer = json.dumps(header).encode()
    handle.write(footer + len(footer).to_bytes(_FOOTER, "little"))


def _records(
    source: ImageTextSource, refused: Refused
) -> Iterator[tuple[str, RowGroup, str | PackedImage, dict[str, list[str]]]]:
    """Key (empty = none is given), place, image and captions of each record that can be used."""
    root = _image_root(source)
    for group in iter_records(source, refused, columns=[source.image_field]):
        first = group.rows[0]
        image, name = get_column(first, source.image_field), get_column(first, source.id_field)
        try:
            if isinstance(image, str) and image:
                check_image_name(root, image)
            elif not isinstance(image, PackedImage):
                raise RecordError(
                    f"no image in {source.image_field!r}: {image!r}, expected a path or bytes"
                )
            captions = collect_captions(group, source.fields)
        except (RecordError, ImageError) as error:
            refused.add(group.where, str(error))
            continue
        if group.value is not None:
            name = group.value
        yield "" if name is None else str(name), group, image, captions


def _states(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and date of each file."""
    return [[str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files]


def _image_root(source: ImageTextSource) -> Path:
    return Path(source.image_root) if source.image_root else Path(source.path).parent
