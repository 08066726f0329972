"""What of the pictures reaches the language model, measured at the projector while it trains."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

FAINT = 0.2
"""A projector that keeps less than this part of the share it is given is warned of."""


class PictureShare:
    """Share of the energy of visual tokens by which pictures differ from one another.

    Of tokens `x[picture, token]` it is the variance over pictures of their mean token, by the mean
    of `|x|^2`: 0 where all pictures have the same tokens, 1 where nothing is common to them.
    """

    def __init__(self) -> None:
        self._count, self._energy, self._squares = 0, torch.zeros(()), torch.zeros(())
        self._sum = torch.zeros(())

    def add(self, tokens: Tensor) -> None:
        """Take a micro-batch's tokens `[pictures, tokens, dim]`; they stay on their device."""
        tokens = tokens.detach()
        means = tokens.mean(1, dtype=torch.float32)
        norms = torch.linalg.vector_norm(tokens, dim=(1, 2), dtype=torch.float32)
        self._energy = self._energy.to(norms.device) + norms.square().sum() / tokens.shape[1]
        self._squares = self._squares.to(norms.device) + means.square().sum()
        self._sum = self._sum.to(norms.device) + means.sum(0)
        self._count += len(tokens)

    def value(self) -> float | None:
        """The share, 0 to about 1. None: fewer than two pictures, or nothing but zeros."""
        if self._count < 2 or not (energy := float(self._energy)):
            return None
        between = float(self._squares) - float(self._sum.square().sum()) / self._count
        return max(between, 0.0) / (self._count - 1) * self._count / energy


class PictureSignal(TrainerCallback):
    """Adds to each line of the log what of the pictures passes the projector.

    `picture_share` is the :class:`PictureShare` of the tokens that the language model gets,
    `picture_share_tower` that of the features that the projector is given, both over the pictures
    (or crops) of this process in the last step. A projector whose tokens hardly differ is a
    constant prompt: the answers come from the question alone, and no loss shows it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: model: A LLaVA; its projector gets a hook that changes nothing."""
        self.watching = False
        """Whether the micro-batch has pictures of its own."""
        self._tower = self._projected = PictureShare()
        self._last: dict[str, float] = {}
        projector: Any = model.get_submodule("model.multi_modal_projector")
        projector.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.watching and module.training:
            self._tower.add(args[0])
            self._projected.add(output)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the step before, in which the projector was another one."""
        self._tower, self._projected = PictureShare(), PictureShare()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Complete a line that has a loss."""
        if "loss" not in (logs or {}):
            return
        given, kept = self._tower.value(), self._projected.value()
        if given is not None and kept is not None:
            found = {"picture_share": kept, "picture_share_tower": given}
            self._last = {name: float(f"{value:.4g}") for name, value in found.items()}
            logs.update(self._last)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn where the pictures got lost."""
        given, kept = (self._last.get(f"picture_share{of}", 1.0) for of in ("_tower", ""))
        if state.is_world_process_zero and kept < FAINT * given:
            logger.warning(
                "the image tokens hardly differ between pictures: %.1f %% of their energy, of the "
                "tower's features %.1f %%; the language model may not look. Lower the learning "
                "rate of multi_modal_projector, or train on more pictures, and evaluate with "
                "`other_pictures: true`",
                *(100 * kept, 100 * given),
            )
