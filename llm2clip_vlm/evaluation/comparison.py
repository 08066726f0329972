"""Comparing runs benchmark by benchmark: how large a difference is, and whether it would stay.

Where runs were trained with several seeds the seed is the unit: the exact sign-flip test and the t
interval say whether training again would show the difference again. Otherwise the image is: paired
sign-flip test and bootstrap over images tell these checkpoints apart, and nothing more.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.charts import Mark, forest_chart
from llm2clip_vlm.evaluation.examples import Example, sample_pictures
from llm2clip_vlm.evaluation.report_inputs import DIRECTIONS, SAMPLES, ReportError, read_json
from llm2clip_vlm.evaluation.stats import (
    cluster_sums,
    holm,
    is_binary,
    load_samples,
    mcnemar_exact,
    pair_samples,
    paired_bootstrap,
    seed_summary,
    sign_flip_test,
)
from llm2clip_vlm.handoff import read_manifest

ALPHA = 0.05
"""A difference counts as won or lost where its p value, corrected by Holm, is below this."""

_NO_MEANS = {"miou", "ap"}
"""Scores of encoders that are no means over items."""
_IDENTITY = ("spec_hash", "protocol", "data_hash")
_SETTINGS = ("data", "settings", "judge", "generation_kwargs", "prompt_example", "versions")


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
    scores: dict[str, dict[int | None, Measured]] = field(default_factory=dict)
    """Benchmark (`<task>`, `<task>:<question type>`, `retrieval_<kind>_<direction>`) to seed (None:
    not trained again) to what was measured."""

    def values(self, task: str) -> list[float]:
        """Per cent, seed by seed."""
        return [measured.value for measured in self.scores[task].values()]


def read_run(
    name: str, places: Mapping[str, Sequence[str] | None], seeds: Sequence[int] | None = None
) -> Run:
    """Read a run's results.

    Args:
        name: Of the run.
        places: Folder with what `eval/run_lmms.py` or `eval/run_encoder.py` wrote, or with stage
            2's `results.json`, to the benchmarks that it must have (None = what is there).
            `{seed}` in it stands for any number.
        seeds: Which ones; none = all that are there.

    Raises:
        ReportError: Nothing is there, a benchmark is missing, or two places have the same one.
    """
    run = Run(name, list(places))
    for place, wanted in places.items():
        for seed, folder in _folders(place, seeds):
            found = dict(_measured(folder))
            if lost := [task for task in wanted or () if task not in found]:
                raise ReportError(f"{folder}: expected results of {lost}, got {sorted(found)}")
            for task, measured in found.items():
                if wanted is not None and task.partition(":")[0] not in wanted:
                    continue
                if seed in run.scores.setdefault(task, {}):
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


def compare(
    runs: Sequence[Run], pairs: Sequence[Sequence[str]], resamples: int = 10_000
) -> dict[str, Any]:
    """Compare runs on every benchmark that both of a pair have.

    Args:
        runs: At least two.
        pairs: Names `(a, b)`: a minus b.
        resamples: Bootstrap draws.

    Returns:
        `{schema, date, titles, runs: {name: {places, seeds, seconds}}, accuracies: {name: {task:
        by seed}}, ab: {task: {"a-b": row}}, wins: {"a-b": counts}}`; a row has `delta`, `ci`, `p`
        (percentage points; the last two None where nothing can be said), `deltas_by_seed`,
        `n_seeds`, `test`, for a benchmark (not for a question type) `p_holm`, corrected over the
        benchmarks of the pair, and `within_seed`: bootstrap and McNemar over images, seed by seed.

    Raises:
        ReportError: A pair shares no benchmark, has other seeds, or answered other documents.
    """
    by_name = {run.name: run for run in runs}
    effects: dict[str, dict[str, Any]] = {}
    wins = {}
    for a, b in pairs:
        one, two = by_name[a], by_name[b]
        rows = {t: _effect(t, one, two, resamples) for t in one.scores if t in two.scores}
        if not rows:
            raise ReportError(
                f"{a} and {b}: no benchmark in common: {[*one.scores]}, {[*two.scores]}"
            )
        main = {task: row for task, row in rows.items() if ":" not in task}
        tested = {task: row["p"] for task, row in main.items() if row["p"] is not None}
        for task, p in holm(tested).items():
            rows[task]["p_holm"] = p
        sure = [row["delta"] for row in main.values() if row.get("p_holm", 1) < ALPHA]
        seeds = {main[task]["n_seeds"] for task in tested} or {1}
        wins[f"{a}-{b}"] = {
            "a": a,
            "b": b,
            "benchmarks": len(main),
            "tested": len(tested),
            "n_seeds": 1 if 1 in seeds else max(seeds),
            "higher": sum(row["delta"] > 0 for row in main.values()),
            "lower": sum(row["delta"] < 0 for row in main.values()),
            "won": sum(delta > 0 for delta in sure),
            "lost": sum(delta < 0 for delta in sure),
        }
        for task, row in rows.items():
            effects.setdefault(task, {})[f"{a}-{b}"] = row
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "titles": {t: next(iter(m.values())).title for r in runs for t, m in r.scores.items()},
        "runs": {
            run.name: {
                "places": list(run.places),
                "seeds": sorted({s for m in run.scores.values() for s in m if s is not None}),
                "seconds": run_seconds(run),
            }
            for run in runs
        },
        "accuracies": {run.name: {task: run.values(task) for task in run.scores} for run in runs},
        "ab": effects,
        "wins": wins,
    }


def _effect(task: str, a: Run, b: Run, resamples: int) -> dict[str, Any]:
    first, second = a.scores[task], b.scores[task]
    seeds = list(dict.fromkeys(seed for seed in (*first, *second) if seed is not None))
    for run, found in ((a, first), (b, second)):
        if lost := [seed for seed in seeds if seed not in found and None not in found]:
            raise ReportError(f"{task}: {run.name} has no seed {lost}: compare equal sets of seeds")
    units: list[int | None] = [*seeds] or [None]
    measured = [
        (seed, first[seed if seed in first else None], second[seed if seed in second else None])
        for seed in units
    ]
    deltas = [one.value - two.value for _, one, two in measured]
    row: dict[str, Any] = {"delta": float(np.mean(deltas)), "ci": None, "p": None}
    row |= {"deltas_by_seed": deltas, "n_seeds": len(deltas), "test": "none: answers not kept"}
    if len(deltas) > 1:
        row |= seed_summary(deltas)
        row["test"] = f"exact sign-flip test over {len(deltas)} seeds"
    if ":" in task and len(deltas) > 1:
        return row
    for seed, one, two in measured:
        if not (one.samples and two.samples):
            continue
        try:
            paired = pair_samples(one.samples, two.samples)
        except ValueError as error:
            raise ReportError(f"{task}: {one.folder} and {two.folder}: {error}") from None
        scores = paired.correct_a, paired.correct_b
        within = paired_bootstrap(*scores, paired.image_ids, resamples)
        p = mcnemar_exact(*scores) if is_binary(*scores) else None
        row.setdefault("within_seed", []).append({"seed": seed, **within, "mcnemar_p": p})
        if ":" not in task and (differs := _differences(one.result, two.result)):
            row["differs"] = differs
        if len(deltas) == 1:
            flips = sign_flip_test(cluster_sums(scores[0] - scores[1], paired.image_ids))
            test = f"paired sign-flip test over {within['images']} images"
            row |= {"ci": within["ci"], "p": flips, "test": test}
    return row


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Which settings of two results differ, where their specifications do."""
    found = [key for key in _IDENTITY if one.get(key) != two.get(key)]
    for key in _SETTINGS if found else ():
        x, y = (v if isinstance(v, Mapping) else {"": v} for v in (one.get(key), two.get(key)))
        found += [f"{key}.{k}".strip(".") for k in {**x, **y} if x.get(k) != y.get(k)]
    return found


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


