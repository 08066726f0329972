"""Steps that stages 3 and 4 share: composing, what trains, data, the trainer, handing off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
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
from llm2clip_vlm.chat.template import template_of
from llm2clip_vlm.data.conversation.instruction import (
    InstructionCollator,
    InstructionDataset,
    expand_mixtures,
    refuse_shuffled,
)
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.data.conversation.token_table import tokenise
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.records import source_files
from llm2clip_vlm.data.reading.table import file_states
from llm2clip_vlm.files import written_whole
from llm2clip_vlm.models.trainable import apply_trainable, train_last_blocks, trainable_table
from llm2clip_vlm.models.vision.image_mode import AspectRatio, set_image_aspect_ratio
from llm2clip_vlm.models.vlm.building import load_vlm, save_vlm
from llm2clip_vlm.models.vlm.document_attention import install_packing
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.recipe.vlm import PartTraining, Stage3Recipe, VlmRecipe
from llm2clip_vlm.remote.addresses import is_remote
from llm2clip_vlm.runs.ownership import remove, sign
from llm2clip_vlm.training.adapters import add_lora, check_adapter, is_adapted
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer

VlmData = tuple[InstructionDataset, Callable[[Any], dict[str, Any]], PackedBatches | None]
"""Dataset, collator and, with packing, the plan of its micro-batches."""

EXACT_LOSS = {"label_smoothing_factor": 0.0, "average_tokens_across_devices": True}
"""Trainer arguments by which the loss is the mean over a step's tokens, each predicted from those
before it. (Transformers smooths a LLaVA's labels without shifting them: each token is its own.)"""


def build_trainer(
    run: StageRun[Any],
    model: Any,
    processor: Any,
    data: VlmData,
    parts: Mapping[str, PartTraining],
    base: str | Path,
    dtype: torch.dtype,
) -> VlmTrainer:
    """Build the trainer of a run, after showing what trains and the first sample.

    Args:
        run: Its arguments are built.
        model: A `LlavaForConditionalGeneration`, loaded after them.
        processor: Its processor.
        data: Result of :func:`build_vlm_data`.
        parts: Result of :func:`prepare_trainable`.
        base: Directory or hub id that the model was loaded from.
        dtype: Result of `set_precision`.
    """
    assert run.args is not None
    samples, collator, batches = data
    distributed.say(trainable_table(model, {name: part.lr for name, part in parts.items()}))
    rows = "" if batches is None else f" in {len(batches) * run.args.world_size} packed rows"
    distributed.say(f"data: {len(samples)} samples{rows}; {run.bad.summary()}; the first:")
    distributed.say(samples.preview(processor.tokenizer))
    return VlmTrainer(
        model,
        run.args,
        samples,
        collator,
        processor,
        batches=batches,
        parts=parts,
        checkpoint=base,
        dtype=dtype,
        report=distributed.say,
        callbacks=run.callbacks,
    )


def hand_off(
    run: StageRun[Any], trainer: VlmTrainer, result: Any, made_of: Mapping[str, str], **extra: Any
) -> None:
    """Export the model and finish the run.

    Args:
        run: Its training is over.
        trainer: Trainer from :func:`build_trainer`; a checkpoint of the run's own is removed.
        result: What the training returned.
        made_of: Fingerprints of the parts, for the manifest.
        **extra: More for the manifest.
    """
    trainer.export(run.out / "model")
    if distributed.is_main():
        base = Path(trainer.checkpoint)
        if base.parent == run.out:
            remove(base)
        summary = trainer.summary(result) | extra
        if is_adapted(trainer.model):
            distributed.say(trainer.rounding)
        distributed.say(f"{run.stage}: {summary}")
        run.finish(made_of, **summary)
    distributed.teardown()


def padded_instead(
    model: Any, recipe: VlmRecipe, args: TrainingArguments
) -> tuple[VlmRecipe, str | None]:
    """Ask the model whether it keeps packed samples apart; else set the arguments for padding.

    Call it on all ranks; they get the same answer.

    Args:
        model: A LLaVA, not wrapped yet; it is moved to where it will train.
        recipe: Recipe with `packing`.
        args: The run's training arguments.

    Returns:
        The recipe to go on with, and why the run cannot be packed though it says so. None: it can,
        or should not.

    Raises:
        ValueError: A long sample would change how short ones beside it are read.
    """
    _refuse_stretched_rope(model.config.text_config, recipe, args)
    if not recipe.packing:
        return recipe, None
    if not (is_deepspeed_zero3_enabled() or getattr(model, "is_quantized", False)):
        model.to(args.device)
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):
        leak = install_packing(model)
    (anywhere,) = distributed.max_over_ranks(leak is not None, device=args.device)
    if not anywhere:
        return recipe, None
    args.train_sampling_strategy = "group_by_length"
    leak = leak or "another process found that it would not keep samples apart"
    distributed.say(f"packing: padded instead, in groups of similar length: {leak}")
    return recipe.model_copy(update={"packing": False}), leak


