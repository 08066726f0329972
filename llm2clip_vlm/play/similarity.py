"""Where in a picture an encoder sees what some words say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from llm2clip_vlm.evaluation.encoder.encoders import Encoder
from llm2clip_vlm.evaluation.encoder.segmentation import patch_embeds, value_layers

SHOWN_PX = 448
"""Side of a map."""
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
"""Colours from unlike to like, evenly spaced; brightness rises throughout."""
_OPACITY = 0.6


def similarity_maps(
    encoder: Encoder, picture: Image.Image, texts: Sequence[str]
) -> list[tuple[Image.Image, str]]:
    """Lay the cosines of each patch with each text over what the tower sees of the picture.

    A patch is projected as zero-shot segmentation does it (MaskCLIP, 2112.01071): with the last
    attention's own values where the tower has such. All maps of a call have one scale of colours.

    Args:
        encoder: Encoder with a text side.
        picture: RGB.
        texts: At least one.

    Returns:
        A picture of :data:`SHOWN_PX` for each text, and the text with its cosines: that of the
        whole picture and that of its best patch.
    """
    pixels = encoder.pixels(picture)
    words = encoder.embed_texts(texts)
    last_values = bool(value_layers(encoder.tower.model))
    patches = patch_embeds(encoder, pixels, last_values=last_values)[0].cpu() @ words.T
    maps = rearrange(patches, "y x t -> t y x")
    wholes = (encoder.embed_pixels(pixels) @ words.T)[0]
    low, high = float(patches.min()), float(patches.max())
    seen = _seen(encoder, pixels[0])
    found = []
    for text, cosines, whole in zip(texts, maps, wholes, strict=True):
        heat = ((cosines - low) / max(high - low, 1e-6)).numpy()
        smooth = Image.fromarray(heat).resize((SHOWN_PX, SHOWN_PX), Image.Resampling.BICUBIC)
        at, steps = np.clip(np.asarray(smooth), 0, 1), np.linspace(0, 1, len(_COLOURS))
        colours = np.stack([np.interp(at, steps, part) for part in _COLOURS.T], axis=-1)
        layer = Image.fromarray(colours.astype(np.uint8))
        told = f"{text} {float(whole):.2f} / {float(cosines.max()):.2f}"
        found.append((Image.blend(seen, layer, _OPACITY), told))
    return found


def _seen(encoder: Encoder, pixels: Tensor) -> Image.Image:
    """The picture as the tower gets it: resized, its centre cropped."""
    black, white = (encoder.pixels(Image.new("RGB", (64, 64), (v, v, v)))[0] for v in (0, 255))
    shares = (pixels - black) / (white - black).clamp(min=1e-6)
    values = (255 * shares).clamp(0, 255).round().to(torch.uint8)
    image = Image.fromarray(rearrange(values, "c y x -> y x c").numpy())
    return image.resize((SHOWN_PX, SHOWN_PX), Image.Resampling.BICUBIC)
