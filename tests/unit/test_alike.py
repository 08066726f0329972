"""Lines that are taken together: their table is, bit for bit, that of one line after the other."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llm2clip_vlm.data.image_text import index
from llm2clip_vlm.data.reading import alike, records, table
from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.recipe.base import ImageTextSource

COLUMNS = {"kinds": "int64", "kind_of": "binary", "digests": "binary"}
GOOD = [
    "a red star",
    "two blue rings, beside 7 crosses",
    "un café près de l'eau",
    "星 と 輪",
    "a  b",
]
ODD: list[Any] = [
    *("", " ", "dog", " a dog", "a dog ", "a\u00a0dog", "\u3000a dog", "a\tdog", "a\ndog"),
    "a\x00 dog",
    *("a \x7f dog", "a \u200b dog", "\u200b", "a \ufeffdog", "\ud800 a dog", 'the "red" star'),
    *("back\\slash a", "none", "n/a", "null", "http://a.b/c d", "a.jpg", "a b.jpg", "x" * 17_000),
    *("a " * 9_000, "2014-01-01 00:00:00", "1", "true", "a, b", '", "', "a', 'b", "%s and %d"),
    *("http://a/b c.jpg", "{} {0}", "['a red dog', 'a cat here']", "['a b']", "[a dog] runs"),
    *("""["a man's dog", 'a cat']""", "{'short': 'a red dog'}", "('a dog', 'a cat')", "(a dog)"),
    *(None, True, 0, -0.0, 1.5, 1e300, 2**70, -(2**63), [], {}, [None], [["a b"]], {"a": None}),
    *(["a red dog", 1], ["a red dog", ""], ["a red dog", "a cat here"], {"short": ["a b"]}),
    *({"b": "a b", "a": ["c d", "e f"]}, {"%s": "a b"}, {'"': "a b"}, {"": "a b"}, float("nan")),
]  # fmt: skip
IDS = ["000000033471", "7", 7, 10**30, -5, -0.0, "", " ", None, "a b", 'a"b', "é", "\u200b", True]
NAMES = [
    *("a.jpg", "images/0/1.jpg", "a b.jpg", "é.png", "a/../b.jpg", "../a.jpg", "/a.jpg", "a..jpg"),
    *("./a.jpg", "C:/a.jpg", "http://a/b.jpg", "data:a", "a\\b.jpg", "", " ", " a.jpg", "a.", ".a"),
    *("a/", "a//b", "a\x00b", "a\tb", "\ud800.jpg", 7, None, [], {"bytes": "a"}, "x" * 300),
]
RAW = [
    *("", " ", "\t", "\n", "{}", "[]", "7", "null", "{", '{"id": "cut", "image": "a.jp'),
    *('{"id": "a", "image": "a.jpg", "captions": ["a b"], "id": "b"}', "\ufeff{}", "{}{}"),
    *('{"id": "n", "image": "a.jpg", "captions": ["a b"], "more": NaN}', '{"a": ' + "[" * 2000),
    *('{"id": 007, "image": "a.jpg", "captions": ["a b"]}', "{'id': 'a'}", "\ud8ff\udcff"),
    *('{"id": "a", "image": "a.jpg", "captions": {"short": "a b", "short": "c d"}}', "\x0b"),
    "\x85",
    *(f'{{"id": {"9" * 5000}, "image": "a.jpg", "captions": ["a b"]}}', '{"id": "a"} '),
]  # fmt: skip


def of(chance: random.Random, odd: float, good: list[Any], pool: list[Any]) -> Any:
    return chance.choice(pool if chance.random() < odd else good)


def write(path: Path, chance: random.Random) -> ImageTextSource:
    """A file whose lines have one shape or several, a few of them or most with something odd."""
    odd = chance.choice([0, 0.01, 0.05, 0.3])
    text = partial(of, chance, odd, GOOD, ODD)
    shapes = [
        lambda n: {"captions": {"short": [text()], "long": [text() for _ in range(n % 3 + 1)]}},
        lambda n: {"captions": text()},
        lambda n: {"captions": [text() for _ in range(n % 4 + (odd == 0))], "width": n - 5},
        lambda n: {"captions": {"a b": text(), "captions": text()}, "f": n / 7, "u": None},
        lambda n: {"long": [text()], "captions": text(), "url": text()},
        lambda n: {"long": text(), "captions": {"long": text()}, "nested": {"captions.long": 1}},
    ]  # fmt: skip
    used = chance.sample(shapes, chance.choice([1, 1, 1, 2, 3]))
    separators = chance.choice([(", ", ": "), (", ", ": "), (",", ":"), (" ,", " : ")])
    ends = chance.choice([["\n"], ["\n"], ["\n"], ["\r\n"], ["\n", "\r\n", "\r", "\n\n", " \n"]])
    ids = chance.choice([lambda n: f"id-{n}", lambda n: n, lambda n: str(n + 1), lambda n: "same"])
    lines = []
    for n in range(chance.choice([3, 150, 300])):
        own = {
            "id": ids(n) if chance.random() > odd else chance.choice(IDS),
            "image": of(chance, odd, [f"images/{n}.jpg", "a.png"], NAMES),
            **used[n * len(used) // 300 if chance.random() > odd else -1](n),
        }
        if chance.random() < odd:
            own.pop(chance.choice([*own]))
        if chance.random() < odd:
            own = dict(chance.sample([*own.items()], len(own)))
        line = json.dumps(own, ensure_ascii=chance.random() < odd, separators=separators)
        line = chance.choice(RAW) if chance.random() < odd else line
        lines.append((line + chance.choice(ends)).encode("utf-8", "surrogatepass"))
        if chance.random() < odd / 4:
            at = chance.randrange(len(lines[-1]))
            lines[-1] = lines[-1][:at] + bytes([chance.randrange(256)]) + lines[-1][at + 1 :]
    content = chance.choice([b"", b"", b"\xef\xbb\xbf"]) + b"".join(lines)
    path.write_bytes(content[: len(content) - chance.choice([0, 0, 1, 30])])
    fields = [["captions"], ["captions", "long"], ["long", "captions"], ["captions.short"], []]
    return ImageTextSource(
        path=str(path),
        fields=of(chance, 0.3, fields[:1], fields),
        id_field=of(chance, 0.1, ["id"], ["image", "captions", "nowhere", "width"]),
        image_field=of(chance, 0.05, ["image"], ["id", "nowhere"]),
        limit=of(chance, 0.1, [None], [5]),
        where=of(chance, 0.1, [{}], [{"image": "a.png"}]),
        group_by=of(chance, 0.1, [None], ["id"]),
    )


def made(source: ImageTextSource) -> bytes | str:
    """The bytes of its table, or why there is none."""
    sink = pa.BufferOutputStream()
    rows = partial(index._rows, source)
    try:
        table._write(sink, COLUMNS, records.source_files(source), rows)
    except RecordError as error:
        return str(error)
    return bytes(sink.getvalue())


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of records that were taken together."""
    found: list[int] = []
    own = index._columns

    def columns(rows: alike.AlikeRows, *more: Any) -> Any:
        found.append(len(rows.names))
        return own(rows, *more)

    monkeypatch.setattr(index, "_columns", columns)
    return found


