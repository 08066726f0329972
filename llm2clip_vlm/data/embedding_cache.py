"""Text embeddings on disk, found by the text itself.

Layout of a cache directory::

    header.json          schema, dim, dtype, fingerprint, rows, shards with their checksums
    shard-00000.npy      float16 [rows, dim], unit-norm
    keys-00000.npy       uint8 [rows, 32], SHA-256 of each text's UTF-8 bytes

A row is looked up by the digest of its text, never by its position in some file, so captions may
be reordered, filtered, repeated and shared between data sets. The header is the truth: it is
written after each shard, in one step, and a shard that it does not name does not exist.

Paper: LLM2CLIP v6 table A4 (offline text features). The released code stores float32 rows beside
the image shards, aligned by order alone (`extract_embedding.py`, `training/data.py:522-549`).
float16 changes the cosine by less than 4e-6.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the layout."""
HEADER_NAME = "header.json"
"""File that makes a directory a cache."""
DEFAULT_SHARD_ROWS = 16384
"""Rows of a shard: what an interruption loses at most."""

_DIGEST_BYTES = 32
_KEY = f"S{_DIGEST_BYTES}"  # compares all 32 bytes: numpy pads with zeros, and all are as long


class CacheError(ValueError):
    """A cache directory cannot be used, or does not hold what was asked for."""


class MissingTextError(CacheError):
    """Texts were looked up that the cache does not hold."""


def text_digest(text: str) -> bytes:
    """SHA-256 of a text's UTF-8 bytes: the key of its embedding."""
    return hashlib.sha256(text.encode("utf-8")).digest()


class EmbeddingCache:
    """A read-only view of a cache directory; the rows stay on disk, memory-mapped.

    Make one with :meth:`build` or :meth:`open`.

    Example:
        >>> cache = EmbeddingCache.build(folder, ["a red star"], encode, {"pooling": "mean"})
        >>> cache["a red star"].shape
        torch.Size([64])
    """

    def __init__(self, directory: Path, header: Mapping[str, Any]) -> None:
        self.directory = directory
        """Where the cache lies."""
        self.dim: int = header["dim"]
        """Width of an embedding."""
        self.fingerprint: dict[str, str] = dict(header["fingerprint"])
        """What made the embeddings: weights, tokenizer, pooling, ... of the text encoder."""
        self._shards: list[dict[str, Any]] = list(header["shards"])
        self._rows: list[npt.NDArray[np.float16]] = []
        keys: list[npt.NDArray[np.uint8]] = []
        for shard in self._shards:
            self._rows.append(
                _load(directory / shard["file"], (shard["rows"], self.dim), np.float16, mmap=True)
            )
            keys.append(_load(directory / shard["keys"], (shard["rows"], _DIGEST_BYTES), np.uint8))
        self._first_rows = np.cumsum([0, *(shard["rows"] for shard in self._shards)])
        flat = _as_keys(np.concatenate(keys) if keys else np.empty((0, _DIGEST_BYTES), np.uint8))
        self._order = np.argsort(flat, kind="stable")
        self._keys = flat[self._order]

    @classmethod
    def open(
        cls, directory: str | Path, fingerprint: Mapping[str, str] | None = None
    ) -> EmbeddingCache:
        """Opens a cache.

        Args:
            directory: Where it lies.
            fingerprint: What the reader expects to have made it; none = anything.

        Raises:
            CacheError: There is no cache, it is damaged, or a fingerprint field differs.
        """
        directory = Path(directory)
        header = _read_header(directory)
        if header is None:
            raise CacheError(
                f"{directory}: no text embedding cache ({HEADER_NAME} is absent); run "
                "stages/stage2a_cache_text.py with this output_dir first"
            )
        if fingerprint is not None:
            _check_fingerprint(directory, header["fingerprint"], fingerprint)
        return cls(directory, header)

    @classmethod
    def build(
        cls,
        directory: str | Path,
        texts: Iterable[str],
        encode: Callable[[list[str]], Tensor],
        fingerprint: Mapping[str, str],
        *,
        shard_rows: int = DEFAULT_SHARD_ROWS,
    ) -> EmbeddingCache:
        """Adds the texts that the cache lacks, and opens it.

        Only one process may build. An interrupted build goes on where the last shard ended, and
        a later build with more texts encodes only those.

        Args:
            directory: Where the cache lies or will lie.
            texts: In any order, with repetitions.
            encode: Texts to embeddings `[len(texts), dim]`; they are normalised here.
            fingerprint: What `encode` is: each field must equal that of what is already there.
            shard_rows: Rows of a new shard.

        Raises:
            CacheError: The directory holds embeddings of something else, or `encode` returns
                another shape, a row that is not finite, or a row of zeros.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        header = _read_header(directory)
        if header is None:
            header = {
                "schema": SCHEMA,
                "dim": None,
                "dtype": "float16",
                "fingerprint": dict(fingerprint),
                "rows": 0,
                "shards": [],
            }
            todo = list(dict.fromkeys(texts))
        else:
            _check_fingerprint(directory, header["fingerprint"], fingerprint)
            todo = cls(directory, header).missing(texts)
        for start in range(0, len(todo), shard_rows):
            part = todo[start : start + shard_rows]
            rows = _checked_rows(encode(part), len(part), header["dim"])
            header["dim"] = rows.shape[1]
            header["shards"].append(_write_shard(directory, len(header["shards"]), part, rows))
            header["rows"] += len(part)
            _write_atomically(
                directory / HEADER_NAME, (json.dumps(header, indent=2) + "\n").encode()
            )
        if not header["shards"]:
            raise CacheError(f"{directory}: no text to embed")
        logger.info("%s: %d rows, %d of them new", directory, header["rows"], len(todo))
        return cls(directory, header)

    def __len__(self) -> int:
        """Number of embeddings."""
        return len(self._keys)

    def __contains__(self, text: object) -> bool:
        """Whether a text's embedding is there."""
        return isinstance(text, str) and self._find([text])[0] >= 0

    def __getitem__(self, text: str) -> Float[Tensor, " dim"]:
        """A text's embedding: float32, unit-norm up to float16's rounding.

        Raises:
            MissingTextError: The cache does not hold it.
        """
        return self.lookup([text])[0]

    def lookup(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """The embeddings of texts, float32, in their order.

        Raises:
            MissingTextError: The cache does not hold all of them.
        """
        found = self._find(texts)
        if (found < 0).any():
            lost = list(dict.fromkeys(texts[int(i)] for i in np.flatnonzero(found < 0)))
            raise MissingTextError(
                f"{len(lost)} text(s) are not among the {len(self)} of {self.directory}, such as "
                f"{lost[0][:200]!r}; add their file to the sources of stage 2a's recipe and run "
                "it again (it encodes only what is missing)"
            )
        rows = np.empty((len(texts), self.dim), dtype=np.float32)
        shards = np.searchsorted(self._first_rows, found, side="right") - 1
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            rows[where] = self._rows[shard][found[where] - self._first_rows[shard]]
        return torch.from_numpy(rows)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The texts that the cache does not hold, each once, in their order."""
        unique = list(dict.fromkeys(texts))
        return [unique[i] for i in np.flatnonzero(self._find(unique) < 0)]

    def verify(self) -> None:
        """Reads every file and compares its checksum with the header's.

        Raises:
            CacheError: A file has changed since it was written.
        """
        for shard in self._shards:
            for name, field in ((shard["file"], "sha256"), (shard["keys"], "keys_sha256")):
                got = _file_sha256(self.directory / name)
                if got != shard[field]:
                    raise CacheError(
                        f"{self.directory / name}: checksum {field} is {got}, expected "
                        f"{shard[field]}; the file is damaged: delete the cache directory and run "
                        "stage 2a again"
                    )

    def _find(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each text over all shards, -1 where there is none."""
        if not len(self._keys) or not len(texts):
            return np.full(len(texts), -1, dtype=np.int64)
        wanted = np.frombuffer(b"".join(map(text_digest, texts)), dtype=_KEY)
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[place] == wanted, self._order[place], -1)


