"""What people and papers read of a comparison: charts, tables, and the samples that flipped.

Also the page of one encoder's evaluation, which has the same chart of scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.report.charts import Chart, Mark
from llm2clip_vlm.evaluation.report.comparison import ALPHA
from llm2clip_vlm.evaluation.report.examples import Example, sample_pictures
from llm2clip_vlm.evaluation.report.inputs import Run, measured_in
from llm2clip_vlm.evaluation.report.pages import render

FLIPS_SHOWN = 6
"""Flipped samples on the page, of each run, benchmark and pair."""

_REMARKS: dict[str, Callable[[Any, Mapping[str, str]], str]] = {
    "differs": lambda keys, titles: f"not evaluated alike, these differ: {', '.join(keys)}",
    "pictures_unknown": lambda _, titles: (
        "the samples do not tell pictures by their pixels; questions of one picture may count as "
        "independent: evaluate again"
    ),
    "judged_with": lambda task, titles: (
        f"judges the same answers as {titles[task]}, and counts once with it"
    ),
}
"""Key of a compared row to what the page says where it is set."""


def flipped(a: Run, b: Run, task: str) -> list[dict[str, Any]]:
    """Documents that one run gets right and the other does not, by the mean over its seeds.

    Returns:
        `{doc_id, better, rates: [a, b]}`, the clearest first; of graded answers those on the two
        sides of half the full score.
    """
    rates: list[dict[int, float]] = []
    for run in (a, b):
        rows = [sample for m in run.scores[task].values() for sample in m.scored]
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
    measured = {run.name: list(run.scores[task].values()) for run in (a, b)}
    by_doc = {sample["doc_id"]: sample for sample in measured[a.name][0].samples}
    rows = [by_doc[flip["doc_id"]] for flip in chosen]
    data = measured[a.name][0].result.get("data", {}).get("path")
    pictures = sample_pictures(Path(data) if data else None, rows)
    examples = []
    for row, flip in zip(rows, chosen, strict=True):
        said = {}
        for name, rate in zip(measured, flip["rates"], strict=True):
            answers = [s for m in measured[name] for s in m.samples if s["doc_id"] == row["doc_id"]]
            # An answer that stands for the majority of the seeds.
            shown = (max if rate >= 0.5 else min)(answers, key=lambda s: s["correct"])
            right = sum(s["correct"] == 1 for s in answers)
            graded = any(s["correct"] not in (0, 1) for s in answers)
            of_seeds = f"mean score {rate:.2f} over" if graded else f"right in {right} of"
            share = f" ({of_seeds} {len(answers)} seeds)" if len(answers) > 1 else ""
            said[name] = (f"{shown['answer']}{share}", shown["correct"])
        picture = pictures.get(row["doc_id"])
        examples.append(Example(picture, row["question"], str(row["target"]), said))
    return examples


def score_chart(title: str, runs: Sequence[Run], colours: Mapping[str, int]) -> Chart:
    """Scores of runs, benchmark by benchmark, beside what needs no model or picture.

    Args:
        title: Text for readers who do not see the chart.
        runs: Rings are seeds of one; one without has a 95 % interval by picture.
        colours: Name to number of the series; others have the first.
    """
    groups: dict[str, list[Mark]] = {}
    guesses = {}
    for run in runs:
        for found in (found for task, found in run.scores.items() if ":" not in task):
            first, values = next(iter(found.values())), [m.value for m in found.values()]
            rings, ci = (values, None) if len(values) > 1 else ((), first.interval())
            mark = Mark(run.name, float(np.mean(values)), ci, colours.get(run.name, 0), rings)
            groups.setdefault(first.title, []).append(mark)
            guesses[first.title] = first.guesses()
    return Chart(title, groups, 100, guesses)


def difference_chart(found: Mapping[str, Any], pair: Sequence[str]) -> Chart:
    """Forest plot of one pair, without groups where it was not compared.

    Args:
        found: What :func:`compare` returned, or the file that `demo/ab.py` wrote.
        pair: Two names.
    """
    panels: dict[str, list[Mark]] = {"Benchmarks, points": [], "Retrieval R@1, points": []}
    seeds: dict[str, set[int]] = {head: set() for head in panels}
    for task, pairs in found["ab"].items():
        if (row := pairs.get("-".join(pair))) is None:
            continue
        head, (_, _, kind) = [*panels][task.startswith("retrieval_")], task.partition(":")
        note = "" if kind or row["p"] is None else f"p {row['p']:.2g}"
        label = kind.replace("_", " ") or found["titles"].get(task, task)
        points = row["deltas_by_seed"] if row["n_seeds"] > 1 else ()
        mark = Mark(label, row["delta"], row["ci"], points=points, note=note, strong=not kind)
        panels[head].append(mark)
        seeds[head].add(row["n_seeds"])
    drawn = {f"{head}{_times(seeds[head])}": rows for head, rows in panels.items() if rows}
    sides = (f"{pair[1]} better", f"{pair[0]} better")
    title = f"{pair[0]} minus {pair[1]}{_times(set().union(*seeds.values()))}"
    return Chart(title, drawn, sides=sides)


def _times(seeds: set[int]) -> str:
    ends = sorted(seeds)[:: max(1, len(seeds) - 1)]  # the fewest and the most
    return f", {' to '.join(map(str, ends))} training seeds" if seeds - {1} else ""


def comparison_pages(runs: Sequence[Run], found: Mapping[str, Any]) -> dict[str, str]:
    """A comparison as files.

    Args:
        runs: What was compared.
        found: Result of :func:`compare`.

    Returns:
        `compare.html`, `compare.md` and `compare.json` to their texts.
    """
    by_name = {run.name: run for run in runs}
    pairs = {pair: (wins["a"], wins["b"]) for pair, wins in found["wins"].items()}
    flips: dict[str, dict[str, Any]] = {}
    shown = {}
    for task, rows in found["ab"].items():
        for pair in rows if ":" not in task else ():
            a, b = (by_name[name] for name in pairs[pair])
            flips.setdefault(task, {})[pair] = flipped(a, b, task)
            if examples := flip_examples(a, b, task, FLIPS_SHOWN):
                shown[pair, found["titles"][task]] = examples
    sentences = {
        pair: f"{w['a']} is above {w['b']} on {w['won']} of {w['benchmarks']} benchmarks, "
        f"below on {w['lost']} (p < {ALPHA} after Holm's correction over them); "
        f"{w['benchmarks'] - w['won'] - w['lost']} undecided."
        for pair, w in found["wins"].items()
    }
    facts = {
        "found": found,
        "alpha": ALPHA,
        "count": FLIPS_SHOWN,
        "pairs": pairs,
        "sentences": sentences,
        "wins": {" minus ".join(pairs[pair]): w for pair, w in found["wins"].items()},
        "scores": score_chart("Scores", runs, {r.name: n % 6 for n, r in enumerate(runs)}),
        "charts": {pair: difference_chart(found, names) for pair, names in pairs.items()},
        "flips": flips,
        "shown": shown,
        "stages": list(dict.fromkeys(s for run in found["runs"].values() for s in run["seconds"])),
        "notes": [
            f"{' minus '.join(pairs[pair])}: with {seeds} seeds no p is below {floor:.2g}, so that "
            f"after correction over {w['tested']} benchmarks none can be won: name fewer "
            "beforehand, or train more seeds."
            for pair, w in found["wins"].items()
            for seeds, floor in [(w["n_seeds"], w["least_p"])]
            if seeds > 1 and floor * w["tested"] >= ALPHA
        ]
        + [
            f"{found['titles'][task]}, {pair}: {why(row[key], found['titles'])}."
            for key, why in _REMARKS.items()
            for task, rows in found["ab"].items()
            for pair, row in rows.items()
            if row.get(key)
        ],
    }
    whole = json.dumps({**found, "flips": flips}, indent=1, ensure_ascii=False)
    pages = {name: render(name, **facts) for name in ("compare.html", "compare.md")}
    return {**pages, "compare.json": whole + "\n"}


def encoder_page(folder: Path, whole: Mapping[str, Any]) -> str:
    """What `eval/run_encoder.py` found, as HTML: every task with its interval and chance.

    Args:
        folder: Where the results and samples of the tasks lie.
        whole: `{model, fingerprints, results: {task: result}}`.
    """
    run = Run("score", [str(folder)])
    for task, measured in measured_in(folder):  # those of another recipe may be there, too
        if task.partition(".")[0] in whole["results"] and ":" not in task:
            run.scores[task] = {None: measured}
    return render("encoder.html", chart_of_tasks=score_chart("Tasks", [run], {}), **whole)
