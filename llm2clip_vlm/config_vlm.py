"""Recipes of stages 3 and 4."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm2clip_vlm.config import LoraSection, RunRecipe, Section


class VlmSection(Section):
    """Which tower and which LLM make the VLM, and how they meet."""

    vision_tower: str
    """A vision tower directory (stage 2b's `vision_tower/`), a CLIP model, or a hub id."""
    language_model: str
    """Path or hub id of the decoder LLM."""
    vision_feature_layer: int | list[int] = -2
    """Hidden layer whose patches become visual tokens (LLaVA-1.5: -2); of several, the features are
    concatenated."""
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """`default` drops the CLS token, `full` keeps it."""
    image_size_px: int | None = Field(default=None, ge=1)
    """Another resolution than the tower's: its positions are interpolated (LLaVA-1.5: 336)."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    """`pad` fills to a square with the mean colour (LLaVA-1.5 stage 2), `square` crops."""
    chat_template: str | None = None
    """Jinja file that replaces the LLM tokenizer's template; none = the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the composed weights."""


class InstructionSource(Section):
    """LLaVA conversations: a JSON array or JSONL of `{id, image, conversations}`."""

    path: str
    """The file, read unchanged."""
    image_root: str | None = None
    """Folder that image paths are relative to; none = the file's own folder."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most this many records, in file order."""
    shuffle_images: bool = False
    """Give each record another record's image (shows what the pictures are worth)."""


class VlmRecipe(RunRecipe):
    """What stages 3 and 4 share."""

    data: list[InstructionSource]
    """LLaVA JSON files."""
    max_length_tokens: int = Field(default=2048, ge=8)
    """Text and visual tokens of one sample; a longer sample is refused or counted, never cut inside
    the visual tokens."""
    packing: bool = False
    """Join samples into rows of `max_length_tokens` without letting them see each other."""
    trainable: dict[Literal["vision_tower", "multi_modal_projector", "language_model"], float]
    """Learning rate of each part that trains; a part that is not named is frozen."""
    language_model_lora: LoraSection | None = None
    """Adapter on the LLM instead of all its weights; merged into the final export."""


class Stage3Recipe(VlmRecipe):
    """Stage 3: the projector learns to feed the LLM (LLaVA-1.5 feature alignment)."""

    stage: Literal["stage3_projector"] = "stage3_projector"
    """Which program reads this file."""
    vlm: VlmSection
    """Tower and LLM."""
    plain: bool = True
    """LLaVA's `plain` template: the human text is dropped, the sample is image + caption; false =
    the chat template."""


class Stage4Recipe(VlmRecipe):
    """Stage 4: visual instruction tuning."""

    stage: Literal["stage4_instruction"] = "stage4_instruction"
    """Which program reads this file."""
    checkpoint: str
    """Stage 3's `model/`, or any `LlavaForConditionalGeneration` directory."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """Change the image processor for this stage; none keeps stage 3's."""
