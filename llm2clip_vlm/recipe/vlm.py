"""Recipes of stages 3 and 4."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.recipe.base import ImageSource, LoraSection, RunRecipe, Section


class VlmSection(Section):
    """Parts of the VLM, tower and LLM, and how they meet."""

    vision_tower: str
    """A vision tower directory (stage 2b's `vision_tower/`), a CLIP model, or a hub id."""
    language_model: str
    """Path or hub id of the decoder LLM."""
    vision_feature_layer: int | list[int] = -2
    """Hidden layer whose patches become visual tokens (LLaVA-1.5: -2); of several, the features are
    concatenated."""
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """`default` drops the CLS token where the tower has one, `full` keeps it."""
    image_size_px: int | None = Field(default=None, ge=1)
    """Another resolution than that of the tower: positions are interpolated (LLaVA-1.5: 336)."""
    image_aspect_ratio: Literal["square", "pad", "anyres"] = "square"
    """`pad` fills to a square with the mean colour (LLaVA-1.5 stage 2), `square` crops, `anyres`
    shows the whole picture and then crops of it (LLaVA-NeXT)."""
    image_grid_pinpoints: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = (
        None
    )
    """Sizes `[height, width]` in pixels that `anyres` scales a picture to, multiples of the tower's
    image size. None: LLaVA-NeXT's 1x2, 2x1, 2x2, 3x1 and 1x3 crops."""
    chat_template: str | None = None
    """`vicuna_v1`, `llama3`, `qwen`, `mistral`, `gemma`, or a Jinja file. None: that of the LLM's
    tokenizer."""
    system_prompt: str | None = None
    """System prompt of conversations that bring no system turn, written as the template writes one;
    `""` = no prompt at all. None: what the template writes by itself. It becomes part of the
    template that is trained and exported."""
    extra_tokens: list[str] = []
    """Tokens that the data's text may use, such as `<box>`: added where the LLM lacks them, and no
    control tokens where it has them (any other control token's name in a text stays text)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the composed and the exported weights; `auto` is that of the LLM (float32 for
    float16). What trains without DeepSpeed is held in float32 meanwhile."""
    projector: str | None = None
    """Start from the projector of this VLM (`model/` of stage 3) instead of a new one; refused
    where it was trained beside another tower, LLM, template, layer or image mode."""

    @model_validator(mode="after")
    def _grids_belong_to_anyres(self) -> Self:
        if self.image_grid_pinpoints is not None and self.image_aspect_ratio != "anyres":
            raise ValueError(
                "image_grid_pinpoints: expected image_aspect_ratio: anyres beside it, got "
                f"{self.image_aspect_ratio}"
            )
        return self


class InstructionSource(ImageSource):
    """Conversations: LLaVA's JSON, `messages`, `texts`, Parquet, shards, a data set of the hub.

    A `path` that ends with `.yaml` is a mixture (LLaVA-NeXT) that lists such files.
    """

    sampling_strategy: str = Field(default="all", pattern=r"^(all|(first|end|random):\d+%?)$")
    """Records to take: `all`, or `first`, `end` or `random` with `:N` or `:N%` (LLaVA-NeXT)."""
    weight: float = Field(default=1.0, gt=0, le=10_000)
    """Number of times that each of these is seen in an epoch; 0.5 = a random half of them."""
    shuffle_images: bool = False
    """Give each record another record's image (shows what the pictures are worth)."""


class PartTraining(Section):
    """Training of one part of the VLM."""

    lr: float = Field(ge=0)
    """Learning rate at the schedule's peak."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of its matrices. None: `trainer.weight_decay`."""
    last_blocks: int | None = Field(default=None, ge=1)
    """Train only this many of its last used blocks and what follows them. None: all."""


Part = Literal["vision_tower", "multi_modal_projector", "language_model"]
"""A part of the VLM, as Hugging Face's LLaVA names it."""


class VlmRecipe(RunRecipe):
    """Base of the recipes of stages 3 and 4."""

    data: list[InstructionSource]
    """Sources of conversations, such as LLaVA's JSON files."""
    max_length_tokens: int = Field(default=2048, ge=8)
    """Text and visual tokens of one sample; a longer conversation ends with its last answer that
    fits, and is refused or counted where the first does not."""
    packing: bool = True
    """Join samples into rows without padding and without letting them see each other. A micro-batch
    then holds `trainer.per_device_train_batch_size` x `max_length_tokens` tokens at most, and as
    many samples as fit; a step has the same samples as without, and accumulation follows."""
    packing_max_images: int | None = Field(default=None, ge=1)
    """Images (with AnyRes: crops) of a packed micro-batch at most, which bounds the tower's memory.
    None: no limit."""
    trainable: dict[Part, Annotated[float, Field(ge=0)] | PartTraining] = Field(min_length=1)
    """Learning rate of each part that trains, or `{lr, weight_decay, last_blocks}`; a part that is
    not named is frozen."""
    language_model_lora: LoraSection | None = None
    """Adapter on the LLM instead of all its weights; merged into the final export."""
    vision_tower_lora: LoraSection | None = None
    """Adapter on the tower instead of all its weights."""
    load_in_4bit: bool = False
    """QLoRA: the LLM's own weights stay frozen as NF4; what trains is merged into the original
    ones. Needs bitsandbytes, and `language_model_lora` where the LLM trains; not with ZeRO-3."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        strategy = self.trainer.get("train_sampling_strategy", "random")
        told = f"trainer.train_sampling_strategy: {strategy!r}"
        if self.packing and strategy != "random":
            raise ValueError(
                f"{told} has no meaning with packing, which plans its own batches; leave it out or "
                "set `packing: false`"
            )
        if strategy == "batch_rebalance":  # deals by the number of processes; no exact resume
            raise ValueError(f"{told}: expected random, sequential or group_by_length")
        trains = "language_model" in self.trainable
        if self.load_in_4bit and trains and self.language_model_lora is None:
            raise ValueError("load_in_4bit: expected language_model_lora beside it, got none")
        return self


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
    """Stage 3's `model/`, or any LLaVA or LLaVA-NeXT directory of transformers."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """Change the image processor for this stage, not from or to AnyRes. None: as in stage 3."""
