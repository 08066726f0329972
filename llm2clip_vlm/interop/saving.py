"""Writing a tower, a stage 2b model or a VLM as transformers has it, and reading it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from llm2clip_vlm.interop.certificate import Evidence, logits_of
from llm2clip_vlm.models.loading import load_complete
from llm2clip_vlm.models.vlm.building import save_vlm
from llm2clip_vlm.training.export import export_vision_tower, vision_tower_of


def save_encoder(model: Any, processor: Any, folder: Path) -> Any:
    """Write a tower, or an `LLM2CLIPModel` with the plain tower in `vision_tower/`.

    Args:
        model: Either.
        processor: Its image processor.
        folder: Where to.

    Returns:
        The same, read back in fp32.
    """
    if vision_tower_of(model) is model:
        export_vision_tower(model, processor, folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        export_vision_tower(model, processor, folder / "vision_tower")
    again: Any = load_complete(AutoModel, folder, dtype=torch.float32)
    return again.eval()


def needs(model: Any) -> str:
    """Say what has to run before `AutoModel` opens a model."""
    config = getattr(model.config, "vision_config", model.config)
    own = {type(part).__module__.split(".")[0] for part in (config, model)} != {"transformers"}
    return "llm2clip_vlm.register() first" if own else "transformers alone"


def save_llava(model: Any, processor: Any, folder: Path) -> Evidence:
    """Write a VLM as transformers has it, and compare it with what opens there.

    Args:
        model: The VLM.
        processor: Its processor.
        folder: Where to.
    """
    save_vlm(model, processor, folder)
    again = load_complete(type(model), folder, dtype=model.dtype)
    opened = f"{type(model).__name__} of transformers"
    return Evidence(opened, logits_of(model), logits_of(again), {"needs": needs(model)})
