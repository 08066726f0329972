"""The `llm2clip-vlm` command: thin, and light to start (nothing heavy is imported for `--help`).

llm2clip-vlm init DIR --recipe NAME               files to start from, and the commands to type
llm2clip-vlm train STAGE RECIPE [key=value ...]   run a stage; --gpus 8 on that many GPUs
llm2clip-vlm plan RECIPE [--gpus 8 --gpu NAME]    memory, hours, disk, and what is missing
llm2clip-vlm help STAGE [KEY]                     the keys of its recipe on a screen, or one of them
llm2clip-vlm completion bash|zsh                  what the shell needs to complete words
llm2clip-vlm embed ...                            build, verify, merge or report on a cache
llm2clip-vlm export CHECKPOINT --to FORMAT OUT    for another tool
llm2clip-vlm convert IN OUT                       from another project
llm2clip-vlm doctor                               what this machine has
llm2clip-vlm eval ...                             score checkpoints with lmms-eval
llm2clip-vlm compare ...                          compare runs benchmark by benchmark
llm2clip-vlm push DIR ORG/NAME                    upload a model and its card
llm2clip-vlm chat MODEL [IMAGE]                   talk with a VLM in the terminal
llm2clip-vlm search MODEL FOLDER WORDS            find photographs by words
llm2clip-vlm app [RUN]                            a local page: chat, search, look, runs
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import io
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm import __version__
from llm2clip_vlm.files import find_program, find_recipe, load_program
from llm2clip_vlm.options import Parser, number
from llm2clip_vlm.preflight.machines import add_options, find_machine
from llm2clip_vlm.recipe.reading import did_you_mean, load_recipe, read_layers
from llm2clip_vlm.remote.addresses import RemoteError

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
        argv: Arguments without the program's name. None: the process's own.

    Returns:
        The exit code: 2 for an error that the user can mend.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _FORWARDED:
        return guard(lambda: _forward(*words))
    arguments, rest = _parser().parse_known_args(words)
    more: Any = vars(arguments).get("overrides", vars(arguments).get("keys"))
    if any(word.startswith("-") or more is None for word in rest):
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # words behind an option, which argparse does not join to those before it
        more += rest
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
        Its exit code; 2 after such a message, 1 after a mistake in the code, 130 after Ctrl-C, 141
        where nobody reads the output any more. With `LLM2CLIP_DEBUG=1` the error goes through.
    """
    noise = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: noise not in record.getMessage())
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know a caption's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings("ignore", category=FutureWarning, module=_FOREIGN)
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
        if not isinstance(error, _TOLD):
            where += f"; {_kept_traceback()}"
        print(f"error: {_told(error)}\n({where})", file=sys.stderr)
        return 2


_FOREIGN = r"(accelerate|deepspeed|peft|torch|transformers)\b"
"""Packages whose `FutureWarning` is for us, not for the user."""


_OURS = (
    *(AssertionError, TypeError, AttributeError, NameError, LookupError, ZeroDivisionError),
    SyntaxError,
)
"""What mistakes in code raise."""

_TOLD = (ValueError, FileNotFoundError, RemoteError)
"""Errors whose message is for the user."""

_ISSUES = "with the lines above and the command, in the project's issue tracker"

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, or choose another folder",
    errno.EDQUOT: "the quota is used up: free space, or choose another folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission: change it, or choose elsewhere"),
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

_FULL = re.compile(r"No space left|unexpected pos \d|file write failed")
"""Words of a full disk in errors of safetensors, and of torch.save, which do not say so."""
_MEMORY = re.compile("out of memory|by signal: killed|exited unexpectedly", re.IGNORECASE)
"""Those of a lack of memory; the last two are torch's, of a loader's worker that is killed."""


def _told(error: Exception) -> str:
    """The message, with its kind where the code did not foresee it, and what to do."""
    text = str(error) or "no message"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if _FULL.search(text):
        remedy = _REMEDIES[errno.ENOSPC]
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        remedy = "not enough memory: use smaller batches, fewer workers, or more processes"
    if not isinstance(error, _TOLD):
        text = f"{type(error).__name__}: {text}"
    return f"{text}\n{remedy}" if remedy else text


