"""A text encoder whose LoRA trains inside stage 2b's model: the paper's comparison."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from llm2clip_vlm.distributed import is_main
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.caption_tokens import pad_tokens
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.recipe.encoder import TextInLoopSection
from llm2clip_vlm.training.adapters import add_lora, merge_adapter
from llm2clip_vlm.training.encoder.caption_cache import load_caption_encoder

logger = logging.getLogger(__name__)


class TextInLoop:
    """Captions to tokens, for a text encoder with a LoRA that trains inside the model.

    Takes the place of `caption_cache.CaptionFeatures`: the paper's comparison, not its method.

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
        """Do nothing: there is no cache to close."""
