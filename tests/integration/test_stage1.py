"""Stages 1 and 2a as programs: what they write, that they resume, that ranks do not matter."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.shards import CacheError
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import CaptionPair, CaptionPairs, CaptionRecord, read_captions
from llm2clip_vlm.evaluation.encoder.encoders import load_encoder
from llm2clip_vlm.metrics.retrieval import retrieval_report
from llm2clip_vlm.metrics.separability import PROTOCOL
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.recipe.base import CaptionPairSource, CaptionSource, ImageTextSource, LoraSection
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest
from llm2clip_vlm.training.adapters import add_adapter
from llm2clip_vlm.training.text.text_trainer import PairCollator, alike_ids
from tests.tiny import WORDS, write_image
from tests.unit.test_captions import table_of
from tests.vlm_fixtures import files_with_paths

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring"]


def load(repo_root: Path, stage: str) -> ModuleType:
    path = repo_root / "stages" / f"{stage}.py"
    spec = importlib.util.spec_from_file_location(stage, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_captions(path: Path, start: int = 0, step: int = 1) -> Path:
    rows = [
        {
            "id": f"{colour}-{shape}",
            "captions": {
                "short": [f"a {colour} {shape}"],
                "long": [
                    f"the picture shows one {shape} and it is {colour}",
                    f"there is a {shape} . its color is {colour} . the background is plain",
                ],
            },
        }
        for colour in COLOURS
        for shape in SHAPES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[start::step]))
    return path


def write_recipe(folder: Path, llm: Path, **keys: Any) -> Path:
    trainer = {
        "per_device_train_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        **keys.pop("trainer", {}),
    }
    recipe = {
        "stage": "stage1_text_encoder",
        "output_dir": str(folder / "stage1"),
        "global_batch_size": 16,
        "text_encoder": {"language_model": str(llm)},
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "train": [{"path": str(write_captions(folder / "train.jsonl"))}],
        "evaluation": [{"path": str(write_captions(folder / "val.jsonl", step=3))}],
        "trainer": trainer,
        **keys,
    }
    path = folder / "stage1.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, repo_root: Path) -> Path:
    """A finished stage 1 (one process), and stage 2a after it."""
    folder = tmp_path_factory.mktemp("stage1")
    trainer = {"save_steps": 3, "save_total_limit": 2, "per_device_train_batch_size": 32}
    if importlib.util.find_spec("tensorboard"):
        trainer["report_to"] = ["tensorboard"]
    recipe = write_recipe(folder, tiny_llm, trainer=trainer, global_batch_size=32)
    load(repo_root, "stage1_text_encoder").main([str(recipe)])
    return folder


def test_a_tracker_has_what_metrics_jsonl_has(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [written] = (trained / "stage1/checkpoints/runs").glob("*/events.out.tfevents.*")
    events = EventAccumulator(str(written)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    ours = [(row["step"], row["loss"]) for row in metrics(trained / "stage1")]
    assert [step for step, _ in found] == [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in ours], rel=1e-3)


def test_stage1_learns_and_hands_off(trained: Path, tiny_llm: Path) -> None:
    out = trained / "stage1"
    losses = [row["loss"] for row in metrics(out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    cra = json.loads((out / "results.json").read_text())["cra"]
    assert (cra["queries"], cra["gallery"]) == (22, 44)
    assert cra["protocol"] == PROTOCOL
    assert cra["after"] > cra["before"] == cra["raw_bidirectional"] != cra["raw_causal"]
    causal = TextEncoder.from_pretrained(tiny_llm, bidirectional=False)
    records = list(read_captions(CaptionSource(path=str(trained / "val.jsonl")), BadRecords()))
    stage = load(Path(__file__).parents[2], "stage1_text_encoder")
    alone = stage.caption_accuracy(causal, records, "raw_causal")
    assert (
        alone["raw_causal"] == cra["raw_causal"] and alone["raw_causal_ci"] == cra["raw_causal_ci"]
    )
    assert (out / "sentence_transformers" / "modules.json").is_file()
    exports = ("text_encoder", "adapter", "sentence_transformers")
    assert not files_with_paths(*(out / name for name in exports))
    assert cra["after_ci"][0] <= cra["after"] <= cra["after_ci"][1]
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["stage"] == "stage1_text_encoder"
    encoder = TextEncoder.from_pretrained(out / "text_encoder")
    assert manifest["fingerprints"] == encoder.fingerprint
    assert encoder.settings.bidirectional

    from peft import PeftModel  # the adapter on the causal base, made bidirectional = the merged

    base = TextEncoder.from_pretrained(tiny_llm)
    base.backbone = PeftModel.from_pretrained(base.backbone, out / "adapter").eval()
    text = ["a red star"]
    torch.testing.assert_close(base.encode(text), encoder.encode(text), atol=1e-5, rtol=0)


def test_what_was_measured_is_not_measured_again(
    trained: Path, tmp_path: Path, repo_root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while it trains has said what there was before, and keeps it."""
    stage, recipe = load(repo_root, "stage1_text_encoder"), str(trained / "stage1.yaml")
    words = [recipe, f"output_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as broken:
        broken.setattr(stage.CaptionContrastiveTrainer, "train", _killed)
        with pytest.raises(RuntimeError, match="killed"):
            stage.main(words)
    printed = capsys.readouterr()
    for name in ("raw_bidirectional", "raw_causal"):
        assert f"caption separability, {name}: " in printed.out
    assert "66/66" in printed.err  # the bar of what is encoded
    told = r"max_length_tokens \d+; the longest text has 16 tokens, 0 texts were cut"
    assert re.search(told, printed.out)
    known = json.loads((tmp_path / "out" / "measured.json").read_text())
    encoded: list[int] = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, texts: list[str], **keys: Any) -> torch.Tensor:
        encoded.append(len(texts))
        return encode(self, texts, **keys)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    stage.main(words)
    assert encoded.count(66) == 1  # after training alone
    found = json.loads((tmp_path / "out" / "results.json").read_text())["cra"]
    before = {k: v for row in known.values() for k, v in row["found"].items()}
    assert before.items() <= found.items()
    assert found == json.loads((trained / "stage1" / "results.json").read_text())["cra"]
    (tmp_path / "out" / "manifest.json").unlink()
    encoded.clear()
    stage.main(words)  # the hand-off again, of the same encoder
    assert 66 not in encoded


