"""Runs the programs of a pipeline recipe in the order of their needs.

What a step leaves behind decides whether it runs: a manifest of the same recipe and parents, or the
files that it names, as they were when it ended, made by the same program, recipe and options from
the same files and stages' outputs. A second run skips what is finished; after a kill a stage goes
on from its own checkpoint. Steps end with the pipeline (:mod:`supervise`).
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from llm2clip_vlm.constants import STOPPED
from llm2clip_vlm.files import find_program, find_recipe, find_shipped, read_json, write_atomically
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.pipeline import PipelineRecipe, PipelineStep
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe, read_layers, resolved
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.runs import hashes, supervise
from llm2clip_vlm.runs.card import CARD_NAME
from llm2clip_vlm.runs.cores import allowed_threads, usable_cores
from llm2clip_vlm.runs.inputs import require_steps
from llm2clip_vlm.runs.manifest import find_manifest, is_complete
from llm2clip_vlm.runs.ownership import Hold, OwnershipError
from llm2clip_vlm.runs.shown import Seen, Shown, seen_in, told

COSTS_NAME = "costs.json"
"""What each job took, in the run that ended it: `seconds`, `cpu_seconds` of all its processes,
`peak_memory_gb` of the largest of them."""
OUTPUTS_NAME = "outputs.json"
"""File beside the logs: what each job's outputs were when it ended."""
ASKED_NAME = "asked.json"
"""File beside the logs: what was asked of each job that has ended, see :func:`asked_of`."""

COMMAND = "llm2clip-vlm"
"""The program of a step that runs one of this package's commands."""

_MOST_JOBS = 2000


class PipelineError(ValueError):
    """A pipeline that cannot be run, or a step that failed."""


@dataclass
class Job:
    """A step with its variables filled in, and its process once it runs."""

    name: str
    step: PipelineStep
    recipe: list[str]
    """Recipe and overrides; empty for a program that takes options only."""
    arguments: list[str]
    outputs: list[str]
    needs: list[str]
    order: tuple[int, ...]
    asked: str = ""
    complete: bool = False
    process: subprocess.Popen[bytes] = field(init=False, compare=False)
    started: float = 0.0
    log: Path = field(default=Path())
    log_start: int = 0

    def command(self) -> list[str]:
        """The command line.

        Raises:
            FileNotFoundError: The program does not exist.
        """
        if self.step.program == COMMAND:
            program = ["-m", "llm2clip_vlm.cli"]
        else:
            program = [str(find_program(self.step.program, Path.cwd()))]
        return [*(self.step.launch or [sys.executable]), *program, *self.recipe, *self.arguments]


def expand(recipe: PipelineRecipe) -> list[Job]:
    """All jobs of a recipe, variables filled in, `needs` resolved.

    Raises:
        PipelineError: Two jobs of one name, a need that no job fulfils, or a circle of needs.
    """
    common = [f"{key}={value}" for key, value in recipe.common.items()]
    jobs: list[Job] = []
    for index, step in enumerate(recipe.steps):
        if math.prod(map(len, step.for_each.values())) > _MOST_JOBS:
            raise PipelineError(f"step {step.name!r}: for_each makes more than {_MOST_JOBS} jobs")
        for values in itertools.product(*map(enumerate, step.for_each.values())):
            given = zip(step.for_each, values, strict=True)
            fill = {f"{{{name}}}": str(value) for name, (_, value) in given}
            ranks = [rank for rank, _ in values] or [-1]
            name, path, *needs = _filled([step.name, step.recipe or "", *step.needs], fill)
            overrides = _filled([f"{key}={value}" for key, value in step.overrides.items()], fill)
            words = [find_shipped(path), *overrides, *common] if path else overrides
            arguments, outputs = (_filled(w, fill) for w in (step.arguments, step.outputs))
            order = (ranks[0], index, *ranks[1:])
            jobs.append(Job(name, step, words, arguments, outputs, needs, order))
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise PipelineError(f"step {job.name!r} stands twice; its name needs a variable")
        found = {need: fnmatch.filter(names, need) for need in job.needs}
        if lost := [need for need, fulfilled in found.items() if not fulfilled]:
            raise PipelineError(f"step {job.name!r} needs {lost[0]!r}, which is no step")
        job.needs = list(itertools.chain(*found.values()))
    try:
        TopologicalSorter({job.name: job.needs for job in jobs}).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PipelineError(f"steps need each other in a circle: {circle}") from None
    return jobs


def _filled(texts: Sequence[str], values: dict[str, str]) -> list[str]:
    filled = list(texts)
    for name, value in values.items():
        filled = [text.replace(name, value) for text in filled]
    return filled