def _refuse_stretched_rope(config: Any, recipe: VlmRecipe, args: TrainingArguments) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    limits = {
        "dynamic": getattr(config, "max_position_embeddings", None),
        "longrope": rope.get("original_max_position_embeddings"),
    }
    limit = limits.get(rope.get("rope_type", "")) or math.inf
    together = recipe.packing or args.per_device_train_batch_size > 1
    if together and recipe.max_length_tokens > limit:
        raise ValueError(
            f"max_length_tokens: expected at most {limit}, got {recipe.max_length_tokens}: beyond "
            f"it the language model's rope ({rope['rope_type']}) turns all samples of a "
            "micro-batch as its longest one asks for; or set packing: false and a "
            "per_device_train_batch_size of 1"
        )


def prepare_processor(recipe: VlmRecipe, processor: Any) -> None:
    """Set a processor as the recipe says, if its pictures and its template can be trained on.

    Args:
        recipe: Recipe with `data`, and in stage 4 `image_aspect_ratio`.
        processor: A `LlavaProcessor`, changed in place.

    Raises:
        ValueError: An image mode that it cannot have, no template that marks answers, or shuffled
            pictures with AnyRes.
    """
    ratio: AspectRatio | None = getattr(recipe, "image_aspect_ratio", None)
    if ratio is not None:
        set_image_aspect_ratio(processor, ratio)
    processor.chat_template = template_of(processor)  # a foreign one asks for today's date
    check_chat_template(processor)
    for source in recipe.data:
        refuse_shuffled(source, processor)


def prepare_trainable(model: Any, recipe: VlmRecipe) -> dict[str, PartTraining]:
    """Set what trains, as the recipe's map says, and add the adapters that it asks for.

    Args:
        model: A `LlavaForConditionalGeneration`.
        recipe: Recipe with `trainable`, `language_model_lora` and `vision_tower_lora`.

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
) -> VlmData:
    """Read the data, and plan the micro-batches of packed rows. Call it on all ranks.

    Args:
        recipe: Recipe with `data`, `max_length_tokens`, `packing` and `seed`.
        processor: The model's `LlavaProcessor`.
        bad: Takes records that cannot be used.
        args: The run's training arguments; with packing the accumulation is set.
        plain: LLaVA's `plain` style.

    Raises:
        ValueError: No record is left.
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
    drop_last = args.dataloader_drop_last
    whole, rest = divmod(len(samples), recipe.global_batch_size)
    steps = max(whole + (rest > 0 and not drop_last), 1)
    wanted = args.max_steps if args.max_steps > 0 else steps * args.num_train_epochs
    batches = PackedBatches(
        samples.lengths,
        samples.image_counts,
        global_batch_size=recipe.global_batch_size,
        max_tokens=recipe.max_length_tokens * args.per_device_train_batch_size,
        max_images=recipe.packing_max_images,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epochs=math.ceil(wanted / steps),
        rank=args.process_index,
        world_size=args.world_size,
        drop_last=drop_last,
    )
    args.gradient_accumulation_steps = batches.accumulation
    return samples, PackedCollator(), batches


def tried(model: Any, processor: Any, recipe: Stage3Recipe) -> tuple[Any, Any]:
    """A model and its processor, if they can be trained: before gigabytes of them are written.

    Args:
        model: A `LlavaForConditionalGeneration`, which stays as it is.
        processor: Its processor.
        recipe: What is to be done with them.

    Raises:
        ValueError: The template does not mark answers, parts cannot train as the recipe says, or
            a source has no conversation that fits.
    """
    prepare_processor(recipe, processor)
    with torch.device("meta"):
        shapes = type(model)(copy.deepcopy(model.config))
        shapes.tie_weights()
        prepare_trainable(shapes, recipe)
    for source in expand_mixtures(recipe.data):
        if is_remote(source.path):  # read through as a whole, later
            continue
        refused, facts = Refused(), {"files": file_states(source_files(source))}
        length = recipe.max_length_tokens
        rows = tokenise(source, processor, length, recipe.plain, refused, facts)
        if next(rows, None) is None:
            raise RecordError(f"{source.title}: no usable record; the first is {refused.first}")
    return model, processor


def compose_once(
    build: Callable[[], tuple[Any, Any]],
    directory: str | Path,
    args: TrainingArguments,
    *,
    load_in_4bit: bool = False,
) -> tuple[Any, Any]:
    """Compose a VLM in the main process, save it, and load it in all of them.

    ZeRO-3 splits weights while they are loaded, so a model must come from a checkpoint; it comes
    from there without ZeRO-3, too.

    Args:
        build: Returns model and processor.
        directory: Where the composed checkpoint goes; reused if it is complete (a resumed run).
        args: The run's training arguments.
        load_in_4bit: Load it so; what is saved keeps its precision.

    Returns:
        Model and processor, loaded from `directory`.
    """
    folder = Path(directory)
    with args.main_process_first(local=False, desc="composing the VLM"):
        if distributed.is_main() and not folder.is_dir():
            plugin = args.deepspeed_plugin
            unset_hf_deepspeed_config()  # all processes would have to join where ZeRO-3 splits
            with written_whole(folder) as partial:
                save_vlm(*build(), partial)
                sign(partial)
            if plugin is not None:
                set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)
    distributed.await_files(folder)
    return load_vlm(folder, load_in_4bit=load_in_4bit, device=args.device)