def together(source: ImageTextSource, monkeypatch: pytest.MonkeyPatch) -> bytes | str:
    """What is made of a source, the same either way."""
    found = made(source)
    with monkeypatch.context() as single:
        single.setattr(index, "AlikeLines", lambda *_: None)
        assert made(source) == found
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_BATCH", 50)
    monkeypatch.setattr(alike, "_AT_ONCE", 8)


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_each_odd_value_among_good_lines_has_the_long_ways_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[int],
    separators: tuple[str, str],
    newline: str,
) -> None:
    def caption(value: Any) -> list[dict[str, Any]]:
        captions = ({"100 %": [value, "a dog"], "s": ["b c"]}, {"100 %": "a b", "s": value}, value)
        return [
            {"captions": each} for each in (*captions, ["a b", value], {"a": "b c", "a b": value})
        ]

    good = {"id": "0", "image": "a/b.jpg", "captions": "a dog", "width": 3, "x y (.*)": None}
    slots = [*zip(*map(caption, (GOOD[0], *ODD)), strict=True)]
    slots.append([{"image": value} for value in ("a.jpg", *NAMES)])
    slots += [[{"id": value} for value in (first, *IDS)] for first in ("id", 77)]
    slots.append([{"width": value} for value in (1, *ODD)])
    source = ImageTextSource(path=str(tmp_path / "a.jsonl"))
    tables = 0
    for known, *values in slots:
        rows = []
        for value in values:
            rows += [good | known | {"id": str(len(rows) + n)} | known for n in range(3)]
            rows.append(good | {"id": str(len(rows))} | value)
        lines = [json.dumps(row, ensure_ascii=False, separators=separators) for row in rows]
        for number, raw in enumerate(RAW):
            lines.insert(3 * number + 9, raw)
        text = newline.join([*lines, ""])
        (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
        tables += isinstance(together(source, monkeypatch), bytes)
    assert tables == len(slots) and sum(taken) > 500


def test_odd_files_have_the_long_ways_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    tables = 0
    for number in range(30):
        source = write(tmp_path / "a.jsonl", random.Random(number))
        tables += isinstance(together(source, monkeypatch), bytes)
    assert tables > 20 and sum(taken) > 300


def test_no_caption_of_a_line_that_is_taken_is_too_long() -> None:
    assert alike._LONGEST <= records.MAX_CAPTION_CHARS
