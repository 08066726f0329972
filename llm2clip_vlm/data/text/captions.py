"""Captions that describe the same image, and pairs of them for stage 1.

A source's files are read once. Its records lie in a table (:mod:`llm2clip_vlm.data.reading.table`):
the captions, the digests by which an embedding cache knows them, and for stage 1 their token ids.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Dataset, Sampler

from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.records import collect_captions, iter_records, source_files
from llm2clip_vlm.data.reading.table import Table, arrow_table
from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES, digests_of, key_words, text_digests
from llm2clip_vlm.recipe.base import CaptionPairSource, CaptionSource

logger = logging.getLogger(__name__)

VERSION = 3
"""Version of the table's layout and of the rules by which records are taken or refused."""

COLUMNS: dict[str, Any] = {"texts": "int64", "digests": "binary", "ids": ["int32"]}
"""Columns of the table, beside key and captions: how many different captions a record has, the keys
of these in an embedding cache, and their token ids, if it was made with a tokenizer."""

Tokens = Callable[[], Any]
"""Makes a text encoder's `CaptionTokenizer`, which has met no text."""

_ANY = ("*",)  # direction of a pair that has no prompt of its own
_BLOCK = 4096  # records that are tokenised together


@dataclass(frozen=True)
class CaptionRecord:
    """The captions of one image, without the image."""

    key: str
    """The `id`, the `group_by` value, or the row's place in the file."""
    captions: dict[str, list[str]]
    """Kind (column name, or key of a mapping-valued column) to captions, never empty."""
    ids: Sequence[npt.NDArray[np.int32]] = ()
    """Token ids of each of :attr:`texts`, from a table that has them."""

    @property
    def texts(self) -> list[str]:
        """All captions, in file order, equal ones once."""
        return list(dict.fromkeys(chain.from_iterable(self.captions.values())))

    @property
    def kind_of(self) -> dict[str, str]:
        """The first kind of each caption."""
        return {text: kind for kind in reversed(self.captions) for text in self.captions[kind]}


class CaptionTable(Sequence[CaptionRecord]):
    """The captions of one source, each record read when it is asked for.

    Args:
        table: Result of :func:`caption_rows`.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        """The table itself, with :data:`COLUMNS`."""
        self.kinds: list[str] = table.facts["kinds"]
        """All kinds of captions."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        key, captions, ends = self.table.record(row)
        ids = np.split(self.table.items("ids", row), ends)[:-1] if ends else ()
        return CaptionRecord(key, captions, ids)


class UniqueTexts(Sequence[str]):
    """The different captions of tables, and other texts, in the order of their first appearance.

    Each is read when it is asked for: held are 8 bytes a text and 8 a record.

    Args:
        tables: Captions.
        more: What comes after them.
    """

    def __init__(self, tables: Sequence[CaptionTable], more: Sequence[str] = ()) -> None:
        last = CaptionRecord("", {"": [*more]})
        self._records: Any = ConcatDataset[CaptionRecord]([*tables, [last]])  # type: ignore[list-item]
        counts = [table.table.column("texts") for table in tables]
        self._ends = np.cumsum(np.concatenate([*counts, [len(last.texts)]]))
        self.total = int(self._ends[-1])
        """Texts in all, those of a record once."""
        stored = chain.from_iterable(table.table.cells("digests") for table in tables)
        cells = chain(stored, [digests_of(last.texts)])
        self._digests = [each.reshape(-1, DIGEST_BYTES) for each in cells]
        words, filled = np.empty((2, self.total), np.uint64), 0
        for part in self._digests:
            words[:, filled : (filled := filled + len(part))] = key_words(part).T
        order = np.lexsort(words)  # equal ones as they appear
        ordered = (word[order] for word in words)
        new = np.ones(self.total, bool)
        new[1:] = np.any([word[1:] != word[:-1] for word in ordered], axis=0)
        self._places = np.sort(order[new])

    def keys(self, prompt: str = "") -> Iterator[npt.NDArray[np.uint8]]:
        """The texts' keys in an embedding cache, `[n, 32]`, some thousand at a time."""
        start = 0
        for digests in self._digests:
            part = range(*np.searchsorted(self._places, [start, start + len(digests)]).tolist())
            chosen = digests[self._places[part.start : part.stop] - start]
            yield digests_of([self[n] for n in part], prompt) if prompt else chosen
            start += len(digests)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        place = self._places[number]
        record = int(np.searchsorted(self._ends, place, side="right"))
        return self._records[record].texts[place - self._ends[record]]  # counted from its last


