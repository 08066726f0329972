"""Images with captions: records, a dataset that draws a caption per epoch, retrieval galleries."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip_vlm.config import ImageTextSource
from llm2clip_vlm.data.images import ImageError, open_image
from llm2clip_vlm.data.pixels import PixelTable, process_images
from llm2clip_vlm.data.records import (
    BadRecords,
    RecordError,
    collect_captions,
    get_column,
    iter_records,
)

logger = logging.getLogger(__name__)

CACHE_LIMIT_BYTES = 256 * 2**20
"""Processed images of a whole set are kept in memory below this size (`cache_in_memory=None`)."""

_CHUNK = 256
_MASK = 2**64 - 1

TextInputs = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions of a batch to the model's text arguments (cached embeddings, or token ids)."""


@dataclass(frozen=True)
class ImageTextRecord:
    """One image and its captions by kind."""

    key: str
    """Unique within the source."""
    image: Path
    """The image file, below `root`."""
    captions: dict[str, list[str]]
    """Kind (`short`, `long`, or the column's name) to captions, no list empty."""
    root: Path = field(default=Path())
    """Folder that the image may not leave; the image's own folder where not given."""

    def open(self) -> Image.Image:
        """Decode the image as RGB.

        Raises:
            ImageError: It cannot be read, or lies outside `root`.
        """
        if self.root == Path():
            return open_image(self.image.parent, self.image.name)
        return open_image(
            self.root,
            str(self.image.relative_to(self.root))
            if self.image.is_relative_to(self.root)
            else str(self.image),
        )


def read_image_text(source: ImageTextSource, bad: BadRecords) -> list[ImageTextRecord]:
    """Read the records of a source. Images are not opened yet.

    Args:
        source: The file, its columns and filters.
        bad: Takes rows without an image, a key or a caption.

    Returns:
        Records in file order; rows that `group_by` joins are one record with the first row's image.

    Raises:
        RecordError: The file cannot be read, or too many records are bad.
    """
    root = Path(source.image_root) if source.image_root else Path(source.path).parent
    records: list[ImageTextRecord] = []
    seen: set[str] = set()
    for group in iter_records(source, bad, columns=[source.image_field]):
        first = group.rows[0]
        name = get_column(first, source.image_field)
        identity = get_column(first, source.id_field)
        key = group.key if source.group_by or identity is None else str(identity)
        try:
            if not isinstance(name, str) or not name:
                raise RecordError(f"column {source.image_field!r} holds {name!r}, expected a path")
            if key in seen:
                raise RecordError(f"the key {key!r} ({source.id_field}) occurs twice")
            captions = collect_captions(group, source.fields)
        except RecordError as error:
            bad.add(group.where, str(error))
            continue
        seen.add(key)
        records.append(ImageTextRecord(key, root / name, captions, root))
    return records


def read_sources(sources: Sequence[ImageTextSource], bad: BadRecords) -> list[ImageTextRecord]:
    """Read several sources, one after the other, as one set.

    Args:
        sources: A recipe's `train`.
        bad: Takes unusable rows.

    Returns:
        All records.

    Raises:
        ValueError: A source has a `weight`: every image is seen once an epoch.
    """
    if weighted := [source.path for source in sources if source.weight != 1.0]:
        raise ValueError(
            f"train: `weight` of {weighted}: image-text sources take none, every image is seen "
            "once an epoch; leave it out, and shorten the larger source with `limit`"
        )
    return [record for source in sources for record in read_image_text(source, bad)]


