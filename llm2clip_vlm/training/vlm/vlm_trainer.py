"""The Trainer of stages 3 and 4."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import TrainOutput

from llm2clip_vlm import distributed
from llm2clip_vlm.data.conversation.packing import PackedBatches
from llm2clip_vlm.files import read_json
from llm2clip_vlm.models.equal import vlm_outputs
from llm2clip_vlm.models.vlm.building import load_vlm, save_vlm
from llm2clip_vlm.models.vlm.document_attention import install_document_attention
from llm2clip_vlm.models.vlm.lineage import write_lineage
from llm2clip_vlm.models.vlm.vlm_gradients import install_text_only_guard
from llm2clip_vlm.models.vlm.vlm_loss import install_supervised_loss
from llm2clip_vlm.recipe.vlm import PartTraining
from llm2clip_vlm.runs.manifest import RESOLVED_NAME, HandoffError, fingerprint_dir
from llm2clip_vlm.training.adapters import (
    Rounding,
    is_adapted,
    load_adapter,
    merged_state,
    save_adapter,
    unquantized_state,
)
from llm2clip_vlm.training.callbacks import Throughput
from llm2clip_vlm.training.gradient_audit import GradientAudit
from llm2clip_vlm.training.param_groups import build_param_groups
from llm2clip_vlm.training.step_guard import keep_batch
from llm2clip_vlm.training.strict_resume import LossError, StrictResumeMixin
from llm2clip_vlm.training.vlm.picture_gain import PictureGain
from llm2clip_vlm.training.vlm.vlm_flops import VlmFlops

logger = logging.getLogger(__name__)

PACKING_NAME = "packing.json"
"""File of a checkpoint: false, or how many samples at a time were dealt to packed steps."""


class VlmTrainer(StrictResumeMixin, Trainer):
    """`transformers.Trainer` for a LLaVA: a learning rate per part, exact token mean, packing.

    The loss is the mean over all trained tokens of the global batch (`num_items_in_batch`, summed
    over accumulation and processes), so n processes compute the gradient of one. A batch that
    fails (loss not finite, no memory left) is kept in `failures/` beside `checkpoints/`.

    Args:
        model: A `LlavaForConditionalGeneration` with `requires_grad` set.
        args: Training arguments; `train_sampling_strategy: group_by_length` puts samples of
            similar length into a global batch.
        train_dataset: Data set with `lengths`.
        data_collator: Collator of the data set.
        processor: Saved with each checkpoint.
        batches: The plan of packed micro-batches. None: samples as they are sampled.
        parts: What trains, and how.
        checkpoint: Directory or hub id that the model was loaded from; adapters keep its
            fingerprint.
        dtype: Dtype of the exported weights. None: those in memory.
        report: Takes the table of the first step's gradients.
        callbacks: More callbacks.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any,
        data_collator: Callable[[Any], dict[str, Tensor]],
        processor: Any,
        *,
        batches: PackedBatches | None = None,
        parts: Mapping[str, PartTraining],
        checkpoint: str | Path = "",
        dtype: torch.dtype | None = None,
        report: Callable[[str], None] = logger.info,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        install_text_only_guard(model)
        install_supervised_loss(model)
        if batches is not None:
            install_document_attention(model)
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True  # transformers' mark: there are adapters on it
        self.parts, self.processor, self.checkpoint = dict(parts), processor, checkpoint
        self.saves_parts = is_adapted(model) or getattr(model, "is_quantized", False)
        hashed = self.saves_parts and Path(checkpoint).is_dir()
        self.base = fingerprint_dir(checkpoint) if hashed else str(checkpoint)
        self.batches, self.dtype, self.rounding = batches, dtype, Rounding()
        self.throughput = Throughput("tokens")
        self.flops, self.gain = VlmFlops(model), PictureGain(report)
        self.audit = GradientAudit(model, list(parts), report, waits_for_pictures=True)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=processor,
            callbacks=[self.throughput, self.gain, *(callbacks or [])],
        )

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups with the recipe's learning rates and weight decays."""
        usual, parts = self.args.weight_decay, self.parts.items()
        decays = {n: usual if part.weight_decay is None else part.weight_decay for n, part in parts}
        return build_param_groups(model, {name: part.lr for name, part in parts}, decays)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch, watched and counted.

        Raises:
            LossError: The loss is not finite.
            ValueError: A part that should train gets no gradient in the first step.
        """
        ids = inputs.pop("sample_ids", [])
        step = self.state.global_step + 1
        self.watchdog.beat(f"step {step}, samples {ids}")
        packed = None if self.batches is None else self.batches.max_tokens
        self.throughput.add(*self.flops(inputs), room=packed or inputs["input_ids"].numel())
        if self.audit is not None:
            self.audit.see(inputs)
        try:
            with self.compute_loss_context_manager():
                self.gain.see(model, self._prepare_inputs(dict(inputs)))
            return super().training_step(model, dict(inputs), num_items_in_batch)
        except torch.OutOfMemoryError:
            self._keep(inputs, step, ids, "out of memory", num_items_in_batch)
            raise
        except LossError as error:
            kept = self._keep(inputs, step, ids, "loss not finite", num_items_in_batch)
            raise LossError(f"{error}; samples {ids}, the batch is kept in {kept}") from None

    def _keep(
        self, inputs: dict[str, Any], step: int, ids: list[str], reason: str, items: Any
    ) -> Path:
        checkpoints = Path(str(self.args.output_dir))
        return keep_batch(
            checkpoints.parent / "failures" / f"step-{step}-rank-{distributed.rank()}",
            inputs,
            step=step,
            sample_ids=ids,
            reason=reason,
            num_items_in_batch=None if items is None else int(items),
            weights=f"the newest of {checkpoints}, else {self.base}",
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Token mean of the loss; the cache is off, without which packed samples would leak."""
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # nothing trained: loss 0
        return super().compute_loss(
            model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch
        )

    def get_train_dataloader(self) -> Any:
        """Load micro-batches, which are planned for all processes."""
        workers = self.args.dataloader_num_workers
        dataset: Any = self.train_dataset
        loader = DataLoader(
            dataset,
            batch_sampler=self.batches or PaddedBatches(dataset, self.args),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        folder, order = args[2], self._order()  # the one that is resumed from
        note = Path(folder or "") / PACKING_NAME
        noted = read_json(note, object) if folder and note.is_file() else order
        if noted != order and not (noted is True and order):  # true: noted by an earlier version
            raise HandoffError(
                f"{folder} was trained {'packed' if noted else 'padded'}, now the samples "
                "would come in another order; go on with the packages, the kind of machine and the "
                "number of processes that it began with, or choose another output_dir"
            )
        epoch, done = super()._init_training_state(max_steps, *args)
        if self.batches is not None:
            self.batches.resume(epoch, done)
        return epoch, done

    def _order(self) -> int | bool:
        """What the order of the samples depends on beside the recipe."""
        return False if self.batches is None else self.batches.dealt

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save a checkpoint that opens by itself: adapters merged, and kept beside to resume."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        state = self.model.state_dict() if state_dict is None else state_dict
        if self.saves_parts:
            save_adapter(self.model, state, folder, self.base)
            self._save_merged(folder, state)
        else:
            super()._save(output_dir, state_dict)
            write_lineage(folder, self.model, self.processor, state)
        (folder / PACKING_NAME).write_text(json.dumps(self._order()))
        recipe = Path(str(self.args.output_dir)).parent / RESOLVED_NAME
        if recipe.is_file():
            shutil.copy(recipe, folder)

    def _save_merged(
        self, directory: str | Path, state: Mapping[str, Tensor], outputs: Any = None
    ) -> None:
        """Merge adapters into the weights; a 4-bit base is read again unquantised."""
        model = self.model
        if getattr(model, "is_quantized", False):
            model = load_vlm(self.checkpoint, dtype=model.lm_head.weight.dtype)[0]
            state = unquantized_state(self.model, state, model.state_dict())
        self.rounding = Rounding()
        merged = merged_state(self.model, state, self.dtype, self.rounding)
        save_vlm(model, self.processor, directory, state_dict=merged, outputs=outputs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.saves_parts:
            load_adapter(self.model, resume_from_checkpoint, self.base)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def export(self, directory: str | Path) -> None:
        """Writes the model as `from_pretrained` reads it, adapters merged. Call on all ranks.

        Args:
            directory: Where to; made if absent. Adapters also go to `adapter/` beside it.

        Raises:
            ModelError: Loaded again it computes something else than the model that was trained.
        """
        # Not of the wrapper that `torch_compile` makes, which would name all weights otherwise.
        whole = self.model_wrapped if self.is_deepspeed_enabled else self.model
        state: dict[str, Tensor] = self.accelerator.get_state_dict(whole)
        if distributed.is_main():
            self._save_merged(directory, state, self._outputs())
            if is_adapted(self.model):
                save_adapter(self.model, state, Path(directory).parent / "adapter", self.base)
        distributed.barrier()

    def _outputs(self) -> Tensor | None:
        """Outputs that the export must give. None: the trained model cannot compute them."""
        unlike = "ZeRO-3 has split its weights" if is_deepspeed_zero3_enabled() else ""
        if getattr(self.model, "is_quantized", False):
            unlike = "it trained on four bits"
        if unlike:
            logger.warning("the export is not compared with the model in memory: %s", unlike)
            return None
        # Weights are compared, not what autocast rounds: it computes only where dtypes differ.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
        with self.accelerator.autocast() if mixed else nullcontext():
            return vlm_outputs(model)

    def summary(self, result: TrainOutput) -> dict[str, Any]:
        """Facts of a finished training for the manifest: loss, steps, processes, ZeRO stage.

        With adapters also the share of their change that rounding lost in the export.
        """
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        lost = {"merge_loss": self.rounding.share} if is_adapted(self.model) else {}
        return lost | {
            "training_loss": result.training_loss,
            "steps": result.global_step,
            "world_size": self.args.world_size,
            "zero_stage": 0 if plugin is None else plugin.zero_stage,
        }


class PaddedBatches(Sampler[list[int]]):
    """Micro-batches of one process, for `InstructionCollator`, of an order that all of them share.

    Samples are dealt to the processes in turn, each once: where an epoch's last step has too few,
    some lists are empty. (accelerate fills these with the epoch's first samples, and where several
    processes resume, its nested samplers hide the epoch from a sampler.)

    Args:
        dataset: Has `lengths`.
        args: Training arguments, which set the order by `train_sampling_strategy`;
            `dataloader_drop_last` leaves an epoch's incomplete step out.

    Raises:
        ValueError: There is no step.
    """

    def __init__(self, dataset: Any, args: TrainingArguments) -> None:
        self._dataset, self._args, self._epoch = dataset, args, 0
        self._together = args.train_batch_size * args.world_size
        self._step = self._together * args.gradient_accumulation_steps
        if not len(self):
            raise ValueError(
                f"an epoch has {len(dataset)} samples, fewer than one step of {self._step}; lower "
                "global_batch_size, or set trainer.dataloader_drop_last to false"
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the Trainer calls it."""
        self._epoch = epoch

    def order(self) -> list[int]:
        """The samples of the epoch."""
        args, count, draw = self._args, len(self._dataset), torch.Generator()
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.train_sampling_strategy == "sequential":
            return list(range(count))
        if args.train_sampling_strategy == "random":
            return torch.randperm(count, generator=draw.manual_seed(seed + self._epoch)).tolist()
        draw.manual_seed(seed * 1_000_003 + self._epoch)
        return list(get_length_grouped_indices(self._dataset.lengths, self._step, generator=draw))

    def __len__(self) -> int:
        rest = len(self._dataset) % self._step if self._args.dataloader_drop_last else 0
        return (len(self._dataset) - rest + self._together - 1) // self._together

    def __iter__(self) -> Iterator[list[int]]:
        order, size = self.order(), self._args.train_batch_size
        first = self._args.process_index * size
        for start in range(first, first + len(self) * self._together, self._together):
            yield order[start : start + size]
