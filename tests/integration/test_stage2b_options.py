"""What stage 2b may do beside training on a cache: measure, prompts, an LLM in the loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text import dataset as image_text
from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.encoder import Stage2bRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from tests.integration.test_stage2b import encode, run, same, weights
from tests.tiny import WORDS, write_image

PAIRS = 24
CLASSES = ["dog", "cat", "star"]
Recipe = Callable[..., Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(PAIRS):
        write_image(folder / "images" / f"{i}.png", seed=i)
        captions = {"short": [" ".join(WORDS[i : i + 3])], "long": [" ".join(WORDS[i : i + 12])]}
        row = {"id": str(i), "image": f"images/{i}.png", "captions": captions}
        rows.append(row | {"label": CLASSES[i % len(CLASSES)]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in rows for kind in row["captions"].values() for text in kind]  # type: ignore[attr-defined]
    texts += [f"the {name}" for name in CLASSES]
    encoders = {"": encode, "what colour": lambda part: encode([f"colour {t}" for t in part])}
    EmbeddingCache.build(folder / "cache", texts, encoders, {"model": "hash"})
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe(pairs: Path, tiny_clip: Path, tmp_path: Path) -> Recipe:
    def write(name: str, **changes: Any) -> Path:
        trainer = {
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            **changes.pop("trainer", {}),
        }
        values: dict[str, Any] = {
            "stage": "stage2b_vision_encoder",
            "output_dir": str(tmp_path / name),
            "global_batch_size": 8,
            "vision_tower": str(tiny_clip),
            "embedding_cache": str(pairs.parent / "cache"),
            "projection_dim": 16,
            "learning_rates": dict.fromkeys(
                ("vision_tower", "visual_projection", "text_adaptor"), 1e-3
            ),
            "train": [{"path": str(pairs)}],
            "trainer": trainer,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def test_measures_on_a_schedule_and_changes_nothing(
    recipe: Recipe, pairs: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    dropping = Path(shutil.copytree(tiny_clip, tmp_path / "dropping"))  # in training alone
    config = json.loads((dropping / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    (dropping / "config.json").write_text(json.dumps(config))
    plain = run(recipe("plain", vision_tower=str(dropping)))
    labelled = {"path": str(pairs), "templates": ["the {}"]}
    held_out = {"evaluation": [{"path": str(pairs), "limit": 10}], "zero_shot": [labelled]}
    out = run(recipe("measured", vision_tower=str(dropping), evaluation_steps=2, **held_out))
    assert same(weights(plain / "model"), weights(out / "model"))
    rows = {row["step"]: row for row in read_metrics(out / "metrics.jsonl") if "eval" in str(row)}
    assert list(rows) == [2, 4]
    found = json.loads((out / "results.json").read_text())
    accuracy = found["zero_shot"]["label"]
    assert (accuracy["images"], accuracy["classes"]) == (PAIRS, len(CLASSES))
    for kind in ("short", "long"):
        for way in ("i2t", "t2i"):
            assert rows[4][f"eval_{kind}_{way}_r1"] == found["retrieval"][kind][way]["r1"]
    assert rows[4]["eval_label_zero_shot"] == accuracy["top1"]
    trained = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert all(row["images_per_s"] > 0 and row["tflops"] > 0 for row in trained)
    assert all(0 <= row["data_wait"] <= 1 for row in trained)


def test_what_is_logged_is_of_the_weights_that_are_saved(recipe: Recipe, pairs: Path) -> None:
    """With averages these are not the ones that train; and measuring leaves those as they are."""
    rates = dict.fromkeys(("vision_tower", "visual_projection", "text_adaptor"), 3e-3)
    given: dict[str, Any] = {"weight_average": {"decay": 0.9}, "learning_rates": rates}
    given["trainer"] = {"max_steps": 8}
    plain = run(recipe("plain", **given))
    held_out = {"evaluation": [{"path": str(pairs)}], "evaluation_steps": 4}
    out = run(recipe("measured", **given, **held_out))
    assert same(weights(plain / "model"), weights(out / "model"))
    last = [row for row in read_metrics(out / "metrics.jsonl") if "eval" in str(row)][-1]
    found = json.loads((out / "results.json").read_text())["retrieval"]
    saved = {f"eval_{k}_{way}_r1": found[k][way]["r1"] for k in found for way in ("i2t", "t2i")}
    assert {name: last[name] for name in saved} == saved


def test_prompts_of_classes_that_the_cache_lacks_are_named(recipe: Recipe, pairs: Path) -> None:
    with pytest.raises(HandoffError, match=r"for example .a photo of a cat\.."):
        run(recipe("lacking", zero_shot=[{"path": str(pairs)}]))


def test_a_held_out_image_that_turns_out_broken_is_left_out(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_text, "PRELOAD_LIMIT_BYTES", 0)  # as a set too large for memory
    folder = tmp_path / "held-out"
    shutil.copytree(pairs.parent / "images", folder / "images")
    shutil.copy(pairs, folder)
    (folder / "images" / "3.png").write_bytes(b"<html>gone</html>")
    held_out = [{"path": str(folder / pairs.name), "limit": 10}]
    out = run(recipe("broken", evaluation=held_out, max_bad_records=1, evaluation_steps=2))
    found = json.loads((out / "results.json").read_text())["retrieval"]["short"]
    assert (found["i2t"]["queries"], found["t2i"]["gallery"]) == (9, 9)
    (dropped,) = (out / "dropped.jsonl").read_text().splitlines()
    assert "pairs.jsonl:4:3" in dropped  # line, then id
    manifest = read_manifest(out)
    assert manifest is not None and manifest["extra"]["bad_records"] == 1


def test_embeddings_of_prompts_are_further_positives(recipe: Recipe) -> None:
    plain = losses(run(recipe("plain")))
    asked = losses(run(recipe("asked", caption_prompts=["what colour"])))
    assert len(asked) == len(plain) and asked[0] > plain[0]  # twice as many texts to tell apart
    with pytest.raises(HandoffError, match=r"in the cache .* with the prompt 'what shape'"):
        run(recipe("lacking", caption_prompts=["what shape"]))


def loop_of(llm: Path, **lora: Any) -> dict[str, Any]:
    section = {"text_encoder": {"language_model": str(llm)}, "learning_rate": 1e-2}
    return {"embedding_cache": None, "text_in_loop": section | {"lora": {"r": 2, **lora}}}


def test_the_llm_trains_in_the_loop(recipe: Recipe, pairs: Path, tiny_llm: Path) -> None:
    measured = {"evaluation": [{"path": str(pairs), "limit": 10}], "evaluation_steps": 2}
    path = recipe("loop", **loop_of(tiny_llm, dropout=0.1), **measured)
    out = run(path)
    encoder = TextEncoder.from_pretrained(out / "text_encoder")
    base = AutoModel.from_pretrained(tiny_llm).state_dict()
    tuned = encoder.backbone.state_dict()
    assert set(tuned) == set(base)
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    LLM2CLIPModel.from_pretrained(out / "model")
    exported = weights(out / "model")
    assert not any("text_encoder" in name for name in exported)
    manifest = read_manifest(out)
    assert manifest is not None
    assert {"vision_tower", "text_encoder"} <= set(manifest["parents"])
    hashes = {f"text_encoder.{name}": value for name, value in encoder.fingerprint.items()}
    assert hashes.items() <= manifest["fingerprints"].items()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval_long_t2i_r1" in row]
    found = json.loads((out / "results.json").read_text())["retrieval"]["long"]
    assert rows[-1]["eval_long_t2i_r1"] == pytest.approx(found["t2i"]["r1"])
    # resumed in the middle it ends with the same weights
    final = load_file(out / "text_encoder" / "model.safetensors")
    for name in ("model", "text_encoder", "checkpoints/checkpoint-4"):
        shutil.rmtree(out / name)
    (out / "manifest.json").unlink()
    run(path)
    assert same(exported, weights(out / "model"))
    assert same(final, load_file(out / "text_encoder" / "model.safetensors"))


def cached_captions(pairs: Path, tiny_llm: Path, folder: Path) -> TextEncoder:
    """Cache all captions of the training pairs, embedded by a raw LLM; gives the LLM."""
    rows = map(json.loads, pairs.read_text().splitlines())
    texts = [text for row in rows for kind in row["captions"].values() for text in kind]
    encoder = TextEncoder.from_pretrained(tiny_llm)
    EmbeddingCache.build(folder, texts, encoder.encode, encoder.fingerprint)
    return encoder


def test_an_llm_in_the_loop_is_named_as_it_was_trained(
    recipe: Recipe, pairs: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """`heads_from` compares the encoder before it trains; the manifest has it as it is saved."""
    encoder = cached_captions(pairs, tiny_llm, tmp_path / "cache")
    few = {"trainer": {"max_steps": 2}}
    first = run(recipe("first", embedding_cache=str(tmp_path / "cache"), **few))
    out = run(recipe("loop", heads_from=str(first / "model"), **loop_of(tiny_llm), **few))
    manifest = read_manifest(out)
    saved = TextEncoder.from_pretrained(out / "text_encoder").fingerprint["text_weights"]
    assert manifest is not None and saved != encoder.fingerprint["text_weights"]
    assert manifest["fingerprints"]["text_encoder.text_weights"] == saved


def test_an_llm_in_the_loop_that_does_not_learn_equals_the_cache(
    recipe: Recipe, pairs: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    cached_captions(pairs, tiny_llm, tmp_path / "cache")
    free = {"trainer": {"max_grad_norm": 0.0}}  # the adapter's gradient would count in the norm
    cached = run(recipe("cached", embedding_cache=str(tmp_path / "cache"), **free))
    loop = loop_of(tiny_llm, dropout=0.0)
    loop["text_in_loop"]["learning_rate"] = 1e-12
    whole = run(recipe("still", **loop, **free))
    assert losses(whole) == pytest.approx(losses(cached), abs=5e-3)  # float16 in the cache
    micro = run(recipe("micro", micro_batch_size=3, **loop, **free))
    assert losses(micro) == pytest.approx(losses(whole), abs=1e-5)
    with pytest.raises(ValueError, match="either embedding_cache or text_in_loop"):
        run(recipe("both", **(loop | {"embedding_cache": str(tmp_path / "cache")})))


@pytest.mark.slow
def test_torch_compile_of_the_trainer(recipe: Recipe) -> None:
    from torch._dynamo.utils import counters

    plain = losses(run(recipe("plain", trainer={"max_steps": 2})))
    counters.clear()
    compiled = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    got = losses(run(recipe("compiled", trainer=compiled)))
    assert counters["stats"]["unique_graphs"] > 0
    assert got == pytest.approx(plain, abs=1e-4)


def test_heads_begin_where_an_earlier_run_left_them(
    recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    first = run(recipe("first", tower_training="frozen", trainer={"max_steps": 6}))
    # Nothing moves at a rate of 0, so the start can be seen in the end.
    still = dict.fromkeys(("vision_tower", "visual_projection", "text_adaptor"), 0.0)
    start = {"heads_from": str(first / "model"), "trainer": {"max_steps": 2}}
    second = run(recipe("second", learning_rates=still, **start))
    assert same(weights(first / "model"), weights(second / "model"))
    manifest = read_manifest(second)
    assert manifest is not None and "heads" in manifest["parents"]

    with pytest.raises(ValueError, match=r"visual_projection.weight: expected \(8, 32\), got \(16"):
        run(recipe("narrow", projection_dim=8, **start))
    # A cache of a stage says which text encoder filled it.
    stage = load_program(find_program("stage2b_vision_encoder"))
    given = load_recipe(recipe("stranger", **start), Stage2bRecipe, [])
    tower = load_vision_tower(given.vision_tower, dtype=torch.float32)
    embeds = SimpleNamespace(dim=encode(["a"]).shape[1], fingerprints={"text_weights": "another"})
    with pytest.raises(HandoffError, match="trained against another text encoder"):
        stage.around(given, tower, embeds, {"fingerprints": {"text_encoder.text_weights": "one"}})
    embeds.fingerprints = {"text_weights": "one"}
    stage.around(given, tower, embeds, {"fingerprints": {"text_encoder.text_weights": "one"}})
