"""The ordinary CLIP: text window, tokens, pooling position."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from llm2clip_vlm.models.clip import (
    ClipTokens,
    check_tokenizer,
    clip_encoders,
    lengthen_text_window,
    load_clip,
)
from tests.tiny import CLIP_WINDOW_TOKENS, clip_config

LONG = " ".join(["red", "green", "blue", "star"] * 10)


def text_features(model: CLIPModel, tokens: ClipTokens, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        pooled: torch.Tensor = model.eval().get_text_features(**tokens(texts)).pooler_output
    return pooled


def test_padding_to_the_longest_changes_nothing(tiny_clip: Path) -> None:
    model, tokenizer, _ = load_clip(str(tiny_clip))
    tokens = ClipTokens(tokenizer)
    texts = ["a red star", "a small green circle on the left of a big blue square"]
    both = text_features(model, tokens, texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(text_features(model, tokens, [text])[0], both[i])
    full = tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model.get_text_features(**full).pooler_output, both)


def test_long_captions_are_cut_with_the_end_token_last(tiny_clip: Path) -> None:
    _, tokenizer, _ = load_clip(str(tiny_clip))
    tokens = ClipTokens(tokenizer)
    ids = tokens([LONG, "a star"])["input_ids"]
    assert ids.shape == (2, CLIP_WINDOW_TOKENS)
    assert ids[0, -1] == tokenizer.eos_token_id and ids[0, 0] == tokenizer.bos_token_id
    assert tokens.num_cut == 1


def test_captions_of_equal_tokens_are_one(tiny_clip: Path) -> None:
    """Their embeddings are equal, so that as negatives they would push a right answer away."""
    tokens = ClipTokens(load_clip(str(tiny_clip))[1])
    assert tokens.caption_id(LONG) == tokens.caption_id(f"{LONG} behind the cut")
    assert tokens.caption_id("a star") != tokens.caption_id("a red star")


def test_lengthened_window_keeps_pretrained_positions(tiny_clip: Path) -> None:
    before, tokenizer, _ = load_clip(str(tiny_clip))
    short = text_features(before, ClipTokens(tokenizer), ["a red star"])
    model, tokenizer, _ = load_clip(str(tiny_clip), text_window_tokens=50)
    weight = model.text_model.embeddings.position_embedding.weight
    old = before.text_model.embeddings.position_embedding.weight
    assert weight.shape[0] == 50 and weight.requires_grad
    assert torch.equal(weight[:CLIP_WINDOW_TOKENS], old)
    assert all(torch.equal(row, old[-1]) for row in weight[CLIP_WINDOW_TOKENS:])
    assert torch.equal(text_features(model, ClipTokens(tokenizer), ["a red star"]), short)
    tokens = ClipTokens(tokenizer)
    assert tokens([LONG])["input_ids"].shape == (1, 42)
    assert tokens.num_cut == 0


def test_lengthened_window_survives_saving(tiny_clip: Path, tmp_path: Path) -> None:
    model, tokenizer, processor = load_clip(str(tiny_clip), text_window_tokens=50)
    for part in (model, tokenizer, processor):
        part.save_pretrained(str(tmp_path))
    again, its_tokenizer, _ = load_clip(str(tmp_path))
    assert its_tokenizer.model_max_length == 50
    want = text_features(model, ClipTokens(tokenizer), [LONG])
    assert torch.equal(text_features(again, ClipTokens(its_tokenizer), [LONG]), want)


def test_a_shorter_window_is_refused(tiny_clip: Path) -> None:
    model = CLIPModel.from_pretrained(tiny_clip)
    with pytest.raises(ValueError, match="has 16 positions already"):
        lengthen_text_window(model, 8)


def test_from_config(tiny_clip: Path) -> None:
    config = CLIPModel.from_pretrained(tiny_clip).config.to_dict()
    model, tokenizer, _ = load_clip(config, str(tiny_clip))
    assert tokenizer.model_max_length == CLIP_WINDOW_TOKENS
    assert model.dtype == torch.float32
    bare = {"projection_dim": 8, "text_config": {"num_hidden_layers": 1}}
    model, tokenizer, _ = load_clip(bare, str(tiny_clip))
    text = model.config.text_config
    assert (text.vocab_size, text.eos_token_id, text.num_hidden_layers) == (len(tokenizer), 3, 1)
    assert text.projection_dim == model.config.vision_config.projection_dim == 8
    with pytest.raises(ValueError, match="`tokenizer` must name a directory"):
        load_clip(config)


def test_pooling_at_another_token_than_the_end_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    # 2 is the legacy value: the highest id, which here is some word
    for wrong in (2, 5):
        config["text_config"]["eos_token_id"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"pools at eos_token_id {wrong}"):
            load_clip(str(tmp_path / "clip"))


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tiny_clip: Path) -> None:
    _, tokenizer, _ = load_clip(str(tiny_clip))
    with pytest.raises(ValueError, match=r"set text_config\.vocab_size"):
        check_tokenizer(CLIPModel(clip_config(len(tokenizer) - 1)), tokenizer)


def test_a_caption_at_the_window_and_one_below(tiny_clip: Path) -> None:
    """At the window a caption cannot be told from one that was cut: it counts as cut."""
    model, tokenizer, _ = load_clip(str(tiny_clip))
    tokens = ClipTokens(tokenizer)
    below, at = (" ".join(["red"] * n) for n in (CLIP_WINDOW_TOKENS - 3, CLIP_WINDOW_TOKENS - 2))
    assert tokens.fits(below) and tokens.num_cut == 0
    assert not tokens.fits(at) and tokens.num_cut == 1
    assert tokens([at])["input_ids"].shape == (1, CLIP_WINDOW_TOKENS)
    assert tokens([below])["input_ids"].shape == (1, CLIP_WINDOW_TOKENS - 1)
    encode_images, encode_texts = clip_encoders(model.eval(), tokens)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        texts, images = encode_texts([below, "a star"]), encode_images(pixels)
        raw = text_features(model, tokens, [below, "a star"])
        shown = model.get_image_features(pixel_values=pixels).pooler_output
    for got, want in ((texts, raw), (images, shown)):
        torch.testing.assert_close(got, want / want.norm(dim=1, keepdim=True))
