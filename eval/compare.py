"""Compare two checkpoints on the same questions.

Purpose: paired bootstrap by image, and McNemar's test, from the samples of `eval/run_lmms.py`. It
    tells whether these two checkpoints differ, not whether training again would: for that the seed
    is the unit (`make ab`).
Needs: two result folders `<output>/<name>`.
Writes: a table on standard output; with `--json`, a file.
Launch: python eval/compare.py runs/demo/eval/llm2clip runs/demo/eval/control_long [--task NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.stats import (
    PairedSamples,
    load_samples,
    mcnemar_exact,
    pair_samples,
    paired_bootstrap,
)

SUFFIX = ".samples.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Returns:
        0, or 1 when the folders cannot be compared.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="results of checkpoint A")
    parser.add_argument("b", type=Path, help="results of checkpoint B")
    parser.add_argument("--task", action="append", help="repeatable; default: all tasks of both")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args(argv)
    try:
        tasks = arguments.task or shared_tasks(arguments.a, arguments.b)
        table = {
            task: compare(
                pair_samples(
                    load_samples(arguments.a / f"{task}{SUFFIX}"),
                    load_samples(arguments.b / f"{task}{SUFFIX}"),
                ),
                arguments.resamples,
                arguments.seed,
            )
            for task in tasks
        }
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"A = {arguments.a}   B = {arguments.b}   (A - B in points, 95 % interval by image)")
    for task, rows in table.items():
        for kind, row in rows.items():
            low, high = row["ci"]
            p = "    -" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.3g}"
            print(
                f"{task:<20} {kind:<20} {row['a']:6.1f} {row['b']:6.1f}  {row['delta']:+6.1f} "
                f"[{low:+.1f}, {high:+.1f}]  McNemar p {p}  n={row['n']} ({row['images']} images)"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


def shared_tasks(a: Path, b: Path) -> list[str]:
    """Tasks that both folders have samples of.

    Raises:
        ValueError: There is none.
    """
    names = [{file.name.removesuffix(SUFFIX) for file in p.glob(f"*{SUFFIX}")} for p in (a, b)]
    if not names[0] & names[1]:
        raise ValueError(f"{a} and {b}: no task has samples in both (looked for *{SUFFIX})")
    return sorted(names[0] & names[1])


def compare(paired: PairedSamples, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """One row for all documents and one for each question type.

    Returns:
        `{"all" | type: {a, b, delta, ci, mcnemar_p, n, images}}`; p is None for graded scores.
    """
    types = np.array(paired.types)
    masks = {"all": np.ones(len(types), dtype=bool)}
    if len(set(paired.types)) > 1:
        masks |= {kind: types == kind for kind in sorted(set(paired.types))}
    rows = {}
    for kind, mask in masks.items():
        a, b = paired.correct_a[mask], paired.correct_b[mask]
        images = [image for image, keep in zip(paired.image_ids, mask, strict=True) if keep]
        binary = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
        rows[kind] = {
            "a": 100.0 * float(a.mean()),
            "b": 100.0 * float(b.mean()),
            **paired_bootstrap(a, b, images, resamples, seed),
            "mcnemar_p": mcnemar_exact(a, b) if binary else None,
        }
    return rows


if __name__ == "__main__":
    sys.exit(main())
