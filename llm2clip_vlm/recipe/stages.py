"""Recipes of the stages by their names."""

from __future__ import annotations

from llm2clip_vlm.recipe.base import RunRecipe
from llm2clip_vlm.recipe.encoder import ClipBaselineRecipe, Stage2bRecipe
from llm2clip_vlm.recipe.text import MntpRecipe, Stage1Recipe, Stage2aRecipe
from llm2clip_vlm.recipe.vlm import Stage3Recipe, Stage4Recipe

RECIPES: dict[str, type[RunRecipe]] = {
    "clip_baseline": ClipBaselineRecipe,
    "stage0_mntp": MntpRecipe,
    "stage1_text_encoder": Stage1Recipe,
    "stage2a_cache_text": Stage2aRecipe,
    "stage2b_vision_encoder": Stage2bRecipe,
    "stage3_projector": Stage3Recipe,
    "stage4_instruction": Stage4Recipe,
}
"""Programs that read a stage recipe and leave a manifest."""
