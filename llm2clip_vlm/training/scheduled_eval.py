"""Measuring during training, on a schedule, with a function that the stage passes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm2clip_vlm.training.callbacks import MetricsJsonl


class ScheduledEvaluation(TrainerCallback):
    """Adds a row to the metrics every so many steps.

    The main process measures while the others wait at their next collective call. The random
    numbers of training are not touched as long as the function draws none.

    Args:
        every_steps: Optimizer steps between two measurements.
        measure: Returns the metrics of the model as it stands.
        metrics: Where they go.
    """

    def __init__(
        self, every_steps: int, measure: Callable[[], Mapping[str, Any]], metrics: MetricsJsonl
    ) -> None:
        self.every_steps = every_steps
        self.measure = measure
        self.metrics = metrics

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measures if it is time."""
        if state.is_world_process_zero and state.global_step % self.every_steps == 0:
            self.metrics.on_log(args, state, control, logs=dict(self.measure()))
