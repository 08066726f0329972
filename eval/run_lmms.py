"""Score checkpoints with lmms-eval.

Purpose: every task of a suite on every checkpoint, in one subprocess; a second run does only what
    changed (weights, task, data or code). `pope` and `mme` on world data run those benchmarks'
    prompts and scorers and are never their scores.
Needs: vision-language checkpoints (stage 4's `model/`), a suite (`eval/suites/*.yaml`).
Writes: `<output>/<name>/<task>.json` and `<task>.samples.jsonl`.
Launch: python eval/run_lmms.py --suite eval/suites/world.yaml \
        --checkpoint base=runs/demo/base/stage4/model --output runs/demo/eval [key=value ...]
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from llm2clip_vlm.config_eval import SuiteRecipe
from llm2clip_vlm.evaluation.lmms_runner import run_suite
from llm2clip_vlm.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Returns:
        0 when every task of every checkpoint has a result, else 1 (2 for a bad command line).
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", required=True, type=Path, help="YAML file of tasks")
    parser.add_argument(
        "--checkpoint", required=True, action="append", metavar="NAME=PATH", help="repeatable"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    parser.add_argument("--limit", type=int, help="first documents of each task only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the suite's values")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoints: dict[str, str] = {}
    for given in arguments.checkpoint:
        name, equals, path = given.partition("=")
        if not equals or not path or name in checkpoints:
            parser.error(f"--checkpoint {given}: expected NAME=PATH, each name once")
        checkpoints[name] = path
    try:
        suite = load_recipe(arguments.suite, SuiteRecipe, arguments.overrides)
        results = run_suite(
            suite,
            checkpoints,
            arguments.output,
            arguments.limit,
            tasks_dir=Path(__file__).resolve().parent / "tasks",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(results)
    return 0


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One row a checkpoint and task: score in per cent with its interval, and what it stands on."""
    for name, tasks in results.items():
        for result in tasks.values():
            low, high = result["score_ci"]
            cut = f", first {result['limit']} only" if result["limit"] else ""
            print(
                f"{name:<16} {result['title']:<28} {result['score']:6.1f} [{low:.1f}, {high:.1f}]  "
                f"n={result['n']}{cut}, empty {result['n_empty']}, "
                f"unparsable {result['n_unparsable']}, {result['seconds']:.0f} s"
            )


if __name__ == "__main__":
    sys.exit(main())
