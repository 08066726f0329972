"""Reading rows: every kind of file, every filter, every way a file can be wrong."""

from __future__ import annotations

import gzip
import json
import random
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from llm2clip_vlm.data.reading import records, text_rows
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.records import (
    RowGroup,
    collect_captions,
    get_column,
    iter_records,
    iter_rows,
    source_rows,
)
from llm2clip_vlm.recipe.base import CaptionSource, DataSource

ROWS: list[dict[str, Any]] = [
    {"id": 1, "image_id": 7, "split": "train", "ok": True, "caption": "a red star"},
    {"id": 2, "image_id": 8, "split": "val", "ok": True, "caption": "a blue ring"},
    {"id": 3, "image_id": 7, "split": "train", "ok": False, "caption": "one star, red"},
    {"id": 4, "image_id": 9, "split": None, "ok": True, "caption": "a green heart"},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        text = lines
    elif name.endswith(".json"):
        text = json.dumps(rows)
    else:
        names = list(rows[0])
        cells = [[("" if row[n] is None else str(row[n])) for n in names] for row in rows]
        text = "\n".join(",".join(f'"{c}"' for c in row) for row in [names, *cells]) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def ids(source: CaptionSource, refused: Refused | None = None) -> list[list[int]]:
    groups = iter_records(source, refused or Refused())
    return [[int(row["id"]) for row in group.rows] for group in groups]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_json_kinds_read_equal(tmp_path: Path, name: str) -> None:
    assert list(iter_rows(write(tmp_path / name))) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_values_are_strings(tmp_path: Path, name: str) -> None:
    rows = list(iter_rows(write(tmp_path / name)))
    assert rows[0] == {
        "id": "1",
        "image_id": "7",
        "split": "train",
        "ok": "True",
        "caption": "a red star",
    }
    assert rows[2]["caption"] == "one star, red"


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(iter_rows(tmp_path / "a.parquet")) == ROWS
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(RecordError, match=r"b\.parquet.*Parquet"):
        list(iter_rows(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [[1], [2], [3], [4]]),
        ({"where": {"split": "train"}}, [[1], [3]]),
        ({"where": {"ok": True}}, [[1], [2], [4]]),
        ({"where": {"image_id": 7}}, [[1], [3]]),
        ({"where": {"image_id": "7"}}, [[1], [3]]),
        ({"drop_where": {"split": ["val", "train"]}}, [[4]]),
        ({"drop_where": {"split": ["null"]}}, [[1], [2], [3]]),
        ({"group_by": "image_id"}, [[1, 3], [2], [4]]),
        ({"limit": 2}, [[1], [2]]),
        ({"limit": 1, "group_by": "image_id"}, [[1, 3]]),
        ({"limit": 2, "drop_where": {"split": ["val"]}}, [[1], [3]]),
    ],
)
def test_filters(tmp_path: Path, filters: dict[str, Any], expected: list[list[int]]) -> None:
    path = write(tmp_path / "a.jsonl")
    assert ids(CaptionSource(path=str(path), fields=["caption"], **filters)) == expected


