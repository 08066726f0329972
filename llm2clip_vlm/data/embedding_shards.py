"""The files of an embedding cache, and what must hold of them before a row is believed.

    header.json                one for ever: schema, dtype, dim, and the fingerprint of the encoder
    shard-00007.safetensors    `embeds` float16 [rows, dim], unit norm; `keys` uint8 [rows, 32];
                               metadata: the same header again and the SHA-256 of both tensors
    journal-00002-00005        rows that rank 5 of a training run added in its epoch 2

A shard appears whole or not at all (written beside, then renamed) and says itself what it is, so
any number of processes may write into one directory, and one that is killed leaves nothing to
repair. A journal grows by whole frames; a torn last frame counts as never written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

SCHEMA = 2
"""Version of the layout."""
HEADER_NAME = "header.json"
"""File that makes a directory a cache."""
DIGEST_BYTES = 32
"""Bytes of a key."""
NORM_TOLERANCE = 1e-2
"""float16 moves the norm of a unit vector by less than 1e-3."""
SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")
"""A shard and its number."""

_METADATA = "embedding_cache"  # one key only: safetensors writes several in any order

Digests = npt.NDArray[np.uint8]
"""Keys of rows, `[rows, 32]`."""
Rows = npt.NDArray[np.float16]
"""Embeddings, `[rows, dim]`."""


class CacheError(ValueError):
    """A cache directory cannot be used, or does not hold what was asked for."""


@dataclass(frozen=True)
class Header:
    """What all embeddings of a cache have in common."""

    dim: int
    """Width of an embedding."""
    fingerprint: Mapping[str, str]
    """What made them: weights, tokenizer, instruction, pooling, maximal length, ..."""

    def to_plain(self) -> dict[str, Any]:
        """As it is written, the same for equal headers."""
        fields = dict(sorted(self.fingerprint.items()))
        return {"schema": SCHEMA, "dtype": "float16", "dim": self.dim, "fingerprint": fields}

    def require(self, where: Path, expected: Header) -> None:
        """Refuses a header that says something else.

        Raises:
            CacheError: Names the first field that differs.
        """
        require_fingerprint(where, self.fingerprint, expected.fingerprint)
        if self.dim != expected.dim:
            raise CacheError(f"{where}: dim is {self.dim}, expected {expected.dim}; {_TWO}")


_TWO = "embeddings of two encoders never share a cache: choose another directory or delete this one"


@dataclass(frozen=True)
class Segment:
    """Rows of one file, left on disk."""

    path: Path
    """The shard or journal."""
    keys: Digests
    """`[rows, 32]`."""
    embeds: Rows
    """`[rows, dim]`."""
    number: int | None = None
    """A shard's number; none = a journal."""
    sha256: str = ""
    """A shard's checksum as it is stated."""


def text_digest(text: str, prompt: str = "") -> bytes:
    """SHA-256 of a text's UTF-8 bytes, behind its prompt's own where it has one: a row's key."""
    start = hashlib.sha256(prompt.encode()).digest() if prompt else b""
    return hashlib.sha256(start + text.encode()).digest()


def digests_of(texts: Sequence[str], prompt: str = "") -> Digests:
    """Keys of several texts, `[n, 32]`."""
    flat = b"".join(text_digest(text, prompt) for text in texts)
    return np.frombuffer(flat, np.uint8).reshape(-1, DIGEST_BYTES)


