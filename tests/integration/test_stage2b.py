"""Stage 2b from recipe to hand-off."""

from __future__ import annotations

import hashlib
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
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModel

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.recipe.encoder import Stage2bRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest, write_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from llm2clip_vlm.training.checkpoints import seal_checkpoint
from stages import stage2b_vision_encoder
from tests.tiny import NUM_VISION_LAYERS, write_image

DIM = 12
PAIRS = 40

Recipe = Callable[..., Path]


def encode(texts: list[str]) -> torch.Tensor:
    rows = []
    for text in texts:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        rows.append(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(PAIRS):
        write_image(folder / "images" / f"{i}.png", seed=i)
        captions = {"short": [f"short {i}"], "long": [f"long {i} a", f"long {i} b"]}
        rows.append({"id": str(i), "image": f"images/{i}.png", "captions": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [t for row in rows for kind in row["captions"].values() for t in kind]  # type: ignore[attr-defined]
    EmbeddingCache.build(folder / "cache", texts, encode, {"model": "hash"})
    return folder


@pytest.fixture
def recipe(data: Path, tiny_clip: Path, tmp_path: Path) -> Recipe:
    def write(name: str = "run", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "stage": "stage2b_vision_encoder",
            "output_dir": str(tmp_path / name),
            "seed": 1,
            "global_batch_size": 8,
            "vision_tower": str(tiny_clip),
            "embedding_cache": str(data / "cache"),
            "projection_dim": 16,
            "learning_rates": {
                "vision_tower": 1e-3,
                "visual_projection": 1e-3,
                "text_adaptor": 1e-3,
            },
            "train": [{"path": str(data / "pairs.jsonl")}],
            "caption_weights": {"short": 1.0, "long": 1.0},
            "evaluation": [{"path": str(data / "pairs.jsonl"), "limit": 10}],
            "trainer": {
                "per_device_train_batch_size": 8,
                "max_steps": 8,
                "logging_steps": 1,
                "save_steps": 4,
                "save_total_limit": 2,
                "disable_tqdm": True,
            },
        }
        trainer = values["trainer"] | changes.pop("trainer", {})
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes | {"trainer": trainer}))
        return path

    return write


def run(path: Path, *overrides: str) -> Path:
    stage2b_vision_encoder.main([str(path), *overrides])
    return Path(yaml.safe_load(path.read_text())["output_dir"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_writes_everything_that_the_next_stage_reads(
    recipe: Recipe, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(recipe())
    manifest = read_manifest(out)
    assert manifest is not None and manifest["stage"] == "stage2b_vision_encoder"
    assert set(manifest["outputs"]) == {"model", "vision_tower"}
    assert manifest["fingerprints"]["vision_tower"] == manifest["outputs"]["vision_tower"]
    parents = {"vision_tower", "cache", "train.0", "evaluation.0", "pictures"}
    assert set(manifest["parents"]) == parents
    retrieval = json.loads((out / "results.json").read_text())["retrieval"]
    assert set(retrieval) == {"short", "long"}
    assert all(set(retrieval[k][d]) >= {"r1", "ci"} for k in retrieval for d in ("i2t", "t2i"))
    tower, info = CLIPVisionModel.from_pretrained(out / "vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = LLM2CLIPModel.from_pretrained(out / "model")
    assert same(model.vision_tower.state_dict(), tower.state_dict())
    assert not same(
        tower.state_dict(), CLIPModel.from_pretrained(tiny_clip).vision_model.state_dict()
    )
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert all(0.0 <= row["logit_scale"] <= 4.60518 for row in rows if "loss" in row)
    table = capsys.readouterr().out
    assert "text_adaptor" in table and "0.001" in table


def test_a_resumed_run_equals_the_uninterrupted_one(recipe: Recipe) -> None:
    path = recipe()  # 5 steps an epoch: the resume goes on inside epoch 0 and enters epoch 1
    out = run(path)
    final = weights(out / "model")
    losses = [
        (row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl") if "loss" in row
    ]
    assert (out / "checkpoints" / "checkpoint-4").is_dir()
    for name in ("model", "vision_tower", "checkpoints/checkpoint-8"):
        shutil.rmtree(out / name)
    (out / "manifest.json").unlink()
    run(path)
    assert same(final, weights(out / "model"))
    again = [
        (row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl") if "loss" in row
    ]
    assert again == losses
    # killed between its last checkpoint and the hand-off it takes no further step
    (out / "manifest.json").unlink()
    run(path)
    assert same(final, weights(out / "model"))
    assert len([row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]) == 8


def test_a_finished_stage_is_not_run_again(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(trainer={"max_steps": 1})
    before = (run(path) / "manifest.json").stat().st_mtime_ns
    assert (run(path) / "manifest.json").stat().st_mtime_ns == before
    assert "is finished, nothing to do" in capsys.readouterr().out


def test_parents_of_the_wrong_stage_or_cache_are_refused(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(data / "cache", cache)
    path = recipe(embedding_cache=str(cache))
    parsed = load_recipe(path, Stage2bRecipe)

    def finish(stage: str, model: str) -> None:
        write_manifest(
            cache, stage=stage, recipe=parsed, parents={}, fingerprints={"model": model}, seconds=0
        )

    finish("stage3_projector", "hash")
    with pytest.raises(HandoffError, match="expected stage2a_cache_text, got stage3_projector"):
        run(path)
    finish("stage2a_cache_text", "another")
    with pytest.raises(HandoffError, match=r"fingerprints\.model: its manifest says another"):
        run(path)
    finish("stage2a_cache_text", "hash")
    manifest = read_manifest(run(path))
    assert manifest is not None
    assert manifest["fingerprints"]["text_encoder.model"] == "hash"


def test_a_checkpoint_with_missing_weights_is_refused(recipe: Recipe) -> None:
    path = recipe()
    out = run(path)
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    (out / "manifest.json").unlink()
    file = out / "checkpoints" / "checkpoint-4" / "model.safetensors"
    from safetensors.torch import save_file

    kept = {f"renamed.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(kept, file, metadata={"format": "pt"})
    seal_checkpoint(file.parent)
    with pytest.raises(RuntimeError, match="does not fit LLM2CLIPModel"):
        run(path)


def test_frozen_tower_stays_and_the_rest_trains(recipe: Recipe, tiny_clip: Path) -> None:
    out = run(recipe(tower_training="frozen", trainer={"max_steps": 2}))
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower")
    assert same(tower.state_dict(), CLIPModel.from_pretrained(tiny_clip).vision_model.state_dict())


def test_a_tower_without_gradients_stops_the_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = torch.no_grad()(CLIPVisionModel.forward)
    monkeypatch.setattr(CLIPVisionModel, "forward", cut)
    with pytest.raises(ValueError, match=r"parts without any: \['vision_tower'\]"):
        run(recipe(trainer={"max_steps": 2}))


def test_only_the_last_blocks_of_the_tower_train(recipe: Recipe, tiny_clip: Path) -> None:
    out = run(recipe(tower_last_blocks=1, trainer={"max_steps": 2}))
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower").state_dict()
    base = CLIPModel.from_pretrained(tiny_clip).vision_model.state_dict()
    changed = {name for name in tower if not torch.equal(tower[name], base[name])}
    last = f"encoder.layers.{NUM_VISION_LAYERS - 1}."
    assert any(last in name for name in changed)
    assert all(last in name or "post_layernorm" in name for name in changed)
    with pytest.raises(ValueError, match="last blocks of vision_tower: expected at most"):
        run(recipe("more", tower_last_blocks=99))
    with pytest.raises(ValueError, match="tower_last_blocks: expected with tower_training: full"):
        run(recipe("frozen", tower_last_blocks=1, tower_training="frozen"))


def test_lora_is_merged_and_resumes(recipe: Recipe, tiny_clip: Path) -> None:
    path = recipe(tower_training="lora", tower_lora={"r": 2, "alpha": 4, "dropout": 0.0})
    out = run(path)
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower").state_dict()
    base = CLIPModel.from_pretrained(tiny_clip).vision_model.state_dict()
    changed = {name for name in tower if not torch.equal(tower[name], base[name])}
    assert changed and all(name.endswith("weight") and "encoder.layers" in name for name in changed)
    final = weights(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    (out / "manifest.json").unlink()
    run(path)
    assert same(final, weights(out / "model"))


def test_lora_training_needs_its_section_and_the_other_way_round(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="tower_lora"):
        run(recipe(tower_training="lora"))
    with pytest.raises(ValueError, match="tower_lora"):
        run(recipe(tower_lora={"r": 2}))


def test_choices_change_the_result(recipe: Recipe) -> None:
    short = {"trainer": {"max_steps": 2}}
    plain = weights(run(recipe("plain", **short)) / "model")
    for name, changes in {
        "layer_decay": {"layer_decay": 0.5},
        "seed": {"seed": 2},
        "weights": {"caption_weights": {"long": 1.0}},
        "decay": {"trainer": {"max_steps": 2, "weight_decay": 0.5}},
        "smoothing": {"trainer": {"max_steps": 2, "label_smoothing_factor": 0.2}},
    }.items():
        assert not same(plain, weights(run(recipe(name, **(short | changes))) / "model")), name
    assert same(plain, weights(run(recipe("again", **short)) / "model"))
    shape = weights(
        run(recipe("shape", text_adaptor={"num_blocks": 1, "expansion": 3}, **short)) / "model"
    )
    assert shape["text_adaptor.blocks.0.fc1.weight"].shape == (3 * DIM, DIM)
    assert not any(name.startswith("text_adaptor.blocks.1.") for name in shape)


def test_logit_scale_starts_where_set_and_is_clamped(recipe: Recipe) -> None:
    rates = {"vision_tower": 0.0, "visual_projection": 0.0, "text_adaptor": 0.0}
    out = run(recipe(logit_scale_init=4.0, learning_rates=rates, trainer={"max_steps": 1}))
    assert weights(out / "model")["logit_scale"].item() == pytest.approx(4.0)
    out = run(recipe("high", logit_scale_init=9.0, learning_rates=rates, trainer={"max_steps": 1}))
    assert weights(out / "model")["logit_scale"].item() == pytest.approx(4.60517, abs=1e-5)


def test_sigmoid_loss_has_a_bias_that_trains(recipe: Recipe) -> None:
    short = {"trainer": {"max_steps": 2}, "loss": "sigmoid"}
    learnt = weights(run(recipe("ten", **short)) / "model")["logit_bias"].item()
    assert learnt != -10.0
    assert learnt == pytest.approx(-10.0, abs=0.1)
    out = run(recipe("five", logit_bias_init=-5.0, **short))
    assert LLM2CLIPModel.from_pretrained(out / "model").logit_bias.item() == pytest.approx(
        -5, abs=0.1
    )
    with pytest.raises(ValueError, match="sigmoid loss has no distribution to smooth"):
        run(recipe("smooth", loss="sigmoid", trainer={"label_smoothing_factor": 0.1}))


def test_micro_batches_change_memory_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = LLM2CLIPModel.forward

    def record(self: LLM2CLIPModel, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    short = {"trainer": {"max_steps": 2}}
    plain = run(recipe("plain", **short))
    monkeypatch.setattr(LLM2CLIPModel, "forward", record)
    micro = run(recipe("micro", micro_batch_size=3, **short))
    assert sizes[-10:] == [3, 3, 2, 3, 3] * 2  # the last chunk's graph is kept
    rows = [
        [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        for out in (micro, plain)
    ]
    for got, want in zip(*rows, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    with pytest.raises(ValueError, match="gradient_checkpointing is true beside micro-batches"):
        run(recipe("both", micro_batch_size=3, trainer={"gradient_checkpointing": True}))


def test_missing_captions_are_one_clear_error(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "small"
    EmbeddingCache.build(cache, [f"short {i}" for i in range(PAIRS)], encode, {"model": "hash"})
    message = r"80 of 120 captions are not in the cache .*small, for example 'long 0 a'"
    with pytest.raises(HandoffError, match=message):
        run(recipe(embedding_cache=str(cache)))


def test_accumulation_and_a_batch_larger_than_the_set_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"Raise trainer.per_device_train_batch_size to 8"):
        run(recipe(trainer={"per_device_train_batch_size": 4}))
    with pytest.raises(ValueError, match="40 pairs, fewer than one global batch of 64"):
        run(recipe("big", global_batch_size=64, trainer={"per_device_train_batch_size": 64}))


def test_two_processes_equal_one(recipe: Recipe, repo_root: Path) -> None:
    one = run(recipe("one"))
    path = recipe("two", trainer={"per_device_train_batch_size": 4})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(repo_root / "stages" / "stage2b_vision_encoder.py"), str(path)]
    env = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = path.with_suffix("")
    got, want = (read_metrics(out / "metrics.jsonl") for out in (two, one))
    for a, b in zip(got, want, strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-5), b["step"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), b["step"]
    assert read_manifest(two) is not None
