"""Parameters of a VLM without gradients: frozen where never used, kept where not used now."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm2clip_vlm.models.vision.image_mode import one_picture
from llm2clip_vlm.models.vision.towers import run_on_shapes

logger = logging.getLogger(__name__)


@torch.enable_grad()
def freeze_unused_vision(model: Any) -> list[str]:
    """Freezes tower parameters that the selected features do not depend on.

    With `vision_feature_layer: -2` the last block and the final norm never get a gradient, nor does
    DINO's mask token; left trainable they stop data-parallel training with gradient checkpointing.

    Args:
        model: A `LlavaForConditionalGeneration`.

    Returns:
        Names of the parameters that were trainable and no longer are.
    """
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    weights, out = run_on_shapes(tower, model.config.vision_config.image_size)
    chosen = [layers] if isinstance(layers, int) else layers
    torch.stack([out.hidden_states[layer].sum() for layer in chosen]).sum().backward()
    frozen = []
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad and weights[name].grad is None:
            parameter.requires_grad_(False)
            frozen.append(f"vision_tower.{name}")
    if frozen:
        logger.info("frozen, %d tower parameters unused by layer %s", len(frozen), layers)
    return frozen


def install_text_only_guard(model: Any) -> None:
    """Keeps tower and projector in the graph of batches without images.

    If one process has images and another has none, their gradients do not match: ZeRO crashes or
    hangs. Before the language model runs, a training batch without `pixel_values` gets zero times
    the features of a blank image; values and gradients stay exactly the same. Nothing runs that
    is not needed: with a frozen tower only the projector sees zeros (all of it under ZeRO-3,
    whose processes must fetch the same modules in the same order).

    Args:
        model: A LLaVA; a second call changes nothing.
    """
    if getattr(model, "_text_only_guard", False):
        return
    llava = model.model
    state = {"has_images": False}

    def note_images(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state["has_images"] = kwargs.get("pixel_values") is not None or len(args) > 1

    def add_nothing(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if state["has_images"] or not llava.training or kwargs.get("inputs_embeds") is None:
            return None
        if (features := _blank_features(llava)) is None:
            return None
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + 0.0 * features.sum().to(embeds.dtype)}

    def to_own_dtype(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].to(next(module.parameters()).dtype),)  # a frozen tower may be in bf16

    llava.multi_modal_projector.register_forward_pre_hook(to_own_dtype)
    llava.register_forward_pre_hook(note_images, with_kwargs=True)
    llava.language_model.register_forward_pre_hook(add_nothing, with_kwargs=True)
    model._text_only_guard = True


def _blank_features(llava: Any) -> Tensor | None:
    """Visual tokens of a blank image through as much as trains. None: nothing trains."""
    parameter = next(llava.multi_modal_projector.parameters())
    like: Any = {"device": parameter.device, "dtype": parameter.dtype}
    newline = getattr(llava, "image_newline", None)
    tower_trains = any(p.requires_grad for p in llava.vision_tower.parameters())
    if tower_trains or is_deepspeed_zero3_enabled():
        crops, sizes = one_picture(llava.config)
        side = llava.config.vision_config.image_size
        blank = torch.zeros((crops, 3, side, side), **like)
        return torch.cat(list(llava.get_image_features(blank, **sizes).pooler_output))
    if any(p.requires_grad for p in llava.multi_modal_projector.parameters()):
        blank = torch.zeros(1, 1, llava.multi_modal_projector.linear_1.in_features, **like)
        features: Tensor = llava.multi_modal_projector(blank)
        return features if newline is None else features + newline
    return None
