"""Stages 1, 2a and 2b, killed at any moment and started again, end with the same bytes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from torch.utils.data import get_worker_info

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
from stages import stage1_text_encoder, stage2a_cache_text, stage2b_vision_encoder
from tests.killing import MOMENTS, Main, kill_within, run_apart, start_apart
from tests.tiny import WORDS, write_image

TRAINER = {
    "per_device_train_batch_size": 8,
    "max_steps": 8,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_tqdm": True,
}


class Reference(NamedTuple):
    """A run that nobody disturbed."""

    main: Main
    recipe: Path
    seconds: float
    result: dict[str, str]
    """File to hash of its bytes."""

    def killed(self, share: float, folder: Path) -> dict[str, str]:
        """What the run leaves that is killed after a share of the time, and started again."""
        argv = [str(self.recipe), f"output_dir={folder / 'out'}"]
        if "write_through" in self.recipe.read_text():
            argv.append(f"embedding_cache={folder / 'cache'}")
        kill_within(self.main, argv, folder, share * self.seconds)
        run_apart(self.main, argv)
        return hashes(folder)


def hashes(folder: Path) -> dict[str, str]:
    """Of all weights, stage 2a's shards and those of a cache that fills itself; the losses."""
    files = [p for p in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in p.parts]
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert not list(folder.rglob("part-*"))
    for log in folder.rglob("metrics.jsonl"):
        rows = map(json.loads, log.read_text().splitlines())
        found["losses"] = str([(row["step"], row["loss"]) for row in rows if "loss" in row])
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(24):
        write_image(folder / "images" / f"{i}.png", seed=i)
        captions = {"short": [" ".join(WORDS[i : i + 3])], "long": [" ".join(WORDS[i : i + 12])]}
        rows.append({"id": str(i), "image": f"images/{i}.png", "captions": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def reference(
    pairs: Path, tiny_clip: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    done: dict[str, Reference] = {}
    llm, source = {"language_model": str(tiny_llm)}, [{"path": str(pairs)}]
    keys: dict[str, tuple[Any, dict[str, Any]]] = {
        "stage1_text_encoder": (
            stage1_text_encoder,
            {"text_encoder": llm, "lora": {"r": 4, "dropout": 0.1}, "train": source},
        ),
        "stage2a_cache_text": (
            stage2a_cache_text,
            {"text_encoder": llm, "sources": source, "batch_tokens": 32},
        ),
        "stage2b_vision_encoder": (
            stage2b_vision_encoder,
            {
                "vision_tower": str(tiny_clip),
                "write_through": llm,
                "projection_dim": 16,
                "train": source,
                "evaluation": source,
                "weight_average": {"decay": 0.9},
                "patch_dropout": 0.5,
            },
        ),
    }

    def make(stage: str) -> Reference:
        if stage not in done:
            folder = tmp_path_factory.mktemp(stage)
            program, more = keys[stage]
            values = {"stage": stage, "output_dir": str(folder / "out"), "global_batch_size": 8}
            if stage == "stage2b_vision_encoder":
                values["embedding_cache"] = str(folder / "cache")
            recipe = folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(values | more | {"trainer": TRAINER}))
            seconds = run_apart(program.main, [str(recipe)])
            done[stage] = Reference(program.main, recipe, seconds, hashes(folder))
        return done[stage]

    return make


@pytest.mark.parametrize("share", MOMENTS)
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("stage1_text_encoder", marks=pytest.mark.slow),
        pytest.param("stage2a_cache_text", marks=pytest.mark.slow),
        "stage2b_vision_encoder",
    ],
)
def test_a_killed_stage_ends_with_the_same_bytes(
    reference: Callable[[str], Reference], stage: str, share: float, tmp_path: Path
) -> None:
    whole = reference(stage)
    assert any("model" in name or "shard" in name for name in whole.result)
    assert whole.killed(share, tmp_path) == whole.result


def _loses_a_worker(argv: Sequence[str]) -> None:
    """Stage 2b, whose loader's worker is killed in the second epoch, as the kernel does."""
    getitems = ImageTextDataset.__getitems__

    def killed(self: ImageTextDataset, indices: Sequence[int]) -> dict[str, Any]:
        if get_worker_info() is not None and self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return getitems(self, indices)

    ImageTextDataset.__getitems__ = killed  # type: ignore[method-assign]
    multiprocessing.set_start_method("fork", force=True)  # workers have what stands above
    told = Path(argv[0]).with_name("told.txt")
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    raise SystemExit(guard(lambda: stage2b_vision_encoder.main(argv)))


def test_a_killed_worker_ends_the_run_which_goes_on(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    whole = reference("stage2b_vision_encoder")
    argv = [str(whole.recipe), f"output_dir={tmp_path / 'out'}"]
    argv.append(f"embedding_cache={tmp_path / 'cache'}")
    process = start_apart(_loses_a_worker, [*argv, "trainer.dataloader_num_workers=1"])
    process.join(120)
    assert process.exitcode == 2
    told = whole.recipe.with_name("told.txt").read_text()
    assert "DataLoader worker" in told and "not enough memory: use" in told
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir()
    run_apart(stage2b_vision_encoder.main, argv)
    assert hashes(tmp_path) == whole.result
