"""Logits where tokens are trained alone: the same loss and gradients, less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.models.vlm import vlm_loss
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.models.vlm.vlm_loss import install_supervised_loss


def batch(model: Any) -> dict[str, Any]:
    """Two padded samples, one with a picture; few tokens are trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 20, (2, 40), generator=generator)
    ids[0, 2:18] = model.config.image_token_id
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 30:] = ids[0, 30:]
    labels[1, 5:9] = ids[1, 5:9]
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    values = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
    return {**values, "use_cache": False}


def loss_and_grads(model: Any, values: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model.train()(**values).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [2**26, 200], ids=["one", "chunks"])
@pytest.mark.parametrize("items", [None, torch.tensor(7)], ids=["mean", "of-seven"])
def test_it_is_transformers_loss(
    tiny_clip: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, items: Any
) -> None:
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    values = batch(model) | {"num_items_in_batch": items}
    want, grads = loss_and_grads(model, values)
    install_supervised_loss(model)
    assert loss_and_grads(model, values)[0] == want  # a small vocabulary: the same computation
    monkeypatch.setattr(vlm_loss, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(vlm_loss, "CHUNK_LOGITS", chunk)
    install_supervised_loss(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    got, ours = loss_and_grads(model, values)
    assert rows == [14]  # one call, trained positions only
    assert got == pytest.approx(want, abs=1e-6)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-5, msg=name)


def test_nothing_trained_is_zero_with_gradients(
    tiny_clip: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    monkeypatch.setattr(vlm_loss, "SMALL_VOCABULARY", 0)
    install_supervised_loss(model)
    values = batch(model)
    loss, grads = loss_and_grads(model, values | {"labels": values["labels"].fill_(IGNORE_INDEX)})
    assert loss == 0
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= grads.keys()
    assert not any(grad.any() for grad in grads.values())


def test_evaluation_has_all_logits(
    tiny_clip: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm_loss, "SMALL_VOCABULARY", 0)
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    values = batch(model)
    with torch.no_grad():
        want = model.eval()(**values).logits
        install_supervised_loss(model)
        assert torch.equal(model(**values).logits, want)
