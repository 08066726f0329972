"""Rows of JSONL, JSON, CSV, Parquet, Arrow and tar files: reading, filtering, grouping.

Captions (:mod:`llm2clip_vlm.data.text.captions`) and image-text pairs share this reader, so that a
`where`, `drop_where`, `group_by` or `limit` in a recipe means the same thing everywhere.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip_vlm.data.reading.alike import AlikeLines
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refusals, Refused
from llm2clip_vlm.data.reading.hub import dataset_files
from llm2clip_vlm.data.reading.remote_rows import each_file, remote_files
from llm2clip_vlm.data.reading.shards import PackedImage, table_rows, tar_rows
from llm2clip_vlm.data.reading.text_rows import UNDECODED, text_rows
from llm2clip_vlm.recipe.base import CaptionSource, DataSource
from llm2clip_vlm.remote.addresses import is_remote
from llm2clip_vlm.remote.ranges import File, RemoteFile
from llm2clip_vlm.runs.hashes import data_files

Row = dict[str, Any]

MAX_CAPTION_CHARS = 16_384
"""A longer caption is refused: no text encoder here reads that far, and it is seldom a caption."""

_TEXTS = ".jsonl .jsonl.gz .jsonlines .json .json.gz .csv .csv.gz".split()
READERS: dict[str, Callable[..., Iterator[tuple[int | str, Any]]]] = {
    **dict.fromkeys(_TEXTS, lambda file, bad, _, alike: text_rows(file, bad, alike)),
    **dict.fromkeys(
        (".parquet", ".arrow"), lambda file, bad, names, _: table_rows(file, bad, names)
    ),
    ".tar": lambda file, bad, *_: tar_rows(file, bad),
}
"""Ending of a file to what reads it: given the file, what takes bad records, columns that are
wanted, and `alike` of :func:`source_rows`, it yields the place and the mapping of each record."""

_NO_VALUE = frozenset(("none", "nan", "null", "n/a", "<na>", "undefined"))
_URL_OR_FILE = re.compile(r"\w+://\S+|\S+\.(jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)
LIST_AS_TEXT = re.compile(r"""(?s)\[\s*["'[{(].*\]|\(\s*["'].*["']\s*,?\s*\)|\{\s*["'].*\}""")
"""A list or mapping of captions as pandas and CSV files write one: several captions, and none by
itself. Python writes quotes of both kinds into one list where a caption has an apostrophe."""
_WHOLE_NUMBER = re.compile(r"(-?\d+)\.0+")
_VALUES_SHOWN = 5


class RowGroup(NamedTuple):
    """The rows of one record: a single one, or all that share the `group_by` value."""

    file: File
    """File of the first row."""
    place: str
    """Its line, position or key there."""
    rows: list[Row]
    """Rows in file order, never empty."""
    value: str | None = None
    """The `group_by` value."""

    @property
    def where(self) -> str:
        """Name of the record in messages and `dropped.jsonl`."""
        return f"{self.file}:{self.place}"

    def name(self, id_field: str) -> str:
        """The `group_by` value, or the id where there is none; empty without either."""
        name = get_column(self.rows[0], id_field) if self.value is None else self.value
        return "" if name is None else str(name)


def iter_rows(path: str | Path, bad: Refusals | None = None) -> Iterator[Row]:
    """Reads a file row by row.

    Args:
        path: `.jsonl`, `.json` (an array of objects, COCO's or Karpathy's annotations), `.csv`
            (with a header), each also `.gz`; `.parquet`, `.arrow`; or webdataset shards `.tar`.
            A pattern reads all its files.
        bad: Takes lines and samples that cannot be used. None: the first raises.

    Yields:
        One mapping a row, in file order. CSV values are strings.

    Raises:
        RecordError: The file is missing, of another kind, damaged, or holds something else.
    """
    for _, _, row in source_rows(DataSource(path=str(path)), BadRecords() if bad is None else bad):
        yield row


def source_rows(
    source: DataSource, bad: Refusals, alike: AlikeLines | None = None
) -> Iterator[tuple[File, int | str, Row]]:
    """Reads a source row by row, its columns called as the source says.

    Args:
        source: Files, or a data set of the hub.
        bad: See :func:`iter_rows`.
        alike: See :func:`~llm2clip_vlm.data.reading.text_rows.text_rows`.

    Yields:
        File, line (JSONL), key (tar) or position (others, counted from 1), and the row.

    Raises:
        RecordError: See :func:`iter_rows`; or no row has one of the source's `columns`.
    """
    named = source.columns
    names = named if isinstance(named, dict) else {name: name for name in named}
    unseen, known = {*names.values()}, dict[str, None]()
    read = partial(_located, columns=list(names.values()), alike=alike)
    for file, rows in each_file(source_files(source), read, bad):
        for place, row in rows:
            if unseen:
                unseen -= row.keys()
                known |= dict.fromkeys(row)
            yield file, place, {n: row[o] for n, o in names.items() if o in row} if names else row
    if known and unseen:
        raise _no_column(source, unseen, known)


def _no_column(source: DataSource, unseen: Iterable[str], known: Iterable[str]) -> RecordError:
    return RecordError(
        f"{source.title}: no row has a column {', '.join(sorted(unseen))!r}; the columns are "
        f"{', '.join(known)}. Correct the source's columns, fields or filters"
    )


def get_column(row: Mapping[str, Any], name: str) -> Any:
    """A column's value; `a.b` reaches into a mapping-valued column where no column is named so.

    Returns:
        The value. None: the row has no such column.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def iter_records(
    source: CaptionSource,
    refused: Refused,
    *,
    columns: Sequence[str] = (),
    alike: AlikeLines | None = None,
) -> Iterator[RowGroup]:
    """Reads a source's rows through its filters.

    The order is: `where`, `drop_where`, `group_by`, `limit`. A filter compares text with text
    (`null`, `true` and numbers as JSON writes them, a date as `2014-12-31`), without blanks around
    it; `True` is `true` and `2014.0` is `2014`, as pandas writes them.

    Args:
        source: The file with its filters.
        refused: Takes lines that cannot be read and rows without the `group_by` column.
        columns: Columns beside `source.fields` that must exist somewhere in the file.
        alike: Gives a row for many lines where it can; of a source without filters alone.

    Yields:
        One group a record, in the order in which the file first names it.

    Raises:
        RecordError: The file cannot be read, a named column or a filter's value is in none of its
            rows (a typing error would otherwise let test data through), or no row is left, and
            none was refused.
    """
    path = source.title
    named = {*source.where, *source.drop_where, *source.fields, *columns}
    unseen = named | ({source.group_by} if source.group_by else set())
    filters = _Filters(source)
    known: dict[str, None] = {}
    found = 0
    rows = source_rows(source, refused, alike)
    for group in _groups(_kept(rows, refused, unseen, known, filters), source.group_by, refused):
        if source.limit is None or found < source.limit:
            yield group
            found += 1
        elif not (unseen or filters.unseen):  # reported even where `limit` ends early
            return
    if known and unseen:
        raise _no_column(source, unseen, known)
    if known and filters.unseen:
        column, value = min(filters.unseen)
        none = "" if found else "no record left, "
        raise RecordError(
            f"{path}: {none}no row's {column!r} is {value!r}; it has "
            f"{', '.join(map(repr, filters.met[column]))}, ... Correct the source's filters"
        )
    if not (found or refused.rows):
        raise RecordError(
            f"{path}: no record left (where={source.where}, drop_where={source.drop_where}). "
            "Loosen the filters or check the path"
        )


def collect_captions(group: RowGroup, fields: Sequence[str]) -> dict[str, list[str]]:
    """The captions of one record, by kind.

    A string or a list of strings goes under its column's name, a mapping under its own keys
    (`{"short": ["..."], "long": "..."}` gives `short` and `long`). Absent columns and null values
    add nothing. Surrounding blanks are removed.

    Args:
        group: The record's rows.
        fields: Columns with captions.

    Returns:
        Kind to captions, each list non-empty, in the order of `fields` and then of the rows.

    Raises:
        RecordError: A caption is no string, empty, damaged, a missing value's name, a URL or file
            name, or longer than `MAX_CAPTION_CHARS`, or the record has none; count it with
            `BadRecords.add(group.where, str(error))`.
    """
    captions: dict[str, list[str]] = {}
    for name in fields:
        for row in group.rows:
            value = get_column(row, name)
            by_kind = value if isinstance(value, Mapping) else {name: value}
            for kind, texts in by_kind.items():
                for given in texts if isinstance(texts, list | tuple) else [texts]:
                    if given is None:
                        continue
                    text = given.strip() if isinstance(given, str) else _text(given, name)
                    # nearly every caption: nothing that makes one unusable can be true of it
                    plain = " " in text and len(text) <= MAX_CAPTION_CHARS and text.isprintable()
                    if not (plain and text[0] not in "[{(") and (reason := _unusable(text)):
                        raise RecordError(f"{reason} in {name!r}")
                    captions.setdefault(str(kind), []).append(text)
    if not captions:
        raise RecordError(f"no caption in {list(fields)}; the columns are {list(group.rows[0])}")
    return captions


def _unusable(text: str) -> str:
    """The reason why a text is no caption; empty where it is one."""
    if not any(map(str.isprintable, text)):  # zero-width characters alone are no caption
        return "an empty caption"
    if len(text) > MAX_CAPTION_CHARS:
        return f"a caption of {len(text)} characters, at most {MAX_CAPTION_CHARS} are taken,"
    if "\x00" in text or UNDECODED.search(text):
        return "a caption that is damaged text (NUL, or half a character)"
    if text.casefold() in _NO_VALUE:
        return f"a caption that only says {text!r}"
    if _URL_OR_FILE.fullmatch(text):
        return f"a caption that is a URL or a file name ({text[:80]})"
    if LIST_AS_TEXT.fullmatch(text):
        return f"a caption that is a list or mapping written as text ({text[:80]})"
    return ""


def _text(value: Any, name: str) -> str:
    if isinstance(value, PackedImage):  # a column of bytes, as some writers store text
        try:
            value = value.read().decode()
        except ValueError as error:
            raise RecordError(f"a caption in {name!r} is no UTF-8 text ({error})") from error
    if not isinstance(value, str):
        raise RecordError(f"a caption in {name!r} is {type(value).__name__}, expected a string")
    return value.strip()


def _as_text(value: Any) -> str:
    if isinstance(value, PackedImage):  # text that was stored as bytes, or null
        value = value.read().decode(errors="backslashreplace") if value.count() else None
    if isinstance(value, str | date | Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


class _Filters:
    """A source's `where` and `drop_where`, and which of their values no row had yet."""

    def __init__(self, source: CaptionSource) -> None:
        self._where = {column: _comparable(value) for column, value in source.where.items()}
        self._drop = {c: {*map(_comparable, values)} for c, values in source.drop_where.items()}
        self.unseen = {*self._where.items()}
        self.unseen |= {(c, value) for c, values in self._drop.items() for value in values}
        self.met: dict[str, list[str]] = {column: [] for column in self._where | self._drop}
        """Some values of each column."""

    def keep(self, row: Row) -> bool:
        kept = True
        for column, met in self.met.items():
            given = get_column(row, column)
            value = _comparable(given)
            self.unseen.discard((column, value))
            if self.unseen and len(met) < _VALUES_SHOWN and value[:80] not in met:
                met.append(value[:80])
            kept &= self._where.get(column, value) == value
            kept &= value not in self._drop.get(column, ())
        return kept


def _comparable(value: Any) -> str:
    """A value as people write it in a filter, independent of who wrote it."""
    text = _as_text(value).strip()
    if text in ("True", "TRUE", "False", "FALSE"):
        return text.lower()
    whole = _WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def _kept(
    rows: Iterator[tuple[File, int | str, Row]],
    bad: Refusals,
    unseen: set[str],
    known: dict[str, None],
    filters: _Filters,
) -> Iterator[RowGroup]:
    """Yield rows that pass the filters; strike what is met off `unseen`, collect the columns."""
    for file, place, row in rows:
        if not row.keys() <= known.keys():
            known.update(dict.fromkeys(row))
        if unseen:
            unseen -= {c for c in unseen if c in row or get_column(row, c) is not None}
        group = RowGroup(file, str(place), [row])
        try:
            kept = filters.keep(row)
        except RecursionError:
            bad.add(group.where, "values too deeply nested")
            continue
        if kept:
            yield group


def _groups(rows: Iterator[RowGroup], group_by: str | None, bad: Refusals) -> Iterator[RowGroup]:
    if group_by is None:
        yield from rows
        return
    groups: dict[str, RowGroup] = {}
    for row in rows:
        key = _comparable(get_column(row.rows[0], group_by))
        if not key or key.casefold() in _NO_VALUE:  # rows without one do not belong together
            bad.add(row.where, f"no value in the group_by column {group_by!r}")
            continue
        groups.setdefault(key, RowGroup(row.file, row.place, [], key)).rows.extend(row.rows)
    yield from groups.values()


def source_files(source: DataSource) -> list[File]:
    """The files that a source names.

    Args:
        source: Names one file in `path`, or a pattern with `*`, `?` or `[...]`, here or at an
            address.

    Returns:
        The files, sorted; those of a `dataset` in its own order. A pattern leaves out
        `*_text_embeddings.tar`, which lie beside shards.

    Raises:
        RecordError: No file, or one of a kind that is not read.
        RemoteError: See :func:`~llm2clip_vlm.data.reading.remote_rows.remote_files`.
    """
    if source.dataset:
        return [*dataset_files(source)]
    path, elsewhere = source.path, is_remote(source.path)
    found: Sequence[File] = remote_files(source) if elsewhere else data_files(path)
    files = [f for f in found if str(f) == path or not f.name.endswith("_text_embeddings.tar")]
    for file in files:
        if not file.name.endswith((*READERS,)) or (elsewhere and file.suffix == ".arrow"):
            raise RecordError(
                f"{file}: unknown kind of file; expected one of {', '.join(READERS)} (.arrow on "
                "this machine alone)"
            )
    if not files or not all(isinstance(f, RemoteFile) or f.is_file() for f in files):
        raise RecordError(f"{path}: no such file (from {Path.cwd()}); check the source's path")
    return files


def _located(
    path: File, bad: Refusals, columns: Sequence[str] = (), alike: AlikeLines | None = None
) -> Iterator[tuple[int | str, Row]]:
    """Rows with their line (JSONL), key (tar) or position (others), counted from 1."""
    read = next(reader for ending, reader in READERS.items() if path.name.endswith(ending))
    try:
        yield from read(path, bad, columns, alike)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, MemoryError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); is it complete?") from error
