"""What the pictures are worth to a VLM while it trains: no loss shows whether it looks at them."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from llm2clip_vlm.constants import IGNORE_INDEX

logger = logging.getLogger(__name__)

FAINT = 0.02
"""Nats a token; where other pictures cost less, the answers hardly depend on them."""
APART = 20
"""At least so many steps lie between two measurements, each of which costs two thirds of a step."""


class PictureGain(TrainerCallback):
    """Adds `picture_gain` to about twenty lines of the log: what other pictures would cost.

    It is the loss with the pictures of other samples, those half a micro-batch further on, minus
    the loss with the samples' own, in nats a token, on a step's micro-batches before they are
    learnt from. Both are computed with the same dropout, and training goes on as if they had not
    been. A micro-batch of one picture is left out, and AnyRes where pictures differ in size.

    Args:
        report: Called with one line at the end.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report, self._due, self._sum, self._tokens = report, False, 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out whether this step is measured: one that is logged."""
        logged = max(1, int(state.logging_steps))
        every = math.ceil(max(APART, state.max_steps // 20) / logged) * logged
        self._due, self._sum, self._tokens = (state.global_step + 1) % every == 0, 0.0, 0

    def see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Measure a micro-batch; under ZeRO-3 all processes compute, whatever theirs holds."""
        if not self._due:
            return
        model.train()  # as the step itself does, the first one of a resumed run too
        own, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        alike = (
            own is not None and len(own) > 1 and (sizes is None or bool((sizes == sizes[0]).all()))
        )
        pictures = {} if own is None else {"pixel_values": own.roll(len(own) // 2 * alike, 0)}
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        losses = []
        for given in (inputs, {**inputs, **pictures}):
            with torch.no_grad(), torch.random.fork_rng(devices):
                losses.append(float(model(**given, use_cache=False).loss))
        tokens = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum()) if alike else 0
        if tokens:
            self._sum += (losses[1] - losses[0]) * tokens
            self._tokens += tokens

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Complete the line, here and in the state, which a resumed run goes on from."""
        if "loss" in (logs or {}) and self._tokens:
            found = {"picture_gain": float(f"{self._sum / self._tokens:.4g}")}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what the second half of the measurements found; warn where it is next to nothing."""
        gains = [row["picture_gain"] for row in state.log_history if "picture_gain" in row]
        late = gains[len(gains) // 2 :]
        if len(late) < 3 or not state.is_world_process_zero:  # too few for a mean
            return
        mean, error = statistics.fmean(late), statistics.stdev(late) / math.sqrt(len(late))
        told = f"with other samples' pictures the loss is {mean:.3f} +- {error:.3f} nats a token"
        if mean > max(FAINT, 2 * error):
            self._report(f"pictures: {told} higher")
        else:
            logger.warning(
                "%s higher: it is not shown that the language model looks. Lower the learning rate "
                "of multi_modal_projector, or train on more captions; `other_pictures: true` in a "
                "suite says what that does to scores",
                told,
            )
