"""Trainer callbacks."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm2clip_vlm.files import write_atomically, written_whole
from llm2clip_vlm.models.patch_dropout import PatchDropout


class MetricsJsonl(TrainerCallback):
    """Appends what the Trainer logs to a file, a JSON object a line.

    Each row holds `step`, `seconds` (training time, earlier parts of a resumed run included) and
    the logged values (`loss`, `learning_rate`, ...). A resumed run first drops the rows beyond the
    step it resumes from; a fresh run starts the file anew. A value that is not finite is written as
    null. Only the main process writes.
    """

    def __init__(self, path: str | Path) -> None:
        """Args: path: The file, such as `<output_dir>/metrics.jsonl`."""
        self.path = Path(path)
        self._started = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Cut the file back to the step that training starts from."""
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
        kept = rows if state.global_step > 0 else []
        write_atomically(self.path, "".join(_line(row) for row in kept))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a row."""
        if not state.is_world_process_zero or not logs:
            return
        seconds = round(time.monotonic() - self._started, 3)
        row = {"step": state.global_step, "seconds": seconds, **logs}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(row))


class PatchDropoutTail(TrainerCallback):
    """Lets the tower see whole images in the last steps, as it will afterwards."""

    def __init__(self, dropout: PatchDropout, share: float) -> None:
        """Args: dropout: Installed. share: Part of all steps, at the end, without dropout."""
        self.dropout, self.share, self.rate = dropout, share, dropout.rate

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the rate of the step that comes."""
        dropped_steps = state.max_steps - round(self.share * state.max_steps)
        self.dropout.set_rate(self.rate if state.global_step < dropped_steps else 0.0)


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average (EMA) of what trains, in fp32, on every process.

    The decay starts low, `(1 + step) / (10 + step)`, so that the first weights are soon forgotten.
    With each checkpoint `checkpoint-N` goes `average-N.safetensors` beside it, written first, so
    that a run resumes with the same average or not at all.

    Paper: Polyak averaging, as in DINO (2104.14294) and ProCLIP (2510.18795).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Args: model: Averaged from its state now. decay: Of a late step, such as 0.999."""
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move to the device; on a resumed run read the average of that step."""
        self.model.to(args.device)
        if state.global_step == 0:
            return
        path = self._path(args, state.global_step)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was written without this average. Resume with "
                "the recipe that wrote it, or delete the checkpoints and start again"
            )
        weights = load_file(path, device=str(args.device))
        for name, average, _ in self._pairs(kwargs["model"]):
            average.copy_(weights[name])

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Average, and write the average where a checkpoint is about to be written."""
        step = state.global_step
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for _, average, value in self._pairs(kwargs["model"]):
            average.lerp_(value.to(average), weight)
        if control.should_save:
            self._save(args, state, kwargs["model"])

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """As :meth:`on_step_end`, for checkpoints after an epoch."""
        if control.should_save:
            self._save(args, state, kwargs["model"])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a model the averages as its weights.

        Args:
            model: The one that was trained.
        """
        for _, average, value in self._pairs(model):
            value.copy_(average)

    def _pairs(self, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        averages = dict(self.model.named_parameters())
        return [(n, averages[n], p) for n, p in model.named_parameters() if p.requires_grad]

    def _path(self, args: TrainingArguments, step: int) -> Path:
        return Path(str(args.output_dir)) / f"average-{step}.safetensors"

    def _save(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        path = self._path(args, state.global_step)
        averages = {name: average.contiguous() for name, average, _ in self._pairs(model)}
        with written_whole(path) as partial:
            save_file(averages, partial)
        for other in path.parent.glob("average-*.safetensors"):
            step = other.stem.removeprefix("average-")
            if other != path and not (path.parent / f"checkpoint-{step}").is_dir():
                other.unlink()


def _line(row: dict[str, Any]) -> str:
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean, default=float, allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; none where there is no file.

    A last line that a killed process left unfinished is dropped.
    """
    source = Path(path)
    if not source.is_file():
        return []
    lines = source.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines):
                raise ValueError(f"{source}:{number} is not JSON; delete the file") from None
    return rows
