"""A folder of bounded size for what was fetched, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDERS = 256
_LOOKED_AT = 4096  # files among which the oldest are found; below that many all are
_FILLED = 7 / 8  # share of the bound that is left filled when room is made
_CHECK_BYTES = 4


@dataclass(frozen=True)
class RangeCache:
    """Ranges of remote files in a folder; those that were not asked for longest go first.

    Each is a file that appears whole and ends with a checksum. Room is reserved before anything is
    written, under a lock that all processes share, by a file of the full length without content:
    who counts the folder sees what others are about to write, and the bound holds at every moment.
    What a killed process has reserved in vain goes like a range that nobody asks for.
    """

    folder: Path
    limit_bytes: int

    def place(self, key: str) -> Path:
        """Where a range lies, or would."""
        return self.folder / "ranges" / key[:2] / key

    def read(self, key: str, size: int) -> bytes | None:
        """A range as it was written. None: it is not there, or damaged.

        Args:
            key: Its name, 64 hexadecimal digits.
            size: Number of bytes.
        """
        path = self.place(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with suppress(OSError):  # where nobody may write it serves as well
            os.utime(path)
        body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        return body if len(body) == size and _checksum(body) == check else None

    def write(self, key: str, data: bytes) -> None:
        """Keep a range, if there is room; what goes wrong is logged, and costs another fetch.

        Args:
            key: See :meth:`read`.
            data: The bytes.
        """
        path, size = self.place(key), len(data) + _CHECK_BYTES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if size <= self.limit_bytes * _FILLED and (partial := self._reserve(path.parent, size)):
                with open(partial, "r+b") as file:
                    file.write(data)
                    file.write(_checksum(data))
                os.replace(partial, path)
        except FileNotFoundError as error:  # others needed the room
            logger.debug("%s: gone before it was written (%s)", path, error)
        except OSError as error:
            logger.warning("%s: nothing can be kept there (%s)", self.folder, error)

    def _reserve(self, folder: Path, size: int) -> str | None:
        """Make a file of a size, and room for it; say where it lies."""
        handle = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # some network file systems lock nothing
                fcntl.flock(handle, fcntl.LOCK_EX)
            known = os.pread(handle, 8, 0)
            used = int.from_bytes(known)
            if not known or used + size > self.limit_bytes:
                used = sum(count for n in range(_FOLDERS) for _, count, _ in self._files(n))
            if used + size > self.limit_bytes:
                used -= self._evict(used + size - self.limit_bytes * _FILLED)
            fits = used + size <= self.limit_bytes
            os.pwrite(handle, (used + size * fits).to_bytes(8), 0)
            if not fits:
                return None
            with tempfile.NamedTemporaryFile(prefix=".", dir=folder, delete=False) as file:
                file.truncate(size)
                return file.name
        finally:
            os.close(handle)

    def _evict(self, wanted: float) -> int:
        """Free some bytes, the oldest quarter of some thousand files at a time; say how many."""
        freed, left = 0, random.sample(range(_FOLDERS), _FOLDERS)
        while left and freed < wanted:
            seen: list[tuple[int, int, str]] = []
            while left and len(seen) < _LOOKED_AT:
                seen += self._files(left.pop())
            for _, count, path in sorted(seen)[: len(seen) // 4 + 1 if left else None]:
                if freed < wanted:
                    with suppress(OSError):
                        os.unlink(path)
                        freed += count
        return freed

    def _files(self, number: int) -> Iterator[tuple[int, int, str]]:
        """Date of last use, size and path of each file in one of the folders."""
        folder = self.folder / "ranges" / f"{number:02x}"
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    stat = entry.stat()
                    yield stat.st_mtime_ns, stat.st_size, entry.path


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECK_BYTES)
