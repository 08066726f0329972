"""A language model in a GGUF file (llama.cpp) as an ordinary directory of transformers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, save_llm
from llm2clip_vlm.models.loading import boundary

MAGIC = b"GGUF"
_DTYPES = ("float32", "bfloat16", "float16")


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC


def convert_gguf(source: Path, folder: Path, settings: Mapping[str, Any]) -> Evidence:
    """Write weights (dequantised), config, tokenizer, chat template and generation config.

    Args:
        source: A decoder of a family that transformers reads from GGUF.
        folder: Where to.
        settings: `dtype`: float32 (default, holds what the file says exactly), bfloat16 or float16.

    Returns:
        Logits of the model as read and as it lies in the folder.

    Raises:
        ModelError: The package `gguf` is missing, the file is damaged or no decoder that
            transformers reads, weights in the file have no place in the model or the reverse, or an
            unknown setting.
    """
    dtype = str(dict(settings).pop("dtype", _DTYPES[0]))
    if dtype not in _DTYPES or set(settings) - {"dtype"}:
        raise ModelError(
            f"{source}: --set: expected dtype={'|'.join(_DTYPES)} alone for a GGUF file, got "
            f"{', '.join(f'{key}={value}' for key, value in settings.items())}"
        )
    kinds, values = _read(source)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with boundary(f"{source}: transformers cannot read this GGUF"):
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    own = sum(parameter.numel() for parameter in model.parameters())
    if own != sum(values.values()):
        named = ", ".join(name for name in values if name.startswith("rope")) or "unknown"
        raise ModelError(
            f"{source}: the file has {sum(values.values()):,} weights, the model that transformers "
            f"makes of it {own:,}: some have no place there ({named}), and it "
            "would compute something else. Get the original checkpoint"
        )
    model.hf_quantizer = None  # an ordinary model from here on
    del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    expected, got = save_llm(model, tokenizer, folder)
    more: dict[str, Any] = {"format": "gguf", "tensors": dict(kinds), "dtype": dtype}
    more["chat_template"] = bool(tokenizer.chat_template)
    return Evidence("transformers, as it reads the GGUF", expected, got, more)


def _read(source: Path) -> tuple[Counter[str], dict[str, int]]:
    """How many tensors of which type there are, and each one's number of values."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f"{source}: reading GGUF needs a package: pip install gguf") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with boundary(f"{source}: damaged or cut short", "; fetch it again"):
        tensors = GGUFReader(source).tensors
    kinds = Counter(str(tensor.tensor_type.name) for tensor in tensors)
    return kinds, {tensor.name: int(tensor.n_elements) for tensor in tensors}
