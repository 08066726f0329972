"""The layouts that a vision tower comes in, known by their weights' names alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.keys import Row
from llm2clip_vlm.interop.layouts.vits import CLIP_TIMM, EVA02, OPENAI_CLIP, SAME, SIGLIP_TIMM
from llm2clip_vlm.models.loading import read_image_processor
from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig
from llm2clip_vlm.models.vision.resolution import image_processor_class
from llm2clip_vlm.models.vision.timm_vision import timm_image_processor


@dataclass(frozen=True)
class Layout:
    """One way to name a tower's weights."""

    marks: str
    """Names, without `visual.`, that this layout alone has all of; blank-separated."""
    table: tuple[Row, ...]
    """Rows that lead to our names."""
    config: type[PreTrainedConfig]
    """Config of the tower that it becomes."""
    activation: str | None = None
    """The tower's activation, where the layout says it."""


LAYOUTS = {
    "openai_clip": Layout(
        "class_embedding transformer.resblocks.0.attn.in_proj_weight", OPENAI_CLIP, CLIPVisionConfig
    ),
    "eva02": Layout("cls_token blocks.0.attn.inner_attn_ln.weight", EVA02, Eva02VisionConfig),
    "eva02_timm": Layout("cls_token blocks.0.mlp.fc1_g.weight", EVA02, Eva02VisionConfig),
    "clip_timm": Layout(
        "cls_token norm_pre.weight blocks.0.attn.qkv.weight", CLIP_TIMM, CLIPVisionConfig
    ),
    # timm computes GELU exactly where Google's SigLIP approximates it, and LLM2CLIP trained so.
    "siglip_timm": Layout("attn_pool.latent", SIGLIP_TIMM, SiglipVisionConfig, "gelu"),
    "clip_hf": Layout("embeddings.class_embedding pre_layrnorm.weight", SAME, CLIPVisionConfig),
    "siglip_hf": Layout("head.probe", SAME, SiglipVisionConfig, "gelu_pytorch_tanh"),
}
"""Layouts by name; the first that has all its marks is taken."""

_HF_SIZES = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.0.mlp.fc1.weight",
)
_SIZES = {
    "eva02_clip_vision_model": ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.w1.weight"),
    "clip_vision_model": _HF_SIZES,
    "siglip_vision_model": _HF_SIZES,
}
"""Patches, positions and the MLP, in whose shapes the sizes are read."""


def recognise(names: set[str], where: str) -> tuple[str, Layout]:
    """The layout of a tower.

    Args:
        names: Names of the weights, the tower's below `visual.`.
        where: Place that the message names.

    Raises:
        ModelError: None of the layouts.
    """
    for name, layout in LAYOUTS.items():
        if all("visual." + mark in names for mark in layout.marks.split()):
            return name, layout
    raise ModelError(
        f"{where}: no layout of a vision tower or a VLM that is known here; expected the weights "
        f"of one of {', '.join(LAYOUTS)}, LLaVA or llava-hf, got {len(names)} names such as "
        f"{sorted(names)[:3]}"
    )


def tower_config(
    layout: Layout, weights: Mapping[str, Tensor], given: Mapping[str, Any], where: str
) -> PreTrainedConfig:
    """The tower's config from the shapes of its weights.

    Args:
        layout: Layout of the file.
        weights: Weights under our names, below `vision_tower.`.
        given: Values that come from a config beside the file, or from the user; they win.
        where: Place that messages name.

    Raises:
        ModelError: A weight is missing, a given field does not exist, or the activation is known
            to nobody.
    """
    kind = layout.config.model_type
    patch, positions, hidden = _SIZES[kind]
    start = "vision_tower."
    tower = {name[len(start) :]: t for name, t in weights.items() if name.startswith(start)}
    if lacking := [name for name in _SIZES[kind] if name not in tower]:
        raise ModelError(f"{where}: {lacking[0]} is missing; is the file complete?")
    width, channels, side, _ = tower[patch].shape
    numbers = (re.search(r"(?:layers|blocks)\.(\d+)\.", name) for name in tower)
    grid = math.isqrt(tower[positions].shape[-2])
    values: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": len(tower[hidden]),
        "num_hidden_layers": 1 + max(int(number[1]) for number in numbers if number),
        # Published heads are 64 wide up to 16 of them, then wider (So400m 72, ViT-H 80, bigG 104).
        "num_attention_heads": max(min(width // 64, 16), 1),
        "image_size": grid * side,
        "patch_size": side,
        "num_channels": channels,
    }
    if layout.activation is not None:
        values["hidden_act"] = layout.activation
    if unknown := [name for name in given if not hasattr(layout.config(), name)]:
        raise ModelError(f"{where}: {layout.config.__name__} has no field {unknown[0]!r}")
    values |= given
    if layout.config is CLIPVisionConfig and "hidden_act" not in values:
        raise ModelError(
            f"{where}: the file does not say which activation its tower was trained with; add "
            "`--set hidden_act=quick_gelu` (OpenAI, LLM2CLIP, DFN, MetaCLIP) or `hidden_act=gelu` "
            "(LAION, DataComp)"
        )
    return layout.config(**values)


def image_processor(config: Any, folder: Path, beside: Mapping[str, Any]) -> Any:
    """The image processor beside the weights, or the one that towers of this kind have.

    Args:
        config: Config of the tower.
        folder: Where the weights lie.
        beside: What open_clip's or timm's config there says.
    """
    if (folder / "preprocessor_config.json").is_file():
        return read_image_processor(folder)
    side = config.image_size
    given = beside.get("preprocess_cfg") or beside.get("pretrained_cfg") or {}
    if not given and config.model_type == "siglip_vision_model":
        square = {"height": side, "width": side}
        return image_processor_class("SiglipImageProcessor")(size=square, resample=3)
    ours = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "crop_pct": 1.0}
    ours["crop_mode"] = given.get("resize_mode")  # what open_clip calls it
    return timm_image_processor(ours | given | {"input_size": [3, side, side]})
