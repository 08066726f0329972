"""Stages 1 and 2b in two processes, through GradCache, compute what one process computes at once.

Plain data parallelism, ZeRO-1 and ZeRO-2, on the CPU with gloo. ZeRO-2 runs always, the rest is
marked slow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import CaptionPairs, read_captions
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.text import Stage1Recipe
from llm2clip_vlm.training.callbacks import read_metrics
from llm2clip_vlm.training.text.text_trainer import PairCollator
from tests.conftest import REPO_ROOT
from tests.tiny import WORDS, write_image
from tests.vlm_fixtures import run_here, run_stage

pytest.importorskip("deepspeed")

STEPS = 4
TRAINER = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
}
ARMS = [
    "zero2",
    pytest.param("zero1", marks=pytest.mark.slow),
    pytest.param("ddp", marks=pytest.mark.slow),
]


def launch(stage: str, recipe: Path, out: Path, arm: str, *overrides: str) -> None:
    """Runs a stage in two processes.

    One process alone would be refused: the recipe's batch is twice a process's.
    """
    words = (f"output_dir={out}", *overrides)
    if arm == "ddp":
        run_stage(stage, recipe, *words, processes=2)
        return
    config = REPO_ROOT / "recipes" / "accelerate" / "zero2_cpu.yaml"
    if arm == "zero1":
        text = config.read_text().replace("zero_stage: 2", "zero_stage: 1")
        config = recipe.with_name("zero1_cpu.yaml")
        config.write_text(text)
    run_stage(stage, recipe, *words, accelerate=str(config))


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def assert_same_training(one: Path, two: Path, weights: str) -> None:
    assert len(rows(one)) == STEPS
    for got, want in zip(rows(two), rows(one), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-4, rel=1e-5), want["step"]
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-3), want["step"]
        assert got.get("logit_scale") == pytest.approx(want.get("logit_scale"), abs=1e-4)
    a, b = (load_file(out / weights / "model.safetensors") for out in (one, two))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-3, rtol=0, msg=name)


# ------------------------------------------------------------------------------------- stage 1


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    """A recipe, and one process that trained by it with the whole batch in one graph."""
    folder = tmp_path_factory.mktemp("stage1")
    generator = torch.Generator().manual_seed(0)

    def caption(words: int) -> str:
        chosen = torch.randint(len(WORDS), (words,), generator=generator)
        return " ".join(WORDS[i] for i in chosen.tolist())

    records = [
        {"id": str(i), "anchor": caption(3 + i % 3), "positive": caption(4 + i * i % 60)}
        | ({"negative": caption(6)} if i % 3 == 0 else {})
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    source = {"path": str(folder / "pairs.jsonl"), "directed": True}
    source["fields"] = ["anchor", "positive", "negative"]
    source["prompts"] = {"*": "describe it"}
    recipe = {
        "stage": "stage1_text_encoder",
        "output_dir": str(folder / "one"),
        "global_batch_size": 16,
        "text_encoder": {"language_model": str(tiny_llm)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "train": [source],
        "trainer": {**TRAINER, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
    }
    path = folder / "stage1.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_here("stage1_text_encoder", path)
    return path


def test_processes_would_have_other_numbers_of_chunks(stage1: Path) -> None:
    recipe = load_recipe(stage1, Stage1Recipe)
    encoder = TextEncoder.from_section(recipe.text_encoder)
    records = [
        read_captions(source, BadRecords(), min_captions=2, tokens=lambda: encoder.tokens)
        for source in recipe.train
    ]
    pairs = CaptionPairs(records, recipe.train, recipe.seed)
    collator = PairCollator(encoder.tokens, 128)
    order = pairs.order(0)
    counts, negatives = [], []
    for start in range(0, 32, 8):
        batch = collator([pairs[0, int(record)] for record in order[start : start + 8]])
        counts.append(len(batch["groups"]))
        negatives.append(len(batch["negatives"]))
        assert all(group["input_ids"].numel() <= 128 for group in batch["groups"])
    assert counts[0] != counts[1] or counts[2] != counts[3], counts
    assert negatives[0] != negatives[1] or negatives[2] != negatives[3], negatives
    assert min(counts) > 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_stage1_in_two_processes_equals_one(stage1: Path, arm: str) -> None:
    out = stage1.parent / arm
    overrides = ("trainer.per_device_train_batch_size=8", "micro_batch_tokens=128")
    launch("stage1_text_encoder", stage1, out, arm, *overrides)
    assert_same_training(stage1.parent / "one", out, "text_encoder")


@pytest.mark.slow
def test_stage1_micro_batches_in_one_process(stage1: Path) -> None:
    out = stage1.parent / "cached"
    run_here("stage1_text_encoder", stage1, f"output_dir={out}", "micro_batch_tokens=64")
    for got, want in zip(rows(out), rows(stage1.parent / "one"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


# ------------------------------------------------------------------------------------ stage 2b


@pytest.fixture(scope="module")
def stage2b(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A recipe whose `logit_scale` starts above its bound and falls from there."""
    folder = tmp_path_factory.mktemp("stage2b")
    texts = [f"a {WORDS[i]} in a {WORDS[i + 7]}" for i in range(40)]
    for i in range(40):
        write_image(folder / "images" / f"{i}.png", seed=i)
    pairs = [
        {"id": str(i), "image": f"images/{i}.png", "captions": [texts[i % 36]]} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    numbers = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    vectors = dict(zip(texts, numbers, strict=True))
    EmbeddingCache.build(
        folder / "cache",
        texts,
        lambda asked: torch.stack([vectors[text] for text in asked]),
        {"model": "random"},
    )
    recipe = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(folder / "one"),
        "global_batch_size": 16,
        "vision_tower": str(tiny_clip),
        "embedding_cache": str(folder / "cache"),
        "projection_dim": 16,
        "logit_scale_init": 5.0,
        "learning_rates": {
            "vision_tower": 1e-3,
            "visual_projection": 1e-3,
            "text_adaptor": 2e-2,
        },
        "train": [{"path": str(folder / "pairs.jsonl")}],
        "trainer": {**TRAINER, "per_device_train_batch_size": 16},
    }
    path = folder / "stage2b.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_here("stage2b_vision_encoder", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_stage2b_in_two_processes_equals_one(stage2b: Path, arm: str) -> None:
    """Also: the clamp of `logit_scale` reaches DeepSpeed's own fp32 copy.

    Were that copy left above the bound, each step would start from it and end at the bound.
    """
    out = stage2b.parent / arm
    overrides = ("trainer.per_device_train_batch_size=8", "micro_batch_size=3")
    launch("stage2b_vision_encoder", stage2b, out, arm, *overrides)
    scales = [row["logit_scale"] for row in rows(stage2b.parent / "one")]
    assert scales[0] == pytest.approx(4.60517, abs=1e-5)
    assert scales[-1] < scales[0] - 0.01
    assert_same_training(stage2b.parent / "one", out, "model")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["zero2", "ddp"])
def test_sigmoid_loss_in_two_processes(stage2b: Path, arm: str) -> None:
    one, out = (stage2b.parent / f"sigmoid-{name}" for name in ("one", arm))
    overrides = ("loss=sigmoid", "logit_bias_init=-4.0", "logit_scale_init=2.3")
    if not one.exists():
        run_here("stage2b_vision_encoder", stage2b, *overrides, f"output_dir={one}")
    overrides += ("trainer.per_device_train_batch_size=8", "micro_batch_size=3")
    launch("stage2b_vision_encoder", stage2b, out, arm, *overrides)
    assert load_file(one / "model" / "model.safetensors")["logit_bias"].item() != -4.0
    assert_same_training(one, out, "model")
