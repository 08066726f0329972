"""A folder belongs to one run, and what no run has written is left as it is."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm2clip_vlm.runs.ownership import (
    MARKER_NAME,
    Hold,
    OwnershipError,
    remove,
    sign,
    unsigned,
    write_pages,
)

HOLDER = """
import sys, time
from llm2clip_vlm.runs.ownership import Hold
hold = Hold(sys.argv[1], "a test", ["a"], alone=True, shared=len(sys.argv) > 2)
print("held", flush=True)
time.sleep(60)
"""


def tree(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MARKER_NAME]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def holder() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds a folder."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder), *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_run_is_refused_by_host_and_process(tmp_path: Path, holder: Any) -> None:
    process = holder(tmp_path / "run")
    where = f"a test, process {process.pid} on {os.uname().nodename}, started 20"
    before = (tmp_path / "run" / MARKER_NAME).read_bytes()
    for _ in range(2):
        with pytest.raises(OwnershipError, match=where):
            Hold(tmp_path / "run", "me", ["a"], alone=True)
    assert (tmp_path / "run" / MARKER_NAME).read_bytes() == before
    process.kill()
    process.wait()
    Hold(tmp_path / "run", "me", ["a"], alone=True).release()


def test_writers_that_share_keep_others_out(tmp_path: Path, holder: Any) -> None:
    holder(tmp_path, "shared")
    shared = Hold(tmp_path, "a slice", ["a"], shared=True)
    shared.release()
    with pytest.raises(OwnershipError, match="in use by another run"):
        Hold(tmp_path, "me", ["a"])


def test_one_process_takes_over_its_own_folder(tmp_path: Path) -> None:
    first = Hold(tmp_path, "first", ["a"])
    second = Hold(tmp_path, "second", ["b"])
    assert second.names == {"a", "b"}
    first.release()
    holder = json.loads((tmp_path / MARKER_NAME).read_text())["holder"]
    assert (holder["doing"], holder["process"]) == ("second", os.getpid())


def test_a_loaders_worker_does_not_keep_the_folder(tmp_path: Path) -> None:
    hold = Hold(tmp_path, "parent", ["a"])
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    hold.release()
    deadline = time.monotonic() + 10
    with (tmp_path / MARKER_NAME).open("r+") as probe:
        while time.monotonic() < deadline:  # the worker may just have begun
            with suppress(BlockingIOError):
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        assert worker.is_alive() and time.monotonic() < deadline
    worker.kill()
    worker.join()


@pytest.mark.parametrize("alone", [True, False])
def test_foreign_files_are_refused_before_the_first_write(tmp_path: Path, alone: bool) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.bin").write_text("mine")
    (tmp_path / "thesis.txt").write_text("words")
    before = tree(tmp_path)
    with pytest.raises(OwnershipError, match=r"no run of this program has written: model") as error:
        Hold(tmp_path, "me", ["model", "results.json"], alone=alone)
    assert ("thesis.txt" in str(error.value)) is alone
    assert tree(tmp_path) == before and not (tmp_path / MARKER_NAME).exists()
    if not alone:
        Hold(tmp_path, "me", ["results.json"]).release()
        with pytest.raises(OwnershipError, match="model"):
            Hold(tmp_path, "me", ["model"])


def test_a_claim_takes_what_is_free_only(tmp_path: Path) -> None:
    hold = Hold(tmp_path, "me", ["a"], alone=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(OwnershipError, match="model"):
        hold.claim(["model"])
    (tmp_path / "model").rmdir()
    hold.claim(["model"])
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")  # beside ours it is no matter
    hold.release()
    again = Hold(tmp_path, "me", ["a"], alone=True)
    again.claim(["model"])
    assert again.names == {"a", "model"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hold = Hold(tmp_path, "first", ["a"])
    path = tmp_path / MARKER_NAME
    content = json.loads(path.read_text())
    hold.release()
    parent = os.getppid()
    began = psutil.Process(parent).create_time()
    for changes, refused in (
        ({"process": parent, "began": began}, True),  # alive
        ({"process": parent, "began": began - 60}, False),  # its number was given anew
        ({"process": 2**22 + 7}, False),
        ({"host": "another", "process": 2**22 + 7}, True),  # nobody knows
    ):
        path.write_text(json.dumps({**content, "holder": {**content["holder"], **changes}}))
        if refused:
            with pytest.raises(OwnershipError, match=f"long gone, delete {path}"):
                Hold(tmp_path, "second", ["a"])
        else:
            Hold(tmp_path, "second", ["a"]).release()


@pytest.mark.parametrize("text", ["[]", "{", '{"names": 3}', "\0\0"])
def test_a_damaged_marker_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER_NAME).write_text(text)
    with pytest.raises(OwnershipError, match=f"{MARKER_NAME} is damaged"):
        Hold(tmp_path, "me", ["a"])


def test_only_signed_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "composed"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_text("w")
    (folder / "sub" / "config.json").write_text("{}")
    sign(folder)
    assert unsigned(folder) == []
    (folder / "sub" / "mine.txt").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    assert unsigned(folder) == ["sub/mine.txt"]
    assert not remove(folder)
    assert tree(folder) == {"sub/mine.txt": b"mine"} and tmp_path.is_dir()
    (folder / "link").unlink()
    assert not remove(folder) and remove(folder, ["sub/mine.txt"])
    assert not folder.exists()


def test_a_list_reaches_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    remove(tmp_path / "folder", ["../mine.txt", str(tmp_path / "mine.txt"), "none"])
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_pages_replace_their_own_earlier_ones(tmp_path: Path) -> None:
    write_pages(tmp_path, "compare", {"compare.html": "1"})
    write_pages(tmp_path, "compare", {"compare.html": "2", "compare.md": "2"})
    assert tree(tmp_path) == {"compare.html": b"2", "compare.md": b"2"}
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OwnershipError, match=r"report\.html"):
        write_pages(tmp_path, "report", {"report.html": "3", "report.json": "3"})
    assert (tmp_path / "report.html").read_text() == "mine"
    assert not (tmp_path / "report.json").exists()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder: Any) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        process = holder(tmp_path)
        process.send_signal(number)
        process.wait()
        Hold(tmp_path, "me", ["a"], alone=True).release()


def test_holds_that_share_a_folder_do_not_cut_it_under_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slices that begin at once: the longer line, the shorter one, then both are cut."""
    write, cut, late = os.pwrite, os.ftruncate, list[Callable[[], None]]()
    monkeypatch.setattr(
        os, "ftruncate", lambda handle, size: late.append(lambda: cut(handle, size))
    )

    def and_then_another(handle: int, text: bytes, at: int) -> int:
        monkeypatch.setattr(os, "pwrite", write)
        done = write(handle, text, at)
        cut(handle, write(handle, b'{"holder": null, "names": ["a"]}\n', 0))
        return done

    monkeypatch.setattr(os, "pwrite", and_then_another)
    hold = Hold(tmp_path, "a slice", ["a"], shared=True)
    for each in late:
        each()
    hold.release()
    Hold(tmp_path, "me", ["a"]).release()
