"""What a run needs and costs, from configs alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel

from llm2clip_vlm import cli
from llm2clip_vlm.data.conversation.packing import PackedBatches
from llm2clip_vlm.preflight import plan as plans
from llm2clip_vlm.preflight.lengths import Lengths, measured
from llm2clip_vlm.preflight.machines import Machine, find_machine
from llm2clip_vlm.preflight.plan import Plan, make_plan
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from tests.tiny_towers import build_tower
from tests.vlm_fixtures import write_llava

ONE = Machine()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Path:
    """Recipes of all stages on tiny models, with data."""
    folder = tmp_path_factory.mktemp("plan")
    write_llava(folder, count=40)
    rows = [
        {"id": str(n), "image": f"images/{n}.png", "captions": ["a dog", "a big cat"]}
        for n in range(40)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = [{"path": str(folder / "captions.jsonl")}]
    common = {
        "global_batch_size": 16,
        "trainer": {"max_steps": 5, "per_device_train_batch_size": 8},
    }
    whole = {"global_batch_size": 16, "trainer": {"max_steps": 5}}
    encoder = {"language_model": str(tiny_llm)}
    vlm = {"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)}
    data = {"data": [{"path": str(folder / "llava.json")}], "max_length_tokens": 64}
    both = {"multi_modal_projector": 1e-3, "language_model": 1e-3}
    recipes: dict[str, dict[str, Any]] = {
        "stage0_mntp": common | encoder | {"sources": captions, "max_length_tokens": 32},
        "stage1_text_encoder": whole | {"text_encoder": encoder, "train": captions},
        "stage2a_cache_text": {"text_encoder": encoder, "sources": captions},
        "stage2b_vision_encoder": whole
        | {
            "vision_tower": str(tiny_clip),
            "train": captions,
            "embedding_cache": str(folder / "cache"),
        }
        | {"write_through": encoder, "projection_dim": 32},
        "clip_baseline": whole | {"clip": str(tiny_clip), "train": captions},
        "stage3_projector": common
        | data
        | {"vlm": vlm, "trainable": {"multi_modal_projector": 1e-3}},
        "stage4_instruction": common
        | data
        | {"checkpoint": str(folder / "stage3_projector" / "model"), "trainable": both},
    }
    for stage, recipe in recipes.items():
        values = {"stage": stage, "output_dir": str(folder / stage), **recipe}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder


def planned(work: Path, stage: str, *overrides: str, machine: Machine = ONE, **given: Any) -> Plan:
    source = str(work / f"{stage}.yaml")
    return make_plan(load_recipe(source, RECIPES[stage], overrides), source, machine, **given)


@pytest.mark.parametrize("stage", sorted(RECIPES))
def test_every_stage_has_a_plan(work: Path, stage: str) -> None:
    found = planned(work, stage)
    assert found.fits and found.flops > 0 and found.held["weights"] > 0
    assert found.steps == (1 if stage == "stage2a_cache_text" else 5)
    assert "total" in found.parts and sum(found.disk.values()) > 0
    assert not (work / stage).exists()
    lines = plans.shown(found, 0.35, 2.0).splitlines()
    assert all(len(line) <= 100 for line in lines if not line.startswith("  checkpoint:"))


def test_a_checkpoint_with_a_tower_of_ours_has_a_plan(
    work: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """In a process of its own: transformers knows the tower only once this package has told it."""
    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

    tower = build_tower("eva02", tmp_path / "tower")
    save_vlm(*build_vlm(tower, tiny_llm), tmp_path / "vlm")
    words = ["plan", str(work / "stage4_instruction.yaml"), f"checkpoint={tmp_path / 'vlm'}"]
    command = [sys.executable, "-m", "llm2clip_vlm.cli", *words]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "memory of each GPU" in found.stdout


def test_flops_are_those_of_a_real_step(work: Path, tiny_clip: Path, tiny_llm: Path) -> None:
    """The same shapes with weights, through the model as it trains."""
    import torch

    from llm2clip_vlm.models.flops import flop_counter
    from llm2clip_vlm.models.vlm.building import build_vlm

    model, processor = build_vlm(tiny_clip, tiny_llm)
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    found = planned(work, "stage3_projector", "packing=false", tokens=14, samples=16)
    ids = torch.full((8, 30), 5)
    ids[:, 1:17] = processor.tokenizer.convert_tokens_to_ids("<image>")
    with flop_counter() as counter:
        model(input_ids=ids, pixel_values=torch.zeros(8, 3, 32, 32), labels=ids).loss.backward()
    assert found.flops / found.steps == pytest.approx(2 * counter.get_total_flops(), rel=0.05)


def test_memory_by_cause(work: Path) -> None:
    stage = "stage4_instruction"
    plain = planned(work, stage).held
    trained = planned(work, stage).parts.splitlines()[-1].split()[2]
    assert plain["optimizer"] == 8 * int(trained.replace(",", ""))  # two fp32 moments
    eight = planned(work, stage, machine=Machine(gpus=8, zero=3)).held
    assert eight["weights"] == pytest.approx(plain["weights"] / 8, rel=0.01)
    assert eight["optimizer"] == pytest.approx(plain["optimizer"] / 8, rel=0.01)
    assert (
        planned(work, stage, machine=Machine(gpus=8, zero=2, offload=True)).held["optimizer"] == 0
    )
    long = ["max_length_tokens=512", "trainer.per_device_train_batch_size=16"]
    long += ["global_batch_size=512", "trainable={multi_modal_projector: 1e-3}"]
    whole = planned(work, stage, *long).held["activations"]
    saved = planned(work, stage, *long, "trainer.gradient_checkpointing=true").held["activations"]
    assert saved < 0.7 * whole


def test_an_adapter_trains_alone(work: Path) -> None:
    lora = "language_model_lora={r: 2, alpha: 4, dropout: 0.0}"
    found = planned(work, "stage4_instruction", lora)
    assert found.held["optimizer"] < planned(work, "stage4_instruction").held["optimizer"]
    bits = planned(work, "stage4_instruction", lora, "load_in_4bit=true")
    assert bits.held["weights"] < found.held["weights"]
    assert any("bitsandbytes" in problem for problem in bits.missing)


@pytest.mark.parametrize(("batch", "most"), [(1, None), (4, None), (4, 6)])
def test_packing_is_that_of_the_training(batch: int, most: int | None) -> None:
    draw = random.Random(1)
    known = [(draw.randrange(20, 900), draw.randrange(3)) for _ in range(512)]
    sizes = [min(1024, text + 100 * images) for text, images in known]
    training = PackedBatches(
        sizes,
        [images for _, images in known],
        global_batch_size=512,
        max_tokens=1024 * batch,
        max_images=most,
        seed=0,
    )
    lengths = Lengths(512, [1], conversations=known)
    found = lengths.packed(1024, 100, 1024, 1024 * batch, most)
    assert found == (2 * training.accumulation, sum(sizes) / 512)
    guessed = Lengths(512, [200], images=2.0).packed(512, 100, 1024, 1024 * batch, most)
    assert guessed == (pytest.approx(512 * 400 / 1024 / batch), 400)


def test_what_does_not_fit_gets_a_change(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CONTEXT_BYTES", 0)
    large = ["max_length_tokens=512", "trainer.per_device_train_batch_size=16"]
    large += ["global_batch_size=512", "trainable={multi_modal_projector: 1e-3}"]
    needed = planned(work, "stage3_projector", *large).total
    monkeypatch.setitem(plans.GPUS, "small", (0.7 * needed / 1e9 / plans._USABLE, 100))
    found = planned(work, "stage3_projector", *large, machine=Machine("small"))
    assert not found.fits
    assert any(c.startswith("trainer.per_device_train_batch_size=") for c in found.changes)


def test_changes_are_overrides_that_the_stage_takes(work: Path) -> None:
    def changes(stage: str, *overrides: str) -> list[str]:
        recipe = load_recipe(str(work / f"{stage}.yaml"), RECIPES[stage], overrides)
        return [told for kind in plans._changes(recipe, Machine(gpus=2)) for told, *_ in kind]

    saving = "trainer.gradient_checkpointing=true"
    four = changes("stage4_instruction")[-3]
    assert (
        four.split()[:2] == ["load_in_4bit=true", saving] and "language_model_lora={r: 16}" in four
    )
    assert changes("stage4_instruction")[:2] == [saving, "trainer.per_device_train_batch_size=4"]
    found = changes("stage1_text_encoder", saving)
    assert f"micro_batch_tokens=4096 {saving.replace('true', 'false')}" in found
    assert not any("per_device" in told or "zero" in told for told in found)


def test_work_follows_the_data_and_the_machine(work: Path) -> None:
    epochs = ["trainer.max_steps=-1", "trainer.num_train_epochs=2"]
    found = planned(work, "stage3_projector", *epochs)
    assert found.steps == 6 and found.told.startswith("40 samples")  # the last of an epoch has 8
    many = planned(work, "stage3_projector", *epochs, samples=4000)
    assert many.steps == 500 and many.flops == pytest.approx(500 / 6 * found.flops)
    assert many.hours(0.35) == pytest.approx(many.flops / 0.35 / 989e12 / 3600)
    cache = planned(work, "stage2a_cache_text", samples=350_000_000)
    assert sum(cache.disk.values()) == pytest.approx(700e6 * (2 * 32 + 32))


def test_steps_are_those_of_the_training(work: Path, tmp_path: Path) -> None:
    """Weights, joined texts, prompts, and a part of a source are counted as they train."""
    whole = ["trainer.max_steps=-1", "trainer.num_train_epochs=1", "global_batch_size=4"]
    whole += ["trainer.per_device_train_batch_size=4"]
    path = work / "captions.jsonl"
    both = f"train=[{{path: {path}}}, {{path: {path}, weight: 0.1}}]"
    assert planned(work, "stage1_text_encoder", *whole).steps == 10
    assert planned(work, "stage1_text_encoder", *whole, both).steps == 11  # 44 pairs
    (tmp_path / "hard.jsonl").write_text('{"a": "a dog", "b": "a big dog", "c": "a cat"}\n')
    hard = f"train=[{{path: {tmp_path / 'hard.jsonl'}, directed: true, fields: [a, b, c]}}]"
    plain = planned(work, "stage1_text_encoder", samples=64, tokens=5)
    harder = planned(work, "stage1_text_encoder", hard, samples=64, tokens=5)
    assert harder.flops == pytest.approx(1.5 * plain.flops, rel=0.01)
    rows = planned(work, "stage0_mntp", *whole, samples=160, tokens=8)
    assert rows.steps == 160 * 2 * 8 / 32 / 4  # two captions, rows of 32 tokens
    cache, asked = (
        planned(work, "stage2a_cache_text", "batch_tokens=64", more, samples=1000)
        for more in ("prompts=[]", "prompts=[x, y]")
    )
    assert asked.flops == pytest.approx(3 * cache.flops, rel=0.01)
    some = ["data.0.sampling_strategy=first:20%", "data.0.weight=2.0"]
    assert planned(work, "stage3_projector", *whole).steps == 10
    found = planned(work, "stage3_projector", *whole, *some)
    assert found.steps == 4 and found.told.startswith("16 samples")


def test_a_source_counts_as_often_as_it_is_drawn(work: Path, tmp_path: Path) -> None:
    """Not as often as its records were measured."""
    listed = []
    for name, words, count in (("long", 120, 2000), ("short", 4, 600)):
        rows = [{"captions": ["w" * 4 * words, "v" * 4 * words]}] * count
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed.append(f"{{path: {tmp_path / name}.jsonl}}")
    source = str(work / "stage1_text_encoder.yaml")
    words = [f"train=[{listed[0]}, {listed[1]}]"]
    recipe = load_recipe(source, RECIPES["stage1_text_encoder"], words)
    found = measured(recipe, None, 0)
    assert found.samples == 2600
    assert found.mean == pytest.approx((2000 * 120 + 600 * 4) / 2600, rel=0.01)


def test_an_llm_beside_the_tower_is_counted(work: Path, tiny_llm: Path) -> None:
    """One that trains in the loop, and one that fills the cache."""
    stage, llm = "stage2b_vision_encoder", f"{{language_model: {tiny_llm}}}"
    given = ["write_through=null", f"embedding_cache={work / 'stage2a_cache_text'}"]
    cached = planned(work, stage, *given, tokens=8)
    filling = planned(work, stage, tokens=8)
    loop = ["write_through=null", "embedding_cache=null", f"text_in_loop={{text_encoder: {llm}}}"]
    looped = planned(work, stage, *loop, tokens=8)
    weights = sum(p.nbytes for p in AutoModel.from_pretrained(tiny_llm).parameters())
    assert filling.held["weights"] == cached.held["weights"] + weights
    assert looped.held["weights"] > filling.held["weights"]  # and its adapter
    assert looped.held["optimizer"] > cached.held["optimizer"]
    assert looped.flops > 1.3 * cached.flops and "text_encoder" in looped.parts


def test_dropped_patches_cost_nothing_and_a_teacher_does(work: Path) -> None:
    stage = "stage2b_vision_encoder"
    plain = planned(work, stage).flops
    assert planned(work, stage, "patch_dropout=0.5").flops < 0.7 * plain
    assert 1.2 * plain < planned(work, stage, "self_distillation={}").flops < 1.4 * plain


def test_the_launch_line_says_zero(work: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# accelerate launch --config_file recipes/accelerate/zero3.yaml\n")
    assert find_machine("h100-80gb", 8, None, False, str(recipe)).zero == 3
    assert find_machine("h100-80gb", 1, None, False, str(recipe)).zero == 0
    with pytest.raises(ValueError, match="did you mean `h100-80gb`"):
        find_machine("h100", 1, None, False, str(recipe))


@pytest.mark.parametrize(
    ("name", "memory", "gpu"),
    [
        ("NVIDIA H200", 150.1e9, "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 84.9e9, "a100-80gb"),
        ("NVIDIA L40S", 47.7e9, "l40s-48gb"),
        ("NVIDIA RTX 6000 Ada Generation", 50.9e9, "rtx6000ada-48gb"),
        ("NVIDIA GeForce RTX 4090", 25.3e9, "rtx4090-24gb"),
        ("Tesla T4", 15.8e9, "t4-16gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10.2e9, None),
        ("NVIDIA L40", 47.7e9, None),
    ],
)
def test_without_a_name_it_is_the_gpu_that_is_here(
    name: str, memory: float, gpu: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = SimpleNamespace(name=name, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen)
    (tmp_path / "r.yaml").write_text("")
    found = find_machine(None, 1, None, False, str(tmp_path / "r.yaml"))
    assert found.gpu == (gpu or "h100-80gb")
    assert found.told.startswith("this machine's" if gpu else "assumed: no known GPU is here")


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(work / "stage3_projector.yaml")
    assert cli.main(["plan", source, "--json", "--gpus", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["gpus"] == 2 and found["fits"] and found["missing"] == []
    words = ["train", "--dry-run", "stage3_projector", source, "data.0.path=none.json"]
    assert cli.main([*words, "--gpus", "2"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("stage3_projector on 2 x h100-80gb (assumed: no known GPU is here")
    assert "data.0.path: none.json: no such file" in out and "guessed" in out
    assert not (work / "stage3_projector").exists()
    assert cli.main(["plan", source, "vlm.language_model=org/name"]) == 2
    assert "hf download org/name config.json" in capsys.readouterr().err
