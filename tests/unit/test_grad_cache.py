"""GradCache gives the gradient of the whole batch, at any number of chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPModel, TrainingArguments

from llm2clip_vlm.losses.contrastive import contrastive_loss
from llm2clip_vlm.models.flops import flop_counter
from llm2clip_vlm.training.encoder.encoder_trainer import (
    EncoderTrainer,
    _ClampLogitScale,
    prepare_model,
    split_batch,
)
from llm2clip_vlm.training.grad_cache import Embeds, cached_loss
from llm2clip_vlm.training.text.text_trainer import CaptionContrastiveTrainer, split_groups


class Towers(nn.Module):
    """Two towers with dropout, k texts an image, a scale; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 5))
        self.text = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.passes: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, y: Tensor) -> Embeds:
        self.passes.append((len(x), torch.is_grad_enabled()))
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        return Embeds((image, text), (self.logit_scale.exp(),))


def batch(k: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(9, 6, generator=generator),
        "y": torch.randn(9 * k, 4, generator=generator),
    }


def loss(embeds: Embeds) -> Tensor:
    return contrastive_loss(*embeds.rows, *embeds.shared)


def step(chunks: Sequence[dict[str, Tensor]], cached: bool) -> tuple[float, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    model = Towers().train()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(7)
    if cached:
        value = cached_loss(accelerator, model, chunks, lambda part: model(**part), loss)
    else:  # the same chunks, so the same dropout, in one graph
        parts = [model(**part) for part in chunks]
        rows = tuple(torch.cat(same) for same in zip(*(p.rows for p in parts), strict=True))
        value = loss(Embeds(rows, parts[-1].shared))
    accelerator.backward(value)
    assert accelerator.sync_gradients
    assert model.logit_scale.grad is not None
    draw = torch.rand(())  # the generator goes on as after one forward pass
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return value.item(), grads | {"draw": draw}, model.passes


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9, 20])
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_are_those_of_one_graph_with_dropout(size: int, k: int) -> None:
    chunks = split_batch(batch(k), size)
    assert sum(len(chunk["x"]) for chunk in chunks) == 9
    want, want_grads, _ = step(chunks, cached=False)
    got, got_grads, passes = step(chunks, cached=True)
    assert got == pytest.approx(want, abs=1e-6)
    assert set(got_grads) == set(want_grads)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, atol=1e-6, rtol=1e-5, msg=name)
    # every chunk but the last is embedded twice, the second time with a graph
    sizes = [len(chunk["x"]) for chunk in chunks]
    assert passes == [(n, False) for n in sizes[:-1]] + [(sizes[-1], True)] + [
        (n, True) for n in sizes[:-1]
    ]


def test_one_graph_at_a_time() -> None:
    """The kept graph is used up before another chunk gets one."""
    events: list[str] = []
    torch.manual_seed(0)
    model = Towers()

    def embed(part: dict[str, Tensor]) -> Embeds:
        out: Embeds = model(**part)
        if torch.is_grad_enabled():
            events.append("graph")
            out.rows[0].register_hook(lambda grad: events.append("used"))
        return out

    accelerator = Accelerator(cpu=True)
    chunks = split_batch(batch(), 3)
    accelerator.backward(cached_loss(accelerator, model, chunks, embed, loss))
    assert events == ["graph", "used"] * 3


def test_groups_are_split_until_there_are_enough() -> None:
    def group(*lengths: int) -> dict[str, Tensor]:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return {"input_ids": torch.tensor(lengths)[:, None] * mask, "attention_mask": mask}

    groups = [group(9, 8), group(5, 3, 2), group(1)]
    assert split_groups(groups, 2) == groups
    parts = split_groups(groups, 6)
    assert [part["input_ids"].shape for part in parts] == [(1, n) for n in (9, 8, 5, 3, 2, 1)]
    assert [int(part["input_ids"][0, 0]) for part in parts] == [9, 8, 5, 3, 2, 1]
    assert all((part["attention_mask"] == 1).all() for part in parts)
    # another process may have more texts than this one: what is repeated comes last
    assert [int(part["input_ids"][0, 0]) for part in split_groups(groups, 8)] == [
        *(9, 8, 5, 3, 2, 1, 1, 1)
    ]


