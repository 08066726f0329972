"""Tokens and model FLOPs of a VLM's micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llm2clip_vlm.constants import IGNORE_INDEX


class VlmFlops:
    """Counts them without waiting for the device.

    Model FLOPs are those of the mathematics: two a weight and token forward, two more for each of
    the gradients (of activations, of weights) that the frozen parts leave; attention by the length
    of each sample; no padding, no recomputation, logits of trained tokens alone. A convolutional
    tower's are understated: its early layers see more positions than it has tokens.
    """

    def __init__(self, model: Any) -> None:
        """Reads sizes and what trains. Args: model: A LLaVA with `requires_grad` set."""
        vision, text = model.config.vision_config, model.config.get_text_config()
        llava, flows = model.model, False
        costs = []
        for part in (llava.vision_tower, llava.multi_modal_projector, llava.language_model):
            words = part.get_input_embeddings() if part is llava.language_model else nn.Identity()
            trained = _size(part, trained=True)
            back = flows or trained > 0
            costs.append(2 * (_size(part) - _size(words)) * (1 + back) + 2 * trained)
            flows = back
        head = 2 * _size(model.lm_head) * (2 + model.lm_head.weight.requires_grad)
        towers = 3 if any(p.requires_grad for p in llava.vision_tower.parameters()) else 1
        visual = model.config.image_seq_length
        width = text.num_attention_heads * (getattr(text, "head_dim", None) or 0)
        attention = 4 * vision.num_hidden_layers * vision.hidden_size * towers
        self._image = visual * (costs[0] + costs[1] + visual * attention)
        self._token, self._trained = costs[2], head
        # causal: half of the pairs
        self._square = 2 * text.num_hidden_layers * (width or text.hidden_size) * (1 + 2 * flows)

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Tensor | int, Tensor]:
        """Tokens and FLOPs, forward and backward.

        Args:
            inputs: What the model gets: padded with a mask, or packed with positions.
        """
        tokens: Tensor | int = inputs["input_ids"].numel()
        if (mask := inputs.get("attention_mask")) is not None:
            tokens, squares = mask.sum(), (mask.sum(-1) ** 2).sum()
        else:  # the sum of 2 p + 1 over the positions p of a sample is its length squared
            squares = (2 * inputs["position_ids"] + 1).sum()
        trained = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum()
        flops = tokens * self._token + squares * self._square + trained * self._trained
        images = len(inputs.get("pixel_values", ()))
        return tokens, flops.double() + images * self._image


def _size(module: nn.Module, *, trained: bool = False) -> int:
    # ZeRO-3 leaves an empty shell and keeps the size beside it
    return sum(
        int(getattr(p, "ds_numel", p.numel()))
        for p in module.parameters()
        if p.requires_grad or not trained
    )
