"""timm's ViTs: SigLIP and SigLIP2 (with attention pooling) and CLIP.

LLM2CLIP trained SigLIP2 as timm's `vit_so400m_patch14_siglip_224.v2_webli` (`visual.trunk.`).
"""

from __future__ import annotations

import re

from llm2clip_vlm.interop.keys import row

_THEIRS, _OURS = "visual.blocks.{n}.", "vision_tower.encoder.layers.{n}."
_BLOCKS = (
    row(_THEIRS + "attn.qkv.{p}", _OURS + "self_attn.{qkv}_proj.{p}"),
    row(_THEIRS + "attn.proj.{p}", _OURS + "self_attn.out_proj.{p}"),
    row(_THEIRS + "norm1.{p}", _OURS + "layer_norm1.{p}"),
    row(_THEIRS + "norm2.{p}", _OURS + "layer_norm2.{p}"),
    row(_THEIRS + "mlp.fc{n2}.{p}", _OURS + "mlp.fc{n2}.{p}"),
    row("visual.patch_embed.proj.{p}", "vision_tower.embeddings.patch_embedding.{p}"),
    row("visual.pos_embed", "vision_tower.embeddings.position_embedding.weight", "batch"),
    row("visual.norm.{p}", "vision_tower.post_layernorm.{p}"),
    row("visual.head.{p}", "visual_projection.{p}"),
)

CLIP_TIMM = (
    row("visual.cls_token", "vision_tower.embeddings.class_embedding", "batch2"),
    row("visual.norm_pre.{p}", "vision_tower.pre_layrnorm.{p}"),
    *_BLOCKS,
)
"""To a `CLIPVisionModel`'s."""

SIGLIP_TIMM = (
    row("visual.attn_pool.latent", "vision_tower.head.probe"),
    row(
        "visual.attn_pool.q.{p} visual.attn_pool.kv.{p}",
        "vision_tower.head.attention.in_proj_{p}",
        parts=(1, 2),
    ),
    row("visual.attn_pool.proj.{p}", "vision_tower.head.attention.out_proj.{p}"),
    row("visual.attn_pool.norm.{p}", "vision_tower.head.layernorm.{p}"),
    row("visual.attn_pool.mlp.fc{n}.{p}", "vision_tower.head.mlp.fc{n}.{p}"),
    *_BLOCKS,
)
"""To a `SiglipVisionModel`'s."""

TANH_GELU = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|(so400m|giantopt)_patch16_siglip_\d+)"
)
"""timm's SigLIPs (1.0.31) that approximate GELU by tanh; all others compute it exactly."""
