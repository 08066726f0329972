"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from llm2clip_vlm.files import find_recipe, read_json, read_text, write_atomically, written_whole


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


@pytest.mark.parametrize("rights", [0o755, 0o2770, 0o700])
def test_whoever_may_read_a_folder_may_read_its_weights(tmp_path: Path, rights: int) -> None:
    """safetensors 0.8 writes files of mode 0600 whatever the umask."""
    with written_whole(tmp_path / "model") as folder:
        (folder / "vision_tower").mkdir(parents=True)
        folder.chmod(rights)
        weights = folder / "vision_tower" / "model.safetensors"
        weights.touch(0o600)
    weights = tmp_path / "model" / "vision_tower" / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == rights & 0o666


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


def test_a_text_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 10)
    assert read_text(tmp_path / "a", limit_bytes=10) == "x" * 10
    with pytest.raises(ValueError, match="at most 9 bytes"):
        read_text(tmp_path / "a", limit_bytes=9)


def test_a_key_given_twice_needs_one_value(tmp_path: Path) -> None:
    for text, good in (('{"a": 1, "a": 1}', True), ('{"a": 1, "a": true}', False)):
        (tmp_path / "a.json").write_text(text)
        if good:
            assert read_json(tmp_path / "a.json") == {"a": 1}
        else:
            with pytest.raises(ValueError, match="'a' is given twice"):
                read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", list) == [1]
    with pytest.raises(ValueError, match="expected an object in this JSON file, got a list"):
        read_json(tmp_path / "a.json")


def test_a_short_name_means_a_file_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("llava15").endswith("/eval/suites/llava15.yaml")
    assert find_recipe("llava15", folder="eval/expected/").endswith("/eval/expected/llava15.yaml")
    assert find_recipe("nano/stage3").endswith("/recipes/nano/stage3.yaml")
    assert find_recipe("nothing/of/it") == "nothing/of/it"
