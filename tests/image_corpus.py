"""A generated corpus of images as they are found in the wild, good ones and broken ones.

Importable as `tests.image_corpus`. Everything is drawn here; no file of anybody's is used.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth colours with some grain and an orientation: no two corners are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    red = 40 + 170 * x / max(width - 1, 1)
    green = 40 + 170 * y / max(height - 1, 1)
    blue = 128 + 80 * np.sin(x / 7 + seed) * np.cos(y / 9)
    pixels = np.stack([red, green, blue], -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image as a file's bytes."""
    handle = io.BytesIO()
    image.save(handle, kind, **options)
    return handle.getvalue()


def jpeg(width: int = 96, height: int = 64, **options: object) -> bytes:
    """A JPEG of :func:`photo`."""
    return encode(photo(width, height), quality=90, **options)


def orientation(value: int) -> bytes:
    """A JPEG that has to be turned to be upright."""
    exif = Image.Exif()
    exif[0x0112] = value
    return jpeg(exif=exif)


def _overwrite(data: bytes, at: float, by: bytes) -> bytes:
    start = int(len(data) * at)
    return data[:start] + by + data[start + len(by) :]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def bomb_png(side_px: int = 60_000) -> bytes:
    """A PNG whose header announces billions of pixels, and which holds next to none."""
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def icc_bomb_png() -> bytes:
    """A small PNG whose colour profile unpacks to 8 MiB."""
    profile = b"bomb\0\0" + zlib.compress(bytes(2**23), 9)
    data = encode(photo(), "PNG")
    return data[:33] + _png_chunk(b"iCCP", profile) + data[33:]


def _animated(kind: str) -> bytes:
    frames = [photo(seed=seed) for seed in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def _palette() -> bytes:
    image = photo().quantize(16)
    return encode(image, "PNG", transparency=0)


def _sixteen_bit() -> bytes:
    grey = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    return encode(Image.fromarray(grey), "PNG")


def _with_alpha(mode: str) -> bytes:
    image = photo().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encode(image, "PNG")


def _damaged_scan() -> bytes:
    return _overwrite(jpeg(240, 160), 0.5, bytes(200))


def _two_pictures() -> bytes:
    """As telephones write them: a JPEG, and a second one behind it."""
    return encode(photo(240, 160), "MPO", save_all=True, append_images=[photo(seed=1)])


def _cut_and_closed() -> bytes:
    data = jpeg(240, 160)
    return data[: int(len(data) * 0.6)] + b"\xff\xd9"


HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>"

BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "does not decode"),
    "HTML saved as .jpg": (lambda: HTML, "does not decode"),
    "JSON error saved as .jpg": (lambda: b'{"error": "forbidden"}', "does not decode"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "does not decode"),
    "JPEG cut at 30 %": (lambda: (d := jpeg())[: len(d) * 3 // 10], "does not decode"),
    "JPEG cut at 90 %": (lambda: (d := jpeg())[: len(d) * 9 // 10], "does not decode"),
    "JPEG cut and filled with zeros": (
        lambda: (d := jpeg(240, 160))[: len(d) // 2] + bytes(len(d) // 2),
        "does not decode",
    ),
    "JPEG cut and closed by an end marker": (_cut_and_closed, "does not decode"),
    "JPEG with a damaged scan": (_damaged_scan, "does not decode"),
    "JPEG of two pictures with a damaged scan": (
        lambda: _overwrite(_two_pictures(), 0.3, bytes(200)),
        "does not decode",
    ),
    "JPEG header only": (lambda: jpeg()[:30], "does not decode"),
    "PNG cut at 50 %": (lambda: (d := encode(photo(), "PNG"))[: len(d) // 2], "does not decode"),
    "PNG with a wrong checksum": (
        lambda: _overwrite(encode(photo(), "PNG"), 0.5, b"\0" * 8),
        "does not decode",
    ),
    "WebP cut at 50 %": (lambda: (d := encode(photo(), "WEBP"))[: len(d) // 2], "does not decode"),
    "GIF header only": (lambda: encode(photo(), "GIF")[:12], "does not decode"),
    "decompression bomb": (bomb_png, "Bomb"),
    "colour profile that unpacks to 8 MiB": (icc_bomb_png, "does not decode"),
    "one pixel": (lambda: encode(photo(1, 1), "GIF"), "1x1 px"),
    "1 x N strip": (lambda: encode(photo(1, 300), "PNG"), "1x300 px"),
    "strip of 50 : 1": (lambda: jpeg(1000, 20), "1000x20 px"),
    "32-bit float TIFF": (
        lambda: encode(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"),
        "32-bit samples",
    ),
}
"""Kind to its bytes and what the refusal has to say."""

GOOD: dict[str, Callable[[], bytes]] = {
    "plain JPEG": jpeg,
    "JPEG of two pictures": _two_pictures,
    "progressive JPEG": lambda: jpeg(progressive=True),
    "grey JPEG": lambda: encode(photo().convert("L")),
    "CMYK JPEG": lambda: encode(photo().convert("CMYK")),
    "JPEG with half the colour rows": lambda: jpeg(subsampling=2),
    "JPEG with a long profile": lambda: jpeg(icc_profile=bytes(3 * 2**20)),
    "16-bit grey PNG": _sixteen_bit,
    "palette PNG with transparency": _palette,
    "RGBA PNG": lambda: _with_alpha("RGB"),
    "LA PNG": lambda: _with_alpha("L"),
    "1-bit PNG": lambda: encode(photo().convert("1"), "PNG"),
    "animated GIF": lambda: _animated("GIF"),
    "animated WebP": lambda: _animated("WEBP"),
    "BMP called .jpg": lambda: encode(photo(), "BMP"),
    "aspect ratio of 15 : 1": lambda: jpeg(600, 40),
    "trailing bytes after the end": lambda: jpeg() + b"appended by a proxy",
    **{f"orientation {value}": lambda value=value: orientation(value) for value in range(1, 9)},
}
"""Kinds that are pictures, and have to come out as such."""
