"""Recipes of bad faith or bad luck: one message within a second and a little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm2clip_vlm.data.conversation.instruction import expand_mixtures
from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.pipeline import PipelineError, expand
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe, save_resolved
from llm2clip_vlm.recipe.vlm import InstructionSource, Stage3Recipe
from tests.conftest import REPO_ROOT

GOOD = """\
output_dir: out
vlm: {vision_tower: a, language_model: b}
data: [{path: x.json}]
trainable: {multi_modal_projector: 1e-3}
global_batch_size: 4
"""
LAUGHS = "a0: &a0 [lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
REFERENCES = "deviations:\n  d0: aaaaaaaaaa\n" + "".join(
    f'  d{n}: "{f"${{deviations.d{n - 1}}}" * 10}"\n' for n in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 900))

RECIPES: dict[str, tuple[str | bytes, str]] = {
    "laughs": (GOOD + LAUGHS, "anchors make more than"),
    "laughs in a section": (GOOD + "notes: &n x\n" + LAUGHS, "anchors make more than"),
    "references": (GOOD + REFERENCES, "references .* make more than"),
    "references in a list": (
        GOOD + "trainer: {a: ['${trainer.b}', '${trainer.b}'], b: ['${trainer.c}', '${trainer.c}'],"
        " c: ['${trainer.a}']}", "refers to itself"),
    "long anchor chain": (GOOD + CHAIN, "nested|anchors make more"),
    "deep": (GOOD + "x: " + "[" * 5000 + "]" * 5000, "nested"),
    "deep braces": (GOOD + "x: " + "{a: " * 5000 + "}" * 5000, "nested"),
    "deep blocks": (GOOD + "x:\n" + "".join(" " * n + "-\n" for n in range(1, 600)), "nested"),
    "recursive": (GOOD + "a: &a [*a]", "refers to itself"),
    "recursive mapping": (GOOD + "a: &a {b: {c: *a}}", "refers to itself"),
    "huge": (GOOD + "notes: " + "x" * 300_000, "at most 200,000 bytes"),
    "NUL": (GOOD.encode() + b"\0", "NUL"),
    "UTF-16": (GOOD.encode("utf-16"), "utf-8"),
    "control character": (GOOD + "notes: a\x07b", "not valid YAML"),
    "two documents": (GOOD + "---\n" + GOOD, "single document"),
    "python": (GOOD + 'notes: !!python/object/apply:os.system ["touch ran"]', "constructor"),
    "python name": (GOOD + "notes: !!python/name:os.system", "constructor"),
    "merge key": (GOOD + "x: &x {seed: 8}\n<<: *x", "unknown key"),
    "key twice": (GOOD + "global_batch_size: 8", "given twice"),
    "huge number": (GOOD + "seed: " + "9" * 5000, "4300 digits"),
    "inf": (GOOD.replace("1e-3", ".inf"), r"trainable\.multi_modal_projector: .*finite"),
    "nan": (GOOD.replace("1e-3", ".nan"), r"trainable\.multi_modal_projector: .*finite"),
    "inf for the trainer": (GOOD + "trainer: {learning_rate: -.inf}", r"trainer\.learning_rate"),
    "1e999": (GOOD + "trainer: {learning_rate: 1e999}", r"trainer\.learning_rate: .*finite"),
    "negative": (GOOD.replace("1e-3", "-1e-3"), r"trainable\.multi_modal_projector: .*greater"),
    "float batch": (GOOD.replace("size: 4", "size: 4.0"), "global_batch_size: .*integer"),
    "key of several parts": (GOOD + "? [a]\n: 2\n", "key of several parts is not text"),
    "reference inside a reference": (
        GOOD + "variables: {a: a}\nnotes: ${variables.${variables.a}}", "another one inside"),
    "reference without end": (GOOD + "notes: ${seed", "has no end"),
    "seed of no generator": (GOOD + "seed: 4294967296", "seed: .*less than 4294967296"),
    "negative seed": (GOOD + "seed: -1", "seed: .*greater"),
    "bucket": (GOOD.replace(" out", " s3://bucket/out"), "output_dir: .*got the address s3"),
    "sexagesimal": (GOOD + "seed: 1:30", "seed: .*integer"),
    "underscore": (GOOD + "seed: 1_000", "seed: .*integer"),
    "no folder": (GOOD.replace(" out", ' ""'), "output_dir: .*expected a folder"),
    "null folder": (GOOD.replace(": out", ": null"), "output_dir"),
    "list": ("[1, 2]", "mapping"),
    "text": ("hello", "mapping"),
    "empty": ("", "output_dir: required"),
    "cut": (GOOD + "x: {a: [1", "not valid YAML"),
    "long folder": (GOOD.replace(" out", f" {'x' * 300}"), "output_dir: .*too long"),
    "deep folder": (GOOD.replace(" out", f" {'x/' * 3000}"), "output_dir: .*too long"),
    "home of nobody": (GOOD.replace(" out", " ~nobody_of_this_name/x"), "output_dir: .*home"),
    "endless repetition": (GOOD.replace("x.json", "x.json, weight: 1e18"), "less than or equal"),
    "packing beside groups": (GOOD + "trainer: {train_sampling_strategy: group_by_length}",
                              "no meaning with packing"),
    "order by processes": (
        GOOD + "packing: false\ntrainer: {train_sampling_strategy: batch_rebalance}",
        "expected random, sequential or group_by_length"),
    "tab": (GOOD + "\tnotes: x", "not valid YAML"),
    "base itself": ("base: r.yaml", "its own parent"),
    "base a folder": ("base: .", "folder"),
    "base a device": ("base: /dev/zero", "device"),
    "base a terminal": ("base: /dev/tty", "cannot read"),
    "base a FIFO": ("base: fifo", "FIFO"),
    "base of NULs": ('base: "a\\0b"', "cannot read"),
    "base not there": ("base: nothing.yaml", r"cannot read this file \(named by `base:`"),
    "base a list": ("base: [a, b]", "path of one parent"),
    "token": (GOOD + "trainer: {hub_token: hf_abc}", r"trainer\.hub_token: a secret"),
    "key": (GOOD + "trainer: {deepspeed: {comet: {api_key: 12ab}}}", r"api_key: a secret"),
    "password": (GOOD + "deviations: {db_password: x}", "db_password: a secret"),
    "token in a text": (GOOD + f"notes: login with hf_{'x' * 30}", "notes: a secret"),
    "password in an address": (GOOD + "notes: https://me:word@host/x", "notes: a secret"),
    "reference to a secret": (GOOD + "notes: ${trainer.x}\ntrainer: {x: sk-" + "a1" * 20 + "}",
                              "notes: a secret"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_one_message(name: str, tmp_path: Path) -> None:
    content, told = RECIPES[name]
    file = tmp_path / "r.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.mkfifo(tmp_path / "fifo")
    began = time.process_time()
    with pytest.raises(RecipeError, match=told) as raised:
        load_recipe(file, Stage3Recipe)
    assert time.process_time() - began < 1
    assert "r.yaml" in str(raised.value) or "base" in name
    assert "hf_" not in str(raised.value)
    assert "sk-" not in str(raised.value)
    assert len(str(raised.value)) < 3000
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=" + "[" * 9000, r"override `seed`[^$]*nested"),
        ("a: &a [*a]", "expected `dotted.key=value`"),
        ("trainer=&a {b: *a}", "refers to itself"),
        ("trainer.learning_rate=.nan", r"trainer\.learning_rate: .*finite"),
        ("trainer.hub_token=hf_" + "s" * 30, r"trainer\.hub_token: a secret"),
        ("trainer.hub_token={a: [", r"override `trainer\.hub_token`:"),
        ("seed.x=hf_" + "s" * 30, "override `seed.x`"),
        ("seed=!!python/name:os.system", "constructor"),
        ("seed=\0", "not valid YAML"),
        (".".join(["a"] * 9000) + "=1", "expected `dotted.key=value`"),
    ],
)
def test_a_bad_override_is_one_message(override: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD + "seed: 3\n")
    with pytest.raises(RecipeError, match=told) as raised:
        load_recipe(file, Stage3Recipe, [override])
    assert "hf_" not in str(raised.value)
    assert len(str(raised.value)) < 3000


def test_names_that_look_like_secrets_or_comments_pass(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    given = ["output_dir=runs/exp #3", "trainer.hub_token=null",
             "trainer.include_num_input_tokens_seen=all", "deviations.pad_token=as LLaVA",
             "notes=${output_dir} holds <image> tokens and $${ alone"]  # fmt: skip
    recipe = load_recipe(file, Stage3Recipe, given)
    assert recipe.output_dir == "runs/exp #3"
    save_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml", Stage3Recipe) == recipe
    home = load_recipe(file, Stage3Recipe, ["output_dir=~/x"]).output_dir
    assert home == str(Path.home() / "x")


def test_thousands_of_unknown_keys_are_not_all_compared(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD + "".join(f"k{n}: 1\n" for n in range(9000)))
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"20 problems\n  k0: unknown key"):
        load_recipe(tmp_path / "r.yaml", Stage3Recipe)
    assert time.process_time() - began < 4


def test_grids_of_anyres_are_read_and_written(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    anyres = "vlm.image_aspect_ratio=anyres"
    given = [anyres, "vlm.image_grid_pinpoints=[[336, 672], [672, 336]]"]
    recipe = load_recipe(file, Stage3Recipe, given)
    assert recipe.vlm.image_grid_pinpoints == [[336, 672], [672, 336]]
    save_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml", Stage3Recipe) == recipe
    for wrong in ("[[336]]", "[336, 672]", "[[1, 2, 3]]"):
        with pytest.raises(RecipeError, match="image_grid_pinpoints"):
            load_recipe(file, Stage3Recipe, [anyres, f"vlm.image_grid_pinpoints={wrong}"])


def test_a_pipeline_does_not_explode() -> None:
    many: list[str | int] = list(range(100))
    step = {"name": "{a}{b}{c}", "program": "p", "for_each": {"a": many, "b": many, "c": many}}
    recipe = PipelineRecipe.model_validate({"output_dir": "o", "steps": [step]})
    with pytest.raises(PipelineError, match="for_each makes more than"):
        expand(recipe)


@pytest.mark.parametrize(
    "mixture",
    [
        LAUGHS + "datasets: [{json_path: *a11}]",
        "datasets: &d [*d]",
        'datasets: !!python/object/apply:os.system ["touch ran"]',
        'datasets: "abc"',
        "[" * 9000,
        "- 1",
        "",
        "\0",
        "datasets: [{json_path: x.json, sampling_strategy: 'first:-5'}]",
        "datasets: [{json_path: [x]}]",
    ],
)
def test_a_bad_mixture_is_one_message(mixture: str, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(mixture)
    with pytest.raises(RecordError, match=r"m\.yaml") as raised:
        expand_mixtures([InstructionSource(path=str(file))])
    assert len(str(raised.value)) < 3000
    assert not Path("ran").exists()


def test_memory_of_a_recipe_that_explodes(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited."""
    for name in ("laughs", "references", "huge", "deep", "base a device"):
        content = RECIPES[name][0]
        assert isinstance(content, str)
        (tmp_path / "r.yaml").write_text(content)
        program = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)\n"
            "from llm2clip_vlm.recipe.vlm import Stage3Recipe\n"
            "from llm2clip_vlm.cli import guard\n"
            "from llm2clip_vlm.recipe.reading import load_recipe\n"
            f"sys.exit(guard(lambda: load_recipe({str(tmp_path / 'r.yaml')!r}, Stage3Recipe)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPO_ROOT, capture_output=True, text=True,
            timeout=60, check=False, env={**os.environ, "LLM2CLIP_DEBUG": ""},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
