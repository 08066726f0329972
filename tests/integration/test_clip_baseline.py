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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from eval import run_encoder
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
from llm2clip_vlm.models.clip import load_clip
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.reading import RecipeError
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from llm2clip_vlm.training.encoder.distillation import probe_embeds
from llm2clip_vlm.training.export import vision_tower_of
from stages import clip_baseline
from tests.tiny import WORDS, word_tokenizer, write_image
from tests.tiny_towers import build_tower

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
    write_image(path.parent / "7.png", seed=99)
    (out / "manifest.json").unlink()
    with pytest.raises(HandoffError, match=r"/7\.png has been changed or removed since .*-4 was"):
        run(path)


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
    with pytest.raises(HandoffError, match=r"began with another clip: .* has been made anew"):
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
    last = weights(run(recipe("last", tower_last_blocks=1)) / "model")
    moved = {name for name in before if not torch.equal(before[name], last[name])}
    shallow = {name for name in moved if name.startswith("vision_model.encoder.layers.0.")}
    assert not shallow and any(name.startswith("vision_model.encoder") for name in moved)
    with pytest.raises(ValueError, match="tower_last_blocks: expected with a learning rate"):
        run(recipe("held", tower_last_blocks=1, learning_rates={"text_model": 1e-3}))


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


@pytest.mark.parametrize("key", ["projection_dim", "logit_scale_init"])
def test_what_the_checkpoint_decides_is_refused_beside_it(recipe: Recipe, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"`{key}` belongs to `vision_tower`"):
        run(recipe(**{key: 3}))


def test_accumulation_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size to 16"):
        run(recipe(global_batch_size=16))


def test_any_tower_with_a_text_transformer_from_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of a tower that came without text, and of a tokenizer without an end token."""
    tower, tokenizer = build_tower("eva02", tmp_path / "tower"), tmp_path / "tokenizer"
    word_tokenizer(specials=("<pad>", "<unk>", "</s>", "<s>")).save_pretrained(tokenizer)
    file = tokenizer / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 1, "max_position_embeddings": 24}
    given = {"vision_tower": str(tower), "text_model": text, "tokenizer": str(tokenizer)}
    pairs = [{"path": str(tmp_path / "pairs.jsonl")}]

    def written(name: str, **changes: Any) -> Path:
        values = {"projection_dim": 8, "evaluation": pairs} | given | changes
        path = recipe(name, **values)
        plain = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({k: v for k, v in plain.items() if k != "clip"}))
        return path

    batches: dict[str, list[Any]] = {}
    draw = ImageTextDataset.__getitems__

    def noted(dataset: Any, rows: Any) -> Any:
        batch = draw(dataset, rows)
        batches.setdefault(name, []).append((list(rows), batch["caption_ids"].tolist()))
        return batch

    monkeypatch.setattr(ImageTextDataset, "__getitems__", noted)
    name = "control"
    out = run(written("control"))
    retrieval = json.loads((out / "results.json").read_text())["retrieval"]
    manifest = read_manifest(out)
    assert manifest is not None and set(manifest["outputs"]) == {"model", "vision_tower"}
    assert {"vision_tower", "tokenizer"} <= set(manifest["parents"])
    assert str(tmp_path) not in (out / "model" / "config.json").read_text()
    assert load_vision_tower(out / "vision_tower").hidden_size == 32
    # As a program does that has opened no tower before.
    for known in (CONFIG_MAPPING, MODEL_MAPPING):
        for key in [k for k in known._extra_content if "eva02" in str(k).lower()]:
            monkeypatch.delitem(known._extra_content, key)
    model, ended, _ = load_clip(str(out / "model"))
    assert torch.equal(
        probe_embeds(vision_tower_of(model)),
        probe_embeds(load_vision_tower(out / "model").model),
    )
    ids = ended([" ".join(WORDS[:40])], truncation=True)["input_ids"][0]
    assert len(ids) == 24 and ids[-1] == ended.eos_token_id == len(ended) - 1
    # the program that judges encoders finds what the stage found
    task = {"task": "retrieval", "benchmark": "records", "data": pairs[0]["path"]}
    values = {"stage": "run_encoder", "output_dir": str(tmp_path / "eval"), "bootstrap": 0}
    values |= {"model": str(out / "model"), "tasks": [task]}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(values))
    run_encoder.main([str(tmp_path / "eval.yaml")])
    judged = json.loads((tmp_path / "eval" / "results.json").read_text())
    print(judged, retrieval)
    assert str(retrieval["short"]["i2t"]["r1"]) in json.dumps(judged)

    # the weights at the start follow from the seed; a part without a rate stays
    first = {}
    for name, changes in (("same", {}), ("other", {"seed": 1}), ("frozen", {"seed": 2})):
        rates = {"text_model": 1e-3, "projections": 1e-3} if name == "frozen" else {}
        short = {"evaluation": []} | changes | ({"learning_rates": rates} if rates else {})
        first[name] = weights(run(written(name, **short)) / "model")
    first["control"] = weights(out / "model")
    key = "text_model.embeddings.token_embedding.weight"
    assert torch.equal(first["same"][key], first["control"][key])
    assert not torch.equal(first["other"][key], first["control"][key])
    assert batches["same"] == batches["control"] != batches["other"]
    before = load_vision_tower(tower).model.state_dict()
    moved = [
        n for n, t in before.items() if not torch.equal(t, first["frozen"][f"vision_model.{n}"])
    ]
    assert moved == []
    with pytest.raises(ValueError, match="needs `text_model` and `tokenizer`"):
        run(written("none", text_model=None))
