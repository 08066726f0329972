"""What the benchmarks share: arms that take turns, and the line that each program ends with."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PEERS = Path(__file__).parents[1] / ".venv" / "bench"


def use_peers(*modules: str) -> None:
    """Makes the programs that `make bench` installs importable, and imports `modules`.

    The wheel of torchvision expects CUDA's runtime; beside a torch without it, its compiled
    operators are missing and the import fails at their registration. Declared, they are absent
    but not missed: the transforms are Python.

    Raises:
        SystemExit: If one cannot be imported; the message names the command that installs it.
    """
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    if not torch.cuda.is_available() and "torchvision" not in sys.modules:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(
                f"{name} is missing ({error}); install the peers: make .venv/bench/.installed"
            ) from None


def take_turns(
    arms: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Runs `repeats` rounds of all arms in turn; warm them up before.

    Returns:
        Arm to `cpu` and `wall`, the seconds of each round. CPU time is that of this process and
        all its threads: on a shared machine it is the one to trust.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def ratio(
    seconds: Mapping[str, Mapping[str, list[float]]], ours: str, baseline: str, kind: str = "cpu"
) -> tuple[float, list[float]]:
    """Ratio of the medians, and the least and the largest ratio of one round."""
    rounds = [a / b for a, b in zip(seconds[ours][kind], seconds[baseline][kind], strict=True)]
    medians = [statistics.median(seconds[name][kind]) for name in (ours, baseline)]
    return round(medians[0] / medians[1], 4), [round(min(rounds), 4), round(max(rounds), 4)]


def finish(name: str, *, settings: Mapping[str, Any], **figures: Any) -> None:
    """Prints the last line: one JSON object."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"name": name, **figures, "settings": {**settings, **machine}}))
