"""The files of an embedding cache, and what must hold of them before a row is believed.

    header.json                one for ever: version, dtype, dim, fingerprint of the encoder
    shard-00007.safetensors    `embeds` float16 [rows, dim], unit norm; `keys` uint8 [rows, 32];
                               metadata: the same header again and the SHA-256 of both tensors
    journal-00002-00005        what rank 5 of a training run added in its epoch 2: such files one
                               behind the other, each with the rows that were encoded together

A shard appears whole or not at all (written beside, then renamed) and says itself what it is, so
any number of processes may write into one directory, and one that is killed leaves nothing to
repair. A journal's torn end counts as never written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError
from safetensors.numpy import save
from torch import Tensor, float32, isfinite

HEADER_NAME = "header.json"
"""File that makes a directory a cache."""
DIGEST_BYTES = 32
"""Bytes of a key."""

_NORM_TOLERANCE = 1e-2  # float16 moves the norm of a unit vector by less than 1e-3
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
_JOURNAL = re.compile(r"journal-\d{5,}-\d{5,}")
_HEADER_BYTES = 2**16
_METADATA = "embedding_cache"  # one key only: safetensors writes several in any order
_TWO = "embeddings of two encoders never share a cache: choose another directory or delete this one"

_READ: set[tuple[str, int, str, int, int]] = set()  # found to be as written, by this process

Digests = npt.NDArray[np.uint8]
"""Keys of rows, `[rows, 32]`."""
Rows = npt.NDArray[np.float16]
"""Embeddings, `[rows, dim]`."""


class CacheError(ValueError):
    """A cache directory cannot be used, or does not hold what was asked for."""


class Header(BaseModel, frozen=True, strict=True, extra="forbid"):
    """What all embeddings of a cache have in common."""

    version: Literal[3] = 3
    """Of the layout."""
    dtype: Literal["float16"] = "float16"
    """Of the rows."""
    dim: int = Field(ge=1)
    """Width of an embedding."""
    fingerprint: dict[str, str]
    """What made them: weights, tokenizer, instruction, pooling, maximal length, ..."""
    sha256: str = Field(default="", exclude=True)
    """Of a shard's rows and keys; empty = the cache's own header."""

    @classmethod
    def parse(cls, path: Path, content: str | bytes) -> Self:
        """Reads what a file says of itself.

        Raises:
            CacheError: It is damaged, or of another version; names the field.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "no header of an embedding cache"
            raise CacheError(
                f"{path}: {field}: {first['msg']}, got {first['input']!r:.80}; delete the "
                "directory and build again"
            ) from error

    def written(self, **more: str) -> str:
        """As JSON, the same for equal headers."""
        return json.dumps(self.model_dump() | more, indent=2, sort_keys=True)

    def require(self, where: Path, fingerprint: Mapping[str, str], dim: int | None = None) -> None:
        """Refuses embeddings of another encoder, or of another width.

        Raises:
            CacheError: Names the first field that differs.
        """
        for name in sorted({*self.fingerprint, *fingerprint}):
            got, expected = self.fingerprint.get(name), fingerprint.get(name)
            if got != expected:
                raise CacheError(
                    f"{where}: fingerprint.{name} is {got!r}, expected {expected!r}; {_TWO}"
                )
        if dim not in (None, self.dim):
            raise CacheError(f"{where}: dim is {self.dim}, expected {dim}; {_TWO}")


@dataclass(frozen=True)
class Segment:
    """Rows that were written together, left on disk."""

    path: Path
    """The shard or journal."""
    keys: Digests
    """`[rows, 32]`."""
    embeds: Rows
    """`[rows, dim]`."""
    number: int | None
    """A shard's number; none = of a journal."""
    sha256: str
    """The checksum that is stated."""
    end: int
    """Byte of the file behind it."""

    def touch(self) -> None:
        """Reads all of it where this process has not done so.

        Raises:
            CacheError: It has changed since it was written.
        """
        stat = self.path.stat()
        read = (str(self.path), self.end, self.sha256, stat.st_ino, stat.st_mtime_ns)
        if read in _READ:
            return
        if (got := _checksum(self.keys, self.embeds)) != self.sha256:
            raise CacheError(
                f"{self.path}: sha256 is {got}, expected {self.sha256}; the file is damaged: "
                "delete it and build again (its texts alone are encoded anew)"
            )
        _READ.add(read)

    def verify(self) -> None:
        """Reads all of it, again too.

        Raises:
            CacheError: It has changed since it was written, or a row is no unit vector.
        """
        _READ.clear()
        self.touch()
        for start in range(0, len(self.embeds), 4096):
            norms = np.linalg.norm(self.embeds[start : start + 4096].astype(np.float32), axis=1)
            wrong = np.flatnonzero(~(np.abs(norms - 1) < _NORM_TOLERANCE))
            if len(wrong):
                raise CacheError(
                    f"{self.path}: row {start + wrong[0]} has norm {norms[wrong[0]]}, expected 1; "
                    "delete the file and build again"
                )


