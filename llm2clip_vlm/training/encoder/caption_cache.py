"""Captions in stage 2b: embedded before it starts, as it goes, or by an encoder that trains too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.data.embedding_fill import FillingCache, seal
from llm2clip_vlm.data.embedding_shards import HEADER_NAME
from llm2clip_vlm.distributed import barrier, is_main, rank
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.caption_tokens import pad_tokens
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.recipe.encoder import Stage2bRecipe, TextInLoopSection
from llm2clip_vlm.runs.manifest import HandoffError, verify_parent
from llm2clip_vlm.training.adapters import merge_adapter
from llm2clip_vlm.training.callbacks import EachEpoch
from llm2clip_vlm.training.export import add_lora

logger = logging.getLogger(__name__)


def encoder_path(spec: str | TextEncoderSection) -> str:
    """Where what embeds captions lies."""
    return spec if isinstance(spec, str) else spec.language_model


def load_caption_encoder(spec: str | TextEncoderSection, device: Any = None) -> TextEncoder:
    """Load what embeds captions.

    Args:
        spec: Stage 1's `text_encoder/`, or a raw LLM with its pooling.
        device: Where the weights go; none = CPU.

    Raises:
        HandoffError: Another stage wrote the directory.
    """
    if isinstance(spec, str):
        verify_parent(spec, "stage1_text_encoder")
        return TextEncoder.from_pretrained(spec, device=device)
    stages = ("base_language_model", "stage0_mntp", "stage1_text_encoder")
    verify_parent(spec.language_model, *stages)
    return TextEncoder.from_section(spec, device)


class CaptionFeatures:
    """Captions to the model's `text_features`.

    Use :meth:`open`.

    Args:
        cache: Complete, or filling itself.
        fingerprints: The text encoder's, to hand on; none for a foreign cache.
        prompts: Whose embeddings a batch has, one behind the other for each caption.
    """

    def __init__(
        self,
        cache: EmbeddingCache | FillingCache,
        fingerprints: Mapping[str, str],
        prompts: Sequence[str] = (),
    ) -> None:
        self.fingerprints = dict(fingerprints)
        self.dim = cache.dim
        """Width of an embedding."""
        self._cache = cache
        self._prompts = ("", *prompts)

    @classmethod
    def open(cls, recipe: Stage2bRecipe, args: TrainingArguments, *, resumes: bool) -> Self:
        """Open stage 2a's cache, or one that may be cold. Call it on all ranks.

        A cache that fills itself: journals that a killed run left stay as they are where this run
        resumes from a checkpoint, so that every row is found again to the bit; a fresh run first
        makes shards of them.

        Args:
            recipe: Its `embedding_cache`, `write_through` and `caption_prompts`.
            args: Of this run.
            resumes: From a checkpoint.

        Raises:
            HandoffError: Another stage wrote the directory, or its manifest names another text
                encoder than the embeddings beside it.
            CacheError: There is no cache, it is damaged, or another run fills it.
        """
        directory = str(recipe.embedding_cache)
        if recipe.write_through is None:
            cache, hashes = _open_complete(directory)
            return cls(cache, hashes, recipe.caption_prompts)
        encoder = load_caption_encoder(recipe.write_through, args.device)
        with args.main_process_first(local=False, desc="opening the cache"):
            verify_parent(directory, "stage2a_cache_text")
            if (Path(directory) / HEADER_NAME).is_file() and not resumes and is_main():
                seal(directory)
            filling = FillingCache(
                directory, encoder.encode, encoder.fingerprint, encoder.hidden_size, rank=rank()
            )
        return cls(filling, encoder.fingerprint)

    @property
    def in_workers(self) -> bool:
        """Whether a loader's workers may look captions up; else the training process does."""
        return isinstance(self._cache, EmbeddingCache)

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[n, dim]`, float32."""
        return self._cache.lookup(texts)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text arguments."""
        if isinstance(self._cache, FillingCache) or len(self._prompts) == 1:
            return {"text_features": self.lookup(texts)}
        each = [self._cache.lookup(texts, prompt) for prompt in self._prompts]
        return {"text_features": torch.stack(each, dim=1).flatten(0, 1)}

    def require(self, texts: Sequence[str]) -> None:
        """Refuse to start where a caption that will be asked for has no embedding.

        Args:
            texts: Of training and evaluation.

        Raises:
            HandoffError: Says how many captions are missing, of how many, with an example.
        """
        if isinstance(self._cache, FillingCache):
            return
        for prompt in self._prompts:
            wanted = list(dict.fromkeys(texts))
            if missing := self._cache.missing(wanted, prompt):
                self._cache.touch()  # a damaged key is not found either
                raise HandoffError(
                    f"{len(missing)} of {len(wanted)} captions are not in the cache "
                    f"{self._cache.directory}{f' with the prompt {prompt!r}' if prompt else ''}, "
                    f"for example {missing[0]!r}. Add the files that stage 2b names under `train`, "
                    "`evaluation` and `zero_shot` to the sources of stage 2a's recipe and run it "
                    "again (it encodes only what is missing), or name the text encoder as "
                    "`write_through`, which fills the cache while stage 2b trains."
                )

    def callbacks(self) -> list[TrainerCallback]:
        """What shows a rank, as each epoch begins, what all ranks have added before."""
        return [EachEpoch(self._cache)] if isinstance(self._cache, FillingCache) else []

    def finish(self) -> None:
        """Make shards of what was added. Call it on all ranks."""
        if isinstance(self._cache, FillingCache):
            self._cache.close()
            barrier()
            if is_main():
                sealed = seal(self._cache.directory)
                logger.info(
                    "%s holds %d captions; this process encoded %d in %.1f s",
                    *(sealed.directory, len(sealed), self._cache.encoded, self._cache.seconds),
                )


class TextInLoop:
    """Captions to tokens, for a text encoder with a LoRA that trains inside the model.

    Stands in the place of :class:`CaptionFeatures`: the paper's comparison, not its method.

    Args:
        section: Encoder and adapter.
        device: Where the encoder goes.

    Paper: LLM2CLIP v6 table A4 (LoRA training of the LLM against cached text).
    """

    in_workers = False

    def __init__(self, section: TextInLoopSection, device: Any) -> None:
        self.encoder = load_caption_encoder(section.text_encoder, device)
        self.dim = self.encoder.hidden_size
        self._lora = section.lora
        spec = section.text_encoder
        self._named_fp16 = not isinstance(spec, str) and spec.dtype == "float16"

    @property
    def fingerprints(self) -> dict[str, str]:
        """The trained encoder's; ask for them after :meth:`merge`."""
        return self.encoder.fingerprint

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[n, dim]`, float32, by the encoder as it stands."""
        return self.encoder.encode(texts)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text arguments: tokens."""
        tokens = self.encoder.tokens
        return pad_tokens(tokens(texts), tokens.pad_token_id, tokens.num_front_tokens)

    def require(self, texts: Sequence[str]) -> None:
        """Nothing is missing."""

    def callbacks(self) -> list[TrainerCallback]:
        """None."""
        return []

    def attach(self, model: LLM2CLIPModel, args: TrainingArguments) -> None:
        """Put the encoder into a model as `text_encoder`, with a new adapter.

        Args:
            model: Made before, so that it starts as it would without.
            args: Of this run.
        """
        self._tuner: Any = add_lora(self.encoder.backbone, self._lora, "text_in_loop.lora")
        set_precision(self.encoder.backbone, args, named_fp16=self._named_fp16)
        model.text_encoder = self.encoder

    def merge(self, model: LLM2CLIPModel, directory: str | Path) -> None:
        """Take the encoder out of the model, without its adapter, and write it on the main rank.

        Args:
            model: After training.
            directory: Such as `<output_dir>/text_encoder`.
        """
        del model.text_encoder
        live = self.encoder.encode(PROBE_TEXTS)
        frozen = (p for n, p in self._tuner.named_parameters() if "lora_" not in n)
        dtype = next(frozen).dtype
        self.encoder.backbone, rounding = merge_adapter(self._tuner, dtype)
        if is_main():
            logger.warning("text encoder: %s", rounding)
            self.encoder.save_pretrained(directory)
            again = TextEncoder.from_pretrained(directory).encode(PROBE_TEXTS)
            remedy = "it was not written as it was trained; go on from the last checkpoint"
            require_equal(str(directory), live, again, remedy, self.encoder.backbone.dtype)

    def finish(self) -> None:
        """Nothing to do."""


def _open_complete(directory: str) -> tuple[EmbeddingCache, dict[str, str]]:
    """A cache whose manifest and header agree, and the encoder's hashes from the manifest."""
    manifest = verify_parent(directory, "stage2a_cache_text")
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
