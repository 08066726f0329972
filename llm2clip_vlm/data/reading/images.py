"""Opening images that a record names, and nothing outside the folder that holds them.

Every image in the project passes through :class:`EncodedImage`: stage 2 pairs, LLaVA records and
evaluation. A record is foreign input, so its path may not leave the image root and may not be a
URL, its header is checked before anything is decoded, and whatever the decoder makes of the bytes
becomes one :class:`ImageError` with the name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from llm2clip_vlm.data.reading.cut_images import require_all_rows, require_ends, tiff_jpegs
from llm2clip_vlm.data.reading.samples import scale_transparency, to_rgb

DECODING = 1
"""Version of how files become RGB: raise it where any picture becomes another one."""

MAX_IMAGE_PIXELS = 89_478_485
"""Pictures with more pixels are refused: up to here every format decodes within a gibibyte, and
Pillow itself warns from here on."""

MAX_IMAGE_BYTES = 256 * 2**20
"""A larger file, or member of a shard, is refused unread."""

MIN_SIDE_PX = 8
"""Stage 2 refuses pictures with a shorter side: counting pixels and placeholders."""

MAX_ASPECT_RATIO = 20
"""Stage 2 refuses longer strips: a square crop would show less than a twentieth of them."""

_T = Image.Transpose
_TURNS = (_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90)
_UPRIGHT = dict(
    enumerate((_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.FLIP_TOP_BOTTOM, *_TURNS), start=2)
)
"""EXIF orientation to the transposition that undoes it."""

LOOKED_AT = 64
"""Samples whose pictures are compared when a run goes on."""

_JPEG = ("JPEG", "MPO")
"""Telephones write MPO: a JPEG with further pictures after it."""

_FORMATS = "JPEG MPO PNG WEBP GIF BMP DIB TIFF AVIF JPEG2000 PPM ICO TGA".split()

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|data:|file:|pipe:", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_ADDRESS = re.compile(r"( object)? at 0x[0-9a-fA-F]+")
_NAME_SHOWN = 200


class ImageError(ValueError):
    """An image that a record names cannot be used; the message has the name and the reason."""

    absent: Path | None = None
    """The file, where there is none."""


def shown(name: object) -> str:
    """A name in quotes for messages; a long one (base64 in a name's place) is cut."""
    text = repr(name[: _NAME_SHOWN + 1] if isinstance(name, str | bytes) else name)
    return text if len(text) <= _NAME_SHOWN else f"{text[:_NAME_SHOWN]}...'"


def check_image_name(root: Path, name: str) -> None:
    """Refuse a name that could lead anywhere but below a folder, without touching the disk.

    Args:
        root: Folder that holds the images.
        name: Relative path with forward slashes, as LLaVA's JSON writes it.

    Raises:
        ImageError: `name` is empty, damaged text, a URL, absolute, or climbs with `..`.
    """
    if not isinstance(name, str) or not name.strip() or "\x00" in name:
        raise ImageError(f"image name {shown(name)}: expected a relative path, got an empty value")
    if not name.isascii() and re.search("[\ud800-\udfff]", name):
        raise ImageError(f"image name {shown(name)}: damaged text (half a character)")
    if _URL.match(name):
        raise ImageError(
            f"image {shown(name)}: expected a relative path below {root}, got a URL; "
            "download the images first, nothing is fetched while training"
        )
    if _ABSOLUTE.match(name):
        raise ImageError(
            f"image {shown(name)}: expected a path relative to {root}, got an absolute one"
        )
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        raise ImageError(f"image {shown(name)}: '..' would leave the image root {root}")


def resolve_image(root: Path, name: str, *, follow_links: bool = False) -> Path:
    """Path of an image below `root`, without opening it.

    Args:
        root: Folder that holds the images.
        name: Relative path with forward slashes, as LLaVA's JSON writes it.
        follow_links: Links below `root` may lead anywhere; a recipe's `follow_links`.

    Returns:
        The existing file, with symbolic links resolved.

    Raises:
        ImageError: See :func:`check_image_name`; or the path follows a symbolic link out of `root`,
            or is not a file.
    """
    check_image_name(root, name)
    real_root = Path(os.path.realpath(root))
    real = Path(os.path.realpath(real_root / name))
    if not follow_links and not real.is_relative_to(real_root):
        raise ImageError(
            f"image {shown(name)}: a symbolic link leads out of the image root {root}; if it is "
            "meant to, set `follow_links: true` beside that folder in the recipe (the rows of a "
            "suite have no such key: copy the images there)"
        )
    if not os.path.isfile(real):  # Path.is_file raises where a name is too long
        error = ImageError(f"image {shown(name)}: no such file below {root} (is image_root right?)")
        error.absent = real
        raise error
    return real


def read_image(root: Path, name: str, *, follow_links: bool = False) -> bytes:
    """The encoded bytes of an image below `root`.

    Args:
        root: Folder that holds the images; no path may leave it.
        name: Path relative to `root`.
        follow_links: See :func:`resolve_image`.

    Raises:
        ImageError: See :func:`resolve_image`; or the file is too large or cannot be read.
    """
    path = resolve_image(Path(root), name, follow_links=follow_links)
    with _as_image_error(f"{shown(name)} below {root}"):
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ImageError(
                f"image {shown(name)}: {size} bytes, expected at most {MAX_IMAGE_BYTES}"
            )
        return path.read_bytes()


def open_image(
    root: Path, name: str, *, strict: bool = False, follow_links: bool = False
) -> Image.Image:
    """Open, decode and convert one image to RGB.

    The EXIF orientation is applied, transparency is laid on white, and of an animated file the
    first frame is taken.

    Args:
        root: Folder that holds the images; no path may leave it.
        name: Path relative to `root`.
        strict: Used for training; see :meth:`EncodedImage.rgb`.
        follow_links: See :func:`resolve_image`.

    Returns:
        A loaded image in mode `RGB`; no file stays open.

    Raises:
        ImageError: See :func:`resolve_image`; or the file does not decode, is truncated, or has
            more than `MAX_IMAGE_PIXELS` pixels.
    """
    data = read_image(root, name, follow_links=follow_links)
    return EncodedImage(data, f"{shown(name)} below {root}").rgb(strict=strict)


class EncodedImage:
    """An image whose header is read and checked, and which is decoded when it is asked for.

    Args:
        data: The encoded bytes.
        name: What the image is called in messages.

    Raises:
        ImageError: The header cannot be read, or announces more than `MAX_IMAGE_PIXELS` pixels;
            or parts of the picture are missing.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        with _as_image_error(name):
            require_ends(data)
            self._opened, self._turn, self.size = _header(BytesIO(data), name)
        """Width and height, upright."""

    def require_picture(self) -> None:
        """Refuse what can be no picture of anything.

        Raises:
            ImageError: A side is below `MIN_SIDE_PX`, or the sides' ratio above
                `MAX_ASPECT_RATIO`.
        """
        short, long = sorted(self.size)
        if short < MIN_SIDE_PX or long > MAX_ASPECT_RATIO * short:
            raise ImageError(
                f"image {self.name}: {self.size[0]}x{self.size[1]} px, expected sides of at least "
                f"{MIN_SIDE_PX} px that differ at most {MAX_ASPECT_RATIO}-fold"
            )

    def rgb(self, *, strict: bool = False) -> Image.Image:
        """Decode all of it with Pillow.

        Args:
            strict: Also refuse a JPEG whose data are damaged inside, which Pillow shows as grey or
                shifted areas without a word (needs `simplejpeg`).

        Returns:
            Upright, in mode `RGB`.

        Raises:
            ImageError: It does not decode.
        """
        with _as_image_error(self.name):
            if strict:
                self._require_undamaged()
            return upright_rgb(self._opened)

    def pixels(self, least: tuple[float, float] | None = None) -> npt.NDArray[np.uint8]:
        """Decode for training, a JPEG perhaps at a half, a quarter or an eighth of its size.

        Both libraries do so while decoding, for a fraction of the time. A JPEG whose data are
        damaged inside is refused (needs `simplejpeg`).

        Args:
            least: Width and height, upright, which the result must reach. None: the full size.

        Returns:
            `[h, w, 3]`, RGB, upright.

        Raises:
            ImageError: It does not decode.
        """
        spare = min(s / w for s, w in zip(self.size, least, strict=True)) if least else 1
        # turned, what is left over from rounding up would lie at the first column or row
        whole = self._turn is not None
        part = max(
            part
            for part in (1, 2, 4, 8)
            if part == 1 or (part <= spare and not (whole and any(s % part for s in self.size)))
        )
        with _as_image_error(self.name):
            if self._opened.format in _JPEG and self._opened.mode != "CMYK":
                pixels = _decode_jpeg(self.data, "RGB", self._opened.size, part)
            else:
                self._require_undamaged()
                pixels = None
            if pixels is None:
                if part > 1:
                    width, height = self._opened.size
                    self._opened.draft(None, (width // part, height // part))
                pixels = np.asarray(upright_rgb(self._opened))
            elif self._turn is not None:
                pixels = np.asarray(Image.fromarray(pixels).transpose(self._turn))
        return pixels

    def _require_undamaged(self) -> None:
        """Let libjpeg-turbo read what Pillow would show in grey: damaged JPEGs, also in a TIFF."""
        image = self._opened
        jpegs = [self.data] if image.format in _JPEG else []
        if image.format == "TIFF":
            jpegs = [*tiff_jpegs(image, self.data)]
        for jpeg in jpegs:
            _decode_jpeg(jpeg, "CMYK" if image.mode == "CMYK" else "GRAY", (1, 1), 8)


def _decode_jpeg(
    data: bytes, colorspace: str, size: tuple[int, int], part: int
) -> npt.NDArray[np.uint8] | None:
    """Decode by libjpeg-turbo, which reports damage. None: it is not installed, or cannot."""
    decoder = _simplejpeg()
    if decoder is None:
        return None
    width, height = (-(-side // part) for side in size)
    try:
        result: npt.NDArray[np.uint8] = decoder.decode_jpeg(
            data, colorspace, min_height=height, min_width=width, strict=True
        )
    except ValueError as error:
        if "subsampling level" in str(error):  # one without a name, such as a CMYK's; Pillow can
            return None
        raise
    return result


def upright_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height of a picture in pixels; of a JPEG the header alone is read.

    Args:
        source: The file, or its bytes.
        name: What the image is called in messages.

    Raises:
        ImageError: See :class:`EncodedImage`.
    """
    # a file by its name is mapped by Pillow, which turns an uncompressed TIFF twice then
    with (
        _as_image_error(name),
        BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
    ):
        return _header(file, name)[2]


def _header(source: IO[bytes], name: str) -> tuple[Image.Image, Any, tuple[int, int]]:
    """An image, opened; what turns it upright; its upright width and height."""
    opened = Image.open(source, formats=_formats())
    width, height = opened.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image {name}: {width}x{height} px, expected at most {MAX_IMAGE_PIXELS} "
            "pixels; scale it down"
        )
    if opened.format not in _JPEG:  # a TIFF turns itself while loading
        opened.load()
        if opened.format == "PNG" and isinstance(source, BytesIO):
            require_all_rows(opened, source.getvalue())
            scale_transparency(opened, source.getvalue()[24])
    turn, (width, height) = _turn_of(opened), opened.size
    return opened, turn, (height, width) if turn in _TURNS else (width, height)