def _killed(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("killed")


def test_a_causal_encoder_goes_through(
    trained: Path, tmp_path: Path, tiny_llm: Path, tiny_clip: Path, repo_root: Path
) -> None:
    """Paper v6 table 6: the same stages without bidirectional attention, to the judged encoder."""
    keys = {"text_encoder": {"language_model": str(tiny_llm), "bidirectional": False}}
    recipe = write_recipe(tmp_path, tiny_llm, **keys)
    load(repo_root, "stage1_text_encoder").main([str(recipe)])
    out = tmp_path / "stage1"
    cra = json.loads((out / "results.json").read_text())["cra"]
    theirs = json.loads((trained / "stage1" / "results.json").read_text())["cra"]
    for name in ("raw_causal", "raw_bidirectional"):
        assert cra[name] == theirs[name]
    assert cra["before"] == cra["raw_causal"]
    encoder = TextEncoder.from_pretrained(out / "text_encoder")
    assert encoder.settings.bidirectional is False
    hidden = encoder.backbone(input_ids=torch.arange(5, 15).repeat(2, 1)).last_hidden_state
    changed = torch.arange(5, 15).repeat(2, 1)
    changed[:, -1] = 3
    again = encoder.backbone(input_ids=changed).last_hidden_state
    torch.testing.assert_close(hidden[:, :-1], again[:, :-1])
    config = json.loads((out / "sentence_transformers" / "config.json").read_text())
    assert config["model_type"] == "llama" and config.get("is_causal") is not False
    plain = AutoModel.from_pretrained(out / "sentence_transformers").eval()  # as that package does
    exported = TextEncoder(plain, encoder.tokenizer, encoder.settings)
    texts = ["a red star", "there is a ring . its color is blue"]
    torch.testing.assert_close(exported.encode(texts), encoder.encode(texts), atol=1e-5, rtol=0)

    rows = []
    for i in range(16):
        write_image(tmp_path / f"{i}.png", seed=i)
        rows.append({"image": f"{i}.png", "captions": [f"a {COLOURS[i % 8]} {SHAPES[i // 8]}"]})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text_encoder = str(out / "text_encoder")
    load(repo_root, "stage2a_cache_text").main(
        [str(cache_recipe(tmp_path, text_encoder, [{"path": str(pairs)}]))]
    )
    values = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(tmp_path / "tower"),
        "global_batch_size": 8,
        "vision_tower": str(tiny_clip),
        "embedding_cache": str(tmp_path / "cache"),
        "projection_dim": 16,
        "train": [{"path": str(pairs)}],
        "evaluation": [{"path": str(pairs)}],
        "trainer": {"per_device_train_batch_size": 8, "max_steps": 2, "disable_tqdm": True},
    }
    (tmp_path / "stage2b.yaml").write_text(yaml.safe_dump(values))
    load(repo_root, "stage2b_vision_encoder").main([str(tmp_path / "stage2b.yaml")])
    retrieval = json.loads((tmp_path / "tower" / "results.json").read_text())["retrieval"]
    judged = load_encoder(str(tmp_path / "tower" / "model"), text_encoder)
    records = read_image_text(ImageTextSource(path=str(pairs)), BadRecords())
    images, _ = judged.embed_images(records)
    embeds = judged.embed_texts([text for row in rows for text in row["captions"]])
    found = retrieval_report(images, {"captions": embeds}, {"captions": torch.arange(16)})
    cached = retrieval["captions"]["i2t"]["r1"]  # of rounded embeddings: at most one picture
    assert found["captions"]["i2t"]["r1"] == pytest.approx(cached, abs=6.3)
    with pytest.raises(HandoffError, match="was trained against"):
        load_encoder(str(tmp_path / "tower" / "model"), str(trained / "stage1" / "text_encoder"))


