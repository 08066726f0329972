"""Stages 1 to 2b with what is rarely used together: several processes, every option, kills."""

from __future__ import annotations

import copy
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

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.runs.manifest import read_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from llm2clip_vlm.training.encoder.encoder_trainer import EncoderTrainer
from llm2clip_vlm.training.export import export_vision_tower
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


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
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


def test_a_model_that_is_saved_otherwise_stops_stage_2b(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = EncoderTrainer.export

    def other(trainer: Any, directory: Path) -> None:
        with torch.no_grad():
            trainer.model.vision_tower.encoder.layers[0].mlp.fc1.bias.add_(1.0)
        export(trainer, directory)

    monkeypatch.setattr(EncoderTrainer, "export", other)
    path = recipe("other", weight_average={"decay": 0.5}, trainer={"max_steps": 2})
    with pytest.raises(ValueError, match=r"other/model: expected equal vectors.*last checkpoint"):
        run(path)
    assert read_manifest(path.with_suffix("")) is None
    monkeypatch.undo()
    run(path)  # the next run goes on from the checkpoint, and is whole
    assert read_manifest(path.with_suffix("")) is not None


def test_a_tower_that_is_exported_otherwise_stops_stage_2b(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Any, processor: Any, directory: Path) -> Path:
        kept = copy.deepcopy(model)
        with torch.no_grad():
            kept.vision_tower.post_layernorm.bias.add_(1.0)
        return export_vision_tower(kept, processor, directory)

    monkeypatch.setattr(stage2b_vision_encoder, "export_vision_tower", other)
    with pytest.raises(ValueError, match=r"run/vision_tower: expected equal vectors"):
        run(recipe(trainer={"max_steps": 1}))


def test_an_encoder_that_is_saved_otherwise_stops_stage_1(
    tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stage1_recipe(tmp_path, tiny_llm)
    save = TextEncoder.save_pretrained

    def other(encoder: TextEncoder, directory: Path) -> None:
        with torch.no_grad():
            encoder.backbone.get_parameter("layers.0.self_attn.v_proj.weight").mul_(-1)
        save(encoder, directory)

    monkeypatch.setattr(TextEncoder, "save_pretrained", other)
    with pytest.raises(ValueError, match=r"one/text_encoder: expected equal vectors"):
        stage1_text_encoder.main([str(path)])
    assert read_manifest(tmp_path / "one") is None


def test_a_cache_with_other_vectors_stops_stage_2a(
    tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = EmbeddingCache.lookup
    monkeypatch.setattr(EmbeddingCache, "lookup", lambda *args: lookup(*args).roll(1, 0))
    with pytest.raises(ValueError, match=r"expected equal vectors.*what is cached is not what"):
        stage2a_cache_text.main([str(stage2a_recipe(tmp_path, str(tiny_llm)))])
    assert read_manifest(tmp_path / "two") is None


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


def stage1_recipe(folder: Path, llm: Path, **encoder: Any) -> Path:
    pairs = pairs_with_negatives(folder)
    source = {"path": str(pairs), "fields": ["query", "positive", "negative"], "directed": True}
    values = {
        "stage": "stage1_text_encoder",
        "output_dir": str(folder / "one"),
        "global_batch_size": 8,
        "text_encoder": {"language_model": str(llm)} | encoder,
        "lora": {"r": 4},
        "train": [source],
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 3, "disable_tqdm": True},
    }
    (folder / "one.yaml").write_text(yaml.safe_dump(values))
    return folder / "one.yaml"


CAPTIONS = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(20)]


def stage2a_recipe(folder: Path, encoder: str) -> Path:
    rows = [json.dumps({"id": str(i), "captions": [t]}) + "\n" for i, t in enumerate(CAPTIONS)]
    (folder / "captions.jsonl").write_text("".join(rows))
    values = {
        "stage": "stage2a_cache_text",
        "output_dir": str(folder / "two"),
        "text_encoder": encoder,
        "sources": [{"path": str(folder / "captions.jsonl")}],
        "prompts": ["find the "],
        "batch_tokens": 64,
    }
    (folder / "two.yaml").write_text(yaml.safe_dump(values))
    return folder / "two.yaml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_the_vectors_of_stage_1(tmp_path: Path, tiny_llm: Path, dtype: str) -> None:
    cuts = {"max_length_tokens": 6, "instruction": "a picture"}
    stage1_text_encoder.main([str(stage1_recipe(tmp_path, tiny_llm, dtype=dtype, **cuts))])
    stage2a_cache_text.main([str(stage2a_recipe(tmp_path, str(tmp_path / "one/text_encoder")))])
    trained = TextEncoder.from_pretrained(tmp_path / "one" / "text_encoder")
    assert trained.backbone.dtype == getattr(torch, dtype)
    cache = EmbeddingCache.open(tmp_path / "two")
    alone = torch.cat([trained.encode([text]) for text in CAPTIONS])
    cosine = (normalize(cache.lookup(CAPTIONS)) * alone).sum(1)
    assert cosine.min() > (0.9999 if dtype == "float32" else 0.995)
    assert (cache.lookup(CAPTIONS, "find the ") - cache.lookup(CAPTIONS)).abs().max() > 1e-2
    export = json.loads((tmp_path / "one/sentence_transformers/config.json").read_text())
    assert export["dtype"] == dtype
