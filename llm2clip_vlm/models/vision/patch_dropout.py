"""Patch dropout: a training tower sees a random part of each image's patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm2clip_vlm.models.trainable import block_list, is_feature_map
from llm2clip_vlm.models.vision.timm_library import import_timm


class PatchDropout:
    """Drops patches between the embeddings and the first block of a tower, while it trains.

    Each image keeps its own random patches, with their positions; CLS and registers stay. In
    evaluation mode, and while `rate` is 0, nothing happens. Not part of what is saved.

    Args:
        tower: A vision tower (transformers' layout, EVA02 or timm).
        rate: Share of the patches that is dropped, at least 0 and below 1.
        num_prefix_tokens: Tokens before the patches, never dropped.

    Raises:
        ValueError: The tower has no encoder module.

    Paper: FLIP (2212.00794).
    """

    def __init__(self, tower: nn.Module, rate: float, num_prefix_tokens: int) -> None:
        self.tower, self.rate, self.num_prefix_tokens = tower, rate, num_prefix_tokens
        self._timm: Any = None
        inner: Any = getattr(tower, "timm_model", None)
        if inner is not None:
            layers = import_timm().layers
            if is_feature_map(tower):
                raise ValueError("patch_dropout: a CNN has no patches to drop; expected 0")
            rotary = inner.patch_drop is None  # timm then wants the numbers of the patches too
            kind = layers.PatchDropoutWithIndices if rotary else layers.PatchDropout
            inner.patch_drop = self._timm = kind(rate, num_prefix_tokens).train(tower.training)
            return
        blocks, _ = block_list(tower)
        target: nn.Module = tower.get_submodule(blocks)
        if type(target) in {nn.ModuleList, nn.Sequential}:
            # transformers calls the encoder around the list; EVA02 here calls the list itself
            target = tower.get_submodule(blocks.rpartition(".")[0])
        if target is tower:
            raise ValueError(
                f"{type(tower).__name__} has no encoder module between its embeddings and its "
                "blocks, so patches cannot be dropped; set patch_dropout to 0"
            )
        self._parameters = list(inspect.signature(target.forward).parameters)
        target.register_forward_pre_hook(self._drop, with_kwargs=True)

    def set_rate(self, rate: float) -> None:
        """Drop another share from now on.

        Args:
            rate: 0 switches it off.
        """
        self.rate = rate
        if self._timm is not None:
            self._timm.prob = rate

    def _drop(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.tower.training or not self.rate:
            return None
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        name = self._parameters[0]  # `inputs_embeds`, `hidden_states` or `x`
        tokens = given[name]
        kept = keep_patches(tokens, self.rate, self.num_prefix_tokens)
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        patches = torch.take_along_dim(patches, kept[..., None], dim=1)
        given[name] = torch.cat([prefix, patches], dim=1)
        rope = given.get("position_embeddings")
        if rope is not None:  # one table for all images becomes one for each, over the heads
            given["position_embeddings"] = tuple(table[kept][:, None] for table in rope)
        return (), given


def keep_patches(
    tokens: Float[Tensor, "b n d"], rate: float, num_prefix_tokens: int
) -> Int[Tensor, "b k"]:
    """Choose the patches of each image that stay, in their order; at least one.

    Args:
        tokens: Prefix tokens and patches.
        rate: Share that is dropped.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        Numbers of patches, counted from 0 after the prefix.
    """
    images, total = tokens.shape[0], tokens.shape[1] - num_prefix_tokens
    number = max(1, round(total * (1 - rate)))
    order = torch.rand(images, total, device=tokens.device).argsort(dim=1)
    return order[:, :number].sort(dim=1).values
