"""Attention of packed samples where there is no varlen kernel: each sample by itself.

With `sdpa` transformers masks the whole row, so a row of n samples computes n times the products
that count. Flash attention's varlen kernels do not; this is the same for the CPU, and exact.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_document"


def install_document_attention(model: Any) -> None:
    """Let a VLM's language model attend sample by sample in packed rows; else nothing changes.

    Args:
        model: A LLaVA; left alone unless its language model attends by `sdpa`.
    """
    config = model.model.language_model.config
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME


def _attend(
    module: Any,
    query: Float[Tensor, "b heads t d"],
    key: Float[Tensor, "b kv t d"],
    value: Float[Tensor, "b kv t d"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`; a row whose positions start again is cut there."""
    lengths = _documents(query, key, kwargs.get("position_ids"))
    if len(lengths) < 2 or getattr(module, "sliding_window", None) is not None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return whole
    pieces = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    kwargs["is_causal"] = True
    found = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in pieces]
    return torch.cat(found, dim=1), None


def _documents(query: Tensor, key: Tensor, positions: Tensor | None) -> list[int]:
    """Tokens of each sample of a packed row; empty where there is none."""
    if positions is None or len(query) != 1 or key.shape[2] != query.shape[2]:
        return []
    lengths: list[int] | None = getattr(positions, "_documents", None)
    if lengths is None:  # asked of the device once a forward pass, not in each layer
        starts = (positions[0] == 0).nonzero()[:, 0].tolist()
        bounds = [*starts, query.shape[2]] if starts[:1] == [0] else []
        lengths = [end - start for start, end in pairwise(bounds)]
        positions._documents = lengths  # type: ignore[attr-defined]
    return lengths
