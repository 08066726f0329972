"""timm's ViTs and CNNs behind the vision towers' contract; only where `timm` is installed.

`transformers.TimmWrapperModel` gives hidden states as maps without CLS and no `hidden_size`, so no
LLaVA can stand on it, and asks for torchvision. timm's own layout is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file, can_return_tuple

from llm2clip_vlm.hub import ModelError, require_place
from llm2clip_vlm.models.checkpoint_files import WEIGHTS, read_config_file, weights_of_folder
from llm2clip_vlm.models.loading import SAFE, boundary, load_complete
from llm2clip_vlm.models.vision.resolution import image_processor_class
from llm2clip_vlm.models.vision.timm_library import import_timm

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Names in timm to numbers in PIL."""


_NAME = re.compile(r"\w+(\.\w+)?")
"""An architecture with or without a tag; anything else (`hf-hub:...`) would fetch or open files."""

_REFUSED = {"cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg"}
"""Arguments of `timm.create_model` with which it opens files or makes another model."""


class TimmVisionConfig(PreTrainedConfig):
    """Config of :class:`TimmVisionModel`.

    Args:
        architecture: timm's name of the model.
        model_args: Further arguments of `timm.create_model`.
        hidden_size: Width; this and all that follow are read off the model.
        num_hidden_layers: Blocks; stages of a CNN.
        image_size: Side in pixels.
        patch_size: Side of a patch in pixels; in a CNN what one place of its last map stands for.
        has_cls_token: Whether position 0 is a CLS token (there may be registers without one).
        feature_map: Whether it is a CNN: the places of its last map are the tokens, without CLS.
        initializer_range: Standard deviation of the weights of a model from nothing.
    """

    model_type = "timm_vision_model"
    base_config_key = "vision_config"

    architecture: str = "vit_base_patch16_224"
    model_args: dict[str, Any] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    image_size: int = 224
    patch_size: int = 16
    has_cls_token: bool = True
    feature_map: bool = False
    initializer_range: float = 0.02


