"""A trained text encoder as a directory that sentence-transformers opens without this package.

The tokenizer that is written adds by itself what stands before and after every text. Where the
front is left out of the mean, a mask by token id drops it (`MultiVectorMask`), in that library's
`encode` and in its Trainer, which applies no default prompt. Front tokens that a text can have too
(an instruction's words) get ids of their own, with a copy of their embedding.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llm2clip_vlm.chat.text_tokens import text_tokens
from llm2clip_vlm.files import read_json
from llm2clip_vlm.models.loading import load_complete
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.models.text.text_encoder_settings import MODULES_NAME
from llm2clip_vlm.runs.ownership import remove

logger = logging.getLogger(__name__)

_FLAGS = {"mean": "mean_tokens", "last": "lasttoken", "eos": "lasttoken", "cls": "cls_token"}


def export_sentence_transformers(
    encoder: TextEncoder, weights: str | Path, directory: str | Path
) -> Path | None:
    """Writes what `SentenceTransformer(directory)` (6.0 or later) needs for the same vectors.

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
    settings, tokens = encoder.settings, encoder.tokens
    prompt = settings.instruction if settings.embedder else ""
    tokenizer, front = _standalone_tokenizer(tokens, settings.max_length_tokens)
    tokenizer.save_pretrained(target)
    resized = _write_weights(encoder, source, target, front)
    mask = {"0_Mask": "multi_vector_encoder.modules.MultiVectorMask"}
    modules = {
        "": "models.Transformer",
        **(mask if tokens.leaves_out_front else {}),
        "1_Pooling": "models.Pooling",
        "2_Normalize": "models.Normalize",
    }
    files: dict[str, Any] = {
        "config.json": _model_config(source, settings.bidirectional is True) | resized,
        MODULES_NAME: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(modules.items())
        ],
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_length_tokens,
            "do_lower_case": False,
            # pooling and Normalize keep the model's dtype: in bf16 a norm is off by up to 0.004
            "model_args": {"dtype": "float32"},
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.hidden_size,
            **{f"pooling_mode_{f}": f == _FLAGS[settings.pooling] for f in _FLAGS.values()},
        },
        "config_sentence_transformers.json": {
            "prompts": dict.fromkeys(("caption", "query", "document"), prompt),
            "default_prompt_name": "caption" if prompt else None,
            "similarity_fn_name": "cosine",
        },
    }
    if tokens.leaves_out_front:
        words = tokenizer.convert_ids_to_tokens(front)
        asked = ["document", "query"]
        files["0_Mask/config.json"] = {"skiplist_words": words, "skiplist_tasks": asked}
    for folder in modules:
        (target / folder).mkdir(exist_ok=True)
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    why = _difference(tokens, target, prompt, front)
    if not why and (why := _other_vectors(encoder, target, front)):
        # without padding transformers builds no mask for sdpa, and some models then are causal
        eager = {"attn_implementation": "eager"}
        content = files["sentence_bert_config.json"]
        content["model_args"] |= eager
        (target / "sentence_bert_config.json").write_text(json.dumps(content, indent=2) + "\n")
        why = _other_vectors(encoder, target, front, **eager)
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
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with front and footer in its own post-processing, and the front's ids there."""
    tokenizer = tokens.tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    front = list(tokens.front)
    if tokens.leaves_out_front:
        alone = text_tokens(tokenizer).ids - set(tokens.behind)  # no text has one of these
        for at, index in enumerate(front):
            if index not in alone:
                backend.add_special_tokens([f"<front-{at}>"])
                front[at] = backend.get_vocab()[f"<front-{at}>"]
    pieces = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(index) for index in ids]}
        for name, ids in (("front", front), ("behind", tokens.behind))
        if ids
    ]
    single = ["front"] * bool(front) + ["$A"] + ["behind"] * bool(tokens.behind)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    names = tokenizer.special_tokens_map.items()
    special = {name: token for name, token in names if isinstance(token, str)}
    special.setdefault("pad_token", tokenizer.convert_ids_to_tokens([tokens.pad_token_id])[0])
    exported = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length_tokens,
        padding_side="right",
        split_special_tokens=True,  # texts are no protocol there either
        **special,
    )
    return exported, front


def _write_weights(
    encoder: TextEncoder, source: Path, target: Path, front: list[int]
) -> dict[str, int]:
    """Link the weights, or write them with an embedding for the front's own ids too.

    Returns:
        What changes in the model's config.
    """
    weight: Any = encoder.backbone.get_input_embeddings().weight
    table = weight.data
    if front == encoder.tokens.front:
        for file in source.glob("*.safetensors*"):
            try:
                os.link(file, target / file.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, target / file.name)
        return {}
    more = max(0, max(front) + 1 - len(table))
    weight.data = torch.cat([table, table.new_zeros(more, table.shape[1])])
    weight.data[front] = table[encoder.tokens.front]
    encoder.backbone.save_pretrained(target)
    weight.data = table
    return {"vocab_size": len(table) + more}


def _difference(
    tokens: CaptionTokenizer, directory: Path, prompt: str, front: list[int]
) -> str | None:
    """The reason why sentence-transformers would see other tokens than the encoder."""
    load: Any = AutoTokenizer  # as that library reads it
    found: PreTrainedTokenizerBase = load.from_pretrained(directory, trust_remote_code=False)
    expected = [[*front, *ids[len(front) :]] for ids in tokens(PROBE_TEXTS)]
    got = found([prompt + text for text in PROBE_TEXTS], truncation=True)["input_ids"]
    if got != expected:
        row = next(i for i, ids in enumerate(expected) if got[i] != ids)
        return (
            f"its tokenizer ({type(found).__name__}) loads from there as another one: "
            f"{PROBE_TEXTS[row]!r} gives {got[row]}, expected {expected[row]}"
        )
    return None


def _other_vectors(
    encoder: TextEncoder, directory: Path, front: list[int], **arguments: Any
) -> str | None:
    """The difference if the export is loaded as sentence-transformers loads it (on the CPU)."""
    expected = encoder.encode(PROBE_TEXTS)
    dtype = encoder.backbone.dtype
    try:
        load: Any = load_complete(AutoModel, directory, dtype=dtype, **arguments)
        found = TextEncoder(load.eval(), encoder.tokenizer, encoder.settings)
        found.tokens.front = front
        alone = torch.cat([found.encode([text]) for text in PROBE_TEXTS])
        for what, got in (("one text alone", alone), ("a batch", found.encode(PROBE_TEXTS))):
            require_equal(f"{what}, exported", expected, got, "it is left out", dtype)
    except ValueError as error:
        return str(error)
    return None
