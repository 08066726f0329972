"""Image-text records of any format, read in one pass and then by their number.

A source's files are read once, through its filters. What a record consists of (its key, where the
image lies, its captions) goes into a table (:mod:`llm2clip_vlm.data.reading.table`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

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
from llm2clip_vlm.data.reading.table import Table, arrow_table
from llm2clip_vlm.data.text.caption_draw import caption_id
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.remote.ranges import RemoteFile, fetch_ahead

VERSION = 5
"""Version of the table's layout and of the rules by which records are taken or refused."""

_MAX_KINDS = 63


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
        """Name of the record in messages and `dropped.jsonl`."""
        return ":".join(dict.fromkeys(filter(None, (self.source, self.place, self.key))))

    @property
    def identity(self) -> int:
        """A number for what is drawn at random; the folder has no part in it."""
        name = self.source.rpartition("/")[2]
        return caption_id(f"{name}:{self.key}" if name else self.key)

    def encoded(self) -> EncodedImage:
        """Read the image, and check that its header describes a picture.

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
            ImageError: See :meth:`encoded`; or it does not decode.
        """
        return self.encoded().rgb(strict=True)


class ImageTextTable:
    """The records of one source, each key once.

    Args:
        table: Result of :func:`_rows`.
        source: What it was made from.
    """

    def __init__(self, table: Table, source: ImageTextSource) -> None:
        self._table, self._source = table, source
        self._folder = source.folder
        self.files = table.files
        """Files of the source."""
        self.kinds: list[str] = table.facts["kinds"]
        """All kinds of captions."""
        self.refused = list(table.refused)
        """`(where, why)` of what could not be used."""
        self._rows = np.arange(len(table))
        self._rows = self._without_repeats(table.column("hash"))
        self.kind_bits = table.column("kinds")[self._rows]
        """Bits of each record: bit `i` is set where it has a caption of kind `i`."""

    def _without_repeats(self, hashes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Refuse rows whose key an earlier row has; return the others."""
        # Equal hashes stand together once they are sorted, the earlier row first: 8 bytes a record
        # are held in memory, and the keys are compared only where their hashes are equal.
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        repeated = []
        for row, before in zip(order[same + 1].tolist(), order[same].tolist(), strict=True):
            record = self[row]
            if record.key == self[before].key:
                repeated.append(row)
                where = f"{record.source}:{record.place}"
                self.refused.append((where, f"the key {record.key!r} occurs twice"))
        return np.delete(self._rows, repeated)

    def __reduce__(self) -> Any:
        return ImageTextTable, (self._table, self._source)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> ImageTextRecord:
        key, number, place, image, captions = self._table.record(int(self._rows[row]))
        file, source = self.files[number], self._source
        found = image if isinstance(image, str) else PackedImage(file, *image)
        return ImageTextRecord(
            key, found, captions, self._folder, str(file), place or key, source.follow_links
        )


class ImageTextRecords(Sequence[ImageTextRecord]):
    """Records of several sources, or a selection of them, each read when it is asked for.

    Args:
        tables: One after the other.
        positions: Positions of the chosen records, in order. None: all.
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

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """Fetch images that lie elsewhere beside each other, before each is asked for.

        Args:
            indices: Positions of the records.
        """
        if any(isinstance(table.files[0], RemoteFile) for table in self._tables):
            images = [self[index].image for index in indices]
            fetch_ahead(
                (image.path, image.start, image.size)
                for image in images
                if isinstance(image, PackedImage) and image.column is None
            )

    def has_kinds(self, wanted: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether each record has a caption of one of these kinds."""
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
        RecordError: See :func:`read_image_text`.
    """
    return ImageTextRecords([_table(source, bad) for source in sources])


def _table(source: ImageTextSource, bad: BadRecords) -> ImageTextTable:
    if source.weight != 1.0:
        raise RecordError(
            f"{source.title}: weight is {source.weight}: image-text sources take none, every image "
            "is seen once an epoch; leave it out, and shorten the larger source with `limit`"
        )
    chosen = {"weight", "index_dir", "cache_dir", "cache_gib"}
    table = ImageTextTable(
        arrow_table(
            source_files(source),
            source.index_dir,
            lambda: [VERSION, source.model_dump(exclude=chosen)],
            {"hash": "int64", "kinds": "int64"},
            partial(_rows, source),
        ),
        source,
    )
    bad.take(len(table) + len(table.refused), table.refused)
    if not len(table):
        raise RecordError(f"{source.title}: all of its {len(table.refused)} records are bad")
    return table


def _rows(
    source: ImageTextSource, refused: Refused, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The table's rows: key, number of the file, place, image and captions of each record."""
    numbers = {name: number for number, (name, *_) in enumerate(facts["files"])}
    kinds = facts["kinds"] = list[str]()
    for row, (group, image, captions) in enumerate(_records(source, refused)):
        name = group.name(source.id_field)
        lies = image if isinstance(image, str) else [image.start, image.size, image.column]
        key = name or f"{group.file.name}:{group.place}"
        place = "" if group.place == key else group.place
        kinds += [kind for kind in captions if kind not in kinds]
        if len(kinds) > _MAX_KINDS:
            raise RecordError(
                f"{source.title}: more than {_MAX_KINDS} kinds of captions ({', '.join(kinds)})"
            )
        yield {
            "record": [key, numbers[str(group.file)], place, lies, captions],
            "hash": caption_id(name) if name else ~row,  # without an id none can occur twice
            "kinds": sum(1 << kinds.index(kind) for kind in captions),
        }


def _records(
    source: ImageTextSource, refused: Refused
) -> Iterator[tuple[RowGroup, str | PackedImage, dict[str, list[str]]]]:
    """Rows, image and captions of each record that can be used."""
    root = source.folder
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
