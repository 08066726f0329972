"""Stage 2a with several writers and prompts, the embed command, and stage 2b from a cold cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm2clip_vlm.cli import main
from llm2clip_vlm.data.cache import embeddings
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.runs.manifest import read_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from tests.integration.test_stage2b import same, weights
from tests.tiny import WORDS, write_image

PAIRS = 24


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(PAIRS):
        write_image(folder / "images" / f"{i}.png", seed=i)
        words = WORDS[i : i + 12]
        captions = {"short": [" ".join(words[:3])], "long": [" ".join(words)]}
        rows.append({"id": str(i), "image": f"images/{i}.png", "captions": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe_2a(pairs: Path, tiny_llm: Path, tmp_path: Path) -> Path:
    path = tmp_path / "stage2a.yaml"
    recipe = {
        "stage": "stage2a_cache_text",
        "output_dir": str(tmp_path / "one"),
        "text_encoder": {"language_model": str(tiny_llm)},
        "sources": [{"path": str(pairs)}],
        "batch_tokens": 64,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    build = EmbeddingCache.build.__func__  # type: ignore[attr-defined]

    def build_small(cls: Any, *args: Any, **kwargs: Any) -> EmbeddingCache:
        cache: EmbeddingCache = build(cls, *args, shard_rows=5, **kwargs)
        return cache

    monkeypatch.setattr(embeddings.EmbeddingCache, "build", classmethod(build_small))


def files(folder: Path) -> dict[str, bytes]:
    found = [folder / "header.json", *folder.glob("shard-*")]
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.usefixtures("small_shards")
def test_slices_make_the_bytes_of_one_build(
    recipe_2a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def embed(*words: str) -> str:
        assert main(["embed", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    recipe = [str(recipe_2a), "text_encoder.max_length_tokens=8"]  # half of the captions are longer
    embed("build", *recipe)
    one = files(tmp_path / "one")
    assert len(one) == 1 + -(-2 * PAIRS // 5)
    for i in (1, 0):
        for folder in ("together", f"slice-{i}"):
            embed("build", *recipe, f"slice={i}/2", f"output_dir={tmp_path / folder}")
    assert files(tmp_path / "together") == one
    assert read_manifest(tmp_path / "together") is None
    embed("merge", str(tmp_path / "merged"), str(tmp_path / "slice-0"), str(tmp_path / "slice-1"))
    assert files(tmp_path / "merged") == one
    report = embed("report", str(tmp_path / "merged"))
    assert "dedup ratio    unknown" in report
    assert f"cost           {2 * PAIRS} texts in" in report
    assert f"texts/s), {PAIRS} of them cut\n" in report
    embed("build", *recipe, f"output_dir={tmp_path / 'merged'}")
    assert files(tmp_path / "merged") == one
    report = embed("report", str(tmp_path / "merged"))
    assert f"texts/s), {PAIRS} of them cut\n" in report
    assert f"rows           {2 * PAIRS} of 32 numbers" in report
    assert "files          10 shards, 0 parts of unfinished runs" in report
    assert f"dedup ratio    1.000 ({2 * PAIRS} texts" in report
    assert "encoder        pooling = mean" in report
    assert "are as written" in embed("verify", str(tmp_path / "merged"))
    shard = sorted((tmp_path / "merged").glob("shard-*"))[3]
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1  # of a row: at most five keys come last
    shard.write_bytes(content)
    assert main(["embed", "verify", str(tmp_path / "merged")]) == 2
    assert f"{shard.name}: sha256 is" in capsys.readouterr().err


def test_a_slice_without_work_says_so(
    recipe_2a: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "build", str(recipe_2a), "slice=1/2"]) == 0
    say = f"writer 1/2 has nothing to do: {2 * PAIRS} rows are lacking, which make 1 shards of 256"
    assert say in caplog.text
    assert main(["embed", "build", str(recipe_2a), "slice=2/2"]) == 2
    assert "slice: expected i/n with i from 0 to 1, got 2/2" in capsys.readouterr().err
    assert main(["embed", "build", str(recipe_2a)]) == 0
    caplog.clear()
    assert main(["embed", "build", str(recipe_2a), "slice=0/2", "max_bad_records=1"]) == 0
    assert "writer 0/2 has nothing to do: 0 rows are lacking" in caplog.text
    assert main(["embed", "build", str(recipe_2a), "sources=[]", "max_bad_records=2"]) == 2
    assert "sources: expected at least one, got an empty list" in capsys.readouterr().err


def test_the_command_that_is_named_rebuilds_an_old_cache(
    recipe_2a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "one"
    assert main(["embed", "build", str(recipe_2a)]) == 0
    new = files(folder)
    header = json.loads(new["header.json"])
    (folder / "header.json").write_text(json.dumps(header | {"version": 3}))
    capsys.readouterr()
    assert main(["embed", "build", str(recipe_2a)]) == 2
    said = capsys.readouterr().err
    assert f"`mv {folder} {folder}.old && llm2clip-vlm embed build {folder}.old/recipe" in said
    folder.rename(f"{folder}.old")
    assert main(["embed", "build", f"{folder}.old/recipe.resolved.yaml"]) == 0
    assert files(folder) == new


def test_a_caption_is_embedded_once_more_for_each_prompt(
    recipe_2a: Path, pairs: Path, tmp_path: Path, tiny_llm: Path
) -> None:
    assert main(["embed", "build", str(recipe_2a), "prompts=['what color', 'what shape']"]) == 0
    cache = EmbeddingCache.open(tmp_path / "one")
    assert len(cache) == 3 * 2 * PAIRS
    text = " ".join(WORDS[:12])
    for prompt in ("", "what shape"):
        encoder = TextEncoder.from_pretrained(tiny_llm, instruction=prompt)
        wanted = encoder.encode([text])
        torch.testing.assert_close(cache.lookup([text], prompt), wanted, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_two_ranks_make_the_bytes_of_one(
    recipe_2a: Path, tmp_path: Path, repo_root: Path, pairs: Path
) -> None:
    stage = str(repo_root / "stages" / "stage2a_cache_text.py")
    env = os.environ | {"PYTHONPATH": str(repo_root)}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    for name, words in (("one", []), ("two", launcher)):
        command = [sys.executable, *words, stage, str(recipe_2a), f"output_dir={tmp_path / name}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    manifests = [read_manifest(tmp_path / name) for name in ("one", "two")]
    assert manifests[0] is not None and manifests[1] is not None
    assert manifests[0]["fingerprints"] == manifests[1]["fingerprints"]


Recipe = Callable[..., Path]


@pytest.fixture
def recipe_2b(pairs: Path, tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> Recipe:
    def write(name: str, **changes: Any) -> Path:
        rates = {"vision_tower": 1e-3, "visual_projection": 1e-3, "text_adaptor": 1e-3}
        values: dict[str, Any] = {
            "stage": "stage2b_vision_encoder",
            "output_dir": str(tmp_path / name),
            "global_batch_size": 8,
            "vision_tower": str(tiny_clip),
            "embedding_cache": str(tmp_path / f"{name}-cache"),
            "write_through": {"language_model": str(tiny_llm)},
            "projection_dim": 16,
            "learning_rates": rates,
            "train": [{"path": str(pairs)}],
            "caption_weights": {"short": 1.0, "long": 1.0},
            "evaluation": [{"path": str(pairs), "limit": 4}],
            "trainer": {
                "per_device_train_batch_size": 8,
                "max_steps": 8,
                "logging_steps": 1,
                "save_steps": 4,
                "save_total_limit": 2,
                "disable_tqdm": True,
                **changes.pop("trainer", {}),
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the encoder was asked for, in order."""
    asked: list[str] = []
    plain = TextEncoder.encode

    def encode(self: TextEncoder, texts: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.extend(texts)
        return plain(self, texts, *args, **kwargs)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    return asked


def train(path: Path, *overrides: str) -> Path:
    assert main(["train", "stage2b_vision_encoder", str(path), *overrides]) == 0
    return Path(yaml.safe_load(path.read_text())["output_dir"])


def test_stage_2b_fills_a_cold_cache(
    recipe_2a: Path, recipe_2b: Recipe, encoded: list[str], tmp_path: Path
) -> None:
    cold = train(recipe_2b("cold"))
    assert len(encoded) == len(set(encoded)) > PAIRS // 2
    cache = EmbeddingCache.open(tmp_path / "cold-cache")
    cache.verify()
    assert len(cache) == len(encoded)
    assert not list(cache.directory.glob("part-*"))  # at its end they became shards
    manifest = read_manifest(cold)
    assert manifest is not None
    parents = {"vision_tower", "text_encoder", "train.0", "evaluation.0", "pictures"}
    assert set(manifest["parents"]) == parents
    assert manifest["fingerprints"]["text_encoder.pooling"] == "mean"

    # warm: nothing is encoded, workers or not, and nothing else changes
    encoded.clear()
    warm = recipe_2b("warm", embedding_cache=str(cache.directory))
    out = train(warm)
    assert encoded == []
    assert same(weights(cold / "model"), weights(out / "model"))
    assert main(["embed", "build", str(recipe_2a), f"output_dir={cache.directory}"]) == 0
    lacking = 2 * PAIRS - len(cache)  # stage 2a encodes what was never drawn
    assert len(set(encoded[:lacking])) == lacking
    assert len(encoded) == lacking + 3  # and three texts again, to compare
    whole = recipe_2b("whole", embedding_cache=str(cache.directory), write_through=None)
    assert same(weights(cold / "model"), weights(train(whole) / "model"))


def test_a_killed_cold_run_resumes_to_the_same_weights(
    recipe_2b: Recipe, encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe_2b("whole", trainer={"dataloader_num_workers": 1}))
    path = recipe_2b("killed", trainer={"dataloader_num_workers": 1})
    plain = TextEncoder.encode
    calls = 0

    def killed(self: TextEncoder, texts: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return plain(self, texts, *args, **kwargs)

    monkeypatch.setattr(TextEncoder, "encode", killed)
    assert main(["train", "stage2b_vision_encoder", str(path)]) == 130  # as after Ctrl-C
    out = tmp_path / "killed"
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert 0 < max(steps, default=0) < 8
    assert list((tmp_path / "killed-cache").glob("part-*"))
    train(path)
    assert same(weights(whole / "model"), weights(out / "model"))
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        for run in (whole, out)
    ]
    assert losses[0] == losses[1]
    assert files(tmp_path / "whole-cache") == files(tmp_path / "killed-cache")
    shutil.rmtree(out)


@pytest.mark.slow
def test_two_ranks_fill_one_cache(recipe_2b: Recipe, tmp_path: Path, repo_root: Path) -> None:
    """Cold and warm runs end alike, so each rank found what it, and the other one, had encoded."""
    stage = str(repo_root / "stages" / "stage2b_vision_encoder.py")
    env = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    cache = tmp_path / "cold-cache"
    sealed = {}
    for name in ("cold", "warm"):
        per_device = {"per_device_train_batch_size": 4}
        path = recipe_2b(name, embedding_cache=str(cache), trainer=per_device)
        command = [sys.executable, *launcher, stage, str(path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        sealed[name] = {file.name: file.read_bytes() for file in cache.glob("[!.]*")}
    assert sealed["cold"] == sealed["warm"]
    assert all(file == "header.json" or file.startswith("shard-") for file in sealed["cold"])
    EmbeddingCache.open(cache).verify()
    assert len(EmbeddingCache.open(cache)) > PAIRS
    assert same(weights(tmp_path / "cold" / "model"), weights(tmp_path / "warm" / "model"))