def _kept_traceback() -> str:
    try:
        with tempfile.NamedTemporaryFile("w", prefix="llm2clip_vlm-", delete=False) as f:
            traceback.print_exc(file=f)
    except OSError:
        return "no place for its traceback"
    return f"its traceback is in {f.name}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llm2clip-vlm",
        description="LLM2CLIP vision towers, and LLaVA-style VLMs built on them.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = "\n".join(f"  {name:<24}{purpose}" for name, purpose in STAGES.items())

    def add(command: Callable[..., int | None], name: str, purpose: str, below: str = "") -> Any:
        form: Any = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(
            name, help=purpose, description=f"{purpose}.", epilog=below, formatter_class=form
        )
        added.set_defaults(command=command, parser=added)
        return added

    train = add(_train, "train", "run a stage with a recipe", f"stages:\n{listing}")
    named = "one of those below, or the beginning of its name"
    train.add_argument("stage", metavar="STAGE", help=named)
    planned = add(_plan, "plan", "say what a recipe needs, costs (memory, hours, disk) and lacks")
    overrides: dict[str, Any] = {"nargs": "*", "default": [], "metavar": "KEY=VALUE"}
    overrides["help"] = "dotted key, value as YAML"
    for made in (train, planned):
        made.add_argument("recipe", metavar="RECIPE", help="YAML; or a shipped one: llava15/stage3")
        made.add_argument("overrides", **overrides)
    add_options(planned)
    train.add_argument("--gpus", type=number(1), metavar="N", help="start accelerate on N GPUs")
    train.add_argument(
        "--accelerate", metavar="FILE", help="settings for --gpus; default: zero3 for stage 4, "
        "zero2 for stage 3, else ddp (recipes/accelerate)",
    )  # fmt: skip
    told = "print what is missing and what it would cost (as `plan`), and stop"
    train.add_argument("--dry-run", action="store_true", help=told)
    listing += f"\nothers: {', '.join(_OTHERS)}"
    explain = add(_explain, "help", "show the keys of a recipe", f"stages:\n{listing}")
    explain.add_argument("stage", metavar="STAGE", nargs="?", help=named)
    explain.add_argument("keys", metavar="KEY", nargs="*", default=[], help="with all below it")
    explain.add_argument("--all", action="store_true", help="every key, in full")
    begin = add(_init, "init", "make a folder to start from: recipes, suite, and what to type next")
    begin.add_argument("directory", metavar="DIR", help="a new folder")
    families = "llava15, nano, real or webdataset"
    begin.add_argument("--recipe", required=True, metavar="NAME", help=families)
    words = add(_completion, "completion", "print a script that completes words in a shell")
    words.add_argument("shell", choices=("bash", "zsh"))
    add(_doctor, "doctor", "show what this machine has")
    for name, (_, purpose) in _FORWARDED.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def _train(arguments: argparse.Namespace) -> int | None:
    stage = _known_stage(arguments.stage)
    words = [find_recipe(arguments.recipe), *arguments.overrides]
    if arguments.accelerate is not None and arguments.gpus is None:
        raise ValueError("--accelerate: expected --gpus beside it; without, one process starts")
    _require_inputs(stage, words, arguments.dry_run)
    if arguments.dry_run:
        from llm2clip_vlm.preflight.starting import sharding

        if (gpus := arguments.gpus) is not None:
            words += sharding(stage, words, arguments.accelerate)
        return main(["plan", *words, "--gpus", str(1 if gpus is None else gpus)])
    if arguments.gpus is not None:
        from llm2clip_vlm.preflight.starting import launch

        return launch(find_program(stage), words, arguments.gpus, arguments.accelerate)
    return _program(stage, *words)


def _require_inputs(stage: str, words: Sequence[str], dry_run: bool) -> None:
    """Miss what a stage would miss, before torch is imported; a plan lists what is absent."""
    from llm2clip_vlm.recipe.stages import RECIPES
    from llm2clip_vlm.runs.inputs import require_inputs

    if stage in RECIPES:
        recipe = load_recipe(words[0], RECIPES[stage], words[1:])
        if not dry_run:
            require_inputs(recipe, words[0])


