"""Text embeddings on disk, found by the text itself.

A row is looked up by the digest of its text (and prompt), never by its position in some file, so
captions may be reordered, filtered, repeated and shared between data sets, and an image may have
any number of captions and prompts. The files are those of :mod:`embedding_shards`; rows stay on
disk, memory-mapped, and 16 bytes a row are held in memory to find them.

Which texts make which shard follows from the list of texts and the shards that are there, not from
who asks: N writers make the files of one writer, byte for byte, and so does a killed one that is
started again.

Paper: LLM2CLIP v6 table A4 (offline text features). The released code stores float32 rows beside
the image shards, aligned by order alone (`extract_embedding.py`, `training/data.py:522-549`).
float16 changes the cosine by less than 4e-6.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float16
from torch import Tensor

from llm2clip_vlm.data.embedding_shards import (
    DIGEST_BYTES,
    HEADER_NAME,
    CacheError,
    Digests,
    Header,
    Rows,
    Segment,
    digests_of,
    read_header,
    read_segments,
    require_unit,
    unit_rows,
    write_header,
    write_shard,
)

logger = logging.getLogger(__name__)

DEFAULT_SHARD_ROWS = 16384
"""Rows of a shard: what an interruption loses at most."""

Encode = Callable[[list[str]], Tensor]
"""Texts to embeddings `[n, dim]`, each the same whatever else is in the list (to rounding)."""


class MissingTextError(CacheError):
    """Texts were looked up that the cache does not hold."""


class EmbeddingCache:
    """A read-only view of a cache directory.

    Make one with :meth:`build` or :meth:`open`.

    Example:
        >>> cache = EmbeddingCache.build(folder, ["a red star"], encode, {"pooling": "mean"})
        >>> cache["a red star"].shape
        torch.Size([64])
    """

    def __init__(self, directory: Path, header: Header, segments: Sequence[Segment]) -> None:
        self.directory = directory
        """Where the cache lies."""
        self.dim = header.dim
        """Width of an embedding."""
        self.fingerprint = dict(header.fingerprint)
        """What made the embeddings: weights, tokenizer, pooling, ... of the text encoder."""
        self.header = header
        """Both of them."""
        self.segments = list(segments)
        """What was written together; of two rows for one text the first counts."""
        self.files = list(dict.fromkeys(segment.path for segment in segments))
        """The files with rows."""
        self._unread = np.ones(len(self.segments), dtype=bool)
        self._first_rows = np.cumsum([0, *(len(segment.keys) for segment in segments)])
        prefixes = [_prefixes(segment.keys) for segment in segments]
        flat = np.concatenate([np.empty(0, np.uint64), *prefixes])
        self._order = np.argsort(flat, kind="stable")
        self._prefixes = flat[self._order]
        self._bytes = {
            "keys": [segment.keys.reshape(-1).data for segment in segments],
            "embeds": [segment.embeds.reshape(-1).view(np.uint8).data for segment in segments],
        }

    def __reduce__(self) -> Any:
        """Loader workers open the files again instead of getting a copy of the rows."""
        return EmbeddingCache.open, (self.directory, self.fingerprint)

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
        header = read_header(directory)
        if header is None:
            raise CacheError(
                f"{directory}: no text embedding cache ({HEADER_NAME} is absent); run stage 2a"
            )
        if fingerprint is not None:
            header.require(directory, fingerprint)
        return cls(directory, header, read_segments(directory, header))

    @classmethod
    def build(
        cls,
        directory: str | Path,
        texts: Iterable[str],
        encode: Encode | Mapping[str, Encode],
        fingerprint: Mapping[str, str],
        *,
        shard_rows: int = DEFAULT_SHARD_ROWS,
        writer: tuple[int, int] = (0, 1),
    ) -> EmbeddingCache:
        """Adds the texts that the cache lacks, and opens it.

        A build that was interrupted goes on where its last shard ended, and a later one with more
        texts encodes only those. Several writers with the same texts share the work, in one
        directory or each in its own (then see :func:`merge_caches`).

        Args:
            directory: Where the cache lies or will lie.
            texts: In any order, with repetitions.
            encode: The encoder, or one for each prompt (`""` is the encoder's own instruction);
                rows are normalised here.
            fingerprint: What `encode` is: each field must equal that of what is already there.
            shard_rows: Rows of a new shard; the same for all writers.
            writer: `(i, n)`: write each nth shard from the ith.

        Raises:
            CacheError: The directory holds embeddings of something else, or `encode` returns
                another shape, a row that is not finite, or a row of zeros.
        """
        directory = Path(directory)
        encoders = encode if isinstance(encode, Mapping) else {"": encode}
        header = read_header(directory)
        known = None if header is None else cls.open(directory, fingerprint)
        unique = list(dict.fromkeys(texts))
        if not unique and known is None:
            raise CacheError(f"{directory}: no text to embed")
        todo = [
            (prompt, text)
            for prompt in encoders
            for text in (unique if known is None else known.missing(unique, prompt))
        ]
        # Shards that exist have taken whole shards out of the list, and their numbers: what is left
        # keeps its number, whichever of them a killed writer or a faster one has finished.
        taken = set() if known is None else {segment.number for segment in known.segments}
        numbers = (number for number in count() if number not in taken)
        parts = [todo[at : at + shard_rows] for at in range(0, len(todo), shard_rows)]
        mine = [
            (n, part) for n, part in zip(numbers, parts, strict=False) if n % writer[1] == writer[0]
        ]
        if not mine and writer[1] > 1:
            why = f"{len(todo)} rows are lacking, which make {len(parts)} shards of {shard_rows}"
            logger.warning("%s: writer %d/%d has nothing to do: %s", directory, *writer, why)
        # Without a shard a writer still says what the cache is.
        for number, part in mine or ([] if header else [(-1, todo[:1])]):
            keys, rows = _encoded(part, encoders, None if header is None else header.dim)
            header = header or Header(dim=rows.shape[1], fingerprint=dict(fingerprint))
            write_header(directory, header)
            if number >= 0:
                write_shard(directory, number, header, keys, rows)
        logger.info("%s: %d shards written, %d rows were lacking", directory, len(mine), len(todo))
        return cls.open(directory)

    def __len__(self) -> int:
        """Number of embeddings."""
        return len(self._order)

    def __contains__(self, text: object) -> bool:
        """Whether a text's embedding is there."""
        return isinstance(text, str) and self.find([text])[0] >= 0

    def __getitem__(self, text: str) -> Float[Tensor, " dim"]:
        """A text's embedding: float32, unit-norm up to float16's rounding.

        Raises:
            MissingTextError: The cache does not hold it.
        """
        return self.lookup([text])[0]

    def lookup(self, texts: Sequence[str], prompt: str = "") -> Float[Tensor, "n dim"]:
        """The embeddings of texts, float32, in their order.

        Raises:
            MissingTextError: The cache does not hold all of them.
            CacheError: A file has changed since it was written, or a row is no unit vector.
        """
        found = self.find(texts, prompt)
        if (found < 0).any():
            self.touch()  # a damaged key is not found either
            lost = self.missing(texts, prompt)
            raise MissingTextError(
                f"{len(lost)} text(s) are not among the {len(self)} of {self.directory}"
                f"{f' with the prompt {prompt!r}' if prompt else ''}, such as {lost[0][:200]!r}; "
                "add their file to stage 2a's sources and run it again (it encodes only these)"
            )
        return require_unit(self.read(found).float(), texts, self.directory)

    def missing(self, texts: Iterable[str], prompt: str = "") -> list[str]:
        """The texts that the cache does not hold, each once, in their order."""
        unique = list(dict.fromkeys(texts))
        return [unique[i] for i in np.flatnonzero(self.find(unique, prompt) < 0)]

    def find(self, texts: Sequence[str], prompt: str = "") -> npt.NDArray[np.int64]:
        """Row number of each text, to keep and to :meth:`read` by; -1 where there is none."""
        return self.find_digests(digests_of(texts, prompt))

    def read(self, numbers: npt.NDArray[np.int64]) -> Float16[Tensor, "n dim"]:
        """Rows by number, straight from the memory-mapped files.

        A file is read whole before its first row is given out.

        Raises:
            CacheError: A file has changed since it was written, or a number is of no row (-1: the
                text is not there).
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise CacheError(
                f"{self.directory}: rows {numbers.min()} to {numbers.max()} were asked for, "
                f"expected 0 to {len(self) - 1}"
            )
        return torch.from_numpy(self._gather("embeds", numbers))

    def keys(self, numbers: npt.NDArray[np.int64]) -> Digests:
        """Keys of rows by number, `[n, 32]`."""
        return self._gather("keys", numbers)

    def touch(self) -> None:
        """Reads each file whole that this process has not read yet.

        Raises:
            CacheError: A file has changed since it was written.
        """
        for segment in self.segments:
            segment.touch()

    def verify(self) -> None:
        """Reads every file whole, and looks at each row.

        Raises:
            CacheError: A file has changed since it was written, or a row is no unit vector.
        """
        for segment in self.segments:
            segment.verify()

    def find_digests(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Row number of each key, -1 where there is none."""
        found = np.full(len(digests), -1, dtype=np.int64)
        wanted = _prefixes(digests)
        place = np.searchsorted(self._prefixes, wanted)
        todo = np.arange(len(digests))
        while len(todo):  # once, and again for keys whose first 8 bytes are equal
            todo = todo[place[todo] < len(self._prefixes)]
            todo = todo[self._prefixes[place[todo]] == wanted[todo]]
            rows = self._order[place[todo]]
            equal = (self.keys(rows) == digests[todo]).all(axis=1)
            found[todo[equal]] = rows[equal]
            todo = todo[~equal]
            place[todo] += 1
        return found

    def _gather(self, name: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of all segments' `keys` or `embeds` by number, each copied once."""
        width, dtype = (DIGEST_BYTES, np.uint8) if name == "keys" else (self.dim, np.float16)
        files, size = self._bytes[name], width * np.dtype(dtype).itemsize
        owner = np.searchsorted(self._first_rows, numbers, side="right") - 1
        if name == "embeds" and (unread := self._unread[owner]).any():
            for segment in np.unique(owner[unread]).tolist():
                self.segments[segment].touch()
                self._unread[segment] = False
        starts = (numbers - self._first_rows[owner]) * size
        places = zip(owner.tolist(), starts.tolist(), strict=True)
        # As fast with a thousand files as with one; indexing arrays file by file copies twice.
        joined = bytearray().join([files[file][at : at + size] for file, at in places])
        return np.frombuffer(joined, dtype).reshape(-1, width)


def _encoded(
    part: Sequence[tuple[str, str]], encoders: Mapping[str, Encode], dim: int | None
) -> tuple[Digests, Rows]:
    """Keys and rows of (prompt, text) entries."""
    keys: list[Digests] = []
    rows: list[Rows] = []
    for prompt, group in groupby(part, key=itemgetter(0)):
        texts = [text for _, text in group]
        rows.append(unit_rows(encoders[prompt](texts), texts, dim))
        keys.append(digests_of(texts, prompt))
        dim = rows[-1].shape[1]
    return np.concatenate(keys), np.concatenate(rows)


def _prefixes(digests: Digests) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each key as a number."""
    first = np.ascontiguousarray(digests[:, :8])
    return first.view(">u8").reshape(-1).astype(np.uint64)
