"""Inputs of comparisons and reports: results of stages and evaluations, read from disk."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from llm2clip_vlm import files
from llm2clip_vlm.evaluation.vlm.samples import load_samples
from llm2clip_vlm.evaluation.vlm.task_helpers import normalise
from llm2clip_vlm.metrics.statistics import bootstrap_interval
from llm2clip_vlm.recipe.reading import did_you_mean
from llm2clip_vlm.runs.hashes import changed_files, hash_json
from llm2clip_vlm.runs.manifest import read_manifest

SAMPLES = ".samples.jsonl"
"""Ending of a file with one answer a line; the task's result is beside it."""

OFTEN = 20
"""Number of questions from which on a wording has a commonest answer of its own."""

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
"""Directions of retrieval and how they are written."""


class ReportError(ValueError):
    """A result that a report needs is missing, or does not fit the others."""


def read_json(path: str | Path, made_by: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: The file.
        made_by: What writes it, for the message.

    Raises:
        ReportError: The file is absent, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ReportError(f"{file}: no such file; it is written by {made_by}")
    return dict(files.read_json(file, error=ReportError))


def read_optional(path: str | None) -> dict[str, Any] | None:
    """A JSON object. None: no path is given, or the file is not there yet."""
    return read_json(path, path) if path is not None and Path(path).is_file() else None


def read_cra(stage1: str | Path) -> dict[str, Any]:
    """Caption retrieval accuracy of stage 1: `{before, before_ci, after, after_ci, queries}`, in %.

    Raises:
        ReportError: The stage is not finished, or had no `evaluation`.
    """
    file = Path(stage1) / "results.json"
    cra = read_json(file, "stages/stage1_text_encoder.py").get("cra")
    if not isinstance(cra, dict) or not {"before", "after"} <= set(cra):
        raise ReportError(f"{file}: cra: expected before and after, got {cra!r}; set `evaluation`")
    return cra


def read_retrieval(towers: Mapping[str, str]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Retrieval of each tower.

    Args:
        towers: Name to the output directory of stage 2b or `clip_baseline`.

    Returns:
        `{tower: {kind: {"i2t" | "t2i": {"r1", "ci", ...}}}}`, in per cent.

    Raises:
        ReportError: A tower has no results, or was tested on other data than the first, or on other
            kinds or numbers of captions.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for tower, folder in towers.items():
        file = Path(folder) / "results.json"
        whole = read_json(file, "stages/stage2b_vision_encoder.py or clip_baseline.py")
        if not whole.get("retrieval"):
            raise ReportError(f"{file}: retrieval: none; set `evaluation` in the tower's recipe")
        found[tower] = whole["retrieval"]
    first = next(iter(found))
    for tower, kinds in found.items():
        expected, got = (held_out(towers[n]) | _tested(found[n]) for n in (first, tower))
        if unlike([expected, got]) or kinds.keys() != found[first].keys():
            raise ReportError(
                f"{towers[tower]}: captions: expected as for {first}, {expected}, got {got}; test "
                "all towers on one held-out set"
            )
    return found


def unlike(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sizes in words, if some that say the same thing do not say it alike; else empty."""
    known = [{(key, str(size[key])) for key in size} for size in sizes]
    said = set().union(*known)
    return sorted({str(size) for size in sizes if size}) if len(said) > len(dict(said)) else []


def held_out(folder: str | Path) -> dict[str, Any]:
    """Hash of what a stage was evaluated on, by its manifest; empty where that does not tell."""
    manifest = read_manifest(folder) or {}
    parents = manifest.get("parents", {}).items()
    states = [parent.get("files", {}) for name, parent in parents if name.startswith("evaluation.")]
    files = [state[2] for of_parent in states for state in of_parent.values()]
    keys = ("where", "drop_where", "group_by", "limit", "fields")
    sources = manifest.get("recipe", {}).get("evaluation", ())
    rules = [[source.get(key) for key in keys] for source in sources]
    return {"data": hash_json([files, rules])[:12]} if files else {}


def _tested(retrieval: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: [_size(found[way]) for way in DIRECTIONS] for kind, found in retrieval.items()}


def _size(retrieval: Mapping[str, Any]) -> dict[str, Any]:
    """Over how many a recall was taken: it falls as the gallery grows."""
    return {key: retrieval[key] for key in ("queries", "gallery") if key in retrieval}


def guesses(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What answers get that were given without a look at the picture.

    Args:
        samples: Samples of one checkpoint; their questions and targets are read.

    Returns:
        `{name: {"": per cent of all, type: per cent of its questions}}`: the commonest answer
        always; and the commonest one of each wording, or of the type for a wording asked less than
        :data:`OFTEN` times. Both are known from the tested questions, which flatters the rule.
        Empty where answers are graded, not right or wrong, or were not kept.
    """
    rows = list(samples)
    if any(row["correct"] not in (0, 1) for row in rows) or not any(r["target"] for r in rows):
        return {}
    asked = Counter(row["question"] for row in rows)
    wordings = [row["question"] if asked[row["question"]] >= OFTEN else row["type"] for row in rows]
    rules = {"one answer always": [""] * len(rows), "best rule without the picture": wordings}
    shares, targets = {}, [normalise(str(row["target"])) for row in rows]
    for name, groups in rules.items():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for group, target in zip(groups, targets, strict=True):
            counts[group][target] += 1
        right: dict[str, list[bool]] = defaultdict(list)
        for row, group, target in zip(rows, groups, targets, strict=True):
            for kind in {"", row["type"]}:
                right[kind].append(target == counts[group].most_common(1)[0][0])
        shares[name] = {kind: 100 * fmean(found) for kind, found in right.items()}
    return shares


_NO_MEANS = {"miou": "mean IoU", "ap": "box AP"}
"""Scores of encoders that are no means over items, and how they are written."""


@dataclass(frozen=True)
class Measured:
    """One benchmark of one run and seed."""

    title: str
    """Name for people."""
    value: float
    """Score in per cent."""
    folder: Path
    """Where it was read from."""
    samples: Sequence[Mapping[str, Any]] = ()
    """One a document; empty where single answers were not kept."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """The result that lies beside the samples."""
    chance: float | None = None
    """What a guess gets, in per cent. None: not known."""
    ci: Sequence[float] | None = None
    """95 % interval of a score that is no mean over samples."""
    size: Mapping[str, Any] = field(default_factory=dict)
    """Queries and gallery of a recall without samples."""

    @property
    def scored(self) -> Sequence[Mapping[str, Any]]:
        """The samples, where each has a score of its own."""
        return [sample for sample in self.samples if sample["correct"] is not None]

    @property
    def counts(self) -> np.ndarray:
        """Pixels that a mean IoU is made of, `int[images, 3, classes]`; empty for other scores."""
        return np.array([sample["counts"] for sample in self.samples if "counts" in sample])

    def weights(self) -> str | None:
        """Fingerprint of what was judged. None: neither a result nor a stage's manifest tells."""
        judged = self.result.get("checkpoint", {}).get("sha256")
        return judged or (read_manifest(self.folder) or {}).get("outputs", {}).get("model")

    def interval(self) -> Sequence[float] | None:
        """The 95 % interval over pictures. None: neither it nor single answers were kept."""
        if not self.scored:
            return self.ci
        right, images = zip(*((s["correct"], s["image_id"]) for s in self.scored), strict=True)
        return bootstrap_interval(right, images, 1000, seed=0)

    def guesses(self) -> dict[str, float]:
        """What needs no picture to what it gets, in per cent."""
        rules = {name: kinds[""] for name, kinds in guesses(self.samples).items()}
        return rules if self.chance is None else {"chance": self.chance} | rules


@dataclass
class Run:
    """One side of a comparison: a checkpoint, or one for each training seed."""

    name: str
    """Name for people."""
    places: Sequence[str]
    """Folders of results, with `{seed}` in them where there are several seeds."""
    fixed: bool = False
    """Results without a seed are of an untrained model: training again would not change them."""
    scores: dict[str, dict[int | None, Measured]] = field(default_factory=dict)
    """Benchmark (`<task>`, `<task>:<question type>`, `retrieval_<kind>_<direction>`) to seed (None:
    not trained again) to what was measured."""

    def values(self, task: str) -> list[float]:
        """Per cent, seed by seed."""
        return [measured.value for measured in self.scores[task].values()]

    def first(self, task: str) -> Measured:
        """What the first seed measured."""
        return next(iter(self.scores[task].values()))


def read_run(
    name: str,
    places: Mapping[str, Sequence[str] | None],
    seeds: Sequence[int] | None = None,
    *,
    fixed: bool = False,
) -> Run:
    """Read a run's results.

    Args:
        name: Name of the run.
        places: Folder with what `eval/run_lmms.py` or `eval/run_encoder.py` wrote, or with stage
            2's `results.json`, to the benchmarks that it must have. None: what is there.
            `{seed}` in it stands for any number.
        seeds: Numbers of the seeds. None: all that are there.
        fixed: Places without `{seed}` hold a model that was not trained.

    Raises:
        ReportError: Nothing is there, a benchmark is missing, two places have the same one, or one
            place has results of several weights.
    """
    run = Run(name, list(places), fixed)
    for place, wanted in places.items():
        for seed, folder in _folders(place, seeds):
            found = dict(measured_in(folder))
            if lost := [task for task in wanted or () if task not in found]:
                whole = [task for task in found if ":" not in task]
                told = f"{files.listed(lost)}{did_you_mean(lost[0], whole)}"
                raise ReportError(f"{folder}: no results of {told}; has {files.listed(whole)}")
            if wanted is not None:
                found = {t: m for t, m in found.items() if t.partition(":")[0] in wanted}
            made_by = {t: sha for t, m in found.items() if ":" not in t and (sha := m.weights())}
            if len({*made_by.values()}) > 1:
                held = ", ".join(f"{task} of {sha[:12]}" for task, sha in made_by.items())
                raise ReportError(
                    f"{folder}: expected results of one model, got several weights: {held}; run "
                    "`llm2clip-vlm eval` again with all of these tasks, or name some with --task"
                )
            for task, measured in found.items():
                there = run.scores.setdefault(task, {})
                if seed in there or (there and None in (seed, *there)):
                    raise ReportError(f"{name}: {task} is in {folder} and in another place")
                run.scores[task][seed] = measured
    if not run.scores:
        looked = [str(folder) for place in places for _, folder in _folders(place, seeds)]
        raise ReportError(
            f"{name}: no results (*{SAMPLES}, results.json) in {looked or run.places}; they are "
            "written by `llm2clip-vlm eval` (OUTPUT/NAME) and stage 2"
        )
    return run


def read_vlms(folder: str | Path, vlms: Mapping[str, Sequence[int]]) -> list[Run]:
    """Results of `eval/run_lmms.py` for the VLMs of several towers.

    Args:
        folder: Its `--output`, with a checkpoint `<tower>-s<seed>` for each VLM.
        vlms: Tower to training seeds.

    Raises:
        ReportError: A result that another VLM has is missing, or two were made from other data or
            with other settings.
    """
    runs = [read_run(t, {f"{folder}/{t}-s{{seed}}": None}, seeds) for t, seeds in vlms.items()]
    for task in sorted({task for run in runs for task in run.scores if ":" not in task}):
        asked = {}
        for run in runs:
            for seed in vlms[run.name]:
                file = f"{folder}/{run.name}-s{seed}/{task}.json"
                if seed not in run.scores.get(task, {}):
                    raise ReportError(f"{file}: no such result; `llm2clip-vlm eval` writes it")
                asked[f"{run.name}-s{seed}"] = run.scores[task][seed].result
        for key in ("spec_hash", "limit"):
            values = {name: result.get(key) for name, result in asked.items()}
            if len(set(values.values())) > 1:
                raise ReportError(
                    f"{folder}: {task}: {key} differs between checkpoints ({values}): they were "
                    "not asked the same; run eval/run_lmms.py for all of them with one suite"
                )
    return runs


def _folders(place: str, seeds: Sequence[int] | None) -> Iterator[tuple[int | None, Path]]:
    if "{seed}" not in place:
        yield None, Path(place)
    elif seeds is not None:
        yield from ((seed, Path(place.replace("{seed}", str(seed)))) for seed in seeds)
    else:
        escaped = re.escape(place).replace(r"\{seed\}", r"(?P<seed>\d+)", 1)
        pattern = escaped.replace(r"\{seed\}", "(?P=seed)")
        paths = glob.glob(glob.escape(place).replace("{seed}", "*"))
        matches = [match for path in paths if (match := re.fullmatch(pattern, path))]
        yield from sorted((int(match[1]), Path(match[0])) for match in matches)


def measured_in(folder: Path) -> Iterator[tuple[str, Measured]]:
    """Benchmarks of a folder, named as in :attr:`Run.scores`."""
    for file in sorted(folder.glob(f"*{SAMPLES}")):
        task = file.name.removesuffix(SAMPLES)
        # An encoder's task may have several of these: `<task>.<kind>.i2t`.
        names = [task.rsplit(".", cut)[0] for cut in range(task.count(".") + 1)]
        beside = [folder / f"{name}.json" for name in names]
        told = next(filter(Path.is_file, beside), beside[0])
        result = read_json(told, "the evaluation")
        states = {k: v for k, v in result.get("files", {}).items() if k == file.name}
        if any(changed_files(states, folder)):
            raise ReportError(f"{file}: changed since {told} was written; evaluate again")
        samples = load_samples(file)
        if "counts" in samples[0]:  # a mean IoU, see below
            continue
        parts = [DIRECTIONS.get(part, part.replace("_", " ")) for part in task.split(".")]
        first = result.get("limit") or 0
        title = result.get("title", ", ".join(parts))
        title += f" (first {first} only)" * (0 < first < result.get("documents", 1e18))
        if any(sample["correct"] is None for sample in samples):  # a metric of all of them together
            score, ci = float(result["score"]), result.get("score_ci")
            yield task, Measured(title, score, folder, samples, result, ci=ci)
            continue
        by_type: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            by_type.setdefault(str(sample["type"]), []).append(sample)
        kinds = {f"{task}:{k}": (k.replace("_", " "), by_type[k]) for k in sorted(by_type)}
        kinds = {task: (title, samples)} | (kinds if len(kinds) > 1 else {})
        for name, (title, rows) in kinds.items():
            value = 100 * float(np.mean([row["correct"] for row in rows]))
            yield name, Measured(title, value, folder, rows, result, _chance(result, task))
    if (folder / "results.json").is_file():
        data = held_out(folder)
        whole = read_json(folder / "results.json", "the stage or the evaluation")
        retrieval = whole.get("retrieval") or {}
        for kind, way in product(retrieval, DIRECTIONS):
            title, got = f"{kind.replace('_', ' ')}, {DIRECTIONS[way]}", retrieval[kind][way]
            rest = {"chance": got.get("chance_r1"), "ci": got.get("ci"), "size": data | _size(got)}
            yield f"retrieval_{kind}_{way}", Measured(title, got["r1"], folder, **rest)
    # Not from `results.json`, which is of the last evaluation that came to its end.
    for file in sorted(folder.glob("*.json")):
        found = files.read_json(file, object, ReportError)
        for metric, words in _NO_MEANS.items():
            if isinstance(found, dict) and found.get(metric) is not None:
                title = f"{file.stem.replace('_', ' ')}, {words}"
                lines = file.with_suffix(SAMPLES)
                kept = load_samples(lines) if lines.is_file() else ()
                rest = {"chance": found.get("chance_miou"), "ci": found.get("ci")}
                yield file.stem, Measured(title, found[metric], folder, kept, found, **rest)


def _chance(result: Mapping[str, Any], samples: str) -> float | None:
    """Chance of an encoder's task, whose samples may be of one kind and direction."""
    kind, _, way = samples.rpartition(".")
    chances: dict[str, Any] = dict(result.get("chance", {}))
    for name, found in result.get("kinds", {}).items():
        if kind.endswith("." + re.sub(r"[^\w.-]", "-", name)):
            chances[way] = found[way]["chance_r1"]
    if "cra" in result:
        return 100 / float(result["queries"])
    found = chances.get(way, result.get("chance_top1"))
    return None if found is None else float(found)
