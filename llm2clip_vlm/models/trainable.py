"""An explicit map of the parts of a model that train, and a table that shows it."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)

_WRAPPERS = ("module.", "base_model.model.", "model.")


def part_name(name: str) -> str:
    """A parameter's name as recipes know it: without wrappers, `lm_head` inside the LLM.

    AnyRes' `image_newline` belongs to the projector, with which it is trained.

    Args:
        name: Key of `named_parameters()`, such as `model.vision_tower.embeddings.class_embedding`.

    Returns:
        Such as `vision_tower.embeddings.class_embedding`; a Llava's `lm_head.weight` becomes
        `language_model.lm_head.weight`.
    """
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    if name == "image_newline":
        return f"multi_modal_projector.{name}"
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def matching_prefix(name: str, prefixes: Collection[str]) -> str | None:
    """The longest of `prefixes` that a parameter's name (any form) lies below. None: no prefix."""
    part = part_name(name)
    above = [p for p in prefixes if part == p or part.startswith(p + ".")]
    return max(above, key=len) if above else None


def is_feature_map(tower: nn.Module) -> bool:
    """Whether a module is a CNN, whose last map's places are the tokens."""
    return bool(getattr(getattr(tower, "config", None), "feature_map", False))


def block_list(model: nn.Module, part: str = "") -> tuple[str, int]:
    """Find a model's transformer blocks: the longest list of modules that lies in no other list.

    Args:
        model: A tower or a decoder, or a model that holds it.
        part: The tower's name in the model, as recipes know it; empty = the model is the tower.

    Returns:
        The list's name in the model, and its length.

    Raises:
        ValueError: There is no such list.
    """
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        kinds = {type(child) for child in module.children()}
        listed = isinstance(module, nn.Sequential) and len(kinds) == 1
        listed |= isinstance(module, nn.ModuleList) and len(kinds) > 0
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if listed and not inside and (not part or matching_prefix(name, [part])):
            lists[name] = len(list(module.children()))
    if not lists:
        raise ValueError(f"{part} of {type(model).__name__} has no list of blocks".strip())
    name = max(lists, key=lambda name: lists[name])
    return name, lists[name]


def layers_of(model: nn.Module, part: str = "") -> tuple[dict[str, int], int]:
    """Layer of each of a tower's parameters: 0 before its blocks, 1 for the first, ...

    The layers of a CNN are its stages, as timm groups them.

    Args:
        model: See :func:`block_list`; its parameters come in the order of the forward pass.
        part: See :func:`block_list`.

    Returns:
        Name in the model to layer, and the number of blocks; what follows them is one layer more.

    Raises:
        ValueError: See :func:`block_list`.
    """
    for name, module in model.named_modules():
        stages = getattr(module, "parameter_stages", None) if is_feature_map(module) else None
        if stages is not None and (not part or matching_prefix(name, [part])):
            stage_of, depth = stages()
            return {
                f"{name}.{inner}".removeprefix("."): at for inner, at in stage_of.items()
            }, depth
    blocks, depth = block_list(model, part)
    layers: dict[str, int] = {}
    layer = 0
    for name, _ in model.named_parameters():
        if part and not matching_prefix(name, [part]):
            continue
        if name.startswith(f"{blocks}."):
            layer = int(name[len(blocks) + 1 :].split(".")[0]) + 1
        elif layer:
            layer = depth + 1
        layers[name] = layer
    return layers, depth


def require_known_prefixes(model: nn.Module, prefixes: Collection[str]) -> None:
    """Refuse prefixes that no parameter lies below.

    Raises:
        ValueError: Names them and the model's parts.
    """
    names = [name for name, _ in model.named_parameters()]
    used = {part for name in names for part in prefixes if matching_prefix(name, [part])}
    if unknown := sorted(set(prefixes) - used):
        parts = sorted({part_name(name).split(".")[0] for name in names})
        raise ValueError(
            f"trainable parts {unknown} name no parameter of {type(model).__name__}; its parts are "
            f"{parts}"
        )


def apply_trainable(model: nn.Module, parts: Mapping[str, float] | Collection[str]) -> None:
    """Set `requires_grad` of every parameter: true below the named parts, false elsewhere.

    In a part that carries a LoRA adapter only the adapter's weights train.

    Args:
        model: Any module.
        parts: Prefixes of parameter names (`vision_tower`, `multi_modal_projector`,
            `language_model`, also finer ones), or a map from them to learning rates.

    Raises:
        ValueError: A part names no parameter.
    """
    prefixes = list(parts)
    require_known_prefixes(model, prefixes)
    owner = {name: matching_prefix(name, prefixes) for name, _ in model.named_parameters()}
    adapted = {part for name, part in owner.items() if part and "lora_" in name}
    for name, parameter in model.named_parameters():
        part = owner[name]
        parameter.requires_grad_(part is not None and (part not in adapted or "lora_" in name))


