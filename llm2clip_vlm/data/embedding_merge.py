"""Several caches as one: slices that processes have built apart, and journals as shards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llm2clip_vlm.data.embedding_cache import DEFAULT_SHARD_ROWS, EmbeddingCache
from llm2clip_vlm.data.embedding_shards import (
    journal_files,
    lock,
    read_segments,
    write_header,
    write_shard,
)


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
        CacheError: A cache is damaged, two were made by different encoders, or a run is adding to
            a journal in `directory`.
    """
    directory = Path(directory)
    with ExitStack() as held:
        journals = journal_files(directory) if directory.is_dir() else []
        for path in journals:
            lock(held.enter_context(path.open("ab")), path)
        opened = [EmbeddingCache.open(source) for source in sources]
        header = opened[0].header
        for cache in opened[1:]:
            cache.header.require(cache.directory, header.fingerprint, header.dim)
        write_header(directory, header)
        own = read_segments(directory, header)
        others = [cache for cache in opened if not cache.directory.samefile(directory)]
        given = [segment for cache in others for segment in cache.segments]
        given.sort(key=lambda segment: (segment.number is None, segment.number or 0))
        shards = [segment for segment in own if segment.number is not None]
        added = [segment for segment in own if segment.number is None]
        everything = EmbeddingCache(directory, header, [*shards, *given, *added])
        taken = {segment.number for segment in shards}
        first = sum(len(segment.keys) for segment in shards)
        rest = []
        for segment in [*given, *added]:
            segment.verify()
            here = np.arange(first, first + len(segment.keys))
            first += len(here)
            new = here[everything.find_digests(segment.keys) == here]
            number = segment.number
            if number is not None and number not in taken and len(new) == len(here):
                write_shard(directory, number, header, segment.keys, segment.embeds)
                taken.add(number)
            else:
                rest.append(new)
        numbers = np.concatenate([np.empty(0, np.int64), *rest])
        free = 1 + max((s.number for s in everything.segments if s.number is not None), default=-1)
        for start in range(0, len(numbers), shard_rows):
            part = numbers[start : start + shard_rows]
            keys, rows = everything.keys(part), everything.read(part).numpy()
            write_shard(directory, free + start // shard_rows, header, keys, rows)
        for path in journals:
            path.unlink()
    return EmbeddingCache.open(directory)
