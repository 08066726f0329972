"""Trainer callbacks."""

from __future__ import annotations

import copy
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llm2clip_vlm.constants import STOPPED
from llm2clip_vlm.distributed import max_over_ranks, say, teardown
from llm2clip_vlm.files import read_text, write_atomically
from llm2clip_vlm.models.vision.patch_dropout import PatchDropout

_PEAK_FLOPS = {
    **{"B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12},
    **{"A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}
"""Dense bf16 FLOP/s by a part of the device's name, from data sheets."""
_AVERAGE_NAME = "average.safetensors"


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the file back to the step that training starts from."""
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
        kept = rows if state.global_step > 0 else []
        write_atomically(self.path, "".join(_line(row) for row in kept))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append a row."""
        if not state.is_world_process_zero or not logs:
            return
        seconds = round(time.monotonic() - self._started, 3)
        row = {"step": state.global_step, "seconds": seconds, **logs}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(row))


class Throughput(TrainerCallback):
    """Adds to each line of the log what training has achieved since the line before.

    `<unit>_per_s` over all processes, `tflops` of each (what is computed a second time counts
    once), `mfu`, their share of what the GPU can do in bf16 where its kind is known, `fill`, the
    share of the room that was not padding, and `data_wait`, the share of the time in which training
    waited for its batches. Time spent on evaluation and on checkpoints is left out. Comes before
    :class:`MetricsJsonl`.
    """

    def __init__(self, unit: str) -> None:
        """Args: unit: What is counted, such as `images`."""
        self.unit = unit
        self._units: Tensor | float = 0
        self._flops: Tensor | float = 0
        self._room = 0
        self._waited = self._since = self._idle = 0.0

    def add(self, units: Tensor | float, flops: Tensor | float = 0, room: int = 0) -> None:
        """Count what this process trains on; tensors stay on their device until a line is written.

        Args:
            units: Number of units, such as the images of a batch.
            flops: FLOPs forward and backward.
            room: Number of units that there was room for; 0 = as many.
        """
        self._units = self._units + units
        self._flops = self._flops + flops
        self._room += room

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = self._idle = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time that the step has waited for its batch."""
        self._waited += time.perf_counter() - self._idle

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the time of waiting; evaluation and saving are taken out of it again."""
        self._idle = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out what has been done since the step."""
        now = time.perf_counter()
        self._since, self._idle = self._since + now - self._idle, now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Complete a line that has a loss; a line without one ends an evaluation."""
        if "loss" not in (logs or {}):
            self.on_save(args, state, control)
            return
        units, flops = float(self._units), float(self._flops)
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        logs[f"{self.unit}_per_s"] = round(units * args.world_size / seconds, 1)
        if flops:
            logs["tflops"] = float(f"{flops / seconds / 1e12:.4g}")
            if peak := peak_flops():
                logs["mfu"] = round(flops / seconds / peak, 4)
        if self._room:
            logs["fill"] = units / self._room
        logs["data_wait"] = round(self._waited / seconds, 4)
        self._units = self._flops = self._room = 0
        self._waited = 0.0
        self._since = self._idle = now


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this process's GPU, by its data sheet. None: they are not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for kind, flops in _PEAK_FLOPS.items() if kind in name), None)


class EachEpoch(TrainerCallback):
    """Sets the epoch of data sets as it begins. The Trainer does so in a single process only."""

    def __init__(self, *things: Any) -> None:
        """Args: things: Objects with `set_epoch`."""
        self.things = things

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, counted from 0."""
        # state.epoch is a whole number here, or lies inside the epoch that a resume goes on with
        for thing in self.things:
            thing.set_epoch(int((state.epoch or 0.0) + 1e-6))


class GracefulStop(TrainerCallback):
    """Saves a checkpoint and ends the program, exit code 0, when SIGTERM comes during training.

    SLURM, Kubernetes and systemd send it some time before they kill. The processes agree after each
    step, so one of them is enough to stop all at the same step. Comes before callbacks that prepare
    for a checkpoint when a step ends.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        """Args: leave: Called before the program ends."""
        self._leave = leave
        self._asked = self._stopping = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signal over, unless the program that runs this training has done so itself."""
        free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if free and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        loader = kwargs.get("train_dataloader")
        loader = getattr(loader, "base_dataloader", loader)  # accelerate's is around it
        if loader is not None:
            seed = loader.worker_init_fn
            loader.worker_init_fn = functools.partial(_outlive_one_signal, seed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signal back: what follows the training is done anew when it is killed."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask all processes, and have the step's checkpoint written without an evaluation."""
        (stopping,) = max_over_ranks(int(self._asked), device=args.device)
        if stopping:
            self._stopping = control.should_save = control.should_log = True
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the program once the checkpoint is whole."""
        if self._stopping:
            say(f"{STOPPED}: step {state.global_step} is saved, the same command goes on")
            self._leave()
            teardown()
            raise SystemExit(0)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True


def _outlive_one_signal(then: Callable[[int], None] | None, worker: int) -> None:
    """Let a loader's worker live through a SIGTERM that goes to a whole process group."""
    default = signal.SIG_DFL
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, default) and None)
    if then is not None:
        then(worker)


