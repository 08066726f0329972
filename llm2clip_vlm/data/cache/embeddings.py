"""Text embeddings on disk, found by the text itself.

A row is looked up by the digest of its text (and prompt), never by its position in some file, so
captions may be reordered, filtered, repeated and shared between data sets, and an image may have
any number of captions and prompts. The files are those of :mod:`shards`; rows stay on disk,
memory-mapped, and so does the sorted list of keys by which they are found (24 bytes a row, in
`.index-*` where there are many rows).

Which texts make which shard follows from the list of texts and the shards that are there, not from
who asks: N writers make the files of one writer, byte for byte, and so does a killed one that is
started again.

Paper: LLM2CLIP v6 table A4 (offline text features). The released code stores float32 rows beside
the image shards, aligned by order alone (`extract_embedding.py`, `training/data.py:522-549`).
float16 changes the cosine by less than 4e-6.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float16
from torch import Tensor

from llm2clip_vlm.data.cache import shards
from llm2clip_vlm.data.text.captions import UniqueTexts
from llm2clip_vlm.data.text.text_keys import Digests, digests_of, key_words
from llm2clip_vlm.files import map_hashed, written_hashed, written_whole

logger = logging.getLogger(__name__)

DEFAULT_SHARD_ROWS = 16384
"""Rows of a shard: what an interruption loses at most."""

INDEX_FILE_FROM_ROWS = 2**17
"""Caches of so many rows keep their sorted keys in a file; those of smaller ones are sorted each
time that they are opened."""

_INDEX = ".index-1-"  # with the version of its layout
_AT_ONCE = 64  # rows that are made float32 while they are in the processor's cache
_BLOCK = 32  # parts of keys that are sorted to be looked up together

Encode = Callable[[list[str]], Tensor]
"""Texts to embeddings `[n, dim]`, each the same whatever else is in the list (to rounding)."""


class MissingTextError(shards.CacheError):
    """Texts were looked up that the cache does not hold."""


class EmbeddingCache:
    """A read-only view of a cache directory.

    Make one with :meth:`build` or :meth:`open`.

    Example:
        >>> cache = EmbeddingCache.build(folder, ["a red star"], encode, {"pooling": "mean"})
        >>> cache["a red star"].shape
        torch.Size([64])
    """

    def __init__(
        self, directory: Path, header: shards.Header, files: Iterable[Path], *, keep: bool = False
    ) -> None:
        self.directory = directory
        """Directory of the cache."""
        self.dim = header.dim
        """Width of an embedding."""
        self.fingerprint = dict(header.fingerprint)
        """Identity of the text encoder: weights, tokenizer, pooling, ..."""
        self.header = header
        """Width and fingerprint, as the directory states them."""
        self.shards: list[shards.Shard] = [shards.read_shard(path, header) for path in files]
        """Shards in order; of two rows for one text the first counts."""
        self._first_rows = np.cumsum([0, *(len(shard.keys) for shard in self.shards)])
        names = "".join(shard.path.name for shard in self.shards)
        self.index = directory / f"{_INDEX}{sha256(names.encode()).hexdigest()[:32]}"
        """File of the sorted keys, if there is one; its name stands for all keys, for a shard's
        name says which it holds. What is noted about them has its name, and an ending."""
        self._first, self._second, self._order = self._sorted(keep)
        self._embeds = cache(lambda number: self.shards[number].touch())

    def _sorted(self, keep: bool) -> npt.NDArray[np.uint64]:
        """First and second 8 bytes of all keys in order, and their rows: `[3, rows]`."""
        rows = int(self._first_rows[-1])
        keep &= rows >= INDEX_FILE_FROM_ROWS
        if keep:
            with suppress(OSError, ValueError):  # absent or damaged: it is made again
                return np.frombuffer(map_hashed(self.index), np.uint64).reshape(3, rows)
        keys = [np.empty((0, 32), np.uint8), *(shard.keys for shard in self.shards)]
        flat = np.concatenate([*map(key_words, keys)])
        order = np.argsort(flat[:, 0], kind="stable")
        index = np.stack([*flat[order].T, order.astype(np.uint64)])
        if keep:
            with suppress(OSError):  # where nobody may write it stays in memory
                for outdated in self.directory.glob(f"{_INDEX}*"):
                    outdated.unlink()
                with written_hashed(self.index) as handle:
                    handle.write(index.data)
                return self._sorted(keep)
        return index

    def __reduce__(self) -> Any:
        """Loader workers open the files again instead of getting a copy of the rows."""
        return EmbeddingCache.open, (self.directory, self.fingerprint)

    @classmethod
    def open(
        cls, directory: str | Path, fingerprint: Mapping[str, str] | None = None
    ) -> EmbeddingCache:
        """Opens a cache: reads the keys, and leaves the rows on disk.

        The first to open a large cache since it has changed writes the sorted keys beside it.

        Args:
            directory: Where it lies.
            fingerprint: What the reader expects to have made it. None: anything.

        Raises:
            CacheError: There is no cache, it is damaged, or a fingerprint field differs.
        """
        directory = Path(directory)
        if (header := shards.read_header(directory)) is None:
            raise shards.CacheError(
                f"{directory}: no text embedding cache ({shards.HEADER_NAME} is absent); "
                "run stage 2a"
            )
        if fingerprint is not None:
            header.require(directory, fingerprint)
        files = shards.shard_files(directory)
        try:
            return cls(directory, header, files, keep=True)
        except shards.CacheError:
            if shards.shard_files(directory) == files:
                raise
            return cls.open(directory, fingerprint)  # sealed meanwhile: files have other names

    @classmethod
    def build(
        cls,
        directory: str | Path,
        texts: Iterable[str],
        encode: Encode | Mapping[str, Encode],
        fingerprint: Mapping[str, str],
        *,
        shard_rows: int | None = None,
        writer: tuple[int, int] = (0, 1),
        planned: Callable[[int], object] = lambda texts: None,
    ) -> EmbeddingCache:
        """Adds the texts that the cache lacks, and opens it.

        A build that was interrupted goes on where its last shard ended, and a later one with more
        texts encodes only those. Several writers with the same texts share the work, in one
        directory or each in its own (then see :meth:`join`).

        Args:
            directory: Where the cache lies or will lie.
            texts: Texts in any order, with repetitions; those of :class:`UniqueTexts` are read when
                they are needed.
            encode: The encoder, or one for each prompt (`""` is the encoder's own instruction);
                rows are normalised here.
            fingerprint: Identity of `encode`: each field must equal that of what is already there.
            shard_rows: Rows of a new shard; the same for all writers. None: at most 16,384, and so
                few that there are about 16 shards for writers to share.
            writer: `(i, n)`: write each nth shard from the ith.
            planned: Called with the number of texts that this writer will encode.

        Raises:
            CacheError: The directory holds embeddings of something else, or `encode` returns
                another shape, a row that is not finite, or a row of zeros.
        """
        directory = Path(directory)
        encoders = encode if isinstance(encode, Mapping) else {"": encode}
        header = shards.read_header(directory)
        known = None if header is None else cls.open(directory, fingerprint)
        unique = texts if isinstance(texts, UniqueTexts) else UniqueTexts([], [*texts])
        if not (size := len(unique)) and known is None:
            raise shards.CacheError(f"{directory}: no text to embed")
        # Entry n of prompt p is number p * size + n. Finished shards have taken whole shards out of
        # the list, so what is left is cut as before and begins at the same numbers, whichever of
        # them a killed writer or a faster one has finished: of 10 texts in shards of 3, which begin
        # at 0, 3, 6 and 9, each belongs to the same writer even when only 3 and 9 are left.
        todo = np.arange(size * len(encoders))
        shard_rows = shard_rows or min(max(len(todo) // 16, 256), DEFAULT_SHARD_ROWS)
        if known is not None:
            asked_for = chain.from_iterable(map(unique.keys, encoders))
            lacking = [known.find_digests(part) < 0 for part in asked_for]
            todo = np.flatnonzero(np.concatenate(lacking))
        parts = [todo[at : at + shard_rows] for at in range(0, len(todo), shard_rows)]
        mine = [part for part in parts if part[0] // shard_rows % writer[1] == writer[0]]
        if not mine and writer[1] > 1:
            why = f"{len(todo)} rows are lacking, which make {len(parts)} shards of {shard_rows}"
            logger.warning("%s: writer %d/%d has nothing to do: %s", directory, *writer, why)
        planned(sum(map(len, mine)))
        # A writer without a shard still writes the header.
        for part in mine or ([] if header else [todo[:1]]):
            keys, rows = [], []
            for number, (prompt, encoder) in enumerate(encoders.items()):
                if asked := [unique[n] for n in (part[part // size == number] % size).tolist()]:
                    dim = header.dim if header else None
                    rows.append(shards.unit_rows(encoder(asked), asked, dim))
                    keys.append(digests_of(asked, prompt))
                    dim = rows[0].shape[1]
                    header = header or shards.Header(dim=dim, fingerprint=dict(fingerprint))
            assert header is not None
            shards.write_header(directory, header)
            if mine:
                shards.write_shard(directory, header, np.concatenate(keys), np.concatenate(rows))
        logger.info("%s: %d shards written, %d rows were lacking", directory, len(mine), len(todo))
        return cls.open(directory)

    @classmethod
    def join(cls, directory: str | Path, sources: Iterable[str | Path]) -> EmbeddingCache:
        """Copies the shards of caches of one encoder into one directory, and opens it.

        Parts that training runs have left become shards. A text that two sources hold has two rows
        afterwards, of which one counts.

        Args:
            directory: Where the result lies or will lie; may be one of the sources.
            sources: Caches; of two shards with one name the first one's counts.

        Raises:
            CacheError: A cache is damaged, two were made by different encoders, or a run is filling
                `directory`.
        """
        directory = Path(directory)
        if shards.read_header(directory):
            shards.seal(directory)
        opened = [cls.open(source) for source in sources]
        for each in opened:
            each.header.require(each.directory, opened[0].fingerprint, opened[0].dim)
            each.verify()
        shards.write_header(directory, opened[0].header)
        for shard in chain.from_iterable(each.shards for each in opened):
            target = directory / shards.sealed(shard.path)
            if not target.exists():
                with written_whole(target) as partial:
                    shutil.copyfile(shard.path, partial)
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
            CacheError: See :meth:`read`.
        """
        found = self.find(texts, prompt)
        if (found < 0).any():
            lost = self.missing(texts, prompt)
            raise MissingTextError(
                f"{len(lost)} text(s) are not among the {len(self)} of {self.directory}"
                f"{f' with the prompt {prompt!r}' if prompt else ''}, such as {lost[0][:200]!r}; "
                "add their file to stage 2a's sources and run it again (it encodes only these)"
            )
        rows = torch.empty(len(found), self.dim)
        parts = self._rows(found)
        for at in range(0, len(parts), _AT_ONCE):
            rows[at : at + _AT_ONCE] = self._joined(parts[at : at + _AT_ONCE])
        return rows

    def missing(self, texts: Iterable[str], prompt: str = "") -> list[str]:
        """The texts that the cache does not hold, each once, in their order."""
        unique = list(dict.fromkeys(texts))
        return [unique[i] for i in np.flatnonzero(self.find(unique, prompt) < 0)]

    def holds(self, digests: Iterable[Digests]) -> bool:
        """Whether all of these keys are there.

        Args:
            digests: Keys in parts of some thousand. Many are sorted and go through the index
                together, in its order, so that a billion of either touches each page once a block.
        """
        left = iter(digests)
        while block := list(islice(left, _BLOCK)):
            keys = np.concatenate(block)
            if (self.find_digests(keys[np.argsort(key_words(keys)[:, 0])]) < 0).any():
                return False
        return True

    def find(self, texts: Sequence[str], prompt: str = "") -> npt.NDArray[np.int64]:
        """Row number of each text, to keep and to :meth:`read` by; -1 where there is none."""
        return self.find_digests(digests_of(texts, prompt))

    def read(self, numbers: npt.NDArray[np.int64]) -> Float16[Tensor, "n dim"]:
        """Rows by number, straight from the memory-mapped files.

        A shard is read whole, and each of its rows is looked at, before the first is given out.

        Raises:
            CacheError: A file has changed since it was written, one of its rows is no unit vector,
                or no row has a number (-1: the text is not there).
        """
        return self._joined(self._rows(numbers))

    def _rows(self, numbers: npt.NDArray[np.int64]) -> list[memoryview]:
        """Each row's bytes, on disk."""
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise shards.CacheError(
                f"{self.directory}: rows {numbers.min()} to {numbers.max()} were asked for, "
                f"expected 0 to {len(self) - 1}"
            )
        owner = np.searchsorted(self._first_rows, numbers, side="right") - 1
        size = 2 * self.dim
        starts = (numbers - self._first_rows[owner]) * size
        asked = np.unique(owner).tolist()
        if self._embeds.cache_info().currsize < len(self.shards):
            random.Random(os.getpid()).shuffle(asked)  # each worker begins with other shards
        held = {number: self._embeds(number) for number in asked}
        places = zip(owner.tolist(), starts.tolist(), strict=True)
        return [held[number][at : at + size] for number, at in places]

    def _joined(self, rows: list[memoryview]) -> Float16[Tensor, "n dim"]:
        """Rows one after the other, each copied once.

        As fast with a thousand shards as with one; indexing arrays shard by shard copies twice.
        """
        flat = np.frombuffer(bytearray().join(rows), np.float16)
        return torch.from_numpy(flat.reshape(-1, self.dim))

    def verify(self) -> None:
        """Reads every file whole, and looks at each row.

        Raises:
            CacheError: A file has changed since it was written, or a row is no unit vector.
        """
        for shard in self.shards:
            shard.verify()

    def find_digests(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Row number of each key by its first 16 bytes, -1 where there is none."""
        found = np.full(len(digests), -1, dtype=np.int64)
        first, second = key_words(digests).T
        place = np.searchsorted(self._first, first)
        todo = np.arange(len(digests))
        while len(todo):  # once, and again for keys whose first 8 bytes are equal
            todo = todo[place[todo] < len(self)]
            todo = todo[self._first[place[todo]] == first[todo]]
            equal = self._second[place[todo]] == second[todo]
            found[todo[equal]] = self._order[place[todo[equal]]]
            todo = todo[~equal]
            place[todo] += 1
        return found
