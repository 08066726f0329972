"""Convolutional nets that timm builds: the ConvNeXts of open_clip, and EfficientNet-Lite.

`efficientnet_lite_pytorch` pads as TensorFlow does and has its epsilon, so its weights are timm's
`tf_efficientnet_lite*`; `efficientnet_lite0` has the same shapes and computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, features_of
from llm2clip_vlm.interop.keys import KeyReport
from llm2clip_vlm.interop.layouts import official
from llm2clip_vlm.interop.layouts.tables import image_processor
from llm2clip_vlm.models.equal import fixed_pixels
from llm2clip_vlm.models.vision.timm_library import import_timm
from llm2clip_vlm.models.vision.timm_vision import create_timm, timm_config, tower_of_weights
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.training.export import export_vision_tower

_LITE = tuple(f"tf_efficientnet_lite{size}" for size in range(5))
_CONVNEXT = tuple(f"convnext_{size}" for size in "tiny small base large xlarge xxlarge".split())
_MARKS = {"visual._conv_stem.weight": _LITE, "visual.stages.0.blocks.0.conv_dw.weight": _CONVNEXT}
"""A weight's name to the architectures that have it; the first with all shapes is taken."""

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_BLOCK = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
_FIRST_BLOCK = {
    **{"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
}
"""A block that does not widen its input first."""

_HEADS = re.compile(r"visual\.(_fc|classifier|fc|head|head\.fc|head\.mlp\.fc\d)\.(weight|bias)")
"""Classifiers and projections, which a tower alone has not."""

_LITE_IMAGES = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}


def is_cnn(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether weights are a net's that is known here, or one whose architecture the user names."""
    return "architecture" in settings or bool(official.canonical(weights).keys() & _MARKS.keys())


def convert_cnn(
    source: Path,
    folder: Path,
    weights: Mapping[str, Tensor],
    beside: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Evidence:
    """Write a tower of timm's, without classifier or projection.

    Args:
        source: Place that messages name, where an image processor may lie.
        folder: Folder to write.
        weights: Weights of the file.
        beside: What open_clip's config there says.
        settings: `image_size` in pixels, `architecture` in timm's words; else what the config
            beside says, or what has the weights' shapes and its own size.

    Returns:
        Pooled features, beside those of the library that the weights are for.

    Raises:
        ModelError: No architecture has these weights, an unknown setting, or a size that is no
            multiple of the stride.
    """
    if unknown := sorted(settings.keys() - {"image_size", "architecture"}):
        raise ModelError(
            f"{source}: --set: expected image_size or architecture of a CNN, got {unknown[0]}"
        )
    vision = beside.get("model_cfg", {}).get("vision_cfg", {})
    found = official.canonical(weights)
    named = settings.get("architecture", vision.get("timm_model_name"))
    mark = next((mark for mark in _MARKS if mark in found), None)
    candidates = (named,) if named else _MARKS[str(mark)]
    other = official.LEFT_OUT_OF_A_TOWER
    left = [name for name in found if _HEADS.fullmatch(name) or re.fullmatch(other, name)]
    kept = {name: tensor for name, tensor in found.items() if name not in left}
    for architecture in candidates:
        with torch.device("meta"):
            inner = create_timm(architecture)
        tensors = _named(kept, inner)
        want = {name: tensor.shape for name, tensor in inner.state_dict().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} == want:
            break
    else:
        odd = sorted(tensors.keys() ^ want.keys())[:3]
        raise ModelError(
            f"{source}: {len(kept)} weights do not fit timm's {' or '.join(candidates)} (of the "
            f"last: {odd or 'shapes'}). Is the file complete? Another net: --set architecture=NAME"
        )
    cfg = dict(inner.pretrained_cfg)
    side = settings.get("image_size", vision.get("image_size", cfg["input_size"][-1]))
    written = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, side, side]}}
    config = timm_config(written, source)
    inside = {f"timm_model.{name}": tensor for name, tensor in tensors.items()}
    model = tower_of_weights(config, inside, source)
    if architecture in _LITE:
        beside = {"pretrained_cfg": _LITE_IMAGES | {"interpolation": "bicubic"}}
    place = source if source.is_dir() else source.parent
    export_vision_tower(model, image_processor(config, place, beside), folder)
    again = load_vision_tower(folder, dtype=torch.float32).model
    pixels = fixed_pixels(side)
    opened, expected = _reference(architecture, weights, tensors, pixels)
    report = KeyReport(len(kept), left_out=sorted(left))
    more = {"format": architecture, "keys": report.to_dict()}
    return Evidence(opened, {"image_features": expected}, features_of(again, pixels), more)


def _named(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights under timm's names; EfficientNet's blocks are numbered within their stages."""
    blocks = getattr(model, "blocks", ())
    places = [(at, place) for at, stage in enumerate(blocks) for place in range(len(stage))]
    found = {}
    for name, tensor in weights.items():
        first, _, rest = name.removeprefix("visual.").partition(".")
        number, _, inside = rest.partition(".")
        if first == "_blocks" and int(number) < len(places):
            widens = f"visual._blocks.{number}._expand_conv.weight" in weights
            part, _, rest = inside.partition(".")
            stage, place = places[int(number)]
            new = (_BLOCK if widens else _FIRST_BLOCK).get(part, part)
            first = f"blocks.{stage}.{place}.{new}"
        found[f"{_OUTSIDE.get(first, first)}.{rest}"] = tensor
    return found


@torch.no_grad()
def _reference(
    architecture: str, weights: Mapping[str, Tensor], named: Mapping[str, Tensor], pixels: Tensor
) -> tuple[str, Tensor]:
    """Pooled features of the package that the weights are for, where it is installed; else timm."""
    if architecture in _LITE:
        with suppress(ImportError):
            import efficientnet_lite_pytorch as package

            name = architecture.removeprefix("tf_").replace("_", "-")
            theirs: Any = package.EfficientNet.from_name(name)
            theirs.load_state_dict(weights)
            maps = theirs.eval().extract_features(pixels)
            return f"efficientnet_lite_pytorch {package.__version__}", maps.mean((2, 3))
    model = create_timm(architecture)
    model.load_state_dict(named, strict=True)
    return f"timm {import_timm().__version__}", model.eval()(pixels)
