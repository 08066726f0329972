"""Conversations of one source, tokenised once, in columns.

A source's files are read once. What training needs of a conversation (token ids, which of them are
trained, where its images lie) goes into a table (:mod:`llm2clip_vlm.data.reading.table`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from llm2clip_vlm.chat.labels import texts_of
from llm2clip_vlm.chat.template import ConversationError, Message, template_of
from llm2clip_vlm.chat.text_tokens import text_tokens
from llm2clip_vlm.constants import IGNORE_INDEX, IMAGE_TOKEN
from llm2clip_vlm.data.conversation.messages import (
    VisualTokens,
    build_labels,
    build_plain_labels,
    count_images,
    to_messages,
    with_system,
)
from llm2clip_vlm.data.reading.bad_records import Refusals, Refused, printable
from llm2clip_vlm.data.reading.images import ImageError, resolve_image, upright_size
from llm2clip_vlm.data.reading.records import source_files, source_rows
from llm2clip_vlm.data.reading.shards import PackedImage
from llm2clip_vlm.data.reading.table import Table, arrow_table
from llm2clip_vlm.recipe.vlm import InstructionSource

VERSION = 11
"""Version of the columns and of the rules by which conversations are taken, cut or refused."""

_PAIR = ("user", "assistant")
_SAID = ("id", "value", "content", "text", *_PAIR)
_END = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic|mp4|webm|avi|mov|mkv|wav|mp3|flac)\b"
_MEDIA = re.compile(rf"(?:(?!{_END})[^\n]){{0,250}}{_END}\s*", re.I)  # one name, blanks in it
_TAG = re.compile(r"<img>[^<\n]{1,250}</img>")  # of Qwen-VL

ImageRef = str | PackedImage
"""A name below the source's `image_root`, or where the bytes lie in a shard or table."""
COLUMNS: dict[str, Any] = {
    "ids": ["int32"],
    "trained": ["bool"],
    "sizes": ["int32"],
    "length": "int64",
    "images": "int64",
}
"""Columns of the table, beside key and places of the images: tokens, which of them are trained,
height and width of each image where they matter; length with visual tokens, what the tower sees."""


@dataclass(frozen=True)
class InstructionRecord:
    """One conversation with its images."""

    key: str
    """`file.json:id`, as messages name it."""
    images: tuple[ImageRef, ...]
    """Images in the order of their `<image>`."""
    messages: tuple[Message, ...]
    """Normalised by :func:`~llm2clip_vlm.data.conversation.messages.to_messages`."""


def folder_of(source: InstructionSource) -> str:
    """Prefix of a record's key that keeps files of equal names apart."""
    return source.title.removesuffix(Path(source.title).name)


def read_instructions(source: InstructionSource, bad: Refusals) -> Iterator[InstructionRecord]:
    """Reads the conversations of a source, in file order.

    Args:
        source: LLaVA's JSON, `messages`, Parquet or shards, as `docs/data-formats.md` lists them.
        bad: Takes records that cannot be used: no conversation, unknown role, empty answer,
            `<image>` count not that of the images, or an image name that leaves the folder, is a
            URL, or names no file.

    Raises:
        RecordError: The file cannot be read.
    """
    title, root = Path(source.title).name, source.folder
    known: set[str] = set()
    named: set[str] = set()
    for number, (_, _, row) in enumerate(source_rows(source, bad), start=1):
        if source.limit is not None and number > source.limit:
            break
        where = f"{title}:{row.get('id', number)}"
        if where in named:  # ids repeat in LLaVA's files: each record counts once, not each id
            where += f":{number}"
        named.add(where)
        try:
            record = to_record(row, where)
            for name in {image for image in record.images if isinstance(image, str)} - known:
                resolve_image(root, name, follow_links=source.follow_links)
                known.add(name)
        except Exception as error:  # noqa: BLE001  (the boundary around a record)
            why = f"no conversation: {type(error).__name__}: {error}"
            why = str(error) if isinstance(error, ConversationError | ImageError) else why
            bad.add(f"{folder_of(source)}{where}", why, getattr(error, "absent", None))
            continue
        yield record


def to_record(row: Mapping[str, Any], where: str) -> InstructionRecord:
    """One conversation of a file.

    Args:
        row: Row as it lies there: `conversations`, `messages` or `texts`, with `image` or `images`.
        where: Its name in messages.

    Raises:
        ConversationError: It is none, or has other numbers of `<image>` and images.
    """
    turns = _listed(row.get("conversations") or row.get("messages"))
    asked = None if turns else _listed(row.get("texts"))
    if asked:  # The Cauldron's pairs; the row's pictures stand before the first
        turns = [{"role": who, "content": pair[who]} for pair in asked for who in _PAIR]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError(
            "no `conversations` list of {from, value}, nor `messages`, nor `texts`"
        )
    messages = to_messages(with_system(row, turns))
    placeholders = count_images(messages)
    value = _images(row, turns)
    if isinstance(value, PackedImage) and value.column is not None:
        # How many a table's cell holds is only known when it is read: at once for a conversation
        # without <image>, which would be taken for text alone, else when it is its turn.
        count = placeholders or value.count()
        value = [replace(value, item=(i, count)) for i in range(count)] or None
    images = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(image, ImageRef) for image in images):
        raise ConversationError("`image` is neither a name nor a list of names")
    if asked and not placeholders:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in images]
        placeholders = len(images)
    if not (placeholders or images):
        _require_text_alone(row, messages)
    if placeholders != len(images):
        raise ConversationError(
            f"{placeholders} <image> in the conversation, {len(images)} image(s) in `image`"
        )
    return InstructionRecord(where, tuple(images), tuple(messages))


