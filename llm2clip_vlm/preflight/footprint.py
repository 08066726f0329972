"""What a training step computes and holds, found by running it on tensors without content.

torch's fake tensors go through the model's own code, dropout, autocast, checkpointing and all, and
cost no memory; each operator's result is counted where its storage appears and where it goes.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm2clip_vlm.models.flops import flop_counter


@dataclass
class Footprint:
    """Cost of one pass, forward and backward."""

    flops: float
    forward_flops: float
    """Operations of the forward pass alone."""
    held: Counter[str] = field(default_factory=Counter)
    """Bytes at the peak by cause: `gradients`, `activations`, `logits`, `pictures`."""


class _Storages(TorchDispatchMode):
    """Counts bytes of storages that are alive, by what was running when they appeared."""

    def __init__(self, model: nn.Module, vocabulary: int, kept: float) -> None:
        super().__init__()
        self.part, self.vocabulary, self.kept = "activations", vocabulary, kept
        # torch's mode itself would hold every module's tensors, by its hooks
        self.flops, self._formulas = 0, flop_counter().flop_registry
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._causes: dict[int, str] = {}
        self._own = {_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            key = _key(tensor) if isinstance(tensor, Tensor) else 0
            if key and key not in self._own and key not in self._causes:
                logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                storage = tensor.untyped_storage()
                self._causes[key] = "logits" if logits else self.part
                self.now[self._causes[key]] += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        return out

    def _gone(self, key: int, size: int) -> None:
        cause = self._causes.pop(key)
        self.now[cause] -= round(size * self.kept) if cause == "gradients" else size

    def is_gradient(self, parameter: Tensor) -> None:
        """What autograd has just put into a parameter's `grad` is no activation any more."""
        assert parameter.grad is not None
        key, size = _key(parameter.grad), parameter.grad.untyped_storage().nbytes()
        if (cause := self._causes.get(key)) not in (None, "gradients"):
            self.now[cause] -= size
            self.now["gradients"] += round(size * self.kept)
            self._causes[key] = "gradients"


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class Work:
    """One pass of a process."""

    model: Any
    """Model, on the meta device until :meth:`fake`."""
    run: Callable[[], Tensor]
    """One forward pass, on fake tensors; gives a loss."""
    samples: float
    """Pairs, images or conversations of the pass."""
    tokens: float
    """Text and visual tokens of the pass."""
    tower: Any = None
    """What is held while it runs is the pictures'."""
    vocabulary: int = -1
    """Width of logits."""
    passes: float = 1
    """Number for each process in an optimizer step."""
    cached: bool = False
    """GradCache: each pass goes forward once more, without a graph."""
    beside_bytes: int = 0
    """Weights beside the model: a teacher's, averages."""
    trains: bool = True
    """False = no backward pass."""

    def fake(self) -> None:
        """Give the model fake weights. Call it in fake mode."""
        made: dict[int, Any] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, old in table.items():
                    if old is not None and id(old) not in made:
                        empty = torch.empty(old.shape, dtype=old.dtype)
                        own = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(empty, old.requires_grad) if own else empty
                    table[name] = made.get(id(old))


def footprint(
    work: Work, autocast: Callable[[], AbstractContextManager[Any]], kept: float
) -> Footprint:
    """Run a pass of fake tensors, once, and see what it takes.

    Args:
        work: Pass with `requires_grad` set, of fake tensors, on the CPU, in its fake mode.
        autocast: Settings around the forward pass.
        kept: Share of a gradient that stays here once it is there (ZeRO-2 and 3: 1/processes).
    """
    model = work.model
    seen = _Storages(model, work.vocabulary, kept)

    def within(part: str) -> Callable[..., None]:
        return lambda *_: setattr(seen, "part", part)

    if work.tower is not None:
        work.tower.register_forward_pre_hook(within("pictures"))
        work.tower.register_forward_hook(within("activations"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(seen.is_gradient)
    forward = 0
    with seen, torch.set_grad_enabled(work.trains):
        for _ in range(2 if work.passes > 1 else 1):  # the gradients of an earlier one are held
            seen.flops = 0
            with autocast():
                loss = work.run()
            forward = seen.flops
            if work.trains:
                loss.backward()
            del loss
            gc.collect()  # fake tensors in cycles live longer than real ones
    return Footprint(seen.flops, forward, seen.peak)
