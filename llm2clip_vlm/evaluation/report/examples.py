"""Examples for a page: what towers retrieve and what VLMs answer, picked by rule, not taste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.dataset import caption_galleries
from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.data.reading.images import EncodedImage, open_image
from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.data.reading.shards import PackedImage
from llm2clip_vlm.evaluation.encoder.encoders import load_encoder
from llm2clip_vlm.evaluation.report.inputs import ReportError
from llm2clip_vlm.evaluation.vlm.samples import load_samples
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, register
from llm2clip_vlm.models.loading import read_config


@dataclass(frozen=True)
class Example:
    """A picture, what was asked of it, and what each model said."""

    picture: Image.Image | None
    """RGB; None where it is not on this machine."""
    asked: str
    """The right caption, or the question."""
    expected: str
    """The right answer; the right caption."""
    found: dict[str, tuple[str, bool]]
    """Model to what it said, and whether that is right."""


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
        ReportError: A model that needs the cache, and there is none.
    """
    register()
    texts, owners = caption_galleries(records)[kind]
    best: dict[str, list[int]] = {}
    for name, folder in models.items():
        if read_config(folder).model_type == LLM2CLIPConfig.model_type and cache is None:
            raise ReportError(f"{folder}: captions need stage 2a's directory; set `cache`")
        encoder = load_encoder(str(folder), captions=cache.lookup if cache else None)
        images, _ = encoder.embed_images(records[:count])
        best[name] = (images @ encoder.embed_texts(texts).T).argmax(dim=1).tolist()
    examples = []
    for number, record in enumerate(records[:count]):
        right = [text for text, owner in zip(texts, owners, strict=True) if owner == number]
        found = {name: texts[rows[number]] for name, rows in best.items()}
        marked = {name: (text, text in right) for name, text in found.items()}
        examples.append(Example(record.open(), right[0], right[0], marked))
    return examples


def answered_questions(samples: Mapping[str, Path], data_file: Path, count: int) -> list[Example]:
    """What the models answered to the first question of each type, one picture each.

    Args:
        samples: Model to its `<task>.samples.jsonl`.
        data_file: The task's rows (`id`, `image`); pictures are relative to its folder.
        count: At most so many questions.

    Returns:
        An example a question.

    Raises:
        ReportError: The models answered other questions, or other ones than the file's.
    """
    by_doc = {name: {s["doc_id"]: s for s in load_samples(path)} for name, path in samples.items()}
    chosen: list[dict[str, Any]] = []
    for sample in next(iter(by_doc.values())).values():
        seen = {s["image_id"] for s in chosen} | {s["type"] for s in chosen}
        if len(chosen) < count and not {sample["image_id"], sample["type"]} & seen:
            chosen.append(sample)
    pictures = sample_pictures(data_file, chosen)
    examples = []
    for sample in chosen:
        said = {name: rows.get(sample["doc_id"], {}) for name, rows in by_doc.items()}
        asked = {row.get("question") for row in said.values()}
        if asked != {sample["question"]} or sample["doc_id"] not in pictures:
            raise ReportError(
                f"{', '.join(map(str, samples.values()))}: document {sample['doc_id']}: expected "
                f"the question {sample['question']!r} of {data_file}; evaluate again on this data"
            )
        examples.append(
            Example(
                pictures[sample["doc_id"]],
                sample["question"],
                str(sample["target"]),
                {name: (str(row["answer"]), row["correct"] == 1.0) for name, row in said.items()},
            )
        )
    return examples


def sample_pictures(
    data_file: Path | None, samples: Sequence[Mapping[str, Any]]
) -> dict[int, Image.Image]:
    """Pictures of samples, from the file that their task read.

    Args:
        data_file: Its rows are known by `id`, or by place and question; `image` is a path below
            the file's folder, or bytes in a table. None, or a file that is not there = no pictures.
        samples: From :func:`~llm2clip_vlm.metrics.statistics.load_samples`.

    Returns:
        `doc_id` to picture, without those that the file does not have.

    Raises:
        ImageError: A picture that is not there or does not decode.
    """
    if data_file is None or not data_file.is_file():
        return {}
    by_id = {str(s["id"]): s["doc_id"] for s in samples if s["id"] is not None}
    by_place = {(s["doc_id"], s["question"]): s["doc_id"] for s in samples if s["id"] is None}
    found: dict[int, Image.Image] = {}
    for place, row in enumerate(iter_rows(data_file)):
        doc = by_id.get(str(row.get("id")), by_place.get((place, row.get("question"))))
        image = row.get("image")
        if doc is not None and isinstance(image, str):
            found[doc] = open_image(data_file.parent, image)
        elif doc is not None and isinstance(image, PackedImage):
            found[doc] = EncodedImage(image.read(), f"row {place} of {data_file}").rgb()
    return found
