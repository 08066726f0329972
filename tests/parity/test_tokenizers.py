"""Tokenizers: a SentencePiece file alone opens, and transformers 4 reads what is written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llm2clip_vlm.data.conversation.messages import (
    build_labels,
    build_plain_labels,
    decoded_preview,
)
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.models.loading import read_tokenizer
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from tests.tiny import llama_config

TURNS = [
    {"from": "human", "value": "<image>\nwhat color is </s> ?"},
    {"from": "gpt", "value": "red </s> and [INST] green"},
]
TEXT = "what color is </s> it ? [INST]\n\tred"


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer is a SentencePiece file, as Vicuna's and LLaVA-1.5's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "text.txt").write_text("what color is it ? red and green . USER: ASSISTANT:\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(size, pad=0, bos=1, eos=2)).save_pretrained(folder)
    return folder


def test_a_sentencepiece_tokenizer_opens_trains_and_comes_back(
    vicuna: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    model, processor = build_vlm(tiny_clip, vicuna, chat_template="vicuna_v1")
    tokenizer = processor.tokenizer
    save_vlm(model, processor, tmp_path / "model")
    again = load_vlm(tmp_path / "model")[1]
    for build in (lambda p: build_labels(p, TURNS), lambda p: build_plain_labels(p, TEXT)):
        ids, labels = build(processor)
        assert build(again) == (ids, labels)
        assert ids.count(tokenizer.eos_token_id) == labels.count(tokenizer.eos_token_id) == 1
        assert decoded_preview(ids, labels, tokenizer).endswith("</s>»")
    assert (tmp_path / "model" / "tokenizer.model").is_file()
    certificate = export(tmp_path / "model", "llava", tmp_path / "llava")
    assert certificate["checks"]["logits"]["max_difference"] == 0
    config = json.loads((tmp_path / "llava" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"  # LLaVA asks for the slow one
    assert (tmp_path / "llava" / "tokenizer.model").read_bytes() == (
        vicuna / "tokenizer.model"
    ).read_bytes()


def test_what_is_written_names_nothing_that_transformers_4_lacks(tmp_path: Path) -> None:
    from tests.tiny import llm_tokenizer

    tokenizer = llm_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert "<|user|>" in config["additional_special_tokens"]
    again: Any = read_tokenizer(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert sorted(again.all_special_tokens) == sorted(tokenizer.all_special_tokens)


OLD = """
import json, sys
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers import LlavaForConditionalGeneration, __version__

folder, text = sys.argv[1:]
assert __version__.startswith("4.57"), __version__
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    logits = model.eval()(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
torch.save({"logits": logits, "answer": answer}, folder + "/old.pt")
names = list(tokenizer(text))
print(json.dumps({"ids": tokenizer(text)["input_ids"], "names": names, "prompt": prompt}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
@torch.no_grad()
def test_transformers_4_gives_the_same_ids_logits_and_answer(
    kind: str, vicuna: Path, tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    python = os.environ.get("TRANSFORMERS_4_PYTHON")
    if not python:
        pytest.skip("TRANSFORMERS_4_PYTHON names no python with transformers 4.57")
    llm, template = (vicuna, "vicuna_v1") if kind == "sentencepiece" else (tiny_llm, None)
    model, processor = build_vlm(tiny_clip, llm, chat_template=template)
    save_vlm(model, processor, tmp_path / "model")
    export(tmp_path / "model", "transformers", tmp_path / "out")
    for folder in (tmp_path / "model", tmp_path / "out"):
        ids, _ = build_labels(processor, TURNS)
        inputs = {"input_ids": torch.tensor([ids[:-1]]), "pixel_values": torch.rand(1, 3, 32, 32)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        torch.save(inputs, folder / "inputs.pt")
        command = [python, "-c", OLD, str(folder), TEXT]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        told = json.loads(run.stdout.splitlines()[-1])
        got = torch.load(folder / "old.pt", weights_only=True)
        assert told["ids"] == processor.tokenizer(TEXT)["input_ids"]
        assert told["names"] == ["input_ids", "attention_mask"]
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}
        ]
        assert told["prompt"] == processor.apply_chat_template(chat, add_generation_prompt=True)
        torch.testing.assert_close(got["logits"], model(**inputs).logits, atol=1e-5, rtol=1e-5)
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(got["answer"], answer)
