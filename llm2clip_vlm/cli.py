"""The `llm2clip-vlm` command: thin, and light to start (nothing heavy is imported for `--help`).

llm2clip-vlm train STAGE RECIPE [key=value ...]   run a stage (accelerate launch -m
                                                  llm2clip_vlm.cli train ... for many GPUs)
llm2clip-vlm plan RECIPE [--gpus 8 --gpu NAME]    memory, hours, disk, and what is missing
llm2clip-vlm help STAGE                           the stage and every key of its recipe
llm2clip-vlm embed ...                            build, verify, merge, import or report on a
                                                  cache of caption embeddings
llm2clip-vlm export CHECKPOINT --to FORMAT OUT    for another tool
llm2clip-vlm convert IN OUT                       from another project
llm2clip-vlm doctor                               what this machine has
llm2clip-vlm eval ...                             score checkpoints with lmms-eval
llm2clip-vlm compare ...                          compare runs benchmark by benchmark
llm2clip-vlm push DIR ORG/NAME                    upload a model and its card
"""

from __future__ import annotations

import argparse
import ast
import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llm2clip_vlm import __version__
from llm2clip_vlm.files import find_shipped, read_text
from llm2clip_vlm.programs import find_program, load_program
from llm2clip_vlm.recipe.reading import did_you_mean, load_recipe, recipe_help

STAGES = {
    "clip_baseline": "ordinary CLIP training: what stage 2 is compared with",
    "stage0_mntp": "let an LLM guess masked tokens before stage 1 (optional)",
    "stage1_text_encoder": "turn an LLM into a text encoder",
    "stage2a_cache_text": "cache its caption embeddings",
    "stage2b_vision_encoder": "train the vision tower against them",
    "stage3_projector": "teach the projector to feed an LLM",
    "stage4_instruction": "visual instruction tuning",
    "pipeline": "run several stages in order, skipping what is finished",
}
"""Every stage program and what it does, in the order of a run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; none = the process's own.

    Returns:
        The exit code: 2 for an error that the user can mend.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _FORWARDED:
        run, _ = _FORWARDED[words[0]]
        return guard(lambda: run(*words))
    arguments = _parser().parse_args(words)
    return guard(lambda: arguments.command(arguments))


def guard(program: Callable[[], int | None]) -> int:
    """Run a program; what the user can mend becomes one message instead of a traceback.

    Of what is raised only the kinds that mistakes in code have (`AssertionError`, `TypeError`,
    `KeyError`, ...) keep their traceback, with a line on where to report it. Everything else comes
    from files, memory, devices or what the user wrote: it is told in one message, and where it is
    no message of our own the traceback goes into a file.

    Args:
        program: What to run. None counts as success.

    Returns:
        Its exit code; 2 after such a message, 1 after a mistake of ours, 130 after Ctrl-C, 141
        where nobody reads the output any more. With `LLM2CLIP_DEBUG=1` the error goes through.
    """
    try:
        code = program() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 141
    except Exception as error:  # the boundary around the program
        if os.environ.get("LLM2CLIP_DEBUG", "0") not in {"", "0"}:
            raise
        if isinstance(error, _OURS):
            traceback.print_exc()
            print(
                f"this is a mistake in llm2clip_vlm; please report it: {_ISSUES}", file=sys.stderr
            )
            return 1
        where = "LLM2CLIP_DEBUG=1 shows where"
        if not isinstance(error, ValueError | FileNotFoundError):
            where += f"; {_kept_traceback()}"
        print(f"error: {_told(error)}\n({where})", file=sys.stderr)
        return 2


_OURS = (
    *(AssertionError, TypeError, AttributeError, NameError, LookupError, ZeroDivisionError),
    SyntaxError,
)
"""What mistakes in code raise."""

_ISSUES = "with the lines above and the command, in the project's issue tracker"

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, or choose another folder",
    errno.EDQUOT: "the quota is used up: free space, or choose another folder",
    errno.EACCES: "no permission: change it, or choose another place",
    errno.EPERM: "no permission: change it, or choose another place",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EMFILE: "too many open files: raise `ulimit -n`, or use fewer workers",
    errno.ENFILE: "too many open files on this machine: end other programs, or use fewer workers",
    errno.ETXTBSY: "the file is running: end that program",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "a folder is there: name a file",
    errno.EIO: "the disk or its connection fails: copy the file elsewhere",
    errno.ESTALE: "the network file system has lost the file: start again",
    errno.ENOMEM: "not enough memory: use smaller batches or fewer workers",
    errno.ELOOP: "links that lead to each other: name the file itself",
}


def _told(error: Exception) -> str:
    """The message, with the kind where it is not one of ours, and what to do."""
    text = str(error) or "no message"
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        remedy = "not enough memory: use smaller batches, fewer workers, or more processes"
    if not isinstance(error, ValueError | FileNotFoundError):
        text = f"{type(error).__name__}: {text}"
    return f"{text}\n{remedy}" if remedy else text


def _kept_traceback() -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="llm2clip_vlm-", suffix=".log", delete=False
        ) as f:
            traceback.print_exc(file=f)
    except OSError:
        return "no place for its traceback"
    return f"its traceback is in {f.name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm2clip-vlm",
        description="LLM2CLIP vision towers, and LLaVA-style VLMs built on them.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = "\n".join(f"  {name:<24}{purpose}" for name, purpose in STAGES.items())

    for command, name, purpose in (
        (_train, "train", "run a stage with a recipe"),
        (_explain, "help", "show a stage and every key of its recipe"),
        (_doctor, "doctor", "show what this machine has"),
    ):
        added = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose}.",
            epilog=None if name == "doctor" else f"stages:\n{listing}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        if name != "doctor":
            added.add_argument("stage", metavar="STAGE", help="one of the stages below")
        if name == "train":
            told = "print what is missing and what it would cost (as `plan`), and stop"
            added.add_argument("--dry-run", action="store_true", help=told)
            added.add_argument("recipe", metavar="RECIPE", help="YAML; recipes/... also as shipped")
            added.add_argument(
                "overrides", metavar="KEY=VALUE", nargs="*", help="dotted key, value as YAML"
            )
    for name, (_, purpose) in _FORWARDED.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def _train(arguments: argparse.Namespace) -> int | None:
    stage = _known_stage(arguments.stage)
    words = [str(_recipe_path(arguments.recipe)), *arguments.overrides]
    if arguments.dry_run:
        return _plan("plan", *words)
    program = find_program(stage)
    _require_inputs(stage, words)
    result: int | None = load_program(program).main(words)
    return result


def _require_inputs(stage: str, words: Sequence[str]) -> None:
    """Ask for all that the recipe names, before torch is imported."""
    from llm2clip_vlm.recipe.stages import RECIPES
    from llm2clip_vlm.runs.inputs import require_inputs

    if stage in RECIPES:
        require_inputs(load_recipe(words[0], RECIPES[stage], words[1:]), words[0])


def _explain(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.recipe.stages import RECIPES

    stage = _known_stage(arguments.stage)
    text = find_program(stage).read_text(encoding="utf-8")
    print(ast.get_docstring(ast.parse(text)) or STAGES[stage])
    if model := RECIPES.get(stage):
        print(f"\nRecipe keys ({model.__name__}):\n\n{recipe_help(model)}")


def _doctor(arguments: argparse.Namespace) -> int:
    from llm2clip_vlm.preflight.doctor import examine

    broken = 0
    for finding in examine():
        print(finding, flush=True)
        broken += finding.state == "broken"
    print(f"{broken} broken" if broken else "nothing broken")
    return 1 if broken else 0


def _plan(command: str, *words: str) -> int | None:
    from llm2clip_vlm.preflight.plan import main as plan

    return plan(words)


def _program(command: str, *words: str) -> int | None:
    result: int | None = load_program(find_program(command)).main(list(words))
    return result


def _eval(command: str, *words: str) -> int | None:
    """A recipe with `stage: run_encoder` judges an encoder, everything else is a VLM's."""
    recipe = _recipe_path(words[0]) if words else Path()
    if recipe.suffix == ".yaml" and re.search(r"(?m)^stage: *run_encoder\b", read_text(recipe)):
        return _program("run_encoder", str(recipe), *words[1:])
    return _program("run_lmms", *words)


