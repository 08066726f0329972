"""A step that hangs or fails: its process, its samples, and its batch to try again with."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import TrainerCallback

from llm2clip_vlm import distributed
from llm2clip_vlm.files import written_whole

logger = logging.getLogger(__name__)

_RNG = "torch_rng_state"


class Watchdog(TrainerCallback):
    """Ends a process that stands still, says where it stood, and which other processes are gone.

    (A collective that one process never joins waits half an hour or, as LLaVA-NeXT sets it, a year,
    and then names no process.) Several processes tell each other every other second, through the
    launcher's store on rank 0's machine, that they live and what they do.
    """

    def __init__(self, timeout_s: float | None) -> None:
        """Args: timeout_s: Longest time between two beats. None: no end."""
        self.timeout_s = timeout_s
        self._interval_s = min(2.0, (timeout_s or 8.0) / 4)
        self._doing, self._since, self._signs = "", 0.0, 0
        self._ended = threading.Event()
        self._ended.set()

    def beat(self, doing: str) -> None:
        """Start to wait anew. Args: doing: What begins now, for the message."""
        self._doing, self._since = doing, time.monotonic()
        if self._ended.is_set():
            self._ended.clear()
            threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Wait no longer."""
        self._ended.set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step."""
        self.beat(f"step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a step; an evaluation, which has no beats, may take its time."""
        self.beat(f"what follows step {state.global_step}")
        if control.should_evaluate:
            self._since = math.inf

    def missing(self) -> str:
        """Name the processes that give no sign of life, which takes a few seconds.

        Empty: all do, or this process is alone.
        """
        if not self._together:
            return ""
        try:
            before = self._seen()
            for _ in range(3):
                time.sleep(self._interval_s)
                self._sign()
            pairs = enumerate(zip(before, self._seen(), strict=True))
        except RuntimeError:
            return f"rank 0, its launcher or its machine ({os.environ['MASTER_ADDR']}) is gone"
        silent = [
            f"rank {n} on {new[1]} is gone or stopped" for n, (old, new) in pairs if old == new
        ]
        return "; ".join(silent)

    @functools.cached_property
    def _together(self) -> bool:
        return distributed.world_size() > 1 and "MASTER_ADDR" in os.environ

    @functools.cached_property
    def _store(self) -> TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=10)
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)

    def _sign(self) -> None:
        self._signs += 1
        sign = f"{self._signs}\n{socket.gethostname()}, last seen in {self._doing},"
        self._store.set(f"llm2clip_vlm/{distributed.rank()}", sign)

    def _seen(self) -> list[list[str]]:
        keys = [f"llm2clip_vlm/{rank}" for rank in range(distributed.world_size())]
        known = [self._store.check([key]) for key in keys]  # it would wait for others
        signs = zip(keys, known, strict=True)
        return [
            (self._store.get(k).decode() if is_ else "\nno host").split("\n") for k, is_ in signs
        ]

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            with contextlib.suppress(RuntimeError):  # the store ends with rank 0's machine
                if self._together:
                    self._sign()
            if self.timeout_s is not None and time.monotonic() - self._since > self.timeout_s:
                self._bark(self._doing)
                return

    def _bark(self, doing: str) -> None:
        logger.critical(
            "rank %d of %d has stood still for %g s in %s; its threads follow, then it ends",
            distributed.rank(),
            distributed.world_size(),
            self.timeout_s,
            doing,
        )
        faulthandler.dump_traceback_later(30.0, exit=True)  # a lost machine may never answer
        if missing := self.missing():
            logger.critical("%s", missing)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback()
        os._exit(1)


def keep_batch(folder: str | Path, batch: Mapping[str, Any], **facts: Any) -> Path:
    """Keep a micro-batch on disk so that it can be run again.

    Args:
        folder: `batch.safetensors` (its tensors and the random state) and `batch.json` go there.
        batch: What the model was given.
        **facts: What else should be known, such as `reason`, `step`, `sample_ids`.

    Returns:
        The folder.
    """
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if torch.is_tensor(v)}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    with written_whole(target) as partial:
        partial.mkdir()
        save_file(tensors | {_RNG: torch.get_rng_state()}, partial / "batch.safetensors")
        text = json.dumps({**facts, "rank": distributed.rank(), "shapes": shapes}, indent=2)
        (partial / "batch.json").write_text(text + "\n")
    return target


def replay_batch(folder: str | Path, model: Any) -> float:
    """Run a kept batch forward and backward again.

    Args:
        folder: Folder that :func:`keep_batch` has made.
        model: Model from the checkpoint that `batch.json` names, on any device.

    Returns:
        The loss: mean over the trained tokens of this batch.
    """
    batch = load_file(str(Path(folder) / "batch.safetensors"))
    torch.set_rng_state(batch.pop(_RNG))
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    loss = model.train()(**moved, use_cache=False).loss
    loss.backward()
    return float(loss.detach())
