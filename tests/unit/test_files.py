"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from llm2clip_vlm.files import write_atomically, written_whole


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "one")

    def fail(folder: bool) -> None:
        with written_whole(tmp_path / "a.txt") as partial:
            if folder:
                partial.mkdir()
                (partial / "half").write_text("x")
            else:
                partial.write_text("half")
            raise RuntimeError("disk full")

    for folder in (False, True):
        with pytest.raises(RuntimeError, match="disk full"):
            fail(folder)
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "one"


def test_a_folder_appears_with_all_its_files_and_replaces_none(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with written_whole(tmp_path / "world") as partial:
            partial.mkdir()
            (partial / "a").write_text(text)
            assert not (tmp_path / "world" / "a").exists() or text == "two"

    write("one")
    with pytest.raises(OSError, match="world"):
        write("two")
    assert (tmp_path / "world" / "a").read_text() == "one"
    assert [item.name for item in tmp_path.iterdir()] == ["world"]


def test_what_a_killed_process_left_goes_at_the_next_write_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model[1]"
    if (child := os.fork()) == 0:
        with written_whole(path) as partial:
            partial.mkdir()
            (partial / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model[1].") and (left / "model[1]" / "half").is_file()
    write_atomically(tmp_path / "other", "of another path")
    assert left.is_dir()
    with written_whole(path) as first:
        assert not left.exists()
        first.mkdir()
        with written_whole(path) as second:  # at the same time: both lie where they are
            assert first.is_dir()
            second.write_text("one")
        path.unlink()
    assert {item.name for item in tmp_path.iterdir()} == {"model[1]", "other"}
