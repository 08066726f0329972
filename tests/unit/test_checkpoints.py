"""An unfinished or damaged checkpoint is never resumed from; the one before is."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import pytest

from llm2clip_vlm.constants import SEAL_NAME
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.checkpoints import (
    damage,
    make_room,
    newest_whole,
    rotate,
    seal_checkpoint,
)


def checkpoint(directory: Path, step: int, *, sealed: bool = True) -> Path:
    folder = directory / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "global_step" / "optim.pt").write_bytes(b"o" * 50)
    if sealed:
        seal_checkpoint(folder)
    return folder


def test_the_seal_lists_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    seal = json.loads((folder / SEAL_NAME).read_text())
    assert seal["world_size"] == 1
    assert set(seal["files"]) == {"model.safetensors", "global_step/optim.pt"}
    assert damage(folder) is None


@pytest.mark.parametrize("how", ["unfinished", "cut", "changed", "missing", "half a seal"])
def test_the_one_before_is_taken(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpoint(tmp_path, 9)
    bad = checkpoint(tmp_path, 10, sealed=how != "unfinished")
    file = bad / "global_step" / "optim.pt"
    if how == "cut":
        file.write_bytes(b"o" * 20)
    elif how == "changed":
        file.write_bytes(b"o" * 49 + b"x")
    elif how == "missing":
        file.unlink()
    elif how == "half a seal":
        (bad / SEAL_NAME).write_text((bad / SEAL_NAME).read_text()[:40])
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == str(good)
    reasons = {"unfinished": "not finished", "half a seal": "files.json is cut or changed"}
    reason = reasons.get(how, "global_step/optim.pt is missing, cut or")
    assert f"{bad} is passed over" in caplog.text and reason in caplog.text


def test_another_number_of_processes_is_told_and_refused_where_zero_split_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T44."""
    folder = checkpoint(tmp_path, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert newest_whole(tmp_path) == str(folder)
    assert "written by 1 processes, now there are 2: weights, optimizer and the" in caplog.text
    (folder / "latest").write_text("global_step4")  # as DeepSpeed does
    with monkeypatch.context() as then:
        then.delenv("WORLD_SIZE")
        seal_checkpoint(folder)
        assert newest_whole(tmp_path) == str(folder)
    with pytest.raises(HandoffError, match=r"now there are 2, and ZeRO .*; start 1, or delete"):
        newest_whole(tmp_path)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") is None
    checkpoint(tmp_path, 1, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) is None


def begun(directory: Path, step: int) -> Path:
    """What a run that was killed while it wrote a checkpoint leaves."""
    make_room(directory, step)
    (directory / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"w" * 10)
    return directory / f"checkpoint-{step}"


def test_only_what_a_killed_run_left_unfinished_makes_room(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    begun(tmp_path, 3)
    (checkpoint(tmp_path, 4) / "model.safetensors").unlink()  # damaged: the run resumed from 1
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "mine.txt").write_text("m")  # of nobody of ours
    make_room(tmp_path, 2)
    names = {path.name for path in tmp_path.iterdir()}
    kept = {"checkpoint-1", "set-aside-checkpoint-2-1", "set-aside-checkpoint-4-1", "checkpoint-9"}
    assert names == kept | {"checkpoint-2"}
    assert (tmp_path / "set-aside-checkpoint-2-1" / SEAL_NAME).is_file()
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_foreign_checkpoint_is_kept(tmp_path: Path) -> None:
    other = checkpoint(tmp_path, 2, sealed=False)
    for number in (1, 2):
        make_room(tmp_path, 2)
        (tmp_path / "checkpoint-2" / "new.bin").write_text("n")
        seal_checkpoint(tmp_path / "checkpoint-2")
        assert (tmp_path / f"set-aside-{other.name}-{number}").is_dir()
    assert set(json.loads((other / SEAL_NAME).read_text())["files"]) == {"new.bin"}
    assert damage(other) is None


def test_rotation_deletes_what_the_seals_list(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
    foreign = checkpoint(tmp_path, 7, sealed=False)
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-4", foreign.name}
    left = [file.name for file in (tmp_path / "checkpoint-2").rglob("*")]
    assert left == ["notes.txt"]
    rotate(tmp_path, None, None)
    rotate(tmp_path, 1, None)
    assert not (tmp_path / "checkpoint-1").exists() and (tmp_path / "checkpoint-4").is_dir()


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    """Each is refused by name, or (in the number of processes) said."""
    folder, chance = checkpoint(tmp_path, 3), random.Random(0)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for _ in range(200):
        file = chance.choice(files)
        whole = file.read_bytes()
        flip(file, chance.randrange(8 * len(whole)))
        os.utime(file, ns=(number := chance.randrange(10**9), number))  # no date helps
        try:
            assert newest_whole(tmp_path) is None or file.name == SEAL_NAME
            assert newest_whole(tmp_path) in (None, str(folder))
            if newest_whole(tmp_path):  # the seal says the same in other words
                assert damage(folder) is None
        except HandoffError as error:
            said = str(error)
            assert str(folder) in said
        file.write_bytes(whole)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
