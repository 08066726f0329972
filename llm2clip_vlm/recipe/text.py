"""Recipes of stages 0, 1 and 2a: the text encoder."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.recipe.base import (
    CaptionPairSource,
    CaptionSource,
    ImageTextSource,
    LoraSection,
    RunRecipe,
    TextEncoderSection,
    ZeroShotSource,
)


class MntpRecipe(RunRecipe):
    """Optional step before stage 1: masked next token prediction (LLM2Vec; off in paper v6)."""

    stage: Literal["stage0_mntp"] = "stage0_mntp"
    """Which program reads this file."""
    language_model: str
    """Path or hub id of the decoder LLM."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the saved weights; `auto` keeps it as it is (float16 becomes float32 where it
    trains). What trains without DeepSpeed is held in float32 meanwhile."""
    bidirectional: Literal[True, "partial"] = True
    """`partial` takes a model some of whose layers stay causal."""
    lora: LoraSection | None = Field(default_factory=LoraSection)
    """Adapter that is merged at the end; `null` tunes every weight."""
    sources: list[CaptionSource]
    """Texts; all captions of all records, joined."""
    max_length_tokens: int = Field(default=512, ge=8)
    """Tokens of a row (released code: 512)."""
    mask_token: str = "_"
    """Text that stands for a hidden token (released code: `_`)."""
    mask_probability: float = Field(default=0.2, gt=0, lt=1)
    """Share of tokens to guess (released code: 0.2)."""

    @model_validator(mode="after")
    def _texts_have_no_weights(self) -> Self:
        if any(source.weight != 1 for source in self.sources):
            raise ValueError("sources: weight: all texts are joined; leave it out, or use `limit`")
        return self


class Stage1Recipe(RunRecipe):
    """Stage 1: caption-contrastive tuning of the LLM (paper v6 section 3.1)."""

    contrastive: ClassVar[bool] = True
    """See `RunRecipe`."""
    stage: Literal["stage1_text_encoder"] = "stage1_text_encoder"
    """Which program reads this file."""
    text_encoder: TextEncoderSection
    """The LLM and how its output becomes one vector."""
    lora: LoraSection | None = Field(default_factory=LoraSection)
    """Adapter on all linear layers; `null` tunes every weight."""
    load_in_4bit: bool = False
    """QLoRA: the adapter trains on NF4 weights and is merged into those of `text_encoder.dtype`.
    Needs bitsandbytes and `lora`."""
    train: list[CaptionPairSource]
    """Records with at least two captions of one image, or pairs of texts; mixed by weight."""
    evaluation: list[CaptionSource] = Field(default_factory=list)
    """Held-out records for caption retrieval accuracy (CRA): each record's first caption is a
    query, all other captions are the gallery, hit@1."""
    evaluation_steps: int | None = Field(default=None, ge=1)
    """Measure CRA every this many steps too. None: before and after training only."""
    scale: float = Field(default=50.0, gt=0)
    """Multiplies cosine similarities (temperature 0.02, released code)."""
    symmetric: bool = True
    """Both directions; false = query to positive only (released code)."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass on each process, padding counted; more go through GradCache, which
    bounds the memory and keeps the gradient of the whole batch. None: all at once."""

    @model_validator(mode="after")
    def _four_bits_have_an_adapter(self) -> Self:
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit is true and lora is null; 4-bit weights cannot train")
        return self


class Stage2aRecipe(RunRecipe):
    """Stage 2a: embeddings of all captions by the frozen text encoder, cached by content."""

    stage: Literal["stage2a_cache_text"] = "stage2a_cache_text"
    """Which program reads this file."""
    text_encoder: str | TextEncoderSection
    """Stage 1's `text_encoder/`, or a raw LLM with its pooling (ablation `no_stage1`)."""
    sources: list[ImageTextSource]
    """All texts that stage 2 and its evaluation will ask for."""
    zero_shot: list[ZeroShotSource] = Field(default_factory=list)
    """Labelled images whose classes' prompts stage 2b will ask for."""
    prompts: list[str] = Field(default_factory=list)
    """Texts to put before every caption, each for one more embedding of it, beside that with the
    text encoder's own `instruction`."""
    slice: str | None = Field(default=None, pattern=r"^\d+/[1-9]\d*$")
    """`i/n` (i from 0): write each nth shard only, while other processes write the others into this
    directory, or into one of their own that `llm2clip-vlm embed merge` joins. The same recipe
    without it then finds nothing to encode and writes the manifest."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward pass, padding counted; texts are sorted by length."""

    @model_validator(mode="after")
    def _slice_is_one_of_its_number(self) -> Self:
        part, parts = map(int, (self.slice or "0/1").split("/"))
        if part >= parts:
            raise ValueError(f"slice: expected i/n with i from 0 to {parts - 1}, got {self.slice}")
        if "" in self.prompts:
            raise ValueError("prompts: an empty one would stand for `instruction`; leave it out")
        return self
