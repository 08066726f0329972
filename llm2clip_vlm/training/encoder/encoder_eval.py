"""Images of contrastive training, and what is measured on held-out ones: retrieval, zero-shot.

The processes of a run share the encoding; all of them then hold the same results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_vlm.data.image_text.dataset import (
    ImageTextDataset,
    PictureFeatures,
    TextInputs,
    caption_galleries,
)
from llm2clip_vlm.data.image_text.index import ImageTextRecord, read_image_text, read_sources
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.distributed import shared_out
from llm2clip_vlm.metrics.retrieval import recall_at_k, retrieval_report
from llm2clip_vlm.metrics.zero_shot import class_embeds, class_prompts, one_label
from llm2clip_vlm.recipe.base import ImageTextSource, ZeroShotSource
from llm2clip_vlm.recipe.encoder import EncoderRecipe

Encode = Callable[[Any], Tensor]
"""`pixel_values`, or a list of captions, to unit-norm embeddings."""

_BATCH, _LOOKED_AT = 256, 1000

logger = logging.getLogger(__name__)


def training_images(
    recipe: EncoderRecipe,
    image_processor: Any,
    bad: BadRecords,
    text_inputs: TextInputs | None,
    *,
    captions_per_image: int = 1,
    features: PictureFeatures | None = None,
    first: Callable[[ImageTextDataset], None] | None = None,
) -> ImageTextDataset:
    """Read a recipe's training pairs.

    Args:
        recipe: Gives `train` and what is done to images and captions.
        image_processor: Image processor of the tower.
        bad: Takes what cannot be used.
        text_inputs: Captions to the model's text arguments. None: the training process does this.
        captions_per_image: Captions of an image in a batch.
        features: Patch features of a frozen tower. None: the dataset gives pictures.
        first: Looks at the captions before any picture is opened. None: nothing does.
    """
    records = read_sources(recipe.train, bad)
    first_ones = records[:_LOOKED_AT]
    if again := len(first_ones) - len({(one.root, one.image) for one in first_ones}):
        logger.warning(
            "train: %d of the first %d records name a picture that another of them names: in one "
            "batch their captions are each other's negatives; make one record of all captions of "
            "a picture (`group_by`)",
            *(again, len(first_ones)),
        )
    return ImageTextDataset(
        records,
        image_processor,
        recipe.caption_weights,
        recipe.seed,
        text_inputs,
        bad=bad,
        captions_per_image=captions_per_image,
        augmentation=recipe.augmentation,
        fast=recipe.image_decoding == "fast",
        features=features,
        first=first,
    )


class HeldOut:
    """A recipe's held-out images, small sets decoded once.

    Args:
        recipe: Gives `evaluation` and `zero_shot`.
        image_processor: Image processor of the tower.
        bad: Takes what cannot be used, also images that fail while they are encoded.
        features: Features of a frozen tower, which `encode_images` gets instead of `pixel_values`.
    """

    def __init__(
        self,
        recipe: EncoderRecipe,
        image_processor: Any,
        bad: BadRecords,
        features: PictureFeatures | None = None,
    ) -> None:
        def read(source: ImageTextSource) -> ImageTextDataset:
            records = read_image_text(source, bad)
            return ImageTextDataset(records, image_processor, bad=bad, features=features)

        self._bad = bad
        self._retrieval = {name: read(s) for name, s in _named(recipe.evaluation)}
        self._zero_shot = {name: (s, read(s)) for name, s in _named(recipe.zero_shot)}
        self.texts()  # refuses at once what no evaluation could use

    def texts(self) -> list[str]:
        """All texts that will be encoded, each once."""
        texts = [t for d in self._retrieval.values() for r in d.records for t in _captions(r)]
        for source, dataset in self._zero_shot.values():
            texts += prompts_of(dataset.records, source)
        return list(dict.fromkeys(texts))

    @torch.no_grad()
    def __call__(self, encode_images: Encode, encode_texts: Encode) -> dict[str, Any]:
        """Measure. Call it on all ranks.

        Args:
            encode_images: `pixel_values` to unit-norm embeddings.
            encode_texts: Captions to unit-norm embeddings.

        Returns:
            `retrieval`: caption kind (with its source's name where there are several) to its
            `retrieval_report`; `zero_shot`, if asked for: `top1` in %, of each source.
        """
        results: dict[str, Any] = {"retrieval": {}}
        for name, dataset in self._retrieval.items():
            images, records = self._images(dataset, encode_images)
            pictures, galleries = caption_galleries(records)
            texts = {kind: _texts(texts, encode_texts) for kind, (texts, _) in galleries.items()}
            owners = {kind: own for kind, (_, own) in galleries.items()}
            found = retrieval_report(images[pictures], texts, owners)
            results["retrieval"] |= {f"{name}{kind}": values for kind, values in found.items()}
        for name, (source, dataset) in self._zero_shot.items():
            images, records = self._images(dataset, encode_images)
            labels, names = _labels(records), _classes(dataset.records)
            classes = class_embeds(lambda t: _texts(t, encode_texts), names, source.templates)
            wanted = [names.index(label) for label in labels]
            top1 = recall_at_k(images, classes, wanted, 1, bootstrap=0).recall[1]
            row = {"top1": top1, "images": len(labels), "classes": len(names)}
            results.setdefault("zero_shot", {})[name.rstrip("/") or source.fields[0]] = row
        return results

    def _images(
        self, dataset: ImageTextDataset, encode: Encode
    ) -> tuple[Tensor, list[ImageTextRecord]]:
        """Embeddings of the images that can be read, and their records."""

        def embed(rows: range) -> tuple[list[int], Tensor | None]:
            good, pixels = dataset.readable(rows, self._bad)
            return good, None if pixels is None else encode(pixels).float().cpu()

        parts = shared_out(list(_spans(len(dataset))), embed)
        embeds = torch.cat([part for _, part in parts if part is not None])
        return embeds, [dataset.records[row] for rows, _ in parts for row in rows]


def _texts(texts: Sequence[str], encode: Encode) -> Tensor:
    parts = [list(texts[span.start : span.stop]) for span in _spans(len(texts))]
    return torch.cat(shared_out(parts, lambda part: encode(part).float().cpu()))


def _spans(total: int) -> Iterator[range]:
    return (range(start, min(start + _BATCH, total)) for start in range(0, total, _BATCH))


def _named(sources: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Sources with the prefix of their results: empty for a single one, else their file's stem."""
    for number, source in enumerate(sources):
        stem = Path(source.title).stem
        again = stem in [Path(other.title).stem for other in sources[:number]]
        yield "" if len(sources) == 1 else f"{stem}{f'-{number}' if again else ''}/", source


def _labels(records: Iterable[ImageTextRecord]) -> list[str]:
    return [one_label(record.captions, record.where) for record in records]


def _classes(records: Iterable[ImageTextRecord]) -> list[str]:
    return sorted(set(_labels(records)))


def _captions(record: ImageTextRecord) -> list[str]:
    return list(chain.from_iterable(record.captions.values()))


def prompts_of(records: Iterable[ImageTextRecord], source: ZeroShotSource) -> list[str]:
    """The prompts of all classes, those of a class one after the other.

    Args:
        records: Labelled images.
        source: Where they are from.
    """
    return class_prompts(_classes(records), source.templates)


def logged(results: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for the log of :class:`HeldOut`'s results, by names such as `long_i2t_r1`."""
    found = {
        f"{kind}_{way}_r1": values[way]["r1"]
        for kind, values in results["retrieval"].items()
        for way in ("i2t", "t2i")
    }
    accuracies = results.get("zero_shot", {}).items()
    return found | {f"{name}_zero_shot": row["top1"] for name, row in accuracies}
