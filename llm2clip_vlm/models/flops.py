"""What a forward or backward pass computes, counted by torch operator by operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def flop_counter() -> FlopCounterMode:
    """A counter of matrix products, convolutions and attention (all pairs, masked or not).

    torch's own misses the CPU's fused attention, and counts the gradients of a grouped convolution
    as those of a dense one (32 times too much for a depthwise layer of 64 channels).
    """
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping: dict[Any, Any] = {
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
        aten.convolution_backward: _convolution_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _convolution_backward(out: Any, pixels: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of the gradients that are asked for: each costs what the forward pass does."""
    transposed, wanted = rest[4], rest[7]
    return conv_flop_count(list(pixels), list(weight), list(out), transposed) * sum(wanted[:2])
