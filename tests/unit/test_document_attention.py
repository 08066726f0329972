"""Packed rows sample by sample: what a mask over the row gives, without the masked products."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llm2clip_vlm.data.conversation.packing import PackedCollator
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import difference, logits_of
from llm2clip_vlm.models.vlm import document_attention
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.models.vlm.document_attention import (
    NAME,
    install_document_attention,
    install_packing,
)
from llm2clip_vlm.training.vlm.vlm_run import padded_instead
from tests.tiny import llama_config
from tests.tiny_llms import NAMES, build_family, is_tiny
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


def packed_difference(model: Any) -> str | None:
    """How logits of three packed samples, longer than any tiny window, differ from alone."""
    samples = [torch.randint(8, 130, (1, n)) for n in (19, 5, 23)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in samples])[None]
    packed = logits_of(model, torch.cat(samples, dim=1), position_ids=positions)
    return difference(torch.cat([logits_of(model, ids) for ids in samples], dim=1), packed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "doge"])
def test_packed_rows_keep_windows_and_other_masks(
    family: str, attention: str, tiny_clip: Path, tmp_path: Path
) -> None:
    """Mistral's window of six is an argument of attention, Doge's mask depends on the values."""
    model: Any = build_vlm(tiny_clip, build_family(family, tmp_path))[0]
    model.model.language_model.set_attn_implementation(attention)
    assert install_packing(model) is None
    used = model.model.language_model.config._attn_implementation
    assert used == (NAME if attention == "sdpa" else "eager")
    assert packed_difference(model) is None


def test_a_window_with_anyres(tiny_clip: Path, tmp_path: Path) -> None:
    llm = build_family("mistral", tmp_path)
    model: Any = build_vlm(tiny_clip, llm, image_aspect_ratio="anyres")[0]
    assert install_packing(model) is None
    assert packed_difference(model) is None


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "gpt_oss", "xglm", "jamba"])
def test_a_model_whose_samples_see_each_other_says_so(
    family: str, tiny_clip: Path, tmp_path: Path
) -> None:
    model: Any = build_vlm(tiny_clip, build_family(family, tmp_path))[0]
    leak = install_packing(model)
    assert "depend on the sample before it: they differ by" in str(leak)
    assert "differ by" in str(packed_difference(model))
    if family in {"lfm2", "qwen3_5_text"}:  # transformers tells what would keep them apart
        assert "Install `causal_conv1d`" in str(leak)
    ids = torch.randint(8, 130, (2, 9))
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    assert (
        difference(logits_of(model, ids), logits_of(model, padded, attention_mask=mask)[:, :9])
        is None
    )


def test_bounds_reach_a_model_that_asks_for_them(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for `causal_conv1d`'s kernel, which convolves each sample by itself."""
    model: Any = build_vlm(tiny_clip, build_family("lfm2", tmp_path))[0]
    module = __import__(type(model.model.language_model).__module__, fromlist=["x"])
    inner = module.causal_conv1d_fn
    seen: list[dict[str, Any]] = []

    def by_sample(x: torch.Tensor, *args: Any, seq_idx: Any = None, **kwargs: Any) -> torch.Tensor:
        if seq_idx is None:
            return inner(x, *args, **kwargs)
        seen.append({"seq_idx": seq_idx})
        lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        return torch.cat([inner(part, *args, **kwargs) for part in x.split(lengths, -1)], dim=-1)

    monkeypatch.setattr(module, "causal_conv1d_fn", by_sample)
    assert install_packing(model) is None
    assert seen[0]["seq_idx"].tolist() == [[0] * 9 + [1] * 11]
    assert packed_difference(model) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_family_packs_exactly_or_says_that_it_does_not(
    family: str, tiny_clip: Path, tmp_path: Path
) -> None:
    if not is_tiny(family):
        pytest.skip("no tiny one is known")
    try:
        model: Any = build_vlm(tiny_clip, build_family(family, tmp_path))[0]
    except ModelError:
        return
    leak = install_packing(model)
    assert (leak is None) == (packed_difference(model) is None), leak


def test_bounds_and_masks_by_hand() -> None:
    """Samples of 3, 2 and 4 tokens."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    _, kwargs = document_attention._add_bounds(None, (), {"position_ids": positions})
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 4
    assert kwargs["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    for given in ({}, {"position_ids": positions, "attention_mask": 1}):
        assert document_attention._add_bounds(None, (), given) is None
    alone = {"position_ids": torch.arange(5)[None]}
    assert document_attention._add_bounds(None, (), alone) is None
    states = torch.zeros(1, 2, 9, 4)
    assert document_attention._documents(states, states, positions) == [3, 2, 4]
    for begun in (positions + 1, torch.tensor([[4, 5, 6, 0, 1, 0, 1, 2, 3]])):  # after a cache
        assert document_attention._documents(states, states, begun) == []
    assert document_attention._documents(states, torch.zeros(1, 2, 10, 4), positions) == []
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed[8, 5] = False  # a window in the last sample
    masks = document_attention._masks(allowed[None, None], [3, 2, 4])
    assert masks[:2] == [None, None] and torch.equal(masks[2][0, 0], allowed[5:, 5:])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rope_that_the_longest_sample_stretches_is_refused(kind: str) -> None:
    """Alone a short sample has other factors than beside a long one."""
    config = llama_config(99)
    config.max_position_embeddings = 64
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope["original_max_position_embeddings"] = 64
    config.rope_parameters = rope
    torch.manual_seed(0)
    ids = torch.randint(4, 99, (2, 100))
    short = LlamaForCausalLM(config).eval()(ids[:1, :50]).logits
    torch.manual_seed(0)
    ids = torch.randint(4, 99, (2, 100))
    beside = LlamaForCausalLM(config).eval()(ids).logits[:1, :50]
    assert (short - beside).abs().max() > 1e-5
    args: Any = SimpleNamespace(per_device_train_batch_size=1)
    recipe: Any = SimpleNamespace(packing=True, max_length_tokens=65)
    model: Any = SimpleNamespace(config=SimpleNamespace(text_config=config))
    with pytest.raises(ValueError, match=rf"expected at most 64, got 65.*\({kind}\)"):
        padded_instead(model, recipe, args)
    recipe.packing = False
    assert padded_instead(model, recipe, args) == (recipe, None)
    args.per_device_train_batch_size, recipe.max_length_tokens = 2, 64
    assert padded_instead(model, recipe, args) == (recipe, None)