@pytest.mark.parametrize("micro", [None, 2])
def test_an_ordinary_clips_loss_is_its_own(tiny_clip: Path, tmp_path: Path, micro: Any) -> None:
    """Stage 2's control: the trainer's value is the one that transformers' CLIP gives itself."""
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(5, 3, 32, 32, generator=generator),
        "input_ids": torch.tensor([[0, 5 + i, 9 - i, 3] for i in range(5)]),
        "attention_mask": torch.ones(5, 4, dtype=torch.long),
    }
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        want = model(**batch, return_loss=True).loss
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=5,
        data_seed=7,
        dataloader_drop_last=True,
        use_cpu=True,
        report_to=[],
    )
    dataset: Any = type("Pairs", (), {"__len__": lambda self: 5})()
    trainer = EncoderTrainer(
        model, args, dataset, learning_rates={"": 1e-3}, micro_batch_size=micro
    )
    assert dataset.order_seed == 7
    value = trainer.compute_loss(model, batch | {"caption_ids": torch.arange(5)})
    torch.testing.assert_close(value.detach(), want, atol=2e-6, rtol=0)


def test_the_scale_is_clamped_at_both_ends() -> None:
    scale = nn.Parameter(torch.tensor(0.0))
    for value, want in ((-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100.0))):
        with torch.no_grad():
            scale.fill_(value)
        _ClampLogitScale(scale).on_optimizer_step(None, None, None)
        assert scale.item() == pytest.approx(want)
    _ClampLogitScale(frozen := nn.Parameter(torch.tensor(5.0), False)).on_optimizer_step(*"   ")
    assert frozen.item() == 5.0


def test_flops_are_of_one_image(tiny_clip: Path, tmp_path: Path) -> None:
    """Counted over two images with their captions, told for one; the log multiplies by images."""
    model = CLIPModel.from_pretrained(tiny_clip)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 9, 3], [2, 6, 8, 3]])
    parts: dict[str, Any] = {
        "__len__": lambda self: 2,
        "__getitems__": lambda self, rows: {"pixel_values": pixels[rows]},
        "to_float": lambda self, values: values,
        "caption": lambda self, row: str(row),
    }
    two: Any = type("Two", (), parts)()
    found = prepare_model(model, two, lambda texts: {"input_ids": ids[: len(texts)]}, "cpu")
    with flop_counter() as counter:
        model(pixel_values=pixels[:1], input_ids=ids[:1], return_loss=True).loss.backward()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_text_trainers_loss_by_loops(symmetric: bool) -> None:
    """Equal records, a hard negative that is a pair's own text, an empty slot, smoothing."""
    torch.manual_seed(0)
    embeds = torch.randn(4 + 4 + 2, 6, dtype=torch.float64)
    inputs = {
        "texts": torch.tensor([[0, 1], [2, 3], [4, 0], [6, 7]]),  # the third has the first's text
        "records": torch.tensor([0, 1, 2, 3]),
        "negatives": torch.tensor([9, 3]),  # the second is the positive of pair 1
    }
    self: Any = SimpleNamespace(
        scale=7.0, symmetric=symmetric, args=SimpleNamespace(label_smoothing_factor=0.1)
    )
    got = CaptionContrastiveTrainer._loss(self, embeds, inputs, 3)
    query, positive, hard = F.normalize(embeds, dim=-1).split([4, 4, 2])
    alike = {(0, 2), (2, 0)}

    def entropy(scores: list[Tensor], own: Tensor) -> Tensor:
        total = torch.stack(scores).logsumexp(0)
        return 0.9 * (total - own) + 0.1 * (total - torch.stack(scores).mean())

    there, back = [], []
    for i in range(4):
        others = [j for j in range(4) if (i, j) not in alike]
        scores = [7.0 * query[i] @ positive[j] for j in others]
        scores += [7.0 * query[i] @ hard[n] for n in range(2) if (i, n) != (1, 1)]
        own = 7.0 * query[i] @ positive[i]
        there.append(entropy(scores, own))
        back.append(entropy([7.0 * query[j] @ positive[i] for j in others], own))
    want = torch.stack(there).mean()
    if symmetric:
        want = (want + torch.stack(back).mean()) / 2
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
