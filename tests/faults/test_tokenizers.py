"""Tokenizers of other projects: what their files say counts, not the class that is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoProcessor, AutoTokenizer, LlamaModel, PreTrainedTokenizerFast

from llm2clip_vlm.chat.labels import label
from llm2clip_vlm.chat.template import template_of
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.loading import read_tokenizer
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from tests.tiny import CHAT_TEMPLATE, llama_config, llm_tokenizer

LINES = [
    "Is there a dog (no. 12, at 3:45) in the image? Yes, it's red and small.",
    "what color is 1234 ? USER: ASSISTANT: TWO  spaces and caf\u00e9 , then don't WALK 1,234 km.",
] * 40
PROBES = ("Yes, it's RED in 12 images.", "what  color\n?", "caf\u00e9 \uff21", "a")
SPECIAL = ("<unk>", "<s>", "</s>")


def bytes_file(folder: Path, **parts: Any) -> None:
    """A byte-level `tokenizer.json`, as Qwen's and SmolLM's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(LINES, trainer)
    made.decoder = decoders.ByteLevel()
    _save(made, folder, parts, bos_token=None, eos_token="<|im_end|>")


def pieces_file(folder: Path, model: str = "BPE", **parts: Any) -> None:
    """A `tokenizer.json` of pieces with a sign for blanks, as Llama 2's."""
    made = Tokenizer(models.Unigram() if model == "Unigram" else models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = parts.pop("pre_tokenizer", pre_tokenizers.Metaspace(split=False))
    common: dict[str, Any] = {"vocab_size": 300, "special_tokens": list(SPECIAL)}
    kinds = {
        "BPE": lambda: trainers.BpeTrainer(**common),
        "Unigram": lambda: trainers.UnigramTrainer(unk_token="<unk>", **common),
    }
    made.train_from_iterator(LINES, kinds[model]())
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    _save(made, folder, parts, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _save(made: Tokenizer, folder: Path, parts: dict[str, Any], **named: Any) -> None:
    kind, model_type = parts.pop("kind"), parts.pop("model_type", "llama")
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(folder / "tokenizer.json"))
    given = {"tokenizer_class": kind, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


LOWER = normalizers.Lowercase()
NEVER = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


KINDS = pytest.mark.parametrize(
    ("write", "parts"),
    [
        (bytes_file, {"kind": "Qwen2Tokenizer", "model_type": "qwen2", "normalizer": LOWER}),
        (bytes_file, {"kind": "GPT2Tokenizer"}),
        (bytes_file, {"kind": "LlamaTokenizerFast"}),
        (pieces_file, {"kind": "LlamaTokenizer"}),
        (pieces_file, {"kind": "LlamaTokenizer", "normalizer": normalizers.NFKC()}),
        (pieces_file, {"kind": "LlamaTokenizer", "pre_tokenizer": NEVER}),
        (pieces_file, {"kind": "LlamaTokenizerFast", "model": "Unigram"}),
        (pieces_file, {"kind": "T5Tokenizer", "model": "Unigram"}),
        (pieces_file, {"kind": "PreTrainedTokenizerFast"}),
    ],
)


@KINDS
def test_ids_are_those_of_tokenizer_json(write: Any, parts: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, **parts)
    want = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == want.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token in ("</s>", "<|im_end|>")


@KINDS
def test_other_programs_read_what_is_saved_alike_or_that_is_told(
    write: Any, parts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, **parts)
    tokenizer, saved = read_tokenizer(tmp_path), tmp_path / "saved"
    save_tokenizer(tokenizer, saved)
    shutil.copy(tmp_path / "config.json", saved)
    caplog.clear()
    read_tokenizer(saved)
    ours, others = (
        [each(text, add_special_tokens=False)["input_ids"] for text in PROBES]
        for each in (tokenizer, AutoTokenizer.from_pretrained(saved))
    )
    # Whatever class a file names, transformers 5 takes Qwen2's own (MODELS_WITH_INCORRECT_HUB_...).
    alike = parts.get("model_type") != "qwen2"
    assert (ours == others) == alike
    assert ("elsewhere by PreTrainedTokenizerFast.from" in caplog.text) != alike
    if not alike:
        others = PreTrainedTokenizerFast.from_pretrained(saved)
        assert ours == [others(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def sentencepiece(folder: Path, **options: Any) -> Path:
    """A `tokenizer.model` alone, as Vicuna's."""
    (folder / "lines.txt").write_text("\n".join(options.pop("lines", LINES)))
    given: dict[str, Any] = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), **given | options
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        ({}, {"bos_token": "<s>"}),
        ({}, None),
        ({"add_dummy_prefix": False}, {"tokenizer_class": "LlamaTokenizer"}),
    ],
    ids=["as Vicuna's", "no class", "no config", "no blank in front"],
)
def test_ids_are_those_of_sentencepiece(
    options: dict[str, Any], config: dict[str, Any] | None, tmp_path: Path
) -> None:
    file = sentencepiece(tmp_path, **options)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    want, tokenizer = SentencePieceProcessor(model_file=str(file)), read_tokenizer(tmp_path)
    for text in ("Yes, it's red in 12 images.", "a"):
        assert tokenizer(text)["input_ids"] == [want.bos_id(), *want.encode(text)]


def test_a_blank_in_front_is_the_configs_choice(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path)
    given = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    ids = read_tokenizer(tmp_path)("red image", add_special_tokens=False)["input_ids"]
    assert ids != SentencePieceProcessor(model_file=str(file)).encode("red image")


def test_characters_that_would_be_dropped_are_told(tmp_path: Path) -> None:
    sentencepiece(tmp_path, byte_fallback=False, vocab_size=60, lines=["a red dog is there"] * 40)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match=r"tokenizer\.model makes .* put a tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "makes no token"),
        (b"", "makes no token"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 499723\n", "pointers of Git LFS"),
        (b"\n\x0e\n\x05<unk>\x15\x00", r"tokenizer"),
    ],
    ids=["none", "empty", "a pointer", "cut"],
)
def test_a_tokenizer_without_its_file_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_tokens_without_an_embedding(token: str, tmp_path: Path) -> None:
    tokenizer = llm_tokenizer()
    LlamaModel(llama_config(len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({token: "<new>"})
    tokenizer.save_pretrained(tmp_path)
    assert getattr(AutoTokenizer.from_pretrained(tmp_path), token) == "<new>"
    if token == "pad_token":
        encoder = TextEncoder.from_pretrained(tmp_path, bidirectional=False)
        assert encoder.tokens.pad_token_id == 0
        return
    with pytest.raises(ModelError, match=r"'<new>'.*embeddings"):
        TextEncoder.from_pretrained(tmp_path, bidirectional=False, pooling="eos")


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_an_exported_vlm_is_asked_as_it_was_trained(
    bos: str, tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """The tokenizer closes each text with eos; transformers' own prompts ended with it, too."""
    tokenizer = llm_tokenizer()
    shutil.copytree(tiny_llm, tmp_path / "llm")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token }}", bos)
    tokenizer.save_pretrained(tmp_path / "llm")
    save_vlm(*build_vlm(tiny_clip, tmp_path / "llm"), tmp_path / "vlm")
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    asked = [{"role": "user", "content": [{"type": "text", "text": "what is it ?"}]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]
    ids, labels = label(answered, template_of(processor), processor.tokenizer)
    trained = ids[: next(i for i, token in enumerate(labels) if token >= 0)]
    assert processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True) == [
        trained
    ]
