r"""Score checkpoints with lmms-eval.

Purpose: every task of a suite on every checkpoint, in one subprocess; a second run does only what
    changed (weights, task, data or code).
Needs: vision-language checkpoints (stage 4's `model/`), a suite (`eval/suites/*.yaml`).
Writes: `<output>/<name>/<task>.json` and `<task>.samples.jsonl`.
    With `--expected FILE:ROW` also `<output>/<name>/score_gate.json`.
Launch: python eval/run_lmms.py --suite eval/suites/llava15.yaml \
        --checkpoint clip=runs/llava15/clip/stage4/model --output runs/eval [key=value ...]
    `--prefetch` prints which data sets the suite reads, for a machine that goes offline.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from llm2clip_vlm.cli import guard
from llm2clip_vlm.evaluation.vlm.jobs import GATE_NAME, left_out, own_tasks, run_suite
from llm2clip_vlm.evaluation.vlm.score_gate import gate, gate_table
from llm2clip_vlm.files import find_recipe, find_shipped
from llm2clip_vlm.options import Parser, number
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.suite import ExpectedScores, SuiteRecipe
from llm2clip_vlm.runs.ownership import write_pages

_ENCODERS = """An encoder (tower, CLIP, LLM2CLIPModel) is judged by a recipe instead of a suite:
  llm2clip-vlm eval recipes/eval/world.yaml model=DIR [key=value ...]
`llm2clip-vlm help eval` shows the keys of such a recipe, `llm2clip-vlm help suite` a suite's."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = Parser(
        prog="llm2clip-vlm eval",
        description=__doc__,
        epilog=_ENCODERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--suite", help="YAML file of tasks; a shipped one by its name")
    add("--checkpoint", action="append", metavar="NAME=PATH", help="repeatable")
    add("--output", type=Path, help="folder of the results")
    add("--expected", metavar="FILE:ROW", help="published row to hold the results against")
    add("--prefetch", action="store_true", help="print what must be downloaded, and stop")
    add("--tasks", metavar="DIR", help="lmms-eval tasks of your own; their code is run")
    add("--limit", type=number(1), help="first documents of each task only")
    add("overrides", nargs="*", metavar="key=value", help="over the suite's values")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Returns:
        0: every task of every checkpoint has a result.

    Raises:
        ValueError: A task has none, or something that was named is not there.
    """
    options = parser()
    arguments = options.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoints: dict[str, str] = {}
    if not arguments.suite:
        options.error("expected --suite FILE to score VLMs, or a recipe to judge an encoder")
    if not arguments.prefetch and not (arguments.checkpoint and arguments.output):
        options.error("expected --checkpoint NAME=PATH and --output FOLDER, or --prefetch")
    for given in arguments.checkpoint or []:
        name, equals, path = given.partition("=")
        if not equals or not path or name in checkpoints:
            options.error(f"--checkpoint {given}: expected NAME=PATH, each name once")
        checkpoints[name] = path
    overrides = arguments.overrides + [f"limit={arguments.limit}"] * (arguments.limit is not None)
    suite = load_recipe(find_recipe(arguments.suite), SuiteRecipe, overrides)
    tasks = Path(find_shipped(arguments.tasks)) if arguments.tasks else None
    if arguments.prefetch:
        print_prefetch(suite, tasks or own_tasks())
        return 0
    file, _, row = (arguments.expected or "").rpartition(":")
    table = find_recipe(file, folder="eval/expected/")
    expected = load_recipe(table, ExpectedScores) if file else None
    if arguments.expected and (expected is None or row not in expected.rows):
        rows = "" if expected is None else f", one of {', '.join(expected.rows)}"
        raise ValueError(f"--expected {arguments.expected}: expected FILE:ROW{rows}")
    results = run_suite(suite, checkpoints, arguments.output, tasks)
    print_table(results)
    if expected is not None:
        for name, found in results.items():
            columns = gate(expected, row, found)
            pages = {GATE_NAME: json.dumps(columns, indent=2)}
            write_pages(arguments.output / name, "score gate", pages)
            print(f"\n{name}: {gate_table(columns, f'{row}, {expected.source}')}")
    return 0


def print_prefetch(suite: SuiteRecipe, tasks_dir: Path) -> None:
    """What `hf download` must fetch before `HF_HUB_OFFLINE=1`, and which local files are read."""
    from llm2clip_vlm.evaluation.vlm.jobs import task_yaml
    from llm2clip_vlm.evaluation.vlm.tasks import load_config

    skipped, fetched = left_out(suite), dict[str, list[str]]()
    for task in suite.tasks:
        config = load_config(task_yaml(task.task, tasks_dir))
        name = config.get("dataset_name") or "all of it"
        if lacking := skipped.get(task.name or task.task):
            print(f"# {task.task}: needs {lacking}")
        elif task.data_files:
            print(f"# {task.task}: reads {task.data_files}")
        else:
            fetched.setdefault(config["dataset_path"], []).append(f"{task.task}: {name}")
    for path, readers in fetched.items():
        print(f"hf download --repo-type dataset {path}  # {', '.join(dict.fromkeys(readers))}")


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One row a checkpoint and task: score in per cent with its interval, and what it stands on."""
    for name, tasks in results.items():
        for result in tasks.values():
            ci = result["score_ci"]
            interval = "{:.1f}, {:.1f}".format(*ci) if ci else "no interval"
            least = result["limit"] or result["documents"]
            cut = f", first {least} only" if least < result["documents"] else ""
            print(
                f"{name:<16} {result['title']:<28} {result['score']:6.1f} [{interval}]  "
                f"n={result['n']}{cut}, empty {result['n_empty']}, cut {result['n_cut']}, "
                f"unparsable {result['n_unparsable']}, {result['seconds']:.0f} s"
            )
            if other := result.get("other_pictures"):
                figures = ": {delta:+.1f} with its own [{ci[0]:+.1f}, {ci[1]:+.1f}], p = {p:.2g}"
                words = figures.format(**other) if "delta" in other else ""
                print(f"{'':<16} {'  with other pictures':<28} {other['score']:6.1f}{words}")


if __name__ == "__main__":
    sys.exit(guard(main))
