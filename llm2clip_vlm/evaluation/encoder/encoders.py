"""An encoder to evaluate: images and texts to embeddings, whatever checkpoint it is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel

from llm2clip_vlm.chat.text_tokens import text_ids
from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.data.reading.pixels import PixelTable, process_images
from llm2clip_vlm.models.clip import check_tokenizer
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.loading import load_complete, read_config, read_tokenizer
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.timm_vision import read_timm_layout
from llm2clip_vlm.models.vision.towers import VisionTower, load_vision_tower
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.hashes import HandoffError, fingerprint_dir, hash_json
from llm2clip_vlm.runs.manifest import read_manifest

logger = logging.getLogger(__name__)

_CLIP = ("clip", "vision-text-dual-encoder")
"""`model_type` of models with CLIP's text tower."""

Texts = Callable[[Sequence[str]], Tensor]
"""Turns texts into `[n, d]` on the CPU, unit norm, float32."""


@dataclass(frozen=True)
class Encoder:
    """A vision tower and, where the checkpoint has one, its text side."""

    tower: VisionTower
    """The tower on its device."""
    project: nn.Module
    """Projection of the tower's pooled output into the joint space."""
    fingerprints: dict[str, str]
    """Hashes of what was loaded."""
    batch_size: int
    """Images of a forward pass."""
    texts: Texts | None = None
    """Embeds texts in the joint space."""
    captions: Texts | None = None
    """Embeds texts by the text encoder alone (without text adaptor)."""
    num_cut: Callable[[], int] = lambda: 0
    """Texts so far that were too long for the text side, and cut."""

    @torch.no_grad()
    def pool(self, images: Sequence[ImageTextRecord]) -> tuple[Float[Tensor, "n d"], str]:
        """Pool images by the tower.

        Returns:
            float32 on the CPU, before projection and norm; and the hash of the images' bytes.

        Raises:
            ImageError: An image cannot be read. Nothing is left out.
            ValueError: The tower gives NaN or inf.
        """
        digest, pooled = hashlib.sha256(), []

        def read(record: ImageTextRecord) -> tuple[bytes, Tensor]:
            encoded = record.encoded()
            return encoded.data, self.pixels(encoded.rgb(strict=True))

        with ThreadPoolExecutor() as threads:
            for start in range(0, len(images), self.batch_size):
                found = list(threads.map(read, images[start : start + self.batch_size]))
                for data, _ in found:
                    digest.update(hashlib.sha256(data).digest())
                pooled.append(self._pool_pixels(torch.cat([pixels for _, pixels in found])))
        return torch.cat(pooled), digest.hexdigest()

    def embed_images(self, images: Sequence[ImageTextRecord]) -> tuple[Float[Tensor, "n d"], str]:
        """Embed images in the joint space, with unit norm; see :meth:`pool`."""
        pooled, digest = self.pool(images)
        return self._join(pooled), digest

    def pixels(self, picture: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """What the tower sees of an RGB picture, normalised, float32 on the CPU."""
        return process_images(self.tower.image_processor, [picture], None)

    def embed_pixels(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Pictures of :meth:`pixels` in the joint space, of unit norm, float32 on the CPU."""
        return self._join(self._pool_pixels(pixels))

    @torch.no_grad()
    def _pool_pixels(self, pixels: Tensor) -> Tensor:
        model = self.tower.model
        out: Any = model(pixel_values=pixels.to(model.device, model.dtype))
        return require_finite(out.pooler_output.float().cpu(), "the tower's pooled output")

    @torch.no_grad()
    def _join(self, pooled: Tensor) -> Tensor:
        model = self.tower.model
        embeds = self.project(pooled.to(model.device, model.dtype)).float()
        return F.normalize(require_finite(embeds, "projected images"), dim=-1).cpu()

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Embed texts in the joint space.

        Raises:
            ValueError: The checkpoint has no text side, or it gives NaN or inf.
        """
        if self.texts is None:
            raise ValueError(
                f"the model has no text side ({self.tower.model.config.model_type}), which this "
                "task needs; set `text_encoder` beside an LLM2CLIPModel, or judge a whole CLIP"
            )
        # each once: beside others, a text's embedding may differ by rounding, and ties would go
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embeds = require_finite(self.texts([*rows]), "embeddings of texts")
        return embeds[[rows[text] for text in texts]]


def load_encoder(
    path: str,
    text_encoder: str | TextEncoderSection | None = None,
    *,
    captions: Texts | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> Encoder:
    """Load a checkpoint to evaluate.

    Args:
        path: Directory or hub id of an `LLM2CLIPModel`, a CLIP, a SigLIP, or any vision tower
            (which then has no text side).
        text_encoder: Text encoder of an `LLM2CLIPModel`.
        captions: Stands in its place and looks the captions' embeddings up (stage 2a's cache).
        device: Where the weights go.
        dtype: Dtype of the weights.
        batch_size: Images a forward pass.

    Raises:
        ModelError: No vision tower.
        HandoffError: The model was trained against another text encoder.
        ValueError: Weights of the whole model are missing.
    """
    tower = load_vision_tower(path, dtype)
    tower.model.to(device)  # type: ignore[arg-type]
    hashes = {"model": fingerprint_dir(path) if Path(path).is_dir() else path}
    fields: dict[str, Any] = {"project": nn.Identity()}
    kind = None if read_timm_layout(path) else read_config(path).model_type
    if kind in ("llm2clip", "siglip", "siglip2", *_CLIP):
        model = load_complete(AutoModel, path, dtype=dtype).eval().to(device)
        fields["project"] = getattr(model, "visual_projection", fields["project"])
        if kind != "llm2clip":
            fields |= _own_side(path, model)
        elif text_encoder is not None:
            encoder = _caption_encoder(path, text_encoder, device)
            hashes["text_encoder"] = hash_json([encoder.fingerprint])
            tokens, captions = encoder.tokens, encoder.encode
            fields |= {"captions": captions, "num_cut": lambda: tokens.num_truncated}
        if kind == "llm2clip" and captions is not None:
            fields["texts"] = _through_adaptor(model, captions)
    return Encoder(tower=tower, fingerprints=hashes, batch_size=batch_size, **fields)


def _caption_encoder(path: str, text_encoder: str | TextEncoderSection, device: str) -> TextEncoder:
    named = isinstance(text_encoder, str)
    load: Any = TextEncoder.from_pretrained if named else TextEncoder.from_section
    encoder: TextEncoder = load(text_encoder, device=device)
    if (manifest := read_manifest(Path(path).parent)) is None:
        told = "no manifest.json beside it says which text encoder it was trained against"
        logger.warning("%s: %s; %s is taken", path, told, text_encoder)
        return encoder
    for name, value in encoder.fingerprint.items():
        if (recorded := manifest["fingerprints"].get(f"text_encoder.{name}", value)) != value:
            raise HandoffError(
                f"text_encoder: {name}: {path} was trained against {recorded}, this one has "
                f"{value}; name the text encoder that its captions were cached with"
            )
    return encoder


def _through_adaptor(model: LLM2CLIPModel, captions: Texts) -> Texts:
    @torch.no_grad()
    def texts(items: Sequence[str]) -> Tensor:
        features = captions(items).to(model.device, model.dtype).split(4096)
        return torch.cat([model.get_text_features(part).float().cpu() for part in features])

    return texts


def _own_side(path: str, model: Any) -> dict[str, Any]:
    """The text tower of a CLIP, or of a SigLIP, whose texts are prepared as it was trained.

    SigLIP takes texts padded to the window and in lower case: its tokenizer and that of NaFlex do
    so, but google/siglip2-* of fixed resolution name the one of Gemma (transformers 43101; `lower`
    in big_vision).
    """
    tokenizer = read_tokenizer(path)
    window = int(model.config.text_config.max_position_embeddings)
    clip = model.config.model_type in _CLIP
    if clip:
        check_tokenizer(model, tokenizer)
    names = ("input_ids", "attention_mask") if clip else ("input_ids",)
    options: dict[str, Any] = {"max_length": window, "return_tensors": "pt"}
    # on the right as in training, whatever the tokenizer's side
    options |= {"padding": "longest" if clip else "max_length", "padding_side": "right"}
    cut = 0

    @torch.no_grad()
    def texts(items: Sequence[str]) -> Tensor:
        nonlocal cut
        parts = []
        for start in range(0, len(items), 256):
            part = [text if clip else text.lower() for text in items[start : start + 256]]
            whole = text_ids(tokenizer, part, add_special_tokens=True)
            cut += sum(len(ids) > window for ids in whole)
            ids = text_ids(tokenizer, part, add_special_tokens=True, max_length=window)
            tokens = tokenizer.pad({"input_ids": ids}, **options)
            features = model.get_text_features(**{n: tokens[n].to(model.device) for n in names})
            parts.append(F.normalize(features.pooler_output.float(), dim=-1).cpu())
        return torch.cat(parts)

    return {"texts": texts, "num_cut": lambda: cut}


def require_finite(values: Tensor, name: str) -> Tensor:
    """Refuse NaN and inf, whose comparisons would give a score all the same; returns the rest.

    Args:
        values: What a model made.
        name: What it is called in the message.

    Raises:
        ValueError: There are such values.
    """
    if not values.isfinite().all():
        raise ValueError(f"{name}: NaN or inf; where `dtype` is float16, use bfloat16 or float32")
    return values


def tower_pixels(
    tower: VisionTower, image: Image.Image, size: tuple[int, int]
) -> Float[Tensor, "3 h w"]:
    """Rescale and normalise an image as the tower's processor does, but at any size.

    Args:
        tower: Gives the image processor.
        image: RGB.
        size: Width and height.

    Raises:
        ValueError: The processor does more than resize, crop, rescale and normalise.
    """
    if (table := PixelTable.of(tower.image_processor)) is None:
        kind = type(tower.image_processor).__name__
        raise ValueError(f"{kind}: expected one that rescales and normalises each pixel by itself")
    pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))
    return table(rearrange(pixels, "h w c -> 1 c h w"))[0]


def keep_apart(task: str, train: Iterable[Any], test: Sequence[Any]) -> None:
    """Refuse a test on images that were trained on.

    Args:
        task: Its name, for the message.
        train: Folder and name of each image.
        test: The same.

    Raises:
        ValueError: An image of train is one of test.
    """
    learnt = {*train}
    if both := [image for image in test if image in learnt]:
        raise ValueError(
            f"{task}: {len(both)} of {len(test)} test images are images of train, too, "
            f"{both[0][-1]} among them; keep them apart"
        )
