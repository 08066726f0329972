"""Rows that a training run adds to an embedding cache, in the layout of :mod:`embedding_shards`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm2clip_vlm.data.embedding_shards import (
    DIGEST_BYTES,
    Digests,
    Header,
    Rows,
    content_of,
    lock,
    read_rows,
)


class Journal:
    """Rows that one process adds while others add theirs elsewhere.

    Args:
        directory: The cache.
        epoch: Of the training run.
        rank: Of this process in it.
        header: The cache's.

    Raises:
        CacheError: Another process is writing it, or it is damaged.
    """

    def __init__(self, directory: Path, epoch: int, rank: int, header: Header) -> None:
        self.path = directory / f"journal-{epoch:05d}-{rank:05d}"
        """The file; what a killed process left torn at its end is cut off."""
        self.places: dict[bytes, int] = {}
        """Key to the first byte of its row."""
        self._header = header
        self._handle = self.path.open("ab")
        lock(self._handle, self.path)
        end = 0
        for segment in read_rows(self.path, header, None):
            segment.verify()
            end = segment.end
            self._note(segment.keys, end)
        self._handle.truncate(end)

    def append(self, keys: Digests, rows: Rows) -> None:
        """Adds rows: after a kill all of them are there, or none."""
        self._handle.write(content_of(self._header, keys, rows))
        self._handle.flush()
        self._note(keys, self._handle.tell())

    def read(self, keys: Sequence[bytes]) -> Rows:
        """Rows by key, `[n, dim]`."""
        raw = np.memmap(self.path, np.uint8, "r").data
        size = 2 * self._header.dim
        joined = b"".join([raw[self.places[key] : self.places[key] + size] for key in keys])
        return np.frombuffer(joined, np.float16).reshape(-1, self._header.dim)

    def close(self) -> None:
        """Lets others have the file."""
        self._handle.close()

    def _note(self, keys: Digests, end: int) -> None:
        size = 2 * self._header.dim
        start = end - len(keys) * (DIGEST_BYTES + size)
        self.places.update((key.tobytes(), start + i * size) for i, key in enumerate(keys))
