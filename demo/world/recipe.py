"""The recipe of the base language model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llm2clip_vlm.recipe.base import RunRecipe, Section


class TextPhase(Section):
    """One phase of the base language model's curriculum."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    documents: int = Field(default=32, ge=1)
    """Documents per step."""
    mixture: dict[str, float]
    """Weight of each kind of document (`demo/world/texts.py`)."""


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
    """Held-out scenes, ten questions each, of the text-only test."""
