"""Vision towers: one contract for whatever checkpoint the images go through.

Dispatch is on `config.model_type`, never on a path or a name; what a tower gives is read off a
forward pass without weights or arithmetic, never off its type.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionModel,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VisionTextDualEncoderModel,
)

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel, register
from llm2clip_vlm.models.loading import (
    boundary,
    check_image_processor,
    forget_paths,
    load_complete,
    read_config,
    read_image_processor,
    to_dtype,
)
from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig, Eva02VisionModel
from llm2clip_vlm.models.vision.resolution import (
    image_processor_class,
    resize_positions,
    resize_processor,
)
from llm2clip_vlm.models.vision.timm_vision import (
    TimmVisionConfig,
    from_timm_layout,
    read_timm_layout,
    timm_config,
    timm_image_processor,
)
from llm2clip_vlm.recipe.reading import did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionTower:
    """The contract: what is known of every vision tower."""

    model: PreTrainedModel
    """The plain tower; gives `last_hidden_state`, `hidden_states` and, pooled, `pooler_output`."""
    image_processor: Any
    """The transformers image processor saved with it."""
    hidden_size: int
    """Width of the patch features."""
    num_patches: int
    """Patches of one image, without CLS and register tokens."""
    patch_size_px: int
    """Side of a patch."""
    image_size_px: int
    """Side of an image."""
    num_hidden_layers: int
    """Transformer blocks; `hidden_states` has one more entry. A CNN has its last map there alone,
    so 0."""
    num_prefix_tokens: int
    """Tokens before the patches: CLS, if there is one, then registers."""
    has_cls_token: bool
    """Whether position 0 of the patch features is a CLS token."""
    image_mean: tuple[float, ...]
    """Mean that the image processor subtracts, by channel."""
    image_std: tuple[float, ...]
    """Standard deviation that it divides by."""

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size_px // self.patch_size_px


def _siglip2(path: str, dtype: Any) -> PreTrainedModel:
    """Load SigLIP2's NaFlex tower as a SigLIP, which computes the same at its square grid."""
    naflex = load_complete(Siglip2VisionModel, path, dtype=dtype)
    size = naflex.config.patch_size
    weights = naflex.state_dict()
    name = "embeddings.patch_embedding.weight"
    patches = rearrange(weights[name], "d (y x c) -> d c y x", y=size, x=size)
    weights[name] = patches.contiguous()
    shared = SiglipVisionConfig.__annotations__
    values = {name: value for name, value in naflex.config.to_dict().items() if name in shared}
    config = SiglipVisionConfig(**values, image_size=math.isqrt(naflex.config.num_patches) * size)
    given = {"config": config, "state_dict": weights, "dtype": naflex.dtype}
    return load_complete(SiglipVisionModel, path, **given)


def _part(model_class: Any, name: str, path: str, dtype: Any) -> PreTrainedModel:
    return getattr(load_complete(model_class, path, dtype=dtype), name)


