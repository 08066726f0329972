"""Compare towers over training seeds: the comparison that may carry a claim.

Purpose: for each task and pair of towers the difference of accuracy seed by seed, its t interval
    and the exact sign-flip test, the seed as the unit; likewise for retrieval. Within each seed the
    paired bootstrap by image and McNemar's test stand beside it.
Needs: `eval/run_lmms.py` results of every tower and seed, the towers' `results.json`.
Writes: `<output>` (JSON), the headline's chart beside it (`.svg`), and what `llm2clip-vlm compare`
    writes below `pages`.
Launch: python eval/ab.py recipes/demo/ab_result.yaml [key=value ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.cli import guard
from llm2clip_vlm.evaluation.report.comparison import compare
from llm2clip_vlm.evaluation.report.comparison_pages import comparison_pages, difference_chart
from llm2clip_vlm.evaluation.report.inputs import DIRECTIONS, ReportError, Run, read_run
from llm2clip_vlm.evaluation.report.pages import render
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.metrics.statistics import rounded
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.report import AbRecipe
from llm2clip_vlm.runs.manifest import read_manifest, recipe_hash


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program: RECIPE [key=value ...]."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise SystemExit(__doc__)
    recipe = load_recipe(words[0], AbRecipe, words[1:])
    runs = [read_tower(recipe, tower) for tower in recipe.towers]
    found = whole(recipe, runs)
    output = Path(recipe.output)
    kept = {key: value for key, value in found.items() if key not in ("runs", "wins")}
    if recipe.block is not None:
        kept = read_json(output) | {recipe.block: rounded(kept)}
        write_atomically(output, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        print(f"{output}: {recipe.block}")
        return 0
    chart = render("differences.svg", chart=difference_chart(found, recipe.pairs[0]))
    write_atomically(output.with_suffix(".svg"), chart)
    write_atomically(output, json.dumps(rounded(kept), indent=1, ensure_ascii=False) + "\n")
    pages = comparison_pages(runs, found)
    for name, text in pages.items():
        write_atomically(Path(recipe.pages, name), text)
    print(pages["compare.md"])
    print(f"{output} and {output.with_suffix('.svg')}")
    return 0


def read_tower(recipe: AbRecipe, tower: str) -> Run:
    """Results of a tower's VLMs and of its retrieval.

    Raises:
        ReportError: A result is missing.
    """
    places: dict[str, list[str]] = {}
    if tower not in recipe.retrieval_only:
        places[f"{recipe.evaluation}/{tower}-s{{seed}}"] = recipe.tasks
    if tower in recipe.retrieval:
        places[recipe.retrieval[tower]] = [
            f"retrieval_{kind}_{way}" for kind in recipe.retrieval_kinds for way in DIRECTIONS
        ]
    return read_run(tower, places, recipe.seeds, fixed=True)


def whole(recipe: AbRecipe, runs: Sequence[Run]) -> dict[str, Any]:
    """The comparison with what it stands on.

    Returns:
        What :func:`~llm2clip_vlm.evaluation.report.comparison.compare` returns, and `git`,
        `recipe_hash`, `notes`, `data`, `towers`, `seeds`, `headline`, `smallest_p` and
        `checkpoints`.

    Raises:
        ReportError: Two checkpoints were not evaluated alike.
    """
    if len(recipe.retrieval_only) == len(recipe.towers) and recipe.block is None:
        raise ReportError("retrieval_only: no tower has a VLM; there is nothing to compare")
    found = compare(runs, recipe.pairs, recipe.resamples)
    for task, pairs in found["ab"].items():
        for pair, row in pairs.items():
            if differs := row.get("differs"):
                raise ReportError(f"{task}: {pair}: not evaluated alike: {', '.join(differs)}")
    return {
        **found,
        "git": git_state(Path(recipe.output)),
        "recipe_hash": recipe_hash(recipe),
        "notes": recipe.notes,
        "data": recipe.data,
        "towers": recipe.towers,
        "seeds": recipe.seeds,
        "headline": recipe.pairs[0],
        "smallest_p": 2.0 / 2 ** len(recipe.seeds),
        "checkpoints": {
            f"{run.name}-s{seed}": _origin(run, seed)
            for run in runs
            for seed in recipe.seeds
            if run.name not in recipe.retrieval_only
        },
    }


def git_state(output: Path) -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files other than the output differ from it.

    Returns:
        `{"commit", "dirty"}`, both None outside a checkout or before the first commit.
    """
    root = Path(__file__).resolve().parents[1]
    state = ["status", "--porcelain", "--untracked-files=no", "--", "."]
    if not output.is_absolute():
        state += [f":(exclude){output.with_suffix(end).as_posix()}" for end in (".json", ".svg")]
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


def _origin(run: Run, seed: int) -> dict[str, Any]:
    """Weights, recipe and task specifications behind a checkpoint's numbers."""
    found = {task: seeds[seed].result for task, seeds in run.scores.items() if seed in seeds}
    results = {task: result for task, result in found.items() if result and ":" not in task}
    checkpoint = next(iter(results.values()))["checkpoint"]
    manifest = read_manifest(Path(checkpoint["path"]).parent)
    return {
        "sha256": checkpoint["sha256"],
        "recipe_hash": manifest["recipe_hash"] if manifest else None,
        "spec_hash": {task: result["spec_hash"] for task, result in results.items()},
    }


if __name__ == "__main__":
    sys.exit(guard(main))
