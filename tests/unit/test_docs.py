"""What the README and the docs say is there: links, programs, recipes, flags, make targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip_vlm import cli, embed
from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.interop import command, push
from llm2clip_vlm.play import command as play
from llm2clip_vlm.preflight import machines
from llm2clip_vlm.recipe.base import RunRecipe
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.runs.inputs import stage_and_output
from llm2clip_vlm.training.arguments import check_choices, shares_of_a_step

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "recipes" / "demo" / "base" / "models" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
MODELS: dict[str, Any] = {**RECIPES, "pipeline": PipelineRecipe}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:stages|recipes|eval|docs|tests|llm2clip_vlm)/[\w./-]*)`")


def commands(text: str) -> Iterator[str]:
    """Command lines of the shell blocks, continued lines joined, comments and `&&` taken apart."""
    for language, body in FENCE.findall(text):
        if language not in ("bash", "sh", "shell"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield shlex.join(words[:end])
                words = words[end + 1 :]


COMMANDS = [(page, c) for page in PAGES for c in commands(page.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def check_recipe(program: str, words: list[str], processes: int = 1) -> None:
    """A recipe with its overrides loads with the program's model, and its batch can be shared."""
    recipe = load_recipe(words[0], MODELS[program], words[1:])
    if isinstance(recipe, RunRecipe):
        check_choices(recipe.trainer)
        _, accumulated = shares_of_a_step(recipe, processes)
        assert accumulated == 1 or not recipe.contrastive


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    names = {word for word in words if "=" not in word}
    assert names <= set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    given = {word.partition("=")[0] for word in words} - names
    assert given <= set(re.findall(r"^(\w+) \?=", text, re.MULTILINE))


def check_python(words: list[str], processes: int = 1) -> None:
    program = Path(words[0])
    assert program.is_file()
    if program.stem in MODELS:
        check_recipe(program.stem, words[1:], processes)


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args(words[1:])
    assert Path(arguments.config_file).is_file()
    rest = arguments.training_script_args
    settings = yaml.safe_load(Path(arguments.config_file).read_text())
    processes = arguments.num_processes or settings["num_processes"]
    if arguments.module:
        assert arguments.training_script == "llm2clip_vlm.cli"
        check_cli(rest, processes)
        return
    check_python([arguments.training_script, *rest], processes)


def check_cli(words: list[str], processes: int = 1) -> None:
    if words[0] == "eval":
        check_eval(words[1:])
        return
    if words[0] == "compare":
        compare = load_program(find_program("compare"))
        assert len(compare.parser().parse_args(words[1:]).runs) > 1
        return
    if words[0] == "plan":
        given, more = cli._parser().parse_known_args(words)
        assert given.gpu in machines.GPUS
        overrides = [*given.overrides, *more]
        stage = str(stage_and_output(Path(given.recipe))[0])
        check_recipe(stage, [given.recipe, *overrides], given.gpus)
        return
    if words[0] == "push":
        push.parser().parse_args(words[1:])
        return
    if words[0] in ("chat", "search", "app"):
        play.parser(words[0]).parse_args(words[1:])
        return
    if words[0] in ("export", "convert"):
        command.parser(words[0]).parse_args(words[1:])
        return
    if words[0] == "embed":
        parsed = embed.parser("embed").parse_args(words[1:])
        if words[1] == "build":
            check_recipe("stage2a_cache_text", parsed.words)
        return
    arguments, more = cli._parser().parse_known_args(words)
    assert not more or words[0] == "train"
    if words[0] == "train":
        words = [arguments.recipe, *arguments.overrides, *more]
        check_recipe(arguments.stage, words, arguments.gpus or processes)


def check_eval(words: list[str]) -> None:
    """An encoder's recipe loads; the runner takes its line up to where it would start."""
    if not words[0].startswith("--"):
        load_recipe(words[0], EncoderEvalRecipe, words[1:])
        return
    from llm2clip_vlm.evaluation.vlm import jobs as lmms_jobs

    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms_jobs, "run_suite", lambda *args, **more: asked.append(args) or {})
        assert cli.main(["eval", *words]) == 0
    suite, checkpoints, _, _ = asked[0]
    assert suite.tasks
    assert checkpoints


CHECKS = {
    "accelerate": check_accelerate,
    "llm2clip-vlm": check_cli,
    "make": check_make,
    "python": check_python,
}
FREE = {"cd", "pip", "hf", "git", "source", "transformers", "unzip", "vllm"}
"""Programs of others."""


def test_the_readme_is_short_and_says_what_it_must() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for needed in (
        "<!-- results -->",
        "<!-- /results -->",
        "docs/results/gallery.jpg",
        "docs/results/ab.svg",
        "pip install",
        "make demo",
        "make test",
        "make ab",
        "openai/clip-vit-large-patch14-336",
        "meta-llama/Llama-3.2-1B",
        "Vicuna",
        "Qwen",
        "--num_processes 8",
        "never",
        "llm2clip-vlm doctor",
        "recipes/check/real_weights.yaml",
    ):
        assert needed in text, f"the README does not have {needed!r}"


def test_there_are_commands_to_check() -> None:
    readme = [c.split()[0] for page, c in COMMANDS if page.name == "README.md"]
    assert set(CHECKS) <= set(readme)


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(COMMANDS)]
)
def test_a_command_is_one_that_exists(page: Path, command: str) -> None:
    program, *words = shlex.split(command)
    assert program in CHECKS or program in FREE, f"{page.name}: {command}"
    if program in CHECKS:
        CHECKS[program](words)


@pytest.mark.parametrize("wrong", [
    "make dmeo",
    "python stages/stage9.py recipes/llava15/stage3.yaml",
    "llm2clip-vlm train stage3_projector recipes/llava15/stage3.yaml vlm.tower=x",
    "llm2clip-vlm train stage2b_vision_encoder recipes/paper_v6/stage2b.yaml --gpus 4",
    "llm2clip-vlm train stage3_projector recipes/llava15/stage3.yaml --gpus 16",
    "accelerate launch --config_fiel recipes/accelerate/zero3.yaml stages/pipeline.py",
    "llm2clip-vlm eval --suites eval/suites/nano.yaml --checkpoint a=b --output c",
])  # fmt: skip
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    program, *words = shlex.split(wrong)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        CHECKS[program](words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(page if not path else page.parent / path)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for named in NAMED.findall(text):
        assert (ROOT / named).exists(), f"{page.name} names {named}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_no_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp)/", text)


def test_every_shipped_folder_of_recipes_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in (ROOT / "recipes").iterdir():
        assert not [*folder.glob("*.yaml")] or f"{folder.name}/" in text, folder.name


DEMO = re.compile(r"runs/demo/[\w./-]*\w")
WRITTEN = re.compile(
    r"(stage1(/text_encoder)?|stage2a|report\.html|eval(/(llm2clip|control_long)-s0)?"
    r"|towers/(base|control_long|llm2clip)(/(model|vision_tower|recipe\.resolved\.yaml))?"
    r"|vlm/(control_long|llm2clip)/stage[34](/model)?"
    r"|comparison|as_vllm)"  # written by commands of these pages
)
"""What `make demo` leaves in `runs/demo` (`recipes/demo/pipeline.yaml`)."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_demo_wrote_is_named_as_it_lies(page: Path) -> None:
    for path in DEMO.findall(page.read_text(encoding="utf-8")):
        assert WRITTEN.fullmatch(path.removeprefix("runs/demo/")), f"{page.name} names {path}"
