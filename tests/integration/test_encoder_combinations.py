"""Stages 1 to 2b with what is rarely used together: several processes, every option, kills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import normalize

from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.training.callbacks import read_metrics
from stages import stage1_text_encoder, stage2a_cache_text, stage2b_vision_encoder
from tests.integration.test_keeping import ALL
from tests.integration.test_stage2b import Recipe, data, recipe, run, same, weights
from tests.killing import run_apart
from tests.tiny import WORDS

__all__ = ["data", "recipe"]  # fixtures

LORA = {"tower_training": "lora", "tower_lora": {"r": 2, "alpha": 4, "dropout": 0.1}}


def launch(stage: str, path: Path, repo_root: Path, *overrides: str) -> None:
    """Two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(repo_root / "stages" / f"{stage}.py"), str(path), *overrides]
    env = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def unfinish(out: Path) -> None:
    """As killed after the first of two checkpoints."""
    for name in ("model", "vision_tower"):
        shutil.rmtree(out / name)
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[-1]))
    shutil.rmtree(last)
    (out / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_two_processes_keep_and_resume(recipe: Recipe, repo_root: Path, more: Any) -> None:
    changes = ALL | more | {"patch_dropout": 0.0}  # each process drops patches of its own
    if more:
        changes["tower_lora"] = LORA["tower_lora"] | {"dropout": 0.0}  # type: ignore[operator]
    one = run(recipe("one", **changes))
    path = recipe("two", **changes, trainer={"per_device_train_batch_size": 4})
    launch("stage2b_vision_encoder", path, repo_root)
    two = path.with_suffix("")
    got, want = (read_metrics(out / "metrics.jsonl") for out in (two, one))
    for a, b in zip(got, want, strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-5), b["step"]
    before = weights(two / "model")
    unfinish(two)
    launch("stage2b_vision_encoder", path, repo_root)
    for name, value in weights(two / "model").items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_everything_at_once_is_killed_and_resumes(recipe: Recipe, share: float) -> None:
    changes = ALL | LORA | {"trainer": {"save_steps": 2}}
    main = stage2b_vision_encoder.main
    path = recipe("whole", **changes)
    seconds = run_apart(main, [str(path)])
    cut = recipe("cut", **changes)
    run_apart(main, [str(cut)], share * seconds)
    run_apart(main, [str(cut)])
    whole, found = (weights(p.with_suffix("") / "model") for p in (path, cut))
    assert same(whole, found)
    assert not [name for name in found if "lora" in name]


def pairs_with_negatives(folder: Path) -> Path:
    rows = [
        {
            "query": " ".join(WORDS[i : i + 3]),
            "positive": " ".join(WORDS[i + 1 : i + 6]),
            "negative": " ".join(WORDS[i + 20 : i + 24]),
        }
        for i in range(24)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_the_vectors_of_stage_1(tmp_path: Path, tiny_llm: Path, dtype: str) -> None:
    pairs = pairs_with_negatives(tmp_path)
    source = {"path": str(pairs), "fields": ["query", "positive", "negative"], "directed": True}
    encoder = {
        "language_model": str(tiny_llm),
        "dtype": dtype,
        "max_length_tokens": 6,  # cuts
        "instruction": "a picture",
    }
    one = {
        "stage": "stage1_text_encoder",
        "output_dir": str(tmp_path / "one"),
        "global_batch_size": 8,
        "text_encoder": encoder,
        "lora": {"r": 4},
        "train": [source],
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 3, "disable_tqdm": True},
    }
    texts = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(20)]
    rows = "".join(json.dumps({"id": str(i), "captions": [t]}) + "\n" for i, t in enumerate(texts))
    (tmp_path / "captions.jsonl").write_text(rows)
    two = {
        "stage": "stage2a_cache_text",
        "output_dir": str(tmp_path / "two"),
        "text_encoder": str(tmp_path / "one" / "text_encoder"),
        "sources": [{"path": str(tmp_path / "captions.jsonl")}],
        "prompts": ["find the "],
        "batch_tokens": 64,
    }
    for main, values in ((stage1_text_encoder.main, one), (stage2a_cache_text.main, two)):
        path = tmp_path / f"{values['stage']}.yaml"
        path.write_text(yaml.safe_dump(values))
        main([str(path)])
    trained = TextEncoder.from_pretrained(tmp_path / "one" / "text_encoder")
    assert trained.backbone.dtype == getattr(torch, dtype)
    cache = EmbeddingCache.open(tmp_path / "two")
    alone = torch.cat([trained.encode([text]) for text in texts])
    cosine = (normalize(cache.lookup(texts)) * alone).sum(1)
    assert cosine.min() > (0.9999 if dtype == "float32" else 0.995)
    assert (cache.lookup(texts, "find the ") - cache.lookup(texts)).abs().max() > 1e-2
    export = json.loads((tmp_path / "one/sentence_transformers/config.json").read_text())
    assert export["dtype"] == dtype
