"""The caption embeddings of stage 2b: all there before it starts, or encoded as it goes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llm2clip_vlm.config import TextEncoderSection
from llm2clip_vlm.data.embedding_cache import HEADER_NAME, EmbeddingCache
from llm2clip_vlm.data.embedding_fill import FillingCache, seal
from llm2clip_vlm.data.image_text import ImageTextDataset, ImageTextRecord
from llm2clip_vlm.distributed import barrier, is_main, rank
from llm2clip_vlm.handoff import HandoffError, verify_parent
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.training.arguments import last_checkpoint

logger = logging.getLogger(__name__)


def load_caption_encoder(
    spec: str | TextEncoderSection, device: Any = None
) -> tuple[TextEncoder, str]:
    """Load what embeds captions.

    Args:
        spec: Stage 1's `text_encoder/`, or a raw LLM with its pooling.
        device: Where the weights go; none = CPU.

    Returns:
        The encoder, and where it came from.

    Raises:
        HandoffError: Another stage wrote the directory.
    """
    if isinstance(spec, str):
        verify_parent(spec, expect_stage="stage1_text_encoder")
        return TextEncoder.from_pretrained(spec, device=device), spec
    path = spec.language_model
    verify_parent(path, expect_stage=("base_language_model", "stage1_text_encoder"))
    return TextEncoder.from_section(spec, device), path


class CaptionFeatures:
    """Captions to the model's `text_features`.

    Use :meth:`open`.

    Args:
        cache: Complete, or filling itself.
        fingerprints: The text encoder's, to hand on, as `text_encoder.<field>`.
        parents: What the stage reads them from, by name.
    """

    def __init__(
        self,
        cache: EmbeddingCache | FillingCache,
        fingerprints: Mapping[str, str],
        parents: Mapping[str, str],
    ) -> None:
        self.fingerprints = {f"text_encoder.{name}": v for name, v in fingerprints.items()}
        """The text encoder's; none for a foreign cache."""
        self.parents = dict(parents)
        """What the stage's manifest names as its parents."""
        self.dim = cache.dim
        """Width of an embedding."""
        self._cache = cache

    @classmethod
    def open(
        cls,
        directory: str,
        write_through: str | TextEncoderSection | None,
        args: TrainingArguments,
    ) -> Self:
        """Open stage 2a's cache, or one that may be cold. Call it on all ranks.

        A cache that fills itself: journals that a killed run left stay as they are where this run
        resumes from a checkpoint, so that every row is found again to the bit; a fresh run first
        makes shards of them.

        Args:
            directory: Stage 2a's output directory, a cache that other code built, or a new one.
            write_through: What encodes captions that are not there; none = all have to be there.
            args: Of this run.

        Raises:
            HandoffError: Another stage wrote the directory, or its manifest names another text
                encoder than the embeddings beside it.
            CacheError: There is no cache, it is damaged, or another run fills it.
        """
        if write_through is None:
            return cls(*_open_complete(directory), {"cache": directory})
        encoder, path = load_caption_encoder(write_through, args.device)
        with args.main_process_first(local=False, desc="opening the cache"):
            verify_parent(directory, expect_stage="stage2a_cache_text")
            left = (Path(directory) / HEADER_NAME).is_file() and last_checkpoint(args) is None
            if left and is_main():
                seal(directory)
            cache = FillingCache(
                directory, encoder.encode, encoder.fingerprint, encoder.hidden_size, rank=rank()
            )
        # The cache is no parent: it may grow on for another run.
        return cls(cache, encoder.fingerprint, {"text_encoder": path})

    @property
    def complete(self) -> bool:
        """Whether a loader's workers may look captions up; else the training process does."""
        return isinstance(self._cache, EmbeddingCache)

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[n, dim]`, float32."""
        return self._cache.lookup(texts)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text arguments."""
        return {"text_features": self.lookup(texts)}

    def require(
        self, dataset: ImageTextDataset, held_out: Mapping[str, Sequence[ImageTextRecord]]
    ) -> None:
        """Refuse to start where a caption that will be asked for has no embedding.

        Args:
            dataset: Training pairs.
            held_out: Evaluation records.

        Raises:
            HandoffError: Says how many captions are missing, of how many, with an example.
        """
        if isinstance(self._cache, FillingCache):
            return
        wanted = list(dict.fromkeys([*dataset.captions(), *_captions(held_out)]))
        missing = self._cache.missing(wanted)
        if missing:
            raise HandoffError(
                f"{len(missing)} of {len(wanted)} captions are not in the cache "
                f"{self._cache.directory}, for example {missing[0]!r}. Add the files that stage 2b "
                "names under `train` and `evaluation` to the sources of stage 2a's recipe and run "
                "it again (it encodes only what is missing), or name the text encoder as "
                "`write_through`, which fills the cache while stage 2b trains."
            )

    def callbacks(self) -> list[TrainerCallback]:
        """What a cache that fills itself must hear of training."""
        return [_FillEachEpoch(self._cache)] if isinstance(self._cache, FillingCache) else []

    def finish(self) -> None:
        """Make shards of what was added. Call it on the main rank, when no rank looks up more."""
        if isinstance(self._cache, FillingCache):
            self._cache.close()
            sealed = seal(self._cache.directory)
            logger.info(
                "%s holds %d captions; this process encoded %d in %.1f s",
                *(sealed.directory, len(sealed), self._cache.encoded, self._cache.seconds),
            )


class _FillEachEpoch(TrainerCallback):
    """Lets a rank see, from each epoch's beginning, what all ranks have added before it."""

    def __init__(self, cache: FillingCache) -> None:
        self.cache = cache

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # state.epoch is a whole number here, or lies inside the epoch that a resume goes on with
        self.cache.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_main():  # what comes now is the main rank's, and in the end it takes all journals
            self.cache.close()
        barrier()


def _open_complete(directory: str) -> tuple[EmbeddingCache, dict[str, str]]:
    """A cache whose manifest and header agree, and the encoder's hashes from the manifest."""
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
    return cache, recorded


def _captions(held_out: Mapping[str, Sequence[ImageTextRecord]]) -> Iterable[str]:
    for records in held_out.values():
        for record in records:
            for texts in record.captions.values():
                yield from texts