_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Towers that interpolate their positions themselves, to the size of the image they get."""

LOADERS: dict[str, Callable[..., PreTrainedModel]] = {
    "clip": partial(load_complete, CLIPVisionModel),
    "clip_vision_model": partial(load_complete, CLIPVisionModel),
    "siglip": partial(load_complete, SiglipVisionModel),
    "siglip_vision_model": partial(load_complete, SiglipVisionModel),
    "siglip2": _siglip2,
    "siglip2_vision_model": _siglip2,
    **dict.fromkeys(_ANY_SIZE, partial(load_complete, AutoModel)),
    Eva02VisionConfig.model_type: partial(load_complete, Eva02VisionModel),
    TimmVisionConfig.model_type: partial(load_complete, AutoModel),
    "llm2clip": partial(_part, LLM2CLIPModel, "vision_tower"),
    "vision-text-dual-encoder": partial(_part, VisionTextDualEncoderModel, "vision_model"),
}
"""`config.model_type` to loader; other packages add to it, see `models.llm2clip.register`."""

_POSITIONS = (
    *("embeddings.position_embedding.weight", "embeddings.position_embeddings"),
    *("pos_embed", "timm_model.pos_embed"),
)
"""Names of position tables `[..., prefix + grid**2, width]`."""


def load_vision_tower(
    path_or_id: str | Path, dtype: Any = None, *, image_size_px: int | None = None
) -> VisionTower:
    """Load the vision tower of a checkpoint with its image processor.

    Args:
        path_or_id: Directory (of any name) or hub id of a CLIP, SigLIP, SigLIP2, EVA02-CLIP,
            DINOv2, DINOv3 or timm model (ViT or CNN), of an `LLM2CLIPModel`, or of what another
            package adds.
        dtype: Dtype of the weights (`torch.float32`, `"bfloat16"`). None: that of the checkpoint.
        image_size_px: Another resolution: positions are interpolated, the image processor resizes
            to it. A CNN takes any multiple of its stride.

    Returns:
        The tower in evaluation mode, with what is known of it.

    Raises:
        ModelError: Unknown `model_type`, missing weights, no image processor, a processor whose
            images do not have the tower's size, or outputs without what the contract asks for.
    """
    path = str(path_or_id)
    loaders = LOADERS | {name: _other(load) for name, load in register().items()}
    dtype = "auto" if dtype is None else dtype
    if timm := read_timm_layout(path):
        model: PreTrainedModel = from_timm_layout(timm, path, dtype)
        processor = timm_image_processor(timm["pretrained_cfg"])
        check_image_processor(processor, path)
    else:
        if (kind := read_config(path).model_type) not in loaders:
            raise ModelError(
                f"{path}: model_type {kind!r} is not a known vision tower (of a VLM, name the one "
                f"inside){did_you_mean(kind, loaders)} (known are {sorted(loaders)})"
            )
        model = loaders[kind](path, dtype=dtype)
        processor = _load_processor(path, model.config)
    _require_contract(path, model)
    if image_size_px is not None:
        model = _resize(path, model, image_size_px)
        resize_processor(processor, image_size_px)
    forget_paths(model.config)  # a loader of another package may not have done it
    return _describe(path, model.eval(), processor)


def is_feature_map_checkpoint(path_or_id: str | Path) -> bool:
    """Whether a checkpoint is a CNN, as its config says; no weights are read.

    Args:
        path_or_id: What :func:`load_vision_tower` takes.
    """
    path = str(path_or_id)
    register()
    timm = read_timm_layout(path)
    config = timm_config(timm, path) if timm else read_config(path)
    return bool(getattr(config, "feature_map", False))


def _other(load: Callable[[str, Any], Any]) -> Callable[..., PreTrainedModel]:
    """Another package's loader, whose failures are named and which keeps to the dtype."""

    def checked(path: str, dtype: Any) -> PreTrainedModel:
        with boundary(f"{path}: {load.__module__} cannot load it"):
            model = load(path, dtype)
            if not isinstance(model, PreTrainedModel):
                raise TypeError(f"expected a PreTrainedModel, got {type(model).__name__}")
            if dtype != "auto":
                to_dtype(model, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
        return model

    return checked


def _require_contract(path: str, model: Any) -> None:
    """Refuse a tower whose config or registration lacks something; all of it is named."""
    config = model.config
    sizes = {name: getattr(config, name, None) for name in ("image_size", "patch_size")}
    lacks = [
        f"its config has no {name} (in pixels)"
        if size is None
        else f"its config's {name} is {size}, expected one number of pixels"
        for name, size in sizes.items()
        if not isinstance(size, int)
    ]
    if type(config) not in AutoModel._model_mapping:
        lacks.append("AutoConfig and AutoModel do not know its classes, as a VLM's checkpoint asks")
    if lacks:
        raise ModelError(
            f"{path}: {type(model).__name__} lacks what a vision tower needs: {'; '.join(lacks)}. "
            "docs/extend.md has the contract, docs/examples/tower_package a tower"
        )


def _describe(path: str, model: Any, processor: Any) -> VisionTower:
    """Run the tower on shapes alone and read the contract off what comes out."""
    config, patch = model.config, model.config.patch_size
    with boundary(f"{path}: its image processor cannot be used on a picture of 64x48 px"):
        made = processor(images=Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
        height, width = made.shape[-2:]
    flexible = config.model_type in _ANY_SIZE
    size = height if flexible else config.image_size
    if (height, width) != (size, size) or (flexible and size % patch):
        wanted = f"a multiple of its {patch} px patches" if flexible else f"{size} px"
        raise ModelError(
            f"{path}: its image processor makes {width}x{height} px images, the tower expects "
            f"{wanted}, square. Correct `size`/`crop_size` in preprocessor_config.json."
        )
    states = _hidden_states(path, model, size)
    tokens, width = states[-1].shape[1:]
    num_patches = (size // patch) ** 2
    prefix = tokens - num_patches
    if prefix < 0 or any(state.shape[1:] != (tokens, width) for state in states):
        raise ModelError(
            f"{path}: expected hidden states of one shape with at least {num_patches} tokens (an "
            f"image of {size} px in patches of {patch} px), got {[tuple(s.shape) for s in states]}"
        )
    # Fields of the config that a LLaVA around the tower needs.
    for name, read in (("hidden_size", width), ("num_hidden_layers", len(states) - 1)):
        if not hasattr(config, name):
            setattr(config, name, read)
    if config.hidden_size != width:
        raise ModelError(
            f"{path}: its config has hidden_size {config.hidden_size}, its hidden states {width}; "
            "a LLaVA's projector is built from the config: correct it"
        )
    return VisionTower(
        model=model,
        image_processor=processor,
        hidden_size=width,
        num_patches=num_patches,
        patch_size_px=patch,
        image_size_px=size,
        num_hidden_layers=len(states) - 1,
        num_prefix_tokens=prefix,
        has_cls_token=bool(getattr(config, "has_cls_token", prefix > 0)),
        image_mean=tuple(processor.image_mean or ()),
        image_std=tuple(processor.image_std or ()),
    )


def run_on_shapes(tower: Any, size_px: int, **more: Any) -> tuple[dict[str, Tensor], Any]:
    """Run a tower on one image without content, also where ZeRO-3 has left empty shells of weights.

    Args:
        tower: The tower.
        size_px: Side of the image.
        **more: More arguments of its forward pass.

    Returns:
        The stand-ins of its weights by name, on the meta device, which can take gradients; and what
        it makes of the image, hidden states included.
    """
    tensors = {
        name: torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta")
        for name, t in [*tower.named_parameters(), *tower.named_buffers()]
    }
    for name, _ in tower.named_parameters():
        tensors[name].requires_grad_()
    pixels = torch.empty(1, 3, size_px, size_px, dtype=tower.dtype, device="meta")
    arguments = {"pixel_values": pixels, "output_hidden_states": True, **more}
    return tensors, torch.func.functional_call(tower, tensors, (), arguments)


def _hidden_states(path: str, model: Any, size: int) -> tuple[Tensor, ...]:
    """The shapes of the hidden states of one image."""
    with boundary(
        f"{path}: {type(model).__name__} does not take (pixel_values=[1, 3, {size}, {size}], "
        "output_hidden_states=True)"
    ):
        _, out = run_on_shapes(model, size)
    states = getattr(out, "hidden_states", None)
    if not states or any(getattr(state, "ndim", 0) != 3 for state in states):
        raise ModelError(
            f"{path}: {type(model).__name__} gives no hidden_states [images, tokens, width]; a "
            "vision tower needs the embeddings and every block's output there"
        )
    return tuple(states)


def _resize(path: str, model: Any, size: int) -> PreTrainedModel:
    """Adapt a tower to images of another size; a table of positions is interpolated."""
    config = copy.deepcopy(model.config)
    if config.model_type in _ANY_SIZE or size == config.image_size:
        return cast("PreTrainedModel", model)
    if size % config.patch_size:
        raise ModelError(f"image_size_px {size} is no multiple of {path}'s {config.patch_size} px")
    if getattr(config, "feature_map", False):  # takes any multiple of its stride
        model.config.image_size = size
        return cast("PreTrainedModel", model)
    weights = model.state_dict()
    name = next((name for name in _POSITIONS if name in weights), None)
    if name is None or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ModelError(
            f"{path}: cannot be made to take {size} px: "
            + ("it has no table of positions" if name is None else "it is sharded by ZeRO-3")
        )
    old, new = (side // config.patch_size for side in (config.image_size, size))
    weights[name] = resize_positions(weights[name], old, new)
    config.image_size = size
    logger.info("%s: positions interpolated from %d x %d to %d x %d", path, old, old, new, new)
    given = {"config": config, "state_dict": weights, "dtype": model.dtype}
    return load_complete(type(model), path, **given)


def _load_processor(path: str, tower_config: Any) -> Any:
    """Load the image processor; where it makes no square pictures, take one that does."""
    processor = read_image_processor(path)
    if hasattr(processor, "max_num_patches"):
        side = {"height": tower_config.image_size, "width": tower_config.image_size}
        kept = {k: getattr(processor, k) for k in ("resample", "image_mean", "image_std")}
        return image_processor_class("SiglipImageProcessor")(size=side, **kept)
    return processor