def require_fingerprint(where: Path, got: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuses embeddings of another encoder.

    Raises:
        CacheError: Names the first field that differs.
    """
    for field in sorted({*got, *expected}):
        if got.get(field) != expected.get(field):
            raise CacheError(
                f"{where}: fingerprint.{field} is {got.get(field)!r}, expected "
                f"{expected.get(field)!r}; {_TWO}"
            )


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
    rows = embeds.detach().to("cpu", torch.float32)
    norms = rows.norm(dim=1, keepdim=True)
    broken = (~torch.isfinite(norms) | (norms == 0)).flatten().nonzero().flatten().tolist()
    if broken:
        raise CacheError(
            f"{len(broken)} of {len(names)} embeddings are not finite or zero, such as that of "
            f"{names[broken[0]][:100]!r}; check the text encoder's weights and dtype"
        )
    return (rows / norms).to(torch.float16).numpy()


def require_unit(rows: Tensor, texts: Sequence[str], where: Path) -> Tensor:
    """Refuses rows that no encoder of ours has written, before anything learns from them.

    Args:
        rows: float32 `[n, dim]`.
        texts: What they belong to.
        where: The cache.

    Returns:
        The same rows.

    Raises:
        CacheError: A row is not finite or no unit vector; the text is named.
    """
    off = ~((rows.norm(dim=1) - 1).abs() < NORM_TOLERANCE)
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
    if not path.is_file():
        return None
    return _parse_header(path, path.read_bytes())[0]


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
                content = json.dumps(header.to_plain(), indent=2) + "\n"
                _fill(handle, content.encode())
                temporary.replace(directory / HEADER_NAME)
        temporary.unlink(missing_ok=True)
    (existing or header).require(directory, header)


def write_shard(directory: Path, number: int, header: Header, keys: Digests, rows: Rows) -> None:
    """Writes a shard: all of it, or nothing."""
    sha256 = checksum(keys, rows)
    stated = json.dumps({**header.to_plain(), "sha256": sha256}, sort_keys=True)
    tensors = {"embeds": rows, "keys": np.ascontiguousarray(keys)}
    path = directory / f"shard-{number:05d}.safetensors"
    write_whole(path, save(tensors, metadata={_METADATA: stated}))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it.

    Raises:
        CacheError: Another process is at it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("ab") as handle:
        lock(handle, temporary)
        _fill(handle, content)
        temporary.replace(path)


def read_shard(path: Path, number: int, header: Header) -> Segment:
    """A shard's rows, left on disk.

    Args:
        path: The file.
        number: Its number.
        header: What it must state about itself.

    Raises:
        CacheError: It is damaged, or belongs to another cache.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            stated = (file.metadata() or {}).get(_METADATA, "")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        with path.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            layout = json.loads(handle.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); delete it, build again") from error
    own, plain = _parse_header(path, stated.encode())
    own.require(path, header)
    rows = shapes.get("embeds", ("", (0,)))[1][0]
    expected = {"embeds": ("F16", (rows, header.dim)), "keys": ("U8", (rows, DIGEST_BYTES))}
    if shapes != expected or not rows:
        raise CacheError(f"{path}: holds {shapes}, expected {expected}; delete it, build again")

    def array(name: str, dtype: type) -> Any:
        offset = start + layout[name]["data_offsets"][0]
        return np.memmap(path, dtype, "r", offset, expected[name][1])

    keys, embeds = array("keys", np.uint8), array("embeds", np.float16)
    return Segment(path, keys, embeds, number, str(plain.get("sha256")))


def _parse_header(path: Path, content: bytes) -> tuple[Header, dict[str, Any]]:
    try:
        plain = json.loads(content)
    except ValueError as error:
        raise CacheError(
            f"{path}: no header of an embedding cache ({error}); delete the directory, build again"
        ) from error
    for field, expected in (("schema", SCHEMA), ("dtype", "float16")):
        got = plain.get(field) if isinstance(plain, dict) else type(plain).__name__
        if got != expected:
            raise CacheError(
                f"{path}: {field} is {got!r}, expected {expected!r}; delete the directory and run "
                "stage 2a again"
            )
    dim, fields = plain.get("dim"), plain.get("fingerprint")
    if type(dim) is not int or dim < 1:
        raise CacheError(f"{path}: dim is {dim!r}, expected a number; delete the directory")
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise CacheError(f"{path}: fingerprint is {fields!r}, expected texts; delete the directory")
    return Header(dim, fields), plain


def checksum(keys: Digests, rows: Rows) -> str:
    """SHA-256 of a shard's rows and keys."""
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    digest.update(np.ascontiguousarray(keys).data)
    return digest.hexdigest()


def _fill(handle: IO[bytes], content: bytes) -> None:
    handle.truncate(0)
    handle.write(content)
    handle.flush()
    os.fsync(handle.fileno())


def lock(handle: IO[bytes], path: Path) -> None:
    """Holds a file until it is closed, or the process ends in whatever way."""
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
