"""A vision tower for llm2clip_vlm in a package of its own: patches through a stack of MLPs.

Everything that stages 2b, 3 and 4 ask of a tower is here, and nothing else. `pip install` it, write
a checkpoint once (`python -m patch_mlp_tower DIR`), and name that directory in a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class PatchMlpConfig(PreTrainedConfig):
    """The sizes: `image_size` and `patch_size` must be here, in pixels.

    `hidden_size` (the width of `hidden_states`) and `num_hidden_layers` (one less than there are of
    them) are what a LLaVA around the tower reads. Under other names they would be read off a
    forward pass; one that is here must be right.
    """

    model_type = "patch_mlp"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        hidden_size: int = 32,
        num_hidden_layers: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers


class PatchMlp(PreTrainedModel):
    """Patches, `num_hidden_layers` blocks, and the mean of the last states as the pooled output."""

    config_class = PatchMlpConfig
    main_input_name = "pixel_values"
    base_model_prefix = "patch_mlp"

    def __init__(self, config: PatchMlpConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.embed = nn.Conv2d(3, width, patch, patch)
        # One list of blocks: `last_blocks` and `layer_decay` count its items.
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: `[images, 3, image_size, image_size]`.
            output_hidden_states: Give all states, the embeddings first.
            **kwargs: What transformers hands to every model.

        Returns:
            `hidden_states` of one shape, `[images, tokens, hidden_size]`: stages 3 and 4 take
            `vision_feature_layer` of them. Tokens before the patches (CLS, registers) would come
            first. `pooler_output` is what stage 2b projects.
        """
        states = [self.embed(pixel_values).flatten(2).transpose(1, 2)]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean(1),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


# A VLM's checkpoint names its tower by `model_type`: transformers must find the classes.
AutoConfig.register(PatchMlpConfig.model_type, PatchMlpConfig)
AutoModel.register(PatchMlpConfig, PatchMlp)


def load(path: str, dtype: Any) -> PreTrainedModel:
    """The entry point: weights and config of a directory or a hub id.

    Args:
        path: As in a recipe.
        dtype: Of the weights; `"auto"` keeps the checkpoint's.
    """
    tower: PreTrainedModel = PatchMlp.from_pretrained(path, dtype=dtype)
    return tower


def write(directory: str | Path) -> None:
    """Write a checkpoint with new weights, and the image processor that every tower has beside it.

    Args:
        directory: Where to.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = PatchMlpConfig()
    side = {"height": config.image_size, "width": config.image_size}
    PatchMlp(config).save_pretrained(directory)
    CLIPImageProcessorPil(
        size={"shortest_edge": config.image_size}, crop_size=side
    ).save_pretrained(directory)
