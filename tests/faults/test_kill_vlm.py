"""Stages 3 and 4 killed at any moment end with the weights of an undisturbed run, bit for bit.

T40, T41, T43. The programs run in processes of their own, a checkpoint after each step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages import stage3_projector, stage4_instruction
from tests.killing import MOMENTS, kill_within, run_apart
from tests.vlm_fixtures import write_llava, write_recipe

STAGES = {"stage3": stage3_projector.main, "stage4": stage4_instruction.main}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path
) -> dict[str, tuple[Path, Path, float]]:
    """Of each stage its recipe, its output and its seconds; both with dropout or packing."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("kill")
    data = [{"path": str(write_llava(work, text_only=(2, 9)))}]
    shared: dict[str, Any] = {
        "data": data,
        "trainer": {"save_strategy": "steps", "save_steps": 1, "max_steps": 8},
    }
    stage3 = write_recipe(
        work / "stage3.yaml",
        output_dir=str(work / "three"),
        vlm={"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)},
        trainable={"multi_modal_projector": 1e-2},
        packing=True,
        plain=False,  # which takes pairs alone
        **shared,
    )
    stage4 = write_recipe(
        work / "stage4.yaml",
        output_dir=str(work / "four"),
        checkpoint=str(work / "three" / "model"),
        trainable={"multi_modal_projector": 1e-2, "language_model": 1e-2},
        language_model_lora={"r": 4, "alpha": 8, "dropout": 0.2},
        packing=False,
        **shared,
    )
    found = {}
    for stage, recipe, out in zip(STAGES, (stage3, stage4), ("three", "four"), strict=True):
        found[stage] = (recipe, work / out, run_apart(STAGES[stage], [str(recipe)]))
    return found


@pytest.mark.parametrize("share", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_as_if_nothing_had_been(
    undisturbed: dict[str, tuple[Path, Path, float]],
    tmp_path: Path,
    stage: str,
    share: float,
) -> None:
    recipe, whole, seconds = undisturbed[stage]
    out = tmp_path / "out"
    argv = [str(recipe), f"output_dir={out}"]
    kill_within(STAGES[stage], argv, out, share * seconds)
    run_apart(STAGES[stage], argv)
    want, got = (load_file(o / "model" / "model.safetensors") for o in (whole, out))
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
