"""Opening images that a record names, and nothing outside the folder that holds them.

Every image in the project passes through :func:`open_image`: stage 2 pairs, LLaVA records and
evaluation. A record is foreign input, so its path may not leave the image root and may not be a
URL, and whatever the decoder makes of the bytes becomes one :class:`ImageError` with the name.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image, ImageOps

MAX_IMAGE_PIXELS = 178_956_970
"""Refused above this many pixels, half a gibibyte as RGB; Pillow itself refuses from here on."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|data:|file:", re.IGNORECASE)


class ImageError(ValueError):
    """An image that a record names cannot be used; the message has the name and the reason."""


def resolve_image(root: Path, name: str) -> Path:
    """Path of an image below `root`, without opening it.

    Args:
        root: Folder that holds the images.
        name: Relative path with forward slashes, as LLaVA's JSON writes it.

    Returns:
        The existing file, with symbolic links resolved.

    Raises:
        ImageError: `name` is empty, a URL, absolute, climbs with `..`, follows a symbolic link out
            of `root`, or is not a file.
    """
    if not isinstance(name, str) or not name.strip() or "\x00" in name:
        raise ImageError(f"image name {name!r}: expected a relative path, got an empty value")
    if _URL.match(name):
        raise ImageError(
            f"image {name!r}: expected a relative path below {root}, got a URL; "
            "download the images first, nothing is fetched while training"
        )
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("\\"):
        raise ImageError(f"image {name!r}: expected a path relative to {root}, got an absolute one")
    if ".." in pure.parts or ".." in PureWindowsPath(name).parts:
        raise ImageError(f"image {name!r}: '..' would leave the image root {root}")
    real_root = Path(os.path.realpath(root))
    real = Path(os.path.realpath(real_root / pure))
    if not real.is_relative_to(real_root):
        raise ImageError(f"image {name!r}: a symbolic link leads out of the image root {root}")
    if not real.is_file():
        raise ImageError(f"image {name!r}: no such file below {root} (is image_root right?)")
    return real


def open_image(root: Path, name: str) -> Image.Image:
    """Open, decode and convert one image to RGB.

    The EXIF orientation is applied, transparency is laid on white, and of an animated file the
    first frame is taken.

    Args:
        root: Folder that holds the images; no path may leave it.
        name: Path relative to `root`.

    Returns:
        A loaded image in mode `RGB`; no file stays open.

    Raises:
        ImageError: As :func:`resolve_image`, or the file does not decode, is truncated, or has
            more than `MAX_IMAGE_PIXELS` pixels.
    """
    path = resolve_image(Path(root), name)
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_IMAGE_PIXELS:
                raise ImageError(
                    f"image {name!r} below {root}: {opened.width}x{opened.height} px, "
                    f"expected at most {MAX_IMAGE_PIXELS} pixels; scale it down"
                )
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened))
    except ImageError:
        raise
    # Pillow's decoders raise these on damaged files; each names its own defect.
    except (
        OSError,
        ValueError,
        SyntaxError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        OverflowError,
        NotImplementedError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ImageError(
            f"image {name!r} below {root} does not decode: {type(error).__name__}: {error}"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy; transparent pixels become white, 16-bit greys keep their high byte."""
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 256, "L").convert("RGB")
    return image.convert("RGB")