def text_digest(text: str, prompt: str = "") -> bytes:
    """SHA-256 of a text's UTF-8 bytes, behind its prompt's own where it has one: a row's key."""
    start = hashlib.sha256(prompt.encode()).digest() if prompt else b""
    return hashlib.sha256(start + text.encode()).digest()


def digests_of(texts: Sequence[str], prompt: str = "") -> Digests:
    """Keys of several texts, `[n, 32]`."""
    flat = b"".join([text_digest(text, prompt) for text in texts])
    return np.frombuffer(flat, np.uint8).reshape(-1, DIGEST_BYTES)


def unit_rows(embeds: Tensor, names: Sequence[str], dim: int | None) -> Rows:
    """Embeddings as they are stored.

    Args:
        embeds: `[n, dim]`, any float type, any device.
        names: What each row belongs to, for the message.
        dim: Width that they must have; none = any.

    Raises:
        CacheError: Another shape, or rows that are not finite or zero, with one of their names.
    """
    if embeds.ndim != 2 or len(embeds) != len(names) or dim not in (None, embeds.shape[1]):
        raise CacheError(
            f"the text encoder returned {tuple(embeds.shape)}, expected ({len(names)}, "
            f"{dim or 'dim'}) for {len(names)} texts such as {names[0][:100]!r}"
        )
    rows = embeds.detach().to("cpu", float32)
    norms = rows.norm(dim=1, keepdim=True)
    broken = (~isfinite(norms) | (norms == 0)).flatten().nonzero().flatten().tolist()
    if broken:
        raise CacheError(
            f"{len(broken)} of {len(names)} embeddings are not finite or zero, such as that of "
            f"{names[broken[0]][:100]!r}; check the text encoder's weights and dtype"
        )
    result: Rows = (rows / norms).half().numpy()
    return result


def require_unit(rows: Tensor, texts: Sequence[str], where: Path) -> Tensor:
    """Refuses rows that no encoder of ours has written, before anything learns from them.

    Args:
        rows: float32 `[n, dim]`, and returned.
        texts: What they belong to.
        where: The cache.

    Raises:
        CacheError: A row is not finite or no unit vector; the text is named.
    """
    off = ~((rows.norm(dim=1) - 1).abs() < _NORM_TOLERANCE)
    if off.any():
        row = int(off.nonzero()[0])
        raise CacheError(
            f"{where}: the embedding of {texts[row][:100]!r} has norm {float(rows[row].norm())}, "
            "expected 1; find the file with `llm2clip-vlm embed verify`, delete it, build again"
        )
    return rows


def read_header(directory: Path) -> Header | None:
    """The header of a cache directory; none where there is none.

    Raises:
        CacheError: It is damaged, or of another version.
    """
    path = directory / HEADER_NAME
    return Header.parse(path, path.read_bytes()) if path.is_file() else None


def cache_names(directory: Path) -> list[str]:
    """Names of the files in a directory that are a cache's; none where it is no cache.

    Raises:
        CacheError: Its header is damaged.
    """
    if read_header(directory) is None:
        return []
    names = [path.name for path in directory.iterdir()]
    own = (_SHARD, _JOURNAL)
    return [name for name in names if name == HEADER_NAME or any(p.fullmatch(name) for p in own)]


def journal_files(directory: Path) -> list[Path]:
    """The journals of a cache, by their name."""
    return sorted(path for path in directory.iterdir() if _JOURNAL.fullmatch(path.name))


def write_header(directory: Path, header: Header) -> None:
    """Makes a directory a cache, or checks that it is the same one."""
    existing = read_header(directory)
    if existing is None:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{HEADER_NAME}.tmp"
        with temporary.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # several writers start at once: one writes
            existing = read_header(directory)
            if existing is None:
                _fill(handle, (header.written() + "\n").encode())
                temporary.replace(directory / HEADER_NAME)
        temporary.unlink(missing_ok=True)
    (existing or header).require(directory, header.fingerprint, header.dim)


def write_shard(directory: Path, number: int, header: Header, keys: Digests, rows: Rows) -> None:
    """Writes a shard: all of it, or nothing, and an error where another process is at it."""
    path = directory / f"shard-{number:05d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("ab") as handle:
        lock(handle, temporary)
        _fill(handle, content_of(header, keys, rows))
        temporary.replace(path)


