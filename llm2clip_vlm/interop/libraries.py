"""Towers as open_clip and timm have them, and opened with those libraries where they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.keys import Row, translate
from llm2clip_vlm.interop.layouts.vits import CLIP_TIMM, EVA02_TIMM, OPENAI_CLIP, SIGLIP_TIMM
from llm2clip_vlm.models.vision.timm_library import import_timm, torchvision_stub

_TIMM: dict[str, tuple[tuple[Row, ...], str, tuple[str, int, int]]] = {
    "clip_vision_model": (CLIP_TIMM, "vit_{}_patch{}_clip_{}", ("large", 14, 336)),
    "siglip_vision_model": (SIGLIP_TIMM, "vit_{}_patch{}_siglip_{}", ("so400m", 14, 224)),
    "eva02_clip_vision_model": (EVA02_TIMM, "eva02_{}_patch{}_clip_{}", ("large", 14, 336)),
}
"""Tower to its table, timm's name of a published size, and the size that stands for any other."""

_SIZES = {768: "base", 1024: "large", 1152: "so400m"}
"""What timm calls a width."""

_PUBLISHED = re.compile(
    r"vit_base_patch(16|32)_clip_224|vit_large_patch14_clip_(224|336)"
    r"|vit_base_patch16_siglip_(224|256|384|512)|vit_base_patch32_siglip_256"
    r"|vit_large_patch16_siglip_(256|384|512)"
    r"|vit_so400m_patch(14_siglip_(224|378|384)|16_siglip_(256|384|512))"
    r"|eva02_base_patch16_clip_224|eva02_large_patch14_clip_(224|336)"
)
"""The sizes that have a name of their own in timm."""


def timm_table(config: Any) -> tuple[Row, ...]:
    """The table between timm's names and a tower's.

    Args:
        config: Config of the tower.

    Raises:
        ModelError: timm has no such tower, or it is not known here under which names.
    """
    if config.model_type not in _TIMM:
        raise ModelError(
            f"model_type {config.model_type!r} has no names in open_clip and timm here; expected "
            f"one of {', '.join(_TIMM)}. `--to transformers` takes any tower"
        )
    return _TIMM[config.model_type][0]


def timm_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    """Timm's name of a tower, and the arguments of `timm.create_model` that make it so.

    Args:
        config: Config of the tower.
    """
    _, form, default = _TIMM[config.model_type]
    width, patch, side = config.hidden_size, config.patch_size, config.image_size
    name = form.format(_SIZES.get(width), patch, side)
    name = name if _PUBLISHED.fullmatch(name) else form.format(*default)
    values = {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _mlp_ratio(config),
    }
    if (activation := getattr(config, "hidden_act", None)) == "quick_gelu":
        name = name.replace("_clip_", "_clip_quickgelu_")
    elif activation is not None:  # whatever the name stands for
        values["act_layer"] = "gelu_tanh" if activation == "gelu_pytorch_tanh" else "gelu"
    if config.model_type == "eva02_clip_vision_model":
        values["ref_feat_shape"] = [config.rope_grid, config.rope_grid]
    return name, values


def timm_weights(tower: nn.Module) -> dict[str, Tensor]:
    """A tower's weights as `timm.create_model(..., num_classes=0)` takes them.

    Args:
        tower: A CLIP, SigLIP or EVA02 tower.
    """
    return _back(tower, None, timm_table(tower.config))


def open_clip_weights(tower: nn.Module, head: nn.Linear | None) -> dict[str, Tensor]:
    """A tower's weights as open_clip's `model.visual` takes them.

    Args:
        tower: A CLIP, SigLIP or EVA02 tower.
        head: The image head; none for a tower alone, which gets the identity where open_clip
            cannot do without.
    """
    config: Any = tower.config
    if config.model_type == "clip_vision_model":
        found = _back(tower, head, OPENAI_CLIP)
        return {"proj": torch.eye(config.hidden_size).to(found["conv1.weight"])} | found
    weights = _back(tower, _projecting(head), timm_table(config))
    found = {f"trunk.{name}": weight for name, weight in weights.items()}
    if (weight := found.get("trunk.head.weight")) is None:
        return found
    if config.model_type == "siglip_vision_model":
        del found["trunk.head.weight"]
        return found | {"head.proj.weight": weight}
    return {"trunk.head.bias": torch.zeros(len(weight))} | found


