"""The training loss of a VLM, with logits only where a token is trained."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from llm2clip_vlm.constants import IGNORE_INDEX

SMALL_VOCABULARY = 1024
"""Words up to which transformers' own loss stays: logits are no wider than other states then."""

CHUNK_LOGITS = 2**25
"""Logits that exist at once (128 MiB in fp32)."""


def install_supervised_loss(model: Any) -> None:
    """Let a model compute its training loss from the trained positions alone.

    Most positions are visual tokens or questions: their logits are never looked at, and at 128k
    words they are the largest tensor of a step. The value and the gradients are those of
    transformers' loss up to rounding. A training call returns the loss and no logits.

    Args:
        model: A LLaVA; left alone if its vocabulary is small. A second call changes nothing.

    Paper: Chunks with recomputation as in Cut Your Losses (2411.09009), without its kernel.
    """
    if model.lm_head.out_features <= SMALL_VOCABULARY:
        return
    model.lm_head.forward = MethodType(_head_forward, model.lm_head)
    model.forward = MethodType(_forward, model)


def _forward(
    self: Any,
    *,
    labels: Int[Tensor, "b t"] | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> Any:
    if labels is None or not self.training:
        return type(self).forward(
            self, labels=labels, num_items_in_batch=num_items_in_batch, **inputs
        )
    hidden = self.model(**inputs).last_hidden_state
    trained = labels[:, 1:] != IGNORE_INDEX
    total = self.lm_head(hidden[:, :-1][trained], labels[:, 1:][trained])
    count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=total / count)


def _head_forward(
    self: Any, hidden: Float[Tensor, "... d"], targets: Int[Tensor, " n"] | None = None
) -> Tensor:
    """Logits; with targets the sum of the losses, in one call however many chunks there are.

    (ZeRO-3 gathers the weight once a call, and all processes must call equally often.)
    """
    if targets is None:
        return type(self).forward(self, hidden)

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(type(self).forward(self, rows).float(), wanted, reduction="sum")

    size = max(1, CHUNK_LOGITS // self.out_features)
    if len(hidden) <= size:
        return loss(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    saving: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(loss, *piece, **saving) for piece in pieces]).sum()
