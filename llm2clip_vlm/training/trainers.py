"""The Trainer of stages 3 and 4, and what both need around it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import TrainOutput

from llm2clip_vlm import distributed
from llm2clip_vlm.config_vlm import VlmRecipe
from llm2clip_vlm.data.instruction import (
    InstructionCollator,
    InstructionDataset,
    read_instructions,
)
from llm2clip_vlm.data.packing import PackedCollator, PackedDataset
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.files import written_whole
from llm2clip_vlm.models.trainable import apply_trainable
from llm2clip_vlm.models.vlm import load_vlm, save_vlm
from llm2clip_vlm.models.vlm_gradients import freeze_unused_vision, install_text_only_guard
from llm2clip_vlm.training.export import add_lora
from llm2clip_vlm.training.param_groups import build_param_groups
from llm2clip_vlm.training.strict_resume import StrictResumeMixin

logger = logging.getLogger(__name__)


class VlmTrainer(StrictResumeMixin, Trainer):
    """`transformers.Trainer` for a LLaVA: a learning rate per part, exact token mean, packing.

    The loss is the mean over all trained tokens of the global batch (`num_items_in_batch`, summed
    over accumulation and processes), so n processes compute the gradient of one.

    Args:
        model: A `LlavaForConditionalGeneration` with `requires_grad` set.
        args: Training arguments; `train_sampling_strategy: group_by_length` puts samples of
            similar length into a global batch.
        train_dataset: With `lengths`.
        data_collator: Of the dataset.
        processor: Saved with each checkpoint.
        learning_rates: Part to learning rate.
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
        learning_rates: Mapping[str, float],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        install_text_only_guard(model)
        self.learning_rates = dict(learning_rates)
        self.processor = processor
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=processor,
            callbacks=callbacks,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `trainer.optim`) over groups with the recipe's learning rates."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            groups = build_param_groups(target, self.learning_rates, self.args.weight_decay)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, target)
            arguments.pop("lr", None)
            self.optimizer = optimizer_class(groups, lr=groups[0]["lr"], **arguments)
        return self.optimizer

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            sampler: Sampler[int] | None = super()._get_train_sampler(dataset)
            return sampler
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups(dataset.lengths, size * self.args.world_size, seed)

    def export(self, directory: str | Path) -> None:
        """Writes the model as `from_pretrained` reads it, adapters merged. Call on all ranks.

        Args:
            directory: Where to; made if absent.
        """
        wrapped = self.model_wrapped
        state: dict[str, Tensor] = self.accelerator.get_state_dict(wrapped)
        if distributed.is_main():
            merged = merged_state(self.model, state)
            save_vlm(self.model, self.processor, directory, state_dict=merged)
        distributed.barrier()

    def summary(self, result: TrainOutput) -> dict[str, Any]:
        """What a manifest keeps of a finished training: loss, steps, processes, ZeRO stage."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return {
            "training_loss": result.training_loss,
            "steps": result.global_step,
            "world_size": self.args.world_size,
            "zero_stage": 0 if plugin is None else plugin.zero_stage,
        }


class LengthGroups(Sampler[int]):
    """Order in which neighbours have similar lengths; the same on all processes, anew each epoch.

    (transformers' own sampler draws from the global generator, which a resumed run has elsewhere.)
    """

    def __init__(self, lengths: list[int], group_size: int, seed: int) -> None:
        """Takes the tokens of each sample, the global batch size and the seed of the order."""
        self._lengths = lengths
        self._group_size = group_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the Trainer calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(
            get_length_grouped_indices(self._lengths, self._group_size, generator=generator)
        )


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds LoRA adapters to the weights they adapt, by name, without touching the model.

    Works on gathered weights, so it is right under ZeRO-3 too, where the model's own are shards.

    Args:
        model: With or without adapters.
        state: Its weights by name.

    Returns:
        The same weights with the names that the model had before the adapters came.
    """
    if not any(".lora_A." in name for name in state):
        return dict(state)
    merged: dict[str, Tensor] = {}
    scaling = {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        module = name.rsplit(".base_layer.", 1)[0]
        low = state.get(f"{module}.lora_A.default.weight")
        high = state.get(f"{module}.lora_B.default.weight")
        if name.endswith(".base_layer.weight") and low is not None and high is not None:
            update = scaling[module] * (high.float() @ low.float())
            merged[f"{module}.weight"] = (tensor.float() + update).to(tensor.dtype)
            continue
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def compose_once(
    build: Callable[[], tuple[Any, Any]], directory: str | Path, args: TrainingArguments
) -> tuple[Any, Any]:
    """Composes a VLM in the main process, saves it, and loads it in all of them.

    ZeRO-3 splits weights while they are loaded, so a model must come from a checkpoint; the same
    road is taken without ZeRO-3.

    Args:
        build: Returns model and processor.
        directory: Where the composed checkpoint goes; reused if it is complete (a resumed run).
        args: The run's training arguments.

    Returns:
        Model and processor, loaded from `directory`.
    """
    folder = Path(directory)
    with args.main_process_first(local=False, desc="composing the VLM"):
        if distributed.is_main() and not folder.is_dir():
            with written_whole(folder) as partial, _weights_unsplit(args):
                save_vlm(*build(), partial)
    return load_vlm(folder)


@contextlib.contextmanager
def _weights_unsplit(args: TrainingArguments) -> Iterator[None]:
    """Loading below this is not split by ZeRO-3, which all processes would have to join."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    config = getattr(plugin, "dschf", None) or plugin.hf_ds_config
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def prepare_trainable(model: Any, recipe: VlmRecipe) -> dict[str, float]:
    """Sets what trains, as the recipe's map says; adds the language model's LoRA if it has one.

    Args:
        model: A `LlavaForConditionalGeneration`.
        recipe: With `trainable` and `language_model_lora`.

    Returns:
        Learning rate of each part that trains.

    Raises:
        ValueError: Nothing trains, there is a LoRA section for a language model that does not, or
            the section asks for DoRA.
    """
    if not recipe.trainable:
        raise ValueError("trainable: names no part, expected at least one with its learning rate")
    if recipe.language_model_lora is not None:
        if "language_model" not in recipe.trainable:
            raise ValueError(
                "language_model_lora: trainable has no learning rate for language_model; add "
                "`trainable.language_model` or set language_model_lora to null"
            )
        if recipe.language_model_lora.use_dora:
            raise ValueError(
                "language_model_lora.use_dora: expected false, got true; stages 3 and 4 merge "
                "plain LoRA only, a DoRA magnitude would be lost in the export"
            )
        add_lora(model.model.language_model, recipe.language_model_lora)
    apply_trainable(model, recipe.trainable)
    freeze_unused_vision(model)
    return {str(part): lr for part, lr in recipe.trainable.items()}


def build_vlm_data(
    recipe: VlmRecipe, processor: Any, bad: BadRecords, *, plain: bool = False
) -> tuple[InstructionDataset, Any, Callable[[Any], dict[str, Tensor]]]:
    """Dataset and collator of stages 3 and 4.

    Args:
        recipe: With `data`, `max_length_tokens`, `packing` and `seed`.
        processor: The model's `LlavaProcessor`.
        bad: Takes records that cannot be used.
        plain: LLaVA's `plain` style.

    Returns:
        The samples, what the Trainer gets (samples, or packed rows of them), its collator.
    """
    records = [
        record
        for source in recipe.data
        for record in read_instructions(source, bad, seed=recipe.seed)
    ]
    samples = InstructionDataset(
        records, processor, max_length_tokens=recipe.max_length_tokens, bad=bad, plain=plain
    )
    if recipe.packing:
        return samples, PackedDataset(samples, recipe.max_length_tokens), PackedCollator()
    return samples, samples, InstructionCollator(processor.tokenizer.pad_token_id)