def _images(row: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> Any:
    """What a row gives for its images: a column's cell, or the names in the parts themselves."""
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    dicts = [part for part in chain.from_iterable(contents) if isinstance(part, dict)]
    parts = [part for part in dicts if part.get("type") == "image"]
    order = [part["index"] for part in parts if part.get("index") is not None]
    if order != sorted({*order}):
        raise ConversationError(f"images of index {order}, expected them in order, each once")
    inline = [name for p in parts if (name := p.get("image") or p.get("path") or p.get("url"))]
    given = [cell for cell in (row.get("image"), row.get("images"), inline) if cell]
    lists = [cell if isinstance(cell, list) else [cell] for cell in given]
    named = [names for names in lists if all(isinstance(name, str) for name in names)]
    if any(names != named[0] for names in named):
        raise ConversationError(f"different images in one record: {printable(repr(named))}")
    return given[0] if given else None


def _require_text_alone(row: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Refuse a conversation without images beside which, or in which, pictures are named."""
    tags = filter(None, map(_TAG.search, texts_of(messages)))
    found = [("conversations", tag[0]) for tag in tags]
    found += [(column, name) for column, cell in row.items() for name in _media(column, cell)]
    for column, name in found:
        raise ConversationError(
            f"0 <image> in the conversation, but the column {column!r} holds {name}; call it "
            "`image` by `columns` if these are pictures, else name the columns without it"
        )


def _media(key: str, cell: Any) -> Iterator[str]:
    """Pictures, films and sounds that a cell holds or names, at any depth; texts name none."""
    if isinstance(cell, PackedImage | bytes):
        yield from ["bytes"] * (bool(cell) if isinstance(cell, bytes) else cell.count())
    elif isinstance(cell, Mapping):
        for name, inner in cell.items():
            yield from _media(name, inner)
    elif isinstance(cell, list):
        for inner in cell:
            yield from _media(key, inner)
    elif key not in _SAID and isinstance(cell, str) and _MEDIA.fullmatch(cell):
        yield printable(repr(cell))


def _listed(turns: Any) -> Any:
    """Turns as `[{...}, ...]`; `datasets` stores its `Sequence` of mappings column by column."""
    if not isinstance(turns, dict):
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]


class TokenTable:
    """Tokenised conversations of one source.

    Args:
        table: Result of :func:`tokenise`.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._files = table.files
        self.refused = table.refused
        """`(where, why)` of what could not be used."""
        self.control: Counter[str] = Counter(table.facts["control"])
        """Names of control tokens that stood in texts, and how often; they were read as text."""
        self.cut = int(table.facts["cut"])
        """Conversations that lost turns at their end."""
        self.lengths = table.column("length")
        """Tokens of each, visual ones included."""
        self.image_counts = table.column("images")
        """What the tower sees of each: its images, with AnyRes their crops."""

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> Any:
        return TokenTable, (self._table,)

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Ids, int64 `[t]`, each `<image>` one token, and which are trained, bool `[t]`."""
        ids, trained = self._table.items("ids", row), self._table.items("trained", row)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(trained.astype(bool))

    def image_sizes(self, row: int) -> Tensor:
        """Height and width of a record's images, int64 `[n, 2]`; empty where they do not matter."""
        sides = torch.from_numpy(self._table.items("sizes", row).astype(np.int64))
        return rearrange(sides, "(n two) -> n two", two=2)

    def place(self, row: int) -> tuple[str, list[ImageRef]]:
        """A record's key and its images."""
        key, images = self._table.record(row)
        return key, [image if isinstance(image, str) else self._packed(*image) for image in images]

    def _packed(self, file: int, start: int, size: int, column: Any, item: Any) -> PackedImage:
        state = self._table.facts["files"][file]
        return PackedImage(self._files[file], start, size, column, tuple(item), state)


def read_table(
    source: InstructionSource, processor: Any, *, max_length_tokens: int, plain: bool
) -> TokenTable:
    """The tokenised conversations of a source, from a table's file where it is large.

    Args:
        source: A data file.
        processor: The `LlavaProcessor` of the model.
        max_length_tokens: See :func:`tokenise`.
        plain: See :func:`tokenise`.

    Raises:
        RecordError: A file cannot be read, or the table cannot be written.
    """

    def settings() -> list[Any]:
        tokenizer = processor.tokenizer
        return [
            VERSION,
            source.selection,
            [max_length_tokens, plain, VisualTokens(processor).settings, processor.chat_template],
            [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map],
        ]

    rows = partial(tokenise, source, processor, max_length_tokens, plain)
    files = source_files(source)
    return TokenTable(arrow_table(files, source.index_dir, settings, COLUMNS, rows))


def tokenise(
    source: InstructionSource,
    processor: Any,
    max_length_tokens: int,
    plain: bool,
    refused: Refused,
    facts: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Reads and tokenises a source.

    Args:
        source: A data file.
        processor: The `LlavaProcessor` of the model.
        max_length_tokens: Text and visual tokens; a longer conversation ends with the last answer
            that fits, one whose first answer does not is refused.
        plain: LLaVA's `plain` style: image and first answer only.
        refused: Takes what cannot be used.
        facts: Gets `cut` and `control`, see :class:`TokenTable`.

    Yields:
        The table's rows: key and places of the images, and :data:`COLUMNS`.
    """
    # An image stays one token here, and its place is kept instead of its pixels: how many visual
    # tokens it becomes depends on the picture, and 576 equal ids an image would fill the table.
    # Example: "<image> Which colour?" with the answer "red" is stored as ids
    # [<image>, Which, colour, ?, red, </s>], trained [0, 0, 0, 0, 1, 1], length 5 + 576.
    numbers = {name: number for number, (name, *_) in enumerate(facts["files"])}
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    visual, root = VisualTokens(processor), source.folder
    known = text_tokens(processor.tokenizer, "" if plain else template_of(processor))
    control = facts["control"] = Counter[str]()
    facts["cut"] = 0
    for record in read_instructions(source, refused):
        try:
            own, labels = _label(record, processor, plain)
            shapes = [
                size_px(root, image, source.follow_links) if visual.grids else visual.size_px
                for image in record.images[: own.count(image_id)]
            ]
            seen = [visual.of(*shape) for shape in shapes]
            tokens = [count for count, _ in seen]
            kept = _fitting(own, labels, image_id, tokens, max_length_tokens)
        except (ConversationError, ImageError) as error:
            refused.add(f"{folder_of(source)}{record.key}", str(error))
            continue
        facts["cut"] += kept < len(own)
        control.update(known.count(texts_of(record.messages)))
        images = own[:kept].count(image_id)
        places = [
            image
            if isinstance(image, str)
            else [numbers[str(image.path)], image.start, image.size, image.column, image.item]
            for image in record.images[:images]
        ]
        yield {
            "record": [record.key, places],
            "ids": own[:kept],
            "trained": [target != IGNORE_INDEX for target in labels[:kept]],
            "sizes": [side for shape in shapes[:images] for side in shape] if visual.grids else [],
            "length": kept + sum(tokens[:images]) - images,
            "images": sum(crops for _, crops in seen[:images]),
        }


def size_px(root: Path, image: ImageRef, follow_links: bool) -> tuple[int, int]:
    """Height and width of a picture, upright; refuses what is none."""
    if isinstance(image, str):
        path = resolve_image(root, image, follow_links=follow_links)
        width, height = upright_size(path, f"{image!r} below {root}")
    else:
        width, height = upright_size(image.read(), f"in {image.path.name}")
    return height, width


def _label(record: InstructionRecord, processor: Any, plain: bool) -> tuple[list[int], list[int]]:
    if not plain:
        return build_labels(processor, record.messages, num_visual_tokens=1)
    answer = next(n for n, m in enumerate(record.messages) if m["role"] == "assistant")
    if not (images := count_images(record.messages[:answer])):
        raise ConversationError("plain: expected an image before the first answer, got none")
    caption = "".join(part.get("text", "") for part in record.messages[answer]["content"])
    return build_plain_labels(processor, caption, num_images=images, num_visual_tokens=1)


def _fitting(
    ids: Sequence[int], labels: Sequence[int], image_id: int, visual: Sequence[int], max_tokens: int
) -> int:
    """Number of tokens that stay: all, or those up to the end of the last answer that fits.

    `visual` has the tokens of each image in order.
    """
    # An answer stays whole or goes: half of one would teach the model to stop anywhere. Example,
    # at most 12 tokens: <image> (4) q q a </s> q q a a </s> has 13, so it ends with the first
    # answer, after 5 ids that stand for 8 tokens.
    total = len(ids) + sum(visual) - len(visual)
    if total <= max_tokens:
        return len(ids)
    counts = iter(visual)
    lengths = accumulate(next(counts) if token == image_id else 1 for token in ids)
    fitting = sum(length <= max_tokens for length in lengths)
    ends = [n for n in range(1, fitting + 1) if labels[n - 1] != IGNORE_INDEX == labels[n]]
    if not ends:
        raise ConversationError(
            f"the first answer ends beyond max_length_tokens = {max_tokens}; the conversation has "
            f"{total} tokens, {sum(visual)} of them visual"
        )
    return ends[-1]
