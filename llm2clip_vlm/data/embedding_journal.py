"""Rows that training runs add to an embedding cache, and how all of its files are read.

A journal grows while others are read and written: its records have one size, and those that were
encoded together form a frame, of which a killed process leaves all or nothing behind.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm2clip_vlm.data.embedding_shards import (
    DIGEST_BYTES,
    NORM_TOLERANCE,
    SHARD_NAME,
    CacheError,
    Digests,
    Header,
    Rows,
    Segment,
    checksum,
    lock,
    read_shard,
)

_JOURNAL = re.compile(r"journal-(\d{5,})-(\d{5,})")


def read_segments(
    directory: Path, header: Header, *, before_epoch: int | None = None
) -> list[Segment]:
    """All rows of a cache, shards first, in an order that depends on the names alone.

    Args:
        directory: The cache.
        header: Its header, which every shard must state as well.
        before_epoch: Leave out the journals of this epoch and later ones; none = take all.

    Raises:
        CacheError: A file is damaged, or belongs to another cache.
    """
    shards: list[tuple[int, Path]] = []
    journals: list[tuple[int, int, Path]] = []
    for path in directory.iterdir():
        if found := SHARD_NAME.fullmatch(path.name):
            shards.append((int(found[1]), path))
        elif found := _JOURNAL.fullmatch(path.name):
            journals.append((int(found[1]), int(found[2]), path))
    segments = [read_shard(path, number, header) for number, path in sorted(shards)]
    for when, _, path in sorted(journals):
        if before_epoch is None or when < before_epoch:
            segments.extend(_read_journal(path, header.dim))
    return segments


def verify_segment(segment: Segment) -> None:
    """Reads a file whole.

    Raises:
        CacheError: It has changed since it was written, or a row is no unit vector.
    """
    if segment.number is not None:
        got = checksum(segment.keys, segment.embeds)
        if got != segment.sha256:
            raise CacheError(
                f"{segment.path}: sha256 is {got}, expected {segment.sha256}; the file is damaged: "
                "delete it and build again (its texts alone are encoded anew)"
            )
    else:
        _verify_journal(segment)
    for start in range(0, len(segment.embeds), 4096):
        norms = np.linalg.norm(segment.embeds[start : start + 4096].astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))
        if len(wrong):
            raise CacheError(
                f"{segment.path}: row {start + wrong[0]} has norm {norms[wrong[0]]}, expected 1; "
                "delete the file and build again"
            )


class Journal:
    """Rows that one process adds while others add theirs elsewhere.

    Args:
        path: The file, made if absent; what a killed process left torn is cut off.
        dim: Width of a row.

    Raises:
        CacheError: Another process is writing it.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        """The file."""
        self._type = _record_type(dim)
        self._handle = path.open("ab")
        lock(self._handle, path)
        self.rows: dict[bytes, int] = {}
        """Key to number of the row."""
        for segment in _read_journal(path, dim):
            verify_segment(segment)
            self.rows = {key.tobytes(): row for row, key in enumerate(segment.keys)}
        self._handle.truncate(len(self.rows) * self._type.itemsize)

    def append(self, keys: Digests, rows: Rows) -> None:
        """Adds a frame: after a kill all of it is there, or nothing."""
        records = np.zeros(len(keys), self._type)
        records["key"], records["embed"] = keys, rows
        records["left"] = np.arange(len(keys))[::-1]
        records["crc"] = _crcs(records)
        self._handle.write(records.tobytes())
        self._handle.flush()
        for key in keys:
            self.rows[key.tobytes()] = len(self.rows)

    def read(self, rows: Sequence[int]) -> Rows:
        """Rows by number, `[n, dim]`."""
        records = np.memmap(self.path, self._type, "r", shape=(len(self.rows),))
        return np.asarray(records["embed"][list(rows)])

    def close(self) -> None:
        """Lets others have the file."""
        self._handle.close()


def journal_path(directory: Path, epoch: int, rank: int) -> Path:
    """Where a rank of a training run adds rows in an epoch."""
    return directory / f"journal-{epoch:05d}-{rank:05d}"


def _record_type(dim: int) -> np.dtype[Any]:
    """A journal's record; `left` counts down to 0 at the end of a frame."""
    fields = [("key", "u1", (DIGEST_BYTES,)), ("embed", "<f2", (dim,)), ("left", "<u4")]
    return np.dtype([*fields, ("crc", "<u4")])


def _crcs(records: npt.NDArray[Any]) -> list[int]:
    return [zlib.crc32(record.tobytes()[:-4]) for record in records]


def _read_journal(path: Path, dim: int) -> list[Segment]:
    """The whole frames of a journal; nothing where there is none."""
    kind = _record_type(dim)
    count = path.stat().st_size // kind.itemsize
    if not count:
        return []
    records = np.memmap(path, kind, "r", shape=(count,))
    ends = np.flatnonzero(records["left"] == 0)
    if not len(ends):
        return []
    whole = records[: ends[-1] + 1]
    return [Segment(path, whole["key"], whole["embed"])]


def _verify_journal(segment: Segment) -> None:
    kind = _record_type(segment.embeds.shape[1])
    records = np.memmap(segment.path, kind, "r", shape=(len(segment.keys),))
    for row in range(len(segment.keys)):
        if _crcs(records[row : row + 1]) != [records["crc"][row]]:
            raise CacheError(
                f"{segment.path}: row {row} differs from its checksum; the file is damaged: delete "
                "it (its texts are encoded anew)"
            )
