"""Stage 2a's cache as stage 2b needs it: verified, and complete before training starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.data.image_text import ImageTextDataset, ImageTextRecord
from llm2clip_vlm.handoff import HandoffError, verify_parent

logger = logging.getLogger(__name__)


def open_caption_cache(directory: str | Path) -> tuple[EmbeddingCache, dict[str, str]]:
    """Open a cache whose manifest and header agree.

    Args:
        directory: Stage 2a's output directory, or a cache that other code built.

    Returns:
        The cache, and the text encoder's hashes from stage 2a's manifest to hand on, as
        `text_encoder.<field>` (empty for a foreign cache).

    Raises:
        HandoffError: Another stage wrote the directory, or its manifest names another text encoder
            than the embeddings beside it.
        CacheError: There is no cache, or it is damaged.
    """
    manifest = verify_parent(directory, expect_stage="stage2a_cache_text")
    cache = EmbeddingCache.open(directory)
    if manifest is None:
        logger.warning("%s has no manifest: a cache of unknown origin, or unfinished", directory)
        return cache, {}
    recorded: dict[str, str] = dict(manifest["fingerprints"])
    for field in sorted(set(recorded) & set(cache.fingerprint)):
        if recorded[field] != cache.fingerprint[field]:
            raise HandoffError(
                f"{directory}: fingerprints.{field}: its manifest says {recorded[field]}, its "
                f"header {cache.fingerprint[field]}; the cache was replaced after stage 2a "
                "finished: run stage 2a again into an empty directory"
            )
    return cache, {f"text_encoder.{field}": value for field, value in recorded.items()}


def require_captions(
    cache: EmbeddingCache,
    dataset: ImageTextDataset,
    held_out: Mapping[str, Sequence[ImageTextRecord]],
) -> None:
    """Refuse to start where a caption that will be asked for has no embedding.

    Args:
        cache: Stage 2a's.
        dataset: Training pairs.
        held_out: Evaluation records.

    Raises:
        HandoffError: Says how many captions are missing, of how many, with an example.
    """
    wanted = list(dict.fromkeys([*dataset.captions(), *_captions(held_out)]))
    missing = cache.missing(wanted)
    if missing:
        raise HandoffError(
            f"{len(missing)} of {len(wanted)} captions are not in the cache {cache.directory}, for "
            f"example {missing[0]!r}. Add the files that stage 2b names under `train` and "
            "`evaluation` to the sources of stage 2a's recipe and run it again (it encodes only "
            "what is missing)."
        )


def _captions(held_out: Mapping[str, Sequence[ImageTextRecord]]) -> Iterable[str]:
    for records in held_out.values():
        for record in records:
            for texts in record.captions.values():
                yield from texts