def test_stage1_does_not_run_twice(
    trained: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(repo_root, "stage1_text_encoder").main([str(trained / "stage1.yaml")])
    assert "is finished, nothing to do" in capsys.readouterr().out


def test_cra_on_a_schedule(trained: Path, tmp_path: Path, repo_root: Path) -> None:
    out = tmp_path / "out"
    load(repo_root, "stage1_text_encoder").main(
        [str(trained / "stage1.yaml"), f"output_dir={out}", "evaluation_steps=3"]
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["eval_cra"] for row in rows if "eval_cra" in row}
    assert list(measured) == [3, 6]
    assert measured[6] == json.loads((out / "results.json").read_text())["cra"]["after"]
    plain = [row["loss"] for row in metrics(trained / "stage1")]
    assert [row["loss"] for row in metrics(out)] == plain  # measuring changes nothing


def test_resume_is_exact(trained: Path, tmp_path: Path, repo_root: Path) -> None:
    whole = trained / "stage1"
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "checkpoint-6")
    shutil.rmtree(part / "text_encoder")
    (part / "manifest.json").unlink()
    load(repo_root, "stage1_text_encoder").main(
        [str(trained / "stage1.yaml"), f"output_dir={part}"]
    )
    kept = [row["seconds"] for row in metrics(whole)[:3]]
    assert [row["seconds"] for row in metrics(part)[:3]] == kept  # it did not start anew
    strip = [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(part)]
    assert strip == [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(whole)]
    encoders = [TextEncoder.from_pretrained(out / "text_encoder") for out in (whole, part)]
    assert encoders[0].fingerprint == encoders[1].fingerprint


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(trained: Path, tmp_path: Path, repo_root: Path) -> None:
    out = tmp_path / "two"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(repo_root / "stages" / "stage1_text_encoder.py"), str(trained / "stage1.yaml")),
        *(f"output_dir={out}", "trainer.per_device_train_batch_size=16", "trainer.save_steps=5"),
    ]
    env = {**os.environ, "PYTHONPATH": str(repo_root)}

    def launch() -> list[dict[str, Any]]:
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(command, env=env, stdout=log, stderr=log) as process,
        ):
            try:
                code = process.wait(timeout=900)
            finally:
                process.terminate()  # torchrun ends its workers; `run(timeout=)` would orphan them
        assert code == 0, (tmp_path / "log").read_text()[-3000:]
        return metrics(out)

    rows = launch()
    state = json.loads((out / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 16
    for name in ("loss", "grad_norm"):
        found, expected = (
            torch.tensor([row[name] for row in table])
            for table in (rows, metrics(trained / "stage1"))
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    # Beyond the first epoch accelerate hides the sampler from `set_epoch` when it skips batches.
    shutil.rmtree(out / "checkpoints" / "checkpoint-6", ignore_errors=True)
    (out / "manifest.json").unlink()
    again = launch()
    assert [row["seconds"] for row in again[:5]] == [row["seconds"] for row in rows[:5]]
    assert again[5]["loss"] == pytest.approx(rows[5]["loss"], abs=1e-5)


def test_full_tuning_and_flags(tmp_path: Path, tiny_llm: Path, repo_root: Path) -> None:
    stage = load(repo_root, "stage1_text_encoder")
    recipe = write_recipe(tmp_path, tiny_llm, trainer={"max_steps": 1, "save_strategy": "no"})
    seen: dict[str, float] = {}
    for name, overrides in {
        "lora": [],
        "full": ["lora=null"],
        "scale": ["scale=5.0"],
        "one_way": ["symmetric=false"],
        "smoothing": ["trainer.label_smoothing_factor=0.2"],
        "last": ["text_encoder.pooling=last"],
        "chat": ["text_encoder.chat=true"],
        "prompt": ['train.0.prompts={"*": "the picture "}'],
        "seed": ["seed=1"],
    }.items():
        out = tmp_path / name
        stage.main([str(recipe), *overrides, f"output_dir={out}", "evaluation=[]"])
        (row,) = metrics(out)
        seen[name] = row["loss"]
        assert (out / "adapter").exists() == (name != "full")
        assert json.loads((out / "results.json").read_text()) == {"cra": {}}
    assert seen.pop("full") == pytest.approx(seen["lora"], abs=1e-4)  # an adapter starts at zero
    assert len(set(seen.values())) == len(seen)
    base = TextEncoder.from_pretrained(tiny_llm).backbone.state_dict()
    tuned = TextEncoder.from_pretrained(tmp_path / "full" / "text_encoder").backbone.state_dict()
    assert all((tuned[name] != base[name]).any() for name in base)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["global_batch_size=32"], "gradient accumulation over 2 steps"),
        (["train.0.limit=8"], "8 pairs, fewer than one global batch of 16"),
        (["trainer.dataloader_drop_last=false"], "dataloader_drop_last"),
        (["train.0.fields=[captoin]"], "captoin"),
        (["load_in_4bit=true", "lora=null"], "4-bit weights cannot train"),
    ],
)
def test_stage1_refuses(
    tmp_path: Path, tiny_llm: Path, repo_root: Path, overrides: list[str], message: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_llm)
    with pytest.raises(ValueError, match=message):
        load(repo_root, "stage1_text_encoder").main([str(recipe), *overrides])