def asked_of(job: Job) -> str:
    """Hash of a job's program, recipe with all parents, options, and the files that these name.

    A stage's output is known by its manifest; the job's own outputs are left out.
    """
    path, *words = job.recipe if job.step.recipe else ["", *job.recipe]
    values, options = None, [*words, *job.arguments]
    files = filter(os.path.isfile, map(find_recipe, options))
    recipes = [read_layers(Path(file)) for file in files if file.endswith(".yaml")]
    if path:
        recipes.append(read_layers(Path(path)) | {"notes": None})
        with suppress(RecipeError):  # of a program that has defaults of its own
            values = resolved(path, RECIPES.get(job.step.program, EncoderEvalRecipe), words)
    written = json.dumps([recipes, values], default=str, ensure_ascii=False)
    named = re.findall(r'"([^"]+)"', written)
    named += [word.partition("=")[2] or word for word in options]
    if job.step.program != COMMAND:
        named.append(str(find_program(job.step.program, Path.cwd())))
    there = [n for n in dict.fromkeys(named) if os.path.exists(n) and n not in job.outputs]
    states = hashes.file_states(find_manifest(Path(n)) or Path(n) for n in there)
    return hashes.hash_json([job.step.program, recipes, options, [s[2] for s in states.values()]])


def finished(job: Job, left: dict[str, Any] | None = None, before: str | None = None) -> bool:
    """Whether what the job makes is there and was made with this recipe from these parents.

    Args:
        job: The job.
        left: Its outputs as they were when it ended. None: not known.
        before: What was asked of it then, see :func:`asked_of`. None: not known.

    Raises:
        PipelineError: An output was changed since, and would be written over.
    """
    model = RECIPES.get(job.step.program)
    if model is not None and job.step.recipe:
        recipe = load_recipe(job.recipe[0], model, job.recipe[1:])
        return is_complete(recipe.output_dir, recipe)
    differing = list(hashes.changed_files(left or {}))
    if there := [name for name in differing if Path(name).exists()]:
        raise PipelineError(
            f"{there[0]} was changed after step {job.name!r} wrote it, and would be written over: "
            "put it back, or delete it to have it made again"
        )
    same = before in (None, asked_of(job)) and not differing
    return same and bool(job.outputs) and all(Path(o).exists() for o in job.outputs)


def output_files(job: Job) -> list[Path]:
    """The files that a job names as its outputs, or that lie below them."""
    found = ([path] if path.is_file() else path.rglob("*") for path in map(Path, job.outputs))
    return [file for file in itertools.chain(*found) if file.name != CARD_NAME]  # `eval` writes it


def progress_of(log: Path, start: int = 0) -> Seen | None:
    """What a log says from byte `start` on: its last progress bar and loss; none without a bar."""
    return seen_in(_end(log, start, 4000))


