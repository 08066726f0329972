"""Packed samples that do not see each other, whatever language model they go through.

Positions that start again show attention where a sample begins. With `sdpa` transformers masks the
whole row, so a row of n samples computes n times the products that count; flash attention's varlen
kernels do not, and here is the same for the CPU, and exact. Convolutions and recurrent states need
the samples' bounds, if their kernels are installed; some models ignore both. So the model itself is
tested before anything is trained.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm2clip_vlm.models.equal import HALF_TOLERANCE, TOLERANCE, difference, fixed_ids, logits_of

NAME = "sdpa_by_document"


def install_packing(model: Any) -> str | None:
    """Lets a VLM's language model take packed rows. Under ZeRO-3 call it on all processes.

    Args:
        model: A LLaVA on the device where it will run.

    Returns:
        The reason why its samples would see each other all the same. None: they do not.
    """
    install_document_attention(model)
    if (leak := _leak(model)) is None:
        return None
    hook = model.model.language_model.register_forward_pre_hook(_add_bounds, with_kwargs=True)
    try:
        leak = _leak(model)
    except (TypeError, ValueError) as refused:  # no such argument, or a kernel is missing
        leak = f"{leak}; {refused}"
    if leak is not None:
        hook.remove()
    return leak


def _leak(model: Any) -> str | None:
    """What a sample's logits show of the sample before it, or of the row. None: nothing."""
    words = model.config.get_text_config().vocab_size
    first, other, second = (fixed_ids(words, n, first=k) for n, k in ((9, 0), (9, 1), (11, 2)))
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    rows = [
        logits_of(model, torch.cat([ids, second], dim=1), position_ids=positions)
        for ids in (first, other)
    ]
    strict = TOLERANCE.get(rows[0].dtype, HALF_TOLERANCE) / 10  # the same kernels in both
    if wrong := difference(rows[0][:, 9:], rows[1][:, 9:], strict):
        return f"a sample's logits depend on the sample before it: {wrong}"
    alone = torch.cat([logits_of(model, ids) for ids in (first, second)], dim=1)
    if wrong := difference(alone, rows[0]):
        return f"a sample's logits are not those that it has alone: {wrong}"
    return None


def _add_bounds(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add the bounds of a packed row's samples, for Mamba (`seq_idx`) and linear attention."""
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or len(positions) != 1:
        return None
    starts = (positions[0] == 0).nonzero()[:, 0]
    if len(starts) < 2:
        return None
    bounds = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).int()
    longest = int(bounds.diff().max())
    number = (positions == 0).cumsum(-1).int() - 1
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "seq_idx": number}
    return args, kwargs | given | {"max_length_q": longest, "max_length_k": longest}


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
    """Call `sdpa_attention_forward`; a row whose positions start again is cut there.

    A sample keeps its own part of the mask, where that says more than causal: sliding windows,
    chunks, masks that depend on the values.
    """
    lengths = _documents(query, key, kwargs.get("position_ids"))
    if len(lengths) < 2 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pieces = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    kwargs["is_causal"] = True  # where there is no mask
    found = [
        sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
        for (q, k, v), mask in zip(pieces, _masks(attention_mask, lengths), strict=True)
    ]
    return torch.cat(found, dim=1), None


def _masks(mask: Tensor | None, lengths: list[int]) -> list[Tensor | None]:
    """Each sample's part of a mask. None: the part is just causal."""
    if mask is None:
        return [None] * len(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = [mask[..., a:b, a:b] for a, b in pairwise(ends)]
    causal: list[bool] | None = getattr(mask, "_causal", None)
    if causal is None:  # asked of the device once a forward pass, not in each layer
        kind = mask.dtype == torch.bool
        plain = [(part == torch.ones_like(part).tril()).all() for part in parts if kind]
        causal = torch.stack(plain).tolist() if plain else [False] * len(parts)
        mask._causal = causal  # type: ignore[attr-defined]
    return [None if plain else part for part, plain in zip(parts, causal, strict=True)]


def _documents(query: Tensor, key: Tensor, positions: Int[Tensor, "1 t"] | None) -> list[int]:
    """Tokens of each sample of a packed row; empty for another row."""
    one = len(query) == 1 and key.shape[2] == query.shape[2]
    if positions is None or positions.dim() != 2 or not one:
        return []
    lengths: list[int] | None = getattr(positions, "_documents", None)
    if lengths is None:  # asked of the device once a forward pass, not in each layer
        starts = (positions[0] == 0).nonzero()[:, 0].tolist()
        bounds = [*starts, query.shape[2]] if starts[:1] == [0] else []
        lengths = [end - start for start, end in pairwise(bounds)]
        positions._documents = lengths  # type: ignore[attr-defined]
    return lengths