def open_clip_config(config: Any, head: nn.Linear | None) -> dict[str, Any]:
    """open_clip's `open_clip_config.json`; there is no text tower.

    Args:
        config: Config of a CLIP, SigLIP or EVA02 tower.
        head: See :func:`open_clip_weights`.

    Raises:
        ModelError: It has other heads than timm's tower of that name, which open_clip would build.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    vision: dict[str, Any] = {"image_size": config.image_size}
    if config.model_type == "clip_vision_model":
        vision |= {
            "layers": config.num_hidden_layers,
            "width": width,
            "head_width": width // heads,
            "patch_size": config.patch_size,
            "mlp_ratio": _mlp_ratio(config),
        }
    else:
        siglip, plain = config.model_type == "siglip_vision_model", _projecting(head) is None
        name, rope = timm_arguments(config)[0], getattr(config, "rope_grid", 16)
        if width in _SIZES and (heads, rope) != (min(width // 64, 16), 16):
            raise ModelError(
                f"open_clip builds {name} by its name alone: expected {min(width // 64, 16)} heads "
                f"and a rope_grid of 16, got {heads} and {rope}; `--to timm` keeps them"
            )
        vision |= {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map" if siglip else "token",
            "timm_proj": "none" if plain else "linear" if siglip else None,
        }
    return {
        "embed_dim": width if head is None else head.out_features,
        "vision_cfg": vision,
        "quick_gelu": getattr(config, "hidden_act", None) == "quick_gelu",
    }


@torch.no_grad()
def library_features(
    library: str, weights: Mapping[str, Tensor], config: Any, pixels: Tensor
) -> tuple[str, Tensor] | None:
    """Pooled features of exported weights, computed by the library they are for.

    The weights must load strictly.

    Args:
        library: `open_clip` or `timm`.
        weights: Result of :func:`open_clip_weights` or :func:`timm_weights`.
        config: Config of the tower.
        pixels: `[b, 3, s, s]`.

    Returns:
        The library with its version, and the features. None: it is not installed.
    """
    weights = {name: tensor.float() for name, tensor in weights.items()}
    try:
        timm = import_timm()
        if library == "open_clip":
            with torchvision_stub():
                import open_clip
    except ImportError:
        return None
    projection = None
    if library == "open_clip" and config.model_type == "clip_vision_model":
        made = open_clip_config(config, None) | {"embed_dim": weights["proj"].shape[1]}
        model: Any = open_clip.model._build_vision_tower(**made)
    else:
        # open_clip's own wrapper builds only published sizes; its `trunk` is timm's model.
        projection = weights.pop("head.proj.weight", None)
        weights = {name.removeprefix("trunk."): tensor for name, tensor in weights.items()}
        name, values = timm_arguments(config)
        head = weights.get("head.weight")
        model = timm.create_model(name, num_classes=0 if head is None else len(head), **values)
    model.load_state_dict(weights, strict=True)
    features = model.eval()(pixels)
    features = features if projection is None else features @ projection.T
    used = open_clip if library == "open_clip" else timm
    return f"{library} {used.__version__}", features


def _mlp_ratio(config: Any) -> float:
    return float((config.intermediate_size + 0.5) / config.hidden_size)  # both round down


def _back(tower: nn.Module, head: nn.Linear | None, table: tuple[Row, ...]) -> dict[str, Tensor]:
    ours = {f"vision_tower.{name}": tensor.detach() for name, tensor in tower.state_dict().items()}
    if head is not None:
        ours |= {f"visual_projection.{name}": t.detach() for name, t in head.state_dict().items()}
    found, unknown = translate(ours, table, back=True)
    assert not unknown, f"the table has no {unknown[0]}"
    return {name.removeprefix("visual."): t.contiguous() for name, t in found.items()}


def _projecting(head: nn.Linear | None) -> nn.Linear | None:
    """The head. None: it changes nothing (SigLIP2's in LLM2CLIP)."""
    if head is None or "bias" in head.state_dict() or head.in_features != head.out_features:
        return head
    return None if torch.equal(head.weight.float(), torch.eye(head.in_features)) else head