def read_captions(
    source: CaptionSource,
    bad: BadRecords,
    *,
    min_captions: int = 1,
    tokens: Tokens | None = None,
    keep: bool = True,
) -> CaptionTable:
    """Reads the records of a source.

    Args:
        source: The file with its filters. Every record of a directed pair source has an anchor
            and a positive that differs from it.
        bad: Takes records with an empty caption or too few of them.
        min_captions: Different captions that a record needs (stage 1: 2).
        tokens: Makes a text encoder's `CaptionTokenizer`, for records with token ids. None:
            without.
        keep: Keep the table of a large source in a file, to be mapped at the next start.

    Returns:
        The usable records, in file order.

    Raises:
        RecordError: The file cannot be used, more records are bad than allowed, or all are; or the
            table cannot be written.
    """
    table = arrow_table(
        source_files(source),
        source.index_dir,
        lambda: [VERSION, source.selection, min_captions, tokens and tokens().identity()],
        COLUMNS,
        partial(caption_rows, partial(_usable, source, min_captions), tokens),
        keep=keep,
    )
    bad.take(len(table) + len(table.refused), table.refused)
    if not len(table):
        raise RecordError(f"{source.title}: all of its {len(table.refused)} records are bad")
    logger.info("read %d records from %s", len(table), source.title)
    return CaptionTable(table)


