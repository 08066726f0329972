"""Write-through: what a cache lacks is encoded when it is first asked for, and kept.

Stage 2 may then start with a cold cache: it encodes what it draws, never more than a run without a
cache would, and from the second epoch on mostly reads.

A row is served only after it is in a journal, and a journal holds together what was encoded
together. So a run that was killed and resumes from a checkpoint finds every row that it used
before, to the bit, and encodes the rest in the same company as it would have without the kill.

Of other ranks' rows a rank sees those of earlier epochs, whatever the ranks' speeds; a caption that
two ranks meet in one epoch is encoded twice, and the lower rank's row counts from then on.

Paper: none; LLM2CLIP's released code either encodes all captions first, or each in every step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import get_worker_info

from llm2clip_vlm.data.embedding_cache import EmbeddingCache, Encode
from llm2clip_vlm.data.embedding_journal import Journal
from llm2clip_vlm.data.embedding_merge import merge_caches
from llm2clip_vlm.data.embedding_shards import (
    CacheError,
    Header,
    digests_of,
    read_segments,
    require_unit,
    unit_rows,
    write_header,
)

logger = logging.getLogger(__name__)


class FillingCache:
    """A cache that may be empty, with the encoder that fills it.

    Args:
        directory: Where the cache lies or will lie; all ranks see the same one.
        encode: The encoder. It runs in the process that calls :meth:`lookup`.
        fingerprint: What it is.
        dim: Width of its embeddings.
        rank: This process's number in the run.

    Raises:
        CacheError: The directory holds embeddings of something else, or another run fills it.
    """

    def __init__(
        self,
        directory: str | Path,
        encode: Encode,
        fingerprint: Mapping[str, str],
        dim: int,
        *,
        rank: int = 0,
    ) -> None:
        self.directory = Path(directory)
        """Where the cache lies."""
        self.dim = dim
        """Width of an embedding."""
        self.encoded = 0
        """Texts that this process has encoded."""
        self.seconds = 0.0
        """Seconds that it took for them."""
        self._encode = encode
        self._rank = rank
        self._header = Header(dim=dim, fingerprint=dict(fingerprint))
        write_header(self.directory, self._header)
        self._journal: Journal | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Takes in what all ranks have added before this epoch.

        Args:
            epoch: Counted from 0. Every rank must be done with the epochs before it.
        """
        self.close()
        found = read_segments(self.directory, self._header, before_epoch=epoch)
        self._known = EmbeddingCache(self.directory, self._header, found)
        self._journal = Journal(self.directory, epoch, self._rank, self._header)

    def lookup(self, texts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """The embeddings of texts, float32, in their order; those that are not there are encoded.

        Raises:
            CacheError: It runs in a loader worker, the cache is closed, or an embedding is broken.
        """
        if self._journal is None or get_worker_info() is not None:
            raise CacheError(
                f"{self.directory}: text was looked up in a data loader's worker, or after the "
                "cache was closed; expected the process that holds the text encoder"
            )
        digests = digests_of(texts)
        found = self._known.find_digests(digests)
        known, added = np.flatnonzero(found >= 0), np.flatnonzero(found < 0)
        keys = [digests[place].tobytes() for place in added]
        lacking: dict[bytes, int] = {}
        for key, place in zip(keys, added.tolist(), strict=True):
            if key not in self._journal.places:
                lacking.setdefault(key, place)
        if lacking:
            places = list(lacking.values())
            new = [texts[place] for place in places]
            started = time.monotonic()
            self._journal.append(digests[places], unit_rows(self._encode(new), new, self.dim))
            self.seconds += time.monotonic() - started
            self.encoded += len(new)
        rows = torch.empty(len(texts), self.dim)
        rows[known] = self._known.read(found[known]).float()
        if keys:
            rows[added] = torch.from_numpy(self._journal.read(keys).astype(np.float32))
        return require_unit(rows, texts, self.directory)

    def close(self) -> None:
        """Lets another process have the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def seal(directory: str | Path) -> EmbeddingCache:
    """Turns the journals of finished or abandoned runs into shards.

    Call it in one process, while none fills the cache.
    """
    return merge_caches(directory, [directory])
