"""Images with captions: a dataset that draws captions, and retrieval galleries."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from llm2clip_vlm.data.image_text.index import ImageTextRecord, ImageTextRecords
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.images import LOOKED_AT, ImageError
from llm2clip_vlm.data.reading.pixels import (
    Geometry,
    PixelTable,
    TrainingPixels,
    large_empty,
    process_images,
)
from llm2clip_vlm.data.text.caption_draw import (
    caption_id,
    draw,
    draw_one,
    draw_several,
    weighted_captions,
)
from llm2clip_vlm.recipe.base import AugmentationSection

logger = logging.getLogger(__name__)

PRELOAD_LIMIT_BYTES = 256 * 2**20
"""Sets whose images take less than this, as 8-bit pixels, are decoded once and kept in memory."""

_CHUNK = 256

TextInputs = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions of a batch to the model's text arguments (cached embeddings, or token ids)."""

PictureFeatures = Callable[[ImageTextRecords, BadRecords], tuple[list[int], Tensor]]
"""Records to the positions of those whose pictures can be used, and a frozen tower's features."""


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images with captions, drawn anew every epoch.

    Which caption an image gets depends on `(seed, epoch, index)` alone, so neither the number of
    workers or processes nor a resume changes it. Small sets are decoded once and kept as 8-bit
    pixels; rescaling and normalising then happens for a whole batch, with exactly the image
    processor's result. Larger sets are decoded as they are asked for; a bad image is then found
    when it is met, and counted once, and the next record stands in for it.

    Args:
        records: Result of `read_sources` or `read_image_text`.
        image_processor: A transformers image processor.
        caption_weights: Probability weight of each kind of caption; a kind that is not named is
            not drawn, and within a kind all captions are equally likely. Empty = uniform over all
            captions of an image.
        seed: Seed of the draws.
        text_inputs: Captions to the model's text arguments. None: batches hold captions only.
        bad: Takes images that cannot be used.
        preload_limit_bytes: Below this size, and where nothing is done to them at random, images
            are held in memory. None: `PRELOAD_LIMIT_BYTES`.
        captions_per_image: Captions of an image that a batch holds one after the other; different
            ones where it has so many.
        augmentation: Random crop, in training alone.
        fast: Decode and resize by :class:`TrainingPixels` what is not held in memory; otherwise
            exactly as the image processor does.
        features: Gives what the model takes for pictures. None: `pixel_values`.
        first: Looks at the captions before any picture is opened. None: nothing does.

    Raises:
        ValueError: No record, a weighted kind that no record has, too many bad images, or an
            augmentation beside an image processor whose resizing is not known.
    """

    def __init__(
        self,
        records: ImageTextRecords,
        image_processor: Any,
        caption_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        text_inputs: TextInputs | None = None,
        *,
        bad: BadRecords | None = None,
        preload_limit_bytes: int | None = None,
        captions_per_image: int = 1,
        augmentation: AugmentationSection | None = None,
        fast: bool = False,
        features: PictureFeatures | None = None,
        first: Callable[[ImageTextDataset], None] | None = None,
    ) -> None:
        self.bad = BadRecords() if bad is None else bad
        self.caption_weights = dict(caption_weights or {})
        self.records = _with_weight(records, self.caption_weights, self.bad)
        self.image_processor = image_processor
        self.seed = seed
        self.order_seed = seed
        """Seed of the order of an epoch."""
        self.text_inputs = text_inputs
        self.captions_per_image = captions_per_image
        # shared memory, so that workers which outlive an epoch see the next one's number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()
        self._pixels: Tensor | None = None
        self._to_float = PixelTable.of(image_processor)
        self._training: TrainingPixels | None = None
        augmentation = augmentation or AugmentationSection()
        augments = augmentation.crop_scale_min < 1
        limit = PRELOAD_LIMIT_BYTES if preload_limit_bytes is None else preload_limit_bytes
        if first is not None:
            first(self)
        if features is not None:
            kept, self._pixels = features(self.records, self.bad)
            self.records = self.records.take(kept)
        elif limit and not augments:
            self._preload(limit)
        if self._pixels is None and (fast or augments):
            geometry = Geometry.of(image_processor)
            name = type(image_processor).__name__
            if geometry is not None and self._to_float is not None:
                self._training = TrainingPixels(geometry, augmentation, seed, scaled=fast)
            elif augments:
                raise ValueError(
                    f"augmentation: {name} does more than resize and crop, so where a random crop "
                    "belongs is not known; leave `augmentation` out, or use another processor"
                )
            else:
                logger.info("%s does more than resize and crop: exact decoding", name)

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

    def items(self, epoch: int) -> Iterator[int]:
        """An epoch's images, in its order (that of torch's `RandomSampler` under accelerate)."""
        seeded = torch.Generator().manual_seed(self.order_seed + epoch)
        return map(int, torch.randperm(len(self), generator=seeded).numpy())

    def caption(self, index: int) -> str:
        """The (first) caption that image `index` has in the current epoch."""
        return self._draw(index)[0]

    def captions(self) -> list[str]:
        """All captions that can be drawn, each once, in order of first appearance."""
        return list(dict.fromkeys(self.each_caption()))

    def each_caption(self) -> Iterator[str]:
        """Each caption that can be drawn, read record by record."""
        for record in self.records:
            yield from weighted_captions(record.captions, self.caption_weights)[0]

    def some_pictures(self) -> list[Path]:
        """Files of pictures from all over; those in shards, which are data, are left out."""
        some = [self.records[row] for row in range(0, len(self), -(-len(self) // LOOKED_AT))]
        return [one.root / one.image for one in some if isinstance(one.image, str)]

    @property
    def kinds(self) -> list[str]:
        """Kinds of captions that can be drawn."""
        weighted = {kind for kind, weight in self.caption_weights.items() if weight > 0}
        return sorted(weighted or self.records.kinds())

    def readable(self, rows: Sequence[int], bad: BadRecords) -> tuple[list[int], Tensor | None]:
        """Find the images that can be read, exactly as the image processor makes them.

        Args:
            rows: Positions in `records`.
            bad: Takes the others.

        Returns:
            Their positions, and `[n, 3, h, w]` fp32. None: no image can be read.
        """
        if self._pixels is not None:
            return [*rows], self.to_float(self._pixels[torch.as_tensor(rows)])
        found = readable_pictures(self.records, rows, bad)
        images = [*found.values()]
        return [*found], process_images(self.image_processor, images, None) if found else None

    def to_float(self, pixels: Tensor) -> Tensor:
        """Rescale and normalise 8-bit pixels for the model, on their device.

        Args:
            pixels: A batch's `[n, 3, h, w]`; what is no uint8 is returned as it is.
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
            `pixel_values`, 8-bit wherever :meth:`to_float` can finish them (a quarter of the
            bytes), `caption_ids` `[n * captions_per_image]` int64 and what `text_inputs` gives;
            `captions`, a list of strings, where there is none.
        """
        if self._pixels is not None:
            pixels = self._pixels[torch.as_tensor(indices)]
        else:
            self.records.fetch_ahead(indices)
            indices, loaded = map(list, zip(*map(self._load_or_next, indices), strict=True))
            if self._training is None:
                pixels = process_images(self.image_processor, loaded, None)
            else:
                room = large_empty((len(loaded), *loaded[0].shape), np.uint8)
                pixels = torch.stack(loaded, out=room)
        texts = [text for index in indices for text in self._draw(index)]
        number = getattr(self.text_inputs, "caption_id", caption_id)
        batch: dict[str, Any] = {
            "pixel_values": pixels,
            "caption_ids": torch.tensor([number(text) for text in texts]),
        }
        return batch | (dict(self.text_inputs(texts)) if self.text_inputs else {"captions": texts})

    def _draw(self, index: int) -> list[str]:
        """An image's captions in the current epoch."""
        record = self.records[index]
        texts, shares = weighted_captions(record.captions, self.caption_weights)
        if self.captions_per_image == 1:
            return [draw_one(texts, shares, draw(self.seed, self.epoch, index))]
        return draw_several(
            texts, shares, self.captions_per_image, self.seed ^ record.identity, self.epoch
        )

    def _load_or_next(self, index: int) -> tuple[int, Any]:
        """`index` and its image, or where that does not decode the next one that does.

        If both meet in one batch, their caption is equal, so they are no negatives.
        """
        for step in range(len(self.records)):
            candidate = (index + step) % len(self.records)
            if self._unreadable[candidate]:
                continue
            record = self.records[candidate]
            try:
                if self._training is None:
                    return candidate, record.open()
                return candidate, self._training(record.encoded(), record.identity, self.epoch)
            except ImageError as error:
                self._unreadable[candidate] = True
                self.bad.add(record.where, str(error))
        raise RecordError("no image of the set can be read")

    def _preload(self, limit_bytes: int) -> None:
        """Decode all images, unless the first that can be read show that they do not fit."""
        table, geometry = self._to_float, Geometry.of(self.image_processor)
        if table is None or (
            geometry and 3 * math.prod(geometry.size) * len(self.records) >= limit_bytes
        ):
            return
        kept: list[int] = []
        chunks: list[Tensor] = []
        rows = range(len(self.records))
        starts = tqdm(rows[::_CHUNK], "decode images", unit="img", unit_scale=_CHUNK, disable=None)
        for start in starts:
            found = readable_pictures(self.records, rows[start : start + _CHUNK], self.bad)
            if not found:
                continue
            kept += found
            images = [*found.values()]
            pixels = process_images(self.image_processor, images, table)
            fits = pixels.dtype == torch.uint8 and pixels[0].nbytes * len(rows) < limit_bytes
            if fits and not chunks:
                exact = process_images(self.image_processor, images, None)
                fits = torch.equal(table(pixels), exact)
            if not fits:
                logger.info("%d images are decoded as needed", len(rows))
                return
            chunks.append(pixels)
        if not kept:
            raise RecordError(f"none of the {len(rows)} images can be read")
        self.records, self._pixels = self.records.take(kept), torch.cat(chunks)


