"""Runs a pipeline recipe: its programs in the order of their needs, each skipped where finished.

Needs: what the recipe's steps need. Writes: `<output_dir>/logs/<step>.log`, `costs.json`
(seconds, CPU seconds and peak memory of each), and what the steps write.

    python stages/pipeline.py recipes/demo/pipeline.yaml variables.world_seed=1
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from llm2clip_vlm.cli import guard
from llm2clip_vlm.pipeline import Pipeline
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import load_recipe, words_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run the pipeline: RECIPE [key=value ...]."""
    started = time.monotonic()
    path, *overrides = words_of(argv, __doc__)
    recipe = load_recipe(path, PipelineRecipe, overrides)
    pipeline = Pipeline(recipe)
    pipeline.run()
    seconds = time.monotonic() - started
    minutes = sum(cost["cpu_seconds"] for cost in pipeline.costs.values()) / 60
    print(f"pipeline: all steps of {path} are finished")
    for line in filter(None, pipeline.last_words().split("; ")):
        print(f"  {line}")
    if recipe.next:
        print(f"next: {recipe.next}")
    print(f"took {seconds:.0f} s, {minutes:.1f} CPU minutes")


if __name__ == "__main__":
    sys.exit(guard(main))