def _as_keys(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    return np.ascontiguousarray(digests).view(_KEY).reshape(-1)


def _read_header(directory: Path) -> dict[str, Any] | None:
    path = directory / HEADER_NAME
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CacheError(f"{path}: no JSON ({error}); delete the directory, rebuild") from error
    for field, expected in (("schema", SCHEMA), ("dtype", "float16")):
        if not isinstance(header, dict) or header.get(field) != expected:
            got = header.get(field) if isinstance(header, dict) else type(header).__name__
            raise CacheError(
                f"{path}: {field} is {got!r}, expected {expected!r}; delete the directory and run "
                "stage 2a again"
            )
    absent = {"dim", "fingerprint", "rows", "shards"} - set(header)
    if absent:
        raise CacheError(f"{path}: no {sorted(absent)}; delete the directory and rebuild")
    return header


def _check_fingerprint(
    directory: Path, got: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    for field in sorted({*got, *expected}):
        if got.get(field) != expected.get(field):
            raise CacheError(
                f"{directory}: fingerprint.{field} is {got.get(field)!r}, expected "
                f"{expected.get(field)!r}; embeddings of two encoders never share a cache: choose "
                "another output_dir or delete this one"
            )


def _checked_rows(embeds: Tensor, count: int, dim: int | None) -> npt.NDArray[np.float16]:
    """Unit-norm float16 rows, or an error that says what the encoder did."""
    if embeds.ndim != 2 or embeds.shape[0] != count or dim not in (None, embeds.shape[1]):
        raise CacheError(
            f"the text encoder returned {tuple(embeds.shape)}, expected ({count}, {dim or 'dim'})"
        )
    rows = embeds.detach().to("cpu", torch.float32)
    norms = rows.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all() or not norms.all():
        broken = int((~torch.isfinite(norms) | (norms == 0)).sum())
        raise CacheError(
            f"{broken} of {count} embeddings are not finite or zero; check the text encoder's "
            "weights and dtype"
        )
    return (rows / norms).to(torch.float16).numpy()


def _write_shard(
    directory: Path, number: int, texts: Sequence[str], rows: npt.NDArray[np.float16]
) -> dict[str, Any]:
    digests = np.frombuffer(b"".join(map(text_digest, texts)), dtype=np.uint8)
    shard: dict[str, Any] = {
        "file": f"shard-{number:05d}.npy",
        "keys": f"keys-{number:05d}.npy",
        "rows": len(texts),
    }
    for name, field, array in (
        (shard["file"], "sha256", rows),
        (shard["keys"], "keys_sha256", digests.reshape(-1, _DIGEST_BYTES)),
    ):
        temporary = directory / f".{name}.tmp"
        with temporary.open("wb") as handle:
            np.save(handle, array, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        shard[field] = _file_sha256(temporary)
        temporary.replace(directory / name)
    return shard


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _load(path: Path, shape: tuple[int, int], dtype: type, *, mmap: bool = False) -> Any:
    """An array of a shard, checked against what the header says of it."""
    if not path.is_file():
        raise CacheError(f"{path}: named in {HEADER_NAME} but absent; delete the cache, rebuild")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); delete the cache, rebuild") from error
    if array.shape != shape or array.dtype != dtype:
        raise CacheError(
            f"{path}: {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}; delete the "
            "cache directory and run stage 2a again"
        )
    return array
