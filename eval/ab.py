"""Compare towers over training seeds: the comparison that may carry a claim.

Purpose: for each task and pair of towers the difference of accuracy seed by seed, its t interval
    and the exact sign-flip test, the seed as the unit; likewise for retrieval. Within each seed the
    paired bootstrap by image and McNemar's test stand beside it.
Needs: `eval/run_lmms.py` results of every tower and seed, the towers' `results.json`.
Writes: `<output>` (JSON) and the headline's chart beside it (`.svg`).
Launch: python eval/ab.py recipes/demo/ab.yaml [key=value ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.config_eval import AbRecipe
from llm2clip_vlm.evaluation.charts import stacked, standalone
from llm2clip_vlm.evaluation.report import DIRECTIONS, ab_charts
from llm2clip_vlm.evaluation.report_inputs import ReportError, read_retrieval, read_scores
from llm2clip_vlm.evaluation.stats import (
    load_samples,
    mcnemar_exact,
    pair_samples,
    paired_bootstrap,
    seed_summary,
)
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.handoff import read_manifest, recipe_hash
from llm2clip_vlm.recipe import load_recipe

Samples = dict[str, dict[str, list[dict[str, Any]]]]
"""Task to checkpoint to its samples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0, or 1 when a result is missing or the results cannot be compared.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise SystemExit(__doc__)
    try:
        recipe = load_recipe(words[0], AbRecipe, words[1:])
        found = compare(recipe)
        output = Path(recipe.output)
        a, b = recipe.pairs[0]
        head = f"{a} minus {b}, {len(recipe.seeds)} training seeds"
        panels = {f"{head}: {k}": v for k, v in ab_charts(found, (a, b)).items()}
        chart = standalone(stacked(panels))
        write_atomically(output.with_suffix(".svg"), chart)
        write_atomically(output, json.dumps(_rounded(found), indent=1, ensure_ascii=False) + "\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(found)
    print(f"{output} and {output.with_suffix('.svg')}")
    return 0


def compare(recipe: AbRecipe) -> dict[str, Any]:
    """The whole comparison.

    Returns:
        What is written: `{schema, date, git, recipe_hash, world, towers, seeds, titles, accuracies:
        {tower: {task: by seed}}, ab: {task: {"a-b": {delta, ci, p, deltas_by_seed, n_seeds,
        within_seed}}}, checkpoints}`; differences in percentage points. A question type is a task
        `<task>:<type>`, retrieval `retrieval_<kind>_<direction>`.

    Raises:
        ReportError: A result is missing, or results were made from different data.
    """
    names = {
        tower: [_name(recipe, tower, seed) for seed in recipe.seeds]
        for tower in recipe.towers
        if tower not in recipe.retrieval_only
    }
    if not names:
        raise ReportError("retrieval_only: no tower has a VLM; there is nothing to compare")
    every = [name for group in names.values() for name in group]
    scores = read_scores(recipe.evaluation, every, recipe.tasks)
    samples = read_samples(recipe, every)
    accuracies = {
        tower: _means(samples, names.get(tower, [])) | _retrieval(recipe, tower)
        for tower in recipe.towers
    }
    titles = {task: str(next(iter(found.values()))["title"]) for task, found in scores.items()}
    titles |= {
        f"retrieval_{kind}_{direction}": f"{kind.replace('_', ' ')}, {arrow}"
        for kind in recipe.retrieval_kinds
        for direction, arrow in DIRECTIONS.items()
    }
    effects: dict[str, dict[str, Any]] = {}
    for a, b in recipe.pairs:
        for task in accuracies[a]:
            if task not in accuracies[b]:
                continue
            deltas = np.subtract(accuracies[a][task], accuracies[b][task]).tolist()
            effect = {**seed_summary(deltas), "n_seeds": len(deltas)}
            if task in recipe.tasks:
                effect["within_seed"] = within_seed(recipe, samples[task], names[a], names[b])
            effects.setdefault(task, {})[f"{a}-{b}"] = effect
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(recipe.output)),
        "recipe_hash": recipe_hash(recipe),
        "notes": recipe.notes,
        "world": recipe.world.model_dump() if recipe.world else None,
        "towers": recipe.towers,
        "seeds": recipe.seeds,
        "headline": recipe.pairs[0],
        "smallest_p": 2.0 / 2 ** len(recipe.seeds),
        "titles": titles,
        "accuracies": accuracies,
        "ab": effects,
        "checkpoints": {name: _origin(scores, name) for name in every},
    }


