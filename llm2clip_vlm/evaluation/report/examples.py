"""Examples for a page: what towers retrieve and what VLMs answer, picked by rule, not taste."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from llm2clip_vlm.evaluation.vlm.samples import PIXELS
from llm2clip_vlm.evaluation.vlm.task_helpers import pixel_hash
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, register
from llm2clip_vlm.models.loading import read_config

Samples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model to its answers, from :func:`~llm2clip_vlm.evaluation.vlm.samples.load_samples`."""


@dataclass(frozen=True)
class Example:
    """A picture, what was asked of it, and what each model said."""

    picture: Image.Image | None
    """RGB. None: not on this machine."""
    asked: str
    """The right caption, or the question."""
    expected: str
    """The right answer; the right caption."""
    found: Mapping[str, tuple[str, float | None]]
    """Model to what it said, and its score from 0 to 1, of which only 1 is right; None: it has
    no score alone."""


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
    pictures, galleries = caption_galleries(records)
    shown, (texts, owners) = [records[position] for position in pictures[:count]], galleries[kind]
    best: dict[str, list[int]] = {}
    for name, folder in models.items():
        if read_config(folder).model_type == LLM2CLIPConfig.model_type and cache is None:
            raise ReportError(f"{folder}: captions need stage 2a's directory; set `cache`")
        encoder = load_encoder(str(folder), captions=cache.lookup if cache else None)
        images, _ = encoder.embed_images(shown)
        best[name] = (images @ encoder.embed_texts(texts).T).argmax(dim=1).tolist()
    examples = []
    for number, record in enumerate(shown):
        right = [text for text, owner in zip(texts, owners, strict=True) if owner == number]
        found = {name: texts[rows[number]] for name, rows in best.items()}
        marked = {name: (text, float(text in right)) for name, text in found.items()}
        examples.append(Example(record.open(), right[0], right[0], marked))
    return examples


def answered_questions(samples: Samples, data_file: Path, count: int) -> list[Example]:
    """What the models answered to the first question of each type, one picture each.

    Args:
        samples: Model to its answers.
        data_file: The task's rows (`id`, `image`); pictures are relative to its folder.
        count: At most so many questions.

    Returns:
        An example a question.

    Raises:
        ReportError: The models answered other questions, or other ones than the file's.
    """
    by_doc = {name: {s["doc_id"]: s for s in found} for name, found in samples.items()}
    chosen: list[Mapping[str, Any]] = []
    for sample in next(iter(samples.values())):
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
                f"{', '.join(samples)}: document {sample['doc_id']}: expected the question "
                f"{sample['question']!r} of {data_file}; evaluate again on this data"
            )
        examples.append(_answered(pictures[sample["doc_id"]], said))
    return examples


def one_photograph(
    retrieved: Sequence[Example], tasks: Iterable[Samples]
) -> tuple[Example, Example] | None:
    """The first photograph that towers found captions for and VLMs were asked about.

    Args:
        retrieved: Result of :func:`retrieved_captions`.
        tasks: Answers of each task, the preferred one first; pictures are known by their pixels.

    Returns:
        What the towers found and what the VLMs answered. None: they share no photograph.
    """
    known = {f"{PIXELS}{pixel_hash([e.picture])}": e for e in retrieved if e.picture}
    for samples in tasks:
        for sample in next(iter(samples.values())):
            if example := known.get(str(sample["image_id"])):
                doc = sample["doc_id"]
                rows = {name: [s for s in of if s["doc_id"] == doc] for name, of in samples.items()}
                said = {name: found[0] for name, found in rows.items() if found}
                answered = _answered(example.picture, said)
                if sample["correct"] is None:  # a caption, judged among all, without its target
                    answered = replace(answered, expected=example.expected)
                return example, answered
    return None


def _answered(picture: Image.Image | None, said: Mapping[str, Mapping[str, Any]]) -> Example:
    """What several models answered to one question."""
    first = next(iter(said.values()))
    found = {name: (str(row["answer"]), row["correct"]) for name, row in said.items()}
    return Example(picture, first["question"], str(first["target"]), found)


def sample_pictures(
    data_file: Path | None, samples: Sequence[Mapping[str, Any]]
) -> dict[int, Image.Image | None]:
    """Pictures of samples, from the file that their task read.

    Args:
        data_file: Its rows are known by `id`, or by place and question; `image` is a path below
            the file's folder, or bytes in a table. None: no pictures, as without the file.
        samples: Their answers.

    Returns:
        `doc_id` to picture, without those that the file does not have. None: not the picture that
        was seen, as where the task leaves out rows, or ids repeat.

    Raises:
        ImageError: A picture that is not there or does not decode.
    """
    if data_file is None or not data_file.is_file():
        return {}
    by_id = {str(s["id"]): s["doc_id"] for s in samples if s["id"] is not None}
    by_place = {(s["doc_id"], s["question"]): s["doc_id"] for s in samples if s["id"] is None}
    found: dict[int, Image.Image | None] = {}
    for place, row in enumerate(iter_rows(data_file)):
        doc = by_id.get(str(row.get("id")), by_place.get((place, row.get("question"))))
        image = row.get("image")
        if doc is not None and isinstance(image, str):
            found[doc] = open_image(data_file.parent, image)
        elif doc is not None and isinstance(image, PackedImage):
            found[doc] = EncodedImage(image.read(), f"row {place} of {data_file}").rgb()
    for sample in samples:
        picture, seen = found.get(sample["doc_id"]), str(sample.get("image_id"))
        if picture and seen.startswith(PIXELS) and seen != f"{PIXELS}{pixel_hash([picture])}":
            found[sample["doc_id"]] = None
    return found
