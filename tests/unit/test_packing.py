"""Packing: the plan, and that packed samples neither leak nor weigh differently."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.instruction import InstructionCollator
from llm2clip_vlm.data.packing import PackedCollator, PackedDataset, plan_packs


def test_plan_is_first_fit_decreasing() -> None:
    assert plan_packs([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]
    assert plan_packs([], 7) == []
    assert plan_packs([7, 7], 7) == [[0], [1]]


def first_fit_decreasing(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The textbook's quadratic form."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for pack in packs:
            if sum(lengths[i] for i in pack) + lengths[index] <= max_tokens:
                pack.append(index)
                break
        else:
            packs.append([index])
    return packs


def test_plan_equals_the_quadratic_form() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 60))]
        packs = plan_packs(lengths, 20)
        assert packs == first_fit_decreasing(lengths, 20)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9]])
def test_plan_names_what_does_not_fit(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="sample 1 has"):
        plan_packs(lengths, 8)


class Samples:
    """Three documents, two with an image each."""

    def __init__(self, image_id: int, num_visual: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.items: list[dict[str, Any]] = []
        for length, has_image in ((5, True), (9, False), (4, True)):
            words = torch.randint(8, 40, (length,), generator=draw)
            visual = torch.full((num_visual if has_image else 0,), image_id)
            ids = torch.cat([visual, words])
            labels = torch.cat([torch.full_like(visual, IGNORE_INDEX), words])
            item = {"input_ids": ids, "labels": labels}
            if has_image:
                item["pixel_values"] = torch.randn(1, 3, 32, 32, generator=draw)
            self.items.append(item)

    @property
    def lengths(self) -> list[int]:
        return [len(item["input_ids"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@pytest.fixture(scope="module")
def vlm(tiny_clip: Path, tiny_llm: Path) -> Any:
    from llm2clip_vlm.models.vlm import build_vlm

    model, processor = build_vlm(tiny_clip, tiny_llm)
    return model, Samples(processor.image_token_id, 16)


def test_packed_loss_and_gradient_equal_the_padded_ones(vlm: Any) -> None:
    model, samples = vlm
    # Position 0 of a text-only row is never predicted, padded or packed.
    padded = InstructionCollator(0)(samples.items)
    packed = PackedCollator()([samples.items[:2], samples.items[2:]])
    assert "attention_mask" not in packed
    grads, losses = [], []
    for batch in (padded, packed):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


def logits_of_second(model: Any, batch: dict[str, Any], first: int, **arguments: Any) -> Any:
    """Logits of the second document, with and without another first token in the first one."""
    results = []
    for token in (8, 9):
        ids = batch["input_ids"].clone()
        ids[0, first - 1] = token
        with torch.no_grad():
            out = model(**{**batch, "input_ids": ids}, **arguments)
        results.append(out.logits[0, first:])
    return results


def test_a_packed_document_does_not_see_the_one_before(vlm: Any) -> None:
    model, samples = vlm
    batch = PackedCollator()([[samples[1], samples[0]]])
    one, other = logits_of_second(model, batch, samples.lengths[1], use_cache=False)
    torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("trap", ["ones_mask", "cache"])
def test_the_known_traps_do_leak(vlm: Any, trap: str) -> None:
    """If this fails, transformers has mended a trap and the guard may go."""
    model, samples = vlm
    batch = PackedCollator()([[samples[1], samples[0]]])
    arguments: dict[str, Any] = {"use_cache": trap == "cache"}
    if trap == "ones_mask":
        arguments["attention_mask"] = torch.ones_like(batch["input_ids"])
    one, other = logits_of_second(model, batch, samples.lengths[1], **arguments)
    assert (one - other).abs().max() > 1e-4


def test_collator_resets_positions_and_masks_the_first_label(vlm: Any) -> None:
    _, samples = vlm
    batch = PackedCollator()([[samples[1]], [samples[1]]])
    assert batch["position_ids"].tolist() == [[*range(9), *range(9)]]
    assert batch["labels"][0, [0, 9]].tolist() == [IGNORE_INDEX] * 2
    assert (batch["labels"] == IGNORE_INDEX).sum() == 2
    assert "pixel_values" not in batch


def test_dataset_serves_the_plan(vlm: Any) -> None:
    _, samples = vlm
    dataset = PackedDataset(samples, 32)
    assert sorted(i for pack in dataset.packs for i in pack) == [0, 1, 2]
    assert dataset.lengths == [sum(len(s["input_ids"]) for s in dataset[i]) for i in range(2)]
    with pytest.raises(ValueError, match="sample 0"):
        PackedDataset(samples, 20)