def test_a_block_without_gradients_stops_the_run(
    tmp_path: Path, tiny_llm: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LlamaDecoderLayer.forward

    def cut(layer: Any, hidden: torch.Tensor, *args: Any, **more: Any) -> Any:
        return whole(layer, hidden.detach() if layer.self_attn.layer_idx else hidden, *args, **more)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", cut)
    recipe = write_recipe(tmp_path, tiny_llm)
    with pytest.raises(ValueError, match=r"the loss does not reach: \['base_model.model.layers.0"):
        load(repo_root, "stage1_text_encoder").main([str(recipe)])


def test_stage1_counts_bad_records(tmp_path: Path, tiny_llm: Path, repo_root: Path) -> None:
    stage = load(repo_root, "stage1_text_encoder")
    keys = {"trainer": {"max_steps": 1, "save_strategy": "no"}}
    recipe = write_recipe(tmp_path, tiny_llm, **keys)
    with (tmp_path / "train.jsonl").open("a") as handle:
        handle.write('{"id": "x", "captions": ["a dog", ""]}\n{"id": "y", "captions": ["a dog"]}\n')
    with pytest.raises(ValueError, match=r"2 bad record\(s\), 1 allowed"):
        stage.main([str(recipe), "max_bad_records=1"])
    stage.main([str(recipe), "max_bad_records=2", f"output_dir={tmp_path / 'b'}"])
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    assert manifest["extra"]["bad_records"] == 2


def cache_recipe(folder: Path, text_encoder: Any, sources: list[dict[str, Any]]) -> Path:
    path = folder / "stage2a.yaml"
    recipe = {
        "stage": "stage2a_cache_text",
        "output_dir": str(folder / "cache"),
        "text_encoder": text_encoder,
        "sources": sources,
        "batch_tokens": 256,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_stage2a_caches_every_text_once(
    trained: Path, tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = load(repo_root, "stage2a_cache_text")
    sources = [{"path": str(trained / name)} for name in ("train.jsonl", "val.jsonl")]
    model = trained / "stage1" / "text_encoder"
    recipe = cache_recipe(tmp_path, str(model), sources)
    stage.main([str(recipe)])
    said = capsys.readouterr().out
    assert "258 texts, 192 different ones" in said
    assert (
        f"next: llm2clip-vlm train stage2b_vision_encoder RECIPE embedding_cache={tmp_path}" in said
    )
    encoder = TextEncoder.from_pretrained(model)
    cache = EmbeddingCache.open(tmp_path / "cache", encoder.fingerprint)
    cache.verify()
    assert len(cache) == 192
    texts = ["a red star", "a blue ring"]
    torch.testing.assert_close(cache.lookup(texts), encoder.encode(texts), atol=2e-3, rtol=0)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert manifest["fingerprints"] == encoder.fingerprint
    assert "manifest_hash" in manifest["parents"]["text_encoder"]

    stage.main([str(recipe)])
    assert "nothing to do" in capsys.readouterr().out
    more = tmp_path / "more.jsonl"
    more.write_text('{"captions": ["a tiny dog", "a red star"]}\n')
    stage.main([str(recipe), f"sources.1.path={more}"])  # adds one text to the same cache
    assert len(EmbeddingCache.open(tmp_path / "cache")) == 193


def test_stage2a_raw_llm_and_refusals(
    trained: Path, tmp_path: Path, tiny_llm: Path, repo_root: Path
) -> None:
    stage = load(repo_root, "stage2a_cache_text")
    source = {"path": str(trained / "val.jsonl"), "image_field": "image", "id_field": "id"}
    recipe = cache_recipe(tmp_path, {"language_model": str(tiny_llm), "pooling": "last"}, [source])
    stage.main([str(recipe)])
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache.fingerprint["pooling"] == "last"
    write_image(tmp_path / "0.png", seed=0)
    labelled = tmp_path / "labelled.jsonl"
    for number, name in enumerate(("cat", "dog"), start=1):  # a class more: not finished
        with labelled.open("a") as file:
            file.write(json.dumps({"image": "0.png", "label": name}) + "\n")
        stage.main([str(recipe), f"zero_shot=[{{path: {labelled}}}]"])
        assert len(EmbeddingCache.open(tmp_path / "cache")) == len(cache) + number
    with pytest.raises(CacheError, match=r"fingerprint\.pooling is 'last', expected 'mean'"):
        stage.main([str(recipe), "text_encoder.pooling=mean"])
    with pytest.raises(HandoffError, match="stage: expected stage1_text_encoder"):
        stage.main([str(recipe), f"text_encoder={tmp_path / 'cache'}"])


def test_collator_keeps_pairs_together(tiny_llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(tiny_llm)
    texts = [" ".join((WORDS * 2)[i : i + (40, 3)[i % 2] + i % 7]) for i in range(64)]
    records = [CaptionRecord(str(i), {"c": texts[2 * i : 2 * i + 2]}) for i in range(32)]
    table = table_of(records, lambda: encoder.tokens)
    drawn = [CaptionPairs([table], [CaptionPairSource(path="x")], seed=0)[0, i] for i in range(32)]
    batch = PairCollator(encoder.tokens)(drawn)
    assert len(batch["groups"]) == 2
    widths = [group["input_ids"].shape[1] for group in batch["groups"]]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    with torch.no_grad():
        embeds = torch.cat([encoder(**group) for group in batch["groups"]])[batch["order"]]
    query, positive = embeds.chunk(2)
    for found, wanted in (
        (query, [pair.query for pair in drawn]),
        (positive, [pair.positive for pair in drawn]),
    ):
        expected = encoder.encode(wanted, normalize=False)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_captions_that_are_equal_up_to_the_cut_are_no_negatives(tiny_llm: Path) -> None:
    """Their vectors are the same: none is nearer to its own partner than the other."""
    loaded = TextEncoder.from_pretrained(tiny_llm)
    settings = replace(loaded.settings, max_length_tokens=8)
    encoder = TextEncoder(loaded.backbone, loaded.tokenizer, settings)
    same, other = " ".join(WORDS[:8]), " ".join(WORDS[8:16])
    pairs = [(f"{same} one", "two"), (other, "three"), (f"{same} four", "five")]
    drawn = [
        CaptionPair(n, *texts, ids=[np.array(ids) for ids in encoder.tokens(texts)])
        for n, texts in enumerate(pairs)
    ]
    batch = PairCollator(encoder.tokens)(drawn)
    assert alike_ids(batch["texts"], batch["records"]).tolist() == [0, 1, 0]
    query = encoder.encode([text for text, _ in pairs])
    assert torch.allclose(query[0], query[2], atol=1e-6)


def test_micro_batches_keep_their_budget(
    tmp_path: Path, tiny_llm: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    sizes: list[int] = []
    forward = LlamaModel.forward

    def record(self: LlamaModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(input_ids.numel() if self.training else 0)
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", record)
    stage = load(repo_root, "stage1_text_encoder")
    recipe = write_recipe(tmp_path, tiny_llm, trainer={"max_steps": 1, "save_strategy": "no"})
    found: dict[str, tuple[int, float, float]] = {}
    for name, overrides in {"whole": [], "micro": ["micro_batch_tokens=100"]}.items():
        out = tmp_path / name
        stage.main([str(recipe), *overrides, f"output_dir={out}", "evaluation=[]"])
        (row,) = metrics(out)
        found[name] = (max(sizes), row["loss"], row["grad_norm"])
        sizes.clear()
    assert found["whole"][0] > 100 >= found["micro"][0] > 0
    assert found["micro"][1:] == pytest.approx(found["whole"][1:], rel=1e-4)
    with pytest.raises(ValueError, match="gradient_checkpointing is true beside micro-batches"):
        stage.main([str(recipe), "micro_batch_tokens=9", "trainer.gradient_checkpointing=true"])


def test_alike_pairs_are_linked() -> None:
    texts = [
        (0, 1),
        (2, 3),
        (3, 4),  # its query is the positive of the second
        (5, 6),  # the first record again
        (4, 7),  # linked to the second through the third
        (8, 9),
    ]
    ids = alike_ids(torch.tensor(texts), torch.tensor([0, 1, 2, 0, 4, 5]))
    assert ids.tolist() == [0, 1, 1, 0, 1, 5]


def test_adapter_takes_its_settings(tiny_llm: Path) -> None:
    def trainable(**keys: Any) -> tuple[int, set[str]]:
        backbone = TextEncoder.from_pretrained(tiny_llm).backbone
        model = add_adapter(backbone, LoraSection(**keys))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        size = sum(p.numel() for n, p in model.named_parameters() if n in names)
        return size, {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}

    size, layers = trainable(r=4)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == linear
    assert trainable(r=8)[0] == 2 * size
    assert trainable(r=4, target_modules=["q_proj"])[1] == {"q_proj"}
    assert trainable(r=4, use_dora=True)[0] > size  # a magnitude for each output
    model = add_adapter(
        TextEncoder.from_pretrained(tiny_llm).backbone, LoraSection(r=4, alpha=8, dropout=0.25)
    )
    layer = model.get_submodule("base_model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.25
