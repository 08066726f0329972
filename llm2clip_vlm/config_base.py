"""Recipes of what the road starts from and is compared with: base models, control towers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llm2clip_vlm.config import RunRecipe, Section
from llm2clip_vlm.config_stage2 import EncoderRecipe


class ClipBaselineRecipe(EncoderRecipe):
    """Ordinary CLIP training: pre-trains the demo's base and trains the control towers."""

    stage: Literal["clip_baseline"] = "clip_baseline"
    """Which program reads this file."""
    clip: str | dict[str, Any]
    """A `CLIPModel` directory to continue from, or `CLIPConfig` arguments to start from nothing."""
    tokenizer: str | None = None
    """Directory of the tokenizer and image processor when `clip` is a config."""
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
    """One per group; `projections` includes `logit_scale`."""
    evaluate_only: bool = False
    """Measure `clip` as it is: nothing is trained."""


class TextPhase(Section):
    """One phase of the base language model's curriculum."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    documents: int = Field(default=32, ge=1)
    """Documents per step."""
    mixture: dict[str, float]
    """Weight of each kind of document (`llm2clip_vlm/data/world_text.py`)."""


class LanguageModelRecipe(RunRecipe):
    """Pre-training of the demo's base language model on text alone."""

    stage: Literal["base_language_model"] = "base_language_model"
    """Which program reads this file."""
    config: dict[str, Any]
    """`LlamaConfig` arguments; vocabulary and special ids come from the tokenizer."""
    window_tokens: int = Field(default=256, ge=16)
    """Longest text that the tokenizer takes."""
    phases: list[TextPhase]
    """The curriculum, in order."""
    evaluation_scenes: int = Field(default=300, ge=1)
    """Held-out scenes, ten questions each, of the text-only examination."""
