"""Two machines, each with its own `accelerate launch` as the docs print it, on the CPU with gloo.

They compute what one process computes; a lost, stopped or slow one, SIGTERM and a shared folder in
which files appear late lose nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.machines import Job, Machine, two_machines
from tests.tiny import WORDS, write_image
from tests.vlm_fixtures import losses, run_here, write_llava, write_recipe

TRAINER = {
    "max_steps": 8,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
}
LINES = {
    "stage1_text_encoder": "ddp.yaml",
    "stage2b_vision_encoder": "ddp.yaml",
    "stage3_projector": "multinode.yaml",
    "stage4_instruction": "multinode.yaml",
}
"""The launcher's file of each stage's printed line."""
WEIGHTS = {"stage1_text_encoder": "text_encoder"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    with two_machines(tmp_path_factory.mktemp("machines")) as both:
        yield both


@pytest.fixture(scope="module")
def recipes(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path
) -> dict[str, Path]:
    """A recipe of each stage, in the folder that both machines see."""
    folder = tmp_path_factory.mktemp("shared")
    rows = []
    for i in range(32):
        write_image(folder / "images" / f"{i}.png", seed=i)
        captions = {"short": [" ".join(WORDS[i : i + 3])], "long": [" ".join(WORDS[i : i + 12])]}
        rows.append({"id": str(i), "image": f"images/{i}.png", "captions": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, llm = [{"path": str(folder / "pairs.jsonl")}], {"language_model": str(tiny_llm)}
    llava = [{"path": str(write_llava(folder, 24, text_only=(2, 9, 10)))}]
    vlm = {"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)}
    steps = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 8}
    found = {}
    for stage, values in {
        "stage1_text_encoder": {"text_encoder": llm, "lora": {"r": 4, "dropout": 0.0}},
        "stage2b_vision_encoder": {
            "vision_tower": str(tiny_clip),
            "write_through": llm,
            "embedding_cache": str(folder / "cache"),
            "projection_dim": 16,
        },
    }.items():
        more = {"stage": stage, "output_dir": str(folder / stage), "global_batch_size": 8}
        found[stage] = folder / f"{stage}.yaml"
        found[stage].write_text(
            yaml.safe_dump(more | values | {"train": pairs, "trainer": TRAINER})
        )
    projector = {"multi_modal_projector": 1e-2}
    found["stage3_projector"] = write_recipe(
        folder / "stage3.yaml",
        output_dir=str(folder / "stage3"),
        vlm=vlm,
        data=llava,
        trainable=projector,
        packing=True,
        plain=False,  # which takes pairs alone
        trainer=steps,
    )
    found["stage4_instruction"] = write_recipe(
        folder / "stage4.yaml",
        output_dir=str(folder / "stage4"),
        checkpoint=str(folder / "stage3" / "model"),
        data=llava,
        trainable={**projector, "language_model": 5e-3},
        trainer=steps,
    )
    return found


def out_of(recipe: Path, name: str) -> Path:
    """Another output directory of a recipe."""
    out = recipe.parent / name
    shutil.rmtree(out, ignore_errors=True)
    return out


def weights(stage: str, out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS.get(stage, "model") / "model.safetensors")


def assert_bit_equal(stage: str, one: Path, two: Path) -> None:
    a, b = weights(stage, one), weights(stage, two)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Path]) -> Any:
    """Output of one process with a stage's recipe; made once."""

    def made(stage: str) -> Path:
        recipe = recipes[stage]
        out = Path(yaml.safe_load(recipe.read_text())["output_dir"])
        if stage == "stage4_instruction":
            made("stage3_projector")
        if not (out / "manifest.json").is_file():
            run_here(stage, recipe)
        return out

    return made


@pytest.fixture(scope="module")
def together(machines: list[Machine], recipes: dict[str, Path], alone: Any) -> Any:
    """Output of an undisturbed run on both machines; made once."""

    def made(stage: str) -> Path:
        alone(stage)
        out = recipes[stage].parent / f"{stage}-together"
        if not (out / "manifest.json").is_file():
            Job(machines, stage, LINES[stage], recipes[stage], *sharing(stage, out)).succeeds()
        return out

    return made


def sharing(stage: str, out: Path, *more: str) -> list[str]:
    """Overrides with which two processes share the batch."""
    words = [f"output_dir={out}", *more]
    if stage.startswith("stage2b"):
        words.append(f"embedding_cache={out}-cache")
    return words


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[pytest.mark.slow] * (stage != "stage1_text_encoder"))
        for stage in LINES
    ],
)
def test_two_machines_compute_what_one_process_does(alone: Any, together: Any, stage: str) -> None:
    one, two = alone(stage), together(stage)
    assert len(losses(one)) == 8
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    a, b = weights(stage, one), weights(stage, two)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_zero_splits_as_the_lines_say(together: Any) -> None:
    for stage, zero in (("stage3_projector", 2), ("stage4_instruction", 3)):
        extra = json.loads((together(stage) / "manifest.json").read_text())["extra"]
        assert (extra["world_size"], extra["zero_stage"]) == (2, zero)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "lost"), [("stage2b_vision_encoder", 1), ("stage4_instruction", 0)]
)
def test_a_killed_rank_is_named_and_the_job_goes_on(
    machines: list[Machine], recipes: dict[str, Path], together: Any, stage: str, lost: int
) -> None:
    """SIGKILL, as the kernel sends it when memory is short."""
    whole, recipe = together(stage), recipes[stage]
    out = out_of(recipe, f"{stage}-lost")
    job = Job(machines, stage, LINES[stage], recipe, *sharing(stage, out))
    job.when((out / "checkpoints" / "checkpoint-2" / "files.json").is_file)
    os.kill(job.worker(lost), signal.SIGKILL)
    started = time.monotonic()
    assert 0 not in job.ended()
    assert time.monotonic() - started < 60, job.logs()
    other = machines[1 - lost].log
    assert f"rank {lost} on " in other or f"rank {lost}, its launcher" in other, job.logs()
    assert not (out / "manifest.json").exists()
    Job(machines, stage, LINES[stage], recipe, *sharing(stage, out)).succeeds()
    assert "train: from step 0" not in machines[0].log
    assert_bit_equal(stage, whole, out)


