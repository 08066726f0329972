"""`recipes/webdataset_8gpu` on shards of a few pictures, as docs/shards.md walks through it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from llm2clip_vlm import load_vision_tower
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.files import load_program
from llm2clip_vlm.runs.manifest import read_manifest
from tests.image_text_files import add
from tests.tiny import WORDS, write_image

RECIPES = "recipes/webdataset_8gpu"


def write_shards(folder: Path, first: int, count: int) -> None:
    """Two shards as img2dataset writes them, with a recaption in `key.json`."""
    folder.mkdir(parents=True)
    for number, keys in enumerate(
        (range(first, first + count // 2), range(first + count // 2, first + count))
    ):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for key in keys:
                picture = write_image(folder / "drawn.png", seed=key)
                words = [WORDS[(key + step) % len(WORDS)] for step in range(12)]
                said = {"key": f"{key:06d}", "status": "ok", "long_caption": " ".join(words)}
                add(shard, f"{key:06d}.png", picture.read_bytes())
                add(shard, f"{key:06d}.txt", " ".join(words[:4]).encode())
                add(shard, f"{key:06d}.json", json.dumps(said).encode())
                picture.unlink()


def test_the_three_recipes_run_on_shards(
    tmp_path: Path,
    repo_root: Path,
    tiny_llm: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data/shards", 0, 24)
    write_shards(tmp_path / "data/held_out", 30, 6)
    small = [
        "global_batch_size=8",
        "trainer.per_device_train_batch_size=8",
        "trainer.dataloader_num_workers=0",
    ]
    stages = {
        "stage1_text_encoder": [
            *small,
            f"text_encoder.language_model={tiny_llm}",
        ],
        "stage2a_cache_text": [],
        "stage2b_vision_encoder": [*small, f"vision_tower={tiny_clip}", "projection_dim=16"],
    }
    for stage, overrides in stages.items():
        program = load_program(repo_root / "stages" / f"{stage}.py")
        name = "_".join(stage.split("_")[:1])
        program.main([str(repo_root / RECIPES / f"{name}.yaml"), *overrides])
    cache = EmbeddingCache.open("runs/webdataset/stage2a")
    assert len(cache) == 60  # a short and a long caption of each of 30 pictures
    results = json.loads(Path("runs/webdataset/stage2b/results.json").read_text())
    assert {"txt", "long_caption"} <= set(json.dumps(results).replace('"', " ").split())
    manifest = read_manifest("runs/webdataset/stage2b")
    assert manifest is not None and manifest["stage"] == "stage2b_vision_encoder"
    assert load_vision_tower("runs/webdataset/stage2b/vision_tower").num_patches > 0
