"""Compare towers over training seeds: the comparison that may carry a claim.

Purpose: for each task and pair of towers the difference of accuracy seed by seed, its t interval
    and the exact sign-flip test, the seed as the unit; likewise for retrieval. Within each seed the
    paired bootstrap by image and McNemar's test stand beside it.
Needs: `eval/run_lmms.py` results of every tower and seed, the towers' `results.json`.
Writes: `<output>` (JSON), the headline's chart beside it (`.svg`), and what `llm2clip-vlm compare`
    writes below `pages`.
Launch: python demo/ab.py recipes/demo/ab_result.yaml [key=value ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from world.results import git_state, rounded

from llm2clip_vlm.cli import guard
from llm2clip_vlm.evaluation.report.comparison import compare
from llm2clip_vlm.evaluation.report.comparison_pages import comparison_pages, difference_chart
from llm2clip_vlm.evaluation.report.inputs import DIRECTIONS, ReportError, Run, read_run
from llm2clip_vlm.evaluation.report.pages import render
from llm2clip_vlm.files import read_json
from llm2clip_vlm.recipe.base import RecipeFile
from llm2clip_vlm.recipe.reading import load_recipe, words_of
from llm2clip_vlm.runs.manifest import read_manifest, recipe_hash
from llm2clip_vlm.runs.ownership import write_pages


class AbRecipe(RecipeFile):
    """Recipe of this program: towers compared over training seeds, the seed as the unit."""

    towers: list[str] = Field(min_length=2)
    """Names, in the order in which they are shown."""
    seeds: list[int] = Field(min_length=2)
    """Training seeds; each reseeds stage 2 and the VLM."""
    pairs: list[list[str]] = Field(min_length=1)
    """Comparisons `[a, b]` (a minus b); the first is the headline."""
    evaluation: str
    """Folder of `eval/run_lmms.py`, with a checkpoint `<tower>-s<seed>` for each VLM."""
    tasks: list[str] = Field(min_length=1)
    """lmms-eval tasks; those with question types are also compared type by type."""
    retrieval: dict[str, str] = Field(default_factory=dict)
    """Output directory of stage 2 by tower, with `{seed}` in it where it was trained again."""
    retrieval_only: list[str] = Field(default_factory=list)
    """Towers for which no VLM was trained: they are compared in retrieval alone."""
    retrieval_kinds: list[str] = Field(default_factory=lambda: ["short", "long"])
    """Kinds of caption of `results.json`; R@1 in both directions is compared."""
    resamples: int = Field(default=10_000, ge=100)
    """Bootstrap draws of the comparison within a seed."""
    data: str = ""
    """Training and evaluation data, for readers."""
    output: str = "docs/results/ab.json"
    """File of the result; the chart lies beside it, as `.svg`."""
    block: str | None = None
    """Key of an earlier `output` below which this result goes; all else there stays as it is, and
    no chart or page is written. None: the result is the whole file."""
    pages: str
    """Folder of the comparison for people and papers (`compare.html`, `compare.md`)."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1] or set(pair) - set(self.towers):
                raise ValueError(f"pairs: expected two names of {self.towers}, got {pair}")
        if set(self.retrieval) - set(self.towers):
            raise ValueError(
                f"retrieval: expected names of {self.towers}, got {sorted(self.retrieval)}"
            )
        if set(self.retrieval_only) - set(self.retrieval):
            raise ValueError(
                f"retrieval_only: expected names of retrieval, got {self.retrieval_only}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each seed once, got {self.seeds}")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program: RECIPE [key=value ...]."""
    words = words_of(argv, __doc__)
    recipe = load_recipe(words[0], AbRecipe, words[1:])
    runs = [read_tower(recipe, tower) for tower in recipe.towers]
    found = whole(recipe, runs)
    output = Path(recipe.output)
    kept = rounded({key: value for key, value in found.items() if key not in ("runs", "wins")})
    if recipe.block is not None:
        kept = read_json(output) | {recipe.block: kept}
    files = {output.name: json.dumps(kept, indent=1, ensure_ascii=False) + "\n"}
    if recipe.block is None:
        chart = difference_chart(found, recipe.pairs[0])
        files[output.with_suffix(".svg").name] = render("differences.svg", chart=chart)
    write_pages(output.parent, "A/B", files)
    if recipe.block is None:
        pages = comparison_pages(runs, found)
        write_pages(recipe.pages, "A/B", pages)
        print(pages["compare.md"])
    print(f"{output.parent}: {', '.join(files)}")
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
