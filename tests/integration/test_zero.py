"""Stages 3 and 4 in two processes compute what one process computes.

Same global batch, samples with unequal numbers of trained tokens, CPU with gloo. The short form
(ZeRO-2, stage 4) runs always; ZeRO-3, resuming and text-only processes are marked slow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm_fixtures import losses, run_here, run_stage, write_llava, write_recipe

pytest.importorskip("deepspeed")

TOLERANCE = 1e-4
PROJECTOR = {"multi_modal_projector": 1e-2}
FROZEN_TOWER = {**PROJECTOR, "language_model": 5e-3}
ALL = {"vision_tower": 1e-3, "multi_modal_projector": 1e-2, "language_model": 5e-3}
# Two samples a process and step, in file order: process 0 gets 0 1 4 5 ..., process 1 the others.
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
FIRST_PROCESS = [i for i in range(16) if i % 4 < 2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Path:
    """A composed VLM; with 1,100 words its logits are those of trained tokens alone."""
    from transformers import AutoModelForCausalLM

    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

    folder = tmp_path_factory.mktemp("zero")
    shutil.copytree(tiny_llm, folder / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm)
    torch.manual_seed(0)
    llm.resize_token_embeddings(1100, mean_resizing=False)
    llm.save_pretrained(folder / "llm")
    save_vlm(*build_vlm(tiny_clip, folder / "llm"), folder / "vlm")
    return folder


def stage4(work: Path, name: str, *, text_only: Any = (), **values: Any) -> tuple[Path, Path]:
    """A stage 4 recipe of four steps; returns it and its output directory."""
    folder = work / name
    folder.mkdir(exist_ok=True)
    data = write_llava(folder, 16, text_only=text_only)
    recipe = write_recipe(
        folder / "stage4.yaml",
        output_dir=str(folder / "out"),
        data=[{"path": str(data)}],
        **{"checkpoint": str(work / "vlm"), "trainable": ALL, **values},
    )
    return recipe, folder / "out"


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())["extra"]
    return found


def assert_same_training(one: Path, two: Path) -> None:
    from safetensors.torch import load_file

    assert len(losses(one)) == 4
    assert losses(two) == pytest.approx(losses(one), abs=TOLERANCE)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-3, rtol=0, msg=name)


def test_zero2_in_two_processes_equals_one(work: Path) -> None:
    recipe, one = stage4(work, "short")
    run_here("stage4_instruction", recipe)
    two = one.with_name("zero2")
    run_stage("stage4_instruction", recipe, f"output_dir={two}", accelerate="zero2_cpu.yaml")
    assert manifest(one)["world_size"] == 1
    assert manifest(two)["world_size"] == 2
    assert manifest(two)["zero_stage"] == 2
    assert_same_training(one, two)


def test_an_incomplete_padded_step_in_two_processes_equals_one(work: Path) -> None:
    """Of 13 samples the last step has one: the second process has none, and sees none again."""
    recipe, one = stage4(work, "rest", trainer={"train_sampling_strategy": "group_by_length"})
    run_here("stage4_instruction", recipe, "data.0.limit=13")
    two = one.with_name("two")
    words = ("data.0.limit=13", f"output_dir={two}")
    run_stage("stage4_instruction", recipe, *words, processes=2)
    assert manifest(two)["world_size"] == 2
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_stage3_composes_and_trains_the_same(
    work: Path, tiny_clip: Path, tiny_llm: Path, zero: int
) -> None:
    folder = work / f"stage3-{zero}"
    recipe = write_recipe(
        folder.with_suffix(".yaml"),
        output_dir=str(folder / "one"),
        vlm={"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)},
        data=[{"path": str(write_llava(folder))}],
        trainable=PROJECTOR,
    )
    run_here("stage3_projector", recipe)
    two = folder / "two"
    run_stage("stage3_projector", recipe, f"output_dir={two}", accelerate=f"zero{zero}_cpu.yaml")
    assert (manifest(two)["world_size"], manifest(two)["zero_stage"]) == (2, zero)
    assert_same_training(folder / "one", two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "trainable"),
    [
        ("zero2_cpu.yaml", ALL),
        ("zero2_cpu.yaml", PROJECTOR),
        ("zero3_cpu.yaml", ALL),
        ("zero3_cpu.yaml", FROZEN_TOWER),
        (None, PROJECTOR),
    ],
    ids=["zero2-all", "zero2-projector", "zero3-all", "zero3-frozen-tower", "ddp-projector"],
)
def test_a_process_with_text_alone(work: Path, config: str | None, trainable: Any) -> None:
    """Without the guard this crashes or hangs, or gives other gradients."""
    name = f"text-{str(config)[:5]}-{len(trainable)}"
    recipe, one = stage4(
        work, name, text_only=FIRST_PROCESS, trainable=trainable, trainer=SEQUENTIAL
    )
    run_here("stage4_instruction", recipe)
    two = one.with_name("two")
    run_stage("stage4_instruction", recipe, f"output_dir={two}", accelerate=config, processes=2)
    assert manifest(two)["world_size"] == 2
    assert_same_training(one, two)


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("zero", "trainable"),
    [
        pytest.param(2, ALL, id="2-trained-tower", marks=pytest.mark.slow),
        pytest.param(3, FROZEN_TOWER, id="3-frozen-tower", marks=pytest.mark.slow),
        pytest.param(2, FROZEN_TOWER, id="2-frozen-tower", marks=pytest.mark.slow),
        pytest.param(3, ALL, id="3-trained-tower", marks=pytest.mark.slow),
    ],
)
def test_text_beside_pictures_never_hangs(
    work: Path, zero: int, trainable: Any, steps: int
) -> None:
    """T50: in each step one process has text alone, the other pictures; a hang ends by itself."""
    recipe, out = stage4(
        work,
        f"mixed-{zero}-{len(trainable)}-{steps}",
        text_only=FIRST_PROCESS,
        trainable=trainable,
        hang_timeout_s=120.0,
        trainer={**SEQUENTIAL, "max_steps": steps},
    )
    run_stage("stage4_instruction", recipe, accelerate=f"zero{zero}_cpu.yaml")
    assert manifest(out)["zero_stage"] == zero
    assert len(losses(out)) == steps
    assert losses(out)[-1] < losses(out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2_cpu.yaml", "zero3_cpu.yaml", None], ids=str)
def test_a_killed_run_resumes_exactly(work: Path, config: str | None) -> None:
    name = f"resume-{str(config)[:5]}"
    recipe, out = stage4(
        work, name, trainer={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    )
    run_stage("stage4_instruction", recipe, accelerate=config, processes=2)
    whole = out.with_name("whole")
    shutil.copytree(out, whole)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    (out / "manifest.json").unlink()
    run_stage("stage4_instruction", recipe, accelerate=config, processes=2)
    assert_same_training(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_packing_and_lora_work_under_zero(work: Path, zero: int) -> None:
    """T50, T70: 1 x 8 = 2 x 4 with packing; steps with images, and one without."""
    recipe, one = stage4(
        work,
        f"packed-{zero}",
        text_only=(1, 5, 7, 11, 13, 2, 4, 9),
        max_length_tokens=64,
        packing=True,
        global_batch_size=8,
        language_model_lora={"r": 4, "alpha": 8, "dropout": 0.0},
        trainable={"multi_modal_projector": 1e-2, "language_model": 1e-2},
        trainer={"per_device_train_batch_size": 1},
    )
    run_here("stage4_instruction", recipe)
    two = one.with_name("two")
    run_stage("stage4_instruction", recipe, f"output_dir={two}", accelerate=f"zero{zero}_cpu.yaml")
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [PROJECTOR, ALL], ids=["projector", "all"])
@pytest.mark.parametrize("zero", [2, 3])
def test_anyres_with_a_process_of_text_alone(
    work: Path, tiny_clip: Path, zero: int, trainable: Any
) -> None:
    from PIL import Image

    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

    checkpoint = work / "anyres"
    if not checkpoint.is_dir():
        save_vlm(
            *build_vlm(tiny_clip, work / "llm", image_aspect_ratio="anyres", seed=1), checkpoint
        )
    recipe, one = stage4(
        work,
        f"anyres-{zero}-{len(trainable)}",
        text_only=FIRST_PROCESS,
        trainable=trainable,
        checkpoint=str(checkpoint),
        max_length_tokens=256,
        trainer=SEQUENTIAL,
    )
    for number, path in enumerate(sorted(one.parent.glob("images/*.png"))):
        Image.open(path).resize((30 * (1 + number % 3), 40)).save(path)
    run_here("stage4_instruction", recipe)
    two = one.with_name("two")
    run_stage("stage4_instruction", recipe, f"output_dir={two}", accelerate=f"zero{zero}_cpu.yaml")
    assert manifest(two)["world_size"] == 2
    assert_same_training(one, two)
