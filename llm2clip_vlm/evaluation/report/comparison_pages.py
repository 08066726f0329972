"""A comparison as pages: for people (HTML), for papers (Markdown), for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip_vlm.evaluation.report.comparison import (
    ALPHA,
    difference_chart,
    flip_examples,
    flipped,
)
from llm2clip_vlm.evaluation.report.inputs import Run
from llm2clip_vlm.evaluation.report.pages import render

FLIPS_SHOWN = 6
"""Flipped samples on the page, of each run, benchmark and pair."""


def comparison_pages(runs: Sequence[Run], found: Mapping[str, Any]) -> dict[str, str]:
    """A comparison as files.

    Args:
        runs: What was compared.
        found: From :func:`~llm2clip_vlm.evaluation.report.comparison.compare`.

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
        "tables": {pair: _table(found, pair, names, flips) for pair, names in pairs.items()},
        "charts": {pair: difference_chart(found, names) for pair, names in pairs.items()},
        "flips": shown,
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


def _table(
    found: Mapping[str, Any], pair: str, names: Sequence[str], flips: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of a pair, in words."""
    rows = []
    main = [task for task, effects in found["ab"].items() if ":" not in task and pair in effects]
    for task in main:
        row = found["ab"][task][pair]
        a, b = (found["accuracies"][name][task] for name in names)
        changed = [flip["better"] for flip in flips.get(task, {}).get(pair, ())]
        sure = row.get("p_holm", 1) < ALPHA
        rows.append(
            {
                "title": found["titles"][task],
                "a": f"{sum(a) / len(a):.1f}",
                "b": f"{sum(b) / len(b):.1f}",
                "delta": f"{row['delta']:+.1f}",
                "state": ("better" if row["delta"] > 0 else "worse") if sure else "",
                "ci": "[{:+.1f}, {:+.1f}]".format(*row["ci"]) if row["ci"] else "-",
                "p": "-" if row["p"] is None else f"{row['p']:.2g}",
                "p_holm": f"{row['p_holm']:.2g}" if "p_holm" in row else "-",
                "flips": "+{} -{}".format(*map(changed.count, names)) if changed else "-",
                "test": row["test"],
            }
        )
    return rows
