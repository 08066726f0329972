"""The files of an embedding cache, and what must hold of them before a row is used.

    header.json                  version, dtype, dim, fingerprint of the encoder; never changes
    shard-<sha256>.safetensors   `embeds` float16 [rows, dim], unit norm; `keys` uint8 [rows, 32];
                                 metadata: the same header again and the SHA-256 of `embeds`
    part-00002-00005-<sha256>.safetensors    such a shard, which rank 5 of a training run has added
                                 in its epoch 2; becomes a shard (by its name alone) at the end

The `<sha256>` is that of `keys`: a name says which texts a shard holds, so whoever encodes the same
list writes the same files, and caches of one encoder are joined by copying shards. A shard appears
whole or not at all, and carries its own header: any number of processes may write into one
directory, and one that is killed leaves nothing to repair.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, float32, from_numpy, isfinite

from llm2clip_vlm.data.text.caption_draw import text_number
from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES, Digests
from llm2clip_vlm.files import write_atomically, written_whole
from llm2clip_vlm.runs.manifest import RESOLVED_NAME
from llm2clip_vlm.runs.ownership import Hold

HEADER_NAME = "header.json"
"""File that makes a directory a cache."""

_NORM_TOLERANCE = 1e-2  # float16 moves the norm of a unit vector by less than 1e-3
_SHARD = re.compile(r"(?:shard|part-(\d{5,})-\d{5,})-[0-9a-f]{64}\.safetensors")
_METADATA = "embedding_cache"  # one key only: safetensors writes several in any order
_TWO = "embeddings of two encoders never share a cache: choose another directory or delete this one"
_AGAIN = "delete the file and build again (its texts alone are encoded anew)"

# A mark for each shard that was as written when this process read it, or one that it shares memory
# with: a loader's workers, which are forked, each read the shards that no other one has read yet.
_READ = np.frombuffer(mmap.mmap(-1, 2**20), np.uint64)

Rows = npt.NDArray[np.float16]
"""Embeddings, `[rows, dim]`."""


class CacheError(ValueError):
    """A cache directory cannot be used, or does not hold what was asked for."""


class Header(BaseModel, frozen=True, strict=True, extra="forbid"):
    """Header that all embeddings of a cache have in common."""

    version: Literal[4] = 4
    """Version of the layout."""
    dtype: Literal["float16"] = "float16"
    """Type of the rows."""
    dim: int = Field(ge=1)
    """Width of an embedding."""
    fingerprint: dict[str, str]
    """Identity of the encoder: weights, tokenizer, instruction, pooling, maximal length, ..."""
    sha256: str = Field(default="", exclude=True)
    """Checksum of a shard's rows; empty in the header of the directory."""

    @classmethod
    def parse(cls, path: Path, content: str | bytes, remedy: str) -> Self:
        """Reads the header in a file.

        Raises:
            CacheError: It is damaged, or of another version; names the field, and the remedy.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "no header of an embedding cache"
            raise CacheError(
                f"{path}: {field}: {first['msg']}, got {first['input']!r:.80}; {remedy}"
            ) from error

    def written(self, **more: str) -> str:
        """The header as JSON, the same for equal headers."""
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
class Shard:
    """Rows that were written together, left on disk."""

    path: Path
    """The file."""
    keys: Digests
    """Keys `[rows, 32]`, known to be as written."""
    embeds: Rows
    """Embeddings `[rows, dim]`, memory-mapped; see :meth:`touch`."""
    sha256: str
    """Checksum of `embeds` that the file states."""
    state: str
    """Inode, size and time of change of the file that was opened."""

    def touch(self) -> memoryview:
        """Reads all rows, and looks at each, where no process that shares the marks has done so.

        Returns:
            Their bytes, on disk.

        Raises:
            CacheError: They have changed since they were written, or one is no unit vector.
        """
        mark = text_number(f"{self.path} {self.sha256} {self.state} {_state(self.path)}")
        place = mark % len(_READ)
        unread = _READ[place] != mark
        if unread and (got := _checksum(self.embeds)) != self.sha256:
            raise CacheError(
                f"{self.path}: sha256 is {got}, expected {self.sha256}; the file is damaged: "
                f"{_AGAIN}"
            )
        if unread:  # the same bytes give the same norms each time
            for start in range(0, len(self.embeds), 4096):
                rows = from_numpy(self.embeds[start : start + 4096]).float()
                require_unit(rows, f"{self.path}: row", range(start, start + len(rows)))
        _READ[place] = mark
        return self.embeds.reshape(-1).view(np.uint8).data

    def verify(self) -> None:
        """Does :meth:`touch` even where that was done.

        Raises:
            CacheError: See :meth:`touch`.
        """
        _READ[:] = 0
        self.touch()


def unit_rows(embeds: Tensor, names: Sequence[str], dim: int | None) -> Rows:
    """Embeddings as they are stored.

    Args:
        embeds: `[n, dim]`, any float type, any device.
        names: What each row belongs to, for the message.
        dim: Width that they must have. None: any.

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
    return (rows / norms).half().numpy()


def require_unit(rows: Tensor, what: str, names: Sequence[object]) -> Tensor:
    """Refuses rows that no encoder can have written here, before anything learns from them.

    Args:
        rows: float32 `[n, dim]`, and returned.
        what: What a message calls a row, before its name.
        names: What each row belongs to.

    Raises:
        CacheError: A row is not finite or no unit vector.
    """
    off = ~((rows.norm(dim=1) - 1).abs() < _NORM_TOLERANCE)
    if off.any():
        row = int(off.nonzero()[0])
        raise CacheError(
            f"{what} {names[row]!r:.100} has norm {float(rows[row].norm())}, expected 1; find the "
            "file with `llm2clip-vlm embed verify`, delete it, build again"
        )
    return rows


