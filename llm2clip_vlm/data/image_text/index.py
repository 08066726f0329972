"""Image-text records of any format, read in one pass and then by their number.

A source's files are read once, through its filters. What a record consists of (its key, where the
image lies, its captions) goes into a compact table, in memory for small sources and in a file for
larger ones. The table is never unpickled, and shared by worker processes without a copy.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.images import EncodedImage, ImageError, check_image_name, read_image
from llm2clip_vlm.data.reading.records import (
    RowGroup,
    collect_captions,
    get_column,
    iter_records,
    source_files,
)
from llm2clip_vlm.data.reading.shards import PackedImage
from llm2clip_vlm.data.reading.table_files import (
    file_states,
    is_large,
    kept_table,
    require_unchanged,
)
from llm2clip_vlm.data.text.caption_draw import caption_id
from llm2clip_vlm.recipe.base import ImageTextSource

VERSION = 4
"""Of the table's layout and of the rules by which records are taken or refused."""

_MAX_KINDS = 63
_FOOTER, _HASH = 8, 32


@dataclass(frozen=True)
class ImageTextRecord:
    """One image and its captions by kind."""

    key: str
    """Unique within the source."""
    image: str | PackedImage
    """The image's path below `root`; or where the bytes lie in a shard or table."""
    captions: dict[str, list[str]]
    """Kind (`short`, `long`, or the column's name) to captions, no list empty."""
    root: Path
    """Folder that the image may not leave."""
    source: str = ""
    """File that the record was read from."""
    place: str = ""
    """Its line, position or key in that file."""
    follow_links: bool = False
    """Links below `root` may lead anywhere."""

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
            image = EncodedImage(self.image.read(), f"of {self.where}")
        else:
            name = f"{self.image!r} below {self.root}"
            data = read_image(self.root, self.image, follow_links=self.follow_links)
            image = EncodedImage(data, name)
        image.require_picture()
        return image

    def open(self) -> Image.Image:
        """Decode the image as RGB.

        Raises:
            ImageError: As :meth:`encoded`, or it does not decode.
        """
        return self.encoded().rgb(strict=True)


class ImageTextTable:
    """The table of one source: a line of JSON a record, and where each begins.

    Args:
        table: A file that :func:`write_table` wrote, or the bytes of one.
        source: What it was made from.

    Raises:
        ValueError: This is no complete table, or its file has changed since it was written.
    """

    def __init__(self, table: Path | bytes, source: ImageTextSource) -> None:
        self._arguments = (table, source)
        self._buffer: bytes | mmap.mmap
        if isinstance(table, bytes):
            self._buffer = table
        else:
            with table.open("rb") as handle:
                self._buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            require_unchanged(
                table,
                lambda: hashlib.sha256(memoryview(self._buffer)[:-_HASH]).digest(),
                self._buffer[-_HASH:],
            )
        end = len(self._buffer) - _FOOTER - _HASH
        length = int.from_bytes(self._buffer[end : end + _FOOTER], "little")
        header = json.loads(self._buffer[end - length : end])
        count, at = header["count"], header["arrays_at"]
        self._starts = np.frombuffer(self._buffer, np.int64, count, at)
        self.kind_bits = np.frombuffer(self._buffer, np.int64, count, at + 8 * count)
        """Of each record: bit `i` where it has a caption of kind `i`."""
        self.kinds: list[str] = header["kinds"]
        """All kinds of captions."""
        self.refused: list[tuple[str, str]] = header["bad"]
        """`(where, why)` of what could not be used."""
        self.made_of: list[list[Any]] = header["files"]
        """Name, size and date of each of the source's files."""
        self._files = [Path(name) for name, _, _ in self.made_of]
        self._root, self._follow = _image_root(source), source.follow_links

    def __reduce__(self) -> Any:
        return ImageTextTable, self._arguments

    def __len__(self) -> int:
        return len(self.kind_bits)

    def __getitem__(self, row: int) -> ImageTextRecord:
        start = int(self._starts[row])
        line = self._buffer[start : self._buffer.find(b"\n", start)]
        key, number, place, image, captions = json.loads(line)
        file = self._files[number]
        found = image if isinstance(image, str) else PackedImage(file, *image)
        return ImageTextRecord(
            key, found, captions, self._root, str(file), place or key, self._follow
        )


class ImageTextRecords(Sequence[ImageTextRecord]):
    """Records of several sources, or a selection of them, each read when it is asked for.

    Args:
        tables: One after the other.
        positions: Which of their records, in which order; none = all.
    """

    def __init__(
        self, tables: Sequence[ImageTextTable], positions: npt.NDArray[np.int64] | None = None
    ) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *map(len, tables)])
        self._positions = np.arange(self._starts[-1]) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageTextRecords(self._tables, self._positions[index])
        position = self._positions[index]
        table = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._tables[table][int(position - self._starts[table])]

    def take(self, chosen: Sequence[int] | npt.NDArray[Any]) -> ImageTextRecords:
        """A selection, by positions or as a mask.

        Args:
            chosen: Positions, or one boolean a record.
        """
        return ImageTextRecords(self._tables, self._positions[np.asarray(chosen)])

    def has_kinds(self, wanted: Collection[str]) -> npt.NDArray[np.bool_]:
        """Which records have a caption of one of these kinds."""
        found = [
            table.kind_bits & sum(1 << i for i, kind in enumerate(table.kinds) if kind in wanted)
            for table in self._tables
        ]
        return np.concatenate(found)[self._positions] != 0

    def kinds(self) -> set[str]:
        """All kinds of captions."""
        return set(chain.from_iterable(table.kinds for table in self._tables))


