"""Writing a tower, an encoder, a language model or a VLM as transformers has it, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, logits_of
from llm2clip_vlm.models.loading import load_complete, read_tokenizer
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
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


@torch.no_grad()
def save_llm(
    model: Any, tokenizer: Any, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a language model with its tokenizer.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        folder: Where to.

    Returns:
        Logits of the model, and of what opens there.

    Raises:
        ModelError: The tokenizer that opens there gives other ids.
    """
    model.eval().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    again = load_complete(AutoModelForCausalLM, folder, dtype="auto").eval()
    text = "Two dogs play in the snow.\nA photo"
    if read_tokenizer(folder)(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise ModelError(f"{folder}: the saved tokenizer gives other ids than the original")
    ids = torch.arange(min(16, model.config.vocab_size))[None]
    return {"logits": model(ids).logits.float()}, {"logits": again(ids).logits.float()}


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
