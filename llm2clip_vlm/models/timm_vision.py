"""timm's ViTs behind the vision towers' contract; only where `timm` is installed.

`transformers.TimmWrapperModel` gives hidden states as maps without CLS and no `hidden_size`, so no
LLaVA can stand on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TimmWrapperModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from llm2clip_vlm.models.loading import load_complete
from llm2clip_vlm.models.resolution import image_processor_class

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""timm's names of PIL's numbers."""


class TimmVisionConfig(PreTrainedConfig):
    """Config of :class:`TimmVisionModel`.

    Args:
        architecture: timm's name of the model.
        model_args: Further arguments of `timm.create_model`.
        hidden_size: Width, as all that follow read off the model.
        num_hidden_layers: Blocks.
        image_size: Side in pixels.
        patch_size: Side of a patch in pixels.
        has_cls_token: Whether position 0 is a CLS token (there may be registers without one).
        initializer_range: Std of a model from nothing.
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
    initializer_range: float = 0.02


class TimmVisionModel(PreTrainedModel):
    """A timm ViT (anything with `blocks` of tokens) without its classifier.

    Args:
        config: Which one.

    Raises:
        ImportError: timm is not installed.
    """

    config_class = TimmVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "timm_vision"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: TimmVisionConfig) -> None:
        super().__init__(config)
        import timm

        arguments = dict(config.model_args or {}) | {"img_size": config.image_size}
        self.timm_model = timm.create_model(config.architecture, num_classes=0, **arguments)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers; rotary tables, which no checkpoint holds, are computed again."""
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.timm_model.set_grad_checkpointing(enable)

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
            output_hidden_states: Also return what enters the first block and leaves every block.
            kwargs: Not used; transformers passes options of other models.
        """
        states: list[Tensor] = []
        hooks = []
        if output_hidden_states is not None and output_hidden_states is not False:
            blocks = self.timm_model.blocks
            hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
            hooks += [
                block.register_forward_hook(lambda _, args, out: states.append(out))
                for block in blocks
            ]
        try:
            last = self.timm_model.forward_features(pixel_values.to(self.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.timm_model.forward_head(last),
            hidden_states=tuple(states) or None,
        )


def from_timm_checkpoint(path: str, dtype: Any) -> TimmVisionModel:
    """A checkpoint in timm's own layout (`architecture` in config.json) as a tower.

    Args:
        path: Directory or hub id.
        dtype: As in transformers.

    Returns:
        The tower.

    Raises:
        ValueError: The model is no ViT, or weights are missing.
    """
    wrapper: Any = load_complete(TimmWrapperModel, path, dtype=dtype)
    inner = wrapper.timm_model
    if not (hasattr(inner, "blocks") and hasattr(inner, "patch_embed")):
        raise ValueError(
            f"{path}: {wrapper.config.architecture} has no blocks of tokens; use a ViT"
        )
    config = TimmVisionConfig(
        architecture=wrapper.config.architecture,
        model_args=wrapper.config.model_args,
        hidden_size=inner.embed_dim,
        num_hidden_layers=len(inner.blocks),
        image_size=inner.patch_embed.img_size[0],
        patch_size=inner.patch_embed.patch_size[0],
        has_cls_token=getattr(inner, "cls_token", None) is not None,
    )
    with torch.device("meta"):
        model = TimmVisionModel(config)
    model.timm_model = inner
    return model


def timm_image_processor(given: Mapping[str, Any]) -> Any:
    """The evaluation preprocessing of timm as a transformers image processor.

    Args:
        given: What timm calls `pretrained_cfg`.
    """
    side = given["input_size"][-1]
    squash = given.get("crop_mode") == "squash"
    shortest = round(side / (given.get("crop_pct") or 0.875))
    square = {"height": side, "width": side}
    return image_processor_class("CLIPImageProcessor")(
        size=square if squash else {"shortest_edge": shortest},
        crop_size=square,
        do_center_crop=not squash,
        resample=RESAMPLE[given.get("interpolation", "bicubic")],
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
    )
