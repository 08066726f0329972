"""Retrieval on held-out pairs after contrastive training, one caption kind at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from llm2clip_vlm.config import ImageTextSource
from llm2clip_vlm.data.image_text import (
    ImageTextDataset,
    ImageTextRecord,
    ImageTextRecords,
    caption_galleries,
    read_image_text,
)
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.models.clip import ClipTokens
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel

T = TypeVar("T")
Encoder = Callable[[T], Tensor]
"""Images (`pixel_values`) or captions to unit-norm embeddings."""

Report = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Any]]
"""`retrieval_report(image_embeds, text_embeds_by_key, text_to_image_by_key)`."""


def read_held_out(
    sources: Sequence[ImageTextSource], bad: BadRecords
) -> dict[str, ImageTextRecords]:
    """Records of each evaluation source, apart.

    Args:
        sources: A recipe's `evaluation`.
        bad: Takes unusable rows.

    Returns:
        Prefix of the result's keys to records: `""` for a single source, else its file's stem.
    """
    held_out: dict[str, ImageTextRecords] = {}
    for number, source in enumerate(sources):
        prefix = "" if len(sources) == 1 else f"{Path(source.path).stem}/"
        if prefix in held_out:
            prefix = f"{Path(source.path).stem}-{number}/"
        held_out[prefix] = read_image_text(source, bad)
    return held_out


@torch.no_grad()
def evaluate_retrieval(
    held_out: Mapping[str, Sequence[ImageTextRecord]],
    image_processor: Any,
    encode_images: Encoder[Tensor],
    encode_texts: Encoder[list[str]],
    report: Report,
    *,
    bad: BadRecords,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Retrieval metrics of each kind of caption.

    Args:
        held_out: As :func:`read_held_out` returns it.
        image_processor: The tower's.
        encode_images: `pixel_values` to unit-norm embeddings.
        encode_texts: Captions to unit-norm embeddings.
        report: Embeddings to metrics; the stage passes it in.
        bad: Takes images that cannot be read.
        batch_size: Images or captions at a time.

    Returns:
        Caption kind (with its source's prefix) to what `report` says of it.
    """
    results: dict[str, Any] = {}
    for prefix, records in held_out.items():
        dataset = ImageTextDataset(records, image_processor, bad=bad)
        image_embeds = torch.cat(
            [
                encode_images(dataset.pixel_values(range(start, stop))).float().cpu()
                for start, stop in _spans(len(dataset), batch_size)
            ]
        )
        galleries = caption_galleries(dataset.records)
        text_embeds = {
            kind: torch.cat(
                [
                    encode_texts(texts[start:stop]).float().cpu()
                    for start, stop in _spans(len(texts), batch_size)
                ]
            )
            for kind, (texts, _) in galleries.items()
        }
        owners = {kind: torch.tensor(images) for kind, (_, images) in galleries.items()}
        found = report(image_embeds, text_embeds, owners)
        results |= {f"{prefix}{kind}": values for kind, values in found.items()}
    return results


def llm2clip_encoders(
    model: LLM2CLIPModel, lookup: Callable[[list[str]], Tensor]
) -> tuple[Encoder[Tensor], Encoder[list[str]]]:
    """How a trained `LLM2CLIPModel` embeds images and captions.

    Args:
        model: On its device.
        lookup: Captions to the text encoder's embeddings (stage 2a's cache).

    Returns:
        `encode_images` and `encode_texts` for :func:`evaluate_retrieval`.
    """
    return (
        lambda pixels: model.get_image_features(pixels.to(model.device)),
        lambda texts: model.get_text_features(lookup(texts).to(model.device)),
    )


def clip_encoders(
    model: CLIPModel, tokens: ClipTokens
) -> tuple[Encoder[Tensor], Encoder[list[str]]]:
    """How an ordinary CLIP embeds images and captions.

    Args:
        model: On its device.
        tokens: Captions to its text tower's arguments.

    Returns:
        `encode_images` and `encode_texts` for :func:`evaluate_retrieval`.
    """

    def encode_images(pixels: Tensor) -> Tensor:
        features = model.get_image_features(pixel_values=pixels.to(model.device))
        return F.normalize(features.pooler_output, dim=-1)

    def encode_texts(texts: list[str]) -> Tensor:
        inputs = {name: values.to(model.device) for name, values in tokens(texts).items()}
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    return encode_images, encode_texts


def _spans(total: int, size: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))
