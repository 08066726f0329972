"""LLaVA data and recipes for the tests of stages 3 and 4, and how to launch a stage."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from tests.conftest import REPO_ROOT
from tests.tiny import write_image

COLOURS = ("red", "green", "blue", "yellow")


def write_llava(folder: Path, count: int = 16, *, text_only: Sequence[int] = ()) -> Path:
    """Writes a LLaVA file of `count` records, answers of unequal length; returns its path."""
    records = []
    for i in range(count):
        answer = " and ".join(COLOURS[(i + j) % 4] for j in range(1 + i % 3))
        turns = [
            {"from": "human", "value": "<image>\nwhat color is it ?"},
            {"from": "gpt", "value": answer},
        ]
        record: dict[str, Any] = {"id": f"r{i}", "image": f"images/{i}.png", "conversations": turns}
        if i % 4 == 1:
            turns += [{"from": "human", "value": "is it big ?"}, {"from": "gpt", "value": "yes ."}]
        if i in text_only:
            turns[0]["value"] = "what color is it ?"
            del record["image"]
        else:
            write_image(folder / "images" / f"{i}.png", seed=i)
        records.append(record)
    path = folder / "llava.json"
    path.write_text(json.dumps(records))
    return path


def write_recipe(path: Path, **values: Any) -> Path:
    """Writes a recipe for a few CPU steps; `values` override it."""
    recipe: dict[str, Any] = {
        "global_batch_size": 4,
        "max_length_tokens": 128,
        "packing": False,
        "trainer": {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "disable_tqdm": True,
        },
    }
    trainer = {**recipe["trainer"], **values.pop("trainer", {})}
    recipe = {**recipe, **values, "trainer": trainer}
    path.write_text(yaml.safe_dump(recipe))
    return path


def lora_recipe(r: int) -> Stage4Recipe:
    """Stage 4 with the projector, and an adapter of rank `r` on the language model."""
    return Stage4Recipe(
        output_dir="x",
        checkpoint="x",
        data=[],
        trainable={"multi_modal_projector": 1e-3, "language_model": 1e-3},
        language_model_lora=LoraSection(r=r, alpha=2 * r, dropout=0.0),
    )


def environment(packages: Path | None = None) -> dict[str, str]:
    """Environment of a stage's process: one thread, the checkout (and a folder) importable."""
    path = os.pathsep.join(map(str, filter(None, (REPO_ROOT, packages))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_stage(
    stage: str,
    recipe: Path,
    *overrides: str,
    accelerate: str | None = None,
    processes: int | None = None,
    packages: Path | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs a stage in new processes: alone, by a config of `recipes/accelerate/`, or torchrun.

    Args:
        packages: A folder of packages that only these processes see.
    """
    command = [sys.executable]
    if accelerate is not None:
        config = REPO_ROOT / "recipes" / "accelerate" / accelerate
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    elif processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(REPO_ROOT / "stages" / f"{stage}.py"), str(recipe), *overrides]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=environment(packages),
        cwd=recipe.parent,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{stage} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def run_here(stage: str, recipe: Path, *overrides: str) -> ModuleType:
    """Runs a stage in this process (importing transformers again costs seconds)."""
    path = REPO_ROOT / "stages" / f"{stage}.py"
    spec = importlib.util.spec_from_file_location(stage, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(recipe), *overrides])
    return module


def losses(output_dir: Path) -> list[float]:
    """Loss of each step, from `metrics.jsonl`."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def files_with_paths(*folders: Path) -> list[Path]:
    """Files of exports that name a folder of the tests (two levels down, as all of theirs begin).

    Args:
        folders: Where the exports are; what stays here (a run's manifest, recipe, results and
            checkpoints) is left out.
    """
    stays = ("manifest.json", "recipe.resolved.yaml", "parents.json", "results.json", "checkpoints")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return [
        file
        for file in files
        if not any(part in stays for part in file.parts)
        and str(Path(*file.parts[:3])).encode() in file.read_bytes()
    ]
