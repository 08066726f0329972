"""An unfinished or damaged checkpoint is never resumed from; the one before is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llm2clip_vlm.handoff import HandoffError
from llm2clip_vlm.training.checkpoints import (
    SEAL_NAME,
    damage,
    newest_whole,
    remove_unfinished,
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


def test_another_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T44."""
    checkpoint(tmp_path, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HandoffError, match="written by 1 processes, here are 2; start 1"):
        newest_whole(tmp_path)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") is None
    checkpoint(tmp_path, 1, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) is None


def test_leftovers_make_room(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 3, sealed=False)
    (checkpoint(tmp_path, 4) / "model.safetensors").unlink()  # damaged: the run resumed from 1
    remove_unfinished(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [kept]
