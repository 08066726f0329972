"""Write-through: what a cache lacks is encoded when it is first asked for, and kept.

Stage 2 may then start with a cold cache: it encodes what it draws, never more than a run without a
cache would, and from the second epoch on mostly reads.

What was encoded is written before each checkpoint (and whenever a shard is full). A run that was
killed and resumes from a checkpoint finds every row that it had used before it, bit for bit, and
encodes the rest beside the same other texts as it would have without the kill. That matters: the
vector of a text depends, to rounding, on what is encoded with it. Example: steps 1 to 8 encode one
batch each, the checkpoint of step 4 is whole, and the run is killed in step 7. Rows of the steps 1
to 4 are on disk; those of 5 and 6 are lost, and encoded again from the same two batches.

A rank sees other ranks' rows of earlier epochs, whatever the ranks' speeds; a caption that
two ranks meet in one epoch is encoded twice.

Paper: none; LLM2CLIP's released code either encodes all captions first, or each in every step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import get_worker_info

from llm2clip_vlm.data.cache import shards
from llm2clip_vlm.data.cache.embeddings import DEFAULT_SHARD_ROWS, EmbeddingCache, Encode
from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES, digests_of
from llm2clip_vlm.distributed import barrier
from llm2clip_vlm.runs.ownership import Hold


class FillingCache:
    """A cache that may be empty, with the encoder that fills it.

    Args:
        directory: Where the cache lies or will lie; all ranks see the same one.
        encode: The encoder. It runs in the process that calls :meth:`lookup`.
        fingerprint: Identity of the encoder.
        dim: Width of its embeddings.
        rank: This process's number in the run.
        shard_rows: Rows after which a shard is written before the next :meth:`write`.

    Raises:
        CacheError: The directory holds embeddings of something else.
        OwnershipError: Another run fills it.
    """

    def __init__(
        self,
        directory: str | Path,
        encode: Encode,
        fingerprint: Mapping[str, str],
        dim: int,
        *,
        rank: int = 0,
        shard_rows: int = DEFAULT_SHARD_ROWS,
    ) -> None:
        self.directory = Path(directory)
        """Directory of the cache."""
        self.dim = dim
        """Width of an embedding."""
        self.encoded = 0
        """Texts that this process has encoded."""
        self.seconds = 0.0
        """Seconds that it took for them."""
        self._encode, self._rank, self._shard_rows = encode, rank, shard_rows
        self._header = shards.Header(dim=dim, fingerprint=dict(fingerprint))
        shards.write_header(self.directory, self._header)
        self._hold = None if rank else Hold(self.directory, "filling an embedding cache")
        self._open = True
        self._pending: dict[bytes, shards.Rows] = {}  # encoded since the last write, rows `[dim]`
        self._begin(0)

    def set_epoch(self, epoch: int) -> None:
        """Takes in what all ranks have added before this epoch. Call it on all ranks.

        Args:
            epoch: Counted from 0.
        """
        if epoch != self._epoch:
            self.write()
            barrier()
            self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        files = shards.shard_files(self.directory, epoch, self._rank)
        self._known = EmbeddingCache(self.directory, self._header, files)
        self._added: dict[bytes, shards.Rows] = {}  # encoded in this epoch, by this process

    def lookup(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """The embeddings of texts, float32, in their order; those that are not there are encoded.

        Raises:
            CacheError: It runs in a loader worker, the cache is closed, or an embedding is broken.
        """
        if not self._open or get_worker_info() is not None:
            raise shards.CacheError(
                f"{self.directory}: text was looked up in a data loader's worker, or after the "
                "cache was closed; expected the process that holds the text encoder"
            )
        digests = digests_of(texts)
        found = self._known.find_digests(digests)
        added = {n: bytes(digests[n]) for n in np.flatnonzero(found < 0).tolist()}
        new = {key: texts[n] for n, key in added.items() if key not in self._added}
        if new:
            started, lacking = time.monotonic(), list(new.values())
            rows = shards.unit_rows(self._encode(lacking), lacking, self.dim)
            encoded = dict(zip(new, rows, strict=True))
            self.seconds += time.monotonic() - started
            self.encoded += len(new)
            self._added |= encoded
            self._pending |= encoded
        served = np.empty((len(texts), self.dim), np.float32)
        served[found >= 0] = self._known.read(found[found >= 0]).numpy()
        for n, key in added.items():
            served[n] = self._added[key]
        if len(self._pending) >= self._shard_rows:
            self.write()  # all that was encoded together: a resumed run finds it whole
        return torch.from_numpy(served)

    def write(self) -> None:
        """Puts on disk what this process has encoded since the last time.

        Call it on all ranks before a checkpoint is complete.
        """
        if self._pending:
            keys = np.frombuffer(b"".join(self._pending), np.uint8).reshape(-1, DIGEST_BYTES)
            rows, added = np.stack(list(self._pending.values())), (self._epoch, self._rank)
            path = shards.write_shard(self.directory, self._header, keys, rows, added)
            written = shards.read_shard(path, self._header)
            written.touch()
            # from here on the rows are read from disk: memory is free for others
            self._added |= zip(self._pending, written.embeds, strict=True)
            self._pending.clear()

    def close(self) -> None:
        """Writes what is left, and lets another run fill the cache."""
        self.write()
        self._open = False
        if self._hold is not None:
            self._hold.release()
