"""timm's evaluation preprocessing as a transformers image processor; no timm is needed."""

from __future__ import annotations

from typing import Any

import pytest

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.vision.timm_vision import timm_image_processor


@pytest.mark.parametrize(
    ("given", "shortest"),
    [({"crop_pct": 0.9}, 248), ({"crop_pct": 1.0}, 224), ({"crop_pct": 0.875}, 256), ({}, 256)],
)
def test_a_picture_is_scaled_so_that_the_crop_is_its_share(
    given: dict[str, Any], shortest: int
) -> None:
    """timm resizes the short side to `input_size / crop_pct`, rounded down; 0.875 if unsaid."""
    means = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    made = timm_image_processor({"input_size": (3, 224, 224), **means, **given})
    assert made.size["shortest_edge"] == shortest
    assert (made.crop_size["height"], made.crop_size["width"]) == (224, 224)
    assert list(made.image_mean) == [0.1, 0.2, 0.3] and list(made.image_std) == [0.4, 0.5, 0.6]
    assert made.do_center_crop and int(made.resample) == 3  # bicubic
    squash = timm_image_processor({"input_size": (3, 224, 224), **means, "crop_mode": "squash"})
    assert squash.do_center_crop and squash.size["height"] == squash.size["width"] == 256
    whole = {"crop_mode": "squash", "crop_pct": 1.0}
    squash = timm_image_processor({"input_size": (3, 224, 224), **means, **whole})
    assert not squash.do_center_crop and squash.size["height"] == squash.size["width"] == 224
    with pytest.raises(ModelError, match="'border': expected center, shortest or squash"):
        timm_image_processor({"input_size": (3, 224, 224), **means, "crop_mode": "border"})