def _end(log: Path, start: int, size: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as handle:
        handle.seek(max(start, log.stat().st_size - size))
        return handle.read().decode("utf-8", errors="replace")


def _lines(log: Path, start: int = 0) -> list[str]:
    """The last lines of a log, of overwritten ones what is seen."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in _end(log, start, 20_000).split("\n")]
    return [line for line in lines if line]


def _why(job: Job) -> list[str]:
    """The end of a job's log: from its first error on; other ranks' follow it."""
    lines = _lines(job.log, job.log_start)
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    return lines[errors[0] :][:15] if errors else lines[-15:]


class Pipeline:
    """Runs jobs, at most `recipe.jobs` at a time; programs of the working directory come first."""

    def __init__(self, recipe: PipelineRecipe) -> None:
        """Args: see the class."""
        self.recipe = recipe
        self.jobs = expand(recipe)
        self.logs = Path(recipe.output_dir) / "logs"
        self.done: set[str] = set()
        self.running: list[Job] = []
        self.seconds: dict[str, float] = {}
        self.costs: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, float]:
        """Run all jobs.

        Returns:
            Seconds of each job that ran now.

        Raises:
            PipelineError: A job failed (the message has the end of its log), or a file is not what
                it was.
            ValueError: See :func:`~llm2clip_vlm.runs.inputs.require_steps`.
            OwnershipError: Another pipeline runs there, or files lie there that none has written.
        """
        self._refuse_thawed()
        require_steps(self.jobs, self.recipe.output_dir)
        costs = self._read(COSTS_NAME, "seconds", "cpu_seconds")
        own = [f"{job.name}{end}" for job in self.jobs for end in (".log", ".cost.json")]
        hold = Hold(self.logs, "a pipeline", [*own, OUTPUTS_NAME, ASKED_NAME])
        left, asked = (self._read(f"logs/{name}") for name in (OUTPUTS_NAME, ASKED_NAME))
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signal.default_int_handler)
        try:
            known = {name: cost["seconds"] for name, cost in costs.items()}
            shown = Shown({job.name: job.step for job in self.jobs}, known, self.recipe.jobs)
            with shown.bars:
                while len(self.done) < len(self.jobs):
                    for job in self._ready():
                        job.complete = finished(job, left.get(job.name), asked.get(job.name))
                        if job.complete and not set(job.needs) & self.seconds.keys():
                            self.done.add(job.name)
                            shown.end(job.name, "finished before, skipped")
                        else:
                            self._start(job)
                    for job in self._ended():
                        self.done.add(job.name)
                        cost = self.costs[job.name]
                        shown.end(job.name, told(cost), cost["seconds"])
                    shown.update({j.name: progress_of(j.log, j.log_start) for j in self.running})
                    if self.running:
                        time.sleep(0.2)
        finally:
            self._stop_all()
            for number, handler in previous.items():
                signal.signal(number, handler)
            hold.release()
        return self.seconds

    def _refuse_thawed(self) -> None:
        for path, expected in self.recipe.frozen.items():
            path = find_shipped(path)  # noqa: PLW2901
            got = hashes.fingerprint_file(path) if Path(path).is_file() else "no file"
            if got != expected:
                raise PipelineError(
                    f"frozen file {path}: expected SHA-256 {expected}, got {got}; restore it, or "
                    "change `frozen` and run everything that was compared again"
                )

    def _read(self, name: str, *keys: str) -> dict[str, Any]:
        """A file of a pipeline, by job, each with these keys.

        Raises:
            OwnershipError: It is something else.
        """
        path = Path(self.recipe.output_dir) / name
        try:
            found = dict(read_json(path)) if os.path.lexists(path) else {}
            [row[key] for row in found.values() for key in keys]
            return found
        except (LookupError, TypeError, ValueError):
            raise OwnershipError(
                f"{path} is no file of a pipeline, or damaged; move it away, or choose another "
                "output_dir"
            ) from None

    def last_words(self) -> str:
        """The last line of the last job's log: what the whole pipeline has to say."""
        return "".join(_lines(self.logs / f"{self.jobs[-1].name}.log")[-1:]).strip()

    def _ready(self) -> Iterator[Job]:
        for job in sorted(self.jobs, key=lambda job: job.order):
            if job.name in self.done or job in self.running or set(job.needs) - self.done:
                continue
            alone = any(other.step.all_cores for other in self.running)
            if alone or len(self.running) >= self.recipe.jobs:
                return
            if not (job.step.all_cores and self.running):
                yield job

    def _start(self, job: Job) -> None:
        cores = usable_cores()
        share = cores if job.step.all_cores else max(1, cores // self.recipe.jobs)
        share = min(share, allowed_threads(share))
        grace_s = str(self.recipe.grace_s)
        environment = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace_s,  # of torch's launcher
            **os.environ,
            "OMP_NUM_THREADS": str(share),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LLM2CLIP_VLM_COST": str(self._cost_file(job).absolute()),
        }
        for name, first in (("PYTHONPATH", Path.cwd()), ("PATH", Path(sys.executable).parent)):
            environment[name] = os.pathsep.join(filter(None, (str(first), os.environ.get(name))))
        job.asked = asked_of(job)
        # Should all end here, its outputs are unknown, and what was made of them is out of date.
        self._note(f"logs/{OUTPUTS_NAME}", {job.name: {}})
        old = [other.name for other in self.jobs if job.name in (other.name, *other.needs)]
        self._note(f"logs/{ASKED_NAME}", dict.fromkeys(old, ""))
        job.log = self.logs / f"{job.name}.log"
        job.log_start = job.log.stat().st_size if job.log.exists() else 0
        job.started = time.monotonic()
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-I", supervise.__file__, grace_s, *job.command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.running.append(job)

    def _ended(self) -> Iterator[Job]:
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                continue
            self.running.remove(job)
            if code != 0:
                told = [f"step {job.name!r} ended with exit code {code}; the end of {job.log}:"]
                told += _why(job)
                if shutil.disk_usage(self.logs).free < 1 << 16:
                    told += [f"no space is left below {self.logs}; make some, and start it again"]
                raise PipelineError("\n  ".join(told))
            if STOPPED in _end(job.log, job.log_start, 4000):  # alone, its exit code is 0
                raise PipelineError(
                    f"step {job.name!r} was {STOPPED}; the same command goes on from its checkpoint"
                )
            self.seconds[job.name] = round(time.monotonic() - job.started, 1)
            used = dict(read_json(self._cost_file(job)))
            cost = self.costs[job.name] = {"seconds": self.seconds[job.name], **used}
            before = self._read(COSTS_NAME).get(job.name, cost)
            if job.complete or (not job.outputs and job.step.program not in RECIPES):
                # it was asked again, and may have found within seconds that all is done
                cost = max(before, cost, key=lambda took: took["cpu_seconds"])
            self._note(COSTS_NAME, {job.name: cost})
            self._note(f"logs/{OUTPUTS_NAME}", {job.name: hashes.file_states(output_files(job))})
            self._note(f"logs/{ASKED_NAME}", {job.name: job.asked})
            yield job

    def _cost_file(self, job: Job) -> Path:
        return self.logs / f"{job.name}.cost.json"

    def _note(self, name: str, found: dict[str, Any]) -> None:
        """Join what this run found to what earlier ones did, by job."""
        text = json.dumps({**self._read(name), **found}, indent=2) + "\n"
        write_atomically(Path(self.recipe.output_dir) / name, text)

    def _stop_all(self) -> None:
        for job in self.running:
            assert job.process.stdin is not None
            job.process.stdin.close()
        for job in self.running:
            job.process.wait()
