"""Size, crops and visual tokens that an image processor makes of a picture."""

from __future__ import annotations

from typing import Any

from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


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
        """AnyRes: `[height, width]` in pixels, to which a picture is scaled. None: one crop."""
        self.size_px = (0, 0)
        """Height and width of what the tower sees."""
        self.fixed = 1
        """Tokens of an image where its size does not matter."""
        self.settings: list[Any] = []
        """All that the counts depend on, beside a picture's size."""
        self._processor = processor
        if images is None:
            return
        size: dict[str, Any] = dict(getattr(images, "crop_size", None) or images.size)
        edge = size.get("shortest_edge", 0)
        self.size_px = (int(size.get("height", edge)), int(size.get("width", edge)))
        patch, more = processor.patch_size, processor.num_additional_image_tokens
        self._dropped = int(processor.vision_feature_select_strategy == "default")
        if self.grids is None:
            height, width = self.size_px
            self.fixed = (height // patch) * (width // patch) + more - self._dropped
        self.settings = [self.fixed, self.grids, self.size_px, patch, more, self._dropped]

    def of(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Visual tokens and crops of a picture of this size."""
        if self.grids is None:
            return self.fixed, 1
        tokens = self._processor._get_number_of_features(height_px, width_px, *self.size_px)
        crops = image_size_to_num_patches((height_px, width_px), self.grids, self.size_px[0])
        return tokens - self._dropped, crops
