"""Caches of one encoder joined: slices of a build, other data sets, journals of training runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm2clip_vlm.data.embedding_cache import DEFAULT_SHARD_ROWS, EmbeddingCache
from llm2clip_vlm.data.embedding_journal import read_segments, verify_segment
from llm2clip_vlm.data.embedding_shards import Digests, Rows, Segment, write_header, write_shard


def merge_caches(
    directory: str | Path, sources: Sequence[str | Path], *, shard_rows: int = DEFAULT_SHARD_ROWS
) -> EmbeddingCache:
    """Joins caches of one encoder, each text once.

    A shard whose rows are all new, under a number that is free, is taken over as it is: the slices
    of one build become the files of that build. What else is new goes into further shards. Merging
    again, after an interruption too, adds only what is missing.

    Args:
        directory: Where the result lies or will lie.
        sources: Caches; the first one's row counts where two hold a text. Journals in `directory`
            itself become shards.
        shard_rows: Rows of a further shard.

    Raises:
        CacheError: A cache is damaged, or two were made by different encoders.
    """
    directory = Path(directory)
    opened = [EmbeddingCache.open(source) for source in sources]
    header = opened[0].header
    for cache in opened[1:]:
        cache.header.require(cache.directory, header)
    write_header(directory, header)
    own = read_segments(directory, header)
    shards = [segment for segment in own if segment.number is not None]
    journals = [segment for segment in own if segment.number is None]
    taken = {segment.number for segment in shards}
    given = [s for c in opened if c.directory.resolve() != directory.resolve() for s in c.segments]
    given.sort(key=lambda segment: (segment.number is None, segment.number or 0))
    everything = EmbeddingCache(directory, header, [*shards, *given, *journals])
    first = sum(len(segment.keys) for segment in shards)
    rest: list[tuple[Segment, npt.NDArray[np.int64]]] = []
    for segment in [*given, *journals]:
        verify_segment(segment)
        here = np.arange(first, first + len(segment.keys))
        first += len(here)
        new = everything.find_digests(segment.keys) == here
        if segment.number is not None and segment.number not in taken and new.all():
            write_shard(directory, segment.number, header, segment.keys, segment.embeds)
            taken.add(segment.number)
        elif new.any():
            rest.append((segment, np.flatnonzero(new)))
    after = 1 + max((s.number for s in everything.segments if s.number is not None), default=-1)
    for number, (keys, rows) in enumerate(_joined(rest, shard_rows), start=after):
        write_shard(directory, number, header, keys, rows)
    for segment in journals:
        segment.path.unlink()
    return EmbeddingCache.open(directory)


def _joined(
    parts: Iterable[tuple[Segment, npt.NDArray[np.int64]]], shard_rows: int
) -> Iterator[tuple[Digests, Rows]]:
    """Chosen rows of segments, in shards filled to the brim."""
    keys: list[Digests] = []
    rows: list[Rows] = []
    for segment, chosen in parts:
        start = 0
        while start < len(chosen):
            taken = chosen[start : start + shard_rows - sum(map(len, keys))]
            start += len(taken)
            keys.append(segment.keys[taken])
            rows.append(segment.embeds[taken])
            if sum(map(len, keys)) == shard_rows:
                yield np.concatenate(keys), np.concatenate(rows)
                keys, rows = [], []
    if keys:
        yield np.concatenate(keys), np.concatenate(rows)