def set_precision(model: nn.Module, args: Any, *, named_fp16: bool = False) -> torch.dtype:
    """Give what trains fp32 weights, whatever the checkpoint's dtype. Call it before the optimizer.

    In bf16 an update below half a step of the weight is lost, in fp16 it may also overflow. So
    adapters become fp32, a part whose own weights train becomes fp32 as a whole, and fp16 weights
    do (a recipe's explicit fp16 stays where it is frozen). Frozen bf16 parts keep their dtype.
    DeepSpeed's bf16 or fp16 section casts all weights itself and keeps fp32 masters; without one
    it gets fp32.

    Args:
        model: Changed in place; has `requires_grad` set. One that ZeRO-3 has split is left alone.
        args: The run's `TrainingArguments`.
        named_fp16: The recipe itself names float16.

    Returns:
        What the weights are saved in: the checkpoint's dtype; fp32 for an fp16 one that the recipe
        does not name; with fp32 masters what DeepSpeed casts to.

    Raises:
        ValueError: fp16 is named without a loss scaler (`trainer.fp16`).
    """
    if named_fp16 and not args.fp16:
        raise ValueError(
            "dtype: float16 trains with a loss scaler only; expected trainer.fp16: true beside it, "
            "or dtype: float32, bfloat16 or auto"
        )
    floats = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    dtypes = [p.dtype for n, p in floats.items() if "lora_" not in n]
    half = torch.float16 in dtypes and not named_fp16
    deepspeed = args.deepspeed_plugin is not None
    if deepspeed and (args.bf16 or args.fp16):
        return torch.bfloat16 if args.bf16 else torch.float16
    if half:
        logger.warning("float16 weights, in which nothing trains safely, become float32")
    trained = {
        part_name(name).split(".")[0]
        for name, parameter in floats.items()
        if parameter.requires_grad and "lora_" not in name
    }
    for name, parameter in floats.items():
        wanted = deepspeed or "lora_" in name or part_name(name).split(".")[0] in trained
        wanted |= half and parameter.dtype == torch.float16
        if wanted and not hasattr(parameter, "ds_id"):  # ZeRO-3 has split it, in fp32
            parameter.data = parameter.data.float()
    return torch.float32 if half else max(dtypes, key=dtypes.count)


def train_last_blocks(model: nn.Module, part: str, count: int | None) -> None:
    """Freeze what comes before the last blocks of a part that train.

    Args:
        model: The model, with `requires_grad` set.
        part: The part's name, as recipes know it.
        count: Blocks that go on training; what follows them (norms, `lm_head`) does, too. None:
            all, nothing is frozen.

    Raises:
        ValueError: Fewer blocks than that train.
    """
    if count is None:
        return
    layers, depth = layers_of(model, part)
    parameters = dict(model.named_parameters())
    training = {layer for name, layer in layers.items() if parameters[name].requires_grad}
    training -= {0, depth + 1}
    if count > len(training):
        raise ValueError(
            f"last blocks of {part}: expected at most {len(training)}, the blocks that train, got "
            f"{count}"
        )
    first = sorted(training)[-count]
    for name, layer in layers.items():
        if layer < first:
            parameters[name].requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Find the modules that stay in evaluation mode while a model trains.

    Args:
        model: The model, with `requires_grad` set.

    Returns:
        The largest modules that have parameters, none of which trains, and every BatchNorm (or
        other norm with running statistics, such as EvoNorm-B0): it goes on normalising by its
        pretrained statistics, and only its scale and shift train. By a
        batch's own, each embedding would depend on the other pictures of the batch (in contrastive
        training a short cut, MoCo's section 3.3, arXiv 1911.05722), on the number of processes and
        on micro-batches; and what is saved would not be what was trained, since the running ones
        follow slowly: after 47 steps a tower retrieved 9 % where it began with 16 %.
    """
    trains = [parameter.requires_grad for parameter in model.parameters()]
    if (trains and not any(trains)) or hasattr(model, "running_var"):
        return [model]
    return [found for child in model.children() for found in frozen_modules(child)]


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the running statistics of a model's norms, by name; see :func:`frozen_modules`."""
    return {n: b.cpu().clone() for n, b in model.named_buffers() if ".running_" in f".{n}"}


def set_evaluation_mode(frozen: Iterable[nn.Module]) -> None:
    """Stop dropout, stochastic depth and the statistics of BatchNorm.

    Args:
        frozen: Result of :func:`frozen_modules`. Layers whose activations are computed a second
            time in the backward pass keep their own flag, by which transformers decides about that;
            what is in them does not.
    """
    for module in frozen:
        for part in module.eval().modules():
            if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
                part.training = True


def freeze_unused(model: nn.Module, loss: Callable[[], torch.Tensor]) -> list[str]:
    """Freeze trainable parameters that the loss does not depend on.

    Data-parallel training waits for a gradient of each trainable parameter, so one that never gets
    any (a mask token, layers above the one that is used) stops or fails it.

    Args:
        model: The model; its gradients are cleared.
        loss: One forward pass on a small batch.

    Returns:
        Names of the frozen parameters.
    """
    model.zero_grad(set_to_none=True)
    set_evaluation_mode(frozen_modules(model))  # or two pictures would shift BatchNorm's statistics
    loss().backward()
    unused = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    if unused:
        logger.info("frozen because the loss does not reach them: %s", [*unused])
    return [*unused]


def trainable_table(model: nn.Module, lrs: Mapping[str, float] | None = None) -> str:
    """A table of the model's parts: parameters, how many of them train, learning rate.

    Args:
        model: Any module; its parts are the first components of its parameter names.
        lrs: Learning rate by prefix, as given to `build_param_groups`.

    Returns:
        Lines of equal width, to print at the start of a run.
    """
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    rates: dict[str, set[float]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        part = part_name(name).split(".")[0]
        # ZeRO-3 leaves an empty shell and keeps the size beside it
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        total[part] += size
        if parameter.requires_grad:
            trained[part] += size
            if lrs and (prefix := matching_prefix(name, lrs)):
                rates[part].add(lrs[prefix])
    rows = [("part", "parameters", "trainable", "lr")]
    for part, count in total.items():
        shown = ", ".join(f"{lr:g}" for lr in sorted(rates[part])) or "-"
        rows.append((part, f"{count:,}", f"{trained[part]:,}", shown))
    rows.append(("total", f"{total.total():,}", f"{trained.total():,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip()
        for a, b, c, d in rows
    )
