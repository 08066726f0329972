"""The model of stage 2: a vision tower and a text adaptor that meet in one space."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.losses.contrastive import contrastive_loss, sigmoid_loss
from llm2clip_vlm.models.loading import load_complete, to_dtype
from llm2clip_vlm.models.text.text_adaptor import TextAdaptor
from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig, Eva02VisionModel
from llm2clip_vlm.models.vision.timm_vision import TimmVisionConfig, TimmVisionModel

logger = logging.getLogger(__name__)

TOWER_ENTRY_POINTS = "llm2clip_vlm.vision_towers"
"""Entry-point group of other packages' vision towers."""


class LLM2CLIPConfig(PreTrainedConfig):
    """Config of :class:`LLM2CLIPModel`, saved with the weights.

    Args:
        vision_config: Config of the vision tower: a transformers vision config, or its mapping
            with `model_type` (`clip_vision_model` where absent).
        text_embed_dim: Width of the text encoder's embeddings.
        projection_dim: Width of the joint space. Paper v6: 1280.
        projection_bias: Whether the image head has a bias (that of the released EVA02 towers has).
        adaptor_num_blocks: Residual blocks of the text adaptor. Paper v6: 4.
        adaptor_expansion: Hidden width of a block over the width of its input.
        logit_scale_init_value: Stored logarithm at the start, ln(1/0.07).
        logit_bias_init_value: Bias of the sigmoid loss at the start. None: softmax loss, no bias.
    """

    model_type = "llm2clip"
    sub_configs = {"vision_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_embed_dim: int = 2048
    projection_dim: int = 1280
    projection_bias: bool = False
    adaptor_num_blocks: int = 4
    adaptor_expansion: int = 2
    logit_scale_init_value: float = 2.6592
    logit_bias_init_value: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        register()  # only this package may know a tower's `model_type`
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig()
        elif isinstance(self.vision_config, dict):
            values = {"model_type": "clip_vision_model"} | self.vision_config
            self.vision_config = AutoConfig.for_model(**values)
        super().__post_init__(**kwargs)


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """Output of :class:`LLM2CLIPModel`."""

    loss: Tensor | None = None
    """Contrastive loss within this process's batch, where `return_loss` was asked for."""
    image_embeds: Tensor | None = None
    """`[b, projection_dim]`, unit norm."""
    text_embeds: Tensor | None = None
    """`[b, projection_dim]`, unit norm."""
    logit_scale: Tensor | None = None
    """Scalar, exponentiated."""
    logit_bias: Tensor | None = None
    """Scalar. None: the model was made for the softmax loss."""


class LLM2CLIPModel(PreTrainedModel):
    """Vision tower with a linear head, against the text adaptor on cached caption embeddings.

    The image side pools as the tower does (CLIP: CLS after `post_layernorm`; SigLIP: its attention
    pooling head) and projects, without bias unless the config says so. The text encoder itself is
    not part of the model: its embeddings are the input.

    Args:
        config: Sizes and the tower's config.

    Raises:
        ValueError: The tower has no pooled output.

    Paper: LLM2CLIP v6 section 3.2.
    """

    config_class = LLM2CLIPConfig
    main_input_name = "pixel_values"
    base_model_prefix = "llm2clip"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        vision_config: Any = config.vision_config
        if getattr(vision_config, "vision_use_head", True) is False:
            raise ValueError(
                f"the vision tower ({vision_config.model_type}) was saved without its pooling head "
                "(vision_use_head: false), so images have no embedding; use the full tower"
            )
        self.vision_tower = AutoModel.from_config(vision_config)
        self.visual_projection = nn.Linear(
            vision_config.hidden_size, config.projection_dim, bias=config.projection_bias
        )
        self.text_adaptor = TextAdaptor(
            config.text_embed_dim,
            config.projection_dim,
            num_blocks=config.adaptor_num_blocks,
            expansion=config.adaptor_expansion,
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.post_init()

    @classmethod
    def from_vision_tower(
        cls, tower: PreTrainedModel, *, text_embed_dim: int, **config: Any
    ) -> LLM2CLIPModel:
        """Build a model around a pretrained tower, with a new image head and a new adaptor.

        Args:
            tower: Copied, not shared.
            text_embed_dim: Width of the text encoder's embeddings.
            **config: Other fields of :class:`LLM2CLIPConfig`.

        Returns:
            The model, in the tower's dtype.
        """
        vision_config = copy.deepcopy(tower.config)
        vision_config._name_or_path = ""  # a path on this machine, which the config would keep
        config |= {"vision_config": vision_config, "text_embed_dim": text_embed_dim}
        model: Any = cls(LLM2CLIPConfig(**config))
        model.vision_tower.load_state_dict(tower.state_dict())
        return to_dtype(model, tower.dtype)

    @torch.no_grad()
    def take_heads(self, folder: str | Path) -> None:
        """Take over another model's adaptor, projections and scale; the tower stays.

        Args:
            folder: Folder of an `LLM2CLIPModel`.

        Raises:
            ValueError: The other model's heads have other shapes.
        """
        given = load_complete(type(self), str(folder), dtype=self.dtype).state_dict()
        theirs = {name.removeprefix("vision_tower."): tensor for name, tensor in given.items()}
        warn_of_other_tower(self.vision_tower, theirs, f"heads_from: {folder}")
        own = self.state_dict()
        heads = {name: own[name] for name in own if not name.startswith("vision_tower.")}
        for name, tensor in heads.items():
            if name not in given or given[name].shape != tensor.shape:
                got = tuple(given[name].shape) if name in given else "none"
                raise ValueError(
                    f"{folder}: {name}: expected {tuple(tensor.shape)}, got {got}; give this run "
                    "the text_adaptor, projection_dim, loss and text encoder that it was made with"
                )
            tensor.copy_(given[name])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Image head: normal, std `width**-0.5` (OpenAI's `proj`); adaptor: torch's defaults."""
        if module is self.visual_projection:
            init.normal_(module.weight, std=module.in_features**-0.5)

    def get_image_features(
        self, pixel_values: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b projection"]:
        """Image embeddings.

        Args:
            pixel_values: Result of the tower's image processor.

        Returns:
            `[b, projection_dim]`, unit norm.

        Raises:
            ModelError: The tower gives no pooled output of its width.
        """
        pooled = getattr(self.vision_tower(pixel_values=pixel_values), "pooler_output", None)
        width = self.visual_projection.in_features
        if pooled is None or pooled.shape[1:] != (width,):
            raise ModelError(
                f"{type(self.vision_tower).__name__}: expected pooler_output [images, {width}] for "
                f"image embeddings, got {None if pooled is None else list(pooled.shape)}"
            )
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def get_text_features(
        self, text_features: Float[Tensor, "b text"]
    ) -> Float[Tensor, "b projection"]:
        """Text embeddings.

        Args:
            text_features: Caption embeddings of the text encoder, any norm and floating dtype.

        Returns:
            `[b, projection_dim]`, unit norm.
        """
        return F.normalize(self.text_adaptor(text_features), dim=-1)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        text_features: Float[Tensor, "n text"] | None = None,
        return_loss: bool = False,
        **tokens: Tensor,
    ) -> LLM2CLIPOutput:
        """Both embeddings of a batch of pairs.

        Args:
            pixel_values: Images.
            text_features: Caption embeddings, as many for each image. None: tokens are given.
            return_loss: Also compute the loss within this batch; nothing is gathered (the trainer
                does that).
            **tokens: Arguments of `self.text_encoder`, where it trains inside the model (stage 2b's
                `text_in_loop`); it is not exported.

        Returns:
            Embeddings, the exponentiated scale and, if asked for, the loss.
        """
        image_embeds = self.get_image_features(pixel_values)
        if text_features is None:
            text_encoder: Any = self.text_encoder
            text_features = text_encoder.by_length(**tokens)
        text_embeds = self.get_text_features(text_features)
        logit_scale = self.logit_scale.exp()
        embeds = (image_embeds, text_embeds, logit_scale)
        bias, loss = self.logit_bias, None
        if return_loss:
            loss = contrastive_loss(*embeds) if bias is None else sigmoid_loss(*embeds, bias)
        return LLM2CLIPOutput(
            loss=loss,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            logit_bias=None if bias is None else bias * 1.0,  # no parameter itself leaves the model
        )

    def encoders(
        self, lookup: Callable[[list[str]], Tensor]
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]]:
        """Functions of `pixel_values` and of captions, wherever these lie.

        Args:
            lookup: Captions to the text encoder's embeddings (stage 2a's cache, or the encoder); a
                text encoder that trains inside this model stands in its place.
        """
        own: Any = getattr(self, "text_encoder", None)
        lookup = lookup if own is None else own.encode
        return (
            lambda pixels: self.get_image_features(pixels.to(self.device)),
            lambda texts: self.get_text_features(lookup(texts).to(self.device)),
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but with the names that the model has in memory.

        Args:
            save_directory: Directory to write.
            args: See transformers.
            kwargs: See transformers; `save_original_format` is false unless given.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


def warn_of_other_tower(tower: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Say that a projection was made for another tower, whose images it puts elsewhere.

    Args:
        tower: The tower.
        given: Weights of the one that the projection was trained with.
        source: What the projection is from.
    """
    moved = [
        name
        for name, tensor in tower.state_dict().items()
        if (theirs := given.get(name)) is None
        # Positions that were interpolated have another shape.
        or (theirs.shape == tensor.shape and not torch.equal(theirs.to(tensor), tensor))
    ]
    if moved:
        logger.warning(
            "%s: %d tensors of vision_tower are not those that it was trained with, %s among them; "
            "its projection fits a tower that was trained on from it, and no other one",
            *(source, len(moved), moved[0]),
        )


def register() -> dict[str, Any]:
    """Make `AutoConfig` and `AutoModel` know this package's classes; calling it twice is fine.

    Also imports what other packages offer under the entry points `llm2clip_vlm.vision_towers`: the
    name is a `model_type`, the value a function `(path, dtype) -> PreTrainedModel` in a module that
    registers its own config and model with transformers.

    Returns:
        The other packages' loaders by `model_type`.

    Raises:
        ValueError: Another package's entry point cannot be imported.
    """
    for config_class, model_class in (
        (Eva02VisionConfig, Eva02VisionModel),
        (TimmVisionConfig, TimmVisionModel),
        (LLM2CLIPConfig, LLM2CLIPModel),
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    loaders = {}
    for point in entry_points(group=TOWER_ENTRY_POINTS):
        try:
            loaders[point.name] = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"the vision tower {point.name!r} of another package ({point.value}) cannot be "
                f"imported: {error}. Repair or uninstall that package."
            ) from error
    return loaders
