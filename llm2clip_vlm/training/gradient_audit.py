"""Check of the first step's gradients: does what should train get any?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_vlm.distributed import max_over_ranks
from llm2clip_vlm.models.trainable import matching_prefix, part_name

_NONE, _ZERO, _SOME = range(3)


class GradientAudit:
    """Watches the first step, then compares and steps aside.

    Every trainable tensor must get a gradient, and every part that trains some that is not zero.
    (LLaVA ran its tower under `no_grad`: unfreezing it did nothing, in silence.)
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Collection[str] | None,
        report: Callable[[str], None],
        *,
        waits_for_pictures: bool = False,
    ) -> None:
        """Starts to watch.

        Args:
            model: Model with `requires_grad` set.
            parts: What should train, as in the recipe. None: the parts that :func:`trainable_table`
                shows to train.
            report: Takes the table.
            waits_for_pictures: Wait for a step that has pictures and trained tokens (:meth:`see`).
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parts = parts or {part_name(name).split(".")[0] for name in trained}
        self._report = report
        self._reached = dict.fromkeys(trained, _NONE)
        self._hooks = [p.register_hook(partial(self._note, name)) for name, p in trained.items()]
        text_alone = set(self._parts) == {"language_model"}
        self._complete = [int(text_alone), 0] if waits_for_pictures else [1]

    def _note(self, name: str, gradient: Tensor | None) -> None:
        # DDP waits for every parameter: one that a chunk's loss does not reach comes without any.
        if gradient is not None and self._reached[name] != _SOME:
            self._reached[name] = _SOME if bool(gradient.any()) else _ZERO

    def see(self, inputs: dict[str, Any]) -> None:
        """Note what a micro-batch has in it."""
        seen = ("pixel_values" in inputs, bool((inputs["labels"][..., 1:] >= 0).any()))
        self._complete = [max(a, int(b)) for a, b in zip(self._complete, seen, strict=True)]

    def check(self, device: torch.device) -> bool:
        """Compare after a step; call it on all processes.

        Args:
            device: Where the process group's backend wants its tensors.

        Returns:
            True when the audit is over; false if no process has seen a picture yet.

        Raises:
            ValueError: A part or a tensor that should train got no gradient.
        """
        if not all(max_over_ranks(*self._complete, device=device)):
            return False
        values = max_over_ranks(*self._reached.values(), device=device)
        for hook in self._hooks:
            hook.remove()
        reached = dict(zip(self._reached, values, strict=True))
        total, some = Counter[str](), Counter[str]()
        for name, value in reached.items():
            part = matching_prefix(name, self._parts) or "(no part of the map)"
            total[part] += 1
            some[part] += value == _SOME
        table = "\n".join(f"  {part}: {some[part]} of {total[part]} tensors" for part in total)
        adapted = any("lora_A" in name for name in reached)
        note = " (an adapter's A gets some once B is no longer zero)" if adapted else ""
        self._report(f"gradients other than zero in the first step{note}:\n{table}")
        still = [part for part in self._parts if not some[part]]
        missing = [name for name, value in reached.items() if value == _NONE]
        if still or missing or len(total) > len(set(self._parts)):
            raise ValueError(
                f"expected gradients in {sorted(self._parts)} and nowhere else, got\n"
                f"{table}\nparts without any: {still}, tensors that the loss does not reach: "
                f"{missing[:3]}. Something between them and the loss is cut off or frozen."
            )
        return True
