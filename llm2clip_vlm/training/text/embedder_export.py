"""A trained text encoder as a directory that sentence-transformers opens without this package.

The tokenizer that is written adds by itself what stands before and after every text. Where the
front is left out of the mean, the default prompt is a single blank, which that tokenizer drops:
it makes sentence-transformers count the front's tokens, and so leave them out
(`include_prompt: false`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llm2clip_vlm.files import read_json
from llm2clip_vlm.models.loading import load_complete, read_tokenizer
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer, TextEncoderError
from llm2clip_vlm.models.text.embedder import MODULES_NAME
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.runs.ownership import remove

logger = logging.getLogger(__name__)

_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
    "eos": "pooling_mode_lasttoken",
    "cls": "pooling_mode_cls_token",
}


def export_sentence_transformers(
    encoder: TextEncoder, weights: str | Path, directory: str | Path
) -> Path | None:
    """Writes what `SentenceTransformer(directory)` needs for the same unit-norm vectors.

    A Llama is written as a EuroBERT, which is the same network with bidirectional attention of its
    own: a transformers that would encode causally does not know it (it was added 2026-03-04, after
    the switch `is_causal`) and refuses. Other models carry `is_causal: false`, and a tokenizer that
    transformers 4 refuses; 5.0 and 5.1 would load them and encode causally (sentence-transformers
    warns). Weights stay in the encoder's dtype and are computed with in float32, so that norms are
    1; `model_kwargs={"dtype": "bfloat16"}` is left to the user.

    Args:
        encoder: The encoder.
        weights: Where :meth:`TextEncoder.save_pretrained` wrote it; weights are hard-linked.
        directory: Where to write; an earlier export is replaced.

    Returns:
        The directory. None: sentence-transformers could not make the same vectors; the reason is
        logged and nothing is left there.
    """
    source, target = Path(weights), Path(directory)
    _clear(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.safetensors*"):
        try:
            os.link(file, target / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, target / file.name)
    settings, tokens = encoder.settings, encoder.tokens
    excluded = tokens.leaves_out_front
    prompt = " " if excluded else settings.instruction if settings.embedder else ""
    _standalone_tokenizer(tokens, settings.max_length_tokens).save_pretrained(target)
    folders = ("", "1_Pooling", "2_Normalize")
    kinds = zip(_MODULES, folders, strict=True)
    files: dict[str, Any] = {
        "config.json": _model_config(source, settings.bidirectional is True),
        MODULES_NAME: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds)
        ],
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_length_tokens,
            "do_lower_case": False,
            # pooling and Normalize keep the model's dtype: in bf16 a norm is off by up to 0.004
            "model_args": {"dtype": "float32"},
        },
        f"{folders[1]}/config.json": {
            "word_embedding_dimension": encoder.hidden_size,
            **dict.fromkeys(_POOLING_FLAGS.values(), False),
            _POOLING_FLAGS[settings.pooling]: True,
            "include_prompt": not excluded,
        },
        "config_sentence_transformers.json": {
            "prompts": dict.fromkeys(("caption", "query", "document"), prompt),
            "default_prompt_name": "caption",
            "similarity_fn_name": "cosine",
        },
    }
    for folder in folders:
        (target / folder).mkdir(exist_ok=True)
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    why = _difference(tokens, target, prompt)
    if not why and (why := _other_vectors(encoder, target)):
        # without padding transformers builds no mask for sdpa, and some models then are causal
        eager = {"attn_implementation": "eager"}
        content = files["sentence_bert_config.json"]
        content["model_args"] |= eager
        (target / "sentence_bert_config.json").write_text(json.dumps(content, indent=2) + "\n")
        why = _other_vectors(encoder, target, **eager)
    if why:
        _clear(target)
        logger.warning("not exported for sentence-transformers: %s", why)
        return None
    return target


def _clear(target: Path) -> None:
    """Delete what an export writes; other files in its folder stay."""
    names = "*.safetensors* *.json tokenizer.model chat_template.jinja */config.json".split()
    remove(target, [str(f.relative_to(target)) for name in names for f in target.glob(name)])


def _model_config(source: Path, bidirectional: bool) -> dict[str, Any]:
    config: dict[str, Any] = read_json(source / "config.json")
    if config["model_type"] == "llama" and bidirectional and "eurobert" in CONFIG_MAPPING_NAMES:
        config |= {
            "model_type": "eurobert",
            "architectures": ["EuroBertModel"],
            "mask_token_id": 0,  # asked for, never used
        }
    return config


def _standalone_tokenizer(
    tokens: CaptionTokenizer, max_length_tokens: int
) -> PreTrainedTokenizerFast:
    """The tokenizer with front and footer in its own post-processing."""
    tokenizer = tokens.tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    pieces = [
        {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
        for name, ids in (("front", tokens.front), ("behind", tokens.behind))
        if ids
    ]
    single = ["front"] * bool(tokens.front) + ["$A"] + ["behind"] * bool(tokens.behind)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    if tokens.leaves_out_front:
        steps = [normalizers.Strip(left=True, right=False), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    special.setdefault("pad_token", tokenizer.convert_ids_to_tokens([tokens.pad_token_id])[0])
    extra = []
    if tokens.leaves_out_front:
        # sentence-transformers takes a last token for the footer if and only if it is special.
        if tokens.behind:
            extra = [tokenizer.convert_ids_to_tokens(tokens.behind[-1])]
        else:
            last = tokenizer.convert_ids_to_tokens(tokens.front[-1])
            special = {name: token for name, token in special.items() if token != last}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length_tokens,
        padding_side="right",
        split_special_tokens=True,  # texts are no protocol there either
        extra_special_tokens=extra,
        **special,
    )


def _difference(tokens: CaptionTokenizer, directory: Path, prompt: str) -> str | None:
    """The reason why sentence-transformers would see or pool other tokens than the encoder."""
    found: PreTrainedTokenizerBase = read_tokenizer(directory)
    expected = tokens(PROBE_TEXTS)
    got = found([prompt + text for text in PROBE_TEXTS], truncation=True)["input_ids"]
    if got != expected:
        row = next(i for i, ids in enumerate(expected) if got[i] != ids)
        return (
            f"its tokenizer ({type(found).__name__}) loads from there as another one: "
            f"{PROBE_TEXTS[row]!r} gives {got[row]}, expected {expected[row]}"
        )
    measured = found(prompt)["input_ids"]
    length = len(measured) - (measured[-1] in found.all_special_ids) if measured else 0
    if tokens.leaves_out_front and length != tokens.num_front_tokens:
        return (
            f"{len(tokens.behind)} tokens follow each text, and it can leave "
            f"{tokens.num_front_tokens} out of the mean only if at most one does"
        )
    return None


def _other_vectors(encoder: TextEncoder, directory: Path, **arguments: Any) -> str | None:
    """The difference if the export is loaded as sentence-transformers loads it (on the CPU)."""
    expected = encoder.encode(PROBE_TEXTS)
    load: Any = load_complete(AutoModel, directory, dtype=encoder.backbone.dtype, **arguments)
    found = TextEncoder(load.eval(), encoder.tokenizer, encoder.settings)
    alone = torch.cat([found.encode([text]) for text in PROBE_TEXTS])
    for what, got in (("one text alone", alone), ("a batch", found.encode(PROBE_TEXTS))):
        try:
            require_equal(f"{what}, exported", expected, got, "it is left out", load.dtype)
        except TextEncoderError as error:
            return str(error)
    return None
