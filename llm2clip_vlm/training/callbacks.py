"""Trainer callbacks."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        partial.replace(self.path)
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
