"""Captions that describe the same image, and pairs of them for stage 1."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from llm2clip_vlm.config import CaptionSource
from llm2clip_vlm.data.records import (
    BadRecords,
    RecordError,
    RowGroup,
    collect_captions,
    iter_records,
)

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
        source: The file with its filters.
        bad: Takes records with an empty caption or too few of them.
        min_captions: Different captions that a record needs (stage 1: 2).

    Returns:
        The usable records, in file order.

    Raises:
        RecordError: The file cannot be used, more records are bad than allowed, or all are.
    """
    records = []
    for group in iter_records(source, bad):
        try:
            record = CaptionRecord(_key(group), collect_captions(group, source.fields))
        except RecordError as error:
            bad.add(group.where, str(error))
            continue
        if len(record.texts) < min_captions:
            bad.add(
                group.where,
                f"{len(record.texts)} different caption(s), expected at least {min_captions}",
            )
            continue
        records.append(record)
    if not records:
        raise RecordError(f"{source.path}: all of its {bad.count} records are bad")
    logger.info("read %d records from %s", len(records), source.path)
    return records


def _key(group: RowGroup) -> str:
    """A grouped record is named by its group, another by its `id` where it has one."""
    name = group.rows[0].get("id")
    if group.key == group.where and isinstance(name, str | int):
        return str(name)
    return group.key


def held_out_pairs(records: Sequence[CaptionRecord]) -> tuple[list[str], list[str]]:
    """Queries and gallery of caption retrieval accuracy (CRA).

    Args:
        records: Records with at least two different captions.

    Returns:
        Each record's first caption (queries) and its second (gallery), in the records' order.

    Paper: LLM2CLIP v6 appendix table A1 (first two captions of each image, no instruction).
    """
    return [record.texts[0] for record in records], [record.texts[1] for record in records]


class CaptionPair(NamedTuple):
    """Two different captions of one record, as positions in :attr:`CaptionPairs.texts`."""

    record: int
    """Position of the record over all sources."""
    query: int
    """Position of one caption's text."""
    positive: int
    """Position of the other's."""


class CaptionPairs(Dataset[CaptionPair]):
    """Draws two different captions of a record, anew in every epoch.

    What is drawn depends on the seed, the epoch and the record alone: not on the number of
    processes, of workers, or of steps before a resume. Items are asked for by `(epoch, record)`,
    as :class:`EpochSampler` does.

    A source of the largest weight gives each of its records once per epoch, one of half that
    weight half of its records, another half in each epoch.

    Args:
        sources: Records of each source, each with at least two different captions.
        weights: One weight above zero a source; only their ratios matter.
        seed: Seed of order and captions.

    Raises:
        ValueError: There is no record, a record has fewer than two different captions, or the
            weights do not fit the sources.
    """

    def __init__(
        self, sources: Sequence[Sequence[CaptionRecord]], weights: Sequence[float], seed: int
    ) -> None:
        if not sources or len(weights) != len(sources) or min(weights, default=0.0) <= 0:
            raise ValueError(f"{len(sources)} sources need as many weights > 0, got {weights}")
        position: dict[str, int] = {}
        members: list[list[int]] = []
        for record in chain.from_iterable(sources):
            texts = [position.setdefault(text, len(position)) for text in record.texts]
            if len(texts) < 2:
                raise ValueError(
                    f"record {record.key!r} has {len(texts)} different caption(s), expected 2; "
                    "read it with min_captions=2"
                )
            members.append(texts)
        if not all(len(source) for source in sources):
            raise ValueError("a source has no record")
        self.texts: list[str] = list(position)
        """All different captions."""
        self.seed = seed
        """Seed of order and captions."""
        self.epoch = 0
        """Epoch whose order :class:`EpochSampler` takes next."""
        self._members = np.asarray(list(chain.from_iterable(members)), dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, members)])
        self._sizes = [len(source) for source in sources]
        self._counts = [
            max(1, round(size * weight / max(weights)))
            for size, weight in zip(self._sizes, weights, strict=True)
        ]

    def __len__(self) -> int:
        """Pairs per epoch."""
        return sum(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Takes up another epoch; the Trainer's data loader calls it."""
        self.epoch = int(epoch)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of the records that an epoch takes, shuffled over all sources."""
        rng = np.random.default_rng([self.seed, epoch])
        first, chosen = 0, []
        for size, count in zip(self._sizes, self._counts, strict=True):
            chosen.append(first + rng.permutation(size)[:count])
            first += size
        return rng.permutation(np.concatenate(chosen))

    def __getitem__(self, item: tuple[int, int]) -> CaptionPair:
        """The pair of a record in an epoch.

        Args:
            item: `(epoch, record)`.
        """
        epoch, record = item
        texts = self._members[self._starts[record] : self._starts[record + 1]]
        rng = np.random.default_rng([self.seed, epoch, record])
        query = rng.integers(len(texts))
        positive = (query + rng.integers(1, len(texts))) % len(texts)
        return CaptionPair(record, int(texts[query]), int(texts[positive]))


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, record)` in the order of the data set's current epoch.

    The epoch lives in the data set: on resume with several processes accelerate's nested samplers
    hide this sampler from the data loader's `set_epoch`, which then tells only the data set.

    Args:
        pairs: The data set.
    """

    def __init__(self, pairs: CaptionPairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        """Pairs per epoch."""
        return len(self._pairs)

    def set_epoch(self, epoch: int) -> None:
        """Takes up another epoch."""
        self._pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields the current epoch's items."""
        epoch = self._pairs.epoch
        for record in self._pairs.order(epoch):
            yield epoch, int(record)
