"""What stages 3 and 4 share: composing, what trains, data, training, handing off."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llm2clip_vlm import distributed
from llm2clip_vlm.chat.labels import check_chat_template
from llm2clip_vlm.data.conversation.instruction import InstructionCollator, InstructionDataset
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.files import written_whole
from llm2clip_vlm.models.trainable import (
    apply_trainable,
    set_precision,
    train_last_blocks,
    trainable_table,
)
from llm2clip_vlm.models.vlm.building import load_vlm, save_vlm
from llm2clip_vlm.models.vlm.document_attention import install_packing
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.recipe.vlm import PartTraining, VlmRecipe
from llm2clip_vlm.runs.ownership import remove, sign
from llm2clip_vlm.training.adapters import check_adapter, is_adapted
from llm2clip_vlm.training.export import add_lora
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer


def train_vlm(
    run: StageRun[Any],
    model: Any,
    processor: Any,
    *,
    base: str | Path,
    fingerprints: Mapping[str, str],
    plain: bool = False,
) -> None:
    """Trains a composed VLM as the recipe says, from its last checkpoint on, and hands it off.

    Args:
        run: Its arguments are built.
        model: A `LlavaForConditionalGeneration`, loaded after them.
        processor: Its processor.
        base: Directory or hub id that the model was loaded from; removed in the end if it lies in
            the output directory.
        fingerprints: Of what it is made of, for the manifest.
        plain: LLaVA's `plain` style.

    Raises:
        ValueError: See :func:`prepare_trainable` and `VlmTrainer.training_step`.
    """
    recipe: VlmRecipe = run.recipe
    assert run.args is not None
    check_chat_template(processor)
    parts = prepare_trainable(model, recipe)
    dtype = set_precision(model, run.args)
    leak = padded_instead(model, recipe, run.args)
    if leak is not None:
        recipe = recipe.model_copy(update={"packing": False})
        if distributed.is_main():
            print(f"packing: padded instead, in groups of similar length: {leak}")
    samples, collator, batches = build_vlm_data(recipe, processor, run.bad, run.args, plain=plain)
    if distributed.is_main():
        print(trainable_table(model, {name: part.lr for name, part in parts.items()}))
        rows = "" if batches is None else f" in {len(batches) * run.args.world_size} packed rows"
        print(f"{len(samples)} samples{rows}; {run.bad.summary()}; the first:")
        print(samples.preview(processor.tokenizer))

    trainer = VlmTrainer(
        model,
        run.args,
        samples,
        collator,
        processor,
        batches=batches,
        parts=parts,
        checkpoint=base,
        dtype=dtype,
        hang_timeout_s=recipe.hang_timeout_s,
        report=print if distributed.is_main() else lambda table: None,
        callbacks=[run.metrics],
    )
    result = trainer.train(resume_from_checkpoint=run.checkpoint)

    # hand off (the metric of a VLM is its score in lmms-eval)
    trainer.export(run.out / "model")
    if distributed.is_main():
        if Path(base).parent == run.out:
            remove(Path(base))
        summary = trainer.summary(result) | {"padded_because": leak}
        if is_adapted(model):
            print(trainer.rounding)
        print(f"{run.stage}: {summary}")
        run.finish(fingerprints, **summary)
    distributed.teardown()


def padded_instead(model: Any, recipe: VlmRecipe, args: TrainingArguments) -> str | None:
    """Asks the model whether it keeps packed samples apart; else sets arguments for padding.

    Call on all ranks; they get the same answer.

    Args:
        model: A LLaVA, not wrapped yet; it is moved to where it will train.
        recipe: With `packing`.
        args: The run's training arguments.

    Returns:
        Why the run cannot be packed though the recipe says so; none if it can, or should not.
    """
    if not recipe.packing or args.train_sampling_strategy != "random":  # refused with the data
        return None
    if not (is_deepspeed_zero3_enabled() or getattr(model, "is_quantized", False)):
        model.to(args.device)
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):
        leak = install_packing(model)
    (anywhere,) = distributed.max_over_ranks(leak is not None, device=args.device)
    if not anywhere:
        return None
    args.train_sampling_strategy = "group_by_length"
    return leak or "another process found that it would not keep samples apart"


def prepare_trainable(model: Any, recipe: VlmRecipe) -> dict[str, PartTraining]:
    """Sets what trains, as the recipe's map says; adds the adapters that it asks for.

    Args:
        model: A `LlavaForConditionalGeneration`.
        recipe: With `trainable`, `language_model_lora` and `vision_tower_lora`.

    Returns:
        How each part trains.

    Raises:
        ValueError: An adapter for a part that does not train, DoRA, or more `last_blocks` than
            there are.
    """
    parts: dict[str, PartTraining] = {
        name: part if isinstance(part, PartTraining) else PartTraining(lr=part)
        for name, part in recipe.trainable.items()
    }
    for name in ("language_model", "vision_tower"):
        lora = getattr(recipe, f"{name}_lora")
        if lora is None:
            continue
        if name not in parts:
            raise ValueError(
                f"{name}_lora: trainable has no learning rate for {name}; add "
                f"`trainable.{name}` or set {name}_lora to null"
            )
        if lora.use_dora:
            raise ValueError(
                f"{name}_lora.use_dora: expected false, got true; stages 3 and 4 merge plain LoRA "
                "only, a DoRA magnitude would be lost in the export"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # loading draws more or less, as ZeRO-3 has it
            add_lora(getattr(model.model, name), lora, f"{name}_lora")
        check_adapter(model, [], f"{name}_lora")  # `lm_head` may share a weight with it
    apply_trainable(model, parts)
    freeze_unused_vision(model)
    for name, part in parts.items():
        train_last_blocks(model, name, part.last_blocks)
    return parts


def build_vlm_data(
    recipe: VlmRecipe,
    processor: Any,
    bad: BadRecords,
    args: TrainingArguments,
    *,
    plain: bool = False,
) -> tuple[InstructionDataset, Callable[[Any], dict[str, Any]], PackedBatches | None]:
    """Dataset, collator and, with packing, the plan of its micro-batches. Call on all ranks.

    Args:
        recipe: With `data`, `max_length_tokens`, `packing` and `seed`.
        processor: The model's `LlavaProcessor`.
        bad: Takes records that cannot be used.
        args: The run's training arguments; with packing the accumulation is set.
        plain: LLaVA's `plain` style.

    Raises:
        ValueError: No record is left, or packing beside another sampling strategy.
    """
    samples = InstructionDataset(
        recipe.data,
        processor,
        max_length_tokens=recipe.max_length_tokens,
        bad=bad,
        plain=plain,
        seed=recipe.seed,
    )
    if not recipe.packing:
        return samples, InstructionCollator(processor.tokenizer.pad_token_id), None
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"trainer.train_sampling_strategy: {args.train_sampling_strategy!r} has no meaning "
            "with packing, which plans its own batches; leave it out or set `packing: false`"
        )
    drop_last = args.dataloader_drop_last
    steps = max(len(samples) // recipe.global_batch_size, 1)
    if not drop_last:
        steps = -(-len(samples) // recipe.global_batch_size)
    wanted = args.max_steps if args.max_steps > 0 else steps * args.num_train_epochs
    batches = PackedBatches(
        samples.lengths,
        samples.image_counts,
        global_batch_size=recipe.global_batch_size,
        max_tokens=recipe.max_length_tokens * args.per_device_train_batch_size,
        max_images=recipe.packing_max_images,
        seed=recipe.seed,
        epochs=math.ceil(wanted / steps),
        rank=args.process_index,
        world_size=args.world_size,
        drop_last=drop_last,
    )
    args.gradient_accumulation_steps = batches.accumulation
    return samples, PackedCollator(), batches


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
                sign(partial)
    return load_vlm(folder)


@contextlib.contextmanager
def _weights_unsplit(args: TrainingArguments) -> Iterator[None]:
    """Loading below this is not split by ZeRO-3, which all processes would have to join."""
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)
