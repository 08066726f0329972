"""Resuming that loads every weight, or stops.

`transformers.Trainer` resumes (and loads the best model) with a raw, non-strict
`load_state_dict`. A model that is saved under other names than it has in memory (Llava: hub-style
names on disk) then resumes with *no* weight loaded and only a warning in the log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from llm2clip_vlm.distributed import barrier
from llm2clip_vlm.training.checkpoints import remove_unfinished, seal_checkpoint

logger = logging.getLogger(__name__)


@contextmanager
def in_memory_names(model: Any) -> Iterator[None]:
    """Make `model.save_pretrained` write the names that the model has in memory.

    Both kinds of names load with `from_pretrained`; only these load with `load_state_dict`.

    Args:
        model: Any model; nothing changes unless it is a `PreTrainedModel` (PEFT saves adapters
            in its own way, which resumes correctly).
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    had_own = "save_pretrained" in model.__dict__
    before = model.save_pretrained
    model.save_pretrained = functools.partial(before, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had_own:
            model.save_pretrained = before  # type: ignore[method-assign]
        else:
            del model.__dict__["save_pretrained"]


class StrictResumeMixin:
    """Put before `transformers.Trainer` in the bases of every trainer of this package.

    Checkpoints are written with in-memory names and sealed when all processes are done, and a
    checkpoint whose keys do not match the model's is an error. Tied weights, which safetensors
    stores once, may be missing.
    """

    model: Any
    args: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self.args.should_save:
            remove_unfinished(self.args.output_dir, step)
        barrier()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        barrier()
        if self.args.should_save:
            seal_checkpoint(Path(self.args.output_dir) / f"checkpoint-{step}")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5.23 takes one step more when it resumes from the checkpoint of the last one
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with in_memory_names(self.model):
            super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that did not load completely.

        Args:
            load_result: What `load_state_dict(strict=False)` returned.

        Raises:
            RuntimeError: A key is missing (other than a tied weight) or unexpected.
        """
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        missing = [key for key in load_result.missing_keys if key not in tied]
        unexpected = list(load_result.unexpected_keys)
        if missing or unexpected:
            raise RuntimeError(
                f"the checkpoint does not fit {type(self.model).__name__}: {len(missing)} missing "
                f"keys (first: {missing[:3]}), {len(unexpected)} unexpected keys (first: "
                f"{unexpected[:3]}). Resuming would continue from untrained weights. Delete the "
                "checkpoint or resume with the model that wrote it."
            )
        if load_result.missing_keys:
            logger.debug("tied weights restored by tying: %s", load_result.missing_keys)
            self.model.tie_weights()


class StrictTrainer(StrictResumeMixin, Trainer):
    """The plain Trainer otherwise."""
