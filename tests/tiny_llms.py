"""Every causal language model of the installed transformers, tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny import llm_tokenizer

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_WINDOW = {"sliding_window": 6}

MORE: dict[str, dict[str, Any]] = {
    "afmoe": _MOE,
    "axk1": _MOE | _LATENT,
    "axk2": _MOE | _LATENT,
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": _WINDOW | {"logit_scale": 0.25},
    "deepseek_v2": _MOE | _LATENT,
    "deepseek_v3": _MOE | _LATENT,
    "deepseek_v32": _MOE | _LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "ernie4_5_moe": _MOE | {"moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": _MOE | _WINDOW,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma4_text": _WINDOW | {"hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "glm4_moe": _MOE | {"n_group": 1, "topk_group": 1},
    "glm4_moe_lite": _MOE | _LATENT,
    "glm_moe_dsa": _MOE | _LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "gpt_oss": _MOE | _WINDOW,
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoe": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": _MAMBA
    | {
        "logits_scaling": 8.0,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "hy_v3": _MOE,
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": _MOE | _LATENT | _DELTA,
    "laguna": _MOE | _WINDOW,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_L_cache": 3},
    "lfm2_moe": _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1, "expand": 2},
    "mellum": _MOE | _WINDOW,
    "minicpm3": _LATENT | {"dim_model_base": 8},
    "minimax_m2": _MOE,
    "ministral": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": _MOE | _WINDOW,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron_h": _MAMBA
    | {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo3": _WINDOW,
    "olmoe": _MOE,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2_moe": _MOE,
    "qwen3_5_moe_text": _MOE | _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE | _DELTA,
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": _MOE,
    "vaultgemma": _WINDOW | {"query_pre_attn_scalar": 8},
    "youtu": _LATENT,
}
"""What a family needs beside `BASE` to be tiny, or to show what it has."""

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""`model_type` of everything that `AutoModelForCausalLM` takes."""


def _config(model_type: str, config: dict[str, Any]) -> Any:
    values = BASE | {"vocab_size": len(llm_tokenizer())} | MORE.get(model_type, {}) | config
    if model_type == "falcon":
        del values["head_dim"]  # a property without a setter
    return AutoConfig.for_model(model_type, **values)


def build_family(model_type: str, directory: str | Path, **config: Any) -> Path:
    """Saves a language model of a family, weights well away from zero, with the tiny tokenizer.

    Args:
        model_type: Its `model_type`.
        directory: Where to.
        **config: Fields of its config that differ.

    Returns:
        The directory.
    """
    import torch

    tokenizer = llm_tokenizer()
    made = _config(model_type, config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
    return Path(directory)


def is_tiny(model_type: str, most: int = 40_000_000) -> bool:
    """Whether the installed packages can build the family, and `BASE` and `MORE` make it small."""
    import torch

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(model_type, {}))
    except Exception:  # noqa: BLE001  (190 constructors)
        return False
    return sum(p.numel() for p in model.parameters()) < most
