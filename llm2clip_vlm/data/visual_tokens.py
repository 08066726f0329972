"""What an image processor makes of a picture: its size, its crops and its visual tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


def visual_size_px(image_processor: Any) -> tuple[int, int]:
    """Height and width in pixels of what an image processor returns."""
    size: dict[str, Any] = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
    edge = size.get("shortest_edge", 0)
    return int(size.get("height", edge)), int(size.get("width", edge))


class VisualTokens:
    """Counts what takes the place of one `<image>`.

    Args:
        processor: A `LlavaProcessor` or, for AnyRes, a `LlavaNextProcessor`; with a bare tokenizer
            an image stays one token.

    Paper: AnyRes: LLaVA-NeXT, `spatial_unpad`; the counts are those of transformers.
    """

    def __init__(self, processor: Any) -> None:
        images = getattr(processor, "image_processor", None)
        self.grids: list[list[int]] | None = getattr(images, "image_grid_pinpoints", None)
        """AnyRes: `[height, width]` in pixels, to which a picture is scaled; none = one crop."""
        self.size_px = visual_size_px(images) if images is not None else (0, 0)
        """Height and width of what the tower sees."""
        self.fixed = 1
        """Tokens of an image where its size does not matter."""
        if images is not None and self.grids is None:
            height, width = self.size_px
            patches = (height // processor.patch_size) * (width // processor.patch_size)
            dropped = processor.vision_feature_select_strategy == "default"
            self.fixed = int(patches + processor.num_additional_image_tokens - dropped)
        self._processor = processor
        self._of = lru_cache(2**16)(self._count)

    def of(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Visual tokens and crops of a picture of this size."""
        return (self.fixed, 1) if self.grids is None else self._of(height_px, width_px)

    def _count(self, height_px: int, width_px: int) -> tuple[int, int]:
        size = (height_px, width_px)
        found = self._processor._get_num_multimodal_tokens(image_sizes=[size])
        crops = image_size_to_num_patches(size, self.grids, self.size_px[0])
        return int(found["num_image_tokens"][0]), int(crops)

    def __getstate__(self) -> dict[str, Any]:
        """Workers get it without its cache."""
        return {**self.__dict__, "_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With an empty cache."""
        self.__dict__ = {**state, "_of": lru_cache(2**16)(self._count)}
