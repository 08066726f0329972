"""A VLM's treatment of pictures that are not square: crop, pad, or AnyRes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.vision.resolution import image_processor_class
from llm2clip_vlm.models.vision.towers import VisionTower

AspectRatio = Literal["square", "pad"]

_KEPT = (
    *("size", "crop_size", "do_center_crop", "do_resize", "resample", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
"""Fields that an image processor takes over from the one it replaces."""

_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of crops in LLaVA-NeXT."""


def set_image_aspect_ratio(processor: Any, aspect_ratio: AspectRatio) -> None:
    """Makes the processor pad images to a square, or crop them.

    The choice is saved (`do_pad`), so that evaluation cannot use the other one.

    Args:
        processor: A `LlavaProcessor`; its image processor is replaced where it cannot pad.
        aspect_ratio: `pad` fills with the mean colour, `square` crops the centre.

    Raises:
        ValueError: The VLM was composed for AnyRes.

    Paper: LLaVA-1.5 (`image_aspect_ratio pad` in stage 2, unset in stage 1).
    """
    old = processor.image_processor
    if getattr(old, "image_grid_pinpoints", None) is not None:
        raise ValueError(
            f"image_aspect_ratio: expected null, as this VLM was composed for anyres, got "
            f"{aspect_ratio!r}; its visual tokens depend on it. Leave it out, or compose anew"
        )
    pads = aspect_ratio == "pad"
    if (hasattr(old, "pad_to_square") and old.do_pad) == pads:
        return
    arguments = {"do_center_crop": False} | _taken_over(old)
    arguments.setdefault("crop_size", arguments["size"])  # LLaVA's own default is 224
    arguments["size"] = square = getattr(old, "square_size", arguments["size"])
    if pads and arguments["do_center_crop"]:  # padded to be whole: loses no margin (DINOv2)
        arguments["size"] = {"shortest_edge": arguments["crop_size"]["height"]}
    arguments |= {"do_pad": pads, "square_size": square}
    processor.image_processor = image_processor_class("LlavaImageProcessor")(**arguments)


def anyres_image_processor(tower: VisionTower, grids: Sequence[Sequence[int]] | None = None) -> Any:
    """Make LLaVA-NeXT's image processor for a tower: the whole picture, then crops of it.

    Args:
        tower: The tower, with patches alone after its CLS token.
        grids: `[height, width]` in pixels; the one that fits a picture best is chosen.
            None: LLaVA-NeXT's five (1x2, 2x1, 2x2, 3x1 and 1x3 crops).

    Raises:
        ModelError: The tower has register tokens or another image size in its config than in its
            image processor, or a grid is no multiple of it.

    Paper: LLaVA-NeXT (`image_aspect_ratio anyres`, `mm_patch_merge_type spatial_unpad`).
    """
    side = tower.image_size_px
    if tower.num_prefix_tokens != int(tower.has_cls_token):
        raise ModelError(
            f"image_aspect_ratio: anyres puts crops side by side and needs patches alone, this "
            f"tower has {tower.num_prefix_tokens - tower.has_cls_token} register tokens; use pad"
        )
    if (size := tower.model.config.image_size) != side:
        raise ModelError(
            f"image_aspect_ratio: anyres counts crops by the tower's config, expected {size} px as "
            f"there, got an image processor for {side} px; set image_size_px to {size}"
        )
    chosen = [list(grid) for grid in grids or [(side * h, side * w) for h, w in _GRIDS]]
    odd = [grid for grid in chosen if len(grid) != 2 or any(n < side or n % side for n in grid)]
    if odd:
        raise ModelError(
            f"image_grid_pinpoints: expected [height, width] in multiples of the tower's {side} "
            f"px, got {odd[0]}"
        )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    arguments = _taken_over(tower.image_processor) | size | {"image_grid_pinpoints": chosen}
    return image_processor_class("LlavaNextImageProcessor")(**arguments)


def one_picture(config: Any) -> tuple[int, dict[str, Tensor]]:
    """Number of crops of one picture in a LLaVA, and the arguments beside `pixel_values`.

    Args:
        config: Config of the model; with AnyRes the picture has the size of its first grid.
    """
    if config.model_type != "llava_next":
        return 1, {}
    (height, width), side = config.image_grid_pinpoints[0], config.vision_config.image_size
    return 1 + (height // side) * (width // side), {"image_sizes": torch.tensor([[height, width]])}


def _taken_over(image_processor: Any) -> dict[str, Any]:
    values = image_processor.to_dict()
    return {name: values[name] for name in _KEPT if values.get(name) is not None}
