"""Rows of JSONL, JSON and CSV files, read within bounds that no file's contents can move."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import PurePosixPath
from typing import IO, Any

from llm2clip_vlm.data.reading.alike import AlikeLines, AlikeRows
from llm2clip_vlm.data.reading.bad_records import RecordError, Refusals
from llm2clip_vlm.remote.ranges import File

Row = dict[str, Any]

MAX_LINE_CHARS = 2**24
"""A file with a longer line, cell or object of an array is refused."""

MAX_RATIO = 100
"""A compressed file that unpacks to more than this many times its bytes is refused."""

_RATIO_FROM_BYTES = 4 * 2**20
_READ_CHARS = 2**20

UNDECODED = re.compile("[\ud800-\udfff]")
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_decode = json.JSONDecoder().raw_decode
_NO_BLANK = re.compile(r"[ \t\r\n]*")


def text_rows(
    path: File, bad: Refusals, alike: AlikeLines | None = None
) -> Iterator[tuple[int, Row]]:
    """Rows of a text file with their line (JSONL) or position (others), counted from 1.

    Args:
        path: `.jsonl` (or `.jsonlines`), `.json` or `.csv`, each also `.gz`.
        bad: Takes lines and rows that cannot be used.
        alike: Gives a row for many lines of JSONL where it can.

    Raises:
        RecordError: The file is damaged, holds something else, or unpacks beyond all measure.
        OSError, EOFError, zlib.error, UnicodeDecodeError: It cannot be read.
    """
    name = path.name.removesuffix(".gz")
    # One byte that is no UTF-8 costs its row, not the file (a `.json` is all or nothing).
    errors = "strict" if name.endswith(".json") else "surrogateescape"
    with path.open("rb") as file:
        raw = io.BufferedReader(_Unpacked(path, file)) if path.name.endswith(".gz") else file
        handle = io.TextIOWrapper(raw, "utf-8-sig", errors, newline="")
        if name.endswith(".csv"):
            yield from _csv_rows(path, handle, bad)
        elif name.endswith((".jsonl", ".jsonlines")):
            yield from _jsonl_rows(path, handle, bad, alike)
        else:
            yield from _json_rows(path, handle, bad)


class _Unpacked(io.RawIOBase):
    """The contents of a `.gz`, read no further than where they grow beyond all measure."""

    def __init__(self, path: File, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._unpacked = gzip.GzipFile(fileobj=file)
        self._length = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._unpacked.readinto(buffer)
        self._length += count
        if self._length > max(_RATIO_FROM_BYTES, MAX_RATIO * self._file.tell()):
            raise RecordError(
                f"{self._path}: unpacks to more than {MAX_RATIO} times its size; unpack it "
                "(gunzip) if that is meant"
            )
        return count


def _lines(path: File, handle: IO[str]) -> Iterator[str]:
    """Yield lines, none of which may fill the memory."""
    for number in count(1):
        if not (line := handle.readline(MAX_LINE_CHARS + 1)):
            return
        if len(line) > MAX_LINE_CHARS:
            raise RecordError(f"{path}: line {number} has more than {MAX_LINE_CHARS} characters")
        yield line


def _csv_rows(path: File, handle: IO[str], bad: Refusals) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_LINE_CHARS)
    # Without `strict` all that follows a quote without its partner is one cell.
    reader = csv.DictReader(_lines(path, handle), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise RecordError(f"{path}: the header names a column twice: {', '.join(names)}")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                bad.add(f"{path}:{number}", "the row has more or fewer cells than the header")
            elif any(UNDECODED.search(cell) for cell in row.values()):
                bad.add(f"{path}:{number}", "the row cannot be read as UTF-8")
            else:
                yield number, row
    except csv.Error as error:
        raise RecordError(f"{path}: line {reader.reader.line_num}: no CSV ({error})") from error


def _jsonl_rows(
    path: File, handle: IO[str], bad: Refusals, alike: AlikeLines | None
) -> Iterator[tuple[int, Row]]:
    lines = enumerate(_lines(path, handle), start=1)
    for number, line in alike.sift(lines) if alike else lines:
        if isinstance(line, AlikeRows):
            yield number, line
            continue
        if line.isspace():
            continue
        if not line.isascii() and UNDECODED.search(line):
            bad.add(f"{path}:{number}", "the line cannot be read as UTF-8")
            continue
        try:
            row, end = _decode(line)
            if line[end:] not in ("\n", "\r\n"):
                row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            bad.add(f"{path}:{number}", f"no JSON ({error})")
            continue
        halves = "\\u" in line and _HALF_ESCAPED.search(line) is not None
        if halves or not isinstance(row, dict):
            yield from _objects(path, [row], bad, number, halves)
        else:
            if alike:
                alike.learn(row, line)
            yield number, row


def _json_rows(path: File, handle: IO[str], bad: Refusals) -> Iterator[tuple[int, Row]]:
    try:
        start = handle.read(_READ_CHARS)
        if start.lstrip().startswith("["):
            for number, (value, text) in enumerate(_items(start, handle), start=1):
                yield from _objects(path, [value], bad, number, bool(_HALF_ESCAPED.search(text)))
            return
        text = start + handle.read()
        rows = json.loads(text)
    except (UnicodeDecodeError, RecordError):
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: no JSON ({error}); one object a line is `.jsonl`") from error
    if isinstance(rows, dict) and isinstance(rows.get("images"), list):
        rows = _annotated(path, rows, bad)
    if not isinstance(rows, list):
        raise RecordError(f"{path}: {type(rows).__name__} at the top, expected an array of objects")
    yield from _objects(path, rows, bad, 1, _HALF_ESCAPED.search(text) is not None)


def _items(start: str, handle: IO[str]) -> Iterator[tuple[Any, str]]:
    """The items of a JSON array and their text, one at a time."""
    decoder, text, at = json.JSONDecoder(), start, start.index("[") + 1
    last, separator = False, ""
    while True:
        at = _NO_BLANK.match(text, at).end()  # type: ignore[union-attr]
        try:
            if text[at : at + 1] == "]":
                if separator == ",":
                    raise ValueError("an array that ends with a comma")
                if (text[at + 1 :] + handle.read(_READ_CHARS)).strip():
                    raise ValueError("data behind the array's end")
                return
            value, end = decoder.raw_decode(text, at)
            after = _NO_BLANK.match(text, end).end()  # type: ignore[union-attr]
            if (separator := text[after : after + 1]) not in (",", "]") or not separator:
                raise ValueError(f"{separator!r} after an item, expected a comma")
        except ValueError:
            # an item, or a number's end, may lie in what is not read yet
            more = "" if last else handle.read(max(_READ_CHARS, len(text) - at))
            last = not more
            if last or len(text) - at > MAX_LINE_CHARS:
                raise
            text, at = text[at:] + more, 0
            continue
        yield value, text[at:end]
        at = after + (separator == ",")


def _objects(
    path: File, rows: Iterable[Any], bad: Refusals, first: int, halves: bool = False
) -> Iterator[tuple[int, Row]]:
    """Rows that are objects; where `halves` is true, without half a character anywhere."""
    for number, row in enumerate(rows, start=first):
        if not isinstance(row, dict):
            bad.add(f"{path}:{number}", f"{type(row).__name__}, expected an object")
        elif halves and (column := _damaged(row)) is not None:
            why = f"damaged text (half a character) in {column!r}"
            own = row.get("id", "")
            name = own if ".json" in path.suffixes else f"{number}:{own}"
            bad.add(f"{path}:{name or number}", why)
        else:
            yield number, row


def _damaged(row: Row) -> str | None:
    """The first column with half a character in its name or value."""
    texts = {name: json.dumps(row[name], ensure_ascii=False, default=str) for name in row}
    return next((name for name in texts if UNDECODED.search(f"{name}{texts[name]}")), None)


def _annotated(path: File, document: Row, bad: Refusals) -> list[Any]:
    """Rows of COCO's `{images, annotations}` or Karpathy's `{images: [{sentences}]}`.

    `id`, `image` and `captions`, all of them, stand beside an image's own fields (`split`, ...).
    """
    captions: dict[Any, list[Any]] = {}
    for number, note in enumerate(document.get("annotations") or [], start=1):
        key = note.get("image_id") if isinstance(note, dict) else None
        if isinstance(key, int | str):
            captions.setdefault(key, []).append(note.get("caption"))
        else:
            bad.add(f"{path}:annotation {number}", "no object with an image_id")
    rows = []
    for image in document["images"]:
        own: Row = {}
        if isinstance(image, dict) and isinstance(image.get("sentences"), list):  # Karpathy
            file = str(image.get("filename") or "")
            path_below = PurePosixPath(str(image.get("filepath") or ""), file)
            own["captions"] = [s.get("raw") for s in image["sentences"] if isinstance(s, dict)]
            own["image"] = str(path_below) if file else None
            own["id"] = image.get("cocoid", image.get("imgid", file))
        elif isinstance(image, dict):
            key = image.get("id")
            own["captions"] = captions.pop(key, []) if isinstance(key, int | str) else []
            own["image"] = image.get("file_name")
        rows.append(image | own if own else image)
    for key, texts in captions.items():
        bad.add(f"{path}:image_id {key}", f"{len(texts)} caption(s) of an image not in `images`")
    return rows
