"""A step that hangs or fails: its process, its samples, and its batch to try again with."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm2clip_vlm import distributed
from llm2clip_vlm.files import written_whole

logger = logging.getLogger(__name__)

_RNG = "torch_rng_state"


class Watchdog:
    """Ends a process that stands still, and says where it stood.

    (A collective that one process never joins waits half an hour or, as LLaVA-NeXT sets it, a year,
    and then names no process.)
    """

    def __init__(self, timeout_s: float | None) -> None:
        """Args: timeout_s: Longest time between two beats. None: never."""
        self.timeout_s = timeout_s
        self._timer: threading.Timer | None = None

    def beat(self, doing: str) -> None:
        """Start to wait anew. Args: doing: What begins now, for the message."""
        self.stop()
        if self.timeout_s is not None:
            self._timer = threading.Timer(self.timeout_s, self._bark, [doing])
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _bark(self, doing: str) -> None:
        logger.critical(
            "rank %d of %d has stood still for %g s in %s; its threads follow, then it ends",
            distributed.rank(),
            distributed.world_size(),
            self.timeout_s,
            doing,
        )
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
