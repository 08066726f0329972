"""The one Arrow table: whole or not there, made once, the same in memory and in a file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.data.reading import table
from llm2clip_vlm.data.reading.bad_records import Refused
from llm2clip_vlm.data.reading.table import Table, arrow_table

FEATURES = {"ids": ["int32"], "length": "int64"}
NOT_UTF8 = os.fsdecode(b"caf\xe9.jpg")


def make(data: Path, count: int = 1203, kill_at: int = -1) -> Table:
    """A table of three batches; `data.read-PID` is left by whoever reads."""

    def rows(refused: Refused, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        data.with_name(f"{data.name}.read-{os.getpid()}").touch()
        facts["cut"] = 7
        for n in range(count):
            if n == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if n % 100 == 50:
                refused.add(f"{NOT_UTF8}:{n}", "why")
            yield {"record": [NOT_UTF8, n], "ids": list(range(n % 5)), "length": n}

    return arrow_table([data], None, lambda: ["settings"], FEATURES, rows)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_BATCH", 500)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("data")
    return tmp_path / "a.jsonl"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)


def content(made: Table) -> list[Any]:
    rows = [(made.record(n), made.items("ids", n).tolist()) for n in range(len(made))]
    return [rows, made.column("length").tolist(), made.refused, made.facts["cut"]]


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1203])
def test_in_memory_and_in_a_file_it_is_the_same(
    data: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(data, count)
    assert not (data.parent / ".llm2clip-index").exists()
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    wanted = [([NOT_UTF8, n], list(range(n % 5))) for n in range(count)]
    refused = [(f"{NOT_UTF8}:{n}", "why") for n in range(50, count, 100)]
    for made in (small, make(data, count), pickle.loads(pickle.dumps(small))):
        assert content(made) == [wanted, list(range(count)), refused, 7]


def _size(data: Path) -> int:
    return len(make(data))


def test_three_processes_at_once_read_the_source_once(data: Path, large: None) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_size, [data] * 3) == [1203] * 3
    assert len(list(data.parent.glob("*.read-*"))) == 1


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_a_table(
    data: Path, large: None
) -> None:
    process = multiprocessing.get_context("fork").Process(target=make, args=(data, 1203, 900))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = data.parent / ".llm2clip-index"
    assert not [file for file in folder.iterdir() if file.suffix == ".arrow"]
    assert len(make(data)) == 1203
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("left", [0, 10, 32, 40, -33, -1])
def test_a_table_cut_at_its_end_is_named_and_made_again(data: Path, large: None, left: int) -> None:
    wanted = content(make(data))
    (file,) = (data.parent / ".llm2clip-index").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="has changed since it was written"):
        Table(file)
    assert content(make(data)) == wanted
    assert file.read_bytes() == whole
