"""Rows of several samples, none of which sees another.

Padding wastes what the longest sample of a batch leaves over. A packed row has no attention mask:
`position_ids` that start again at 0 tell transformers where a sample begins, and only then. Two
things undo that in silence: with an all-ones mask or `use_cache=True` every sample attends to the
ones before it. The collator writes no mask and `VlmTrainer` turns the cache off.

What is packed is an optimizer step: its samples are drawn as without packing, and only their
distribution over processes and micro-batches is planned. So the batch size of a recipe keeps its
meaning, and a packed run computes the same updates. Where a step has too few samples for a row on
each process, the others get an empty row, which counts for nothing: no sample is seen twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad
from torch.utils.data import Sampler

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import FILLER, joined_images


def plan_packs(
    lengths: Sequence[int],
    max_tokens: int,
    images: Sequence[int] | None = None,
    max_images: int | None = None,
) -> list[list[int]]:
    """Distributes samples over rows: best-fit decreasing, the same plan on every process.

    Longest first (ties: lower index first), each sample goes to the fullest row that has room for
    it. Rows are found by their room through the bits of one integer, so a million samples take
    seconds.

    Args:
        lengths: Tokens of each sample.
        max_tokens: Tokens of a row.
        images: Images of each sample. None: without any.
        max_images: Images of a row. None: as many as come.

    Returns:
        Indices of each row's samples; every index appears once.

    Raises:
        ValueError: A sample is empty or too large for a row; the message names its index.

    Example:
        >>> plan_packs([5, 3, 4, 2], max_tokens=7)
        [[0, 3], [2, 1]]
    """
    # Best fit asks for the smallest room that takes a sample. Bit n of `rooms` is set while a row
    # takes n more tokens, so that is the lowest bit of `rooms` from bit `length` on; a search over
    # all rows would be quadratic. Example, [5, 3, 4, 2] in rows of 7, longest first: 5 opens row
    # 0, which takes 2 more (rooms 0b100); 4 opens row 1, which takes 3 more (0b1100); 3 fills row
    # 1 (0b101), 2 fills row 0: [[0, 3], [2, 1]].
    counts = [0] * len(lengths) if images is None or max_images is None else list(images)
    budget = max_images or 0
    refuse_misfits(lengths, counts, max_tokens, max_images)
    packs: list[list[int]] = []
    left: list[int] = []  # images that a row still takes
    rows: defaultdict[int, list[int]] = defaultdict(list)  # by the tokens they still take
    rooms = 0  # bit n: some row takes n more tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, count = lengths[index], counts[index]
        fitting, row = rooms >> length << length, -1
        while fitting and row < 0:
            room = (fitting & -fitting).bit_length() - 1
            places = range(len(rows[room]) - 1, -1, -1)
            place = next((p for p in places if left[rows[room][p]] >= count), -1)
            if place >= 0:
                row = rows[room].pop(place)
                rooms &= ~(0 if rows[room] else 1 << room)
            fitting &= fitting - 1
        if row < 0:
            row, room = len(packs), max_tokens
            packs.append([])
            left.append(budget)
        packs[row].append(index)
        left[row] -= count
        rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return packs


def refuse_misfits(
    lengths: Sequence[int], images: Sequence[int], max_tokens: int, max_images: int | None
) -> None:
    """Refuse samples that no row can hold.

    Args:
        lengths: Tokens of each sample.
        images: Images of each sample.
        max_tokens: See :func:`plan_packs`.
        max_images: See :func:`plan_packs`.

    Raises:
        ValueError: Names the first by its index.
    """
    for index, (length, count) in enumerate(zip(lengths, images, strict=True)):
        if not 1 <= length <= max_tokens or (max_images is not None and count > max_images):
            raise ValueError(
                f"sample {index} has {length} tokens and {count} images (AnyRes: crops), expected "
                f"1 to {max_tokens} tokens and at most {max_images} images; raise "
                "`packing_max_images`, or leave the sample out"
            )


def balanced_packs(
    lengths: Sequence[int],
    num_packs: int,
    max_tokens: int,
    images: Sequence[int] | None = None,
    max_images: int | None = None,
) -> list[list[int]]:
    """Exactly `num_packs` rows of nearly equal length within the budgets, longest first.

    The smallest row length that suffices is searched by bisection (MULTIFIT), to one part in 64, so
    that processes wait little for each other. Rows beyond the number of samples are empty.

    Args:
        lengths: Tokens of each sample.
        num_packs: Rows; :func:`plan_packs` needs no more.
        max_tokens: Tokens of a row.
        images: See :func:`plan_packs`.
        max_images: See :func:`plan_packs`.

    Paper: Coffman, Garey, Johnson (1978), "An application of bin-packing to multiprocessor
    scheduling".
    """
    # `plan_packs` fills rows to the brim and leaves the last one nearly empty: one process would
    # compute while the others wait. A lower limit spreads the samples, and the lowest limit with
    # enough rows is near the mean. Example, [6, 2, 2, 2] in 2 rows of at most 10: the limit 10
    # gives rows of 10 and 2 tokens, the limit 6 rows of 6 and 6.
    packs = plan_packs(lengths, max_tokens, images, max_images)
    assert 1 <= len(packs) <= num_packs, (len(packs), num_packs)
    low, high = max(*lengths, -(-sum(lengths) // num_packs)), max_tokens
    while high - low > low // 64:
        middle = (low + high) // 2
        found = plan_packs(lengths, middle, images, max_images)
        if len(found) <= num_packs:
            packs, high = found, middle
        else:
            low = middle + 1
    while len(packs) < num_packs:  # too few: halve the row of most samples, down to empty ones
        most = packs.pop(max(range(len(packs)), key=lambda n: len(packs[n])))
        packs += [most[::2], most[1::2]]
    return sorted(packs, key=lambda pack: -sum(lengths[i] for i in pack))


class PackedBatches(Sampler[list[int]]):
    """Micro-batches of one process, for :class:`PackedCollator`; the same plan on all of them.

    An epoch's samples are shuffled and dealt to optimizer steps, each once; the last step has what
    remains. A step's samples with images and those without become rows apart, of similar
    length and a multiple of the processes of each, so that in each micro-step the processes do the
    same work. To that end both kinds are shuffled by themselves and dealt a few at a time. Where
    there are fewer samples than rows, some are empty lists (:class:`PackedCollator` makes a row of
    them that trains nothing). The order depends on the seed and the epoch alone, and a step's plan
    on its samples: resuming is a cursor, whatever came before.

    Args:
        lengths: Tokens of each sample.
        images: Images of each sample.
        global_batch_size: Samples of an optimizer step, a multiple of `world_size`.
        max_tokens: Tokens of a micro-batch.
        max_images: Images of a micro-batch. None: no limit.
        seed: Seed of the order.
        epochs: Epochs for which the number of micro-batches suffices.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out an epoch's last step where it has fewer samples.

    Raises:
        ValueError: A sample does not fit into a micro-batch, or there is no step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        images: Sequence[int],
        *,
        global_batch_size: int,
        max_tokens: int,
        max_images: int | None = None,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        refuse_misfits(lengths, images, max_tokens, max_images)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._images = np.asarray(images, dtype=np.int64)
        self.max_tokens = max_tokens
        """Tokens of a micro-batch at most."""
        self._max_images = max_images
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._epoch, self._resumed, self._done = 0, 0, 0
        sizes = range(min(max(8, global_batch_size // 4), global_batch_size), global_batch_size + 1)
        self.dealt = next(n for n in sizes if global_batch_size % n == 0 and n % world_size == 0)
        """Samples that are shuffled as one; with the seed and the epoch, what decides the order."""
        self._deals = global_batch_size // self.dealt
        whole, rest = divmod(len(lengths), global_batch_size)
        self._num_steps = whole + (rest > 0 and not drop_last)
        if not self._num_steps:
            raise ValueError(
                f"an epoch has {len(lengths)} samples, fewer than one step of {global_batch_size}; "
                "lower global_batch_size, or set trainer.dataloader_drop_last to false"
            )
        needed = [
            [sum(self._micro_steps(part) for part in self._kinds(step)) for step in self.steps(n)]
            for n in range(max(epochs, 1))
        ]
        self.accumulation = max(map(max, needed))
        """Micro-batches of a process in an optimizer step."""
        self._last = self.accumulation
        if self._num_steps * global_batch_size > len(lengths):
            self._last = max(counts[-1] for counts in needed)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the Trainer calls it."""
        self._epoch = epoch

    def resume(self, epoch: int, done: int) -> None:
        """Sets the cursor: of this epoch, the first `done` micro-batches have been trained on."""
        self._resumed, self._done = epoch, done

    def steps(self, epoch: int, first: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """Samples of each optimizer step of an epoch, in order, from the step `first` on."""
        draw, size = np.random.default_rng([self._seed, epoch]), self.dealt
        orders = [draw.permutation(kind) for kind in self._kinds(np.arange(len(self._lengths)))]
        whole = [order[: len(order) // size * size] for order in orders]
        rest = [order[len(part) :] for order, part in zip(orders, whole, strict=True)]
        order = np.concatenate([*whole, *rest])
        deals = draw.permutation(len(order) // size)
        cut = len(deals) * size
        order = np.concatenate([order[:cut].reshape(-1, size)[deals].ravel(), order[cut:]])
        for step in range(first, self._num_steps):
            yield order[step * size * self._deals : (step + 1) * size * self._deals]

    def rows(self, step: npt.NDArray[np.int64], micro_steps: int | None = None) -> list[list[int]]:
        """Samples of each micro-batch of a step: of all processes, then of the next micro-step.

        Args:
            step: Samples of the step.
            micro_steps: Number of micro-steps. None: `accumulation`.
        """
        wanted, world = micro_steps or self.accumulation, self._world_size
        kinds = self._kinds(step)
        shares = [wanted]
        if len(kinds) > 1:
            least = [self._micro_steps(kind) for kind in kinds]
            most = [max(len(kind) // world, few) for kind, few in zip(kinds, least, strict=True)]
            tokens = [self._lengths[kind].sum() for kind in kinds]
            low, high = max(least[0], wanted - most[1]), min(most[0], wanted - least[1])
            first = min(max(round(wanted * tokens[0] / sum(tokens)), low), high)
            shares = [first, wanted - first]
        return [
            [int(kind[i]) for i in pack]
            for kind, share in zip(kinds, shares, strict=True)
            for pack in balanced_packs(
                self._lengths[kind].tolist(),
                share * world,
                self.max_tokens,
                self._images[kind].tolist(),
                self._max_images,
            )
        ]

    def _kinds(self, samples: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Split samples into those with images and those without, as far as there are any."""
        parts = (samples[self._images[samples] > 0], samples[self._images[samples] == 0])
        return [part for part in parts if len(part)]

    def _micro_steps(self, samples: npt.NDArray[np.int64]) -> int:
        """Number of micro-steps that samples of one kind need."""
        lengths, images = self._lengths[samples].tolist(), self._images[samples].tolist()
        packs = plan_packs(lengths, self.max_tokens, images, self._max_images)
        return -(-len(packs) // self._world_size)

    def __len__(self) -> int:
        return (self._num_steps - 1) * self.accumulation + self._last

    def __iter__(self) -> Iterator[list[int]]:
        done = self._done if self._epoch == self._resumed else 0
        yield from repeat([], done)  # dropped unread by the Trainer, which counts on them
        first, done = divmod(done, self.accumulation)
        for number, step in enumerate(self.steps(self._epoch, first), first + 1):
            micro_steps = self._last if number == self._num_steps else self.accumulation
            yield from self.rows(step, micro_steps)[self._rank :: self._world_size][done:]
            done = 0


class PackedCollator:
    """Joins the samples of a micro-batch into one row of `[1, t]`.

    Returns `input_ids`, `labels`, `position_ids` `[1, t]`, int64, `sample_ids`, and `pixel_values`
    `[n, 3, h, w]` if there are images. The first label of each sample is `IGNORE_INDEX`: it would
    be predicted from the last token of the sample before. There is no `attention_mask`; call the
    model with `use_cache=False`. Without any sample the row has two tokens that train nothing.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes one row of all samples."""
        rows = items or [FILLER]
        labels = [pad(item["labels"][1:], (1, 0), value=IGNORE_INDEX) for item in rows]
        return {
            "input_ids": torch.cat([item["input_ids"] for item in rows])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(i["input_ids"])) for i in rows])[None],
        } | joined_images(items)
