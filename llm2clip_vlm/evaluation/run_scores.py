"""Reading what runs left: scores and samples of each benchmark and seed, and what a run cost."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.report_inputs import DIRECTIONS, SAMPLES, ReportError, read_json
from llm2clip_vlm.evaluation.stats import load_samples
from llm2clip_vlm.handoff import read_manifest

_NO_MEANS = {"miou", "ap"}
"""Scores of encoders that are no means over items."""


@dataclass(frozen=True)
class Measured:
    """One benchmark of one run and seed."""

    title: str
    """For people."""
    value: float
    """In per cent."""
    folder: Path
    """Where it was read from."""
    samples: Sequence[Mapping[str, Any]] = ()
    """One a document; empty where single answers were not kept."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """What the runner wrote beside the samples."""


@dataclass
class Run:
    """What is compared: a checkpoint, or one for each training seed."""

    name: str
    """For people."""
    places: Sequence[str]
    """Folders of results, with `{seed}` in them where there are several seeds."""
    fixed: bool = False
    """What it has without a seed was not trained: training again would not change it."""
    scores: dict[str, dict[int | None, Measured]] = field(default_factory=dict)
    """Benchmark (`<task>`, `<task>:<question type>`, `retrieval_<kind>_<direction>`) to seed (None:
    not trained again) to what was measured."""

    def values(self, task: str) -> list[float]:
        """Per cent, seed by seed."""
        return [measured.value for measured in self.scores[task].values()]


def read_run(
    name: str,
    places: Mapping[str, Sequence[str] | None],
    seeds: Sequence[int] | None = None,
    *,
    fixed: bool = False,
) -> Run:
    """Read a run's results.

    Args:
        name: Of the run.
        places: Folder with what `eval/run_lmms.py` or `eval/run_encoder.py` wrote, or with stage
            2's `results.json`, to the benchmarks that it must have (None = what is there).
            `{seed}` in it stands for any number.
        seeds: Which ones; none = all that are there.
        fixed: Places without `{seed}` hold a model that was not trained.

    Raises:
        ReportError: Nothing is there, a benchmark is missing, or two places have the same one.
    """
    run = Run(name, list(places), fixed)
    for place, wanted in places.items():
        for seed, folder in _folders(place, seeds):
            found = dict(_measured(folder))
            if lost := [task for task in wanted or () if task not in found]:
                raise ReportError(f"{folder}: expected results of {lost}, got {sorted(found)}")
            for task, measured in found.items():
                if wanted is not None and task.partition(":")[0] not in wanted:
                    continue
                there = run.scores.setdefault(task, {})
                if seed in there or (there and None in (seed, *there)):
                    raise ReportError(f"{name}: {task} is in {folder} and in another place")
                run.scores[task][seed] = measured
    if not run.scores:
        raise ReportError(f"{name}: no results in {run.places} (*{SAMPLES}, results.json)")
    return run


def _folders(place: str, seeds: Sequence[int] | None) -> Iterator[tuple[int | None, Path]]:
    if "{seed}" not in place:
        yield None, Path(place)
    elif seeds is not None:
        yield from ((seed, Path(place.replace("{seed}", str(seed)))) for seed in seeds)
    else:
        first, *rest = map(re.escape, place.split("{seed}"))
        pattern = re.compile(first + r"(\d+)" + r"\1".join(rest))
        paths = glob.glob(glob.escape(place).replace("{seed}", "*"))
        matches = [match for path in paths if (match := pattern.fullmatch(path))]
        yield from sorted((int(match[1]), Path(match[0])) for match in matches)


def _measured(folder: Path) -> Iterator[tuple[str, Measured]]:
    for file in sorted(folder.glob(f"*{SAMPLES}")):
        task = file.name.removesuffix(SAMPLES)
        # An encoder's task may have several of these: `<task>.<kind>.i2t`.
        names = [task.rsplit(".", cut)[0] for cut in range(task.count(".") + 1)]
        files = [folder / f"{name}.json" for name in names]
        result = read_json(next(filter(Path.is_file, files), files[0]), "the evaluation")
        samples = load_samples(file)
        by_type: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            by_type.setdefault(str(sample["type"]), []).append(sample)
        parts = {
            f"{task}:{kind}": (kind.replace("_", " "), by_type[kind]) for kind in sorted(by_type)
        }
        title = result.get("title", task.replace("_", " "))
        parts = {task: (title, samples)} | (parts if len(parts) > 1 else {})
        for name, (title, rows) in parts.items():
            value = 100 * float(np.mean([row["correct"] for row in rows]))
            yield name, Measured(title, value, folder, rows, result)
    if (folder / "results.json").is_file():
        whole = read_json(folder / "results.json", "the stage or the evaluation")
        retrieval = whole.get("retrieval") or {}
        for kind, way, arrow in ((k, *item) for k in retrieval for item in DIRECTIONS.items()):
            title = f"{kind.replace('_', ' ')}, {arrow}"
            yield f"retrieval_{kind}_{way}", Measured(title, retrieval[kind][way]["r1"], folder)
        for name, found in (whole.get("results") or {}).items():
            for metric in _NO_MEANS & found.keys():
                title = f"{name.replace('_', ' ')}, {metric}"
                yield name, Measured(title, found[metric], folder, (), found)


def run_seconds(run: Run) -> dict[str, float]:
    """Wall time behind a run: each stage that its checkpoints descend from, and the evaluation.

    Stages are known by their manifests; those of other machines cost nothing here.
    """
    found = [m for task, seeds in run.scores.items() if ":" not in task for m in seeds.values()]
    places = {m.folder for m in found if not m.result}
    places |= {Path(m.result["checkpoint"]["path"]) for m in found if m.result}
    manifests: dict[Path, dict[str, Any]] = {}
    while places:
        place = places.pop().resolve()
        for folder in (place, place.parent):
            manifest = None if folder in manifests else read_manifest(folder)
            if manifest is not None:
                manifests[folder] = manifest
                places |= {Path(p["path"]) for p in manifest.get("parents", {}).values()}
    seconds: dict[str, float] = {}
    for manifest in manifests.values():
        stage = str(manifest.get("stage"))
        seconds[stage] = seconds.get(stage, 0.0) + float(manifest["seconds"])
    # Several benchmarks may come from one result, and several results from one kind of task.
    spent = {
        (m.folder, m.result.get("key", m.result["task"])): m.result["seconds"]
        for m in found
        if m.result
    }
    evaluation = float(sum(spent.values()))
    return dict(sorted(seconds.items())) | ({"evaluation": evaluation} if evaluation else {})