def read_samples(recipe: AbRecipe, checkpoints: Sequence[str]) -> Samples:
    """Samples of all checkpoints, with each question type as a task of its own.

    Raises:
        ReportError: Two checkpoints answered different documents.
    """
    found: Samples = {}
    for task in recipe.tasks:
        by_name = {
            name: load_samples(Path(recipe.evaluation) / name / f"{task}.samples.jsonl")
            for name in checkpoints
        }
        first = by_name[checkpoints[0]]
        for name, rows in by_name.items():
            try:
                pair_samples(first, rows)
            except ValueError as error:
                raise ReportError(f"{task}: {checkpoints[0]} and {name}: {error}") from None
        found[task] = by_name
        kinds = sorted({str(sample["type"]) for sample in first})
        for kind in kinds if len(kinds) > 1 else []:
            found[f"{task}:{kind}"] = {
                name: [sample for sample in rows if sample["type"] == kind]
                for name, rows in by_name.items()
            }
    return found


def within_seed(
    recipe: AbRecipe,
    samples: Mapping[str, list[dict[str, Any]]],
    names_a: Sequence[str],
    names_b: Sequence[str],
) -> list[dict[str, Any]]:
    """Secondary: whether the two checkpoints of each seed differ on these questions.

    Returns:
        `{seed, delta, ci, n, images, mcnemar_p}` for each seed; p is None for graded scores.
    """
    rows = []
    for seed, a, b in zip(recipe.seeds, names_a, names_b, strict=True):
        paired = pair_samples(samples[a], samples[b])
        scores = np.concatenate([paired.correct_a, paired.correct_b])
        binary = bool(np.isin(scores, (0.0, 1.0)).all())
        rows.append(
            {
                "seed": seed,
                **paired_bootstrap(
                    paired.correct_a, paired.correct_b, paired.image_ids, recipe.resamples
                ),
                "mcnemar_p": mcnemar_exact(paired.correct_a, paired.correct_b) if binary else None,
            }
        )
    return rows


def git_state(output: Path) -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files other than the output differ from it.

    Returns:
        `{"commit", "dirty"}`, both None outside a checkout or before the first commit.
    """
    root = Path(__file__).resolve().parents[1]
    ours = [f":(exclude){output.with_suffix(end).as_posix()}" for end in (output.suffix, ".svg")]
    state = ["status", "--porcelain", "--untracked-files=no", "--", "."]
    if not output.is_absolute():
        state += ours
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], state)
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def print_table(found: Mapping[str, Any]) -> None:
    """One row a task and pair."""
    seeds = found["seeds"]
    print(f"{len(seeds)} seeds; difference in points, 95 % t interval, exact sign-flip test")
    for task, pairs in found["ab"].items():
        for pair, row in pairs.items():
            low, high = row["ci"]
            print(
                f"{task:<34} {pair:<24} {row['delta']:+6.2f} [{low:+.2f}, {high:+.2f}]  "
                f"p {row['p']:.4f}"
            )
    print(f"(with {len(seeds)} seeds p cannot be below {found['smallest_p']:.4f})")


def _name(recipe: AbRecipe, tower: str, seed: int) -> str:
    return recipe.checkpoint.replace("{tower}", tower).replace("{seed}", str(seed))


def _means(samples: Samples, names: Sequence[str]) -> dict[str, list[float]]:
    if not names:
        return {}
    return {
        task: [100.0 * float(np.mean([s["correct"] for s in by_name[name]])) for name in names]
        for task, by_name in samples.items()
    }


def _retrieval(recipe: AbRecipe, tower: str) -> dict[str, list[float]]:
    """R@1 by seed; a tower whose directory has no `{seed}` was not trained again."""
    if tower not in recipe.retrieval:
        return {}
    folders = {
        f"{tower}-s{seed}": recipe.retrieval[tower].replace("{seed}", str(seed))
        for seed in recipe.seeds
    }
    found = read_retrieval(folders)
    lost = sorted(set(recipe.retrieval_kinds) - set(next(iter(found.values()))))
    if lost:
        raise ReportError(f"retrieval_kinds: {lost}: none of the captions of {tower}")
    return {
        f"retrieval_{kind}_{direction}": [float(r[kind][direction]["r1"]) for r in found.values()]
        for kind in recipe.retrieval_kinds
        for direction in DIRECTIONS
    }


def _origin(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str) -> dict[str, Any]:
    """Weights, recipe and task specifications behind a checkpoint's numbers."""
    checkpoint = next(iter(scores.values()))[name]["checkpoint"]
    manifest = read_manifest(Path(checkpoint["path"]).parent)
    return {
        "sha256": checkpoint["sha256"],
        "recipe_hash": manifest["recipe_hash"] if manifest else None,
        "spec_hash": {task: results[name]["spec_hash"] for task, results in scores.items()},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