def caption_rows(
    read: Callable[[Refused], Iterator[CaptionRecord]],
    tokens: Tokens | None,
    refused: Refused,
    facts: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Makes the rows of a :class:`CaptionTable`.

    Args:
        read: Gives the records.
        tokens: See :func:`read_captions`.
        refused: Takes what cannot be used.
        facts: Gets `kinds`, and in `told` what there is to say of the tokens.
    """
    records, kinds = read(refused), dict[str | None, None]()
    own = tokens and tokens()
    while part := list(islice(records, _BLOCK)):
        ids = iter(own([text for record in part for text in record.texts]) if own else ())
        for record in part:
            kinds |= dict.fromkeys(map(record.kind_of.get, texts := record.texts))
            its = list(islice(ids, len(texts)))
            yield {
                "record": [record.key, record.captions, np.cumsum([*map(len, its)]).tolist()],
                "texts": len(texts),
                "digests": text_digests(texts),
                "ids": [*chain.from_iterable(its)],
            }
    facts["kinds"] = list(kinds)
    facts["told"] = own and own.told()


def _usable(source: CaptionSource, min_captions: int, refused: Refused) -> Iterator[CaptionRecord]:
    """The records that can be used, in file order."""
    directed = isinstance(source, CaptionPairSource) and source.directed
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
        yield record


def _require_pair(record: CaptionRecord, fields: Sequence[str]) -> None:
    anchors, positives = (record.captions.get(name, []) for name in fields[:2])
    if not anchors or set(positives) <= set(anchors):
        raise RecordError(
            f"no text in {fields[1]!r} beside that in {fields[0]!r}; a pair of equal texts "
            "teaches nothing"
        )


class CaptionPair(NamedTuple):
    """Two different captions of one record."""

    record: int
    """Position of the record over all sources."""
    query: str
    """One caption."""
    positive: str
    """The other."""
    negative: str = ""
    """A hard negative, or nothing."""
    prompt: str = ""
    """Text before the query."""
    ids: Sequence[npt.NDArray[np.int32]] = ()
    """Token ids of query, positive and negative, from a table that has them."""


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
        ValueError: A prompt is for a pair that its source never gives.

    Paper: LLM2CLIP v6 section 3.1; released code `E5_cc3m.py` (prompts before the query, negative).
    """

    def __init__(
        self, sources: Sequence[CaptionTable], rules: Sequence[CaptionPairSource], seed: int
    ) -> None:
        self.seed = seed
        """Seed of captions."""
        self.order_seed = seed
        """Seed of the order of an epoch."""
        self.epoch = 0
        """Epoch whose order :class:`EpochSampler` takes next."""
        self._records = ConcatDataset[CaptionRecord](sources)  # type: ignore[arg-type]
        self._rules = rules
        largest = max(rule.weight for rule in rules)
        self._counts = [
            max(1, round(len(source) * rule.weight / largest))
            for source, rule in zip(sources, rules, strict=True)
        ]
        self._prompts = [
            {
                tuple(map(str.strip, name.split("->", 1))): text
                for name, text in rule.prompts.items()
            }
            for rule in rules
        ]
        for source, rule, prompts in zip(sources, rules, self._prompts, strict=True):
            kinds = rule.fields[:2] if rule.directed else source.kinds
            for direction in (each for each in prompts if each != _ANY):
                unknown = [kind for kind in direction if kind not in kinds]
                if unknown or (rule.directed and direction != tuple(kinds)):
                    why = f"no caption is of kind {unknown[0]!r}" if unknown else "no pair is so"
                    raise ValueError(
                        f"prompts: {'->'.join(direction)!r}: {why}; the kinds of {rule.title} are "
                        f"{kinds}{' in this order' * rule.directed}"
                    )

    def __len__(self) -> int:
        """Pairs per epoch."""
        return sum(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Starts another epoch; the Trainer's data loader calls it."""
        self.epoch = int(epoch)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of the records that an epoch takes, shuffled over all sources."""
        rng = np.random.default_rng([self.order_seed, epoch])
        ends = self._records.cumulative_sizes
        sources = zip(ends, np.diff([0, *ends]), self._counts, strict=True)
        chosen = [end - size + rng.permutation(size)[:count] for end, size, count in sources]
        return rng.permutation(np.concatenate(chosen))

    def items(self, epoch: int) -> Iterator[tuple[int, int]]:
        """An epoch's items, in its order."""
        return ((epoch, int(record)) for record in self.order(epoch))

    def __getitem__(self, item: tuple[int, int]) -> CaptionPair:
        """The pair of a record in an epoch.

        Args:
            item: `(epoch, record)`.
        """
        epoch, number = item
        record, source = self._records[number], bisect_right(self._records.cumulative_sizes, number)
        rule, prompts = self._rules[source], self._prompts[source]
        texts = record.texts
        kinds = [*map(record.kind_of.get, texts)]
        rng = np.random.default_rng([self.seed, epoch, number])
        if not rule.directed:
            query = int(rng.integers(len(texts)))
            drawn = [query, int(query + rng.integers(1, len(texts))) % len(texts)]
        else:
            places = [[i for i, kind in enumerate(kinds) if kind == name] for name in rule.fields]
            drawn = [int(rng.choice(own)) for own in places if own]  # a negative may be absent
        direction = kinds[drawn[0]], kinds[drawn[1]]
        query, positive, negative = [*(texts[n] for n in drawn), ""][:3]
        prompt = prompts.get(direction, prompts.get(_ANY, ""))
        ids = [record.ids[n] for n in drawn] if record.ids else ()
        return CaptionPair(number, query, positive, negative, prompt, ids)


class EpochSampler(Sampler[Any]):
    """Yields a data set's items in the order of its current epoch, kept as an array.

    The epoch lives in the data set: on resume with several processes accelerate's nested samplers
    hide this sampler from the data loader's `set_epoch`, which then reaches only the data set.

    Args:
        pairs: The data set, with `epoch`, `set_epoch`, and `items` of an epoch.
    """

    def __init__(self, pairs: Any) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        """Pairs per epoch."""
        return len(self._pairs)

    def set_epoch(self, epoch: int) -> None:
        """Starts another epoch."""
        self._pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Yields the current epoch's items."""
        yield from self._pairs.items(self._pairs.epoch)
