"""OpenAI's CLIP ViT, as open_clip and LLM2CLIP's training code name it.

Names: open_clip's `VisionTransformer`; LLM2CLIP `llm2clip/eva_clip/transformer.py`.
"""

from __future__ import annotations

from llm2clip_vlm.interop.keys import row

_THEIRS, _OURS = "visual.transformer.resblocks.{n}.", "vision_tower.encoder.layers.{n}."

OPENAI_CLIP = (
    row("visual.class_embedding", "vision_tower.embeddings.class_embedding"),
    row("visual.positional_embedding", "vision_tower.embeddings.position_embedding.weight"),
    row("visual.conv1.weight", "vision_tower.embeddings.patch_embedding.weight"),
    row("visual.ln_pre.{p}", "vision_tower.pre_layrnorm.{p}"),
    row(_THEIRS + "ln_1.{p}", _OURS + "layer_norm1.{p}"),
    row(_THEIRS + "attn.in_proj_{p}", _OURS + "self_attn.{qkv}_proj.{p}"),
    row(_THEIRS + "attn.out_proj.{p}", _OURS + "self_attn.out_proj.{p}"),
    row(_THEIRS + "ln_2.{p}", _OURS + "layer_norm2.{p}"),
    row(_THEIRS + "mlp.c_fc.{p}", _OURS + "mlp.fc1.{p}"),
    row(_THEIRS + "mlp.c_proj.{p}", _OURS + "mlp.fc2.{p}"),
    row("visual.ln_post.{p}", "vision_tower.post_layernorm.{p}"),
    row("visual.proj", "visual_projection.weight", "transpose"),
)
"""Their weights to a `CLIPVisionModel`'s and the image head's."""
