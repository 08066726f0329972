"""Encoded JPEGs to what a tower takes: training's path against Pillow + Hugging Face's processor.

Baseline: `PIL.Image.open`, decode, `CLIPImageProcessor` to normalised fp32, image by image, as the
usual training loop does it. Ours: `ImageTextDataset(fast=True)`'s path to 8-bit pixels, and the
normalising of a batch (`PixelTable`), which on a GPU is the device's work, is timed with it too.
Checked in the same run: the evaluation path gives the baseline's output to the bit, and the
training path stays above 40 dB of it.

What could flatter ours: easy pictures. These are drawn, with grain, and JPEG quality is chosen so
that they take about as many bits per pixel as photographs of the web (printed: bytes per image).

    python benchmarks/image_pipeline.py [--quick] [--no-turbo]

`ratio` is ours over the baseline in images per CPU-second at 512x384 to 336 px, `ratio_1024` at
1024x768 to 224 px; both in one thread of one process, arms interleaved, median of the repeats.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.data.reading import images
from llm2clip_vlm.data.reading.images import EncodedImage
from llm2clip_vlm.data.reading.pixels import Geometry, PixelTable, TrainingPixels, process_images
from llm2clip_vlm.recipe.base import AugmentationSection

CASES = {"": (512, 384, 336), "_1024": (1024, 768, 224)}
QUALITY = 88


def picture(width: int, height: int, seed: int) -> bytes:
    """A JPEG with edges, texture of all scales and grain."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((height, width, 3), np.float32)
    for step in (2, 4, 8, 16, 32, 64):
        coarse = rng.normal(0, 9 * step**0.5, (height // step + 2, width // step + 2, 3))
        layer = [
            Image.fromarray(coarse[..., c].astype(np.float32), "F").resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        scene += np.stack([np.asarray(channel) for channel in layer], -1) * (
            0.25 if step < 8 else 1
        )
    pixels = (128 + scene).clip(0, 255).astype(np.uint8)
    handle = io.BytesIO()
    Image.fromarray(pixels).save(handle, "JPEG", quality=QUALITY)
    return handle.getvalue()


def baseline(data: list[bytes], processor: Any) -> torch.Tensor:
    """Pillow and the processor, an image at a time."""
    tensors = []
    for item in data:
        with Image.open(io.BytesIO(item)) as image:
            rgb = image.convert("RGB")
        tensors.append(processor(images=[rgb], return_tensors="pt")["pixel_values"])
    return torch.cat(tensors)


def measure(
    width: int, height: int, size_px: int, count: int, repeats: int
) -> dict[str, list[float]]:
    """CPU seconds per image of each arm, and wall seconds of ours."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size_px}, crop_size={"height": size_px, "width": size_px}
    )
    geometry, table = Geometry.of(processor), PixelTable.of(processor)
    assert geometry is not None and table is not None
    data = [picture(width, height, seed) for seed in range(count)]
    training = TrainingPixels(geometry, AugmentationSection(), 0, scaled=True)

    def ours(items: list[bytes]) -> torch.Tensor:
        return torch.stack([training(EncodedImage(item, "x"), 0, 0) for item in items])

    def evaluation(items: list[bytes]) -> torch.Tensor:
        return process_images(
            processor, [EncodedImage(item, "x").rgb(strict=True) for item in items], None
        )

    want, got = baseline(data, processor), table(ours(data))
    assert torch.equal(evaluation(data), want), "the evaluation path is not bit-equal"
    levels = 1 / (torch.tensor(processor.image_std) * 255)  # one 8-bit step after normalising
    error = ((got - want) / levels[:, None, None]).square().mean().sqrt()
    decibels = float(20 * torch.log10(255 / error))
    assert decibels > 40, f"training's path is at {decibels:.1f} dB of the processor"

    arms: dict[str, Callable[[], Any]] = {
        "baseline": lambda: baseline(data, processor),
        "ours": lambda: ours(data),
        "ours_normalised": lambda: table(ours(data)),
        "evaluation": lambda: evaluation(data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            seconds[name].append((time.process_time() - started) / count)
    return seconds | {"decibels": [decibels], "bytes": [float(np.mean([len(d) for d in data]))]}


def main() -> None:
    """Print a line a size and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 pictures instead of 24")
    parser.add_argument(
        "--no-turbo", action="store_true", help="as without simplejpeg: Pillow only"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, repeats = (8, 5) if options.quick else (24, 7)
    result: dict[str, Any] = {"name": "image_pipeline", "equal": True}
    turbo = None if options.no_turbo else images._simplejpeg()
    with mock.patch.object(images, "_simplejpeg", return_value=turbo):
        for suffix, case in CASES.items():
            seconds = measure(*case, count, repeats)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            pairs = list(zip(seconds["baseline"], seconds["ours"], strict=True))
            ratios = sorted(theirs / mine for theirs, mine in pairs)
            result |= {
                f"ours{suffix}": round(1 / median["ours"], 1),
                f"baseline{suffix}": round(1 / median["baseline"], 1),
                f"ratio{suffix}": round(statistics.median(ratios), 2),
                f"spread{suffix}": [round(ratios[0], 2), round(ratios[-1], 2)],
                f"ratio_normalised{suffix}": round(
                    median["baseline"] / median["ours_normalised"], 2
                ),
                f"decibels{suffix}": round(median["decibels"], 1),
            }
            print(
                f"{case[0]}x{case[1]} -> {case[2]} px, {median['bytes'] / 1024:.0f} KiB an image: "
                + ", ".join(f"{arm} {1000 * median[arm]:.2f} ms" for arm in list(seconds)[:4])
            )
    result["settings"] = {
        "images": count,
        "repeats": repeats,
        "threads": 1,
        "time": "CPU process time",
        "simplejpeg": turbo is not None,
        "jpeg_quality": QUALITY,
        "unit": "images per CPU-second",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
