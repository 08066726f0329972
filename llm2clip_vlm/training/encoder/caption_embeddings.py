"""Captions in stage 2b: embedded before it starts, once as it goes, or in every step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from einops import rearrange
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.filling import FillingCache
from llm2clip_vlm.data.cache.shards import HEADER_NAME, seal
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
from llm2clip_vlm.data.text.text_keys import digests_of
from llm2clip_vlm.distributed import barrier, is_main, rank, shared_out
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.caption_tokens import pad_tokens
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.recipe.encoder import Stage2bRecipe, TextInLoopSection
from llm2clip_vlm.runs.hashes import HandoffError, hash_json
from llm2clip_vlm.runs.manifest import verify_parent
from llm2clip_vlm.training.adapters import add_lora, merge_adapter
from llm2clip_vlm.training.callbacks import EachEpoch

logger = logging.getLogger(__name__)

_TEXTS = 2**14  # looked up together


def encoder_path(spec: str | TextEncoderSection) -> str:
    """Path of the encoder that embeds captions."""
    return spec if isinstance(spec, str) else spec.language_model


def load_caption_encoder(spec: str | TextEncoderSection, device: Any = None) -> TextEncoder:
    """Load the encoder that embeds captions.

    Args:
        spec: Stage 1's `text_encoder/`, or a raw LLM with its pooling.
        device: Where the weights go. None: CPU.

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
        fingerprints: Hashes of the text encoder, to hand on; empty for a foreign cache.
        prompts: Prompts of further embeddings, which follow one another for each caption.
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

        Parts that a killed run left in a cache that fills itself stay as they are where this run
        resumes from a checkpoint, so that every row is found again, bit for bit; a fresh run first
        makes shards of them.

        Args:
            recipe: Gives `embedding_cache`, `write_through` and `caption_prompts`.
            args: Training arguments of this run.
            resumes: Whether it goes on from a checkpoint.

        Raises:
            HandoffError: Another stage wrote the directory, or its manifest names another text
                encoder than the embeddings beside it.
            CacheError: There is no cache, or it is damaged.
            OwnershipError: Another run fills it.
        """
        directory = str(recipe.embedding_cache)
        if recipe.write_through is None:
            with args.main_process_first(local=False, desc="opening the cache"):
                cache, hashes = _open_complete(directory)
            return cls(cache, hashes, recipe.caption_prompts)
        encoder = load_caption_encoder(recipe.write_through, args.device)
        with args.main_process_first(local=False, desc="opening the cache"):
            verify_parent(directory, "stage2a_cache_text")
            if (Path(directory) / HEADER_NAME).is_file() and not resumes and is_main():
                seal(Path(directory))
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
        return {"text_features": rearrange(each, "k n d -> (n k) d")}

    def require(self, dataset: ImageTextDataset, texts: Sequence[str]) -> None:
        """Refuse to start where a caption that will be asked for has no embedding.

        The main process looks, for all. That all captions of these records are there is noted
        beside a large cache: the next start does not look again.

        Args:
            dataset: Training captions.
            texts: Texts of evaluation.

        Raises:
            HandoffError: Says how many captions are missing, of how many, with an example.
        """
        cache = self._cache
        if isinstance(cache, FillingCache):
            return

        def lacking(data: ImageTextDataset) -> str:
            facts = [data.records.made_of, data.kinds, self._prompts]
            note = cache.index.with_suffix(f".{hash_json(facts)[:32]}")
            # The table's digests stand for texts without a prompt; they are of all records, so what
            # they lack may belong to one that is not drawn: then the texts themselves are read.
            complete = note.exists() or (
                self._prompts == ("",) and cache.holds(data.records.digests(data.kinds))
            )
            for prompt in self._prompts:
                left = iter(texts) if complete else chain(data.each_caption(), texts)
                seen, lost, example = [], [], ""
                while part := list(islice(left, _TEXTS)):
                    keys = digests_of(part, prompt)
                    absent = cache.find_digests(keys) < 0
                    example = example or next((part[n] for n in np.flatnonzero(absent)), "")
                    seen.append(np.ascontiguousarray(keys[:, :8]))  # equal texts count once
                    lost.append(seen[-1][absent])
                if example:
                    missing, total = (
                        len(np.unique(np.concatenate(each).view(np.uint64)))
                        for each in (lost, seen)
                    )
                    return (
                        f"{missing} of {total} captions are not in the cache {cache.directory}"
                        f"{f' with the prompt {prompt!r}' if prompt else ''}, for example "
                        f"{example!r}. Add the files that stage 2b names under `train`, "
                        "`evaluation` and `zero_shot` to the sources of stage 2a's recipe and run "
                        "it again (it encodes only what is missing), or name the text encoder as "
                        "`write_through`, which fills the cache while stage 2b trains."
                    )
            if cache.index.exists():
                with suppress(OSError):  # a folder that nobody may write to
                    note.touch()
            return ""

        (why,) = shared_out([dataset], lacking)
        if why:
            raise HandoffError(why)

    def callbacks(self) -> list[TrainerCallback]:
        """Callback that writes a filling cache before each checkpoint, and shares it each epoch."""
        return [_Filling(self._cache)] if isinstance(self._cache, FillingCache) else []

    def finish(self) -> None:
        """Make shards of what was added. Call it on all ranks."""
        if isinstance(self._cache, FillingCache):
            self._cache.close()
            barrier()
            if is_main():
                seal(self._cache.directory)
                logger.info(
                    "%s is filled; this process encoded %d captions in %.1f s",
                    *(self._cache.directory, self._cache.encoded, self._cache.seconds),
                )


class TextInLoop:
    """Captions to tokens, for a text encoder with a LoRA that trains inside the model.

    Takes the place of :class:`CaptionFeatures`: the paper's comparison, not its method.

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
        """Hashes of the trained encoder; ask for them after :meth:`merge`."""
        return self.encoder.fingerprint

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[n, dim]`, float32, by the encoder as it stands."""
        return self.encoder.encode(texts)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text arguments: tokens."""
        tokens = self.encoder.tokens
        return pad_tokens(tokens(texts), tokens.pad_token_id, tokens.num_front_tokens)

    def require(self, dataset: Any, texts: Sequence[str]) -> None:
        """Accept all texts: the encoder embeds any."""

    def callbacks(self) -> list[TrainerCallback]:
        """No callbacks."""
        return []

    def attach(self, model: LLM2CLIPModel, args: TrainingArguments) -> None:
        """Put the encoder into a model as `text_encoder`, with a new adapter.

        Args:
            model: Made before the encoder, so that it starts as it would without one.
            args: Training arguments of this run.
        """
        self._tuner: Any = add_lora(self.encoder.backbone, self._lora, "text_in_loop.lora")
        set_precision(self.encoder.backbone, args, named_fp16=self._named_fp16)
        model.text_encoder = self.encoder

    def merge(self, model: LLM2CLIPModel, directory: str | Path) -> None:
        """Take the encoder out of the model, without its adapter, and write it on the main rank.

        Args:
            model: Model after training.
            directory: Such as `<output_dir>/text_encoder`.
        """
        del model.text_encoder
        live = self.encoder.encode(PROBE_TEXTS)
        frozen = (p for n, p in self._tuner.named_parameters() if "lora_" not in n)
        dtype = next(frozen).dtype
        self.encoder.backbone, rounding = merge_adapter(self._tuner, dtype)
        vars(self.encoder).pop("fingerprint", None)  # `heads_from` has asked before training
        if is_main():
            logger.warning("text encoder: %s", rounding)
            self.encoder.save_pretrained(directory)
            again = TextEncoder.from_pretrained(directory).encode(PROBE_TEXTS)
            remedy = "it was not written as it was trained; go on from the last checkpoint"
            require_equal(str(directory), live, again, remedy, self.encoder.backbone.dtype)

    def finish(self) -> None:
        """Do nothing: there is no cache to close."""


class _Filling(EachEpoch):
    """Writes a cache before each checkpoint, so that a resumed run finds every row.

    It does so after each evaluation, too, which comes between a step and its checkpoint.
    """

    def __init__(self, cache: FillingCache) -> None:
        super().__init__(cache)
        self.cache = cache

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write if the Trainer is about to save; its own callback, the first, has decided that."""
        if control.should_save:
            self.cache.write()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was asked for."""
        self.cache.write()


def _open_complete(directory: str) -> tuple[EmbeddingCache, dict[str, str]]:
    """Open a cache whose manifest and header agree; return the encoder's hashes, too."""
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
