"""An encoder under judgement: images and texts to embeddings, whatever checkpoint it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from llm2clip_vlm.config import TextEncoderSection
from llm2clip_vlm.data.image_text import ImageTextRecord
from llm2clip_vlm.data.pixels import process_images
from llm2clip_vlm.fingerprint import HandoffError, fingerprint_dir
from llm2clip_vlm.handoff import read_manifest
from llm2clip_vlm.models.clip import ClipTokens, load_clip
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.models.towers import VisionTower, load_vision_tower

Texts = Callable[[Sequence[str]], Tensor]
"""Texts to `[n, d]` on the CPU, unit norm, float32."""


@dataclass(frozen=True)
class Encoder:
    """A vision tower and, where the checkpoint has one, its text side."""

    tower: VisionTower
    """On its device."""
    project: nn.Module
    """From the tower's pooled output to the joint space."""
    fingerprints: dict[str, str]
    """Hashes of what was loaded."""
    batch_size: int
    """Images a forward pass."""
    texts: Texts | None = None
    """To the joint space."""
    captions: Texts | None = None
    """By the text encoder alone, where that is something else."""
    num_cut: Callable[[], int] = lambda: 0
    """Texts so far that were too long for the text side, and cut."""

    @torch.no_grad()
    def pool(self, images: Sequence[ImageTextRecord]) -> tuple[Float[Tensor, "n d"], str]:
        """The tower's pooled output.

        Returns:
            float32 on the CPU, before projection and norm; and the hash of the images' bytes.

        Raises:
            ImageError: An image cannot be read. Nothing is left out.
        """
        model, digest, pooled = self.tower.model, hashlib.sha256(), []
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(images), self.batch_size):
                found = list(threads.map(_read, images[start : start + self.batch_size]))
                for data, _ in found:
                    digest.update(hashlib.sha256(data).digest())
                pixels = process_images(self.tower.image_processor, [i for _, i in found], None)
                out: Any = model(pixel_values=pixels.to(model.device, model.dtype))
                pooled.append(out.pooler_output.float().cpu())
        return torch.cat(pooled), digest.hexdigest()

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageTextRecord]) -> tuple[Float[Tensor, "n d"], str]:
        """As :meth:`pool`, in the joint space and of unit norm."""
        pooled, digest = self.pool(images)
        model = self.tower.model
        return F.normalize(
            self.project(pooled.to(model.device, model.dtype)).float(), dim=-1
        ).cpu(), digest

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Texts in the joint space.

        Raises:
            ValueError: The checkpoint has no text side.
        """
        if self.texts is None:
            raise ValueError(
                f"the model has no text side ({self.tower.model.config.model_type}), which this "
                "task needs; set `text_encoder` beside an LLM2CLIPModel, or judge a whole CLIP"
            )
        return self.texts(texts)


def _read(record: ImageTextRecord) -> tuple[bytes, Image.Image]:
    encoded = record.encoded()
    return encoded.data, encoded.rgb(strict=True)


def data_hash(*parts: Any) -> str:
    """sha256 of what was judged: texts, labels, names, and the images' hash."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_encoder(
    path: str,
    text_encoder: str | TextEncoderSection | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> Encoder:
    """Load a checkpoint to be judged.

    Args:
        path: Directory or hub id of an `LLM2CLIPModel`, a CLIP, a SigLIP, or any vision tower
            (which then has no text side).
        text_encoder: For an `LLM2CLIPModel`.
        device: Where to.
        dtype: Of the weights.
        batch_size: Images a forward pass.

    Raises:
        TowerError: No vision tower.
        HandoffError: The model was trained against another text encoder.
    """
    tower = load_vision_tower(path, dtype)
    tower.model.to(device)  # type: ignore[arg-type]
    kind = AutoConfig.from_pretrained(path).model_type
    state = fingerprint_dir(path) if Path(path).is_dir() else path
    fields: dict[str, Any] = {"project": nn.Identity(), "fingerprints": {"model": state}}
    if kind == "llm2clip":
        model: Any = LLM2CLIPModel.from_pretrained(path, dtype=dtype).eval().to(device)
        fields["project"] = model.visual_projection
        if text_encoder is not None:
            fields |= _llm_side(path, model, text_encoder)
    elif kind == "clip":
        clip, tokenizer, _ = load_clip(path)
        fields["project"] = clip.visual_projection.to(device, dtype)
        fields |= _own_side(clip.to(device, dtype).eval(), ClipTokens(tokenizer))  # type: ignore[arg-type]
    elif kind in ("siglip", "siglip2"):
        whole = AutoModel.from_pretrained(path, dtype=dtype).eval().to(device)
        fields |= _own_side(whole, _FixedTokens(path, whole.config.text_config))
    return Encoder(tower=tower, batch_size=batch_size, **fields)


def _llm_side(
    path: str, model: LLM2CLIPModel, text_encoder: str | TextEncoderSection
) -> dict[str, Any]:
    named = isinstance(text_encoder, TextEncoderSection)
    load: Any = TextEncoder.from_section if named else TextEncoder.from_pretrained
    encoder = load(text_encoder, device=model.device)
    manifest = read_manifest(Path(path).parent) or {"fingerprints": {}}
    for name, value in encoder.fingerprint.items():
        recorded = manifest["fingerprints"].get(f"text_encoder.{name}", value)
        if recorded != value:
            raise HandoffError(
                f"text_encoder: {name}: {path} was trained against {recorded}, this one has "
                f"{value}; name the text encoder that its captions were cached with"
            )

    @torch.no_grad()
    def texts(items: Sequence[str]) -> Tensor:
        features = encoder.encode(items).to(model.device, model.dtype)
        return torch.cat(
            [model.get_text_features(part).float().cpu() for part in features.split(4096)]
        )

    return {
        "texts": texts,
        "captions": encoder.encode,
        "num_cut": lambda: encoder.tokens.num_truncated,
        "fingerprints": {
            "model": fingerprint_dir(path) if Path(path).is_dir() else path,
            "text_encoder": data_hash(encoder.fingerprint),
        },
    }


def _own_side(model: Any, tokens: Any) -> dict[str, Any]:
    """The text tower of a CLIP or SigLIP."""

    @torch.no_grad()
    def texts(items: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(items), 256):
            inputs = {k: v.to(model.device) for k, v in tokens(items[start : start + 256]).items()}
            features = model.get_text_features(**inputs).pooler_output
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts)

    return {"texts": texts, "num_cut": lambda: tokens.num_cut}


class _FixedTokens:
    """SigLIP's texts: padded to the window, as it was trained."""

    def __init__(self, path: str, config: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.window_tokens, self.num_cut = int(config.max_position_embeddings), 0

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        whole = self.tokenizer(list(texts))["input_ids"]
        self.num_cut += sum(len(ids) > self.window_tokens for ids in whole)
        return {
            "input_ids": self.tokenizer(
                list(texts),
                padding="max_length",
                max_length=self.window_tokens,
                truncation=True,
                return_tensors="pt",
            )["input_ids"]
        }