def flipped(a: Run, b: Run, task: str) -> list[dict[str, Any]]:
    """Documents that one run gets right and the other does not, by the mean over its seeds.

    Returns:
        `{doc_id, better, rates: [a, b]}`, the clearest first.
    """
    rates: list[dict[int, float]] = []
    for run in (a, b):
        rows = [sample for m in run.scores[task].values() for sample in m.samples]
        rows.sort(key=lambda sample: sample["doc_id"])
        groups = groupby(rows, key=lambda sample: sample["doc_id"])
        rates.append({doc: float(np.mean([s["correct"] for s in group])) for doc, group in groups})
    found = [
        {"doc_id": doc, "better": a.name if x > y else b.name, "rates": [x, y]}
        for doc, x, y in ((doc, x, rates[1][doc]) for doc, x in rates[0].items())
        if (x >= 0.5) != (y >= 0.5)
    ]
    return sorted(found, key=lambda flip: -abs(flip["rates"][0] - flip["rates"][1]))


def flip_examples(a: Run, b: Run, task: str, count: int) -> list[Example]:
    """Pictures and answers of the clearest documents that flipped, `count` for each of the runs."""
    found = flipped(a, b, task)
    chosen = [f for run in (a, b) for f in [f for f in found if f["better"] == run.name][:count]]
    docs = {flip["doc_id"]: flip for flip in chosen}
    measured = {run.name: list(run.scores[task].values()) for run in (a, b)}
    rows = [s for s in measured[a.name][0].samples if s["doc_id"] in docs]
    rows.sort(key=lambda sample: list(docs).index(sample["doc_id"]))
    data = measured[a.name][0].result.get("data", {}).get("path")
    pictures = sample_pictures(Path(data) if data else None, rows)
    examples = []
    for row in rows:
        said = {}
        for name, rate in zip(measured, docs[row["doc_id"]]["rates"], strict=True):
            answers = [s for m in measured[name] for s in m.samples if s["doc_id"] == row["doc_id"]]
            right = rate >= 0.5
            # An answer that stands for the majority of the seeds.
            answer = (max if right else min)(answers, key=lambda s: s["correct"])["answer"]
            times = f"{sum(s['correct'] >= 0.5 for s in answers)} of {len(answers)} seeds"
            share = f" (right in {times})" if len(answers) > 1 else ""
            said[name] = (f"{answer}{share}", right)
        picture = pictures.get(row["doc_id"])
        examples.append(Example(picture, row["question"], str(row["target"]), said))
    return examples


