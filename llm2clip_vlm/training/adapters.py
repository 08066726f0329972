"""LoRA adapters: merged as PEFT would, but in fp32; in a VLM saved with what they belong to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.runs.hashes import HandoffError

ADAPTER_NAME = "adapter.safetensors"


_MERGEABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


@dataclass
class Rounding:
    """Loss of trained change by saving merged weights in fewer bits, over all layers."""

    trained: float = 0.0
    """Squared norm of the change that training made."""
    lost: float = 0.0
    """Squared norm of what rounding adds to it."""
    dtype: torch.dtype = torch.float32
    """Dtype of the saved weights."""

    def saved(self, before: Tensor, merged: Tensor, dtype: torch.dtype) -> Tensor:
        """Round the merged weight as it is saved, and note what that loses."""
        rounded, self.dtype = merged.to(dtype), dtype
        self.trained += float((merged - before.float()).square().sum())
        self.lost += float((rounded.float() - merged).square().sum())
        return rounded

    @property
    def share(self) -> float:
        """Norm of the loss over the norm of the change."""
        return math.sqrt(self.lost / self.trained) if self.trained else 0.0

    def __str__(self) -> str:
        saved = f"adapter merged in float32, saved in {str(self.dtype).removeprefix('torch.')}"
        return f"{saved}: rounding loses {self.share:.1%} of the trained change"


class _Merged(nn.Module):
    """Merges a layer's adapter as PEFT does, with the weights that `functional_call` puts in."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        base: Tensor = self.layer.get_base_layer().weight
        if variant := self.layer.lora_variant.get("default"):  # DoRA
            return variant.merge_safe(self.layer, "default", base)
        return base + self.layer.get_delta_weight("default")


@torch.no_grad()
def _merged_weight(layer: Any, weights: Mapping[str, Tensor]) -> Tensor:
    """An adapted layer's weight, computed in fp32 from its weights by their names in it."""
    own = {
        f"layer.{name}": weight.float()
        for name, weight in weights.items()
        if "lora_" in name or name == "base_layer.weight"
    }
    return functional_call(_Merged(layer), own, ())


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers that adapters change, by name."""
    from peft.tuners.lora import LoraLayer

    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}


def check_adapter(model: nn.Module, targets: str | list[str], key: str) -> None:
    """Refuse an adapter that could not be merged; call it before training.

    Args:
        model: Model with the adapter, and with all that shares weights with it.
        targets: `target_modules` of the recipe.
        key: The adapter's section in the recipe, for messages.

    Raises:
        ValueError: A target is in no layer, or a layer cannot be merged: of another kind, with
            grouped channels, or with a weight that another layer shares.
    """
    layers = _layers(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    absent = [
        target
        for target in ([] if isinstance(targets, str) else targets)
        if not any(f".{name}".endswith(f".{target}") for name in layers)
    ]
    if absent:
        raise ValueError(f"{key}.target_modules: no layer of this part is called {absent}")
    for name, layer in layers.items():
        base, problem = layer.get_base_layer(), ""
        if not isinstance(base, _MERGEABLE):
            problem = f"a {type(base).__name__} cannot be merged"
        elif getattr(base, "groups", 1) > 1:
            problem = "grouped channels cannot be merged"
        elif owners[id(base.weight)] > 1:
            problem = "its weight is another layer's, too (tied embeddings), and merging parts them"
        if problem:
            raise ValueError(f"{key}.target_modules: {name}: {problem}; leave this layer out")


def lora_config(lora: LoraSection, **more: Any) -> Any:
    """Turn a recipe's adapter into PEFT's config.

    Args:
        lora: Rank, scale, dropout, modules, LoRA or DoRA.
        **more: Other fields of `peft.LoraConfig`.
    """
    from peft import LoraConfig

    same = lora.model_dump(exclude={"alpha", "dropout"})
    return LoraConfig(lora_alpha=lora.alpha, lora_dropout=lora.dropout, **same, **more)


def add_lora(module: nn.Module, lora: LoraSection, key: str = "lora") -> Any:
    """Put a LoRA adapter into a module, in place; the other weights are frozen.

    The module keeps its class, so that it is saved and resumed like any other.

    Args:
        module: The module, such as a vision tower.
        lora: Rank, scale, dropout, modules.
        key: The adapter's section in the recipe, for messages.

    Returns:
        PEFT's tuner, whose `merge_and_unload` makes the module a plain one again, in place.

    Raises:
        ValueError: PEFT does not know a target; or see :func:`check_adapter`.
    """
    from peft import LoraModel

    tuner = LoraModel(module, lora_config(lora), "default")
    check_adapter(module, lora.target_modules, key)
    return tuner


def add_adapter(backbone: nn.Module, lora: LoraSection) -> Any:
    """Make a PEFT model of an LLM that trains a LoRA adapter and freezes the rest.

    Args:
        backbone: The decoder.
        lora: Rank, scaling, dropout and the layers to adapt.

    Returns:
        A `peft.PeftModel`; its Trainer checkpoints hold the adapter alone.

    Raises:
        ValueError: See :func:`add_lora`.

    Paper: LLM2CLIP v6 appendix C.1 (r = 16, alpha = 32).
    """
    from peft import TaskType, get_peft_model

    config = lora_config(lora, task_type=TaskType.FEATURE_EXTRACTION)
    model: Any = get_peft_model(backbone, config)
    check_adapter(model, lora.target_modules, "lora")
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether there is an adapter in the model."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def _scaling(model: nn.Module) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in _layers(model).items()}


def merge_adapter(model: Any, dtype: torch.dtype) -> tuple[Any, Rounding]:
    """Merges an adapter in place.

    Args:
        model: PEFT's model or tuner, not split by ZeRO-3; or a model without adapter.
        dtype: Dtype of all weights afterwards.

    Returns:
        The model without adapter, and what rounding lost.
    """
    rounding, layers = Rounding(), _layers(model)
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        merged = _merged_weight(layer, layer.state_dict())
        weight.data = rounding.saved(weight.data, merged, dtype)
    plain = model.unload() if layers else model
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    return plain, rounding


def merged_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    """Adds LoRA adapters to the weights they adapt, by name, without touching the model.

    Works on gathered weights, so it is right under ZeRO-3, too, where the model holds shards.

    Args:
        model: Model with or without adapters.
        state: Its weights by name.
        dtype: Dtype of the floating-point weights in the end. None: each keeps its own.
        rounding: Notes what that loses of the adapters.

    Returns:
        The same weights with the names that the model had before the adapters came.
    """
    found = {
        name.replace(".base_layer.", "."): tensor
        if dtype is None or not tensor.is_floating_point()
        else tensor.to(dtype)
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    for name, layer in _layers(model).items():
        own = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
        before = own["base_layer.weight"]
        merged = _merged_weight(layer, own)
        found[f"{name}.weight"] = (rounding or Rounding()).saved(
            before, merged, dtype or before.dtype
        )
    return found


def unquantized_state(
    model: nn.Module, state: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a model with adapters on four-bit weights, with what those were before.

    Args:
        model: Model with adapters.
        state: Its weights by name.
        whole: Weights of the checkpoint that it was loaded from.

    Returns:
        Weights as :func:`merged_state` takes them.
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
        model: Model with adapters.
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