@pytest.mark.parametrize(
    "filters",
    [
        {"where": {"day": "2020-01-01"}},
        {"where": {"price": "1.50"}},
        {"drop_where": {"split": ["val"]}},
    ],
)
def test_filters_match_dates_decimals_and_padded_text(
    tmp_path: Path, filters: dict[str, Any]
) -> None:
    columns = {
        "id": [1, 2],
        "day": [date(2020, 1, 1), date(2021, 1, 1)],
        "price": [Decimal("1.50"), Decimal("2.00")],
        "split": ["train", "val "],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    source = CaptionSource(path=str(tmp_path / "a.parquet"), fields=["id"], **filters)
    assert ids(source) == [[1]]


def test_where_true_is_not_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"n": 1, "id": 1}, {"n": True, "id": 2}])
    assert ids(CaptionSource(path=str(path), fields=["id"], where={"n": True})) == [[2]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"fields": ["captoin"]},
        {"where": {"spilt": "train"}},
        {"drop_where": {"spilt": ["val"]}},
        {"drop_where": {"spilt": ["val"]}, "limit": 1},
    ],
)
def test_a_column_that_no_row_has_is_an_error(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match=r"captoin|spilt.*columns are id, image_id"):
        ids(CaptionSource(**{"path": str(path), "fields": ["caption"], **wrong}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_column_to_read_that_no_row_has_is_an_error(tmp_path: Path, name: str) -> None:
    rows = tmp_path / name
    rows.write_text("image_id,caption\n1,a b\n" if name == "a.csv" else '{"image_id": 1}\n')
    for columns in ({"image": "imageid", "id": "image_id"}, ["image_id", "imageid"]):
        source = DataSource(path=str(rows), columns=columns)
        with pytest.raises(RecordError, match=r"no row has a column 'imageid'; the columns are im"):
            list(source_rows(source, Refused()))
    assert (
        len(list(source_rows(source.model_copy(update={"columns": ["image_id"]}), Refused()))) == 1
    )


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match="no record left"):
        ids(CaptionSource(path=str(path), fields=["caption"], where={"split": "dev"}))


def test_group_without_value_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    refused = Refused()
    source = CaptionSource(path=str(path), fields=["caption"], group_by="split")
    ids(source, refused)
    assert [where for where, _ in refused.rows] == [f"{path}:4"]


def test_rows_without_a_group_are_no_group(tmp_path: Path) -> None:
    """An empty cell, or pandas' NaN, would give all of them the first one's picture."""
    rows = "7,1\n,2\n nan,3\nNone,4\n7,5\n ,6\n"
    (tmp_path / "a.csv").write_text(f"image_id,id\n{rows}")
    path = write(tmp_path / "a.jsonl", [{"image_id": float("nan"), "id": n} for n in (1, 2)])
    for file, found in ((tmp_path / "a.csv", [[1, 5]]), (path, [])):
        source = CaptionSource(path=str(file), fields=["id"], group_by="image_id")
        assert ids(source, Refused()) == found


def test_a_group_is_one_whoever_wrote_its_value(tmp_path: Path) -> None:
    values = [(["7", "8"], pyarrow.binary()), ([7, 8], None), ([7.0, None], None)]
    for number, (column, kind) in enumerate(values):
        table = {"image_id": pyarrow.array(column, kind), "id": [number, number + 10]}
        parquet.write_table(pyarrow.table(table), tmp_path / f"a-{number}.parquet")
    refused = Refused()
    source = CaptionSource(path=str(tmp_path / "a-*"), fields=["id"], group_by="image_id")
    assert ids(source, refused) == [[0, 1, 2], [10, 11]]
    assert [where for where, _ in refused.rows] == [f"{tmp_path / 'a-2.parquet'}:2"]
    stored = CaptionSource(path=str(tmp_path / "a-0.parquet"), fields=["id"], where={"image_id": 8})
    assert ids(stored) == [[10]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "unknown kind of file"),
        ("a.json", b'{"id": 1}', "expected an array"),
        ("a.json", b"[1", "no JSON"),
        ("a.jsonl", b'{"id": 1}\n[2]\n', "a.jsonl:2: list, expected an object"),
        ("a.jsonl", b'{"id": 1\n', "a.jsonl:1: no JSON"),
        ("a.jsonl", b'{"id": "\xff"}\n', "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 99, mtime=0)[:-9], "cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b"abcdefgh" * 4, mtime=0)[:10] + b"\xff" * 30,
            "cannot be read",
        ),
        ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}\n", "a.jsonl:1: no JSON"),
        ("a.json", b'[{"id": ' + b"1" * 5000 + b"}]", "no JSON"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:1: the row has more or fewer cells"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv: line 3: no CSV .unexpected end of data"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: the header names a column twice: a, b, a"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        list(iter_rows(tmp_path / name))


def test_a_long_csv_cell_costs_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1," + "x" * 200_000 + "\n2,short\n")
    assert [row["id"] for row in iter_rows(tmp_path / "a.csv")] == ["1", "2"]


@pytest.mark.parametrize(
    "document",
    [
        {"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": []},
        {"images": [{"filepath": 5, "filename": "a.jpg", "sentences": [{"raw": "a dog"}]}]},
    ],
)
def test_unexpected_annotations_end_no_run(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert len(list(iter_rows(tmp_path / "a.json"))) == 1


def test_missing_file() -> None:
    with pytest.raises(RecordError, match="no such file"):
        list(iter_rows("nowhere/a.jsonl"))


def test_broken_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\nnonsense\n\n{"id": 2}\n')
    bad = BadRecords(limit=1)
    assert [row["id"] for row in iter_rows(tmp_path / "a.jsonl", bad)] == [1, 2]
    assert "a.jsonl:2" in bad.summary()


def test_bad_records_stop_above_the_limit() -> None:
    bad = BadRecords(limit=1)
    assert bad.summary() == "no bad records"
    bad.add("a:1", "empty")
    with pytest.raises(RecordError, match=r"2 bad record\(s\), 1 allowed.*a:2: worse.*max_bad"):
        bad.add("a:2", "worse")


def test_get_column_reaches_into_mappings() -> None:
    row = {"m": {"en": "a dog"}, "a.b": 1}
    assert get_column(row, "m.en") == "a dog"
    assert get_column(row, "a.b") == 1
    assert get_column(row, "m.fr") is None


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"c": " a "}, ["c"], {"c": ["a"]}),
        ({"c": ["a", "b"]}, ["c"], {"c": ["a", "b"]}),
        ({"c": {"short": ["a"], "long": "b"}}, ["c"], {"short": ["a"], "long": ["b"]}),
        ({"s": "a", "l": "b"}, ["s", "l"], {"s": ["a"], "l": ["b"]}),
        ({"s": "a", "l": None}, ["s", "l"], {"s": ["a"]}),
    ],
)
def test_collect_captions(row: dict[str, Any], fields: list[str], expected: object) -> None:
    assert collect_captions(RowGroup(Path("f"), "1", [row]), fields) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [("  ", "empty caption"), (["a", ""], "empty caption"), (3, "is int"), ([], "no caption")],
)
def test_bad_captions(value: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        collect_captions(RowGroup(Path("f"), "1", [{"c": value}]), ["c"])


def test_the_larger_of_both_limits_holds() -> None:
    """`max_bad_records` and `max_bad_fraction`: exactly the limit passes, one more does not."""
    for limit, fraction, allowed in ((2, 0.0, 2), (0, 0.05, 5), (3, 0.05, 5), (7, 0.05, 7)):
        bad = BadRecords(limit=limit, fraction=fraction)
        bad.take(100, [(f"a.jsonl:{i}", "empty caption") for i in range(allowed)])
        assert (bad.count, bad.allowed) == (allowed, allowed)
        with pytest.raises(RecordError, match=rf"{allowed + 1} bad record\(s\), {allowed} allowed"):
            bad.add("a.jsonl:100", "empty caption")


def test_a_fraction_is_of_all_sources_and_rounds_down() -> None:
    bad = BadRecords(fraction=0.1)
    bad.take(10, [])
    bad.take(10, [("a:1", "x"), ("a:2", "x")])  # two of twenty
    assert (bad.total, bad.allowed, bad.count) == (20, 2, 2)
    with pytest.raises(RecordError, match=r"2 bad record\(s\), 1 allowed of 15 records"):
        BadRecords(fraction=0.1).take(15, [("a:1", "x"), ("a:2", "x")])


def test_a_list_that_another_process_has_begun_anew_stays_whole(tmp_path: Path) -> None:
    """Slices of stage 2a that start one after the other."""
    ledger = tmp_path / "dropped.jsonl"
    first = BadRecords(limit=9, ledger=ledger)
    for number in range(3):
        first.add(f"a:{number}", "broken")
    ledger.unlink()
    second = BadRecords(limit=9, ledger=ledger)
    second.add("a:0", "broken")
    first.add("b:0", "broken")
    assert (first.count, second.count) == (4, 2)
    assert [json.loads(line)["where"] for line in ledger.open()] == ["a:0", "b:0"]
    ledger.unlink()
    third = BadRecords(limit=9, ledger=ledger)
    third.add("a:0", "broken, " * 20)  # longer than all before
    first.add("b:1", "broken")
    assert (first.count, third.count) == (5, 2)


def test_a_run_goes_on_where_one_stopped_by_the_limit_left(tmp_path: Path) -> None:
    ledger = tmp_path / "dropped.jsonl"
    first = BadRecords(limit=1, ledger=ledger)
    first.add("a:1", "x")
    with pytest.raises(RecordError):
        first.add("a:2", "x")
    again = BadRecords(limit=1, ledger=ledger)
    assert again.count == 1  # the one that stopped it is met, and counted, again
    with pytest.raises(RecordError, match="2 bad"):
        again.add("a:2", "x")
    assert BadRecords(limit=2, ledger=ledger).count == 1


def test_lines_up_to_the_limit_and_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "MAX_LINE_CHARS", 20)
    line = '{"a": "' + "x" * 10 + '"}\n'
    assert len(line) == 20
    (tmp_path / "a.jsonl").write_text(line * 2)
    assert len(list(iter_rows(tmp_path / "a.jsonl"))) == 2
    (tmp_path / "a.jsonl").write_text(line + line.replace("x", "xx", 1))
    with pytest.raises(RecordError, match="line 2 has more than 20"):
        list(iter_rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n5,6\n")
    refused = Refused()
    assert [row["a"] for row in iter_rows(tmp_path / "a.csv", refused)] == ["1", "5"]
    assert refused.rows[0][0] == f"{tmp_path / 'a.csv'}:2"
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n\n[]\n')
    refused = Refused()
    assert len(list(iter_rows(tmp_path / "b.jsonl", refused))) == 1
    assert refused.rows[0][0] == f"{tmp_path / 'b.jsonl'}:3"


def test_a_large_file_that_packs_as_text_does_is_read(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"a": draw.randbytes(2**19).hex()} for _ in range(5)]  # 5 MiB, packed to a half
    assert list(iter_rows(write(tmp_path / "a.jsonl.gz", rows))) == rows


