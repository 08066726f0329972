"""`transformers.TrainingArguments` of a recipe."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled

from llm2clip_vlm import distributed
from llm2clip_vlm.recipe.base import RunRecipe
from llm2clip_vlm.recipe.reading import RecipeError

logger = logging.getLogger(__name__)

_FIXED = {
    "save_only_model": False,  # a resumed run would go on with a fresh optimizer, in silence
    "ignore_data_skip": False,  # it would see the first samples of its epoch twice
    "dataloader_in_order": True,  # batches in the order of the fastest worker: no exact resume
    "auto_find_batch_size": False,  # would train on another global batch
    "push_to_hub": False,  # `llm2clip-vlm push` does, what is finished and whole
    "remove_unused_columns": False,
}
_YES = {"1", "true", "yes"}
_NOT_IN_DEEPSPEED = {"optimizer", "scheduler"}  # would give all parts one learning rate
_WHOLE = "stage3_gather_16bit_weights_on_model_save"


def check_choices(trainer: dict[str, Any]) -> None:
    """Check the values of a recipe's `trainer:` section that are words of a list.

    Its keys and types were checked when the recipe was read, without the list.

    Args:
        trainer: Keys and values as written in the recipe.

    Raises:
        RecipeError: A value that `TrainingArguments` does not list.
    """
    fields = dataclasses.fields(TrainingArguments)
    listed = {field.name: field.metadata.get("choices") or () for field in fields}
    if problems := [
        f"trainer.{name}: expected one of {', '.join(listed[name])}, got {value!r}"
        for name, value in trainer.items()
        if listed[name] and value not in [*listed[name]]
    ]:
        raise RecipeError("trainer section", *problems)


def shares_of_a_step(recipe: RunRecipe, processes: int | None = None) -> tuple[int, int]:
    """Divide the global batch.

    Args:
        recipe: The stage's recipe.
        processes: Number of processes that share a step. None: as many as run.

    Returns:
        Samples of a process at once, and how often it accumulates.

    Raises:
        RecipeError: The batch cannot be divided evenly.
    """
    processes = processes or distributed.world_size()
    step = recipe.global_batch_size
    default = max(1, step // processes) if recipe.contrastive else 8
    per_device = recipe.trainer.get("per_device_train_batch_size", default)
    if per_device < 1 or step % (per_device * processes):
        raise RecipeError(
            "batch size",
            "global_batch_size: expected a multiple of trainer.per_device_train_batch_size x "
            f"processes = {per_device} x {processes}, got {step}",
        )
    return per_device, step // (per_device * processes)


def build_training_arguments(recipe: RunRecipe, **forced: Any) -> TrainingArguments:
    """Build the arguments of a stage's Trainer.

    Call it before any model is loaded (ZeRO-3 wants to know first).

    Args:
        recipe: The stage's recipe.
        **forced: Arguments that the stage's program fixes.

    Returns:
        Arguments that checkpoint to `<output_dir>/checkpoints`.

    Raises:
        RecipeError: A bad key or value under `trainer`, one that the stage fixes to another value,
            or a global batch size that the processes cannot share evenly.
        ValueError: A contrastive stage with gradient accumulation, micro-batches together with
            gradient checkpointing, or ZeRO-3.
    """
    check_choices(recipe.trainer)
    shuffled = {"train_sampling_strategy": "random"} if recipe.contrastive else {}
    forced = _FIXED | shuffled | forced
    clashes = [
        f"trainer.{name}: this stage needs {value!r}, got {recipe.trainer[name]!r}"
        for name, value in forced.items()
        if recipe.trainer.get(name, value) != value
    ]
    if clashes:
        raise RecipeError("trainer section", *clashes)
    chosen = {**recipe.trainer, **forced}
    chosen["per_device_train_batch_size"], accumulation = shares_of_a_step(recipe)
    cuda = torch.cuda.is_available() and not chosen.get("use_cpu", False)
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _YES
    if launched or chosen.get("deepspeed") is not None:
        distributed.prepare_cpu_deepspeed()
    values = {
        "report_to": [],
        "save_strategy": "steps",
        "save_total_limit": 2,  # the one before, if the newest is damaged
        "logging_steps": 10,
        "data_seed": recipe.seed,
        "dataloader_pin_memory": cuda,
        **chosen,
        "use_cpu": not cuda,
        "output_dir": str(Path(recipe.output_dir) / "checkpoints"),
        "seed": recipe.seed,
        "gradient_accumulation_steps": accumulation,
    }
    try:
        arguments = TrainingArguments(**values)
        _try_out(arguments)
    except (ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error
    if recipe.contrastive:
        _check_contrastive(recipe, arguments)
    if arguments.fp16 and not cuda:
        logger.warning("trainer.fp16: a CPU computes in float32 instead")
    if arguments.n_gpu > 1:
        # One process on several GPUs would be torch's DataParallel: another global batch.
        logger.warning("using 1 of %d GPUs; start with `accelerate launch`", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _try_out(args: TrainingArguments) -> None:
    """Refuse what cannot be made, such as an optimizer or a schedule, before a model is loaded."""
    layer: Any = torch.nn.Linear(1, 1)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)
    if not {"params", "model", "optimizer_dict"} & options.keys():  # of some, which want parts
        kind(layer.parameters(), **options)
    more: Any = args.lr_scheduler_kwargs
    get_scheduler(args.lr_scheduler_type, torch.optim.SGD(layer.parameters()), 1, 1000, more)
    workers, ahead = args.dataloader_num_workers, args.dataloader_prefetch_factor
    more = {"num_workers": workers, "persistent_workers": args.dataloader_persistent_workers}
    DataLoader(layer, prefetch_factor=ahead, **more)
    if args.torch_compile and args.torch_compile_backend:
        torch.compile(layer, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if args.gradient_checkpointing:
        more = args.gradient_checkpointing_kwargs or {}
        more = {"use_reentrant": False, **more}
        own = ("every_n_layers", "offload")  # keys of transformers
        checkpoint(layer, torch.ones(1, 1), **{k: v for k, v in more.items() if k not in own})
    measured = args.metric_for_best_model and args.eval_strategy != "no"
    if args.save_strategy == "best" and not measured:
        raise ValueError(
            "save_strategy: best saves nothing without an evaluation and metric_for_best_model; "
            "expected steps, epoch or no"
        )
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if args.mixed_precision != precision:  # transformers takes over a launcher's
        raise ValueError(
            f"precision: the launcher says mixed_precision: {args.mixed_precision}, the recipe "
            f"{precision}; write trainer.bf16 or fp16 into the recipe, `no` into accelerate's file"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _YES:
        raise ValueError("FSDP: expected `--accelerate zero3`, or zero2: can be resumed and merged")
    if args.deepspeed is not None or args.deepspeed_plugin is not None:
        _try_deepspeed(args)


def _try_deepspeed(args: TrainingArguments) -> None:
    """Refuse what DeepSpeed would refuse once it trains, or take in place of the recipe's."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings: dict[str, Any] = getattr(args.deepspeed_plugin, "deepspeed_config", {})
    zero = settings.get("zero_optimization", {})
    wrong = [f"{key}: the recipe has its own" for key in _NOT_IN_DEEPSPEED & settings.keys()]
    wrong += getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", [])
    if DeepSpeedZeroConfig(**zero).stage == 3 and not zero.get(_WHOLE):
        wrong.append(f"zero_optimization.{_WHOLE}: expected true, or nothing could be exported")
    if wrong or not settings:
        raise ValueError(f"deepspeed: {'; '.join(wrong) or 'no settings'} (recipes/accelerate)")


def _check_contrastive(recipe: RunRecipe, args: TrainingArguments) -> None:
    """Refuse arguments under which the batch would not be the contrastive problem it is said to be.

    Raises:
        ValueError: Names the argument and what to do.
    """
    steps, batch = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if steps > 1:
        raise ValueError(
            f"gradient accumulation over {steps} steps adds no negatives: every pair would have "
            f"those of its own small batch. Raise trainer.per_device_train_batch_size to "
            f"{batch * steps} and bound the memory by micro_batch_size (stage 1: "
            f"micro_batch_tokens), or lower global_batch_size to {batch * args.world_size}"
        )
    micro = [getattr(recipe, key, None) for key in ("micro_batch_size", "micro_batch_tokens")]
    if any(micro) and args.gradient_checkpointing:
        raise ValueError(
            "trainer.gradient_checkpointing is true beside micro-batches, which already compute "
            "every activation twice; set it to false and lower micro_batch_size (stage 1: "
            "micro_batch_tokens) until a micro-batch fits"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "contrastive training takes plain data parallelism or ZeRO-1/2, not ZeRO-3"
        )