def caption_id(text: str) -> int:
    """A 63-bit number that equal captions share, to keep them from being each other's negatives."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw(seed: int, epoch: int, index: int) -> float:
    """A uniform number in [0, 1) that depends on its three arguments alone (splitmix64)."""
    state = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / 2**53


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images with one caption each, drawn anew every epoch.

    Which caption an image gets depends on `(seed, epoch, index)` alone, so neither the number of
    workers or processes nor a resume changes it. Small sets are decoded once and kept as 8-bit
    pixels; rescaling and normalising then happens for a whole batch, with the same result to the
    bit as the image processor's. Larger sets are decoded as they are asked for; a bad image is then
    found (and counted, in each loader worker) when it is met, and the next record stands in for it.

    Args:
        records: As :func:`read_image_text` returns them.
        image_processor: A transformers image processor.
        caption_weights: Probability weight of each kind of caption; a kind that is not named is
            not drawn, and within a kind all captions are equally likely. Empty = uniform over all
            captions of an image.
        seed: Of the draws.
        text_inputs: Captions to the model's text arguments; none = batches hold captions only.
        bad: Takes images that cannot be used.
        cache_in_memory: None = where all images take less than `CACHE_LIMIT_BYTES`.
        show_progress: A progress bar while images are decoded up front.

    Raises:
        ValueError: No record, a weighted kind that no record has, or too many bad images.
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
        show_progress: bool = False,
    ) -> None:
        self.bad = BadRecords() if bad is None else bad
        self.records, self._choices = _weigh(records, caption_weights or {}, self.bad)
        self.image_processor = image_processor
        self.seed = seed
        self.text_inputs = text_inputs
        # shared memory, so that workers which outlive an epoch see the next one's number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable: set[int] = set()
        self._pixels: Tensor | None = None
        self._to_float: PixelTable | None = None
        if cache_in_memory is not False:
            self._decode_all(forced=cache_in_memory is True, show_progress=show_progress)

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
        """The caption that image `index` has in the current epoch."""
        texts, cumulative = self._choices[index]
        if len(texts) == 1:
            return texts[0]
        position = int(
            np.searchsorted(cumulative, draw(self.seed, self.epoch, index), side="right")
        )
        return texts[min(position, len(texts) - 1)]

    def captions(self) -> list[str]:
        """All captions that can be drawn, each once, in order of first appearance."""
        return list(dict.fromkeys(text for texts, _ in self._choices for text in texts))

    def pixel_values(self, indices: Sequence[int]) -> Tensor:
        """Processed images.

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
        batch = self._pixels[torch.as_tensor(indices)]
        return batch if self._to_float is None else self._to_float(batch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once (torch's loader asks for it this way).

        Returns:
            `pixel_values`, `caption_ids` `[n]` int64 and what `text_inputs` gives; `captions`, a
            list of strings, where there is none.
        """
        indices = list(indices)
        if self._pixels is None:
            opened = [self._open_or_next(index) for index in indices]
            indices = [index for index, _ in opened]
            pixels = process_images(self.image_processor, [image for _, image in opened], None)
        else:
            pixels = self.pixel_values(indices)
        texts = [self.caption(index) for index in indices]
        batch: dict[str, Any] = {
            "pixel_values": pixels,
            "caption_ids": torch.tensor([caption_id(text) for text in texts]),
        }
        return batch | (dict(self.text_inputs(texts)) if self.text_inputs else {"captions": texts})

    def _open_or_next(self, index: int) -> tuple[int, Image.Image]:
        """`index` and its image, or where that does not decode the next one that does.

        If both meet in one batch, their caption is equal, so they are no negatives.
        """
        for step in range(len(self.records)):
            candidate = (index + step) % len(self.records)
            if candidate in self._unreadable:
                continue
            try:
                return candidate, self.records[candidate].open()
            except ImageError as error:
                self._unreadable.add(candidate)
                self.bad.add(self.records[candidate].key, str(error))
        raise RecordError("no image of the set can be read")

    def _decode_all(self, *, forced: bool, show_progress: bool) -> None:
        from tqdm import tqdm

        to_float = PixelTable.of(self.image_processor)
        kept: list[int] = []
        chunks: list[Tensor] = []
        with tqdm(
            total=len(self.records), desc="decode images", unit="img", disable=not show_progress
        ) as bar:
            for start in range(0, len(self.records), _CHUNK):
                images: list[Image.Image] = []
                for index in range(start, min(start + _CHUNK, len(self.records))):
                    try:
                        images.append(self.records[index].open())
                    except ImageError as error:
                        self.bad.add(self.records[index].key, str(error))
                        continue
                    kept.append(index)
                bar.update(min(_CHUNK, len(self.records) - start))
                if not images:
                    continue
                if not chunks and to_float and not to_float.is_exact(images):
                    to_float = None
                chunks.append(process_images(self.image_processor, images, to_float))
                per_image = chunks[0][0].numel() * chunks[0].element_size()
                if not forced and per_image * len(self.records) >= CACHE_LIMIT_BYTES:
                    logger.info(
                        "%d images of %d bytes are decoded as needed", len(self.records), per_image
                    )
                    return
        if not kept:
            raise RecordError(f"none of the {len(self.records)} images can be read")
        self.records = [self.records[index] for index in kept]
        self._choices = [self._choices[index] for index in kept]
        self._pixels, self._to_float = torch.cat(chunks), to_float


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


def _weigh(
    records: Sequence[ImageTextRecord], weights: Mapping[str, float], bad: BadRecords
) -> tuple[list[ImageTextRecord], list[tuple[list[str], np.ndarray]]]:
    """Records with a caption that can be drawn, and their captions with cumulative probability."""
    if not records:
        raise RecordError("the image-text set is empty")
    kinds = {kind for record in records for kind in record.captions}
    if set(weights) - kinds:
        raise ValueError(
            f"caption_weights names {sorted(set(weights) - kinds)}, but the records' kinds of "
            f"captions are {sorted(kinds)}"
        )
    kept: list[ImageTextRecord] = []
    choices: list[tuple[list[str], np.ndarray]] = []
    for record in records:
        texts: list[str] = []
        shares: list[float] = []
        for kind, captions in record.captions.items():
            share = weights.get(kind, 0.0) / len(captions) if weights else 1.0
            if share > 0:
                texts.extend(captions)
                shares.extend([share] * len(captions))
        if not texts:
            bad.add(record.key, f"no caption of a kind with weight (has {list(record.captions)})")
            continue
        cumulative = np.cumsum(shares)
        kept.append(record)
        choices.append((texts, cumulative / cumulative[-1]))
    return kept, choices
