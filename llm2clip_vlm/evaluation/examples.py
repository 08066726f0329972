"""Examples for a report: what towers retrieve and what VLMs answer, picked by rule, not taste."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.data.image_text import ImageTextRecord, caption_galleries
from llm2clip_vlm.data.images import open_image
from llm2clip_vlm.data.records import iter_rows
from llm2clip_vlm.evaluation.report_inputs import ReportError
from llm2clip_vlm.evaluation.stats import load_samples

THUMBNAIL_PX = 192
"""Longest side of a picture in a report."""

_BATCH = 256

Encoders = tuple[Callable[[list[Image.Image]], Tensor], Callable[[list[str]], Tensor]]


@dataclass(frozen=True)
class Example:
    """A picture, what was asked of it, and what each model said."""

    picture: Image.Image
    """RGB."""
    asked: str
    """The right caption, or the question."""
    expected: str
    """The right answer; the right caption."""
    found: dict[str, tuple[str, bool]]
    """Model to what it said, and whether that is right."""


@torch.no_grad()
def retrieved_captions(
    models: Mapping[str, Path],
    records: Sequence[ImageTextRecord],
    kind: str,
    count: int,
    cache: EmbeddingCache | None,
) -> list[Example]:
    """The caption that each model ranks first for the first pictures.

    Args:
        models: Name to the directory of an `LLM2CLIPModel` or a `CLIPModel`.
        records: The held-out set; the captions of all of it are the gallery.
        kind: Kind of caption.
        count: The first so many pictures.
        cache: Embeddings of the captions, for an `LLM2CLIPModel`.

    Returns:
        An example a picture.

    Raises:
        ReportError: A model of another type, or one that needs the cache and there is none.
    """
    galleries = caption_galleries(records[:count])
    if kind not in galleries:
        raise ReportError(f"captions: expected the kind {kind!r}, got {sorted(galleries)}")
    texts, owners = caption_galleries(records)[kind]
    pictures = [record.open() for record in records[:count]]
    best: dict[str, list[int]] = {}
    for name, folder in models.items():
        encode_images, encode_texts = _encoders(folder, cache)
        parts = [encode_texts(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)]
        best[name] = (encode_images(pictures) @ torch.cat(parts).T).argmax(dim=1).tolist()
    examples = []
    for number, picture in enumerate(pictures):
        right = [text for text, owner in zip(texts, owners, strict=True) if owner == number]
        found = {name: texts[rows[number]] for name, rows in best.items()}
        marked = {name: (text, text in right) for name, text in found.items()}
        examples.append(
            Example(picture, right[0] if right else "", right[0] if right else "", marked)
        )
    return examples


def _encoders(folder: Path, cache: EmbeddingCache | None) -> Encoders:
    """Functions that make unit-norm embeddings of pictures and of captions."""
    if not (folder / "config.json").is_file():
        raise ReportError(f"{folder}: expected a model directory, found no config.json")
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    loaders = {"llm2clip": _llm2clip, "clip": _clip}
    if model_type not in loaders:
        raise ReportError(f"{folder}: model_type: expected {list(loaders)}, got {model_type!r}")
    return loaders[model_type](folder, cache)


def _llm2clip(folder: Path, cache: EmbeddingCache | None) -> Encoders:
    from transformers import AutoImageProcessor

    from llm2clip_vlm.models.llm2clip import LLM2CLIPModel

    if cache is None:
        raise ReportError(f"{folder}: captions need stage 2a's directory; set `cache`")
    model = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def images(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixels)

    return images, lambda texts: model.get_text_features(cache.lookup(texts))


def _clip(folder: Path, cache: EmbeddingCache | None) -> Encoders:
    from llm2clip_vlm.models.clip import ClipTokens, load_clip

    model, tokenizer, processor = load_clip(str(folder))
    model.eval()
    tokens = ClipTokens(tokenizer)

    def images(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def texts(captions: list[str]) -> Tensor:
        return F.normalize(model.get_text_features(**tokens(captions)).pooler_output, dim=-1)

    return images, texts


def answered_questions(samples: Mapping[str, Path], data_file: Path, count: int) -> list[Example]:
    """What the models answered to the first question of each type, one picture each.

    Args:
        samples: Model to its `<task>.samples.jsonl`.
        data_file: The task's rows (`id`, `image`); pictures are relative to its folder.
        count: At most so many questions.

    Returns:
        An example a question.

    Raises:
        ReportError: The samples are of other rows than the file's.
    """
    images = {str(row["id"]): str(row["image"]) for row in iter_rows(data_file)}
    loaded = {name: load_samples(path) for name, path in samples.items()}
    by_doc = {name: {s["doc_id"]: s for s in rows} for name, rows in loaded.items()}
    examples: list[Example] = []
    pictures, kinds = set(), set()
    for sample in next(iter(loaded.values())):
        if len(examples) == count or sample["image_id"] in pictures or sample["type"] in kinds:
            continue
        said: dict[str, tuple[str, bool]] = {}
        for name, rows in by_doc.items():
            other: dict[str, Any] = rows.get(sample["doc_id"], {})
            if str(sample["id"]) not in images or other.get("question") != sample["question"]:
                raise ReportError(
                    f"{samples[name]}: document {sample['doc_id']}: expected the question "
                    f"{sample['question']!r} of {data_file}; evaluate again on this data"
                )
            said[name] = (str(other["answer"]), other["correct"] == 1.0)
        pictures.add(sample["image_id"])
        kinds.add(sample["type"])
        picture = open_image(data_file.parent, images[str(sample["id"])])
        examples.append(Example(picture, sample["question"], str(sample["target"]), said))
    return examples


def data_uri(picture: Image.Image) -> str:
    """A picture inside a page: PNG where it is small, else a JPEG of :data:`THUMBNAIL_PX`."""
    small = max(picture.size) <= THUMBNAIL_PX
    if not small:
        picture = picture.copy()
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
