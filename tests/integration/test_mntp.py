"""The optional step before stage 1: masked tokens, guessed with bidirectional attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.text.masking import MaskedRows
from llm2clip_vlm.files import load_program
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.runs.manifest import HandoffError, refuse_bidirectional
from tests.tiny import llm_tokenizer

TEXTS = ["a red star on the left", "two blue circles and a small dog"] * 40


def rows(**keys: object) -> MaskedRows:
    arguments = {"length_tokens": 16, "mask_token": ":", "mask_probability": 0.25, "seed": 0}
    return MaskedRows(TEXTS, llm_tokenizer(), **{**arguments, **keys})  # type: ignore[arg-type]


def test_masks_hide_what_they_ask_for() -> None:
    made = rows()
    items = [made[i] for i in range(len(made))]
    ids = torch.stack([item["input_ids"] for item in items])
    labels = torch.stack([item["labels"] for item in items])
    hidden = labels != IGNORE_INDEX
    assert (ids[hidden] == made.mask_id).all()
    assert torch.equal(torch.where(hidden, labels, ids), torch.from_numpy(made.rows).long())
    assert 0.2 < hidden.float().mean() < 0.3
    assert len({tuple(row) for row in hidden.tolist()}) == len(made)  # each row draws for itself
    assert torch.equal(rows()[3]["labels"], labels[3])
    assert not torch.equal(rows(seed=1)[3]["labels"], labels[3])
    more = rows(mask_probability=0.6)
    assert sum((more[i]["labels"] != IGNORE_INDEX).sum() for i in range(9)) > hidden[:9].sum()


def test_a_text_writes_no_control_token() -> None:
    tokenizer = llm_tokenizer()
    eos = tokenizer.eos_token
    made = MaskedRows([f"a red {eos} star"] * 40, tokenizer, 16, ":", 0.25, 0)
    plain = tokenizer("a red star")["input_ids"].count(tokenizer.eos_token_id) * 40
    assert (made.rows == tokenizer.eos_token_id).sum() <= plain


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_token '_' is .* expected one known token"):
        rows(mask_token="_")
    with pytest.raises(ValueError, match="tokens do not fill a row of 9999"):
        rows(length_tokens=9999)


def test_mntp_learns_and_stage_1_takes_it(tmp_path: Path, tiny_llm: Path, repo_root: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"captions": [text, text + " ."]}) + "\n" for text in TEXTS)
    )
    recipe = tmp_path / "mntp.yaml"
    content = {
        "stage": "stage0_mntp",
        "output_dir": str(tmp_path / "out"),
        "language_model": str(tiny_llm),
        "sources": [{"path": str(tmp_path / "texts.jsonl")}],
        "max_length_tokens": 32,
        "mask_token": ":",
        "global_batch_size": 8,
        "trainer": {
            "max_steps": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }
    recipe.write_text(yaml.safe_dump(content))
    stage = load_program(repo_root / "stages" / "stage0_mntp.py")
    stage.main([str(recipe), "lora=null"])
    log = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    assert losses[-1] < losses[0] - 0.5

    model = tmp_path / "out" / "language_model"
    with pytest.raises(HandoffError):  # it is no decoder any more
        refuse_bidirectional(AutoConfig.from_pretrained(model), model)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits[:, 0]
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    before, after = (
        TextEncoder.from_pretrained(path).encode(["a dog"]) for path in (tiny_llm, model)
    )
    assert (before - after).abs().max() > 1e-3

    adapted = tmp_path / "adapted"
    stage.main([str(recipe), f"output_dir={adapted}", "trainer.max_steps=2"])
    (checkpoint,) = (adapted / "checkpoints").iterdir()
    assert (checkpoint / "adapter_config.json").is_file()
    merged = TextEncoder.from_pretrained(adapted / "language_model").encode(["a dog"])
    assert (before - merged).abs().max() > 1e-4
