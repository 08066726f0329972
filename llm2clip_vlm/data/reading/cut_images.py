"""Pictures with whole parts missing, which decoders show grey, black or blurred without a word.

A format's own marks are read before anything is decoded, in a thousandth of the time; they also
show whether a decoder could be kept busy for minutes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

MAX_SCANS = 100
"""A JPEG with more is refused: each is a pass over all pixels, and encoders write about ten."""

_MAX_SEGMENTS = 100_000
_MAX_EMPTY_BYTES = 64  # a run of zeros that no entropy coder writes
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # Huffman or arithmetic, in one scan or several
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
           (0, 1, 1, 2))  # fmt: skip
"""Adam7: first column, first row, and the steps to the next."""


def require_ends(data: bytes) -> None:
    """Refuse a file whose own marks say that something is missing, or that are endless.

    Args:
        data: An encoded picture of any format.

    Raises:
        ValueError: Scans of a JPEG, chunks of a PNG, or bytes of a WebP or an AVIF
            are missing or too many.
    """
    if data.startswith(b"\xff\xd8"):
        _require_scans(data)
    elif data.startswith(b"\x89PNG"):
        for _ in _png_chunks(data):
            pass
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _require_webp(data, 12, len(data))
    elif data[4:8] == b"ftyp" and (start := data.find(b"mdat")) >= 0:
        _require_coded("AVIF", data, start, len(data))


def _require_scans(data: bytes) -> None:  # noqa: PLR0912
    """Refuse a JPEG unless every coefficient of every component is sent to its last bit."""
    at, scans, frame = 2, 0, 0
    left: dict[int, list[int]] = {}
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None:  # decoders report a missing end
            return
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        if marker == 0xD8:
            continue
        length = int.from_bytes(data[at : at + 2])
        segment, at = data[at + 2 : at + length], at + max(length, 2)
        if marker in _FRAMES:
            frame, left = marker, {name: [1] * 64 for name in segment[6::3]}
        elif marker == 0xDA and segment:
            count = segment[0]
            first, last, bits = (*segment[1 + 2 * count : 4 + 2 * count], 0, 0, 0)[:3]
            if frame not in (0xC2, 0xCA):
                first, last, bits = 0, 63, 0
            for name in segment[1 : 1 + 2 * count : 2]:
                if name in left:
                    left[name][first : last + 1] = [bits & 15] * (min(last, 63) + 1 - first)
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
            if frame not in (0xC2, 0xCA) and count == len(left):
                return  # decoders read no further
    else:
        raise ValueError(f"more than {_MAX_SEGMENTS} segments")
    if any(map(any, left.values())):
        raise ValueError(f"cut short: the JPEG ends after {scans} scan(s), others are missing")


def _png_chunks(data: bytes) -> Iterator[memoryview]:
    """A PNG's IDAT chunks."""
    view, at = memoryview(data), 8
    for _ in range(_MAX_SEGMENTS):
        length, kind = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        if at + 12 + length > len(data):
            raise ValueError("cut short: the PNG has no end")
        if kind == b"IEND":
            return
        if kind == b"IDAT":
            yield view[at + 8 : at + 8 + length]
        at += 12 + length
    raise ValueError(f"more than {_MAX_SEGMENTS} chunks")


def require_all_rows(image: Any, data: bytes) -> None:
    """Refuse a PNG whose compressed data end before the last row; the decoder leaves it black.

    Args:
        image: The decoded picture.
        data: The file.

    Raises:
        ValueError: Rows are missing.
    """
    rows = range(max(image.height - 2, 0), image.height)  # of Adam7 the last but one may be last
    if all(image.crop((0, row, image.width, row + 1)).getbbox() for row in rows):
        return
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    bits = data[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(data[25], 1)
    sizes = [(width, height)]
    if data[28]:
        sizes = [(-(-(width - x) // i), -(-(height - y) // j)) for x, y, i, j in _PASSES]
    expected = sum((-(-w * bits // 8) + 1) * h for w, h in sizes if w > 0 and h > 0)
    found, unpacker = 0, zlib.decompressobj()
    for chunk in _png_chunks(data):
        piece: Any = chunk
        while piece and not unpacker.eof and found < expected:
            found += len(unpacker.decompress(piece, 2**20))
            piece = unpacker.unconsumed_tail
    while found < expected and (more := unpacker.decompress(unpacker.unconsumed_tail, 2**20)):
        found += len(more)
    if found < expected:
        raise ValueError(f"cut short: the PNG has {found} of {expected} bytes of pixels")


def _require_webp(data: bytes, at: int, end: int) -> None:
    if at == 12 and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError("cut short: the WebP has no end")
    while at + 8 <= end:
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if kind == b"ANMF":
            _require_webp(data, at + 16, min(at + size, end))
            return  # the first frame is taken
        if kind in (b"VP8 ", b"VP8L"):
            _require_coded("WebP", data, at, at + size)
        at += size + (size & 1)


def _require_coded(kind: str, data: bytes, start: int, end: int) -> None:
    if data.find(bytes(_MAX_EMPTY_BYTES), start, end) >= 0:
        raise ValueError(f"damaged: {_MAX_EMPTY_BYTES} zeros or more inside the {kind}'s data")


def tiff_jpegs(image: Any, data: bytes) -> Iterator[bytes]:
    """The JPEG of each strip or tile of a TIFF, whole in itself; libtiff keeps silent on damage.

    Args:
        image: An opened TIFF.
        data: The file.
    """
    tags = image.tag_v2
    if tags.get(259) != 7:
        return
    tables = bytes(tags.get(347, b""))
    places = zip(tags.get(273) or tags.get(324), tags.get(279) or tags.get(325), strict=True)
    for start, count in places:
        strip = data[start : start + count]
        yield tables[:-2] + strip[2:] if tables else strip