def read_segments(
    directory: Path, header: Header, *, before_epoch: int | None = None
) -> list[Segment]:
    """All rows of a cache, shards first, in an order that depends on the names alone.

    Args:
        directory: The cache.
        header: Its header, which every file must state as well.
        before_epoch: Leave out the journals of this epoch and later ones; none = take all.

    Raises:
        CacheError: A file is damaged, or belongs to another cache.
    """
    segments: list[Segment] = []
    paths = list(directory.iterdir())
    shards = [(int(found[1]), path) for path in paths if (found := _SHARD.fullmatch(path.name))]
    for number, path in sorted(shards):
        whole = read_rows(path, header, number)
        if len(whole) != 1 or whole[0].end != path.stat().st_size:
            raise CacheError(
                f"{path}: cannot be read (cut short or damaged); delete it, build again"
            )
        segments += whole
    for path in journal_files(directory):
        if before_epoch is None or int(path.name.split("-")[1]) < before_epoch:
            segments += read_rows(path, header, None)
    return segments


def lock(handle: IO[bytes], path: Path) -> None:
    """Holds a file until it is closed, or the process ends in whatever way.

    Raises:
        CacheError: Another process does.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino
    except BlockingIOError:
        same = False
    if not same:
        handle.close()
        raise CacheError(
            f"{path}: another process is writing it; let it finish, or give every writer a slice "
            "or a directory of its own"
        )


def content_of(header: Header, keys: Digests, rows: Rows) -> bytes:
    """What a file holds of rows that were written together."""
    stated = {_METADATA: header.written(sha256=_checksum(keys, rows))}
    return save({"embeds": rows, "keys": np.ascontiguousarray(keys)}, metadata=stated)


def read_rows(path: Path, header: Header, number: int | None) -> list[Segment]:
    """What :func:`content_of` made, once or several times, up to where it is cut."""
    try:
        raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error}); delete it, build again") from error
    segments: list[Segment] = []
    at = 0
    while at + 8 <= len(raw):
        start = at + 8 + int.from_bytes(raw[at : at + 8].tobytes(), "little")
        if start > len(raw):
            _refuse_unless_torn(path, raw[at + 8 :], start - at - 8)
            break
        try:
            layout = json.loads(raw[at + 8 : start].tobytes())
            stated = layout.pop("__metadata__")[_METADATA]
            rows = int(layout["embeds"]["shape"][0])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"{path}: no header of an embedding cache ({error!r}); delete it, build again"
            ) from error
        own = Header.parse(path, stated)
        own.require(path, header.fingerprint, header.dim)
        middle = 2 * rows * header.dim
        end = middle + rows * DIGEST_BYTES
        expected = {
            "embeds": {"dtype": "F16", "shape": [rows, header.dim], "data_offsets": [0, middle]},
            "keys": {"dtype": "U8", "shape": [rows, DIGEST_BYTES], "data_offsets": [middle, end]},
        }
        if layout != expected or rows < 1:
            raise CacheError(f"{path}: holds {layout}, expected {expected}; delete it, build again")
        at = start + end
        if at > len(raw):
            break
        keys = raw[start + middle : at].reshape(rows, DIGEST_BYTES)
        embeds = raw[start : start + middle].view(np.float16).reshape(rows, header.dim)
        segments.append(Segment(path, keys, embeds, number, own.sha256, at))
    return segments


def _refuse_unless_torn(path: Path, tail: npt.NDArray[np.uint8], stated: int) -> None:
    """Takes the end of a file for a write that was cut off only where it can be one.

    Raises:
        CacheError: The header is whole, so that its stated length was damaged, or is none of ours.
    """
    text = tail[:_HEADER_BYTES].tobytes().decode("latin-1")
    ours = f'{{"__metadata__":{{"{_METADATA}":'
    torn = text[: len(ours)] == ours[: len(text)]
    with suppress(ValueError):  # of a header that is cut
        _, end = json.JSONDecoder().raw_decode(text)
        torn = torn and stated == -(-end // 8) * 8
    if not torn:
        raise CacheError(
            f"{path}: cannot be read (damaged, or no file of an embedding cache); delete it, "
            "build again"
        )


def _checksum(keys: Digests, rows: Rows) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    digest.update(np.ascontiguousarray(keys).data)
    return digest.hexdigest()


def _fill(handle: IO[bytes], content: bytes) -> None:
    handle.truncate(0)
    handle.write(content)
    handle.flush()
    os.fsync(handle.fileno())
