"""Conversations about pictures as training samples.

LLaVA's JSON, LLaVA-NeXT's YAML mixtures, `messages`, Parquet and webdataset shards are read as they
are (`docs/data-formats.md`). LLaVA never compares the number of `<image>` with the number of
images; here a mismatch is a bad record.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat.text_tokens import control_notice
from llm2clip_vlm.constants import IGNORE_INDEX, IMAGE_TOKEN
from llm2clip_vlm.data.conversation.messages import VisualTokens, decoded_preview
from llm2clip_vlm.data.conversation.token_table import ImageRef, TokenTable, folder_of, read_table
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.images import LOOKED_AT, EncodedImage, ImageError, open_image
from llm2clip_vlm.recipe.vlm import InstructionSource
from llm2clip_vlm.recipe.yaml_files import read_yaml
from llm2clip_vlm.remote.addresses import is_remote

logger = logging.getLogger(__name__)

PRELOAD_LIMIT_BYTES = 256 * 2**20
"""Image sets up to this size (as float32 tensors) are decoded once and kept in memory."""

Place = tuple[Path, ImageRef, bool]
"""Folder, image, and whether links below the folder are followed."""


def expand_mixtures(sources: Sequence[InstructionSource]) -> list[InstructionSource]:
    """Replaces each LLaVA-NeXT mixture by what it lists.

    Args:
        sources: A recipe's `data`; a `.yaml` is `{datasets: [{json_path, sampling_strategy}]}`.

    Returns:
        Sources of data files alone, in order.

    Raises:
        RecordError: A mixture cannot be read or holds something else.

    Paper: LLaVA-NeXT `llava/train/train.py`, `LazySupervisedDataset`.
    """
    expanded = []
    for source in sources:
        if not source.path.endswith((".yaml", ".yml")):
            expanded.append(source)
            continue
        try:
            listed = read_yaml(source.path)["datasets"]
            if source.sampling_strategy != "all":
                raise ValueError("a sampling_strategy in the recipe; its entries have their own")
            for entry in listed:
                values = {**entry, "path": entry["json_path"]}
                if is_remote(values.pop("json_path")):
                    raise ValueError("an address in a data file; name it in the recipe")
                if unknown := values.keys() - {"path", "sampling_strategy"}:
                    raise ValueError(f"an unknown key {min(unknown, key=str)!r}")
                expanded.append(InstructionSource(**{**source.model_dump(), **values}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RecordError(
                f"{source.path}: expected {{datasets: [{{json_path, sampling_strategy}}]}}, got "
                f"{type(error).__name__}: {error}"
            ) from error
    return expanded


def chosen_rows(source: InstructionSource, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a source that are trained on, by its `sampling_strategy` and `weight`.

    Args:
        source: The source, which has `count` usable records.
        count: Number of records.
        seed: Seed of `random` and of the fraction that a weight leaves.
    """
    rows = np.arange(count)
    draw = np.random.default_rng([seed, count])
    strategy, _, number = source.sampling_strategy.partition(":")
    if number:
        share = number.endswith("%")
        wanted = -(-int(number[:-1]) * count // 100) if share else int(number)
        rows = draw.permutation(rows) if strategy == "random" else rows
        rows = rows[max(count - wanted, 0) :] if strategy == "end" else rows[:wanted]
    whole, part = divmod(source.weight, 1)
    return np.concatenate([*[rows] * int(whole), draw.permutation(rows)[: round(part * len(rows))]])


def refuse_shuffled(source: InstructionSource, processor: Any) -> None:
    """Refuse `shuffle_images` where pictures differ in their number of tokens.

    Args:
        source: The source.
        processor: The model's processor.

    Raises:
        ValueError: It is one for AnyRes.
    """
    if source.shuffle_images and VisualTokens(processor).grids is not None:
        raise ValueError(
            f"{source.title}: shuffle_images: expected images of one token count, got AnyRes; "
            "compose the VLM with image_aspect_ratio: pad or square"
        )


class InstructionDataset(Dataset[dict[str, Any]]):
    """Tokenised conversations with preprocessed images.

    Small image sets are decoded once and kept as tensors, so that training on a CPU is dominated
    by the model; larger ones are opened when asked for.

    An item is `{"input_ids": int64 [t], "labels": int64 [t], "pixel_values": float32 [n, 3, h, w],
    "sample_id": str}` with `n` images, and no `pixel_values` for text alone. With AnyRes `n` counts
    crops, and `image_sizes` int64 [images, 2] has heights and widths. An image that turns out
    unreadable only while training is counted in `bad`; below its limit the sample is served grey
    with all labels ignored, so that it teaches nothing and moves no other sample.
    """

    def __init__(
        self,
        sources: Sequence[InstructionSource],
        processor: Any,
        *,
        max_length_tokens: int,
        bad: BadRecords,
        plain: bool = False,
        seed: int = 0,
    ) -> None:
        """Reads and tokenises all sources.

        Args:
            sources: A recipe's `data`.
            processor: The model's `LlavaProcessor` or `LlavaNextProcessor`.
            max_length_tokens: A longer conversation ends with its last answer that fits.
            bad: Takes what cannot be used.
            plain: LLaVA's `plain` style: image and first answer only.
            seed: Seed of samplings and shuffled images.

        Raises:
            RecordError: A file cannot be read, or more records are bad than `bad` allows.
            ValueError: No record is left, or `shuffle_images` with fewer than two images or with
                AnyRes.
        """
        self._bad = bad
        self._image_processor = processor.image_processor
        self._image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._visual = VisualTokens(processor)
        self._tables: list[TokenTable] = []
        self._sources = expand_mixtures(sources)
        self._shuffled: list[dict[ImageRef, ImageRef]] = []
        rows, end = [np.arange(0)], 0
        for source in self._sources:
            refuse_shuffled(source, processor)
            table = read_table(source, processor, max_length_tokens=max_length_tokens, plain=plain)
            bad.take(len(table) + len(table.refused), table.refused)
            if table.cut:
                logger.warning("%s: %d conversations end early", source.title, table.cut)
            if notice := control_notice(table.control):
                logger.warning("%s: %s", source.title, notice)
            self._tables.append(table)
            self._shuffled.append(_successors(table, seed) if source.shuffle_images else {})
            rows.append(end + chosen_rows(source, len(table), seed))
            end += len(table)
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._rows: npt.NDArray[np.int64] = np.concatenate(rows)
        self._pixels = torch.empty(0)
        self._kept: dict[Place, int] = {}
        self._preload()
        if not len(self):
            raise ValueError(f"no usable record: {bad.summary()}")
        logger.info("%d samples; %s", len(self), bad.summary())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, visual ones included."""
        lengths = np.concatenate([table.lengths for table in self._tables])
        return [int(length) for length in lengths[self._rows]]

    @property
    def image_counts(self) -> list[int]:
        """What the tower sees of each sample: its images, with AnyRes their crops."""
        counts = np.concatenate([table.image_counts for table in self._tables])
        return [int(count) for count in counts[self._rows]]

    def some_pictures(self) -> list[Path]:
        """Files of pictures from all over; those in shards, which are data, are left out."""
        rows = range(0, len(self), -(-len(self) // LOOKED_AT))
        places = [place for index in rows for place in self._place(index)[1]]
        return [root / image for root, image, _ in places if isinstance(image, str)]

    def preview(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first sample as text, what is trained between `«` and `»`; to be looked at."""
        ids, labels = self._tokens(0)
        return decoded_preview(ids.tolist(), labels.tolist(), tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = self._tokens(index)
        key, places = self._place(index)
        item = {"input_ids": ids, "labels": labels, "sample_id": key}
        if not places:
            return item
        sizes = self._image_sizes(index)
        if len(sizes):
            item["image_sizes"] = sizes
        try:
            item["pixel_values"] = torch.cat(
                [self._read(place, *sizes[i : i + 1]) for i, place in enumerate(places)]
            )
        except ImageError as error:
            self._refuse(index, key, str(error))
            crops = sum(self._visual.of(*size)[1] for size in sizes.tolist()) or len(places)
            item["pixel_values"] = torch.zeros(crops, 3, *self._visual.size_px)
            item["labels"] = torch.full_like(labels, IGNORE_INDEX)
        return item

    def _refuse(self, index: int, key: str, why: str) -> None:
        self._bad.add(f"{folder_of(self._sources[self._row(index)[0]])}{key}", why)

    def _row(self, index: int) -> tuple[int, int]:
        """Table and row of a sample."""
        table = int(np.searchsorted(self._ends, self._rows[index], side="right"))
        return table, int(self._rows[index] - self._ends[table]) + len(self._tables[table])

    def _tokens(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and labels, int64 `[t]`, each `<image>` as many tokens as an image has."""
        table, row = self._row(index)
        ids, trained = self._tables[table].tokens(row)
        labels = torch.where(trained, ids, IGNORE_INDEX)
        repeats = torch.where(ids == self._image_id, self._visual.fixed, 1)
        if sizes := self._image_sizes(index).tolist():
            counts = [self._visual.of(*size)[0] for size in sizes]
            repeats[ids == self._image_id] = torch.tensor(counts)
        return ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)

    def _image_sizes(self, index: int) -> Tensor:
        """Height and width of a sample's images, int64 `[n, 2]`; empty but for AnyRes."""
        table, row = self._row(index)
        return self._tables[table].image_sizes(row)

    def _place(self, index: int) -> tuple[str, list[Place]]:
        """Key and images of a sample."""
        table, row = self._row(index)
        key, images = self._tables[table].place(row)
        source, successors = self._sources[table], self._shuffled[table]
        root, follow = source.folder, source.follow_links
        return key, [(root, successors.get(image, image), follow) for image in images]

    def _read(self, place: Place, size: Tensor | None = None) -> Tensor:
        """An image's crops, `[n, 3, h, w]`; `size` is what it was when its tokens were counted."""
        if place in self._kept:
            return self._pixels[self._kept[place], None]
        root, image, follow = place
        if isinstance(image, str):
            name = repr(image)
            picture = open_image(root, image, strict=True, follow_links=follow)
        else:
            name = f"in {image.path.name}"
            picture = EncodedImage(image.read(), name).rgb(strict=True)
        if size is not None and size.tolist() != [picture.height, picture.width]:
            raise ImageError(
                f"image {name}: {picture.width}x{picture.height} px, expected "
                f"{int(size[1])}x{int(size[0])} as when it was indexed; delete the table in "
                "`index_dir` if it was replaced"
            )
        pixels = self._image_processor(picture, return_tensors="pt")["pixel_values"][0]
        crops = torch.as_tensor(pixels, dtype=torch.float32)
        return rearrange(crops, "... c h w -> (...) c h w")

    def _preload(self) -> None:
        """Decodes each distinct image once if all fit, and leaves out samples with a bad one."""
        if self._visual.grids is not None:
            return
        height, width = self._visual.size_px
        room = PRELOAD_LIMIT_BYTES // (3 * height * width * 4)
        samples: list[tuple[str, list[Place]]] = []
        distinct: dict[Place, None] = {}
        for index in range(len(self)):
            samples.append(self._place(index))
            distinct.update(dict.fromkeys(samples[-1][1]))
            if len(distinct) > room:
                return
        unreadable: dict[Place, str] = {}
        pixels, kept = torch.empty(len(distinct), 3, height, width), dict[Place, int]()
        for place in distinct:
            try:
                pixels[len(kept)] = self._read(place)[0]
                kept[place] = len(kept)
            except ImageError as error:
                unreadable[place] = str(error)
        self._pixels, self._kept = pixels[: len(kept)], kept
        good = np.ones(len(self), dtype=bool)
        for index, (key, places) in enumerate(samples):
            if reasons := [unreadable[place] for place in places if place in unreadable]:
                self._refuse(index, key, reasons[0])
                good[index] = False
        self._rows = self._rows[good]


def _successors(table: TokenTable, seed: int) -> dict[ImageRef, ImageRef]:
    """Give each image another one: the control that shows what the pictures are worth.

    The distinct images are put in one random cycle and each is replaced by its successor, so no
    record keeps an image, and records that shared one still do.
    """
    names = sorted({image for row in range(len(table)) for image in table.place(row)[1]}, key=str)
    if len(names) < 2:
        raise ValueError(f"shuffle_images needs two distinct images or more, got {len(names)}")
    random.Random(seed).shuffle(names)
    return dict(zip(names, names[1:] + names[:1], strict=True))


FILLER = {"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.full((2,), IGNORE_INDEX)}
"""What stands where a process has no sample."""


class InstructionCollator:
    """Pads samples on the right and joins their images in order.

    Returns `input_ids`, `attention_mask`, `labels` `[b, t]`, `sample_ids` and, if any sample has
    images, `pixel_values` `[n, 3, h, w]` with all images of the batch.
    """

    def __init__(self, pad_token_id: int) -> None:
        """Takes the id that fills; it is masked, so it may equal eos."""
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch of samples; without any, a row of two tokens that train nothing."""
        rows = items or [FILLER]
        ids, labels = ([item[name] for item in rows] for name in ("input_ids", "labels"))
        pad = partial(pad_sequence, batch_first=True)
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(own) for own in ids]),
            "labels": pad(labels, padding_value=IGNORE_INDEX),
        }
        return batch | joined_images(items)


def joined_images(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`sample_ids` of a batch, and `pixel_values` `[n, 3, h, w]` if any sample has images.

    With AnyRes also `image_sizes` `[images, 2]`; `n` are all crops of all images.
    """
    batch: dict[str, Any] = {"sample_ids": [item["sample_id"] for item in items]}
    for name in ("pixel_values", "image_sizes"):
        if parts := [item[name] for item in items if name in item]:
            batch[name] = torch.cat(parts)
    return batch
