"""EVA02-CLIP under the names of LLM2CLIP, of EVA-CLIP (fused or bare biases) and of timm.

Ours are LLM2CLIP's: `q_proj.bias` where EVA-CLIP has a bare `q_bias` (LLM2CLIP
`eva_clip/factory.py:132-136`).
"""

from __future__ import annotations

from llm2clip_vlm.interop.keys import row

_THEIRS, _OURS = "visual.blocks.{n}.", "vision_tower.blocks.{n}."
_SHARED = (
    row("visual.head.{p}", "visual_projection.{p}"),
    row("visual.{any}", "vision_tower.{any}"),
)

EVA02_TIMM = (
    row(_THEIRS + "mlp.fc1_g.{p}", _OURS + "mlp.w1.{p}"),
    row(_THEIRS + "mlp.fc1_x.{p}", _OURS + "mlp.w2.{p}"),
    row(_THEIRS + "mlp.fc2.{p}", _OURS + "mlp.w3.{p}"),
    row(_THEIRS + "mlp.norm.{p}", _OURS + "mlp.ffn_ln.{p}"),
    row(_THEIRS + "attn.norm.{p}", _OURS + "attn.inner_attn_ln.{p}"),
    *_SHARED,
)
"""timm's, and so open_clip's (`visual.trunk.`)."""

EVA02 = (
    row(_THEIRS + "attn.q_bias", _OURS + "attn.q_proj.bias"),
    row(_THEIRS + "attn.v_bias", _OURS + "attn.v_proj.bias"),
    row(_THEIRS + "attn.qkv.weight", _OURS + "attn.{qkv}_proj.weight"),
    *EVA02_TIMM,
)
"""Any of them in; what stands in both namings is the same weight."""
