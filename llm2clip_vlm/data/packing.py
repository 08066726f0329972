"""Several samples in one row, none seeing another.

Padding wastes what the longest sample of a batch leaves over. A packed row has no attention mask:
`position_ids` that start again at 0 tell transformers where a sample begins, and only then. Two
things undo that in silence, with an all-ones mask or `use_cache=True` every sample attends to the
ones before it; the collator writes no mask and `VlmTrainer` turns the cache off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip_vlm.constants import IGNORE_INDEX


def plan_packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distributes samples over rows: first-fit decreasing, the same plan on every process.

    Longest first (ties: lower index first), each sample goes to the first row that has room. A
    tree of the rows' room makes this O(n log n).

    Args:
        lengths: Tokens of each sample.
        max_tokens: Tokens of a row.

    Returns:
        Indices of each row's samples; every index appears once.

    Raises:
        ValueError: A length is below 1 or above `max_tokens`; the message names its index.

    Example:
        >>> plan_packs([5, 3, 4, 2], max_tokens=7)
        [[0, 3], [2, 1]]
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_tokens:
            raise ValueError(
                f"sample {index} has {length} tokens, expected 1 to {max_tokens} (max_tokens); "
                "leave it out before packing, it cannot be cut"
            )
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [max_tokens] * (2 * leaves)  # room[node]: most room in any row below it
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """Rows of samples; an item is the list of a row's samples, for :class:`PackedCollator`."""

    def __init__(self, samples: Any, max_tokens: int) -> None:
        """Plans the rows.

        Args:
            samples: A map-style dataset with `lengths`.
            max_tokens: Tokens of a row.

        Raises:
            ValueError: As :func:`plan_packs`.
        """
        self._samples = samples
        self.packs = plan_packs(samples.lengths, max_tokens)
        self.lengths = [sum(samples.lengths[i] for i in pack) for pack in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._samples[i] for i in self.packs[index]]


class PackedCollator:
    """Joins all samples of all rows of a batch into one row of `[1, t]`.

    Returns `input_ids`, `labels`, `position_ids` `[1, t]`, int64, and `pixel_values`
    `[n, 3, h, w]` if there are images. The first label of each sample is `IGNORE_INDEX`: it would
    be predicted from the last token of the sample before. There is no `attention_mask`; call the
    model with `use_cache=False`.
    """

    def __call__(self, packs: Sequence[Sequence[Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """Makes one row of all samples of all rows."""
        items = [item for pack in packs for item in pack]
        labels = []
        for item in items:
            own = item["labels"].clone()
            own[0] = IGNORE_INDEX
            labels.append(own)
        batch = {
            "input_ids": torch.cat([item["input_ids"] for item in items])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(i["input_ids"])) for i in items])[None],
        }
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch
