"""Training's way from a JPEG to pixels: near the processor's, and random where it is told to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llm2clip_vlm.data.image_text.dataset import ImageTextDataset, collate
from llm2clip_vlm.data.image_text.index import ImageTextRecords, read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.reading.images import EncodedImage
from llm2clip_vlm.data.reading.pixels import (
    Geometry,
    PixelTable,
    TrainingPixels,
    process_images,
    random_crop,
)
from llm2clip_vlm.recipe.base import AugmentationSection
from tests.image_corpus import encode, jpeg, photo
from tests.image_text_files import write_folder

CLIP = CLIPImageProcessorPil(
    size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
)  # fmt: skip
SIGLIP = SiglipImageProcessorPil(size={"height": 48, "width": 48})


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def exact(processor: object, data: bytes) -> torch.Tensor:
    off = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    return processor(images=[EncodedImage(data, "x").rgb()], **off)["pixel_values"][0]  # type: ignore[operator]


@pytest.mark.parametrize("processor", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("size", [(400, 300), (90, 128), (64, 64), (30, 40)])
def test_training_pixels_are_near_the_processors(processor: object, size: tuple[int, int]) -> None:
    geometry = Geometry.of(processor)
    assert geometry is not None
    data = jpeg(*size)
    for scaled, bound in ((False, 47), (True, 38)):
        pixels = TrainingPixels(geometry, AugmentationSection(), 0, scaled=scaled)
        got = pixels(EncodedImage(data, "x"), 0, 0)
        want = exact(processor, data)
        assert (got.dtype, got.shape) == (torch.uint8, want.shape)
        assert decibels(got, want) > bound


def test_fast_decodes_at_a_fraction_and_exact_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(CLIP)
    assert geometry is not None
    asked = []
    pixels = EncodedImage.pixels

    def spy(self: EncodedImage, least: tuple[float, float] | None = None) -> object:
        asked.append(least)
        return pixels(self, least)

    monkeypatch.setattr(EncodedImage, "pixels", spy)
    for scaled in (True, False):
        TrainingPixels(geometry, AugmentationSection(), 0, scaled=scaled)(
            EncodedImage(jpeg(400, 300), "x"), 0, 0
        )
    assert asked[0] == pytest.approx((127.5, 96))  # 1.5 times 85 x 64
    assert asked[1] is None


def test_a_processor_that_pads_or_crops_what_is_not_there_has_no_fast_path() -> None:
    wide = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 96, "width": 96}
    )  # fmt: skip
    assert Geometry.of(wide) is None
    assert Geometry.of(CLIPImageProcessorPil(do_resize=False)) is None


def test_the_table_is_the_processor_to_the_bit() -> None:
    table = PixelTable.of(CLIP)
    assert table is not None
    images = [photo(80, 70, seed) for seed in range(3)]
    raw = process_images(CLIP, images, table)
    assert raw.dtype == torch.uint8
    assert torch.equal(table(raw), process_images(CLIP, images, None))
    meta = table(raw.to("meta"))  # another device takes the other road
    assert (meta.device.type, meta.shape) == ("meta", raw.shape)


class Squared(CLIPImageProcessorPil):
    """A processor that no divisor, mean and deviation imitate."""

    def normalize(self, image: np.ndarray, *args: object, **more: object) -> np.ndarray:
        return image**2


class Fused(CLIPImageProcessorPil):
    """Rescales by a larger mean and deviation, as transformers does on torchvision."""

    def rescale(self, image: np.ndarray, *args: object, **more: object) -> np.ndarray:
        return image

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **more: object) -> np.ndarray:
        mean, std = (np.float32(255) * np.array(v, np.float32)[:, None, None] for v in (mean, std))
        return (image.astype(np.float32) - mean) / std


@pytest.mark.parametrize(
    ("processor", "quick"),
    [
        (CLIP, True),
        (SIGLIP, True),
        (CLIPImageProcessorPil(do_normalize=False), True),
        (CLIPImageProcessorPil(rescale_factor=1 / 128, image_mean=[0.1, 0.2, 0.3]), True),
        (Fused(), True),
        (Squared(), False),
    ],
    ids=["clip", "siglip", "not-normalised", "other-scale", "fused", "squared"],
)
def test_arithmetic_takes_the_tables_place_only_where_it_is_the_same(
    processor: Any, quick: bool
) -> None:
    table = PixelTable.of(processor)
    assert table is not None and (table._steps is not None) is quick
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(table(pixels)[1].reshape(3, 256), table.table)


def test_random_crops_stay_inside_and_keep_their_share() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, width, height = random_crop((400, 300), 0.5, rng)
        assert left >= 0 and top >= 0 and left + width <= 400 and top + height <= 300
        assert 0.74 < width / height < 1.34
        shares.append(width * height / (400 * 300))
    assert min(shares) > 0.49 and max(shares) > 0.9
    assert random_crop((1000, 50), 0.9, rng) == (466, 0, 67, 50)  # no such crop: the centre


def records(folder: Path) -> ImageTextRecords:
    samples = [
        (
            str(i),
            encode(photo(120, 90, seed=i)),
            {"short": [f"s{i}"], "long": [f"l{i}a", f"l{i}b"]},
        )
        for i in range(6)
    ]
    return read_image_text(write_folder(folder / "pairs.jsonl", samples), BadRecords())


def batches(data: ImageTextDataset, epoch: int = 0, workers: int = 0) -> torch.Tensor:
    data.set_epoch(epoch)
    loader = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate)
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_augmentation_depends_on_seed_epoch_and_key_alone(tmp_path: Path) -> None:
    rows = records(tmp_path)

    def data(seed: int = 0, order: int = 1) -> ImageTextDataset:
        crop = AugmentationSection(crop_scale_min=0.5)
        return ImageTextDataset(rows[::order], CLIP, seed=seed, augmentation=crop)

    first = batches(data())
    assert torch.equal(first, batches(data()))
    assert torch.equal(first, batches(data(), workers=2))
    assert torch.equal(first, batches(data(order=-1)).flip(0))
    assert not torch.equal(first, batches(data(), epoch=1))
    assert not torch.equal(first, batches(data(seed=1)))
    plain = ImageTextDataset(rows, CLIP, fast=True, preload_limit_bytes=0)
    assert not torch.equal(first, batches(plain))
    assert torch.equal(batches(plain), batches(plain, epoch=1))


def test_evaluation_is_never_augmented_nor_fast(tmp_path: Path) -> None:
    rows = records(tmp_path)
    crop = AugmentationSection(crop_scale_min=0.2)
    data = ImageTextDataset(rows, CLIP, augmentation=crop, fast=True)
    direct = CLIP(images=[row.open() for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(data.readable(range(6), BadRecords())[1], direct)


def test_augmentation_needs_a_processor_that_is_understood(tmp_path: Path) -> None:
    odd = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64})
    crop = AugmentationSection(crop_scale_min=0.9)
    with pytest.raises(ValueError, match="leave `augmentation` out"):
        ImageTextDataset(records(tmp_path), odd, augmentation=crop)
    ImageTextDataset(records(tmp_path), odd, fast=True, preload_limit_bytes=0)[0]


def test_fast_batches_are_8_bit_and_near_the_processors(tmp_path: Path) -> None:
    data = ImageTextDataset(records(tmp_path), CLIP, fast=True, preload_limit_bytes=0)
    got = batches(data)
    assert got.dtype == torch.uint8
    error = (data.to_float(got) - data.readable(range(6), BadRecords())[1]).square().mean().sqrt()
    assert error < 0.05  # of values whose standard deviation is 1


def test_several_captions_an_image(tmp_path: Path) -> None:
    rows = records(tmp_path)
    data = ImageTextDataset(rows, CLIP, captions_per_image=2)
    batch = data.__getitems__([4, 1])
    assert len(batch["captions"]) == 4 and batch["caption_ids"].shape == (4,)
    assert {text[1] for text in batch["captions"][:2]} == {"4"}
    firsts = set()
    for epoch in range(30):
        data.set_epoch(epoch)
        drawn = data.__getitems__([3])["captions"]
        assert len(set(drawn)) == 2
        firsts.add(drawn[0])
    assert firsts == {"s3", "l3a", "l3b"}
    only = ImageTextDataset(rows, CLIP, {"short": 1}, captions_per_image=2)
    assert only.__getitems__([0])["captions"] == ["s0", "s0"]


def test_sizes_are_cut_and_the_filter_is_the_processors() -> None:
    geometry = Geometry.of(CLIP)
    assert geometry is not None and geometry.mode == "bicubic"
    assert geometry.resized((500, 300)) == (106, 64)  # 106.67
    assert geometry.resized((300, 500)) == (64, 106)
    soft = CLIPImageProcessorPil(
        size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}, resample=2
    )  # as timm's crop_pct of 0.875 has it
    other = Geometry.of(soft)
    assert other is not None and (other.mode, other.shortest_edge) == ("bilinear", 73)
    data = jpeg(500, 300)
    got = TrainingPixels(other, AugmentationSection(), 0, scaled=False)(
        EncodedImage(data, "x"), 0, 0
    )
    assert decibels(got, exact(soft, data)) > 47


def test_a_crop_may_be_as_wide_or_as_high_as_the_picture() -> None:
    rng = np.random.default_rng(0)
    seen = {random_crop((3, 3), 0.6, rng) for _ in range(200)}
    assert {(w, h) for _, _, w, h in seen} >= {(2, 3), (3, 2), (3, 3)}
    assert {left for left, _, w, _ in seen if w == 2} == {0, 1}
    assert {top for _, top, _, h in seen if h == 2} == {0, 1}
