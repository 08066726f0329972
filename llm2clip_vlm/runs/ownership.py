"""Ownership of a folder: a lock while a run writes into it, and the names that runs have written.

`.llm2clip-vlm.json` lies in every output directory. A run that writes there holds a lock on it
(`flock`, which ends with the process however that ends; on a file system without locks the file's
host and process count as long as that process lives, and processes of other machines always). It
lists the names below the folder that runs have written or will write; nothing else is ever
overwritten or deleted. A folder that holds other files only is refused before anything is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llm2clip_vlm.files import listed, read_text, told_where, write_atomically

MARKER_NAME = ".llm2clip-vlm.json"
"""File that says which process writes into a folder, and which names runs have written."""
_SAME_START_S = 5.0  # the clock by which the kernel counts may be set


class OwnershipError(ValueError):
    """A folder is in use by another run, or holds what no run has written."""


class Hold:
    """A folder that this process writes into, until :meth:`release` or its end.

    A second hold of one process on a folder takes the place of the first.

    Args:
        folder: Made if absent.
        doing: The program that writes there, for the message that another run gets.
        names: What it will write, below the folder.
        alone: Whether nothing else may lie there; else files of other names do not matter.
        shared: Whether other shared holds may write at the same time.
        known: Names there whose content says that a run has written them.

    Raises:
        OwnershipError: Another run holds the folder, or it holds something that no run has written;
            both are named, and nothing is changed.
    """

    def __init__(
        self,
        folder: str | Path,
        doing: str,
        names: Iterable[str] = (),
        *,
        alone: bool = False,
        shared: bool = False,
        known: Collection[str] = (),
    ) -> None:
        self.folder = Path(folder)
        """The folder."""
        self.names: set[str] = set()
        """Names that runs have written or will write."""
        self._handle, self._shared = -1, shared
        wanted = set(names)
        path = self.folder / MARKER_NAME
        if earlier := _HELD.get(path.resolve()):
            earlier.release()
        self.names = {*_content(path).get("names", ()), *known}
        self._refuse_foreign(wanted, alone)
        with told_where(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(path, shared)
            self.names |= set(_content(path).get("names", ()))
            self._refuse_foreign(wanted, alone)
            self.names |= wanted
            self._write(holder := {**_this_process(), "doing": doing})
            if self._unlocked:  # of two that came at once, one stays
                time.sleep(0.3)
                if _content(path).get("holder") != holder:
                    self._refuse_holder(path)
        except BaseException:
            self._close()
            raise
        _HELD[path.resolve()] = self

    def claim(self, names: Iterable[str]) -> None:
        """Add names before they are written.

        Raises:
            OwnershipError: Something lies there under one of them.
        """
        wanted = set(names)
        self._refuse_foreign(wanted, alone=False)
        if not wanted <= self.names:
            self.names |= wanted
            self._write(_content(self.folder / MARKER_NAME).get("holder"))

    def release(self) -> None:
        """Let others write there."""
        if self._handle >= 0:
            with suppress(OSError):
                self._write(None)
            self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _refuse_foreign(self, wanted: set[str], alone: bool) -> None:
        if alone and not self.names:
            if self.folder.is_dir():
                found = sorted(n for n in os.listdir(self.folder) if not n.startswith("."))
                foreign(self.folder, found)
            return
        lost = sorted(wanted - self.names)
        foreign(self.folder, [name for name in lost if os.path.lexists(self.folder / name)])

    def _lock(self, path: Path, shared: bool) -> None:
        self._unlocked = False
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse_holder(path)
        except OSError:  # no locks on this file system
            self._unlocked = True
            if _lives(_content(path).get("holder")) and not shared:
                self._refuse_holder(path)

    def _refuse_holder(self, path: Path) -> None:
        holder = _content(path).get("holder") or {}
        process, host = holder.get("process", "unknown"), holder.get("host", "unknown host")
        mend = f" (if that process is long gone, delete {path})" if self._unlocked else ""
        raise OwnershipError(
            f"{self.folder} is in use by another run: {holder.get('doing', 'a run')}, process "
            f"{process} on {host}, started {holder.get('since', 'a moment ago')}; let it end, or "
            f"choose another output folder{mend}"
        )

    def _write(self, holder: Any) -> None:
        # One line, written in place: the lock is on this very file. What stands after the line is
        # not read. Where others share the folder it stays: cut to this line's length after one of
        # them has written a shorter one, the file would end with NULs.
        text = (json.dumps({"holder": holder, "names": sorted(self.names)}) + "\n").encode()
        os.pwrite(self._handle, text, 0)
        if not self._shared:
            os.ftruncate(self._handle, len(text))


_HELD: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()


def _forget() -> None:
    """Let go in a loader's worker, which would keep the folder of a killed parent locked."""
    for hold in list(_HELD.values()):
        hold._close()


os.register_at_fork(after_in_child=_forget)


def foreign(folder: Path, names: Collection[str]) -> None:
    """Refuse files that no run has written.

    Raises:
        OwnershipError: There are such files.
    """
    if names:
        raise OwnershipError(
            f"{folder} holds what no run of this program has written: {listed(names)}; nothing was "
            "changed. Choose another output folder, or move these files away"
        )


def write_pages(folder: str | Path, doing: str, pages: Mapping[str, str]) -> None:
    """Write a few texts into a folder in which anything else may lie.

    Raises:
        OwnershipError: One of them is there, and no run has written it.
    """
    hold = Hold(folder, doing, pages)
    try:
        for name, text in pages.items():
            write_atomically(hold.folder / name, text)
    finally:
        hold.release()


def sign(folder: Path) -> None:
    """List a folder's files as written by a run, so that :func:`remove` may delete them."""
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    write_atomically(folder / MARKER_NAME, json.dumps({"names": files}) + "\n")


def unsigned(folder: Path) -> list[str]:
    """Files of a folder that :func:`sign` did not list."""
    names = {*_content(folder / MARKER_NAME).get("names", ()), MARKER_NAME}
    files = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir())
    return sorted(set(files) - names)


def remove(folder: Path, names: Iterable[str] | None = None) -> bool:
    """Delete files, and the folders that become empty.

    Args:
        folder: Folder of the files.
        names: Files below it. None: those that :func:`sign` listed.

    Returns:
        Whether nothing is left.
    """
    listed = _content(folder / MARKER_NAME).get("names", ()) if names is None else names
    for name in [*listed, MARKER_NAME]:
        if ".." in Path(name).parts or Path(name).is_absolute():
            continue  # a list that came with foreign files reaches no others
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # foreign files keep their folders
            os.rmdir(place)
    return not folder.exists()


def _content(path: Path) -> dict[str, Any]:
    """The marker's first line; empty without a marker."""
    try:
        if not os.path.lexists(path):
            return {}
        found = json.loads(read_text(path).partition("\n")[0] or "{}")
    except (ValueError, RecursionError):
        found = None
    names = found.get("names", []) if isinstance(found, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OwnershipError(
            f"{path} is damaged; delete it together with the folder, or (if all that lies there "
            "was written by one run) that file alone"
        )
    return dict(found)


def _this_process() -> dict[str, Any]:
    return {
        "host": os.uname().nodename,
        "process": os.getpid(),
        "began": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _lives(holder: Any) -> bool:
    if not isinstance(holder, dict):
        return False
    if holder.get("host") != os.uname().nodename:
        return True
    with suppress(psutil.Error, KeyError, TypeError, ValueError):
        began = psutil.Process(holder["process"]).create_time()
        return abs(began - holder["began"]) < _SAME_START_S  # else its number was given anew
    return False
