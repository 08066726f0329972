"""Captions that describe the same image, and pairs of them for stage 1."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.records import collect_captions, iter_records
from llm2clip_vlm.recipe.base import CaptionPairSource, CaptionSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionRecord:
    """The captions of one image, without the image."""

    key: str
    """The `id`, the `group_by` value, or the row's place in the file."""
    captions: dict[str, list[str]]
    """Kind (column name, or key of a mapping-valued column) to captions, never empty."""

    @property
    def texts(self) -> list[str]:
        """All captions, in file order, equal ones once."""
        return list(dict.fromkeys(chain.from_iterable(self.captions.values())))


def read_captions(
    source: CaptionSource, bad: BadRecords, *, min_captions: int = 1
) -> list[CaptionRecord]:
    """Reads all records of a source.

    Args:
        source: The file with its filters. Every record of a directed pair source has an anchor
            and a positive that differs from it.
        bad: Takes records with an empty caption or too few of them.
        min_captions: Different captions that a record needs (stage 1: 2).

    Returns:
        The usable records, in file order.

    Raises:
        RecordError: The file cannot be used, more records are bad than allowed, or all are.
    """
    directed = isinstance(source, CaptionPairSource) and source.directed
    records: list[CaptionRecord] = []
    refused = Refused()
    for group in iter_records(source, refused):
        try:
            key = group.name("id") or f"{group.file.name}:{group.place}"
            record = CaptionRecord(key, collect_captions(group, source.fields))
            if directed:
                _require_pair(record, source.fields)
            if (found := len(record.texts)) < min_captions:
                raise RecordError(f"{found} different caption(s), expected at least {min_captions}")
        except RecordError as error:
            refused.add(group.where, str(error))
            continue
        records.append(record)
    bad.take(len(records) + len(refused.rows), refused.rows)
    if not records:
        raise RecordError(f"{source.title}: all of its {len(refused.rows)} records are bad")
    logger.info("read %d records from %s", len(records), source.title)
    return records


def _require_pair(record: CaptionRecord, fields: Sequence[str]) -> None:
    anchors, positives = (record.captions.get(name, []) for name in fields[:2])
    if not anchors or set(positives) <= set(anchors):
        raise RecordError(
            f"no text in {fields[1]!r} beside that in {fields[0]!r}; a pair of equal texts "
            "teaches nothing"
        )


class CaptionPair(NamedTuple):
    """Two different captions of one record, as positions in :attr:`CaptionPairs.texts`."""

    record: int
    """Position of the record over all sources."""
    query: int
    """Position of one caption's text."""
    positive: int
    """Position of the other caption's text."""
    prompt: int = 0
    """Position in :attr:`CaptionPairs.prompts` of what stands before the query."""
    negative: int = -1
    """Position of a hard negative's text, or -1."""


