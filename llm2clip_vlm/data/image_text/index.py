"""Image-text records of any format, read in one pass and then by their number.

A source's files are read once, through its filters. What a record consists of (its key, where the
image lies, its captions) goes into a table (:mod:`llm2clip_vlm.data.reading.table`), and so do the
digests of the captions, by which an embedding cache says whether it has them all. Nothing here
grows with the number of records but what a selection of them takes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llm2clip_vlm.data.reading.alike import AlikeLines, AlikeRows
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
from llm2clip_vlm.data.reading.table import Columns, Table, arrow_table
from llm2clip_vlm.data.text.caption_draw import text_number
from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES, text_digests
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.remote.addresses import is_remote
from llm2clip_vlm.remote.ranges import RemoteFile, fetch_ahead

VERSION = 12
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
        return text_number(f"{name}:{self.key}" if name else self.key)

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
        self._table, self._source, self._root = table, source, source.folder
        self.files = table.files
        """Files of the source."""
        self.kinds: list[str] = table.facts["kinds"]
        """All kinds of captions."""
        self.refused = list(table.refused)
        """`(where, why)` of what could not be used."""
        self.made_of = [*_settings(source), table.facts["files"]]
        """What the table depends on: rules, source, and its files with their sizes and dates."""
        repeated = []
        for row, before in table.facts["alike"]:
            record = self._record(row)
            if record.key == self._record(before).key:
                repeated.append(row)
                where = f"{record.source}:{record.place}"
                self.refused.append((where, f"the key {record.key!r} occurs twice"))
        self._repeated = sorted(repeated)
        # rows that come before each of them and are no such rows: [3, 5] has 3 and 4
        self._before = [row - number for number, row in enumerate(self._repeated)]

    def __reduce__(self) -> Any:
        return ImageTextTable, (self._table, self._source)

    def __len__(self) -> int:
        return len(self._table) - len(self._repeated)

    def __getitem__(self, row: int) -> ImageTextRecord:
        return self._record(row + bisect_right(self._before, row))

    def _record(self, row: int) -> ImageTextRecord:
        key, number, place, image, captions = self._table.record(row)
        file, source = self.files[number], self._source
        packed = partial(PackedImage, file, state=self._table.facts["files"][number])
        found = image if isinstance(image, str) else packed(*image)
        return ImageTextRecord(
            key, found, captions, self._root, str(file), place or key, source.follow_links
        )

    def has_kinds(self, wanted: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether each record has a caption of one of these kinds."""
        bits = sum(1 << i for i, kind in enumerate(self.kinds) if kind in wanted)
        return np.delete(self._table.column("kinds") & bits != 0, self._repeated)

    def digests(self, wanted: Collection[str]) -> Iterator[npt.NDArray[np.uint8]]:
        """SHA-256 of each caption of these kinds, `[n, 32]`, read some thousand at a time."""
        chosen = np.array([kind in wanted for kind in self.kinds])
        columns = self._table.cells("kind_of"), self._table.cells("digests")
        for kinds, digests in zip(*columns, strict=True):
            yield digests.reshape(-1, DIGEST_BYTES)[chosen[kinds]]


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
        self._starts = np.cumsum([0, *map(len, tables)]).tolist()
        self._positions: Any = range(self._starts[-1]) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def _whole(self) -> bool:
        return isinstance(self._positions, range) and self._positions == range(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageTextRecords(self._tables, self._positions[index])
        position = int(self._positions[index])
        table = bisect_right(self._starts, position) - 1
        return self._tables[table][position - self._starts[table]]

    def take(self, chosen: Sequence[int] | npt.NDArray[Any]) -> ImageTextRecords:
        """A selection, by positions or as a mask.

        Args:
            chosen: Positions, or one boolean a record.
        """
        mask = np.asarray(chosen)
        if mask.dtype == bool and mask.all():
            return self
        return ImageTextRecords(self._tables, np.asarray(self._positions)[mask])

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
        found = np.concatenate([table.has_kinds(wanted) for table in self._tables])
        return found if self._whole else found[np.asarray(self._positions)]

    def digests(self, wanted: Collection[str]) -> Iterator[npt.NDArray[np.uint8]]:
        """SHA-256 of each caption of these kinds, `[n, 32]`, read some thousand at a time.

        Those of records that are not chosen, or whose key occurs twice, are among them.
        """
        return chain.from_iterable(table.digests(wanted) for table in self._tables)

    @property
    def made_of(self) -> list[Any]:
        """What these records depend on: the tables' files and settings, and which are chosen."""
        chosen = b"" if self._whole else np.asarray(self._positions).tobytes()
        return [sha256(chosen).hexdigest(), *(table.made_of for table in self._tables)]

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
    table = ImageTextTable(
        arrow_table(
            source_files(source),
            source.index_dir,
            lambda: _settings(source),
            {"kinds": "int64", "kind_of": "binary", "digests": "binary"},
            partial(_rows, source),
        ),
        source,
    )
    bad.take(len(table) + len(table.refused), table.refused)
    if not len(table):
        raise RecordError(f"{source.title}: all of its {len(table.refused)} records are bad")
    return table


def _settings(source: ImageTextSource) -> list[Any]:
    return [VERSION, source.selection]


def _rows(
    source: ImageTextSource, refused: Refused, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The table's rows: key, number of the file, place, image and captions of each record."""
    numbers = {name: number for number, (name, *_) in enumerate(facts["files"])}
    numbered: dict[str, int] = {}  # kinds of captions
    hashes = array("q")

    def number_of(kind: str) -> int:
        number = numbered.setdefault(kind, len(numbered))
        if number == _MAX_KINDS:
            raise RecordError(
                f"{source.title}: more than {_MAX_KINDS} kinds of captions ({', '.join(numbered)})"
            )
        return number

    for group, image, captions in _records(source, refused):
        file = numbers[str(group.file)]
        if isinstance(rows := group.rows[0], AlikeRows):
            hashes.extend(map(hash, rows.names))
            yield _columns(rows, file, [number_of(kind) for kind in rows.kinds])
            continue
        name = group.name(source.id_field)
        lies = image if isinstance(image, str) else [image.start, image.size, image.column]
        key = name or f"{group.file.name}:{group.place}"
        place = "" if group.place == key else group.place
        bits, kind_of = 0, b""
        for kind, texts in captions.items():
            number = number_of(kind)
            bits |= 1 << number
            kind_of += bytes([number]) * len(texts)
        hashes.append(hash(name) if name else ~len(hashes))  # without an id none can occur twice
        yield {
            "record": [key, file, place, lies, captions],
            "kinds": bits,
            "kind_of": kind_of,
            "digests": text_digests(list(chain.from_iterable(captions.values()))),
        }
    facts["kinds"], facts["alike"] = list(numbered), _alike(np.frombuffer(hashes, np.int64))


def _columns(rows: AlikeRows, file: int, kinds: list[int]) -> Columns:
    """What :func:`_rows` yields for each record, of many that are alike."""
    kind_of = cache(lambda *counts: b"".join(map(mul, [bytes([kind]) for kind in kinds], counts)))
    kinds_of = [kind_of(*map(len, own)) for own in zip(*rows.texts, strict=True)]
    texts = chain.from_iterable(chain.from_iterable(zip(*rows.texts, strict=True)))
    digests = text_digests([*texts])
    ends = [*accumulate(map(len, kinds_of), initial=0)]
    columns = zip(rows.names, rows.places, rows.images, rows.captions, strict=True)
    return Columns(
        record=[
            f'["{key}", {file}, "{"" if place == key else place}", "{image}", {captions}]'
            for key, place, image, captions in columns
        ],
        kinds=[sum(1 << kind for kind in kinds)] * len(kinds_of),
        kind_of=kinds_of,
        digests=[digests[DIGEST_BYTES * a : DIGEST_BYTES * b] for a, b in pairwise(ends)],
    )


def _alike(hashes: npt.NDArray[np.int64]) -> list[list[int]]:
    """Pairs of a row and the last one before it with an equal hash, whose keys may be equal."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return np.stack([order[same + 1], order[same]], 1).tolist()


def _records(
    source: ImageTextSource, refused: Refused
) -> Iterator[tuple[RowGroup, str | PackedImage, dict[str, list[str]]]]:
    """Rows, image and captions of each record that can be used."""
    root = source.folder
    filters = source.where or source.drop_where or source.group_by or source.limit or source.columns
    alike = None
    if not (filters or is_remote(source.path)):
        alike = AlikeLines(source.id_field, source.image_field, source.fields)
    for group in iter_records(source, refused, columns=[source.image_field], alike=alike):
        if isinstance(group.rows[0], AlikeRows):
            yield group, "", {}
            continue
        image = get_column(group.rows[0], source.image_field)
        try:
            if isinstance(image, str) and image:
                check_image_name(root, image)
            elif not isinstance(image, PackedImage):
                raise RecordError(
                    f"no image in {source.image_field!r}: {type(image).__name__}, expected a path "
                    "or bytes"
                )
            for other in (get_column(row, source.image_field) for row in group.rows[1:]):
                packed = isinstance(image, PackedImage) and isinstance(other, PackedImage)
                if not (image.is_copy(other) if packed else other in (None, image)):
                    raise RecordError(f"rows of one {source.group_by!r} have different images")
            captions = collect_captions(group, source.fields)
        except (RecordError, ImageError) as error:
            refused.add(group.where, str(error))
            continue
        yield group, image, captions
