"""LLM2CLIP vision towers, and LLaVA-style VLMs built on them.

The public names below are imported on first use, so that `import llm2clip_vlm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llm2clip_vlm.torchvision_guard import watch

if TYPE_CHECKING:
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache as EmbeddingCache
    from llm2clip_vlm.data.conversation.messages import build_labels as build_labels
    from llm2clip_vlm.data.conversation.packing import plan_packs as plan_packs
    from llm2clip_vlm.losses.contrastive import contrastive_loss as contrastive_loss
    from llm2clip_vlm.metrics.retrieval import recall_at_k as recall_at_k
    from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig as LLM2CLIPConfig
    from llm2clip_vlm.models.llm2clip import LLM2CLIPModel as LLM2CLIPModel
    from llm2clip_vlm.models.llm2clip import register as register
    from llm2clip_vlm.models.text.text_adaptor import TextAdaptor as TextAdaptor
    from llm2clip_vlm.models.text.text_encoder import TextEncoder as TextEncoder
    from llm2clip_vlm.models.vision.towers import load_vision_tower as load_vision_tower
    from llm2clip_vlm.models.vlm.building import build_vlm as build_vlm
    from llm2clip_vlm.play.photo_index import load_dual_encoder as load_dual_encoder
    from llm2clip_vlm.recipe.reading import RecipeError as RecipeError
    from llm2clip_vlm.recipe.reading import load_recipe as load_recipe

__version__ = "0.1.0"

_HOME = {
    "EmbeddingCache": "data.cache.embeddings",
    "LLM2CLIPConfig": "models.llm2clip",
    "LLM2CLIPModel": "models.llm2clip",
    "RecipeError": "recipe.reading",
    "TextAdaptor": "models.text.text_adaptor",
    "TextEncoder": "models.text.text_encoder",
    "build_labels": "data.conversation.messages",
    "build_vlm": "models.vlm.building",
    "contrastive_loss": "losses.contrastive",
    "load_dual_encoder": "play.photo_index",
    "load_recipe": "recipe.reading",
    "load_vision_tower": "models.vision.towers",
    "plan_packs": "data.conversation.packing",
    "recall_at_k": "metrics.retrieval",
    "register": "models.llm2clip",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (they are strings)

watch()


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if (home := _HOME.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