@pytest.mark.slow
def test_a_machine_that_stands_still_is_named(
    machines: list[Machine], recipes: dict[str, Path], together: Any
) -> None:
    """As a machine whose network is gone: no connection is closed, nothing ends by itself."""
    stage = "stage2b_vision_encoder"
    together(stage)
    out = out_of(recipes[stage], "frozen")
    words = sharing(stage, out, "hang_timeout_s=8")
    job = Job(machines, stage, LINES[stage], recipes[stage], *words)
    job.when((out / "checkpoints" / "checkpoint-2" / "files.json").is_file)
    os.kill(frozen := job.worker(1), signal.SIGSTOP)
    assert job.launchers[0].wait(60) != 0
    os.kill(frozen, signal.SIGCONT)
    assert 0 not in job.ended()
    assert "rank 0 of 2 has stood still for 8 s in " in machines[0].log, job.logs()
    assert "is gone or stopped" in machines[0].log and "rank 1 on " in machines[0].log


@pytest.mark.slow
def test_a_slow_machine_and_sigterm_lose_nothing(
    machines: list[Machine], recipes: dict[str, Path], together: Any
) -> None:
    """The launchers get the signal, as under SLURM; the stage's processes end with 0."""
    stage = "stage4_instruction"
    whole = together(stage)
    out = out_of(recipes[stage], "stopped")
    words = sharing(stage, out)
    job = Job(machines, stage, LINES[stage], recipes[stage], *words)
    job.when(lambda: (out / "metrics.jsonl").is_file() and bool(losses(out)))
    os.kill(slow := job.worker(1), signal.SIGSTOP)
    time.sleep(3)
    for launcher in job.launchers:
        launcher.send_signal(signal.SIGTERM)
    os.kill(slow, signal.SIGCONT)
    job.ended()
    assert "stopped by SIGTERM: step" in machines[0].log, job.logs()
    assert "error: " not in machines[0].log + machines[1].log, job.logs()
    assert not (out / "manifest.json").exists()
    Job(machines, stage, LINES[stage], recipes[stage], *words).succeeds()
    assert "train: from step 0" not in machines[0].log
    assert_bit_equal(stage, whole, out)


LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
/* Files below LATE_ROOT do not exist for LATE_S seconds after they were written or renamed. */
static int late(int at, const char *path) {
  const char *root = getenv("LATE_ROOT");
  struct statx found;
  if (!root || !path || strncmp(path, root, strlen(root))) return 0;
  if (syscall(SYS_statx, at, path, 0, STATX_CTIME | STATX_TYPE, &found)) return 0;
  if (!S_ISREG(found.stx_mode)) return 0;
  if (time(0) - found.stx_ctime.tv_sec >= atoi(getenv("LATE_S"))) return 0;
  errno = ENOENT;
  return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) && late(AT_FDCWD, path)) return -1; \
    return REAL(name)(path, flags, mode); }
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) && late(at, path)) return -1; \
    return REAL(name)(at, path, flags, mode); }
#define STAT(name, kind) \
  int name(const char *path, struct kind *to) { \
    return late(AT_FDCWD, path) ? -1 : REAL(name)(path, to); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
STAT(stat, stat) STAT(stat64, stat64) STAT(lstat, stat) STAT(lstat64, stat64)
int fstatat(int at, const char *path, struct stat *to, int flags) {
  return late(at, path) ? -1 : REAL(fstatat)(at, path, to, flags); }
int fstatat64(int at, const char *path, struct stat64 *to, int flags) {
  return late(at, path) ? -1 : REAL(fstatat64)(at, path, to, flags); }
int statx(int at, const char *restrict path, int flags, unsigned mask, struct statx *restrict to) {
  return late(at, path) ? -1 : REAL(statx)(at, path, flags, mask, to); }
int access(const char *path, int mode) {
  return late(AT_FDCWD, path) ? -1 : REAL(access)(path, mode); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1_text_encoder", "stage3_projector"])
def test_files_that_appear_late_are_waited_for(
    machines: list[Machine], recipes: dict[str, Path], together: Any, stage: str, tmp_path: Path
) -> None:
    """The second machine sees what the first writes into the shared folder 4 seconds later."""
    (tmp_path / "late.c").write_text(LATE)
    shim = tmp_path / "late.so"
    words = ["-shared", "-fPIC", "-o", str(shim), str(tmp_path / "late.c"), "-ldl"]
    if shutil.which("gcc") is None or subprocess.run(["gcc", *words], check=False).returncode:
        pytest.skip("needs gcc, which makes the library that hides files")
    whole = together(stage)
    out = out_of(recipes[stage], f"{stage}-late")
    late = {"LD_PRELOAD": str(shim), "LATE_ROOT": str(out), "LATE_S": "4"}
    hidden = [
        sys.executable,
        "-c",
        f"open(r'{tmp_path}/new', 'w').close(); open(r'{tmp_path}/new')",
    ]
    env = {**os.environ, **late, "LATE_ROOT": str(tmp_path)}
    assert subprocess.run(hidden, check=False, env=env, capture_output=True).returncode, "no effect"
    Job(machines, stage, LINES[stage], recipes[stage], *sharing(stage, out), env=late).succeeds()
    assert_bit_equal(stage, whole, out)
