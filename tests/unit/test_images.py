"""Images open as RGB, and only from below their root."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from llm2clip_vlm.data.reading import cut_images, images
from llm2clip_vlm.data.reading.images import EncodedImage, ImageError, open_image, resolve_image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (5, 3)).save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path, f"a.{suffix}")
    assert (image.mode, image.size) == ("RGB", (5, 3))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path, "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path, "a.jpg").size == (2, 4)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.new("P", (3, 3)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert open_image(tmp_path, "a.jpg").size == (3, 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("C:\\a.png", "absolute"),
        ("../a.png", "leave the image root"),
        ("x/../../a.png", "leave the image root"),
        ("http://host/a.png", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("missing.png", "no such file"),
        ("folder", "no such file"),
    ],
)
def test_paths_stay_below_the_root(tmp_path: Path, name: str, reason: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=reason):
        resolve_image(root, name)


def test_a_link_may_not_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    (root / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ImageError, match="symbolic link"):
        open_image(root, "a.png")


def test_a_link_inside_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (1, 1)).save(root / "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (tmp_path / "link").symlink_to(root)
    assert open_image(tmp_path / "link", "b.png").size == (1, 1)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_damaged_files_are_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match="does not decode"):
        open_image(tmp_path, "a.png")


@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: bool
) -> None:
    """Also where another package has told Pillow to let it pass (lmms-eval does when imported)."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="does not decode"):
        open_image(tmp_path, "a.jpg")


def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="10x10"):
        open_image(tmp_path, "a.png")


def test_the_smallest_and_the_longest_picture_that_is_one() -> None:
    def check(width: int, height: int) -> None:
        data = BytesIO()
        Image.new("RGB", (width, height)).save(data, "PNG")
        EncodedImage(data.getvalue(), "a.png").require_picture()

    longest = 8 * images.MAX_ASPECT_RATIO
    for size in ((8, 8), (8, longest), (longest, 8)):
        check(*size)
    for size in ((7, 8), (8, 7), (8, longest + 1), (longest + 1, 8)):
        with pytest.raises(ImageError, match="expected sides of at least 8 px"):
            check(*size)


def test_limits_of_bytes_pixels_and_scans_at_the_border(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(data)
    scans = sum(data[i : i + 2] == b"\xff\xda" for i in range(len(data)))
    assert scans > 1
    for module, name, most, message in (
        (images, "MAX_IMAGE_BYTES", len(data), "bytes, expected at most"),
        (images, "MAX_IMAGE_PIXELS", 30 * 24, "30x24 px, expected at most 719"),
        (cut_images, "MAX_SCANS", scans, "scans"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, most)
            assert open_image(tmp_path, "a.jpg").size == (30, 24)
            changed.setattr(module, name, most - 1)
            with pytest.raises(ImageError, match=message):
                open_image(tmp_path, "a.jpg")


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path, "a.png"))[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]
    Image.fromarray(values).save(tmp_path / "b.png", transparency=256)
    assert np.asarray(open_image(tmp_path, "b.png"))[0, :, 1].tolist() == [0, 0, 255, 127, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_size_upright_is_that_of_the_decoded_picture(
    tmp_path: Path, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (16, 8)).save(tmp_path / name, exif=exif)
    size = (8, 16) if orientation >= 5 else (16, 8)
    assert images.upright_size(tmp_path / name, "a") == open_image(tmp_path, name).size == size


def test_chunks_of_a_webp_are_padded_to_even_bytes() -> None:
    def webp(*chunks: bytes) -> bytes:
        body = b"WEBP"
        for kind, content in zip(chunks[::2], chunks[1::2], strict=True):
            body += kind + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
        return b"RIFF" + len(body).to_bytes(4, "little") + body

    whole = webp(b"ICCP", b"odd", b"VP8 ", b"\x01" * 100)
    cut_images.require_ends(whole)
    holed = webp(b"ICCP", b"odd", b"VP8 ", b"\x01" * 9 + bytes(64) + b"\x01")
    with pytest.raises(ValueError, match="64 zeros"):
        cut_images.require_ends(holed)
    cut_images.require_ends(webp(b"VP8 ", b"\x01" * 9 + bytes(63) + b"\x01"))
    cut_images.require_ends(webp(b"EXIF", bytes(200), b"VP8L", b"\x01" * 9))  # no picture's data
    with pytest.raises(ValueError, match="the WebP has no end"):
        cut_images.require_ends(whole[:-1])


def test_a_change_of_decoding_has_its_version() -> None:
    """Features of a frozen tower are kept for each version. PNG and GIF: the same everywhere."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    eight = ramp.astype(np.uint8)
    colours = np.stack([eight, eight[::-1], eight.T], -1)
    alpha = np.concatenate([colours, eight[..., None]], -1)
    exif = Image.Exif()
    exif[0x0112] = 6
    odd: list[tuple[Image.Image, str, dict[str, object]]] = [
        (Image.fromarray(ramp * 257), "PNG", {}),
        (Image.fromarray(ramp * 257), "PNG", {"transparency": 7 * 257}),
        (Image.fromarray(eight), "PNG", {"transparency": 7}),
        (Image.fromarray(eight > 99), "PNG", {"transparency": 1}),
        (Image.fromarray(colours), "PNG", {"transparency": (7, 247, 112), "exif": exif}),
        (Image.fromarray(alpha), "PNG", {}),
        (Image.fromarray(alpha).convert("LA"), "PNG", {}),
        (Image.fromarray(eight).convert("P"), "GIF", {"transparency": 7}),
        (Image.fromarray(colours).convert("CMYK"), "TIFF", {}),
    ]
    found = []
    for picture, kind, options in odd:
        handle = BytesIO()
        picture.save(handle, kind, **options)
        rgb = EncodedImage(handle.getvalue(), kind).rgb(strict=True)
        found.append(hashlib.sha256(rgb.tobytes()).hexdigest()[:6])
    known = {1: "724322 0d2eb5 0d2eb5 342a21 5e0317 59825d 7ca4ef 0d2eb5 dd397d"}
    assert known.get(images.DECODING) == " ".join(found), "raise images.DECODING; new digests"