class TimmVisionModel(PreTrainedModel):
    """A timm ViT (anything with `blocks` of tokens) or CNN without its classifier.

    Args:
        config: Names the model.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such architecture.
    """

    config_class = TimmVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "timm_vision"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: TimmVisionConfig) -> None:
        super().__init__(config)
        size = {} if config.feature_map else {"img_size": config.image_size}
        self.timm_model = create_timm(config.architecture, config.model_args, **size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as transformers; compute rotary tables, which no checkpoint holds, again."""
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether timm computes activations again in the backward pass.

        transformers sets it, also inside of a LLaVA.
        """
        return bool(getattr(self.timm_model, "grad_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.timm_model.set_grad_checkpointing(enable)

    def parameter_stages(self) -> tuple[dict[str, int], int]:
        """Stage of each parameter of a CNN: 0 the stem, 1 the first stage, ...

        Returns:
            Name to stage, and their number; what timm puts after the last has one more.
        """
        stages, number = _stages(self.timm_model)
        return {f"timm_model.{name}": stage for name, stage in stages.items()}, number

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: Images of the config's size.
            output_hidden_states: Also return what enters the first block and leaves every block;
                of a CNN, whose maps before the last have other shapes, its last map alone.
            kwargs: Not used; transformers passes options of other models.
        """
        wanted = output_hidden_states is not None and output_hidden_states is not False
        pixel_values = pixel_values.to(self.dtype)
        if self.config.feature_map:
            # With this layout of the input alone, convolutions take it throughout: measured on a
            # CPU, EfficientNet-Lite0 trains 1.9 times faster, and no faster if weights have it too.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            maps = self.timm_model.forward_features(pixel_values)
            tokens = rearrange(maps, "b d y x -> b (y x) d")
            return BaseModelOutputWithPooling(
                last_hidden_state=tokens,
                pooler_output=self.timm_model.forward_head(maps),
                hidden_states=(tokens,) if wanted else None,
            )
        states: list[Tensor] = []
        with ExitStack() as hooks:
            if wanted:
                blocks = self.timm_model.blocks
                keep = blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
                hooks.enter_context(keep)
                for block in blocks:
                    keep = block.register_forward_hook(lambda _, args, out: states.append(out))
                    hooks.enter_context(keep)
            last = self.timm_model.forward_features(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.timm_model.forward_head(last),
            hidden_states=tuple(states) or None,
        )


def _stages(model: Any) -> tuple[dict[str, int], int]:
    """Stage of each parameter as timm's own matcher groups them, and the number of stages."""
    names = [*(name for name, _ in model.named_parameters()), "~"]
    stand_in = SimpleNamespace(named_parameters=lambda: zip(names, names, strict=True))
    matcher = model.group_matcher(coarse=True)
    stages = import_timm().models.group_parameters(stand_in, matcher, reverse=True)
    behind = stages.pop("~")  # matches nothing, as what follows the last stage
    return stages, behind - 1


def create_timm(architecture: str, given: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """Create a model of timm without classifier and without pretrained weights.

    Args:
        architecture: Name in timm.
        given: Arguments of `timm.create_model`, as a checkpoint's config has them.
        more: More arguments.

    Raises:
        ImportError: timm is not installed.
        ValueError: There is no model of this name, or an argument would make it open files.
    """
    timm = import_timm()
    if not (_NAME.fullmatch(architecture) and timm.is_model(architecture)):
        raise ValueError(
            f"architecture: timm {timm.__version__} has no {architecture!r}; expected one of "
            "timm.list_models(), in the config.json of the checkpoint"
        )
    arguments = {**(given or {}), **more, "num_classes": 0}
    if refused := sorted(_REFUSED & arguments.keys()):
        raise ValueError(f"model_args: {refused[0]!r} is no part of an architecture; take it out")
    return timm.create_model(architecture, **arguments)


def read_timm_layout(path: str) -> dict[str, Any] | None:
    """Read the `config.json` of a checkpoint in timm's layout. None: it has another layout.

    Args:
        path: Directory or hub id.

    Raises:
        ModelError: There is no such place, or a local config.json is damaged.
    """
    if (Path(path) / "config.json").exists():
        written = read_config_file(Path(path))
    else:
        require_place(path)
        try:
            written = PreTrainedConfig.get_config_dict(path, **SAFE)[0]
        except (OSError, ValueError):
            return None  # the next reader says what is wrong
    return written if {"architecture", "pretrained_cfg"} <= written.keys() else None


def timm_config(written: Mapping[str, Any], path: str | Path) -> TimmVisionConfig:
    """Read the config of a checkpoint in timm's layout off timm's model of it.

    Args:
        written: Content of config.json: `architecture`, `pretrained_cfg` and perhaps `model_args`.
        path: Path that messages name.

    Raises:
        ModelError: Neither a ViT nor a CNN whose last map can be the tokens.
    """
    values = {"architecture": written["architecture"], "model_args": written.get("model_args")}
    with torch.device("meta"), boundary(f"{path}: timm cannot build it"):
        inner = create_timm(values["architecture"], values["model_args"])
    if hasattr(inner, "blocks") and hasattr(inner, "patch_embed"):
        sides = (*inner.patch_embed.img_size, *inner.patch_embed.patch_size)
        if sides[::2] != sides[1::2]:
            raise ModelError(
                f"{path}: {values['architecture']} takes images of {sides[0]}x{sides[1]} px in "
                f"patches of {sides[2]}x{sides[3]} px, expected squares: places are a square grid"
            )
        return TimmVisionConfig(
            **values,
            hidden_size=inner.embed_dim,
            num_hidden_layers=len(inner.blocks),
            image_size=sides[0],
            patch_size=sides[2],
            has_cls_token=getattr(inner, "cls_token", None) is not None,
        )
    side = written["pretrained_cfg"]["input_size"][-1]
    with torch.no_grad():
        maps = inner.eval().forward_features(torch.empty(1, 3, side, side, device="meta"))
        pooled = inner.forward_head(maps) if maps.ndim == 4 else maps
    width, stride = inner.num_features, inner.feature_info[-1]["reduction"]
    rows = side // stride
    if side % stride or maps.shape != (1, width, rows, rows) or pooled.shape != (1, width):
        raise ModelError(
            f"{path}: {values['architecture']} makes {tuple(maps.shape)} of a {side} px image and "
            f"{tuple(pooled.shape)} pooled; expected blocks of tokens (a ViT), or a map "
            f"[1, {width}, {rows}, {rows}] that is pooled to the same width (a CNN), of an image "
            "whose size is a multiple of the stride"
        )
    return TimmVisionConfig(
        **values,
        hidden_size=width,
        num_hidden_layers=_stages(inner)[1],
        image_size=side,
        patch_size=stride,
        has_cls_token=False,
        feature_map=True,
    )


def from_timm_layout(written: Mapping[str, Any], path: str, dtype: Any) -> TimmVisionModel:
    """Load a checkpoint in timm's layout as a tower.

    Args:
        written: The checkpoint's config.json, see :func:`read_timm_layout`.
        path: Directory or hub id.
        dtype: See transformers.

    Returns:
        The tower.

    Raises:
        ModelError: See :func:`timm_config`; weights are missing or unknown.
    """
    config = timm_config(written, path)
    if Path(path).is_dir():
        weights_of_folder(Path(path), written)  # whole, and floats
    with boundary(f"{path}: no readable {WEIGHTS}"):
        given = load_file(str(cached_file(path, WEIGHTS)))
    heads = written["pretrained_cfg"].get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    named = {f"timm_model.{n.removeprefix('timm_model.')}": tensor for n, tensor in given.items()}
    left_out = tuple(f"timm_model.{head}." for head in heads)
    weights = {name: t for name, t in named.items() if not name.startswith(left_out)}
    return tower_of_weights(config, weights, path, dtype)


def tower_of_weights(
    config: TimmVisionConfig, weights: Mapping[str, Tensor], path: str | Path, dtype: Any = "auto"
) -> TimmVisionModel:
    """Make a tower of the weights at hand, all of them and no others.

    Args:
        config: Config of the tower.
        weights: Weights by the tower's names.
        path: Path that messages name.
        dtype: Dtype of the tower; `auto` = that of the weights.

    Raises:
        ModelError: Weights are missing, unknown, or of another shape.
    """
    if dtype == "auto":
        dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    return load_complete(
        TimmVisionModel, path, config=config, state_dict=dict(weights), dtype=dtype
    )


def timm_image_processor(given: Mapping[str, Any]) -> Any:
    """The evaluation preprocessing of timm as a transformers image processor.

    Args:
        given: `pretrained_cfg` of timm.

    Raises:
        ModelError: A way to crop that transformers has not.
    """
    side, mode = given["input_size"][-1], given.get("crop_mode") or "center"
    if mode not in ("center", "shortest", "squash"):
        raise ModelError(f"crop_mode or resize_mode {mode!r}: expected center, shortest or squash")
    squash = mode == "squash"
    scaled = math.floor(side / (given.get("crop_pct") or 0.875))  # as timm rounds
    return image_processor_class("CLIPImageProcessor")(
        size={"height": scaled, "width": scaled} if squash else {"shortest_edge": scaled},
        crop_size={"height": side, "width": side},
        do_center_crop=not squash or scaled != side,
        resample=RESAMPLE[given.get("interpolation", "bicubic")],
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
    )
