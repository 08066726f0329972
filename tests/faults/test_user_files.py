"""Files of the user's that are no files, damaged or cut: named, never waited for or believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.constants import SEAL_NAME
from llm2clip_vlm.data.reading.records import RecordError, iter_rows
from llm2clip_vlm.evaluation.vlm.jobs import Job
from llm2clip_vlm.runs.manifest import _noted, read_manifest
from llm2clip_vlm.runs.ownership import Hold
from llm2clip_vlm.training.callbacks import read_metrics
from llm2clip_vlm.training.checkpoints import _seal


def _arrow(path: Path) -> bytes:
    import pyarrow as pa

    rows = [{"id": str(i), "caption": f"a dog {i}", "tags": ["x"] * i} for i in range(40)]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path.read_bytes()


def test_an_arrow_file_that_is_cut_between_batches_is_refused(tmp_path: Path) -> None:
    data = _arrow(tmp_path / "whole.arrow")
    assert len(list(iter_rows(tmp_path / "whole.arrow"))) == 40
    for end in range(0, len(data), 8):
        path = tmp_path / f"{end}.arrow"
        path.write_bytes(data[:end])
        with pytest.raises(RecordError, match="cannot be read as Arrow"):
            list(iter_rows(path))
        path.unlink()


def test_damaged_offsets_of_an_arrow_file_do_not_end_the_process(tmp_path: Path) -> None:
    """Apart, since Arrow aborts where it believes them."""
    data = _arrow(tmp_path / "a.arrow")
    for at in range(0, len(data) - 4, 24):
        changed = bytearray(data)
        changed[at : at + 4] = b"\xff\xff\xff\x7f"
        (tmp_path / f"{at}.arrow").write_bytes(changed)
    code = (
        "import sys; from pathlib import Path\n"
        "from llm2clip_vlm.data.reading.bad_records import RecordError\n"
        "from llm2clip_vlm.data.reading.records import iter_rows\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.arrow')):\n"
        "    try: list(iter_rows(path))\n"
        "    except RecordError: pass\n"
        "print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "end\n", done.stderr[-2000:]


def _job(path: Path) -> Any:
    """A result of an evaluation."""
    samples = path.with_name("t.samples.jsonl")
    samples.write_text("")
    return Job("c", "m", "0", 0, "t", "h").result(path.parent.parent)


DAMAGED = ('{"a": [1', "[]", "\0\0\0\0", "[" * 5000, '{"files": 7, "checkpoint": 3}')

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "claims": ("parents.json", _noted),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "metrics": ("metrics.jsonl", read_metrics),
    "result": ("t.json", _job),
    "seal": (SEAL_NAME, lambda path: _seal(path.parent)),
}


@pytest.mark.parametrize("name", [*READERS])
def test_damaged_json_of_a_run_is_named(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    folder = tmp_path / "c"
    folder.mkdir()
    for text in DAMAGED:
        (folder / file).write_text(f"{text}\n{text}\n" if name == "metrics" else text)
        if name == "seal":
            assert read(folder / file) is None
        elif name in ("claims", "metrics") and text == DAMAGED[-1]:
            read(folder / file)  # an object like any other
        else:
            with pytest.raises(ValueError, match=file):
                read(folder / file)


def test_a_fifo_in_a_folder_of_results_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    os.mkfifo(folder / ".llm2clip-vlm.json")
    with pytest.raises(ValueError, match="damaged"):
        Hold(folder, "evaluation", {"x.json"}).release()


def test_deeply_nested_json_lines_are_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonlines"
    path.write_text(json.dumps({"id": 1}) + "\n" + "[" * 100_000 + "\n")
    rows = iter_rows(path)
    assert next(rows) == {"id": 1}
    with pytest.raises(RecordError, match=r"a\.jsonlines:2: no JSON"):
        next(rows)
