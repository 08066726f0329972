"""LLM2CLIP's own checkpoints: training files and the releases in Hugging Face layout.

A training file has `visual.*`, `text.text_adaptor.*` and `logit_scale`. The releases of the OpenAI
towers have `vision_model.*`, `visual_projection.weight` and the same adaptor below `text_adapter.`;
the name of the Sequential inside of it was not readable here, so the adaptor is found by its form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.keys import Row, row

_FIRST_BLOCK = re.compile(r"((?:.+\.)?text_adapt[eo]r\.(?:.+\.)?)0\.fn\.0\.weight")

LEFT_OUT = (
    # CLIP's own text tower under three namings, and what is computed
    r"(transformer|token_embedding|positional_embedding|text_projection|ln_final|attn_mask"
    r"|text\.(?!.*text_adapt)|text_model\.|.*\.rope\.|.*\.position_ids$|.*\.k_bias$).*"
)
"""Weights of a CLIP that have no place in an `LLM2CLIPModel`."""

LEFT_OUT_OF_A_TOWER = LEFT_OUT + r"|visual_projection\..*|logit_(scale|bias)"
"""Those of `LEFT_OUT`, and those that have no place in a tower alone."""


def adaptor_prefix(names: Iterable[str]) -> str | None:
    """What stands before the adaptor's numbered parts (`text.text_adaptor.`). None: no adaptor."""
    found = (_FIRST_BLOCK.fullmatch(name) for name in names)
    return next((match[1] for match in found if match), None)


def adaptor_table(prefix: str, num_blocks: int) -> tuple[Row, ...]:
    """The text adaptor: blocks, LayerNorm and linear head, numbered on.

    Args:
        prefix: See :func:`adaptor_prefix`.
        num_blocks: Residual blocks.

    Paper: LLM2CLIP v6 section 3.2; code `llm2clip/eva_clip/model.py:217-253`.
    """
    ours = "text_adaptor.blocks.{n}."
    return (
        row(prefix + "{n}.fn.0.{p}", ours + "fc1.{p}"),
        row(prefix + "{n}.fn.3.{p}", ours + "fc2.{p}"),
        row(prefix + "{n}.ln.{p}", ours + "norm.{p}"),
        row(f"{prefix}{num_blocks}.{{p}}", "text_adaptor.norm.{p}"),
        row(f"{prefix}{num_blocks + 1}.{{p}}", "text_adaptor.head.{p}"),
        row("logit_scale", "logit_scale"),
        row("logit_bias", "logit_bias"),
    )


def adaptor_sizes(weights: Mapping[str, Tensor], prefix: str, where: str) -> dict[str, Any]:
    """`LLM2CLIPConfig`'s fields as the adaptor's weights have them; `where` is for the message."""
    num_blocks = sum(name.startswith(prefix) and name.endswith(".fn.0.weight") for name in weights)
    head = f"{prefix}{num_blocks + 1}.weight"
    if head not in weights:
        raise ModelError(f"{where}: {head} is missing; is the file complete?")
    hidden, width = weights[prefix + "0.fn.0.weight"].shape
    return {
        "text_embed_dim": width,
        "projection_dim": len(weights[head]),
        "adaptor_num_blocks": num_blocks,
        "adaptor_expansion": hidden // width,
    }


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower below `visual.`, whoever wrote the file.

    open_clip puts timm's models below `visual.trunk.` (with a projection as `visual.head.proj.`),
    Hugging Face below `vision_model.` beside `visual_projection.`; a file of a tower alone has no
    prefix.
    """
    renamed = {}
    alone = not any(name.startswith(("visual.", "vision_model.")) for name in weights)
    for name, tensor in weights.items():
        new = re.sub(r"^(visual\.trunk|vision_model|trunk)\.", "visual.", name)
        new = re.sub(r"^(visual\.head\.proj|head\.proj|visual_projection)\.", "visual.head.", new)
        if alone and not new.startswith(("visual.", "text", "logit_")):
            new = "visual." + new
        renamed[new] = tensor
    return renamed
