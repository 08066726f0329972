"""Images with captions: sources as one set, a dataset that draws captions, retrieval galleries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip_vlm.config import AugmentationSection, ImageTextSource
from llm2clip_vlm.data.caption_draw import (
    caption_id,
    draw,
    draw_one,
    draw_several,
    weighted_captions,
)
from llm2clip_vlm.data.image_text_index import (
    ImageTextRecord,
    ImageTextRecords,
    read_image_text,
)
from llm2clip_vlm.data.images import ImageError
from llm2clip_vlm.data.pixels import Geometry, PixelTable, TrainingPixels, process_images
from llm2clip_vlm.data.records import BadRecords, RecordError

__all__ = [
    "ImageTextDataset",
    "ImageTextRecord",
    "ImageTextRecords",
    "TextInputs",
    "caption_galleries",
    "caption_id",
    "collate",
    "draw",
    "read_image_text",
    "read_sources",
]

logger = logging.getLogger(__name__)

CACHE_LIMIT_BYTES = 256 * 2**20
"""Processed images of a whole set are kept in memory below this size (`cache_in_memory=None`)."""

_CHUNK = 256

TextInputs = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions of a batch to the model's text arguments (cached embeddings, or token ids)."""


def read_sources(sources: Sequence[ImageTextSource], bad: BadRecords) -> ImageTextRecords:
    """Read several sources, one after the other, as one set.

    Args:
        sources: A recipe's `train`.
        bad: Takes unusable rows.

    Returns:
        All records; keys are unique within a source.

    Raises:
        ValueError: A source has a `weight`: every image is seen once an epoch.
    """
    if weighted := [source.path for source in sources if source.weight != 1.0]:
        raise ValueError(
            f"train: `weight` of {weighted}: image-text sources take none, every image is seen "
            "once an epoch; leave it out, and shorten the larger source with `limit`"
        )
    return ImageTextRecords([read_image_text(source, bad) for source in sources])


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images with captions, drawn anew every epoch.

    Which caption an image gets depends on `(seed, epoch, index)` alone, so neither the number of
    workers or processes nor a resume changes it. Small sets are decoded once and kept as 8-bit
    pixels; rescaling and normalising then happens for a whole batch, with the same result to the
    bit as the image processor's. Larger sets are decoded as they are asked for; a bad image is then
    found when it is met, and counted once, and the next record stands in for it.

    Args:
        records: As :func:`read_sources` or :func:`read_image_text` returns them, or a list.
        image_processor: A transformers image processor.
        caption_weights: Probability weight of each kind of caption; a kind that is not named is
            not drawn, and within a kind all captions are equally likely. Empty = uniform over all
            captions of an image.
        seed: Of the draws.
        text_inputs: Captions to the model's text arguments; none = batches hold captions only.
        bad: Takes images that cannot be used.
        cache_in_memory: None = where all images take less than `CACHE_LIMIT_BYTES` and nothing is
            done to them at random.
        captions_per_image: Captions of an image that a batch holds one after the other; different
            ones where it has so many.
        augmentation: Random crop and mirroring, of training alone.
        fast: Decode and resize by :class:`TrainingPixels` what is not held in memory; otherwise
            as the image processor does, to the bit.
        as_uint8: Batches hold 8-bit pixels, a quarter of the bytes, for :meth:`to_float`.
        show_progress: A progress bar while images are decoded up front.

    Raises:
        ValueError: No record, a weighted kind that no record has, too many bad images, or an
            augmentation beside an image processor whose resizing is not known.
    """

    def __init__(
        self,
        records: Sequence[ImageTextRecord],
        image_processor: Any,
        caption_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        text_inputs: TextInputs | None = None,
        *,
        bad: BadRecords | None = None,
        cache_in_memory: bool | None = None,
        captions_per_image: int = 1,
        augmentation: AugmentationSection | None = None,
        fast: bool = False,
        as_uint8: bool = False,
        show_progress: bool = False,
    ) -> None:
        self.bad = BadRecords() if bad is None else bad
        self.caption_weights = dict(caption_weights or {})
        self.records = _with_weight(records, self.caption_weights, self.bad)
        self.image_processor = image_processor
        self.seed = seed
        self.text_inputs = text_inputs
        self.captions_per_image = captions_per_image
        self.as_uint8 = as_uint8
        # shared memory, so that workers which outlive an epoch see the next one's number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()
        self._pixels: Tensor | None = None
        self._to_float: PixelTable | None = None
        self._training: TrainingPixels | None = None
        augmentation = augmentation or AugmentationSection()
        augments = augmentation != AugmentationSection()
        if cache_in_memory is not False and not augments:
            self._decode_all(forced=cache_in_memory is True, show_progress=show_progress)
        if self._pixels is None and (fast or augments):
            self._training = self._fast_decoder(augmentation, scaled=fast)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def epoch(self) -> int:
        """The epoch whose captions are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the captions of this epoch from now on, in running workers too.

        Args:
            epoch: Counted from 0.
        """
        self._epoch.fill_(epoch)

    def caption(self, index: int) -> str:
        """The (first) caption that image `index` has in the current epoch."""
        return self._draw(self.records[index], index)[0]

    def captions(self) -> list[str]:
        """All captions that can be drawn, each once, in order of first appearance."""
        return list(
            dict.fromkeys(
                text
                for record in self.records
                for text in weighted_captions(record.captions, self.caption_weights)[0]
            )
        )

    def pixel_values(self, indices: Sequence[int]) -> Tensor:
        """Images as the image processor makes them, to the bit; for evaluation.

        Args:
            indices: Positions in `records`.

        Returns:
            `[n, 3, h, w]` fp32.

        Raises:
            ImageError: An image does not decode (only where images are not in memory).
        """
        if self._pixels is None:
            images = [self.records[index].open() for index in indices]
            return process_images(self.image_processor, images, None)
        return self.to_float(self._pixels[torch.as_tensor(indices)])

    def to_float(self, pixels: Tensor) -> Tensor:
        """What the model takes, on the pixels' device: 8-bit pixels rescaled and normalised.

        Args:
            pixels: `[n, 3, h, w]`; what is no uint8 is returned as it is.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        assert self._to_float is not None
        return self._to_float(pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image with its first caption."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once (torch's loader asks for it this way).

        Returns:
            `pixel_values`, `caption_ids` `[n * captions_per_image]` int64 and what `text_inputs`
            gives; `captions`, a list of strings, where there is none.
        """
        indices = list(indices)
        if self._pixels is None:
            records, loaded = [], []
            for place, index in enumerate(indices):
                indices[place], record, image = self._load_or_next(index)
                records.append(record)
                loaded.append(image)
            pixels = self._processed(loaded)
        else:
            records = [self.records[index] for index in indices]
            pixels = self._pixels[torch.as_tensor(indices)]
        texts = [
            text
            for record, index in zip(records, indices, strict=True)
            for text in self._draw(record, index)
        ]
        batch: dict[str, Any] = {
            "pixel_values": pixels if self.as_uint8 else self.to_float(pixels),
            "caption_ids": torch.tensor([caption_id(text) for text in texts]),
        }
        return batch | (dict(self.text_inputs(texts)) if self.text_inputs else {"captions": texts})

    def _draw(self, record: ImageTextRecord, index: int) -> list[str]:
        """An image's captions in the current epoch."""
        texts, shares = weighted_captions(record.captions, self.caption_weights)
        if self.captions_per_image == 1:
            return [draw_one(texts, shares, draw(self.seed, self.epoch, index))]
        return draw_several(
            texts, shares, self.captions_per_image, self.seed ^ record.identity, self.epoch
        )

    def _load_or_next(self, index: int) -> tuple[int, ImageTextRecord, Any]:
        """`index`, its record and image, or where that does not decode the next one that does.

        If both meet in one batch, their caption is equal, so they are no negatives.
        """
        for step in range(len(self.records)):
            candidate = (index + step) % len(self.records)
            if self._unreadable[candidate]:
                continue
            record = self.records[candidate]
            try:
                if self._training is None:
                    return candidate, record, record.open()
                pixels = self._training(record.encoded(), record.identity, self.epoch)
                return candidate, record, pixels
            except ImageError as error:
                self._unreadable[candidate] = True
                self.bad.add(record.where, str(error))
        raise RecordError("no image of the set can be read")

    def _processed(self, images: list[Any]) -> Tensor:
        if self._training is not None:
            return torch.stack(images)
        return process_images(self.image_processor, images, None)

    def _fast_decoder(
        self, augmentation: AugmentationSection, *, scaled: bool
    ) -> TrainingPixels | None:
        geometry, table = Geometry.of(self.image_processor), PixelTable.of(self.image_processor)
        if geometry is not None and table is not None:
            self._to_float = table
            return TrainingPixels(geometry, augmentation, self.seed, scaled=scaled)
        name = type(self.image_processor).__name__
        if augmentation != AugmentationSection():
            raise ValueError(
                f"augmentation: {name} does more than resize and crop, so where a random crop "
                "belongs is not known; leave `augmentation` out, or use another image processor"
            )
        logger.info("%s does more than resize and crop: pictures are decoded exactly", name)
        return None

    def _decode_all(self, *, forced: bool, show_progress: bool) -> None:
        from tqdm import tqdm

        if not forced and not self._fits_in_memory():
            return
        to_float = PixelTable.of(self.image_processor)
        kept: list[int] = []
        chunks: list[Tensor] = []
        with tqdm(
            total=len(self.records), desc="decode images", unit="img", disable=not show_progress
        ) as bar:
            for start in range(0, len(self.records), _CHUNK):
                images: list[Image.Image] = []
                for index in range(start, min(start + _CHUNK, len(self.records))):
                    record = self.records[index]
                    try:
                        images.append(record.open())
                    except ImageError as error:
                        self.bad.add(record.where, str(error))
                        continue
                    kept.append(index)
                bar.update(min(_CHUNK, len(self.records) - start))
                if not images:
                    continue
                if not chunks and to_float and not to_float.is_exact(images):
                    to_float = None
                chunks.append(process_images(self.image_processor, images, to_float))
        if not kept:
            raise RecordError(f"none of the {len(self.records)} images can be read")
        self.records = self.records.take(kept)
        self._pixels, self._to_float = torch.cat(chunks), to_float

    def _fits_in_memory(self) -> bool:
        """Whether all processed images do, judged by the first that can be read."""
        for record in self.records:
            try:
                image = process_images(
                    self.image_processor, [record.open()], PixelTable.of(self.image_processor)
                )
            except ImageError:  # counted when it is its turn
                continue
            fits = image.numel() * image.element_size() * len(self.records) < CACHE_LIMIT_BYTES
            if not fits:
                logger.info("%d images are decoded as needed", len(self.records))
            return fits
        raise RecordError(f"none of the {len(self.records)} images can be read")


def collate(samples: Any) -> dict[str, Any]:
    """Collator of :class:`ImageTextDataset`: batches pass through, lists of samples are stacked.

    Args:
        samples: A batch from `__getitems__`, or samples from `__getitem__`.

    Returns:
        The batch.
    """
    if isinstance(samples, dict):
        return samples
    return {
        name: torch.stack([s[name] for s in samples])
        if isinstance(samples[0][name], Tensor)
        else [s[name] for s in samples]
        for name in samples[0]
    }


def caption_galleries(
    records: Sequence[ImageTextRecord],
) -> dict[str, tuple[list[str], list[int]]]:
    """Captions of each kind, and the image that each belongs to, for retrieval.

    Args:
        records: Held-out records.

    Returns:
        Kind to (captions, positions in `records`).
    """
    galleries: dict[str, tuple[list[str], list[int]]] = {}
    for position, record in enumerate(records):
        for kind, texts in record.captions.items():
            captions, owners = galleries.setdefault(kind, ([], []))
            captions.extend(texts)
            owners.extend([position] * len(texts))
    return galleries


def _with_weight(
    records: Sequence[ImageTextRecord], weights: Mapping[str, float], bad: BadRecords
) -> ImageTextRecords:
    """The records with a caption that can be drawn."""
    if not records:
        raise RecordError("the image-text set is empty")
    table = records if isinstance(records, ImageTextRecords) else ImageTextRecords([records])
    if not weights:
        return table
    if set(weights) - (kinds := table.kinds()):
        raise ValueError(
            f"caption_weights names {sorted(set(weights) - kinds)}, but the records' kinds of "
            f"captions are {sorted(kinds)}"
        )
    drawable = table.has_kinds(kind for kind, weight in weights.items() if weight > 0)
    for index in np.flatnonzero(~drawable):
        record = table[int(index)]
        bad.add(record.where, f"no caption of a kind with weight (has {list(record.captions)})")
    return table.take(drawable)