def _turn_of(image: Image.Image) -> Any:
    turn = None
    with suppress(Exception):  # damaged EXIF costs no picture; of a JPEG's, Pillow keeps silent
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return turn


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an opened picture upright and convert it to RGB; nothing says any more that it lay."""
    image.load()  # by which a TIFF turns itself
    turn = _turn_of(image)
    found = to_rgb(image if turn is None else image.transpose(turn))
    found.info = {}
    return found


@cache
def _formats() -> list[str]:
    """Formats that are read: no EPS, which Pillow hands to another program, nor exotic ones."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@cache
def picture_suffixes() -> frozenset[str]:
    """Ends of the names of files that may be opened, such as `.jpg`, in lower case."""
    formats = set(_formats())
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in formats)


@cache
def _simplejpeg() -> Any:
    """Import the decoder. None: it is not installed."""
    if find_spec("simplejpeg") is None:
        return None
    import simplejpeg

    return simplejpeg


@contextmanager
def _as_image_error(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError` with the image's name.

    Pillow's switch for cut pictures is off meanwhile: other packages turn it on when imported.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # the one boundary around decoders, which raise what they like
        why = _ADDRESS.sub("", f"{type(error).__name__}: {error}")  # so that reasons are equal
        raise ImageError(f"image {name} does not decode: {why}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