def test_limit_and_length_of_captions_at_the_border(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    found = [ids(CaptionSource(path=path, fields=["caption"], limit=n)) for n in (1, 3, 4, 5)]
    assert [len(rows) for rows in found] == [1, 3, 4, 4]
    for length, good in ((records.MAX_CAPTION_CHARS, True), (records.MAX_CAPTION_CHARS + 1, False)):
        group = RowGroup(tmp_path, "1", [{"caption": ("ab " * length)[: length - 1] + "c"}])
        if good:
            assert collect_captions(group, ["caption"])
        else:
            with pytest.raises(RecordError, match="characters"):
                collect_captions(group, ["caption"])


def test_another_kind_of_file_is_a_function_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/extend.md: with the lines that stand there, a source of that kind has all the rest."""
    page = (Path(__file__).resolve().parents[2] / "docs/extend.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def tsv_rows.*?)```", page, re.DOTALL)
    names: dict[str, Any] = dict(vars(records))
    monkeypatch.setattr(records, "READERS", {**records.READERS})
    names["READERS"] = records.READERS
    exec(compile(code, "extend.md", "exec", dont_inherit=True), names)
    lines = [
        "id\tcaption\tsplit",
        "1\ta dog\ttrain",
        "2\tcut off",
        "3\ta cat\tval",
        "4\tbirds\ttrain",
    ]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    refused = Refused()
    source = CaptionSource(path=f"{tmp_path}/*.tsv", fields=["caption"], where={"split": "train"})
    assert ids(source, refused) == [[1], [4]]
    assert [why for _, why in refused.rows] == ["expected 3 columns, got 2"]
