"""Sentence-transformers' format: embedders read from it, encoders written to it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, BertConfig, BertModel, Qwen3Config, Qwen3Model

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.text.text_encoder_settings import read_embedder
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers
from tests.tiny import llm_tokenizer, word_tokenizer
from tests.unit.test_text_encoder import build

TEXTS = ["A red star", "a very large dog and a small cat on the left", " dog ", "two blue circles"]
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-instruction": ("llama", {"instruction": "describe the picture"}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "llama-no-eos": ("llama", {"eos": False}),
    "llama-chat": ("llama", {"chat": True, "max_length_tokens": 6}),
    "qwen2-instruction": ("qwen2", {"instruction": "a star "}),
    "qwen2-eos": ("qwen2", {"pooling": "eos"}),
    "qwen3": ("qwen3", {}),
    "mistral-last": ("mistral", {"pooling": "last"}),
    "gemma-causal": ("gemma", {"bidirectional": False}),
}
FOREIGN = ("bert-mean", "bert-cls-lower", "qwen3-last-prompt")

# Runs without this package: what a user of sentence-transformers does.
SCRIPT = """
import json, pathlib, sys
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Normalize, Pooling, Transformer

root, texts = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for folder in root.glob("export-*"):
    model = SentenceTransformer(str(folder), device="cpu")
    found = [model.encode(texts), model.encode_query(texts), model.encode(texts, batch_size=1)]
    args = SentenceTransformerTrainingArguments(
        root / "out", max_steps=1, learning_rate=1e-2, per_device_train_batch_size=len(texts),
        save_strategy="no", report_to=[], use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model, args, Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
        loss=MultipleNegativesRankingLoss(model, scale=10.0),
    )
    loss = torch.tensor(trainer.train().training_loss)
    model.save(str(root / "tuned"))
    again = SentenceTransformer(str(root / "tuned"))
    tuned = [torch.tensor(one.encode(texts)) for one in (model, again)]
    torch.save(([torch.tensor(part) for part in found], loss, tuned), root / f"{folder.name}.pt")
for name in json.loads(sys.argv[3]):
    kind, pooling, *more = name.split("-")
    transformer = Transformer(str(root / kind), do_lower_case="lower" in more)
    mode = {"last": "lasttoken"}.get(pooling, pooling)
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), mode), Normalize()],
        prompts={"query": "the picture of "},
        default_prompt_name="query" if "prompt" in more else None,
        device="cpu",
    )
    model.save(str(root / name))
    torch.save(torch.tensor(model.encode(texts)), root / f"{name}.pt")
