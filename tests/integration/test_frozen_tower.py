"""A tower that does not train encodes each picture once; all else is as if it ran in every step."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from transformers import CLIPVisionModel

from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading import images
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.runs.hashes import HandoffError
from llm2clip_vlm.training.encoder.frozen_tower import FrozenTower
from tests.integration import test_clip_baseline as control
from tests.integration.test_stage2b_options import Recipe, losses, pairs, recipe, run, weights
from tests.tiny import write_image

__all__ = ["pairs", "recipe"]  # fixtures
control_recipe = control.recipe


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the tower got."""
    counts: list[int] = []
    forward = CLIPVisionModel.forward

    def counted(tower: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        if pixel_values.device.type != "meta":
            counts.append(len(pixel_values))
        return forward(tower, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", counted)
    return counts


def close(a: Path, b: Path) -> None:
    ours, theirs = weights(a / "model"), weights(b / "model")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6, msg=name)
    results = [json.loads((out / "results.json").read_text()) for out in (a, b)]
    assert results[0] == results[1]
    assert losses(a) == pytest.approx(losses(b), abs=1e-6)


def test_stage_2b_with_cached_features(
    recipe: Recipe, pairs: Path, tmp_path: Path, seen: list[int], caplog: Any
) -> None:
    shared = {
        "tower_training": "frozen",
        "evaluation": [{"path": str(pairs)}],
        "evaluation_steps": 2,
        "weight_average": {"decay": 0.5},
        "feature_cache": str(tmp_path / "features"),
    }
    every_step = run(recipe("every_step", **shared | {"feature_cache": False}))
    per_run = sum(seen)
    seen.clear()
    cached = run(recipe("cached", **shared))
    close(every_step, cached)
    # 24 pictures, 8 noise images and 2 at the start, and those compared at the end
    assert 24 < sum(seen) <= 24 + 30 < per_run
    seen.clear()
    other = run(recipe("seed", **shared, seed=1))
    assert sum(seen) <= 30 and losses(other) != losses(cached)

    # a run that was killed goes on, with its own cache too
    path = recipe("own", **shared | {"feature_cache": None})
    own = run(path)
    close(cached, own)
    assert list((own / "features").iterdir())
    shutil.rmtree(own / "checkpoints" / "checkpoint-4")
    (own / "manifest.json").unlink()
    seen.clear()
    run(path)
    close(cached, own)
    assert sum(seen) <= 30

    run(recipe("crops", **shared, augmentation={"crop_scale_min": 0.5}))
    assert "frozen tower runs in every step" in caplog.text


def test_the_control_with_cached_features(control_recipe: control.Recipe, seen: list[int]) -> None:
    rates = {"vision_model": 0.0, "text_model": 1e-3, "projections": 1e-3}
    every = control.run(control_recipe("every", learning_rates=rates, feature_cache=False))
    assert seen.count(8) >= 4
    seen.clear()
    close(every, control.run(control_recipe("cached", learning_rates=rates)))
    assert [n for n in seen if n > 2] == [4] * 6  # 24, beside noise and what is compared


def test_features_are_of_pictures_as_they_are_decoded_now(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten pictures every third is compared: one that became another one was none of them."""
    for number in range(10):
        write_image(tmp_path / f"{number}.png", seed=number)
    with Image.open(tmp_path / "4.png") as picture:
        picture.convert("LA").save(tmp_path / "4.png")
    rows = [{"id": n, "image": f"{n}.png", "captions": ["a dog"]} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_image_text(ImageTextSource(path=str(tmp_path / "a.jsonl")), BadRecords())

    def features(folder: str) -> torch.Tensor:
        tower = load_vision_tower(tiny_clip, torch.float32)
        frozen = FrozenTower(tower.model, tower.image_processor, tmp_path / folder)
        return frozen(records, BadRecords())[1]

    to_rgb = images.to_rgb
    with monkeypatch.context() as before:
        before.setattr(images, "DECODING", 0, raising=False)
        black = Image.new("RGB", (8, 8))
        before.setattr(images, "to_rgb", lambda i: black if i.mode == "LA" else to_rgb(i))
        features("kept")
    assert torch.equal(features("kept"), features("new"))
    with monkeypatch.context() as later:
        later.setattr("PIL.__version__", "99")
        features("kept")
    assert len([*(tmp_path / "kept").iterdir()]) == 3


def test_what_changed_is_noticed(tiny_clip: Path, tmp_path: Path, seen: list[int]) -> None:
    rows = [{"id": str(i), "image": f"{i}.png", "captions": ["a dog"]} for i in range(5)]
    for row in rows[:4]:
        write_image(tmp_path / str(row["image"]), seed=int(str(row["id"])))
    (tmp_path / "4.png").write_bytes(b"no picture")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_image_text(ImageTextSource(path=str(file)), BadRecords())

    def features(clip: Path = tiny_clip, **changes: Any) -> tuple[FrozenTower, torch.Tensor]:
        tower = load_vision_tower(clip, torch.float32)
        for name, value in changes.items():
            setattr(tower.image_processor, name, value)
        frozen = FrozenTower(tower.model, tower.image_processor, tmp_path / "cache")
        bad = BadRecords(limit=1)
        kept, found = frozen(records, bad)
        assert kept == [0, 1, 2, 3] and bad.count == 1
        with torch.no_grad():
            pixels = tower.image_processor(
                images=[records[row].open() for row in kept], return_tensors="pt"
            )
            whole = tower.model(**pixels).pooler_output
            assert torch.equal(tower.model(pixel_values=whole).pooler_output, whole)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
        return frozen, found

    first, before = features()
    seen.clear()
    _, again = features()
    assert torch.equal(before, again) and sum(seen) == 4 + 4  # those compared, and the test's own
    write_image(tmp_path / "2.png", seed=77)
    _, changed = features()
    assert (changed != before).any(1).tolist() == [False, False, True, False]
    features(image_mean=[0.1, 0.2, 0.3])
    assert len(list((tmp_path / "cache").iterdir())) == 2

    # another tower than the one that the features are of
    other = load_vision_tower(tiny_clip, torch.float32).model
    other.post_layernorm.weight.data *= 1.001
    with pytest.raises(HandoffError, match="not what the tower gives"):
        first.require(other)
    (shard,) = [f for f in first.folder.iterdir() if len(load(f.read_bytes())["pictures"]) == 4]
    shard.write_bytes(save({**load(shard.read_bytes()), "features": before + 1}))
    with pytest.raises(HandoffError, match="damaged; remove it"):
        features()
    shard.rename(shard.with_stem(hashlib.sha256(shard.read_bytes()).hexdigest()[:32]))
    with pytest.raises(HandoffError, match="not what the tower gives"):
        features()
