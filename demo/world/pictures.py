"""Pictures of the drawn world."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from world.scenes import BACKGROUNDS, COLOURS, Scene

_CELL_PX = 16


def _mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels belong to a shape; `u`, `v` are offsets in radii."""
    radius = np.hypot(u, v)
    return {
        "square": np.maximum(abs(u), abs(v)) < 0.86,
        "circle": radius < 1.0,
        "triangle": (abs(u) < (v + 1.0) * 0.55) & (v < 0.85),
        "cross": (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 1.0),
        "ring": (radius < 1.05) & (radius > 0.55),
        "diamond": abs(u) + abs(v) < 1.1,
    }[shape]


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene with jitter in place, size, colour and pixel noise.

    Returns:
        An RGB image of 32 x 32 pixels.
    """
    grey = BACKGROUNDS[scene.background] + rng.normal(0, 5)
    canvas = np.full((2 * _CELL_PX, 2 * _CELL_PX, 3), grey, np.float64)
    y, x = np.mgrid[0 : 2 * _CELL_PX, 0 : 2 * _CELL_PX].astype(np.float64)
    for rank, thing in enumerate(scene.things):
        row, column = divmod(thing.cell, 2)
        centre_x = (column + 0.5) * _CELL_PX - 0.5 + rng.uniform(-1, 1)
        centre_y = (row + 0.5) * _CELL_PX - 0.5 + rng.uniform(-1, 1)
        radius = (7.2 if rank == 0 else 5.8) + rng.uniform(-0.3, 0.3)
        dx, dy = x - centre_x, y - centre_y
        mask = _mask(thing.shape, dx / radius, dy / radius)
        stripe_y = np.floor((dy + 64) / 2).astype(int) % 2
        stripe_x = np.floor((dx + 64) / 2).astype(int) % 2
        dark = {
            "plain": np.zeros_like(stripe_x),
            "striped": stripe_y,
            "barred": stripe_x,
            "checked": stripe_x ^ stripe_y,
        }[thing.pattern]
        colour = np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3)
        paint = colour * np.where(dark, 0.5, 1.0)[..., None]
        canvas[mask] = paint[mask]
    canvas += rng.normal(0, 8, canvas.shape)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def render_masks(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """A picture and the pixels of each of its objects, `bool[objects, h, w]`.

    Painted once more in another colour with the same jitter and noise, an object is what differs.
    """
    state = rng.bit_generator.state
    picture = render(scene, rng)
    masks = []
    for number, thing in enumerate(scene.things):
        other = replace(thing, colour="yellow" if thing.colour != "yellow" else "blue")
        things = (*scene.things[:number], other, *scene.things[number + 1 :])
        rng.bit_generator.state = state
        repainted = render(replace(scene, things=things), rng)
        masks.append((np.asarray(repainted) != np.asarray(picture)).any(-1))
    return picture, np.stack(masks)
