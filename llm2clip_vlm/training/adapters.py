"""LoRA adapters inside a VLM: merged by name, saved with what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip_vlm.handoff import HandoffError

ADAPTER_NAME = "adapter.safetensors"


def is_adapted(model: nn.Module) -> bool:
    """Whether there is an adapter in the model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def _scaling(model: nn.Module) -> dict[str, float]:
    return {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds LoRA adapters to the weights they adapt, by name, without touching the model.

    Works on gathered weights, so it is right under ZeRO-3 too, where the model's own are shards.

    Args:
        model: With or without adapters.
        state: Its weights by name.

    Returns:
        The same weights with the names that the model had before the adapters came.
    """
    scaling = _scaling(model)
    merged: dict[str, Tensor] = {}
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


def unquantized_state(
    model: nn.Module, state: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a model with adapters on four-bit weights, with what those were before.

    Args:
        model: With adapters.
        state: Its weights by name.
        whole: Those of the checkpoint that it was loaded from.

    Returns:
        As :func:`merged_state` takes them.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    for name, tensor in whole.items():
        adapted = name.removesuffix(".weight") + ".base_layer.weight"
        found[adapted if adapted in state else name] = state[name] if name in trained else tensor
    return found


def save_adapter(
    model: nn.Module, state: Mapping[str, Tensor], directory: str | Path, base: str
) -> None:
    """Writes all that trains: adapters, and parts that train without one.

    Args:
        model: With adapters.
        state: Its weights by name, whole.
        directory: `adapter.safetensors` goes there.
        base: Fingerprint of the checkpoint that the frozen weights come from.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    facts = {"base": base, "scaling": json.dumps(_scaling(model))}
    weights = {name: state[name].detach().cpu().contiguous() for name in names}
    save_file(weights, Path(directory) / ADAPTER_NAME, metadata=facts)


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path, base: str) -> None:
    """Puts saved weights into a model with the same adapters.

    Args:
        model: Its frozen weights are those of `base`.
        directory: Where :func:`save_adapter` wrote.
        base: Fingerprint of the checkpoint that the model was loaded from.

    Raises:
        HandoffError: It belongs to another base, or to other adapters.
    """
    path = Path(directory) / ADAPTER_NAME
    with safe_open(str(path), "pt") as file:
        facts = file.metadata()
    weights = load_file(str(path))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for field, saved, here in (
        ("base", facts["base"], base),
        ("scaling", json.loads(facts["scaling"]), _scaling(model)),
        ("weights", sorted(weights), sorted(trained)),
    ):
        if saved != here:
            raise HandoffError(
                f"{path}: {field}: it was made with {saved!s:.200}, here is {here!s:.200}; load "
                "the checkpoint and the recipe that it was trained with"
            )
    for name, tensor in weights.items():
        trained[name].copy_(tensor)
