"""Comparing runs benchmark by benchmark: how large a difference is, and whether it would stay.

Where both runs were trained with several seeds the seed is the unit: the exact sign-flip test and
the t interval (equal seeds), or the permutation test and Welch's interval (other seeds), say
whether training again would show the difference again. One run against several has neither: its own
seed is a draw, too, and nobody knows how far it fell. Between two single runs the image is the
unit: paired sign-flip test and bootstrap tell these checkpoints apart, and nothing more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.report.charts import Mark, forest_chart
from llm2clip_vlm.evaluation.report.examples import Example, sample_pictures
from llm2clip_vlm.evaluation.report.inputs import Measured, ReportError, Run, run_seconds
from llm2clip_vlm.evaluation.report.pages import render
from llm2clip_vlm.evaluation.vlm.samples import pair_samples
from llm2clip_vlm.metrics.statistics import (
    cluster_sums,
    holm,
    is_binary,
    mcnemar_exact,
    paired_bootstrap,
    seed_summary,
    sign_flip_test,
    unpaired_summary,
)

FLIPS_SHOWN = 6
"""Flipped samples on the page, of each run, benchmark and pair."""

ALPHA = 0.05
"""A difference counts as won or lost where its p value, corrected by Holm, is below this."""

_IDENTITY = ("spec_hash", "protocol", "data_hash")

_SETTINGS = (
    "limit",
    "overrides",
    "data",
    "settings",
    "judge",
    "generation_kwargs",
    "prompt_example",
    "versions",
)


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
        (percentage points; the last two None where nothing can be said), `deltas_by_seed` (empty
        where the two have other seeds), `n_seeds` (the fewer), `test`, `least_p` (that this many
        seeds can give), for a benchmark (not for a question type) `p_holm`, corrected over the
        benchmarks of the pair, and `within_seed`: bootstrap and McNemar over images, seed by seed.

    Raises:
        ReportError: A pair shares no benchmark, has only some seeds in common, or answered other
            documents.
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
            "least_p": min((main[task].get("least_p", 0.0) for task in tested), default=0.0),
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
    seeds, paired = _matched(task, a, b)
    measured = [(seed, _of(first, seed), _of(second, seed)) for seed in seeds]
    deltas = [one.value - two.value for _, one, two in measured] if paired else []
    row: dict[str, Any] = {"delta": float(np.mean(a.values(task)) - np.mean(b.values(task)))}
    row |= {"ci": None, "p": None, "deltas_by_seed": deltas, "test": "none: answers not kept"}
    row["n_seeds"] = len(deltas) or min(len(first), len(second))
    lone = next((run for run in (a, b) if len(run.scores[task]) == 1), None)
    if not paired:
        row |= unpaired_summary(a.values(task), b.values(task))
        row["test"] = f"exact permutation test, {len(first)} seeds against {len(second)} others"
        row["least_p"] = 2.0 / math.comb(len(first) + len(second), len(first))
    elif len(deltas) > 1 and (lone is None or (lone.fixed and None in lone.scores[task])):
        row |= seed_summary(deltas) | {"least_p": 2.0 / 2 ** len(deltas)}
        against = f", {lone.name} fixed" if lone else ""
        row["test"] = f"exact sign-flip test over {len(deltas)} seeds{against}"
    elif len(deltas) > 1:
        assert lone is not None
        row["test"] = (
            f"none: {lone.name} is one run, and its seed counts, too; a test over seeds needs "
            "several on both sides"
        )
    everyone = [found.result for found in (*first.values(), *second.values())]
    if ":" not in task and (
        differs := [key for other in everyone for key in _differences(everyone[0], other)]
    ):
        row["differs"] = list(dict.fromkeys(differs))
    if ":" in task and len(seeds) > 1:
        return row
    for seed, one, two in measured:
        if not (one.samples and two.samples):
            continue
        try:
            answers = pair_samples(one.samples, two.samples)
        except ValueError as error:
            raise ReportError(f"{task}: {one.folder} and {two.folder}: {error}") from None
        if not answers.pictures_known and "generation_kwargs" in one.result:
            row["pictures_unknown"] = True
        if not paired:
            continue
        scores = answers.correct_a, answers.correct_b
        within = paired_bootstrap(*scores, answers.image_ids, resamples)
        p = mcnemar_exact(*scores) if is_binary(*scores) else None
        row.setdefault("within_seed", []).append({"seed": seed, **within, "mcnemar_p": p})
        if len(deltas) == 1:
            flips = sign_flip_test(cluster_sums(scores[0] - scores[1], answers.image_ids))
            test = f"paired sign-flip test over {within['images']} images"
            row |= {"ci": within["ci"], "p": flips, "test": test}
    return row


def _matched(task: str, a: Run, b: Run) -> tuple[list[int | None], bool]:
    """Seeds side by side, and whether they are pairs.

    A single run stands beside each of the other's seeds. Two sets without a common seed are no
    pairs; sets that share some are refused, since most often one of the seeds failed.
    """
    first, second = a.scores[task], b.scores[task]
    if min(len(first), len(second)) == 1:
        return list(first if len(first) > len(second) else second), True
    for run, mine, others in ((a, first, second), (b, second, first)):
        if mine.keys() & others.keys() and (lost := [seed for seed in others if seed not in mine]):
            raise ReportError(
                f"{task}: {run.name} has no seed {lost}: compare equal sets of seeds, or sets "
                "without a common seed"
            )
    return list(first), first.keys() == second.keys()


def _of(found: Mapping[int | None, Measured], seed: int | None) -> Measured:
    """What stands beside a seed: its own score, a single run's, or that of an unpaired seed."""
    return found[seed] if seed in found and len(found) > 1 else next(iter(found.values()))


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Which settings of two results differ, where their specifications do."""
    if not (one and two):
        return []
    found = [key for key in _IDENTITY if one.get(key) != two.get(key)]
    for key in _SETTINGS if found else ():
        x, y = (v if isinstance(v, Mapping) else {"": v} for v in (one.get(key), two.get(key)))
        found += [f"{key}.{k}".strip(".") for k in {**x, **y} if x.get(k) != y.get(k)]
    return found


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


def comparison_pages(runs: Sequence[Run], found: Mapping[str, Any]) -> dict[str, str]:
    """A comparison as files.

    Args:
        runs: What was compared.
        found: From :func:`compare`.

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
        "states": {
            pair: "above" if w["won"] > w["lost"] else "below" if w["lost"] > w["won"] else ""
            for pair, w in found["wins"].items()
        },
        "wins": [
            [
                " minus ".join(pairs[pair]),
                *(w[key] for key in ("benchmarks", "higher", "lower", "won", "lost")),
            ]
            for pair, w in found["wins"].items()
        ],
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
            f"{found['titles'][task]}, {pair}: not evaluated alike, these differ: "
            f"{', '.join(row['differs'])}."
            for task, rows in found["ab"].items()
            for pair, row in rows.items()
            if row.get("differs")
        ]
        + [
            f"{found['titles'][task]}, {pair}: the samples do not tell pictures by their pixels; "
            "questions of one picture may count as independent: evaluate again."
            for task, rows in found["ab"].items()
            for pair, row in rows.items()
            if row.get("pictures_unknown")
        ],
    }
    whole = json.dumps({**found, "flips": flips}, indent=1, ensure_ascii=False)
    pages = {name: render(name, **facts) for name in ("compare.html", "compare.md")}
    return {**pages, "compare.json": whole + "\n"}
