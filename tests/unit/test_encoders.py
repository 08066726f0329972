"""What an encoder under judgement gives is what its own model gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Sequence
from transformers import AutoModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.evaluation.encoder.encoders import Encoder, load_encoder, tower_pixels
from llm2clip_vlm.models.clip import ClipTokens, clip_encoders
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.hashes import HandoffError
from tests.tiny import word_tokenizer, write_image
from tests.tiny_towers import build_tower

TEXTS = ["a red circle", "a large blue square below a dog", "cat"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageTextRecord]:
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        write_image(folder / f"{i}.png", seed=i, size_px=40)
    return [ImageTextRecord(str(i), f"{i}.png", {}, folder) for i in range(5)]


@pytest.fixture(scope="module")
def llm2clip(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage2b") / "model"
    tower = load_vision_tower(tiny_clip)
    torch.manual_seed(0)
    LLM2CLIPModel.from_vision_tower(
        tower.model, text_embed_dim=32, projection_dim=24
    ).save_pretrained(folder)
    tower.image_processor.save_pretrained(folder)
    return folder


def pixels_of(path: Path, images: list[ImageTextRecord]) -> Any:
    processor = load_vision_tower(path).image_processor
    return processor(images=[r.open() for r in images], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_a_clip(tiny_clip: Path, images: list[ImageTextRecord]) -> None:
    encoder = load_encoder(str(tiny_clip), batch_size=2)
    model = AutoModel.from_pretrained(tiny_clip).eval()
    pixels = pixels_of(tiny_clip, images)
    want = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    got, digest = encoder.embed_images(images)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    tokens = word_tokenizer(model_max_length_tokens=16)(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    texts = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), texts, atol=1e-6, rtol=0)
    assert encoder.num_cut() == 0
    encoder.embed_texts(["a dog " * 20])
    assert encoder.num_cut() == 1
    whole = load_encoder(str(tiny_clip), batch_size=64)
    assert whole.embed_images(images)[1] == digest != whole.embed_images(images[1:])[1]
    torch.testing.assert_close(whole.pool(images)[0], encoder.pool(images)[0], atol=1e-5, rtol=0)
    half = load_encoder(str(tiny_clip), dtype=torch.bfloat16)
    assert half.tower.model.dtype == torch.bfloat16 and half.embed_texts(TEXTS).dtype == torch.float


def test_a_clip_with_a_hole_in_its_text_tower_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_clip, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    del weights[next(name for name in weights if name.startswith("text_model"))]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of CLIPModel are missing"):
        load_encoder(str(broken))


@torch.no_grad()
def test_an_llm2clip_with_its_text_encoder(
    llm2clip: Path, tiny_llm: Path, images: list[ImageTextRecord], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_encoder(str(llm2clip), str(tiny_llm))
    assert "no manifest.json beside it says which text encoder" in caplog.text
    model = LLM2CLIPModel.from_pretrained(llm2clip).eval()
    want = model.get_image_features(pixels_of(llm2clip, images))
    torch.testing.assert_close(encoder.embed_images(images)[0], want, atol=1e-6, rtol=0)
    captions = TextEncoder.from_pretrained(tiny_llm).encode(TEXTS)
    assert encoder.captions is not None
    torch.testing.assert_close(encoder.captions(TEXTS), captions, atol=1e-6, rtol=0)
    want = model.get_text_features(captions)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), want, atol=1e-5, rtol=0)
    assert set(encoder.fingerprints) == {"model", "text_encoder"}
    section = TextEncoderSection(language_model=str(tiny_llm), pooling="last", max_length_tokens=4)
    other = load_encoder(str(llm2clip), section)
    assert (other.embed_texts(TEXTS) - want).abs().max() > 1e-3
    assert other.num_cut() > 0 and other.fingerprints != encoder.fingerprints


def test_another_text_encoder_than_in_training_is_refused(
    llm2clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llm2clip)
    manifest = {"schema": 1, "fingerprints": {"text_encoder.pooling": "last"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HandoffError, match=r"pooling: .* was trained against last, this one has m"):
        load_encoder(str(tmp_path / "model"), str(tiny_llm))


@pytest.mark.parametrize("cased", [False, True])
@torch.no_grad()
def test_a_siglip(tmp_path: Path, images: list[ImageTextRecord], cased: bool) -> None:
    build_tower("siglip", tmp_path)
    tokenizer = word_tokenizer(model_max_length_tokens=16)
    if cased:  # as Gemma's, which google/siglip2-* of fixed resolution name
        tokenizer.backend_tokenizer.normalizer = Sequence([])
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "num_hidden_layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
    model = SiglipModel(SiglipConfig(text_config=shape | text, vision_config=shape | vision)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    pixels = pixels_of(tmp_path, images)
    want = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.embed_images(images)[0], want, atol=1e-6, rtol=0)
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    want = F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), want, atol=1e-6, rtol=0)
    upper = encoder.embed_texts([text.upper() for text in TEXTS])
    torch.testing.assert_close(upper, want, atol=1e-6, rtol=0)


def test_a_tower_alone_has_no_texts(tmp_path: Path, images: list[ImageTextRecord]) -> None:
    encoder = load_encoder(str(build_tower("dinov2", tmp_path)))
    assert encoder.pool(images)[0].shape == (5, 32)
    with pytest.raises(ValueError, match="no text side"):
        encoder.embed_texts(TEXTS)


def test_nothing_is_left_out(tiny_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError):
        load_encoder(str(tiny_clip)).pool([ImageTextRecord("a", "a.png", {}, tmp_path)])


def test_pixels_of_the_towers_own_size_are_the_processors(
    tiny_clip: Path, images: list[ImageTextRecord]
) -> None:
    tower = load_vision_tower(tiny_clip)
    got = torch.stack([tower_pixels(tower, r.open(), (32, 32)) for r in images])
    torch.testing.assert_close(got, pixels_of(tiny_clip, images), atol=1e-5, rtol=0)
    assert tower_pixels(tower, images[0].open(), (48, 24)).shape == (3, 24, 48)


def test_no_gradient_and_a_text_as_long_as_the_window_is_whole(
    tiny_clip: Path, images: list[ImageTextRecord]
) -> None:
    encoder = load_encoder(str(tiny_clip))
    assert not encoder.pool(images)[0].requires_grad
    assert not encoder.embed_images(images)[0].requires_grad
    assert not encoder.embed_texts(["dog " * 14]).requires_grad  # 16 tokens with bos and eos
    assert encoder.num_cut() == 0
    encoder.embed_texts(["dog " * 15])
    assert encoder.num_cut() == 1


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@torch.no_grad()
def test_a_clips_texts_are_padded_as_in_training(tiny_clip: Path, tmp_path: Path, pad: str) -> None:
    """On the right, whatever side the tokenizer names."""
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    tokenizer = word_tokenizer(model_max_length_tokens=16)
    tokenizer.padding_side, tokenizer.pad_token = "left", pad
    tokenizer.save_pretrained(folder)
    encoder = load_encoder(str(folder))
    together = encoder.embed_texts(TEXTS)
    alone = torch.cat([encoder.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    model = AutoModel.from_pretrained(folder).eval()
    trained = clip_encoders(model, ClipTokens(tokenizer))[1](TEXTS)
    torch.testing.assert_close(together, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ],
)
def test_pixels_of_any_size_are_rescaled_and_normalised_as_the_processor_does(
    tiny_clip: Path, values: dict[str, Any]
) -> None:
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size=side, do_center_crop=False, **values)
    tower = replace(load_vision_tower(tiny_clip), image_processor=processor)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    want = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    got = tower_pixels(tower, picture, (32, 32))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    odd = replace(tower, image_processor=SimpleNamespace(image_mean=[0.5], image_std=[0.5]))
    with pytest.raises(ValueError, match="SimpleNamespace: expected one that rescales"):
        tower_pixels(odd, picture, (32, 32))


@torch.no_grad()
def test_what_overflows_is_no_embedding(tiny_clip: Path, images: list[ImageTextRecord]) -> None:
    encoder = load_encoder(str(tiny_clip), dtype=torch.float16)
    model: Any = encoder.tower.model
    weight: Any = encoder.project.weight
    weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"projected images: NaN or inf.*bfloat16 or float32"):
        encoder.embed_images(images)
    for layer in model.encoder.layers:
        layer.mlp.fc2.bias.fill_(6e4)  # twice that is beyond float16
    for judged in (encoder.pool, encoder.embed_images):
        with pytest.raises(ValueError, match=r"pooled output: NaN or inf.*bfloat16 or float32"):
            judged(images)
    broken = replace(encoder, texts=lambda texts: torch.full((len(texts), 4), float("nan")))
    with pytest.raises(ValueError, match="texts: NaN or inf"):
        broken.embed_texts(TEXTS)


def test_equal_texts_have_equal_embeddings() -> None:
    """In bfloat16 they differ by what stands beside them, and a tie would not be seen as one."""
    given: dict[str, Any] = dict.fromkeys(("tower", "project", "fingerprints", "batch_size"))
    noise = Encoder(**given, texts=lambda texts: torch.randn(len(texts), 4))
    found = noise.embed_texts(["a", "b", "a"])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
