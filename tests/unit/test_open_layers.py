"""Every layer of a text encoder is asked, and a text's vector is its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.text import text_encoder
from llm2clip_vlm.models.text.open_layers import attention_kind, layers_see_behind
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers
from tests.tiny_llms import BASE, MORE, NAMES, build_family, is_tiny

TEXTS = ["a red star", "a very large dog and a small cat on the left of the beach", "dog"]
KINDS = {
    "llama": True,
    "gemma2": True,  # norms behind the attention
    "gpt_oss": True,
    "qwen3_5_text": "partial",
    "falcon_h1": "partial",  # attention and Mamba side by side in each layer
    "lfm2": "partial",
    "qwen3_next": "partial",  # with experts
    "jamba": "partial",
    "mixtral": True,
    "mamba": False,
    "gpt_neo": False,  # masks of its own
    "llama4_text": None,  # chunked: causal where padding has a mask built
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_each_layer_is_asked(name: str, dtype: torch.dtype) -> None:
    values = BASE | {"vocab_size": 64, "is_causal": False} | MORE.get(name, {})
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, **values)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = False
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype)
    before = [len(module._forward_hooks) for module in model.modules()]
    answers = layers_see_behind(model)
    assert len(answers) >= 2
    assert attention_kind(answers) == KINDS[name]
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_one_closed_layer_among_open_ones_is_found(tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(build_family("llama", tmp_path, num_hidden_layers=5))
    attention: Any = encoder.backbone.layers[3].self_attn
    whole = attention.forward

    def causal(hidden_states: torch.Tensor, attention_mask: Any = None, **more: Any) -> Any:
        length = hidden_states.shape[1]
        mask = torch.ones(length, length).tril().log()[None, None]
        return whole(hidden_states, attention_mask=mask, **more)

    attention.forward = causal
    with pytest.raises(ModelError, match=r"1 of 5 layers.*layers\.3 \(LlamaDecoderLayer\)"):
        encoder.check_attention()


def test_a_hybrid_is_refused_or_said_to_be_partial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = build_family("qwen3_5_text", tmp_path / "llm")
    with pytest.raises(ModelError, match=r"1 of 2 layers.*0 \(linear.*bidirectional: part"):
        TextEncoder.from_pretrained(llm)
    with caplog.at_level(logging.WARNING):
        encoder = TextEncoder.from_pretrained(llm, bidirectional="partial")
    assert "these layers stay causal: layers.0 (linear_attention)" in caplog.text
    encoder.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "text_encoder.json").read_text())
    assert saved["bidirectional"] == encoder.fingerprint["bidirectional"] == "partial"
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.encode(TEXTS), encoder.encode(TEXTS))
    with pytest.raises(ModelError, match=r"bidirectional is 'partial' in"):
        TextEncoder.from_pretrained(tmp_path / "saved", bidirectional=True)
    TextEncoder.from_pretrained(llm, bidirectional=False)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("llama", "partial", "is bidirectional whatever"),
        ("mamba", True, "is causal whatever"),
        ("mpt", True, "cannot be run so"),
        ("llama4_text", True, "another answer with padding"),
        ("bert", False, "another answer with padding"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, name: str, asked: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        TextEncoder.from_pretrained(build_family(name, tmp_path), bidirectional=asked)


def test_a_vector_that_depends_on_its_neighbours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder.from_pretrained(build_family("llama", tmp_path))
    whole = encoder.backbone.forward

    def blind(attention_mask: Any = None, **inputs: Any) -> Any:
        return whole(attention_mask=torch.ones_like(attention_mask), **inputs)

    monkeypatch.setattr(encoder.backbone, "forward", blind)
    with pytest.raises(ModelError, match="beside longer ones, in LlamaModel: expected equal"):
        encoder.check_attention()


def test_an_export_with_other_vectors_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder.from_pretrained(build_family("qwen3", tmp_path / "llm"))
    encoder.save_pretrained(tmp_path / "saved")
    with torch.no_grad():  # what was saved is not what is compared
        encoder.backbone.layers[0].self_attn.v_proj.weight.mul_(-1)
    with caplog.at_level(logging.WARNING):
        assert not export_sentence_transformers(encoder, tmp_path / "saved", tmp_path / "st")
    assert "one text alone, exported: expected equal vectors" in caplog.text
    assert not (tmp_path / "st").exists()


@pytest.mark.parametrize("name", ["stablelm", "nemotron"])
def test_a_model_that_is_causal_without_a_mask_is_exported_with_one(
    tmp_path: Path, name: str
) -> None:
    encoder = TextEncoder.from_pretrained(build_family(name, tmp_path / "llm"), pooling="last")
    encoder.save_pretrained(tmp_path / "saved")
    assert export_sentence_transformers(encoder, tmp_path / "saved", tmp_path / "st")
    given = json.loads((tmp_path / "st" / "sentence_bert_config.json").read_text())
    model = AutoModel.from_pretrained(tmp_path / "st", **given["model_args"]).eval()
    for texts in ([TEXTS[0]], TEXTS):
        batch = text_encoder.pad_tokens(encoder.tokens(texts), 0, encoder.tokens.num_front_tokens)
        pooled = batch.pop("pool_mask")
        hidden = model(**batch).last_hidden_state
        found = nn.functional.normalize(text_encoder.pool(hidden, pooled, "last"), dim=-1)
        torch.testing.assert_close(found, encoder.encode(TEXTS)[: len(texts)], atol=1e-5, rtol=0)
    # this package reads its own export, too
    again = TextEncoder.from_pretrained(tmp_path / "st")
    assert again.settings.bidirectional is True
    torch.testing.assert_close(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_equal_vectors_or_is_refused(name: str, tmp_path: Path) -> None:
    if not is_tiny(name):
        pytest.skip("no tiny one is known")
    try:
        llm = build_family(name, tmp_path / "llm")
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} cannot be made tiny: {error!r:.100}")
    for asked in (True, "partial", False):
        try:
            encoder = TextEncoder.from_pretrained(llm, bidirectional=asked)
        except ModelError:
            continue
        embeds = encoder.encode(TEXTS)
        alone = torch.cat([encoder.encode([text]) for text in TEXTS])
        torch.testing.assert_close(alone, embeds, atol=1e-5, rtol=0)
        encoder.save_pretrained(tmp_path / f"{asked}")
        again = TextEncoder.from_pretrained(tmp_path / f"{asked}")
        torch.testing.assert_close(again.encode(TEXTS), embeds, atol=1e-5, rtol=0)
        export = tmp_path / f"{asked}-st"
        if export_sentence_transformers(encoder, tmp_path / f"{asked}", export):
            settings = json.loads((export / "sentence_bert_config.json").read_text())
            model = AutoModel.from_pretrained(export, **settings.get("model_args", {})).eval()
            plain = TextEncoder(model, encoder.tokenizer, encoder.settings)
            for text, want in zip(TEXTS, embeds, strict=True):
                torch.testing.assert_close(plain.encode([text])[0], want, atol=1e-5, rtol=0)
