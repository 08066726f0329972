r"""Compare runs benchmark by benchmark, and say what the differences are worth.

Purpose: differences with intervals, the exact test over training seeds where both runs have several
    (no test where only one has), a paired test over images between single runs, Holm's correction
    over benchmarks, wins and losses, the samples that flipped, and what each run cost.
Needs: results of `eval/run_lmms.py` (`<output>/<name>`) or `eval/run_encoder.py`, or output
    directories of stage 2.
Writes: `<out>/compare.html`, `compare.md` (for papers), `compare.json`; prints the Markdown.
Launch: python eval/compare.py 'llm2clip=runs/ab/eval/llm2clip-s{seed}' \
        'control_long=runs/ab/eval/control_long-s{seed}' --out runs/ab/comparison
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

from llm2clip_vlm.cli import guard
from llm2clip_vlm.options import Parser


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = Parser(
        prog="llm2clip-vlm compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "runs", nargs="+", metavar="[NAME=]FOLDER", help="results; `{seed}` in it stands for any "
        "number; folders of one NAME are one run"
    )  # fmt: skip
    options.add_argument(
        "--fixed", action="append", default=[], metavar="NAME", help="repeatable: this run was not "
        "trained, so that it has no seed of its own"
    )  # fmt: skip
    options.add_argument("--out", type=Path, help="folder to write to; default: print only")
    options.add_argument("--task", action="append", help="repeatable; default: all benchmarks")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    arguments = parser().parse_intermixed_args(argv)
    places: dict[str, dict[str, list[str] | None]] = {}
    for given in arguments.runs:
        name, equals, place = given.partition("=")
        if not equals or "/" in name:  # no name but a folder, which may have = in it
            place = given
            name = Path(place).name.replace("-s{seed}", "").replace("{seed}", "")
        place = place.rstrip("/")
        if "{seed}" not in place and not Path(place).is_dir():
            raise ValueError(
                f"{place}: no such folder; expected what `llm2clip-vlm eval` wrote (OUTPUT/NAME), "
                "or the output directory of stage 2"
            )
        places.setdefault(name, {})[place] = arguments.task
    if len(places) < 2:
        raise ValueError(f"expected at least two runs of different names, got {list(places)}")
    if unknown := sorted(set(arguments.fixed) - set(places)):
        raise ValueError(f"--fixed {unknown}: expected names of {list(places)}")
    # torch: after what can be said without it
    from llm2clip_vlm.evaluation.report.comparison import compare
    from llm2clip_vlm.evaluation.report.comparison_pages import comparison_pages
    from llm2clip_vlm.evaluation.report.inputs import read_run
    from llm2clip_vlm.runs.ownership import write_pages

    runs = [read_run(name, of, fixed=name in arguments.fixed) for name, of in places.items()]
    found = compare(runs, list(combinations(places, 2)))
    pages = comparison_pages(runs, found)
    print(pages["compare.md"])
    if arguments.out is not None:
        write_pages(arguments.out, "compare", pages)
        print(arguments.out / "compare.html")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
