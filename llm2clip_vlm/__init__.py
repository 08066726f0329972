"""LLM2CLIP vision towers, and LLaVA-style VLMs built on them.

The public names below are imported on first use, so that `import llm2clip_vlm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llm2clip_vlm.torchvision_guard import watch

if TYPE_CHECKING:
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.data.conversation.messages import build_labels
    from llm2clip_vlm.data.conversation.packing import plan_packs
    from llm2clip_vlm.losses.contrastive import contrastive_loss
    from llm2clip_vlm.metrics.retrieval import recall_at_k
    from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel, register
    from llm2clip_vlm.models.text.text_adaptor import TextAdaptor
    from llm2clip_vlm.models.text.text_encoder import TextEncoder
    from llm2clip_vlm.models.vision.towers import load_vision_tower
    from llm2clip_vlm.models.vlm.building import build_vlm
    from llm2clip_vlm.play.photo_index import load_dual_encoder
    from llm2clip_vlm.recipe.reading import RecipeError, load_recipe

__version__ = "0.1.0"

__all__ = [
    "EmbeddingCache",
    "LLM2CLIPConfig",
    "LLM2CLIPModel",
    "RecipeError",
    "TextAdaptor",
    "TextEncoder",
    "__version__",
    "build_labels",
    "build_vlm",
    "contrastive_loss",
    "load_dual_encoder",
    "load_recipe",
    "load_vision_tower",
    "plan_packs",
    "recall_at_k",
    "register",
]

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


watch()


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
