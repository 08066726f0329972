"""The CLIP baseline stage from recipe to hand-off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

from llm2clip_vlm.handoff import HandoffError, read_manifest
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.training.callbacks import read_metrics
from stages import clip_baseline
from tests.tiny import WORDS, write_image

Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tiny_clip: Path, tmp_path: Path) -> Recipe:
    rows = []
    for i in range(24):
        write_image(tmp_path / f"{i}.png", seed=i)
        captions = {
            "short": [f"a {WORDS[i]} {WORDS[i + 40]}"],
            "long": [" ".join(WORDS[i : i + 30])],
        }
        rows.append({"id": str(i), "image": f"{i}.png", "captions": captions})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str = "run", **changes: Any) -> Path:
        rate = 1e-3
        values: dict[str, Any] = {
            "stage": "clip_baseline",
            "output_dir": str(tmp_path / name),
            "global_batch_size": 8,
            "clip": str(tiny_clip),
            "learning_rates": {"vision_model": rate, "text_model": rate, "projections": rate},
            "train": [{"path": str(tmp_path / "pairs.jsonl")}],
            "evaluation": [{"path": str(tmp_path / "pairs.jsonl"), "limit": 8}],
            "trainer": {
                "per_device_train_batch_size": 8,
                "max_steps": 4,
                "logging_steps": 1,
                "save_steps": 2,
                "save_total_limit": 2,
                "disable_tqdm": True,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def run(path: Path) -> Path:
    clip_baseline.main([str(path)])
    return Path(yaml.safe_load(path.read_text())["output_dir"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_writes_a_clip_that_can_be_continued_and_its_tower(recipe: Recipe) -> None:
    out = run(recipe())
    manifest = read_manifest(out)
    assert manifest is not None and set(manifest["outputs"]) == {"model", "vision_tower"}
    assert set(json.loads((out / "results.json").read_text())["retrieval"]) == {"short", "long"}
    model, info = CLIPModel.from_pretrained(out / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower").state_dict()
    assert all(torch.equal(t, model.vision_model.state_dict()[n]) for n, t in tower.items())
    assert load_vision_tower(out / "model").hidden_size == 32
    run(recipe("more", clip=str(out / "model")))


def test_resume_equals_the_uninterrupted_run(recipe: Recipe) -> None:
    path = recipe()
    out = run(path)
    final = weights(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    (out / "manifest.json").unlink()
    run(path)
    assert all(torch.equal(final[name], tensor) for name, tensor in weights(out / "model").items())
    assert len([r for r in read_metrics(out / "metrics.jsonl") if "loss" in r]) == 4


def test_a_run_from_a_model_that_was_made_anew_is_refused(
    recipe: Recipe, tiny_clip: Path, tmp_path: Path
) -> None:
    """Its checkpoint is of the old one, and would be exported as a result of the new one."""
    clip = tmp_path / "clip"
    shutil.copytree(tiny_clip, clip)
    path = recipe(clip=str(clip))
    run(path)
    values = weights(clip)
    values["logit_scale"] += 1
    save_file(values, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HandoffError, match=r"began with another clip: .* was made anew"):
        run(path)
    (tmp_path / "other").mkdir()
    clip.rename(tmp_path / "other" / "model")
    with pytest.raises(HandoffError, match=r"clip: .* lies in output_dir"):
        run(recipe("other", clip=str(tmp_path / "other" / "model")))


def test_window_config_and_rates(recipe: Recipe, tiny_clip: Path) -> None:
    out = run(recipe("window", text_window_tokens=40))
    assert CLIPModel.from_pretrained(out / "model").config.text_config.max_position_embeddings == 40
    assert AutoTokenizer.from_pretrained(out / "model").model_max_length == 40
    base = CLIPModel.from_pretrained(tiny_clip).config
    config = {
        "projection_dim": 32,
        "text_config": base.text_config.to_diff_dict(),
        "vision_config": base.vision_config.to_diff_dict(),
    }
    fresh = run(recipe("fresh", clip=config, tokenizer=str(tiny_clip)))
    assert read_manifest(fresh) is not None
    rates = {"vision_model": 1e-3, "text_model": 0.0, "projections": 1e-3}
    before, after = (
        weights(tiny_clip),
        weights(run(recipe("rates", learning_rates=rates)) / "model"),
    )
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still and all(name.startswith("text_model.") for name in still)
    # a part that is not named is frozen
    frozen = weights(run(recipe("part", learning_rates={"vision_model": 1e-3})) / "model")
    moved = {name for name in before if not torch.equal(before[name], frozen[name])}
    assert moved and all(name.startswith("vision_model.") for name in moved)


def test_measures_without_dropout(recipe: Recipe, tiny_clip: Path, tmp_path: Path) -> None:
    dropping = Path(shutil.copytree(tiny_clip, tmp_path / "dropping"))  # in training alone
    config = json.loads((dropping / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["attention_dropout"] = 0.5
    (dropping / "config.json").write_text(json.dumps(config))
    plain = run(recipe("plain", clip=str(dropping), evaluation=[]))
    out = run(recipe("measured", clip=str(dropping), evaluation_steps=2))
    for name, tensor in weights(plain / "model").items():
        assert torch.equal(weights(out / "model")[name], tensor), name  # no number was drawn
    (last,) = [
        r for r in read_metrics(out / "metrics.jsonl") if r["step"] == 4 and "eval" in str(r)
    ]
    found = json.loads((out / "results.json").read_text())["retrieval"]
    for kind in ("short", "long"):
        assert last[f"eval_{kind}_i2t_r1"] == found[kind]["i2t"]["r1"]


def test_accumulation_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size to 16"):
        run(recipe(global_batch_size=16))
