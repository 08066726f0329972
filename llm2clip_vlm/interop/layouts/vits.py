"""Names of ViTs' weights in other code: OpenAI's CLIP, EVA02-CLIP, and timm's CLIP and SigLIP."""

from __future__ import annotations

import re

from llm2clip_vlm.interop.keys import row

_RES, _BLOCK = "visual.transformer.resblocks.{n}.", "visual.blocks.{n}."
_OUR_LAYER, _OUR_EVA = "vision_tower.encoder.layers.{n}.", "vision_tower.blocks.{n}."

OPENAI_CLIP = (
    row("visual.class_embedding", "vision_tower.embeddings.class_embedding"),
    row("visual.positional_embedding", "vision_tower.embeddings.position_embedding.weight"),
    row("visual.conv1.weight", "vision_tower.embeddings.patch_embedding.weight"),
    row("visual.ln_pre.{p}", "vision_tower.pre_layrnorm.{p}"),
    row(_RES + "ln_1.{p}", _OUR_LAYER + "layer_norm1.{p}"),
    row(_RES + "attn.in_proj_{p}", _OUR_LAYER + "self_attn.{qkv}_proj.{p}"),
    row(_RES + "attn.out_proj.{p}", _OUR_LAYER + "self_attn.out_proj.{p}"),
    row(_RES + "ln_2.{p}", _OUR_LAYER + "layer_norm2.{p}"),
    row(_RES + "mlp.c_fc.{p}", _OUR_LAYER + "mlp.fc1.{p}"),
    row(_RES + "mlp.c_proj.{p}", _OUR_LAYER + "mlp.fc2.{p}"),
    row("visual.ln_post.{p}", "vision_tower.post_layernorm.{p}"),
    row("visual.proj", "visual_projection.weight", "transpose"),
)
"""OpenAI's, as open_clip and LLM2CLIP's training code (`llm2clip/eva_clip/transformer.py`) have
them, to a `CLIPVisionModel`'s and the image head's."""

SAME = (row("visual.head.{p}", "visual_projection.{p}"), row("visual.{any}", "vision_tower.{any}"))
"""The names of transformers, and what other tables leave as it is."""

EVA02_TIMM = (
    row(_BLOCK + "mlp.fc1_g.{p}", _OUR_EVA + "mlp.w1.{p}"),
    row(_BLOCK + "mlp.fc1_x.{p}", _OUR_EVA + "mlp.w2.{p}"),
    row(_BLOCK + "mlp.fc2.{p}", _OUR_EVA + "mlp.w3.{p}"),
    row(_BLOCK + "mlp.norm.{p}", _OUR_EVA + "mlp.ffn_ln.{p}"),
    row(_BLOCK + "attn.norm.{p}", _OUR_EVA + "attn.inner_attn_ln.{p}"),
    *SAME,
)
"""timm's EVA02, and so open_clip's (`visual.trunk.`)."""

EVA02 = (
    row(_BLOCK + "attn.q_bias", _OUR_EVA + "attn.q_proj.bias"),
    row(_BLOCK + "attn.v_bias", _OUR_EVA + "attn.v_proj.bias"),
    row(_BLOCK + "attn.qkv.weight", _OUR_EVA + "attn.{qkv}_proj.weight"),
    *EVA02_TIMM,
)
"""LLM2CLIP's, EVA-CLIP's or timm's; what stands in several namings is the same weight. Ours are
LLM2CLIP's: `q_proj.bias` where EVA-CLIP has a bare `q_bias` (`eva_clip/factory.py:132-136`)."""

_TIMM = (
    row(_BLOCK + "attn.qkv.{p}", _OUR_LAYER + "self_attn.{qkv}_proj.{p}"),
    row(_BLOCK + "attn.proj.{p}", _OUR_LAYER + "self_attn.out_proj.{p}"),
    row(_BLOCK + "norm1.{p}", _OUR_LAYER + "layer_norm1.{p}"),
    row(_BLOCK + "norm2.{p}", _OUR_LAYER + "layer_norm2.{p}"),
    row(_BLOCK + "mlp.fc{n2}.{p}", _OUR_LAYER + "mlp.fc{n2}.{p}"),
    row("visual.patch_embed.proj.{p}", "vision_tower.embeddings.patch_embedding.{p}"),
    row("visual.pos_embed", "vision_tower.embeddings.position_embedding.weight", "batch"),
    row("visual.norm.{p}", "vision_tower.post_layernorm.{p}"),
    row("visual.head.{p}", "visual_projection.{p}"),
)

CLIP_TIMM = (
    row("visual.cls_token", "vision_tower.embeddings.class_embedding", "batch2"),
    row("visual.norm_pre.{p}", "vision_tower.pre_layrnorm.{p}"),
    *_TIMM,
)
"""timm's CLIP to a `CLIPVisionModel`'s."""

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
    *_TIMM,
)
"""timm's SigLIP and SigLIP2, with attention pooling, to a `SiglipVisionModel`'s. LLM2CLIP trained
SigLIP2 as timm's `vit_so400m_patch14_siglip_224.v2_webli` (`visual.trunk.`)."""

TANH_GELU = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|(so400m|giantopt)_patch16_siglip_\d+)"
)
"""timm's SigLIPs (1.0.31) that approximate GELU by tanh; all others compute it exactly."""