def _embed(command: str, *words: str) -> int | None:
    from llm2clip_vlm.embed import main as embed

    return embed(words)


def _interop(command: str, *words: str) -> int | None:
    from llm2clip_vlm.interop.command import main as interop

    return interop(command, words)


def _push(command: str, *words: str) -> int:
    from llm2clip_vlm.interop.push import main as push

    return push(words)


_FORWARDED: dict[str, tuple[Callable[..., int | None], str]] = {
    "plan": (_plan, "say what a recipe needs and costs: memory, hours, disk, what is missing"),
    "embed": (_embed, "build, verify, merge, import or report on a cache of caption embeddings"),
    "export": (_interop, "write a checkpoint for another tool, with proof that it opens there"),
    "convert": (_interop, "make a checkpoint of LLM2CLIP's, open_clip's, timm's or LLaVA's"),
    "eval": (_eval, "judge an encoder by a recipe, or score VLMs with lmms-eval"),
    "compare": (_program, "compare runs benchmark by benchmark"),
    "push": (_push, "upload a model and its card to the Hugging Face Hub"),
}
"""Commands with options of their own, `--help` included."""


def _known_stage(name: str) -> str:
    if name not in STAGES:
        hint = did_you_mean(name, STAGES)
        raise ValueError(f"no stage `{name}`{hint} (stages: {', '.join(STAGES)})")
    return name


def _recipe_path(given: str) -> Path:
    """The recipe itself, or the shipped one of that name when run far from a checkout."""
    path = Path(given)
    if path.exists() or path.is_absolute() or given.startswith(("recipes/", "eval/")):
        return Path(find_shipped(given))
    shipped = Path(find_shipped(f"recipes/{given}"))
    return shipped if shipped.is_file() else path


if __name__ == "__main__":
    raise SystemExit(main())
