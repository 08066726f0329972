"""Runs the programs of a pipeline recipe in the order of their needs.

What a step leaves behind decides whether it runs: a manifest of the same recipe and the same
parents, or the files that it names. So a second run skips what is finished, and a run after a kill
goes on, with the stage that was cut off resuming from its own checkpoint.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

from llm2clip_vlm.config import MntpRecipe, RunRecipe, Stage1Recipe, Stage2aRecipe, Stage2bRecipe
from llm2clip_vlm.config_base import ClipBaselineRecipe, LanguageModelRecipe
from llm2clip_vlm.config_eval import PipelineRecipe, PipelineStep
from llm2clip_vlm.config_vlm import Stage3Recipe, Stage4Recipe
from llm2clip_vlm.fingerprint import fingerprint_file
from llm2clip_vlm.handoff import is_complete
from llm2clip_vlm.programs import find_program
from llm2clip_vlm.recipe import load_recipe

RECIPES: dict[str, type[RunRecipe]] = {
    "base_language_model": LanguageModelRecipe,
    "clip_baseline": ClipBaselineRecipe,
    "stage0_mntp": MntpRecipe,
    "stage1_text_encoder": Stage1Recipe,
    "stage2a_cache_text": Stage2aRecipe,
    "stage2b_vision_encoder": Stage2bRecipe,
    "stage3_projector": Stage3Recipe,
    "stage4_instruction": Stage4Recipe,
}
"""Programs that read a stage recipe and leave a manifest."""

_PERCENT = re.compile(r"(\d+)%\|")


class PipelineError(ValueError):
    """A pipeline that cannot be run, or a step that failed."""


@dataclass
class Job:
    """A step with its variables filled in."""

    name: str
    step: PipelineStep
    recipe: str | None
    overrides: list[str]
    arguments: list[str]
    needs: list[str]
    order: tuple[int, ...]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    log: Path = field(default=Path())
    log_start: int = 0

    def command(self, root: Path) -> list[str]:
        """The command line.

        Raises:
            FileNotFoundError: The program does not exist.
        """
        program = find_program(self.step.program, root)
        launch = self.step.launch or [sys.executable]
        recipe = [self.recipe] if self.recipe else []
        return [*launch, str(program), *recipe, *self.overrides, *self.arguments]


def expand(recipe: PipelineRecipe) -> list[Job]:
    """All jobs of a recipe, variables filled in, `needs` resolved.

    Raises:
        PipelineError: Two jobs of one name, or a need that no job fulfils.
    """
    jobs: list[Job] = []
    for index, step in enumerate(recipe.steps):
        names = list(step.for_each)
        for values in itertools.product(*step.for_each.values()):
            fill = dict(zip(names, values, strict=True))
            overrides = [f"{k}={_filled(str(v), fill)}" for k, v in step.overrides.items()]
            if recipe.world is not None and step.recipe:
                overrides += [f"world.seed={recipe.world.seed}", f"world.dir={recipe.world.dir}"]
            ranks = [step.for_each[n].index(v) for n, v in fill.items()]
            jobs.append(
                Job(
                    _filled(step.name, fill),
                    step,
                    _filled(step.recipe, fill) if step.recipe else None,
                    overrides,
                    [_filled(a, fill) for a in step.arguments],
                    [_filled(n, fill) for n in step.needs],
                    (ranks[0] if ranks else -1, index, *ranks[1:]),
                )
            )
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise PipelineError(f"step {job.name!r} stands twice; its name needs a variable")
        resolved = []
        for need in job.needs:
            found = [n for n in names if fnmatch.fnmatchcase(n, need)]
            if not found:
                raise PipelineError(f"step {job.name!r} needs {need!r}, which is no step")
            resolved += found
        job.needs = resolved
    try:
        tuple(TopologicalSorter({job.name: job.needs for job in jobs}).static_order())
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PipelineError(f"steps need each other in a circle: {circle}") from None
    return jobs


def _filled(text: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def finished(job: Job) -> bool:
    """Whether what the job makes is there and was made with this recipe from these parents."""
    model = RECIPES.get(job.step.program)
    if model is not None and job.recipe:
        recipe = load_recipe(job.recipe, model, job.overrides)
        return is_complete(recipe.output_dir, recipe)
    return bool(job.step.outputs) and all(Path(path).exists() for path in job.step.outputs)


def progress_of(log: Path, start: int = 0) -> int | None:
    """The last percentage of a progress bar in a log, from byte `start` on; none without a bar."""
    if not log.exists():
        return None
    with log.open("rb") as handle:
        handle.seek(max(start, log.stat().st_size - 2000))
        tail = handle.read().decode("utf-8", errors="replace")
    found = _PERCENT.findall(tail)
    return int(found[-1]) if found else None


class Pipeline:
    """Runs jobs, at most `recipe.jobs` at a time.

    Args:
        recipe: The pipeline.
        root: Where `stages/` and `eval/` are looked for; default the working directory.
    """

    def __init__(self, recipe: PipelineRecipe, root: Path | None = None) -> None:
        """Args: see the class."""
        self.recipe, self.root = recipe, root or Path.cwd()
        self.jobs = expand(recipe)
        self.done: set[str] = set()
        self.running: list[Job] = []
        self.fresh: set[str] = set()
        self.logs = Path(recipe.output_dir) / "logs"

    def run(self) -> dict[str, float]:
        """Run all jobs.

        Returns:
            Seconds of each job that ran now.

        Raises:
            PipelineError: A job failed; the message has the end of its log.
        """
        self._check_frozen()
        self.logs.mkdir(parents=True, exist_ok=True)
        previous = signal.signal(signal.SIGTERM, _stop)
        seconds: dict[str, float] = {}
        try:
            with _Display(len(self.jobs)) as display:
                while len(self.done) < len(self.jobs):
                    for job in self._ready():
                        if not (set(job.needs) & self.fresh) and finished(job):
                            self.done.add(job.name)
                            display.skipped(job)
                        else:
                            self._start(job)
                            display.started(job)
                    for job in self._ended():
                        seconds[job.name] = job.seconds
                        self._write({job.name: job.seconds})
                        display.ended(job)
                    display.update(self.running)
                    if self.running:
                        time.sleep(0.2)
        finally:
            signal.signal(signal.SIGTERM, previous)
            self._stop_all()
        return seconds

    def _check_frozen(self) -> None:
        for path, expected in self.recipe.frozen.items():
            got = fingerprint_file(path) if Path(path).is_file() else "no file"
            if got != expected:
                raise PipelineError(
                    f"frozen file {path}: expected SHA-256 {expected}, got {got}; restore it, or "
                    "change `frozen` and run everything that was compared again"
                )

    def last_words(self) -> str:
        """The last line of the last job's log: what the whole pipeline has to say."""
        log = self.logs / f"{self.jobs[-1].name}.log"
        lines = (
            log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        )
        spoken = [line.rsplit("\r", 1)[-1].strip() for line in lines if line.strip()]
        return spoken[-1] if spoken else ""

    def _ready(self) -> Iterator[Job]:
        waiting = [
            job
            for job in sorted(self.jobs, key=lambda job: job.order)
            if job.name not in self.done and job not in self.running and set(job.needs) <= self.done
        ]
        for job in waiting:
            alone = any(other.step.all_cores for other in self.running)
            if alone or len(self.running) >= self.recipe.jobs:
                return
            if job.step.all_cores and self.running:
                continue
            yield job

    def _start(self, job: Job) -> None:
        cores = os.cpu_count() or 1
        share = cores if job.step.all_cores else max(1, cores // self.recipe.jobs)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(share),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(
                p for p in (str(self.root), os.environ.get("PYTHONPATH", "")) if p
            ),
        }
        environment["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), environment.get("PATH", "")]
        )
        job.log = self.logs / f"{job.name}.log"
        job.log_start = job.log.stat().st_size if job.log.exists() else 0
        job.started = time.monotonic()
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(
                job.command(self.root),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.root,
                start_new_session=True,
            )
        self.running.append(job)

    def _ended(self) -> Iterator[Job]:
        for job in list(self.running):
            assert job.process is not None
            code = job.process.poll()
            if code is None:
                continue
            self.running.remove(job)
            job.seconds = time.monotonic() - job.started
            if code != 0:
                lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                raise PipelineError(
                    f"step {job.name!r} ended with exit code {code}; the end of {job.log}:\n  "
                    + "\n  ".join(line.rsplit("\r", 1)[-1] for line in lines)
                )
            self.done.add(job.name)
            self.fresh.add(job.name)
            yield job

    def _stop_all(self) -> None:
        for job in self.running:
            assert job.process is not None
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGTERM)
        for job in self.running:
            assert job.process is not None
            try:
                job.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(job.process.pid, signal.SIGKILL)

    def _write(self, seconds: dict[str, float]) -> None:
        path = Path(self.recipe.output_dir) / "seconds.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rounded = {name: round(value, 1) for name, value in seconds.items()}
        path.write_text(json.dumps({**old, **rounded}, indent=2) + "\n", encoding="utf-8")


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Display:
    """Bars on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console()
        self.total, self.count = total, 0
        self.last = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description:32}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.whole = self.progress.add_task("all steps", total=total)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _line(self, text: str) -> None:
        self.console.print(f"[{self.count}/{self.total}] {text}", highlight=False, markup=False)

    def skipped(self, job: Job) -> None:
        self.count += 1
        self.progress.advance(self.whole)
        self._line(f"{job.name}: finished before, skipped")

    def started(self, job: Job) -> None:
        self.tasks[job.name] = self.progress.add_task(job.name, total=100)

    def ended(self, job: Job) -> None:
        self.count += 1
        self.progress.advance(self.whole)
        self.progress.remove_task(self.tasks.pop(job.name))
        self._line(f"{job.name}: done in {job.seconds:.0f} s")

    def update(self, running: Sequence[Job]) -> None:
        for job in running:
            self.progress.update(
                self.tasks[job.name], completed=progress_of(job.log, job.log_start) or 0
            )
        if not self.console.is_terminal and running and time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            shares = (f"{j.name} {progress_of(j.log, j.log_start) or 0} %" for j in running)
            self._line(", ".join(shares))