class PatchDropoutTail(TrainerCallback):
    """Lets the tower see whole images in the last steps, as it will afterwards."""

    def __init__(self, dropout: PatchDropout, share: float) -> None:
        """Args: dropout: Installed. share: Part of all steps, at the end, without dropout."""
        self.dropout, self.share, self.rate = dropout, share, dropout.rate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rate of the step that comes."""
        dropped_steps = state.max_steps - round(self.share * state.max_steps)
        self.dropout.set_rate(self.rate if state.global_step < dropped_steps else 0.0)


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average (EMA) of what trains, in fp32, on every process.

    The decay starts low, `(1 + step) / (10 + step)`, so that the first weights are soon forgotten.
    Each checkpoint holds the average as `average.safetensors`; the trainer calls :meth:`save`.

    Paper: Polyak averaging, as in DINO (2104.14294) and ProCLIP (2510.18795).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Args: model: Averaged from its state now. decay: Decay of a late step, such as 0.999."""
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move to the device; on a resumed run read the average of that step."""
        self.model.to(args.device)
        if state.global_step == 0:
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _AVERAGE_NAME
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was written without this average. Resume with "
                "the recipe that wrote it, or delete the checkpoints and start again"
            )
        weights = load_file(path)
        for name, average, _ in self._pairs(kwargs["model"]):
            average.copy_(weights[name])

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's weights into the average."""
        step = state.global_step
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for _, average, value in self._pairs(kwargs["model"]):
            average.lerp_(value.to(average), weight)

    def save(self, checkpoint: Path, model: nn.Module) -> None:
        """Write the average.

        Args:
            checkpoint: Folder of the checkpoint.
            model: The model that trains.
        """
        averages = {name: average.contiguous() for name, average, _ in self._pairs(model)}
        save_file(averages, checkpoint / _AVERAGE_NAME)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a model the averages as its weights.

        Args:
            model: The model that was trained.
        """
        for _, average, value in self._pairs(model):
            value.copy_(average)

    def _pairs(self, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        averages = dict(self.model.named_parameters())
        return [(n, averages[n], p) for n, p in model.named_parameters() if p.requires_grad]


def _line(row: dict[str, Any]) -> str:
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean, default=float, allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; empty where there is no file.

    A last line that a killed process left unfinished is dropped.
    """
    source = Path(path)
    if not source.is_file():
        return []
    lines = read_text(source, limit_bytes=2**30).splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError):
            if number != len(lines):
                raise ValueError(f"{source}:{number} is not JSON; delete the file") from None
    return rows


def read_losses(path: str | Path) -> list[tuple[int, float]]:
    """Steps and losses of a metrics file, without those that were not finite."""
    logged = [(row["step"], row.get("loss")) for row in read_metrics(path)]
    return [(step, loss) for step, loss in logged if loss is not None and math.isfinite(loss)]
