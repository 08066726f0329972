"""Stage 2b from shards at an address: to the bit what it learns from the same files on a disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text import dataset
from llm2clip_vlm.remote import addresses
from llm2clip_vlm.runs.inputs import InputsError
from llm2clip_vlm.runs.manifest import read_manifest
from stages import stage2b_vision_encoder
from tests.image_text_files import write_tar
from tests.remote_server import s3_served, served
from tests.tiny import write_image

pytestmark = pytest.mark.slow

DIM = 12
SHARDS, ROWS = 3, 16


def encode(texts: list[str]) -> torch.Tensor:
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
    return torch.stack(
        [torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Shards, and the cache of their captions; pictures are read anew each time they are needed."""
    folder = tmp_path / "store"
    folder.mkdir()
    texts = []
    for shard in range(SHARDS):
        rows: list[tuple[str, bytes, Any]] = []
        for i in range(ROWS):
            write_image(tmp_path / "image.png", seed=shard * ROWS + i)
            captions = {"short": [f"short {shard} {i}"], "long": [f"long {shard} {i}"]}
            texts += [*captions["short"], *captions["long"]]
            rows.append((f"{shard}-{i}", (tmp_path / "image.png").read_bytes(), captions))
        write_tar(folder / f"{shard:02}.tar", rows)
    EmbeddingCache.build(tmp_path / "embeddings", texts, encode, {"model": "hash"})
    monkeypatch.setattr(dataset, "PRELOAD_LIMIT_BYTES", 0)
    monkeypatch.setattr(addresses, "_LONGEST_WAIT_S", 0.0)
    addresses.look_up.cache_clear()
    yield folder
    addresses.look_up.cache_clear()


def train(tmp_path: Path, clip: Path, name: str, path: str) -> dict[str, torch.Tensor]:
    rate = {"vision_tower": 1e-3, "visual_projection": 1e-3, "text_adaptor": 1e-3}
    source = {"path": path, "fields": ["short", "long"], "cache_dir": str(tmp_path / f"c-{name}")}
    recipe = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(tmp_path / name),
        "seed": 1,
        "global_batch_size": 8,
        "vision_tower": str(clip),
        "embedding_cache": str(tmp_path / "embeddings"),
        "projection_dim": 16,
        "learning_rates": rate,
        "train": [source],
        "evaluation": [source | {"limit": 10}],
        "trainer": {"max_steps": 14, "disable_tqdm": True, "dataloader_num_workers": 2},
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stage2b_vision_encoder.main([str(tmp_path / f"{name}.yaml")])
    return load_file(tmp_path / name / "model" / "model.safetensors")


def test_training_is_equal_to_the_bit(
    store: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(name, reason=f"{name} is not installed: extra `dev`")
    local = train(tmp_path, tiny_clip, "local", str(store / "*.tar"))
    with served(store) as (url, faults):
        faults.plan = ["", "503", "cut", "short", "", "slow"] * 20
        remote = train(tmp_path, tiny_clip, "https", f"{url}/{{00..02}}.tar")
        assert faults.seen["RANGE"] > 1.5 * SHARDS * (ROWS + 1)
    assert all(torch.equal(local[key], remote[key]) for key in local) and len(local) > 20
    with s3_served(monkeypatch) as (url, client, faults):
        for file in store.glob("*.tar"):
            client.upload_file(str(file), "shards", file.name)
        faults.plan = ["", "503", "", "", "cut"] * 5
        remote = train(tmp_path, tiny_clip, "s3", f"{url}/*.tar")
        assert not faults.plan
        assert all(torch.equal(local[key], remote[key]) for key in local)
        manifest = read_manifest(tmp_path / "s3")
        assert manifest is not None
        assert [row[0] for row in manifest["parents"]["train.0"]["remote"]] == [
            f"{url}/{shard:02}.tar" for shard in range(SHARDS)
        ]
        assert (tmp_path / "s3" / "dropped.jsonl").read_text() == ""
        results = [
            json.loads((tmp_path / name / "results.json").read_text())
            for name in ("local", "https", "s3")
        ]
        assert results[0]["retrieval"] == results[1]["retrieval"] == results[2]["retrieval"]
        before = faults.seen["RANGE"]
        with pytest.raises(InputsError, match=r"train\.0\.path: s3://shards/none\.tar: .*no such"):
            train(tmp_path, tiny_clip, "none", f"{url}/none.tar")
        assert faults.seen["RANGE"] == before and not (tmp_path / "none").exists()