def _explain(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.recipe.explain import MODELS, recipe_help, recipe_screen

    if arguments.stage is None:
        _parser().print_help()
        return
    name = _known_stage(arguments.stage, _OTHERS)
    program = _OTHERS.get(name, name)
    text = find_program(program).read_text(encoding="utf-8")
    told = ast.get_docstring(ast.parse(text)) or STAGES[name]
    model = MODELS[program]
    if arguments.keys:
        print(*(recipe_help(model, key) for key in arguments.keys), sep="\n")
    elif arguments.all:
        print(f"{told}\n\nRecipe keys ({model.__name__}):\n\n{recipe_help(model)}")
    else:
        print(f"{told.splitlines()[0]}\n\nRecipe keys ({model.__name__}):\n{recipe_screen(model)}")
        print(f"\nOne of them in full: llm2clip-vlm help {name} KEY; all: --all")


_OTHERS = {"eval": "run_encoder", "suite": "run_lmms", "report": "report"}
"""What `help` knows beside the stages, and the programs."""


def _init(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.preflight.starting import begin

    begin(Path(arguments.directory), arguments.recipe)


def _completion(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.preflight.starting import completion

    modules = {name: _forwarded(name) for name in _FORWARDED}
    own = {name: module.parser(*first) for name, (module, first) in modules.items()}
    print(completion(_parser(), own, arguments.shell, [*STAGES]))


def _doctor(arguments: argparse.Namespace) -> int:
    from llm2clip_vlm.preflight.doctor import examine

    broken = 0
    for finding in examine():
        print(finding, flush=True)
        broken += finding.state == "broken"
    print(f"{broken} broken" if broken else "nothing broken")
    return 2 if broken else 0


def _plan(given: argparse.Namespace) -> int | None:
    from llm2clip_vlm.recipe.stages import RECIPES

    source = find_recipe(given.recipe)
    if (stage := read_layers(Path(source)).get("stage")) not in RECIPES:
        raise ValueError(
            f"{source}: stage: expected one of {', '.join(RECIPES)}, got {stage or 'none'}; of a "
            "pipeline, plan the recipes of its steps"
        )
    recipe = load_recipe(source, RECIPES[stage], given.overrides)
    machine = find_machine(given.gpu, given.gpus, given.zero, given.offload, source)
    from llm2clip_vlm.preflight.plan import main as plan  # torch: after what needs none

    return plan(given, recipe, source, machine)


def _program(command: str, *words: str) -> int | None:
    return load_program(find_program(command)).main(list(words))


def _forward(command: str, *words: str) -> int | None:
    """Run what has options of its own; a recipe of `eval` judges an encoder."""
    if command == "eval" and words and not words[0].startswith("-") and "=" not in words[0]:
        recipe = find_recipe(words[0])
        if os.path.isdir(recipe):
            raise ValueError(
                f"{recipe}: expected a recipe, got a folder; a model is judged by `eval RECIPE "
                f"model={recipe}`, a VLM by `eval --suite SUITE --checkpoint NAME={recipe}`"
            )
        data = read_layers(Path(recipe))
        stage = "pipeline" if "steps" in data else data.get("stage")
        suite = f"got none; a suite for VLMs is given as `eval --suite {words[0]}`"
        if stage != "run_encoder":  # before the program imports torch
            raise ValueError(
                f"{recipe}: expected a recipe with `stage: run_encoder`, which judges an encoder, "
                + (f"got {stage}: `train {stage} {words[0]}` runs it" if stage else suite)
            )
        return _program("run_encoder", recipe, *words[1:])
    module, first = _forwarded(command)
    return module.main(*first, list(words))


_FORWARDED = {
    "embed": ("embed", "build, verify, merge or report on cached embeddings"),
    "export": (
        "interop.command",
        "write a checkpoint for another tool, with proof that it opens there",
    ),
    "convert": (
        "interop.command",
        "make a checkpoint of LLM2CLIP's, open_clip's, timm's or LLaVA's",
    ),
    "eval": ("run_lmms", "judge an encoder by a recipe, or score VLMs with lmms-eval by a suite"),
    "compare": ("compare", "compare runs benchmark by benchmark"),
    "push": ("interop.push", "upload a model and its card to the Hugging Face Hub"),
    "chat": ("play.command", "talk with a VLM in the terminal"),
    "search": ("play.command", "find photographs by words, in a folder that is indexed once"),
    "app": ("play.command", "a page on this machine alone: chat, search, look, finished runs"),
}
"""Commands with options of their own, `--help` included: module or program, and purpose."""


def _forwarded(command: str) -> tuple[Any, tuple[str, ...]]:
    """Import the module or program of one of them; its functions take the other words first."""
    name, _ = _FORWARDED[command]
    if name in ("run_lmms", "compare"):
        return load_program(find_program(name)), ()
    return importlib.import_module(f"llm2clip_vlm.{name}"), (command,)


def _known_stage(name: str, others: Iterable[str] = ()) -> str:
    """The stage of this name, or the only one that begins so."""
    known = [*STAGES, *others]
    found = [name] if name in known else [stage for stage in known if stage.startswith(name)]
    if len(found) != 1:
        hint = did_you_mean(name, known) if not found else f"; which of {', '.join(found)}?"
        raise ValueError(f"no stage `{name}`{hint} (stages: {', '.join(STAGES)})")
    return found[0]


if __name__ == "__main__":
    raise SystemExit(main())
