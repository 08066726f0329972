"""Samples of any kind to 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

_STRIP_PIXELS = 2**22
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels become white, 16-bit greys keep their high byte.

    Args:
        image: Decoded, of any mode.

    Raises:
        ValueError: Its samples have 32 bits.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _sixteen_bits(image)
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        white = Image.new("RGB", image.size)
        rows = max(_STRIP_PIXELS // image.width, 1)  # a strip at a time: an RGBA takes four bytes
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
            below = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            white.paste(Image.alpha_composite(below, strip).convert("RGB"), (0, top))
        return white
    if image.mode in {"I", "F"}:
        raise ValueError("32-bit samples, whose range is unknown; save it with 8 or 16 bits")
    return image.convert("RGB")


def scale_transparency(image: Image.Image, bits: int) -> None:
    """Give a PNG's transparent colour the 8 bits that Pillow gives to the samples alone.

    Args:
        image: An opened PNG.
        bits: Bits of a sample in the file.
    """
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(clear, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits by their high byte; those of the transparent value become white."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose 12 bits and inverted greys Pillow leaves
    high = (values >> tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        high = 255 - high
    if isinstance(clear := image.info.get("transparency"), int):
        high[values == clear] = 255
    return Image.fromarray(high).convert("RGB")
