"""Steps from an encoded image to a vision tower's input, with 8-bit pixels in between.

8-bit pixels take a quarter of the memory and of the transfer to the device; :class:`PixelTable`
turns them into exactly what the image processor would have made. Evaluation resizes as the
processor does (Pillow's bicubic); training may resize by :class:`TrainingPixels`, which is several
times faster (`benchmarks/image_pipeline.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from llm2clip_vlm.data.reading.images import EncodedImage
from llm2clip_vlm.recipe.base import AugmentationSection

SPARE_PIXELS = 1.5
"""A JPEG is decoded at a fraction of its size only where that leaves this many times the pixels a
side which the tower sees: 43 to 52 dB from full decoding for noise whose amplitude falls with its
frequency, as in photographs (1/f and 1/f^1.2), whatever the sides divide by."""

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_CROPS_TRIED = 10


class PixelTable:
    """The processor's rescaling and normalising as a table of 256 values for each channel."""

    def __init__(self, table: Tensor, image_processor: Any = None) -> None:
        self.table = table
        """`[3, 256]`, fp32."""
        self._steps = self._arithmetic(image_processor)

    @classmethod
    def of(cls, image_processor: Any) -> PixelTable | None:
        """Ask the processor what it makes of every pixel value. None: it makes something else."""
        if not hasattr(image_processor, "do_rescale") or not hasattr(image_processor, "do_resize"):
            return None
        grey = np.arange(256, dtype=np.uint8)
        ramp = Image.fromarray(repeat(grey, "(h w) -> h w c", h=16, c=3))
        geometry = ("do_resize", "do_center_crop")
        off = {name: False for name in geometry if hasattr(image_processor, name)}
        table = image_processor(images=[ramp], return_tensors="pt", **off)["pixel_values"]
        if table.shape != (1, 3, 16, 16):
            return None
        return cls(rearrange(table, "1 c h w -> c (h w)"), image_processor)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Args: pixels: `[n, 3, h, w]` uint8. Returns: the same shape and device, fp32."""
        if pixels.device.type != "cpu" or self._steps is None:
            table = self.table.to(pixels.device)
            return torch.stack([table[c][pixels[:, c].long()] for c in range(3)], dim=1)
        result = large_empty(pixels.shape, np.float32)
        for image, out in zip(pixels, result, strict=True):  # which stays in the cache meanwhile
            _finish(out.copy_(image), self._steps)
        return result

    def _arithmetic(self, processor: Any) -> tuple[float, Tensor, Tensor] | None:
        """Divisor, mean and deviation that give the table to the bit, for a quarter of the time."""
        off = ([0.0], [1.0])
        on = getattr(processor, "do_normalize", False)
        both = (processor.image_mean, processor.image_std) if on else off
        mean, deviation = (torch.tensor(values).reshape(-1, 1, 1) for values in both)
        whole = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
        ramp = repeat(torch.arange(256.0), "v -> 3 v 1")
        for steps in ((whole, mean, deviation), (1.0, mean * whole, deviation * whole)):
            if torch.equal(_finish(ramp.clone(), steps)[..., 0], self.table):
                return steps
        return None


def large_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
    """Memory for a batch, by numpy, which asks for huge pages.

    Touching 40 MB of small ones for the first time takes three times the arithmetic.
    """
    return torch.from_numpy(np.empty(shape, dtype))


def _finish(pixels: Tensor, steps: tuple[float, Tensor, Tensor]) -> Tensor:
    divisor, mean, deviation = steps
    return pixels.div_(divisor).sub_(mean).div_(deviation)


def process_images(
    image_processor: Any, images: list[Image.Image], to_float: PixelTable | None
) -> Tensor:
    """Run an image processor, all of it or only its geometry.

    Args:
        image_processor: A transformers image processor.
        images: RGB.
        to_float: Table that rescales and normalises later. None: the processor does it now.

    Returns:
        `[n, 3, h, w]`: fp32, or uint8 where `to_float` finishes the work (fp32 also then, if the
        geometry leaves values that are no whole numbers).
    """
    off = {} if to_float is None else {"do_rescale": False, "do_normalize": False}
    pixels: Tensor = image_processor(images=images, return_tensors="pt", **off)["pixel_values"]
    if to_float is not None and torch.equal(pixels, pixels.to(torch.uint8).to(pixels.dtype)):
        return pixels.to(torch.uint8)
    return pixels


@dataclass(frozen=True)
class Geometry:
    """An image processor's resizing and cropping: to a shortest edge or a size, then the centre."""

    shortest_edge: int | None
    size: tuple[int, int]
    """Width and height of the result."""
    mode: str
    """torch's name of the interpolation."""

    @classmethod
    def of(cls, image_processor: Any) -> Self | None:
        """Read it from a processor. None: it does anything else, or crops what is not there.

        Args:
            image_processor: A transformers image processor.
        """
        resample: Any = getattr(image_processor, "resample", None)
        mode = {2: "bilinear", 3: "bicubic"}.get(resample)
        if mode is None or not image_processor.do_resize:
            return None
        crop = image_processor.crop_size if getattr(image_processor, "do_center_crop", 0) else None
        size = {name: value for name, value in dict(image_processor.size).items() if value}
        edge = size.get("shortest_edge")
        if set(size) == {"shortest_edge"} and crop and edge >= max(crop["height"], crop["width"]):
            found = cls(edge, (crop["width"], crop["height"]), mode)
        elif set(size) == {"height", "width"} and not crop:
            found = cls(None, (size["width"], size["height"]), mode)
        else:
            return None
        return found if found._fits(image_processor) else None

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a whole picture of `size` before its centre is taken."""
        if self.shortest_edge is None:
            return self.size
        short, edge = min(size), self.shortest_edge
        width, height = (edge if side == short else int(edge * side / short) for side in size)
        return width, height

    def apply(self, pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
        """Resize and crop.

        Args:
            pixels: `[h, w, 3]`, all of the picture.
            size: Width and height that the picture had before it was decoded at a fraction.

        Returns:
            `[3, height, width]` uint8.
        """
        width, height = self.resized(size)
        left, top = (width - self.size[0]) // 2, (height - self.size[1]) // 2
        box, shown = _box(pixels, 0, 0, *size, size)
        whole = resize(box, (width, height), self.mode, shown)
        return whole[:, top : top + self.size[1], left : left + self.size[0]]

    def _fits(self, image_processor: Any) -> bool:
        """Whether a picture of noise comes out as from the processor, but for rounding."""
        noise = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
        images = [Image.fromarray(noise)]
        off = {"do_rescale": False, "do_normalize": False}
        want = image_processor(images=images, return_tensors="pt", **off)["pixel_values"][0]
        got = self.apply(noise, (97, 61))
        # a crop that is off by one pixel differs by tens
        return got.shape == want.shape and bool((got - want.float()).abs().mean() < 1)


def _part(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> int:
    """Divisor of the size at which a picture was decoded: 1, 2, 4 or 8."""
    found = (pixels.shape[1], pixels.shape[0])
    return next(p for p in (1, 2, 4, 8) if (-(-size[0] // p), -(-size[1] // p)) == found)


def _box(
    pixels: npt.NDArray[np.uint8], left: int, top: int, width: float, height: float, size: Any
) -> tuple[npt.NDArray[np.uint8], tuple[float, float] | None]:
    """A box of what was decoded, and how much of it is shown where that is no whole number.

    A decoder rounds up: the eighth of 1025 pixels are 129, of which the last shows an eighth.
    """
    part = _part(pixels, size)
    x, y, shown = left // part, top // part, (width / part, height / part)
    box = pixels[y : y + math.ceil(shown[1]), x : x + math.ceil(shown[0])]
    return box, None if shown == (box.shape[1], box.shape[0]) else shown


def resize(
    pixels: npt.NDArray[np.uint8],
    size: tuple[int, int],
    mode: str,
    shown: tuple[float, float] | None = None,
) -> Tensor:
    """Antialiased resizing by torch: Pillow's result, but for rounding, in a fraction of the time.

    Args:
        pixels: `[h, w, 3]`.
        size: New width and height.
        mode: `bilinear` or `bicubic`.
        shown: Width and height of the part of `pixels`, from its left upper corner, that is
            resized, in fractions of pixels. None: all.

    Returns:
        `[3, height, width]` uint8.
    """
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    image = rearrange(image, "h w c -> c h w")
    if (pixels.shape[1], pixels.shape[0]) == size:
        return image
    if shown is None:
        return F.interpolate(image[None], size=size[::-1], mode=mode, antialias=True)[0]
    operator = getattr(torch.ops.aten, f"_upsample_{mode}2d_aa")
    result: Tensor = operator(
        image[None], size[::-1], False, size[1] / shown[1], size[0] / shown[0]
    )
    return result[0]


class TrainingPixels:
    """Turns encoded training pictures into 8-bit pixels: fast decoding, random crop.

    What an image goes through depends on `(seed, epoch, key)` alone.

    Args:
        geometry: Geometry of the image processor.
        augmentation: Random crops; without any, the processor's resize and centre crop.
        seed: Seed of crops.
        scaled: Decode large JPEGs at a fraction of their size.
    """

    def __init__(
        self, geometry: Geometry, augmentation: AugmentationSection, seed: int, *, scaled: bool
    ) -> None:
        self.geometry = geometry
        self.augmentation = augmentation
        self.seed = seed
        self.scaled = scaled

    def __call__(self, image: EncodedImage, key: int, epoch: int) -> Tensor:
        """One picture.

        Args:
            image: Encoded.
            key: Number of the record.
            epoch: Counted from 0.

        Returns:
            `[3, height, width]` uint8.

        Raises:
            ImageError: It does not decode.
        """
        if (least_area := self.augmentation.crop_scale_min) == 1:
            pixels = self._decoded(image, self.geometry.resized(image.size))
            return self.geometry.apply(pixels, image.size)
        rng = np.random.default_rng([self.seed, epoch, key])
        left, top, width, height = random_crop(image.size, least_area, rng)
        size = self.geometry.size
        whole = (size[0] * image.size[0] / width, size[1] * image.size[1] / height)
        pixels = self._decoded(image, whole)
        box, shown = _box(pixels, left, top, width, height, image.size)
        return resize(box, size, self.geometry.mode, shown)

    def _decoded(self, image: EncodedImage, whole: tuple[float, float]) -> npt.NDArray[np.uint8]:
        """All of a picture, of which the tower would see `whole` as width and height."""
        least = (SPARE_PIXELS * whole[0], SPARE_PIXELS * whole[1])
        return image.pixels(least if self.scaled else None)


def random_crop(
    size: tuple[int, int], least_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random part of a picture, as torchvision's `RandomResizedCrop` chooses it.

    Args:
        size: Width and height.
        least_area: Smallest share of the area, the largest being 1.
        rng: Source of chance.

    Returns:
        Left, top, width, height, with width to height between 3:4 and 4:3; the largest centred box
        of the nearest such ratio where ten attempts do not fit.
    """
    width, height = size
    for _ in range(_CROPS_TRIED):
        area = width * height * rng.uniform(least_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(_ASPECT_RATIOS[0]), math.log(_ASPECT_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    ratio = min(max(width / height, _ASPECT_RATIOS[0]), _ASPECT_RATIOS[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h
