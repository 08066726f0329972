"""Resuming that loads every weight, or stops.

`transformers.Trainer` resumes (and loads the best model) with a raw, non-strict
`load_state_dict`. A model that is saved under other names than it has in memory (Llava: hub-style
names on disk) then resumes with *no* weight loaded and only a warning in the log.
"""

from __future__ import annotations

import functools
import logging
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from llm2clip_vlm.distributed import barrier, max_over_ranks, say
from llm2clip_vlm.models.trainable import frozen_modules, set_evaluation_mode
from llm2clip_vlm.training import checkpoints
from llm2clip_vlm.training.gradient_audit import GradientAudit
from llm2clip_vlm.training.step_guard import Watchdog

logger = logging.getLogger(__name__)


class LossError(ValueError):
    """A loss that is not finite."""


class StrictResumeMixin:
    """Put before `transformers.Trainer` in the bases of every trainer of this package.

    Checkpoints are written with in-memory names and sealed when all processes are done, and older
    ones removed only then. A checkpoint with other keys than the model is an error. Tied
    weights, which safetensors stores once, may be missing.
    """

    model: Any
    args: Any
    state: Any
    optimizer: torch.optim.Optimizer | None
    train_dataset: Any
    accelerator: Any
    audit: GradientAudit | None = None
    """Check of the first step's gradients. None: there is none, or it is over."""

    @functools.cached_property
    def _frozen(self) -> list[nn.Module]:
        return frozen_modules(self.model)

    @functools.cached_property
    def watchdog(self) -> Watchdog:
        """The one among the callbacks, or one that never barks."""
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, Watchdog)), Watchdog(None))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train under the watchdog.

        Raises:
            ConnectionError: Training failed, and another process is gone; it is named.
            ValueError: The processes have other numbers of samples, and so other orders of them.
        """
        samples = len(self.train_dataset)
        most, least = max_over_ranks(samples, -samples, device=self.args.device)
        if most != -least:
            raise ValueError(
                f"expected the same samples on all processes, got {-least} to {most}, {samples} on "
                f"{socket.gethostname()}: data or pictures are missing on a machine (dropped.jsonl "
                "names them); copy them, or name a folder that all machines share"
            )
        try:
            result: TrainOutput = super().train(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if missing := self.watchdog.missing():
                raise ConnectionError(
                    f"{missing}; start the whole job again, and it goes on from the last "
                    f"checkpoint ({str(error).splitlines()[0]})"
                ) from error
            raise
        finally:
            self.watchdog.stop()
        return result

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Groups of parameters for the optimizer. None: those of transformers."""
        return None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or `trainer.optim`) over :meth:`parameter_groups`."""
        target = self.model if model is None else model
        if self.optimizer is None and (groups := self.parameter_groups(target)) is not None:
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(self.args, target)
            # schedules count `min_lr` or `lr_end` by this rate: by a smaller one others would rise
            arguments["lr"] = max(group["lr"] for group in groups)
            self.optimizer = kind(groups, **arguments)
        return super().create_optimizer(model)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch.

        Raises:
            LossError: The loss is not finite (transformers leaves such losses out of its log).
            ValueError: Something that should train got no gradient in the first step.
        """
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise LossError(
                f"step {self.state.global_step + 1}: expected a finite loss, got {loss.item()}; "
                "lower the learning rate or look at the data of this step, and go on from the last "
                "checkpoint"
            )
        if self.audit is not None and self.accelerator.sync_gradients:
            self.audit = None if self.audit.check(self.args.device) else self.audit
        return loss

    def compute_loss_context_manager(self) -> Any:
        """Put what is frozen into evaluation mode; transformers calls it after `model.train()`."""
        if self.model.training:
            set_evaluation_mode(self._frozen)
            if self.args.neftune_noise_alpha:  # adds its noise where the embedding is in training
                self.model.get_input_embeddings().train()
        return super().compute_loss_context_manager()  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args, folder = self.args, Path(self.args.output_dir)
        step, limit = self.state.global_step, args.save_total_limit
        if args.should_save:
            checkpoints.make_room(folder, step)
        barrier()
        args.save_total_limit = None
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        args.save_total_limit = limit
        barrier()
        if args.should_save:
            whole = folder / f"checkpoint-{step}"
            self._complete_checkpoint(whole)
            pictures: list[Path] = getattr(self.train_dataset, "some_pictures", list)()
            checkpoints.seal_checkpoint(whole, len(self.train_dataset), pictures)
            checkpoints.rotate(folder, limit, self.state.best_model_checkpoint)

    def _complete_checkpoint(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint."""

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        if args[2]:  # what is resumed from
            checkpoints.refuse_other_samples(args[2], len(self.train_dataset))
        found: tuple[int, int] = super()._init_training_state(max_steps, *args)  # type: ignore[misc]
        self.state.compute_steps(self.args, max_steps)  # of the recipe, not of the checkpoint
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5.23 takes one step more when it resumes from the checkpoint of the last one
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save names as in memory: they load with `from_pretrained`, too, and adapters resume."""
        model = self.model
        if isinstance(model, PreTrainedModel):
            save = functools.partial(model.save_pretrained, save_original_format=False)
            model.save_pretrained = save  # type: ignore[method-assign]
        try:
            super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
        finally:
            model.__dict__.pop("save_pretrained", None)

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
    """The plain Trainer with a strict resume; what trains must get gradients."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Takes what `transformers.Trainer` takes."""
        self.audit = GradientAudit(model, None, say)
        super().__init__(model, *args, **kwargs)
