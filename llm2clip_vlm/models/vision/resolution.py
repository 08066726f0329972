"""Image processors, and another resolution: tables of positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor
from transformers.utils import is_torchvision_available


def resize_positions(table: Tensor, old_grid: int, new_grid: int) -> Tensor:
    """Interpolate a table of positions; rows before the patches are kept.

    Bicubic as `interpolate_pos_encoding` of transformers, smoothed where the grid gets smaller.

    Args:
        table: `[..., prefix + old_grid**2, width]`.
        old_grid: Patches along a side.
        new_grid: Patches along a side, afterwards.

    Returns:
        `[..., prefix + new_grid**2, width]` in the same dtype.
    """
    rows = rearrange(table, "... n d -> (... n) d")
    prefix = len(rows) - old_grid**2
    grid = rearrange(rows[prefix:].float(), "(y x) d -> 1 d y x", y=old_grid)
    size, smaller = (new_grid, new_grid), new_grid < old_grid
    resized = F.interpolate(grid, size=size, mode="bicubic", antialias=smaller)
    patches = rearrange(resized, "1 d y x -> (y x) d").to(table.dtype)
    return torch.cat([rows[:prefix], patches]).reshape(*table.shape[:-2], -1, table.shape[-1])


def image_processor_class(name: str) -> Any:
    """A transformers image processor, on torchvision where that is installed and PIL elsewhere.

    Args:
        name: Class name without `Pil`.
    """
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")


def processed_size_px(image_processor: Any) -> int | None:
    """Side of the square images that a processor makes. None: it is not known."""
    for name, applies in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size: Any = getattr(image_processor, name, None)
        if not getattr(image_processor, applies, False) or size is None:
            continue
        height, width = size.get("height"), size.get("width")
        if height is not None and height == width:
            return int(height)
    return None


def resize_processor(processor: Any, size_px: int) -> None:
    """Make a processor give square images of another side, in place; a cropped margin stays.

    Args:
        processor: A transformers image processor.
        size_px: Side of the images from now on.
    """
    before = processed_size_px(processor) or size_px
    square = {"height": size_px, "width": size_px}
    sides = {name: (processor.size or {}).get(name) for name in ("shortest_edge", *square)}
    edge = {name: round(side * size_px / before) for name, side in sides.items() if side}
    fresh = type(processor)(size=edge or square, crop_size=square)
    processor.size = fresh.size
    if getattr(processor, "crop_size", None):  # read by others even where nothing is cropped
        processor.crop_size = fresh.crop_size
