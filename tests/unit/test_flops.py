"""Tests of llm2clip_vlm/models/flops.py against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from llm2clip_vlm.models.flops import flop_counter

FORWARD = 2 * 3 * 3 * 64 * 10 * 10
"""Of one input channel a group: 3 x 3 taps, 64 output channels, 10 x 10 positions."""


@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_gradient_of_a_convolution_costs_what_its_forward_pass_does(
    groups: int, transposed: bool
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(64, 64, 3, padding=1, groups=groups, bias=False)
    pixels = torch.randn(1, 64, 10, 10)
    with flop_counter() as counter:
        layer(pixels)
    assert counter.get_total_flops() == FORWARD * 64 // groups
    for wanted, gradients in ((False, 1), (True, 2)):
        loss = layer(pixels.detach().requires_grad_(wanted)).sum()
        with flop_counter() as counter:
            loss.backward()
        assert counter.get_total_flops() == gradients * FORWARD * 64 // groups


def test_attention_counts_on_a_cpu() -> None:
    query, key, value = (torch.randn(2, 4, 10, 8, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        out = scaled_dot_product_attention(query, key, value)
    products = 2 * 2 * 2 * 4 * 10 * 10 * 8  # scores and their sum, of 2 x 4 heads of 8
    assert counter.get_total_flops() == products
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() in (2 * products, 5 * products // 2)  # scores once more
