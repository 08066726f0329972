"""EfficientNets as `efficientnet_pytorch` and its Lite version name them, as timm's.

They pad as TensorFlow does and have its epsilon, so they are timm's `tf_efficientnet_*`;
`efficientnet_lite0` has the same shapes and computes something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_vlm.interop.certificate import Evidence, features_of, fixed_pixels
from llm2clip_vlm.interop.keys import InteropError, KeyReport
from llm2clip_vlm.models.timm_library import import_timm
from llm2clip_vlm.models.timm_vision import (
    timm_config,
    timm_image_processor,
    tower_of_weights,
)
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.training.export import export_vision_tower

_ARCHITECTURES = tuple(f"tf_efficientnet_lite{size}" for size in range(5))

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_BLOCK = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw"}
_FIRST_BLOCK |= {"_bn2": "bn2"}
"""A block that does not widen its input first."""

_HEAD = "_fc."


def is_efficientnet(names: Iterable[str]) -> bool:
    """Whether weights have these names."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= {*names}


def convert_efficientnet(
    source: Path, folder: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Evidence:
    """Write a tower of timm's, without the classifier.

    Args:
        source: For messages.
        folder: Where to.
        weights: Of the file.
        settings: `image_size` in pixels; the architecture's own where it is absent.

    Returns:
        Pooled features beside those of the package `efficientnet_lite_pytorch`, where that is
        installed.

    Raises:
        InteropError: No architecture has these weights; an unknown setting, or a size that is no
            multiple of the stride.
    """
    if unknown := sorted(settings.keys() - {"image_size"}):
        raise InteropError(f"{source}: --set: expected image_size alone, got {unknown[0]}")
    timm = import_timm()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_HEAD)}
    for architecture in _ARCHITECTURES:
        with torch.device("meta"):
            inner = timm.create_model(architecture, num_classes=0)
        named = _named(kept, inner)
        shapes = {name: tensor.shape for name, tensor in inner.state_dict().items()}
        if {name: tensor.shape for name, tensor in named.items()} == shapes:
            break
    else:
        raise InteropError(
            f"{source}: no EfficientNet-Lite has these {len(kept)} weights and shapes; expected "
            f"one of {', '.join(_ARCHITECTURES)}. Is the file complete?"
        )
    cfg = {k: inner.pretrained_cfg[k] for k in ("input_size", "interpolation")}
    side = settings.get("image_size", cfg["input_size"][-1])
    cfg |= {"input_size": [3, side, side], "crop_pct": 1.0}
    cfg |= {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    config = timm_config({"architecture": architecture, "pretrained_cfg": cfg}, source)
    tensors = {f"timm_model.{name}": tensor for name, tensor in named.items()}
    model = tower_of_weights(config, tensors, source).eval()
    export_vision_tower(model, timm_image_processor(cfg), folder)
    again = load_vision_tower(folder, dtype=torch.float32).model
    pixels = fixed_pixels(side)
    opened, expected = _original(architecture, weights, pixels) or (
        "llm2clip_vlm itself: efficientnet_lite_pytorch cannot be imported",
        features_of(model.float(), pixels)["image_features"],
    )
    report = KeyReport(len(kept), left_out=sorted(weights.keys() - kept.keys()))
    more = {"format": architecture, "keys": report.to_dict()}
    return Evidence(opened, {"image_features": expected}, features_of(again, pixels), more)


def _named(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights under timm's names; its blocks are numbered within their stages."""
    places = [
        (stage, place) for stage, part in enumerate(model.blocks) for place in range(len(part))
    ]
    found = {}
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        if first == "_blocks":
            number, part, rest = rest.split(".", 2)
            if int(number) >= len(places):
                return {}
            widens = f"_blocks.{number}._expand_conv.weight" in weights
            names = _BLOCK if widens else _FIRST_BLOCK
            stage, place = places[int(number)]
            new = f"blocks.{stage}.{place}.{names.get(part, part)}.{rest}"
        else:
            new = f"{_OUTSIDE.get(first, first)}.{rest}"
        found[new] = tensor
    return found


@torch.no_grad()
def _original(
    architecture: str, weights: Mapping[str, Tensor], pixels: Tensor
) -> tuple[str, Tensor] | None:
    """Pooled features of the package that the weights are for; none where it is not installed."""
    try:
        import efficientnet_lite_pytorch as package
    except ImportError:
        return None
    name = architecture.removeprefix("tf_").replace("_", "-")
    model = package.EfficientNet.from_name(name)
    model.load_state_dict(weights)
    maps = model.eval().extract_features(pixels)
    return f"efficientnet_lite_pytorch {package.__version__}", maps.mean((2, 3))