def read_header(directory: Path) -> Header | None:
    """The header of a cache directory. None: it is no cache.

    Raises:
        CacheError: It is damaged, or of another version; names the command that builds it again.
    """
    path, old = directory / HEADER_NAME, f"{directory}.old"
    remedy = "delete the directory, then build it again: `llm2clip-vlm embed build RECIPE`, or "
    remedy += "stage 2b with `write_through`"
    if (directory / RESOLVED_NAME).is_file():
        remedy = f"build it again: `mv {directory} {old} && llm2clip-vlm embed build "
        remedy += f"{old}/{RESOLVED_NAME}`, then delete {old}"
    return Header.parse(path, path.read_bytes(), remedy) if path.is_file() else None


def write_header(directory: Path, header: Header) -> None:
    """Makes a directory a cache, or checks that it is the same one.

    Raises:
        CacheError: It is a cache of another encoder, or a damaged one.
    """
    if read_header(directory) is None:
        write_atomically(directory / HEADER_NAME, header.written() + "\n")
    existing = read_header(directory)  # of several writers that start at once the last one wins
    assert existing is not None
    existing.require(directory, header.fingerprint, header.dim)


def write_shard(
    directory: Path, header: Header, keys: Digests, rows: Rows, added: tuple[int, int] | None = None
) -> Path:
    """Writes a shard: all of it, or nothing.

    Args:
        directory: The cache.
        header: What the cache's `header.json` holds.
        keys: `[rows, 32]`.
        rows: `[rows, dim]`, unit norm.
        added: Epoch and rank of the training run that adds it. None: it is part of a build.

    Returns:
        The file.
    """
    kind = "shard" if added is None else _part(*added)
    path = directory / f"{kind}-{_checksum(keys)}.safetensors"
    stated = {_METADATA: header.written(sha256=_checksum(rows))}
    with written_whole(path) as partial:
        partial.write_bytes(save({"embeds": rows, "keys": keys}, metadata=stated))
    return path


def read_shard(path: Path, header: Header) -> Shard:
    """Maps a shard into memory, and reads its keys alone.

    Args:
        path: The file.
        header: Header of the cache, which the file must state as well.

    Raises:
        CacheError: It is damaged, or belongs to another cache.
    """
    try:
        state = _state(path)
        # torch's mapping, unlike numpy's, keeps no file open: a cache may have thousands of shards
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(_METADATA, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    own = Header.parse(path, stated, _AGAIN)
    own.require(path, header.fingerprint, header.dim)
    rows = tensors["keys"].numel() // DIGEST_BYTES if "keys" in tensors else 0
    holds = {name: f"{tensor.dtype} {[*tensor.shape]}" for name, tensor in tensors.items()}
    expected = {"embeds": f"torch.float16 {[rows, header.dim]}"}
    expected["keys"] = f"torch.uint8 {[rows, DIGEST_BYTES]}"
    if holds != expected or rows < 1:
        raise CacheError(f"{path}: holds {holds}, expected {expected}; {_AGAIN}")
    keys, embeds = tensors["keys"].numpy(), tensors["embeds"].numpy()
    if (got := _checksum(keys)) not in path.name:
        raise CacheError(
            f"{path}: its keys have the sha256 {got}, expected that of its name; {_AGAIN}"
        )
    return Shard(path, keys, embeds, own.sha256, state)


def shard_files(directory: Path, epoch: int | None = None, rank: int = 0) -> list[Path]:
    """Shards of a cache, and after them the parts that a training run has added.

    Args:
        directory: The cache.
        epoch: Leave out the parts of this epoch and later ones, but for those of `rank` in it.
            None: take all.
        rank: Number of a process.

    Returns:
        The files, in an order that depends on their names alone.
    """
    shards, parts, own = [], [], f"{_part(epoch or 0, rank)}-"
    for path in sorted(directory.glob("*.safetensors")):
        if found := _SHARD.fullmatch(path.name):
            if found[1] is None:
                shards.append(path)
            elif epoch is None or int(found[1]) < epoch or path.name.startswith(own):
                parts.append(path)
    return shards + parts


def cache_names(directory: Path) -> list[str]:
    """Names of the files in a directory that belong to a cache; empty where it is no cache.

    Raises:
        CacheError: The header is damaged.
    """
    if read_header(directory) is None:
        return []
    return [HEADER_NAME, *(path.name for path in shard_files(directory))]


def sealed(path: Path) -> str:
    """Name of a shard or part once no run is adding to the cache."""
    return f"shard-{path.name.rpartition('-')[2]}"


def seal(directory: Path) -> None:
    """Turns the parts that training runs have left into shards.

    Raises:
        OwnershipError: A run is filling the cache.
    """
    hold = Hold(directory, "sealing an embedding cache")
    for path in shard_files(directory):
        shard = path.with_name(sealed(path))
        if not shard.exists():
            path.rename(shard)
        elif path != shard:  # two ranks met the same captions: the lower rank's rows count
            path.unlink()
    hold.release()


def _state(path: Path) -> str:
    stat = path.stat() if path.exists() else None  # a part that has become a shard
    return f"{stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)}"


def _part(epoch: int, rank: int) -> str:
    return f"part-{epoch:05d}-{rank:05d}"


def _checksum(array: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
