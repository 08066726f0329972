"""EVA02-CLIP's vision tower: a ViT with 2-D rotary positions, SwiGLU and sub-LayerNorm.

Written from the published definition (EVA-02, 2303.11331; EVA-CLIP, 2303.15389); weights have the
names of LLM2CLIP's files; `llm2clip-vlm convert` reads the others.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple


class Eva02VisionConfig(PreTrainedConfig):
    """Config of :class:`Eva02VisionModel`; the defaults are EVA02-CLIP-L/14-336.

    Args:
        hidden_size: Width (B/16: 768).
        intermediate_size: Hidden width of SwiGLU, `int(width * 2.6667)` (B/16: 2048).
        num_hidden_layers: Blocks (B/16: 12).
        num_attention_heads: Heads of 64 (B/16: 12).
        image_size: Side in pixels.
        patch_size: Side of a patch in pixels.
        num_channels: Channels of an image.
        layer_norm_eps: Epsilon of every LayerNorm (the official code without apex: 1e-6).
        rope_theta: Base of the rotary frequencies.
        rope_grid: Grid side that rotary positions are scaled to: at any resolution the first patch
            is at 0 and the step `rope_grid / grid` (published: 16 = 224 / 14).
        initializer_range: Standard deviation of the weights of a model from nothing.
    """

    model_type = "eva02_clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 2730
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_grid: int = 16
    initializer_range: float = 0.02


def rope_tables(config: Eva02VisionConfig, device: Any = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the patches' rotary angles; half of a head turns with y, half with x.

    Args:
        config: Grid and head size are read.
        device: Where the tables go.

    Returns:
        Two tensors `[patches, head_dim]` in fp32.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    grid = config.image_size // config.patch_size
    exponents = torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2)
    positions = torch.arange(grid, device=device) / grid * config.rope_grid
    angles = positions[:, None] * config.rope_theta**-exponents
    # Two neighbouring channels turn by one angle.
    rows = repeat(angles, "y d -> (y x) (d pair)", x=grid, pair=2)
    columns = repeat(angles, "x d -> (y x) (d pair)", y=grid, pair=2)
    both = torch.cat([rows, columns], dim=-1)
    return both.cos(), both.sin()


def rotate(
    x: Float[Tensor, "b heads n d"], cos: Float[Tensor, "... p d"], sin: Float[Tensor, "... p d"]
) -> Float[Tensor, "b heads n d"]:
    """Turn neighbouring pairs of the last p positions; those before (CLS) stay.

    Args:
        x: Queries or keys.
        cos: Table from :func:`rope_tables`, or one table per image `[b, 1, p, d]`.
        sin: The same for the sine.
    """
    prefix, patches = x.split([x.shape[-2] - cos.shape[-2], cos.shape[-2]], dim=-2)
    first, second = rearrange(patches, "... (d pair) -> pair ... d", pair=2)
    turned = rearrange([-second, first], "pair ... d -> ... (d pair)")
    return torch.cat([prefix, patches * cos + turned * sin], dim=-2)


class Eva02Attention(nn.Module):
    """Self-attention with q and v biases, no k bias, and a LayerNorm before the output."""

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Args: x: `[b, n, d]`; position_embeddings: cosine and sine. Returns: `[b, n, d]`."""
        q, k, v = (
            rearrange(projection(x), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v)
        joined = rearrange(attended, "b heads n d -> b n (heads d)")
        return self.proj(self.inner_attn_ln(joined))


class Eva02Mlp(nn.Module):
    """SwiGLU with a LayerNorm before the output: `W3 LN(silu(W1 x) * W2 x)`."""

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: `[b, n, d]`. Returns: `[b, n, d]`."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Eva02Block(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Eva02Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02Mlp(config)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Args: x: `[b, n, d]`; position_embeddings: cosine and sine. Returns: `[b, n, d]`."""
        x = x + self.attn(self.norm1(x), position_embeddings)
        return x + self.mlp(self.norm2(x))


class Eva02Blocks(nn.ModuleList):
    """The blocks, one after the other."""

    def forward(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], every: bool
    ) -> tuple[Tensor, ...]:
        """Args: x: `[b, n, d]`; position_embeddings: cosine and sine; every: keep all states.

        Returns: The last state; with `every` also the input and the other blocks' states before it.
        """
        states: tuple[Tensor, ...] = (x,)
        for block in self:
            x = block(x, position_embeddings)
            states = (*states, x) if every else (x,)
        return states


class Eva02VisionModel(PreTrainedModel):
    """EVA02-CLIP's vision tower without its projection.

    `pooler_output` is the CLS token after the last LayerNorm, `hidden_states` are not normed.

    Args:
        config: Sizes.

    Paper: EVA-02 (2303.11331) section 2.1; EVA-CLIP (2303.15389) table 2.
    """

    config_class = Eva02VisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Eva02Block"]
    _supports_sdpa = True

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__(config)
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, config.hidden_size))
        size = config.patch_size
        convolution = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.blocks = Eva02Blocks(Eva02Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights and positions, zero biases."""
        super()._init_weights(module)
        if module is self:
            for parameter in (self.cls_token, self.pos_embed):
                init.trunc_normal_(parameter, std=self.config.initializer_range)

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
            output_hidden_states: Also return the embeddings and every block's output. LLaVA asks
                with the layers that it wants, 0 among them; all are returned.
            kwargs: Not used; transformers passes options of other models.

        Raises:
            ValueError: Images of another size.
        """
        config = cast("Eva02VisionConfig", self.config)
        size = config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"expected images of {size} x {size} px, got {tuple(pixel_values.shape[-2:])}; load"
                " the tower for another resolution with load_vision_tower(..., image_size_px=...)"
            )
        maps = self.patch_embed["proj"](pixel_values.to(self.dtype))
        patches = rearrange(maps, "b d y x -> b (y x) d")
        cls_token = repeat(self.cls_token, "1 1 d -> b 1 d", b=len(patches))
        x = torch.cat([cls_token, patches], dim=1) + self.pos_embed
        cos, sin = (table.to(x.dtype) for table in rope_tables(config, x.device))
        wanted = output_hidden_states is not None and output_hidden_states is not False
        states = self.blocks(x, position_embeddings=(cos, sin), every=wanted)
        last = self.norm(states[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            hidden_states=states if wanted else None,
        )
