"""A language model in a GGUF file (llama.cpp) as an ordinary directory of transformers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, save_llm
from llm2clip_vlm.models.loading import boundary

MAGIC = b"GGUF"
_DTYPES = ("float32", "bfloat16", "float16")
_AS_GPT2 = (
    "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais jina-de jina-es jina-v1-en jina-v2-code "
    "jina-v2-de jina-v2-es mellum mpt olmo phi-2 roberta-bpe trillion".split()
)
_DIGITS_APART = "codeshell command-r exaone minerva-7b refact smollm starcoder".split()
"""Values of `tokenizer.ggml.pre` whose texts are split as GPT-2's, or so after each digit is one's
own (llama.cpp's `llama-vocab.cpp`)."""
_SAID = {"rope.scaling.factor": "factor", "attention.sliding_window": "sliding_window"}
_SAID |= {f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("attn", "final")}
"""What a file says of the computation beside its weights, and what a config calls it."""


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
            transformers reads, weights or settings in the file have no place in the model or the
            reverse, nobody knows how its tokenizer splits texts, or an unknown setting.
    """
    dtype = str(dict(settings).pop("dtype", _DTYPES[0]))
    if dtype not in _DTYPES or set(settings) - {"dtype"}:
        raise ModelError(
            f"{source}: --set: expected dtype={'|'.join(_DTYPES)} alone for a GGUF file, got "
            f"{', '.join(f'{key}={value}' for key, value in settings.items())}"
        )
    kinds, values, said = _read(source)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with boundary(f"{source}: transformers cannot read this GGUF"):
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    made = json.dumps(config.to_dict(), default=str)
    for key, value in said.items():
        name = _SAID.get(key.partition(".")[2])
        if name and value != 1 and f'"{name}": {value}' not in made:
            raise ModelError(
                f"{source}: it says {key} {value}, which the config that transformers makes of it "
                "leaves out, and it would compute something else. Get the original checkpoint"
            )
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
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    if said.get("tokenizer.ggml.add_space_prefix") is False and tokenizer.tokenize("a") != ["a"]:
        raise ModelError(
            f"{source}: tokenizer.ggml.add_space_prefix is false, and transformers puts a blank "
            "before each text all the same: other tokens. Get the original checkpoint"
        )
    guess = _split_as_said(tokenizer, said.get("tokenizer.ggml.pre"), source)
    expected, got = save_llm(model, tokenizer, folder)
    more: dict[str, Any] = {"format": "gguf", "tensors": dict(kinds), "dtype": dtype}
    more["chat_template"] = bool(tokenizer.chat_template)
    return Evidence("transformers, as it reads the GGUF", expected, got, more | guess)


def _split_as_said(tokenizer: Any, way: str | None, source: Path) -> dict[str, str]:
    """Let a byte-level tokenizer split texts as the file says, and return what had to be guessed.

    Transformers splits as GPT-2 does wherever it does not know the way: pieces that no merge was
    learned from, and so other tokens.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or way in _AS_GPT2:
        return {}
    if way is None:
        return {"guessed": "texts split as GPT-2's (there is no tokenizer.ggml.pre)"}
    if way not in _DIGITS_APART:
        raise ModelError(
            f"{source}: tokenizer.ggml.pre is {way!r}, a way to split texts that is not known here "
            "and that transformers takes for GPT-2's. Get the original checkpoint"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return {}


def _read(source: Path) -> tuple[Counter[str], dict[str, int], dict[str, Any]]:
    """How many tensors of which type there are, each one's number of values, and what is said.

    Of what is said only that which a pass or a text's tokens depend on.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f"{source}: reading GGUF needs a package: pip install gguf") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with boundary(f"{source}: damaged or cut short", "; fetch it again"):
        reader = GGUFReader(source)
        wanted, fields = {"ggml.pre", "ggml.add_space_prefix", *_SAID}, reader.fields.items()
        said = {key: field.contents() for key, field in fields if key.partition(".")[2] in wanted}
    kinds = Counter(str(tensor.tensor_type.name) for tensor in reader.tensors)
    return kinds, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}, said
