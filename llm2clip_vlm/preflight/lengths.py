"""How many samples a recipe has and how long their texts are, measured on some of each source."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from llm2clip_vlm.chat.labels import texts_of
from llm2clip_vlm.chat.template import ConversationError
from llm2clip_vlm.data.conversation.instruction import chosen_rows, expand_mixtures
from llm2clip_vlm.data.conversation.packing import PackedBatches
from llm2clip_vlm.data.conversation.token_table import to_record
from llm2clip_vlm.data.reading import records as reading
from llm2clip_vlm.data.reading.bad_records import RecordError, Refused
from llm2clip_vlm.recipe.base import CaptionSource, RunRecipe
from llm2clip_vlm.recipe.vlm import VlmRecipe

SAMPLE = 512
"""Records of a source whose texts are measured."""
GUESSED_SAMPLES = 1_000_000
_CHARS_A_TOKEN = 4


@dataclass
class Lengths:
    """Lengths of a recipe's training data."""

    samples: int
    texts: list[int]
    """Tokens of some captions, or of some conversations without their pictures, ascending."""
    captions: float = 1.0
    """Captions of a sample."""
    images: float = 1.0
    """Pictures of a sample."""
    trained: float = 1.0
    """Share of a conversation's tokens that is trained on."""
    told: str = ""
    """Where all this is known from."""
    conversations: list[tuple[int, int]] = field(default_factory=list)
    """Tokens without pictures, and pictures, of the conversations that were measured."""

    @property
    def mean(self) -> float:
        """Tokens of a text."""
        return sum(self.texts) / len(self.texts)

    def packed(
        self, samples: int, picture: int, longest: int, room: int, most: int | None
    ) -> tuple[float, float]:
        """Micro-batches that a step's conversations pack into, and their mean tokens.

        Conversations that were guessed fill them.

        Args:
            samples: Conversations of a step.
            picture: Tokens of a picture.
            longest: Tokens of a conversation; what it has more is cut off.
            room: Tokens of a micro-batch.
            most: Pictures of a micro-batch. None: as many as come.
        """
        if not self.conversations:
            mean = min(longest, self.mean + self.images * picture)
            return max(1.0, samples * mean / room), mean
        sizes = [max(1, min(longest, text + n * picture)) for text, n in self.conversations]
        images = [min(n, most or n) for _, n in self.conversations]
        step = min(samples, len(sizes))
        batches = PackedBatches(
            sizes, images, global_batch_size=step, max_tokens=room, max_images=most, seed=0
        )
        return batches.accumulation * samples / step, sum(sizes) / len(sizes)

    def quantile(self, share: float) -> int:
        """Tokens that this share of the texts does not exceed."""
        return self.texts[min(len(self.texts) - 1, int(len(self.texts) * share))]


def guessed(recipe: RunRecipe) -> Lengths:
    """What is taken where there are no data: web captions, LLaVA-1.5's conversations."""
    told = f"guessed, as the data are not here: {GUESSED_SAMPLES:,} samples"
    if isinstance(recipe, VlmRecipe):
        tokens, trained = (30, 0.9) if getattr(recipe, "plain", False) else (300, 0.45)
        return Lengths(GUESSED_SAMPLES, [tokens], trained=trained, told=told)
    return Lengths(GUESSED_SAMPLES, [12] * 50 + [120] * 50, captions=2, told=told)


def measured(
    recipe: RunRecipe, count_tokens: Callable[[str], int] | None, a_turn: float
) -> Lengths:
    """Read a recipe's training data: all records of a source's first file, the others by size.

    Args:
        recipe: Recipe whose data are there.
        count_tokens: Counts a text's tokens. None: four characters are one.
        a_turn: Tokens that the chat template writes around a turn, or that a caption has more.
    """
    count = count_tokens or (lambda text: math.ceil(len(text) / _CHARS_A_TOKEN))
    conversations = isinstance(recipe, VlmRecipe)
    given = [source for key in ("train", "data", "sources") for source in getattr(recipe, key, ())]
    largest = max((source.weight for source in given), default=1.0)  # of captions, ratios count
    counted: list[tuple[float, list[Any]]] = []
    for source in expand_mixtures(given) if conversations else given:
        rows, sample = _read(source, getattr(recipe, "plain", False))
        if conversations:
            rows = len(chosen_rows(source.model_copy(update={"weight": 1.0}), rows, 0))
        told = [
            ([(count(text) + round(a_turn), own) for text, own in texts], pictures)
            for texts, pictures in sample
        ]
        counted.append((rows * source.weight / (1 if conversations else largest), told))
    total = sum(rows for rows, _ in counted) or 1
    records = sum(len(told) for _, told in counted)
    found, trained, images, captions, seen = Lengths(round(total), []), 0, 0, 0, 0
    for drawn, told in counted:  # as often as the source is drawn, however many were measured
        for texts, pictures in islice(cycle(told), round(records * drawn / total)):
            lengths = [length for length, _ in texts]
            trained += sum(length for length, own in texts if own)
            seen, images, captions = seen + 1, images + pictures, captions + len(texts)
            found.texts += [sum(lengths)] if conversations else lengths
            found.conversations += [(sum(lengths), pictures)] * conversations
    if not seen:
        return guessed(recipe)
    found.texts.sort()
    found.images, found.captions = images / seen, captions / seen
    found.trained = trained / max(1, sum(found.texts))
    ruler = "the tokenizer" if count_tokens else f"{_CHARS_A_TOKEN} characters a token"
    found.told = f"{found.samples:,} samples, {found.mean:.0f} tokens a text by {ruler}"
    return found


def _read(source: Any, plain: bool) -> tuple[int, list[tuple[list[tuple[str, bool]], int]]]:
    """Records of a source, and of some their texts (and whether each trains) and pictures."""
    files = reading.source_files(source)
    first = source.model_copy(update={"path": str(files[0]), "dataset": ""})
    captions = isinstance(source, CaptionSource)
    read: Any = reading.iter_records if captions else reading.source_rows
    records: Iterator[Any] = read(first, Refused())
    kept: list[Any] = []
    rows, draw = 0, random.Random(0)
    for rows, record in enumerate(records, start=1):
        at = rows - 1 if rows <= SAMPLE else draw.randrange(rows)
        if at < SAMPLE:
            kept[at : at + 1] = [record]
    sizes = [file.stat().st_size for file in files]
    rows = min(round(rows * sum(sizes) / max(1, sizes[0])), source.limit or 1 << 62)
    sample = []
    for record in kept:
        with suppress(RecordError, ConversationError):
            if captions:
                found = reading.collect_captions(record, source.fields).values()
                sample.append(([(text, True) for texts in found for text in texts], 1))
                continue
            row = to_record(record[2], "")
            spoken = [("".join(texts_of([m])), m["role"] == "assistant") for m in row.messages]
            answers = [turn for turn in spoken if turn[1]]
            sample.append((answers[:1] if plain else spoken, len(row.images)))
    return rows, sample