assert "llm2clip_vlm" not in sys.modules
"""


def foreign_models(root: Path) -> None:
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
    decoder = Qwen3Config(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, head_dim=8, **sizes
    )
    for name, model in (("bert", BertModel(bert)), ("qwen3", Qwen3Model(decoder))):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    # An upper-case word that only a lower-cased text does not have.
    content = (root / "bert" / "tokenizer.json").read_text()
    assert '"Lowercase"' in content
    (root / "bert" / "tokenizer.json").write_text(content.replace('{"type": "Lowercase"}', "null"))


def exported(root: Path, name: str) -> TextEncoder:
    architecture, keys = EXPORTS[name]
    keys = dict(keys)
    llm = build(root / f"llm-{name}", architecture)
    if not keys.pop("eos", True):
        tokenizer: Any = llm_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.save_pretrained(llm)
    encoder = TextEncoder.from_pretrained(llm, **keys)
    if name == "llama-no-eos":
        assert (encoder.tokens.front, encoder.tokens.behind) == ([2], [])
    encoder.save_pretrained(root / f"encoder-{name}")
    target = export_sentence_transformers(
        encoder, root / f"encoder-{name}", root / f"export-{name}"
    )
    assert target is not None
    return encoder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Exports and foreign embedders, with what sentence-transformers makes of each."""
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("needs sentence-transformers (pip install sentence-transformers)")
    root = tmp_path_factory.mktemp("shelf")
    ours = {name: exported(root, name).float().encode(TEXTS) for name in EXPORTS}
    foreign_models(root)
    command = [sys.executable, "-c", SCRIPT, str(root), json.dumps(TEXTS), json.dumps(FOREIGN)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, ours


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_open_in_sentence_transformers(
    shelf: tuple[Path, dict[str, torch.Tensor]], name: str
) -> None:
    root, ours = shelf
    vectors, loss, tuned = torch.load(root / f"export-{name}.pt")
    for found in vectors:
        torch.testing.assert_close(found, ours[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)
    # its Trainer, without options, pools the same tokens
    expected = F.cross_entropy(10 * ours[name] @ ours[name].flip(0).T, torch.arange(4))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(*tuned, atol=1e-6, rtol=0)
    assert (tuned[0] - ours[name]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FOREIGN)
def test_an_embedder_takes_stage_1s_place(
    shelf: tuple[Path, dict[str, torch.Tensor]], name: str, tmp_path: Path
) -> None:
    root, _ = shelf
    encoder = TextEncoder.from_pretrained(root / name)
    expected = torch.load(root / f"{name}.pt")
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)
    assert encoder.settings.bidirectional == name.startswith("bert")
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(TEXTS), expected, atol=1e-5, rtol=0)
    assert again.fingerprint == encoder.fingerprint
    with pytest.raises(ModelError, match=r"pooling is .*leave pooling out"):
        TextEncoder.from_pretrained(root / name, pooling="eos")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_older_transformers_refuses_the_export(tmp_path: Path, name: str) -> None:
    exported(tmp_path, name)
    config = json.loads((tmp_path / f"export-{name}" / "config.json").read_text())
    assert config["is_causal"] is False
    if name == "llama":  # no older version knows this one, and it is never causal
        assert config["model_type"] == "eurobert"
        assert type(AutoConfig.from_pretrained(tmp_path / "export-llama")).__name__ == (
            "EuroBertConfig"
        )
    tokenizer = json.loads((tmp_path / f"export-{name}" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "TokenizersBackend"  # unknown to transformers 4


def test_no_export_where_the_vectors_would_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = build(tmp_path / "llm", "qwen2")
    encoder = TextEncoder.from_pretrained(llm)
    encoder.tokenizer.backend_tokenizer.normalizer = Lowercase()  # Qwen2Tokenizer has its own
    encoder.save_pretrained(tmp_path / "encoder")
    with caplog.at_level(logging.WARNING):
        found = export_sentence_transformers(encoder, tmp_path / "encoder", tmp_path / "export")
    assert found is None
    assert not (tmp_path / "export").exists()
    assert "loads from there as another one" in caplog.text


@pytest.mark.parametrize("kind", ["text_encoder", "embedder"])
def test_a_hub_id_brings_its_settings(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the folder that was pushed does; they are files of their own."""
    from huggingface_hub import constants

    repo = tmp_path / "cache" / "models--org--one"
    folder = repo / "snapshots" / "c0ffee"
    encoder = TextEncoder.from_pretrained(
        build(tmp_path / "llm"), pooling="last", instruction="the", bidirectional=False
    )
    encoder.save_pretrained(folder)
    if kind == "embedder":
        (folder / "text_encoder.json").unlink()
        write_embedder(folder, **{"pool/config": {"pooling_mode_lasttoken": True}})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, expected = TextEncoder.from_pretrained("org/one"), TextEncoder.from_pretrained(folder)
    assert found.settings == expected.settings and found.settings.pooling == "last"
    torch.testing.assert_close(found.encode(TEXTS), expected.encode(TEXTS), atol=0, rtol=0)


def write_embedder(root: Path, **files: Any) -> Path:
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "pool", "type": "sentence_transformers.models.Pooling"},
    ]
    content = {"modules": entries, "pool/config": {"pooling_mode_mean_tokens": True}, **files}
    for name, value in content.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(value))
    return root


def test_embedder_files(tmp_path: Path) -> None:
    assert read_embedder(tmp_path) is None
    found = read_embedder(write_embedder(tmp_path))
    assert found is not None
    assert (found.model_dir, found.pooling, found.prompt) == (tmp_path, "mean", "")
    assert found.max_length_tokens is None
    modern: dict[str, Any] = {"pool/config": {"pooling_mode": "cls"}}
    modern["sentence_bert_config"] = {"max_seq_length": 9, "do_lower_case": True}
    found = read_embedder(write_embedder(tmp_path, **modern))
    assert found is not None
    assert (found.pooling, found.max_length_tokens, found.lower_case) == ("cls", 9, True)
    (tmp_path / "sentence_bert_config.json").rename(tmp_path / "sentence_roberta_config.json")
    assert read_embedder(tmp_path) == found  # as sentence-transformers reads an older one


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": [{"path": "", "type": "a.Transformer"}]}, r"modules are \['Transformer'\]"),
        (
            {
                "modules": [
                    {"path": "", "type": "a.Transformer"},
                    {"path": "pool", "type": "a.Pooling"},
                    {"path": "2", "type": "a.Dense"},
                ]
            },
            "'Dense'.*expected Transformer, Pooling and at most Normalize",
        ),
        (
            {
                "modules": [
                    {"path": "../..", "type": "a.Transformer"},
                    {"path": "pool", "type": "a.Pooling"},
                ]
            },
            "outside of the directory",
        ),
        ({"pool/config": {"pooling_mode": "max"}}, r"pooling is \['max'\]"),
        ({"pool/config": {"pooling_mode": ["mean", "cls"]}}, r"pooling is \['mean', 'cls'\]"),
        (
            {
                "pool/config": {"pooling_mode": "mean", "include_prompt": False},
                "config_sentence_transformers": {
                    "prompts": {"q": "query: "},
                    "default_prompt_name": "q",
                },
            },
            "default prompt that is not pooled",
        ),
    ],
)
def test_embedders_that_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_embedder(write_embedder(tmp_path, **files))
