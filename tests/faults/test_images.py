"""Images as they are found in the wild: pictures come out right, everything else is named."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from llm2clip_vlm.data.reading import images
from llm2clip_vlm.data.reading.images import EncodedImage, ImageError, upright_size
from tests.image_corpus import BROKEN, GOOD, bomb_png, encode, jpeg, orientation, photo


def decoded_as_trained(data: bytes) -> np.ndarray:
    image = EncodedImage(data, "x")
    image.require_picture()
    return image.pixels()


def decoded_as_evaluated(data: bytes) -> np.ndarray:
    image = EncodedImage(data, "x")
    image.require_picture()
    return np.asarray(image.rgb(strict=True))


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("decode", [decoded_as_trained, decoded_as_evaluated])
def test_what_is_no_picture_is_named(name: str, decode: object) -> None:
    make, reason = BROKEN[name]
    with pytest.raises(ImageError, match=reason):
        decode(make())  # type: ignore[operator]


@pytest.mark.parametrize("name", GOOD)
def test_pictures_come_out_whole_and_upright(name: str) -> None:
    data = GOOD[name]()
    trained, evaluated = decoded_as_trained(data), decoded_as_evaluated(data)
    assert trained.dtype == np.uint8 and trained.shape[2] == 3
    assert np.array_equal(trained, evaluated)  # both decoders are the same libjpeg
    opened = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(opened)
    assert (upright.height, upright.width) == trained.shape[:2]
    assert trained.std() > 20  # neither grey nor black


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_is_undone(value: int) -> None:
    image = EncodedImage(orientation(value), "x")
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(orientation(value)))))
    assert np.array_equal(image.pixels(), want)
    assert image.size == (want.shape[1], want.shape[0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0\x08\0", b"Exif\0\0"])
def test_damaged_exif_costs_no_picture(kind: str, exif: bytes) -> None:
    data = encode(photo(), kind, exif=exif)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded_as_trained(data), want)
    assert np.array_equal(decoded_as_evaluated(data), want)
    assert upright_size(data, "x") == (96, 64)


def test_a_sampling_of_colours_without_a_name_costs_no_picture() -> None:
    """libjpeg-turbo's own interface knows a few; libjpeg takes all."""
    data = encode(photo().convert("CMYK"), subsampling=2)
    for decoded in (decoded_as_trained(data), decoded_as_evaluated(data)):
        assert np.abs(decoded.astype(int) - np.asarray(photo())).mean() < 12


def test_cmyk_is_not_inverted() -> None:
    data = encode(photo().convert("CMYK"))
    difference = decoded_as_trained(data).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_bomb_costs_no_memory(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # other libraries switch it off
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="expected at most" if limit is None else "Bomb"):
        EncodedImage(bomb_png(), "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_damage_that_pillow_shows_in_grey_needs_the_other_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why `simplejpeg` is in the extra: Pillow alone takes these without a word."""
    data = BROKEN["JPEG with a damaged scan"][0]()
    assert Image.open(io.BytesIO(data)).convert("RGB").size == (240, 160)
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert decoded_as_trained(data).shape == (160, 240, 3)


def test_pillow_alone_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    want = {name: decoded_as_trained(make()) for name, make in GOOD.items()}
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    for name, make in GOOD.items():
        assert np.array_equal(decoded_as_trained(make()), want[name]), name


@pytest.mark.parametrize("with_turbo", [True, False])
def test_scaled_decoding_stays_above_what_is_asked(
    with_turbo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_turbo:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    data = jpeg(400, 300)
    for least, want in (((201, 1), 400), ((200, 150), 200), ((51, 38), 100), ((1, 1), 50)):
        assert EncodedImage(data, "x").pixels(least).shape[1] == want
    assert EncodedImage(encode(photo(400, 300), "PNG"), "x").pixels((50, 38)).shape[1] == 400


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with pytest.raises(ImageError, match="at most 10"):
        images.read_image(tmp_path, "a.jpg")


@pytest.mark.parametrize("name", ["a" * 5000, "x/" * 3000 + "a", "pipe:cat a.jpg", "file:a.jpg"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError):
        images.read_image(tmp_path, name)


def test_postscript_is_not_handed_to_another_program() -> None:
    """Pillow runs Ghostscript on EPS, whatever the file is called."""
    with pytest.raises(ImageError, match="does not decode: UnidentifiedImageError"):
        EncodedImage(encode(photo(), "EPS"), "a.jpg")