def difference_chart(found: Mapping[str, Any], pair: Sequence[str]) -> str:
    """Forest plot of one pair; empty where it was not compared.

    Args:
        found: What :func:`compare` returned, or the file that `eval/ab.py` wrote.
        pair: Two names.
    """
    panels: dict[str, list[Mark]] = {"Benchmarks, points": [], "Retrieval R@1, points": []}
    heads, seeds = list(panels), 1
    for task, pairs in found["ab"].items():
        if (row := pairs.get("-".join(pair))) is None:
            continue
        seeds, (_, _, kind) = row["n_seeds"], task.partition(":")
        note = "" if kind or row["p"] is None else f"p {row['p']:.2g}"
        label = kind.replace("_", " ") or found["titles"].get(task, task)
        points = row["deltas_by_seed"] if row["n_seeds"] > 1 else ()
        mark = Mark(label, row["delta"], row["ci"], points=points, note=note, strong=not kind)
        panels[heads[task.startswith("retrieval_")]].append(mark)
    times = f", {seeds} training seeds" if seeds > 1 else ""
    drawn = {f"{head}{times}": rows for head, rows in panels.items() if rows}
    title, labels = f"{pair[0]} minus {pair[1]}{times}", (f"{pair[1]} better", f"{pair[0]} better")
    return forest_chart(drawn, title, labels) if drawn else ""
