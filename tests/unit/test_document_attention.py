"""Packed rows sample by sample: what a mask over the row gives, without the masked products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.data.packing import PackedCollator
from llm2clip_vlm.models.document_attention import NAME, install_document_attention
from llm2clip_vlm.models.vlm import build_vlm
from tests.unit.test_vlm_trainer import samples


def losses_and_grads(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_packed_rows_are_what_they_were(
    tiny_clip: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    batch = PackedCollator()(samples(4, text_only=(1,)))
    batch.pop("sample_ids")
    want, grads = losses_and_grads(model, batch)
    install_document_attention(model)
    assert model.model.language_model.config._attn_implementation == NAME
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    rows: list[int] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(query.shape[2])
        return inner(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    got, ours = losses_and_grads(model, batch)
    monkeypatch.undo()
    assert got == pytest.approx(want, abs=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    lengths = [len(item["input_ids"]) for item in samples(4, text_only=(1,))]
    depth = model.config.text_config.num_hidden_layers
    assert rows[-4 * depth :] == lengths * depth


def test_padded_rows_and_generation_are_untouched(tiny_clip: Path, tiny_llm: Path) -> None:
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    ids = torch.tensor([[2, 9, 10, 11, 12], [0, 0, 2, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        want, words = model(**inputs).logits, model.generate(**inputs, **settings)
        install_document_attention(model)
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model.generate(**inputs, **settings), words)


def test_another_attention_stays(tiny_clip: Path, tiny_llm: Path) -> None:
    model: Any = build_vlm(tiny_clip, tiny_llm)[0]
    model.model.language_model.config._attn_implementation = "eager"
    install_document_attention(model)
    assert model.model.language_model.config._attn_implementation == "eager"
