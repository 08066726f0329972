"""What the log says of speed, by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip_vlm.training import callbacks
from llm2clip_vlm.training.callbacks import (
    EachEpoch,
    MetricsJsonl,
    Throughput,
    peak_flops,
    read_metrics,
)


class Clock:
    """Stands still until it is told to go on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(callbacks.time, "perf_counter", made)
    return made


def step(speed: Throughput, clock: Clock, wait_s: float, work_s: float) -> None:
    clock.now += wait_s
    speed.on_step_begin(None, None, None)
    speed.add(8, flops=3e12)
    clock.now += work_s
    speed.on_step_end(None, None, None)


def test_throughput_between_two_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "peak_flops", lambda: 6e12)
    speed, args = Throughput("images"), SimpleNamespace(world_size=2)

    def line() -> dict[str, Any]:
        logs: dict[str, Any] = {"loss": 1.0}
        speed.on_log(args, None, None, logs=logs)
        return logs

    speed.on_train_begin(None, None, None)
    step(speed, clock, 1.0, 3.0)
    step(speed, clock, 0.0, 4.0)
    first = line()
    assert first == {
        "loss": 1.0,
        "images_per_s": 4.0,  # 16 in 8 s, in each of two processes
        "tflops": 0.75,
        "mfu": 0.125,
        "data_wait": 0.125,
    }
    clock.now += 50.0
    evaluation = {"eval_r1": 3.0}
    speed.on_log(args, None, None, logs=evaluation)  # what an evaluation took is left out
    assert evaluation == {"eval_r1": 3.0}
    clock.now += 30.0
    speed.on_save(None, None, None)  # so is a checkpoint
    step(speed, clock, 1.0, 1.0)
    again = line()
    assert again["images_per_s"] == 8.0
    assert again["data_wait"] == 0.5


def test_the_peak_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, flops in {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "Other": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops() == flops


def test_each_epoch_reaches_all() -> None:
    seen: list[tuple[str, int]] = []
    things = [SimpleNamespace(set_epoch=lambda e, n=n: seen.append((n, e))) for n in "ab"]
    callback = EachEpoch(*things)
    for epoch in (None, 1.0, 2.9999999):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert seen == [(n, e) for e in (0, 1, 3) for n in "ab"]


def test_a_resumed_log_goes_on_where_the_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    path = tmp_path / "metrics.jsonl"
    log = MetricsJsonl(path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    log.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        now[0] += 10.0
        state.global_step = step
        log.on_log(None, state, None, logs={"loss": float(step)})
    state.global_step, now[0] = 2, 1000.0
    again = MetricsJsonl(path)
    again.on_train_begin(None, state, None)
    now[0] += 1.5
    state.global_step = 3
    again.on_log(None, state, None, logs={"loss": float("nan")})
    rows = read_metrics(path)
    assert [(row["step"], row["seconds"]) for row in rows] == [(1, 10.0), (2, 20.0), (3, 21.5)]
    assert rows[2]["loss"] is None