def read_image_text(source: ImageTextSource, bad: BadRecords) -> ImageTextRecords:
    """Read the records of a source. Images are not opened yet.

    Args:
        source: The file or files, their columns and filters.
        bad: Takes rows without an image, a key or a caption, and keys that occur twice.

    Returns:
        Records in file order; rows that `group_by` joins are one record with the first row's image.

    Raises:
        RecordError: A file cannot be read, too many records are bad, or the source has a `weight`.
    """
    return ImageTextRecords([_table(source, bad)])


def read_sources(sources: Sequence[ImageTextSource], bad: BadRecords) -> ImageTextRecords:
    """Read several sources, one after the other, as one set.

    Args:
        sources: A recipe's `train`.
        bad: Takes unusable rows.

    Returns:
        All records; keys are unique within a source.

    Raises:
        RecordError: As :func:`read_image_text`.
    """
    return ImageTextRecords([_table(source, bad) for source in sources])


def _table(source: ImageTextSource, bad: BadRecords) -> ImageTextTable:
    if source.weight != 1.0:
        raise RecordError(
            f"{source.path}: weight is {source.weight}: image-text sources take none, every image "
            "is seen once an epoch; leave it out, and shorten the larger source with `limit`"
        )
    files = source_files(source.path)
    if is_large(files):
        settings = [VERSION, source.model_dump(exclude={"weight", "index_dir"})]
        read = partial(ImageTextTable, source=source)
        write = partial(_write_file, source, files)
        table = kept_table(files, source.index_dir, ".index", settings, read, write)
    else:
        handle = BytesIO()
        write_table(source, files, handle)
        table = ImageTextTable(handle.getvalue(), source)
    bad.take(len(table) + len(table.refused), table.refused)
    if not len(table):
        raise RecordError(f"{source.path}: all of its {len(table.refused)} records are bad")
    return table


def _write_file(source: ImageTextSource, files: Sequence[Path], path: Path) -> None:
    with path.open("w+b") as handle:
        write_table(source, files, handle)


def write_table(source: ImageTextSource, files: Sequence[Path], handle: IO[bytes]) -> None:
    """Read a source's records and write them as a table.

    Args:
        source: The files with their filters.
        files: What `source.path` stands for.
        handle: Where to; also read.

    Raises:
        RecordError: A file cannot be read, or none of its records can be used.
    """
    states = file_states(files)
    numbers = {file: number for number, file in enumerate(files)}
    refused = Refused()
    kinds: dict[str, int] = {}
    starts, bits, keys = array("q"), array("q"), array("q")
    position = 0
    for group, image, captions in _records(source, refused):
        name = group.name(source.id_field)
        lies = image if isinstance(image, str) else [image.start, image.size, image.column]
        keys.append(caption_id(name) if name else ~len(keys))  # without an id none can occur twice
        key = name or f"{group.file.name}:{group.place}"
        place = "" if group.place == key else group.place
        line = json.dumps([key, numbers[group.file], place, lies, captions], ensure_ascii=False)
        starts.append(position)
        position += handle.write(line.encode(errors="surrogatepass") + b"\n")
        own = [kinds.setdefault(kind, len(kinds)) for kind in captions]
        if len(kinds) > _MAX_KINDS:
            raise RecordError(
                f"{source.path}: more than {_MAX_KINDS} kinds of captions ({', '.join(kinds)})"
            )
        bits.append(sum(1 << number for number in own))

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
        "files": states,
        "count": int(kept.sum()),
        "arrays_at": position + padding,
        "kinds": list(kinds),
        "bad": refused.rows,
    }
    footer = json.dumps(header).encode()
    handle.write(footer + len(footer).to_bytes(_FOOTER, "little"))
    handle.seek(0)
    digest = hashlib.sha256()
    while part := handle.read(2**20):
        digest.update(part)
    handle.write(digest.digest())


def _records(
    source: ImageTextSource, refused: Refused
) -> Iterator[tuple[RowGroup, str | PackedImage, dict[str, list[str]]]]:
    """Rows, image and captions of each record that can be used."""
    root = _image_root(source)
    for group in iter_records(source, refused, columns=[source.image_field]):
        image = get_column(group.rows[0], source.image_field)
        try:
            if isinstance(image, str) and image:
                check_image_name(root, image)
            elif not isinstance(image, PackedImage):
                raise RecordError(
                    f"no image in {source.image_field!r}: {type(image).__name__}, expected a path "
                    "or bytes"
                )
            captions = collect_captions(group, source.fields)
        except (RecordError, ImageError) as error:
            refused.add(group.where, str(error))
            continue
        yield group, image, captions


def _image_root(source: ImageTextSource) -> Path:
    return Path(source.image_root) if source.image_root else Path(source.path).parent