class CaptionPairs(Dataset[CaptionPair]):
    """Draws two different captions of a record, anew in every epoch.

    What is drawn depends on the seed, the epoch and the record alone: not on the number of
    processes, of workers, or of steps before a resume. Items are asked for by `(epoch, record)`,
    as :class:`EpochSampler` does.

    A source of the largest weight gives each of its records once per epoch, one of half that
    weight half of its records, another half in each epoch.

    Args:
        sources: Records of each source, each with at least two different captions.
        rules: Each source's weight, of which only the ratios matter, and how its pairs are directed
            and prompted.
        seed: Seed of order and captions.

    Raises:
        ValueError: A prompt names an unknown kind of caption.

    Paper: LLM2CLIP v6 section 3.1; released code `E5_cc3m.py` (prompts before the query, negative).
    """

    def __init__(
        self,
        sources: Sequence[Sequence[CaptionRecord]],
        rules: Sequence[CaptionPairSource],
        seed: int,
    ) -> None:
        position: dict[str, int] = {}
        kind_number: dict[str, int] = {}
        members: list[list[int]] = []
        kinds: list[list[int]] = []
        for record in chain.from_iterable(sources):
            kind_of = {
                text: kind for kind in reversed(record.captions) for text in record.captions[kind]
            }
            texts = record.texts
            assert len(texts) > 1, record.key  # read with min_captions=2
            members.append([position.setdefault(text, len(position)) for text in texts])
            kinds.append([kind_number.setdefault(kind_of[t], len(kind_number)) for t in texts])
        self.texts: list[str] = list(position)
        """All different captions."""
        self.prompts: list[str] = [""]
        """All different prompts, the empty one first."""
        self.seed = seed
        """Seed of order and captions."""
        self.epoch = 0
        """Epoch whose order :class:`EpochSampler` takes next."""
        self._members = np.asarray(list(chain.from_iterable(members)), dtype=np.int64)
        self._kinds = np.asarray(list(chain.from_iterable(kinds)), dtype=np.int32)
        self._starts = np.cumsum([0, *map(len, members)])
        self._sizes = [len(source) for source in sources]
        self._source_ends = np.cumsum(self._sizes)
        largest = max(rule.weight for rule in rules)
        self._counts = [
            max(1, round(size * rule.weight / largest))
            for size, rule in zip(self._sizes, rules, strict=True)
        ]
        self._roles = [
            [kind_number.get(name, -1) for name in rule.fields] if rule.directed else None
            for rule in rules
        ]
        self._prompt_of = [self._prompt_table(rule.prompts, kind_number) for rule in rules]

    def _prompt_table(
        self, prompts: Mapping[str, str], kind_number: Mapping[str, int]
    ) -> dict[tuple[int, int], int]:
        """Prompt of each direction of two kinds; (-1, -1) is any other."""
        table: dict[tuple[int, int], int] = {}
        for name, text in prompts.items():
            direction = [] if name == "*" else [kind.strip() for kind in name.split("->", 1)]
            if unknown := [kind for kind in direction if kind not in kind_number]:
                raise ValueError(
                    f"prompts: {name!r}: no caption is of kind {unknown[0]!r}; the kinds are "
                    f"{list(kind_number)}"
                )
            if text not in self.prompts:
                self.prompts.append(text)
            query, positive = (kind_number[kind] for kind in direction) if direction else (-1, -1)
            table[query, positive] = self.prompts.index(text)
        return table

    def __len__(self) -> int:
        """Pairs per epoch."""
        return sum(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Starts another epoch; the Trainer's data loader calls it."""
        self.epoch = int(epoch)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of the records that an epoch takes, shuffled over all sources."""
        rng = np.random.default_rng([self.seed, epoch])
        sources = zip(self._source_ends, self._sizes, self._counts, strict=True)
        chosen = [end - size + rng.permutation(size)[:count] for end, size, count in sources]
        return rng.permutation(np.concatenate(chosen))

    def __getitem__(self, item: tuple[int, int]) -> CaptionPair:
        """The pair of a record in an epoch.

        Args:
            item: `(epoch, record)`.
        """
        epoch, record = item
        span = slice(self._starts[record], self._starts[record + 1])
        texts, kinds = self._members[span], self._kinds[span]
        source = int(np.searchsorted(self._source_ends, record, side="right"))
        roles, prompts = self._roles[source], self._prompt_of[source]
        rng = np.random.default_rng([self.seed, epoch, record])
        negative = -1
        if roles is None:
            query = rng.integers(len(texts))
            positive = (query + rng.integers(1, len(texts))) % len(texts)
        else:
            query, positive = (rng.choice(np.flatnonzero(kinds == role)) for role in roles[:2])
            if len(hard := np.flatnonzero(kinds == roles[-1])) and len(roles) == 3:
                negative = int(texts[rng.choice(hard)])
        prompt = prompts.get((int(kinds[query]), int(kinds[positive])), prompts.get((-1, -1), 0))
        return CaptionPair(record, int(texts[query]), int(texts[positive]), prompt, negative)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, record)` in the order of the data set's current epoch.

    The epoch lives in the data set: on resume with several processes accelerate's nested samplers
    hide this sampler from the data loader's `set_epoch`, which then reaches only the data set.

    Args:
        pairs: The data set.
    """

    def __init__(self, pairs: CaptionPairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        """Pairs per epoch."""
        return len(self._pairs)

    def set_epoch(self, epoch: int) -> None:
        """Starts another epoch."""
        self._pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields the current epoch's items."""
        epoch = self._pairs.epoch
        for record in self._pairs.order(epoch):
            yield epoch, int(record)
