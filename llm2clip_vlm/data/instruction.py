"""LLaVA's JSON as training samples: read unchanged, checked, tokenised once.

Schema (LLaVA `docs/Finetune_Custom_Data.md`): `[{"id", "image": str | [str, ...],
"conversations": [{"from": "human" | "gpt", "value": str}, ...]}]`; a record without `image` is
text alone. LLaVA never compares the number of `<image>` with the number of images; here a mismatch
is a bad record.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat_template import ConversationError, Message
from llm2clip_vlm.config_vlm import InstructionSource
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation import (
    build_labels,
    build_plain_labels,
    count_images,
    decoded_preview,
    to_messages,
    visual_tokens_per_image,
)
from llm2clip_vlm.data.images import ImageError, open_image, resolve_image
from llm2clip_vlm.data.records import BadRecords, iter_rows

logger = logging.getLogger(__name__)

PRELOAD_LIMIT_BYTES = 256 * 2**20
"""Image sets up to this size (as float32 tensors) are decoded once and kept in memory."""


@dataclass(frozen=True)
class InstructionRecord:
    """One conversation with its images."""

    key: str
    """`file.json:id`, as messages name it."""
    root: Path
    """Folder that the image names are relative to."""
    images: tuple[str, ...]
    """In the order of their `<image>`."""
    messages: tuple[Message, ...]
    """Normalised by :func:`~llm2clip_vlm.data.conversation.to_messages`."""


def read_instructions(
    source: InstructionSource, bad: BadRecords, *, seed: int = 0
) -> list[InstructionRecord]:
    """Reads one LLaVA file.

    Args:
        source: The file, its image folder, how many records, whether images are shuffled.
        bad: Takes records that cannot be used (see Raises); the run stops above its limit.
        seed: Of the shuffling.

    Returns:
        The records in file order, bad ones left out.

    Raises:
        RecordError: The file cannot be read, or more than `bad.limit` records are bad: no
            conversation, unknown role, empty answer, `<image>` count not that of the images, or
            an image name that leaves the folder, is a URL, or names no file.
        ValueError: `shuffle_images` with fewer than two images.
    """
    path = Path(source.path)
    root = Path(source.image_root) if source.image_root is not None else path.parent
    records: list[InstructionRecord] = []
    known: set[str] = set()
    for number, row in enumerate(iter_rows(path, bad), start=1):
        if source.limit is not None and number > source.limit:
            break
        where = f"{path.name}:{row.get('id', number)}"
        try:
            record = _to_record(row, where, root)
            for name in set(record.images) - known:
                resolve_image(root, name)
                known.add(name)
        except (ConversationError, ImageError) as error:
            bad.add(where, str(error))
            continue
        records.append(record)
    return shuffle_images(records, seed) if source.shuffle_images else records


def shuffle_images(records: Sequence[InstructionRecord], seed: int) -> list[InstructionRecord]:
    """Gives every record wrong images: the control that shows what the pictures are worth.

    The distinct images are put in one random cycle and each is replaced by its successor, so no
    record keeps an image, and records that shared one still do.

    Args:
        records: At least two distinct images among them.
        seed: Order of the cycle.

    Returns:
        The same records in the same order with other image names.

    Raises:
        ValueError: Fewer than two distinct images.
    """
    names = sorted({name for record in records for name in record.images})
    if len(names) < 2:
        raise ValueError(f"shuffle_images needs two distinct images or more, got {len(names)}")
    random.Random(seed).shuffle(names)
    successor = dict(zip(names, names[1:] + names[:1], strict=True))
    return [
        replace(record, images=tuple(successor[name] for name in record.images))
        for record in records
    ]


class InstructionDataset(Dataset[dict[str, Any]]):
    """Tokenised conversations with preprocessed images.

    Token ids and labels are made once. Small image sets are decoded once and kept as tensors, so
    that training on a CPU is dominated by the model; larger ones are opened when asked for.

    An item is `{"input_ids": int64 [t], "labels": int64 [t], "pixel_values": float32 [n, 3, h, w]}`
    with `n` images, and no `pixel_values` for text alone. An image that turns out unreadable only
    while training is counted in `bad`; below its limit the sample is served grey with all labels
    ignored, so that it teaches nothing and moves no other sample.
    """

    def __init__(
        self,
        records: Sequence[InstructionRecord],
        processor: Any,
        *,
        max_length_tokens: int,
        bad: BadRecords,
        plain: bool = False,
        preload_limit_bytes: int = PRELOAD_LIMIT_BYTES,
    ) -> None:
        """Tokenises all records.

        Args:
            records: From :func:`read_instructions`.
            processor: The `LlavaProcessor` of the model.
            max_length_tokens: Longer samples (text and visual tokens) are bad records; nothing is
                ever cut.
            bad: Takes too long samples and unreadable images.
            plain: LLaVA's `plain` style: image and first answer only.
            preload_limit_bytes: Largest image set that is kept in memory.

        Raises:
            RecordError: More than `bad.limit` records are bad.
            ValueError: No record is left.
        """
        self._bad = bad
        self._image_processor = processor.image_processor
        self._pixels: Tensor | None = None
        self._place: dict[tuple[Path, str], int] = {}
        unreadable = self._preload(records, preload_limit_bytes)
        num_visual = visual_tokens_per_image(processor)
        self.records: list[InstructionRecord] = []
        self._samples: list[tuple[np.ndarray, np.ndarray]] = []
        for record in records:
            reasons = [unreadable[key] for key in _image_keys(record) if key in unreadable]
            if reasons:
                bad.add(record.key, reasons[0])
                continue
            try:
                ids, labels = _tokenize_record(record, processor, plain, num_visual)
            except ConversationError as error:
                bad.add(record.key, str(error))
                continue
            if len(ids) > max_length_tokens:
                bad.add(
                    record.key,
                    f"{len(ids)} tokens ({num_visual * len(record.images)} of them visual), "
                    f"max_length_tokens is {max_length_tokens}",
                )
                continue
            self.records.append(record)
            self._samples.append((np.array(ids, np.int32), np.array(labels, np.int32)))
        if not self.records:
            raise ValueError(f"no usable record among {len(records)}: {bad.summary()}")
        logger.info("%d samples; %s", len(self.records), bad.summary())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, visual ones included."""
        return [len(ids) for ids, _ in self._samples]

    def preview(self, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
        """One sample as text, what is trained between `«` and `»`; to be looked at."""
        ids, labels = self._samples[index]
        return decoded_preview(ids.tolist(), labels.tolist(), tokenizer)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self._samples[index]
        item = {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }
        record = self.records[index]
        if not record.images:
            return item
        if self._pixels is not None:
            item["pixel_values"] = self._pixels[[self._place[key] for key in _image_keys(record)]]
            return item
        try:
            item["pixel_values"] = torch.stack([self._read(key) for key in _image_keys(record)])
        except ImageError as error:
            self._bad.add(record.key, str(error))
            size = visual_size_px(self._image_processor)
            item["pixel_values"] = torch.zeros(len(record.images), 3, *size)
            item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
        return item

    def _read(self, key: tuple[Path, str]) -> Tensor:
        image = open_image(*key)
        pixels = self._image_processor(image, return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(pixels, dtype=torch.float32)

    def _preload(
        self, records: Sequence[InstructionRecord], limit_bytes: int
    ) -> dict[tuple[Path, str], str]:
        """Decodes each distinct image once if all fit; returns the unreadable ones with reasons."""
        keys = list(dict.fromkeys(key for record in records for key in _image_keys(record)))
        height, width = visual_size_px(self._image_processor)
        if not keys or len(keys) * 3 * height * width * 4 > limit_bytes:
            return {}
        unreadable: dict[tuple[Path, str], str] = {}
        pixels = torch.empty(len(keys), 3, height, width)
        for key in keys:
            try:
                pixels[len(self._place)] = self._read(key)
            except ImageError as error:
                unreadable[key] = str(error)
                continue
            self._place[key] = len(self._place)
        self._pixels = pixels[: len(self._place)]
        return unreadable


class InstructionCollator:
    """Pads samples on the right and joins their images in order.

    Returns `input_ids`, `attention_mask`, `labels` `[b, t]` and, if any sample has images,
    `pixel_values` `[n, 3, h, w]` with all images of the batch.
    """

    def __init__(self, pad_token_id: int) -> None:
        """Takes the id that fills; it is masked, so it may equal eos."""
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Makes a batch of samples."""
        length = max(len(item["input_ids"]) for item in items)
        shape = (len(items), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            batch["input_ids"][row, :size] = item["input_ids"]
            batch["attention_mask"][row, :size] = 1
            batch["labels"][row, :size] = item["labels"]
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch


def visual_size_px(image_processor: Any) -> tuple[int, int]:
    """Height and width in pixels of what an image processor returns."""
    size: dict[str, Any] = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
    edge = size.get("shortest_edge", 0)
    return int(size.get("height", edge)), int(size.get("width", edge))


def _image_keys(record: InstructionRecord) -> list[tuple[Path, str]]:
    return [(record.root, name) for name in record.images]


def _to_record(row: Mapping[str, Any], where: str, root: Path) -> InstructionRecord:
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError("no `conversations` list of {from, value}")
    value = row.get("image")
    images = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ConversationError("`image` is neither a name nor a list of names")
    messages = to_messages(turns)
    placeholders = count_images(messages)
    if placeholders != len(images):
        raise ConversationError(
            f"{placeholders} <image> in the conversation, {len(images)} image(s) in `image`"
        )
    return InstructionRecord(where, root, tuple(images), tuple(messages))


def _tokenize_record(
    record: InstructionRecord, processor: Any, plain: bool, num_visual_tokens: int
) -> tuple[list[int], list[int]]:
    if not plain:
        return build_labels(processor, record.messages, num_visual_tokens=num_visual_tokens)
    answer = next(m for m in record.messages if m["role"] == "assistant")
    return build_plain_labels(
        processor,
        "".join(part.get("text", "") for part in answer["content"]),
        num_images=len(record.images),
        num_visual_tokens=num_visual_tokens,
    )