def readable_pictures(
    records: ImageTextRecords, rows: Sequence[int], bad: BadRecords
) -> dict[int, Image.Image]:
    """Decode some records' pictures, by position.

    Args:
        records: The records.
        rows: Positions of those that are asked for.
        bad: Takes the ones that cannot be used.
    """
    records.fetch_ahead(rows)
    images = {}
    for row in rows:
        try:
            images[row] = records[row].open()
        except ImageError as error:
            bad.add(records[row].where, str(error))
    return images


def collate(batch: dict[str, Any]) -> dict[str, Any]:
    """Collator of :class:`ImageTextDataset`, which makes whole batches."""
    return batch


def caption_galleries(
    records: Sequence[ImageTextRecord],
) -> tuple[list[int], dict[str, tuple[list[str], list[int]]]]:
    """Pictures, captions of each kind, and the picture that each belongs to, for retrieval.

    Records of one picture (a file with a caption a row) are one: beside its own copy no picture is
    found first, however good an encoder is.

    Args:
        records: Held-out records.

    Returns:
        Positions in `records` of the pictures; kind to (captions, numbers of the pictures).
    """
    numbers: dict[Any, int] = {}
    pictures: list[int] = []
    galleries: dict[str, tuple[list[str], list[int]]] = {}
    for position, record in enumerate(records):
        number = numbers.setdefault((record.root, record.image), len(pictures))
        if number == len(pictures):
            pictures.append(position)
        for kind, texts in record.captions.items():
            captions, owners = galleries.setdefault(kind, ([], []))
            captions.extend(texts)
            owners.extend([number] * len(texts))
    return pictures, galleries


def _with_weight(
    records: ImageTextRecords, weights: Mapping[str, float], bad: BadRecords
) -> ImageTextRecords:
    """The records with a caption that can be drawn."""
    if not records:
        raise RecordError("the image-text set is empty")
    if not weights:
        return records
    if unknown := set(weights) - (kinds := records.kinds()):
        raise ValueError(
            f"caption_weights names {sorted(unknown)}, but the records' kinds of captions are "
            f"{sorted(kinds)}"
        )
    drawable = records.has_kinds([kind for kind, weight in weights.items() if weight > 0])
    left_out = [records[int(index)] for index in np.flatnonzero(~drawable)]
    why = "no caption of a kind with weight (has {})"
    bad.take(0, [(record.where, why.format(list(record.captions))) for record in left_out])
    return records.take(drawable)
