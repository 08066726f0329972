"""Recipes of what the road starts from and is compared with: base models, control towers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.config_stage2 import EncoderRecipe


class ClipBaselineRecipe(EncoderRecipe):
    """Ordinary CLIP training: pre-trains the demo's base and trains the control towers."""

    stage: Literal["clip_baseline"] = "clip_baseline"
    """Which program reads this file."""
    clip: str | dict[str, Any] | None = None
    """A `CLIPModel` directory to continue from, or `CLIPConfig` arguments to start from nothing;
    none = `vision_tower` with a new text tower."""
    vision_tower: str | None = None
    """Instead of `clip`: path or hub id of any vision tower that stage 2b takes. The result is
    transformers' `VisionTextDualEncoderModel`."""
    image_size_px: int | None = Field(default=None, ge=1)
    """With `vision_tower`: another resolution, as in stage 2b."""
    text_model: dict[str, Any] | None = None
    """With `vision_tower`: `CLIPTextConfig` arguments of the text tower that starts from nothing
    (causal, pooled at the end token); vocabulary and special tokens are the tokenizer's."""
    projection_dim: int = Field(default=512, ge=1)
    """With `vision_tower`: width of the joint space."""
    logit_scale_init: float = 2.6592
    """With `vision_tower`: stored logarithm at the start, as in stage 2b."""
    tokenizer: str | None = None
    """Directory of the tokenizer when `clip` is a config (its image processor too) or beside
    `vision_tower`; a tokenizer that puts no end token behind a text gets one."""
    text_window_tokens: int | None = Field(default=None, ge=4)
    """Lengthen the text tower to this many positions (pretrained ones kept, new ones repeat the
    last); captions beyond the window are cut, as CLIP does."""
    learning_rates: dict[
        Literal["vision_model", "text_model", "projections"], Annotated[float, Field(ge=0)]
    ] = {
        "vision_model": 1e-5,
        "text_model": 1e-5,
        "projections": 1e-5,
    }
    """One per group; `projections` includes `logit_scale`. A part without a rate, or with 0, is
    frozen."""
    evaluate_only: bool = False
    """Measure `clip` as it is: nothing is trained."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.clip is None) == (self.vision_tower is None):
            raise ValueError("expected either `clip` or `vision_tower`, got both or neither")
        needed = (self.text_model, self.tokenizer)
        if self.vision_tower is not None and (None in needed or self.text_window_tokens):
            raise ValueError(
                "`vision_tower` needs `text_model` and `tokenizer`; the text window is "
                "text_model.max_position_embeddings, not text_window_tokens"
            )
        if self.vision_tower is None and (self.text_model or self.image_size_px):
            raise ValueError("`text_model` and `image_size_px` belong to `vision_tower`")
        return self

    @model_validator(mode="after")
    def _blocks_of_a_tower_that_trains(self) -> Self:
        if self.tower_last_blocks is not None and not self.learning_rates.get("vision_model"):
            raise ValueError(
                "tower_last_blocks: expected with a learning rate of `vision_model`, which is "
                "frozen; remove one of the two"
            )
        return self
