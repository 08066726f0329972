"""Remote files, read by range through a folder of what was fetched before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fsspec.spec import AbstractBufferedFile

from llm2clip_vlm.remote import addresses
from llm2clip_vlm.remote.range_cache import RangeCache

_STREAM_BYTES = 4 * 2**20  # read at once where a file is read through


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read by range; it takes a path's place where files are read.

    Example:
        `RemoteFile(look_up("s3://bucket/00000.tar")[0], RangeCache(folder, 2**30)).read(512, 99)`
    """

    state: addresses.FileState
    """Address, size, and what its contents are recognised by."""
    cache: RangeCache
    """Where its ranges are kept."""

    def __str__(self) -> str:
        return self.state.address

    _path = property(lambda self: PurePosixPath(self.state.address))
    name = property(lambda self: self._path.name)
    """Its last part."""
    stem = property(lambda self: self._path.stem)
    """Its name without the ending."""
    suffix = property(lambda self: self._path.suffix)
    """The ending."""
    suffixes = property(lambda self: self._path.suffixes)
    """All endings."""

    @property
    def parent(self) -> Path:
        """Folder on this machine for what is made of this file."""
        return self.cache.folder / "tables" / hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def stat(self) -> addresses.FileState:
        """Its size, and what it is recognised by; nothing is asked."""
        return self.state

    def open(self, mode: str = "rb", *, keep: bool = False) -> IO[bytes]:
        """Open it for reading from one end to the other; long distances are skipped unread.

        Args:
            mode: `rb`.
            keep: Look for what is read in the cache, and leave it there.
        """
        assert mode == "rb", mode
        return _Stream(self, keep)

    def read(self, start: int, size: int) -> bytes:
        """Bytes from the cache, or fetched and left there.

        Args:
            start: The first.
            size: How many.

        Raises:
            RemoteError: See :meth:`fetch`.
        """
        key = self._key(start, size)
        if (data := self.cache.read(key, size)) is None:
            data = self.fetch(start, size)
            self.cache.write(key, data)
        return data

    def is_kept(self, start: int, size: int) -> bool:
        """Whether a range lies in the cache."""
        return self.cache.place(self._key(start, size)).is_file()

    def fetch(self, start: int, size: int) -> bytes:
        """Bytes from the service.

        Args:
            start: The first.
            size: How many.

        Raises:
            RemoteError: They cannot be had after all attempts, or the file is another by now.
        """

        def once() -> bytes:
            # What every file of fsspec defines: `read` moves a position, which threads would share.
            data: bytes = _opened(os.getpid(), self.state)._fetch_range(start, start + size)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        where = f"{self}: bytes {start} to {start + size - 1}"
        return addresses.tried(where, once) if size else b""

    def _key(self, start: int, size: int) -> str:
        return hashlib.sha256(repr((*self.state, start, size)).encode()).hexdigest()


File = Path | RemoteFile
"""A data file, here or elsewhere."""


class _Stream(AbstractBufferedFile):
    def __init__(self, file: RemoteFile, keep: bool) -> None:
        self._read = file.read if keep else file.fetch
        super().__init__(None, str(file), block_size=_STREAM_BYTES, size=file.state.st_size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._read(start, end - start)


def fetch_ahead(ranges: Iterable[tuple[File, int, int]]) -> None:
    """Fetch several ranges beside each other into the cache.

    Args:
        ranges: File, first byte and number of bytes of each; files of this machine have no part.

    Raises:
        RemoteError: See :meth:`RemoteFile.fetch`; what waits is not asked for any more.
    """
    with ThreadPoolExecutor(addresses.AT_ONCE) as pool:
        fetched = [
            pool.submit(file.read, start, size)
            for file, start, size in ranges
            if isinstance(file, RemoteFile) and not file.is_kept(start, size)
        ]
        try:
            for one in fetched:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2048)
def _opened(_process: int, state: addresses.FileState) -> Any:
    """A file as its service reads it; it refuses to read other contents than those of `state`."""
    address, size, tag = state
    opened = partial(addresses.file_system(address).open, address, "rb", cache_type="none")
    if address.startswith("http"):
        # `W/` marks what may stand for several contents: servers compare no such tag
        name = "If-Match" if tag.startswith('"') else "If-Unmodified-Since"
        headers = {name: tag} if tag and not tag.startswith("W/") else {}
        return opened(size=size, headers=headers)
    file = opened()
    if (file.size, addresses.tag_of(file.details)) != (size, tag):
        raise addresses.RemoteError(f"{address}: {addresses.CHANGED}")
    return file
