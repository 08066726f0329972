"""Stage 2b on a shard that is half broken: the right count, the right list, or a loud end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.runs.hashes import HandoffError
from llm2clip_vlm.runs.manifest import read_manifest
from stages import clip_baseline, stage2b_vision_encoder
from tests.faults.test_image_text_inputs import MIXED
from tests.image_corpus import BROKEN
from tests.image_text_files import write_tar

DIM = 8


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip: Path) -> Path:
    source = write_tar(tmp_path / "00000.tar", MIXED)
    texts = [caption for _, _, caption in MIXED]

    def encode(part: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((DIM,), 1.0 + len(text)) for text in part])

    EmbeddingCache.build(tmp_path / "cache", texts, encode, {"model": "length"})
    values: dict[str, Any] = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(tmp_path / "run"),
        "global_batch_size": 8,
        "vision_tower": str(tiny_clip),
        "embedding_cache": str(tmp_path / "cache"),
        "projection_dim": 8,
        "train": [{"path": source.path, "fields": ["txt"]}],
        "trainer": {
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "dataloader_num_workers": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("limit_bytes", [0, 2**28], ids=["decoded as needed", "in memory"])
def test_the_manifest_counts_each_broken_image_once(
    recipe: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip_vlm.data.image_text.dataset.PRELOAD_LIMIT_BYTES", limit_bytes)
    stage2b_vision_encoder.main([str(recipe), "max_bad_fraction=0.9"])
    out = recipe.parent / "run"
    rows = [json.loads(line) for line in (out / "dropped.jsonl").open()]
    assert sorted(row["where"] for row in rows) == sorted(
        f"{recipe.parent / '00000.tar'}:{key}"
        for key, _, caption in MIXED
        if caption.startswith("broken ")
    )
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["extra"]["bad_records"] == len(BROKEN) == len(rows)


@pytest.mark.parametrize("limit_bytes", [0, 2**28], ids=["decoded as needed", "in memory"])
def test_more_than_a_hundredth_stops_the_run(
    recipe: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip_vlm.data.image_text.dataset.PRELOAD_LIMIT_BYTES", limit_bytes)
    with pytest.raises(RecordError, match=r"1 bad record\(s\), 0 allowed of 46 records"):
        stage2b_vision_encoder.main([str(recipe)])
    assert (recipe.parent / "run" / "dropped.jsonl").is_file()


@pytest.mark.parametrize("training", ["frozen", "full"])
def test_a_caption_without_embedding_is_told_before_pictures_are_opened(
    recipe: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen tower would see every picture first."""
    opened: list[Any] = []
    monkeypatch.setattr(ImageTextRecord, "encoded", lambda self: opened.append(self) or 1 / 0)
    write_tar(recipe.parent / "more.tar", [("x", b"", "a caption of nobody")])
    train = [{"path": str(recipe.parent / name), "fields": ["txt"]}
             for name in ("00000.tar", "more.tar")]  # fmt: skip
    words = [f"train={json.dumps(train)}", f"tower_training={training}", "max_bad_fraction=0.9"]
    with pytest.raises(HandoffError, match=r"1 of \d+ captions are not in the cache"):
        stage2b_vision_encoder.main([str(recipe), *words])
    assert not opened


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", [stage2b_vision_encoder, clip_baseline])
def test_the_recipe_says_how_pictures_are_decoded(
    recipe: Path, stage: Any, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def dataset(*_: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        raise Stop

    monkeypatch.setattr("llm2clip_vlm.training.encoder.encoder_eval.ImageTextDataset", dataset)
    values = yaml.safe_load(recipe.read_text())
    if stage is clip_baseline:
        values = {name: values[name] for name in ("output_dir", "train", "trainer")}
        values |= {"stage": "clip_baseline", "clip": str(tiny_clip), "global_batch_size": 8}
        recipe.write_text(yaml.safe_dump(values))
    changes = ["image_decoding=exact", "augmentation.crop_scale_min=0.9"]
    if stage is stage2b_vision_encoder:
        changes.append("captions_per_image=2")
    for overrides in ([], changes):
        with pytest.raises(Stop):
            stage.main([str(recipe), f"output_dir={recipe.parent / str(len(seen))}", *overrides])
    plain, changed = seen
    assert (plain["fast"], changed["fast"]) == (True, False)
    assert plain["bad"].fraction == 0.01
    assert plain["augmentation"].crop_scale_min == 1
    assert changed["augmentation"].crop_scale_min == 0.9
    if stage is stage2b_vision_encoder:
        assert (plain["captions_per_image"], changed["captions_per_image"]) == (1, 2)
