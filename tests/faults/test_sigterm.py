"""SIGTERM during training saves a checkpoint and ends with 0; as many or other processes go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2clip_vlm.training.callbacks import _outlive_one_signal, read_metrics
from llm2clip_vlm.training.checkpoints import damage
from stages import stage2b_vision_encoder
from tests.killing import start_ranks
from tests.tiny import WORDS, write_image

STEPS = 16


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("sigterm")
    rows = []
    for i in range(24):
        write_image(folder / "images" / f"{i}.png", seed=i)
        captions = [" ".join(WORDS[i : i + n]) for n in (3, 12)]
        rows.append({"id": str(i), "image": f"images/{i}.png", "captions": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(folder / "whole"),
        "global_batch_size": 8,
        "vision_tower": str(tiny_clip),
        "write_through": {"language_model": str(tiny_llm)},
        "embedding_cache": str(folder / "cache"),
        "projection_dim": 16,
        "train": [{"path": str(folder / "pairs.jsonl")}],
        "trainer": {
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(recipe: Path, out: Path, processes: int) -> list[Any]:
    return start_ranks(stage2b_vision_encoder.main, [str(recipe), f"output_dir={out}"], processes)


def ended(processes: list[Any]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def rows(out: Path) -> dict[int, float]:
    """Loss of each step."""
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """Output of two processes that nobody disturbed."""
    out = recipe.parent / "whole"
    assert ended(run(recipe, out, 2)) == [0, 0]
    return out


@pytest.fixture(scope="module")
def stopped(recipe: Path, whole: Path) -> Path:
    """Output of two processes, of which one got SIGTERM."""
    out = recipe.parent / "stopped"
    both = run(recipe, out, 2)
    while not rows(out):
        time.sleep(0.005)
        assert all(process.is_alive() for process in both)
    os.kill(both[1].pid, signal.SIGTERM)
    assert ended(both) == [0, 0]
    return out


def test_sigterm_saves_the_step_and_ends_well(stopped: Path, whole: Path) -> None:
    step = max(rows(stopped))
    assert 0 < step < STEPS
    folder = stopped / "checkpoints" / f"checkpoint-{step}"
    assert damage(folder) is None
    assert json.loads((folder / "files.json").read_text())["world_size"] == 2
    assert not (stopped / "manifest.json").exists()
    assert json.loads((stopped / ".llm2clip-vlm.json").read_text())["holder"] is None


@pytest.mark.parametrize(
    "processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_the_same_command_goes_on(
    recipe: Path, whole: Path, stopped: Path, processes: int, tmp_path: Path
) -> None:
    """Two processes bit for bit, others with the same weights, optimizer and samples."""
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    assert ended(run(recipe, out, processes)) == [0] * processes
    first, all_of = max(rows(stopped)), rows(whole)
    assert rows(out) == pytest.approx(all_of, abs=0 if processes == 2 else 1e-5)
    a, b = (load_file(o / "model" / "model.safetensors") for o in (whole, out))
    for name, tensor in a.items():
        if processes == 2:
            assert torch.equal(b[name], tensor), name
        torch.testing.assert_close(b[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert 0 < first < STEPS


def test_a_loaders_worker_outlives_one_signal(tmp_path: Path) -> None:
    """It gets SIGTERM where the whole process group does, and a second one at its end."""

    def work() -> None:
        _outlive_one_signal((tmp_path / "seeded").write_text, "0")  # type: ignore[arg-type]
        while True:
            time.sleep(0.01)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    while not (tmp_path / "seeded").exists():
        time.sleep(0.01)
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == -signal.SIGTERM
