"""Recipes: YAML rules, merging, overrides, interpolation, errors, help, round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llm2clip_vlm.files import find_recipe
from llm2clip_vlm.recipe import base as config
from llm2clip_vlm.recipe import encoder as config_base
from llm2clip_vlm.recipe import vlm as config_vlm
from llm2clip_vlm.recipe import yaml_files
from llm2clip_vlm.recipe.base import ImageTextSource, Section
from llm2clip_vlm.recipe.encoder import Stage2bRecipe
from llm2clip_vlm.recipe.explain import MODELS, recipe_help, recipe_screen
from llm2clip_vlm.recipe.reading import (
    RecipeError,
    load_recipe,
    read_layers,
    save_resolved,
    to_plain,
    words_of,
)
from llm2clip_vlm.recipe.text import Stage1Recipe, Stage2aRecipe
from llm2clip_vlm.recipe.yaml_files import parse_yaml


class Inner(Section):
    """A section with one of each scalar."""

    word: str = "w"
    """A word."""
    number: float = 1.0
    """A number."""
    flag: bool = False
    """A flag."""


class Outer(Section):
    """A recipe."""

    name: str = "n"
    """A name."""
    count: int = 1
    """A count."""
    inner: Inner = Inner()
    """A section."""
    maybe: Inner | None = None
    """A section, or nothing."""
    items: list[Inner] = []
    """Several."""
    free: dict[str, Any] = {}
    """Anything."""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def messages(path: Path, model: type[BaseModel], overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, model, overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+4", -25000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    found = load_recipe(write(tmp_path, f"free: {{x: {text}}}"), Outer).free["x"]
    assert found == value
    assert type(found) is type(value)


def test_a_duplicate_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner:\n  word: x\n  number: 2\n  word: y\n")
    (found,) = messages(path, Outer)
    assert "key 'word' is given twice" in found
    assert f'in "{path}", line 5, column 3' in found


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [", "not valid YAML"),
        ("- a", "expected a mapping of keys"),
        ("1: a", "key '1' is not text"),
        ("free: {x: !!python/name:os.system }", "could not determine a constructor"),
        ("free: {x: !mine 1}", "could not determine a constructor"),
        ("free: {x: !!int z}", "not valid YAML"),
        ("free: {x: !!bool z}", "not valid YAML"),
        ("free: &a {x: *a}", "recursive"),
        ("a: b: c", "not valid YAML"),
        ("name: a\n---\nname: b", "not valid YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    found = messages(path, Outer)
    assert part in found[0]
    assert str(path) in str(RecipeError(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml", Outer)


def test_a_missing_parent_names_its_child(tmp_path: Path) -> None:
    path = write(tmp_path, "base: ../absent.yaml")
    with pytest.raises(
        RecipeError, match=r"absent\.yaml.*(?s:.)*named by `base:` in .*recipe\.yaml"
    ):
        load_recipe(path, Outer)


def test_a_parent_gives_what_the_child_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, "name: grand\ncount: 7\nfree: {a: 1, b: {c: 2, d: 3}}", "top/grand.yaml")
    write(tmp_path, "base: grand.yaml\nitems: [{word: p}, {word: q}]\nname: parent", "top/p.yaml")
    path = write(tmp_path, "base: top/p.yaml\nitems: [{number: 5}]\nfree: {b: {c: 9}}")
    found = load_recipe(path, Outer)
    assert (found.name, found.count) == ("parent", 7)
    assert found.free == {"a": 1, "b": {"c": 9, "d": 3}}
    assert found.items == [Inner(number=5)]


@pytest.mark.parametrize("base", ["llava15/stage3", "recipes/llava15/stage3.yaml"])
def test_base_finds_a_shipped_parent_from_any_folder(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine"
    own.mkdir()
    path = write(own, f"base: {base}\noutput_dir: here")
    shipped = load_recipe("llava15/stage3", config_vlm.Stage3Recipe, ["output_dir=here"])
    assert load_recipe(path, config_vlm.Stage3Recipe) == shipped
    write(tmp_path, "name: of the working directory", "other.yaml")  # beside no child
    assert "no such file" in messages(write(own, "base: other.yaml"), Outer)[0]


def test_base_names_exactly_one_parent(tmp_path: Path) -> None:
    path = write(tmp_path, "base: [a.yaml, b.yaml]")
    assert "one parent" in messages(path, Outer)[0]


def test_a_cycle_of_parents_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    assert "its own parent" in messages(tmp_path / "a.yaml", Outer)[0]


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nitems: [{word: p}, {word: q}]\n")
    overrides = (
        "count=4",
        "inner.number=1e-3",
        "inner.word=no",
        "maybe.flag=true",
        "items.1.word=z=z",
        "free={k: [1, 2]}",
        "name=",
        'name="${inner.word}!"',
    )
    found = load_recipe(path, Outer, overrides)
    assert (found.count, found.inner.number, found.inner.word) == (4, 0.001, "no")
    assert found.maybe == Inner(flag=True)
    assert [item.word for item in found.items] == ["p", "z=z"]
    assert found.free == {"k": [1, 2]}
    assert found.name == "no!"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("count", "expected `dotted.key=value`"),
        ("=3", "expected `dotted.key=value`"),
        ("inner..word=3", "expected `dotted.key=value`"),
        ("name.x=3", "x: 'a' is there, which has no keys"),
        ("items.1.word=x", "1: expected an index below 1"),
        ("items.first.word=x", "first: expected an index below 1"),
        ("count=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, part: str) -> None:
    path = write(tmp_path, "name: a\nitems: [{word: p}]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, Outer, [override])
    assert part in str(caught.value)
    assert f"`{override}`" in str(caught.value)


def test_an_override_is_checked_as_the_file_is(tmp_path: Path) -> None:
    path = write(tmp_path, "items: &a [{word: p}]\nfree: {same: *a}\n")
    assert messages(path, Outer, ("cuont=3", "count=1.5")) == [
        "count: expected a valid integer, got 1.5",
        "cuont: unknown key; did you mean `count`?",
    ]
    found = load_recipe(path, Outer, ["items.0.word=q"])
    assert (found.items[0].word, found.free["same"]) == ("q", [{"word": "p"}])


def test_interpolation_sees_the_merged_recipe_and_its_defaults(tmp_path: Path) -> None:
    write(tmp_path, "name: run-${count}-${inner.number}\nfree: {n: '${count}'}", "p.yaml")
    path = write(
        tmp_path, "base: p.yaml\nfree: {deep: ['${name}/x', '$${count}'], c: '${inner}'}\n"
    )
    found = load_recipe(path, Outer, ["count=12"])
    assert found.name == "run-12-1.0"
    assert found.free["n"] == 12
    assert found.free["deep"] == ["run-12-1.0/x", "${count}"]
    assert found.free["c"] == to_plain(Inner())


def test_interpolation_writes_a_flag_as_yaml_does(tmp_path: Path) -> None:
    path = write(tmp_path, "inner: {flag: true}\nname: f-${inner.flag}")
    assert load_recipe(path, Outer).name == "f-true"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: ${cuont}\ncount: 3", "names no value of this recipe; did you mean `count`?"),
        ("name: ${maybe.word}", "names no value"),
        ("name: ${free.a}\nfree: {a: '${name}'}", "refers to itself: free.a -> name"),
        ("name: x${inner}", "${inner}: inside a text it must be a scalar"),
        ("name: ${items.3}\nitems: []", "names no value"),
    ],
)
def test_a_bad_reference_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    assert part in messages(path, Outer)[0]


def test_all_problems_are_listed_with_their_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "sed: 3\ntext_encoder: {languag_model: x, pooling: men}\n"
        "sources:\n  - path: a\n    limt: 2\n    image_root: k\nbatch_tokens: '4'\n",
    )
    assert sorted(messages(path, Stage2aRecipe)) == [
        "batch_tokens: expected a valid integer, got '4'",
        "output_dir: required, but not given",
        "sed: unknown key; did you mean `seed`?",
        "sources.0.limt: unknown key; did you mean `limit`?",
        "text_encoder.languag_model: unknown key; did you mean `language_model`?",
        "text_encoder.language_model: required, but not given",
        "text_encoder.pooling: expected 'mean', 'last' or 'eos', got 'men'",
    ]


def test_a_value_of_no_allowed_kind_lists_the_kinds(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: o\nsources: []\ntext_encoder: 5")
    assert messages(path, Stage2aRecipe) == [
        "text_encoder: expected a valid string or a mapping, got 5"
    ]


def test_an_unknown_key_without_a_neighbour_lists_what_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, "inner: {zzz: 1}")
    assert messages(path, Outer) == [
        "inner.zzz: unknown key; known here: ['word', 'number', 'flag']"
    ]


def test_a_wrong_stage_is_refused(tmp_path: Path) -> None:
    text = "stage: stage2a_cache_text\noutput_dir: o\ntext_encoder: {language_model: m}\ntrain: []"
    found = messages(write(tmp_path, text), Stage1Recipe)
    assert found[0].startswith("stage: expected stage1_text_encoder, got stage2a_cache_text")


FULL = """
base: parent.yaml
output_dir: runs/${seed}
notes: "1e-3"
deviations: {"why: so": "true", "${a}": "", a: "no ${seed} $${kept}"}
vision_tower: "~"
embedding_cache: "null"
trainer: {weight_decay: 1.0e-5, max_steps: 10, run_name: "010", label_names: [1, null], project: ü}
train:
  - {path: x, where: {split: "yes", ok: true, n: 3}, drop_where: {s: [val]}}
caption_weights: {short: 1, long: 0.5}
"""


def test_the_resolved_recipe_loads_back_equal(tmp_path: Path) -> None:
    write(tmp_path, "seed: 5\nvariables: {a: 3}", "parent.yaml")
    recipe = load_recipe(write(tmp_path, FULL), Stage2bRecipe)
    assert recipe.deviations["a"] == "no 5 ${kept}"
    resolved = tmp_path / "deep" / "recipe.resolved.yaml"
    save_resolved(recipe, resolved)
    again = load_recipe(resolved, Stage2bRecipe)
    assert again == recipe
    assert to_plain(again) == to_plain(recipe)
    assert again.base is None
    assert isinstance(again.train[0], ImageTextSource)
    assert [item.name for item in resolved.parent.iterdir()] == ["recipe.resolved.yaml"]


def recipe_models() -> list[type[BaseModel]]:
    return [
        item
        for module in (config, config_base, config_vlm)
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, BaseModel)
        and item.__module__ == module.__name__
    ]


@pytest.mark.parametrize("model", recipe_models(), ids=lambda model: model.__name__)
def test_every_key_of_every_recipe_has_help(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"


def test_help_shows_key_type_limit_default_and_docstring() -> None:
    lines = recipe_help(Stage2bRecipe).splitlines()
    assert "learning_rates.vision_tower: float >= 0 = 1e-05" in lines
    assert "tower_training: Literal['full', 'frozen', 'lora'] = 'full'" in lines
    assert "train.N.path: str = ''" in lines
    assert "tower_lora.r: int >= 1 = 16" in lines
    at = lines.index("projection_dim: int >= 1 = 1280")
    assert lines[at + 1] == "    Width of the joint space. Paper v6: 1280."
    assert len(set(lines)) > 0.5 * len(lines)
    keys = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", MODELS)
def test_the_keys_of_a_recipe_fit_on_a_screen(name: str) -> None:
    lines = recipe_screen(MODELS[name]).splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 100
    for key in MODELS[name].model_fields.keys() - {"stage"}:
        assert re.search(rf"(^|[ ,]){key}(\.\.\.)? ", "\n".join(lines), re.MULTILINE), key


def test_help_of_one_key_has_all_below_it() -> None:
    told = recipe_help(MODELS["stage4_instruction"], "trainable")
    kind = "dict[Literal['vision_tower', 'multi_modal_projector', 'language_model'], "
    assert told.startswith(f"trainable: {kind}Union[float, PartTraining]] (required)\n")
    assert "\ntrainable.KEY.last_blocks: int | None >= 1 = null\n" in told
    assert told == recipe_help(MODELS["stage4_instruction"], "trainable.KEY")
    assert recipe_help(MODELS["stage2b_vision_encoder"], "train.0.limit").startswith(
        "train.N.limit"
    )
    with pytest.raises(ValueError, match=r"did you mean `trainable\.lr`"):
        recipe_help(MODELS["stage4_instruction"], "trainable.lrr")
    with pytest.raises(ValueError, match=r"no key `foo`; `help STAGE` lists them"):
        recipe_help(MODELS["stage4_instruction"], "foo")
    with pytest.raises(ValueError, match=r"such as `trainable\.multi_modal_projector`"):
        recipe_help(MODELS["stage4_instruction"], "learning_rate")


@pytest.mark.parametrize(
    ("stage", "key", "above"),
    [
        ("stage4_instruction", "trainable.language_model", "trainable"),
        ("stage4_instruction", "trainable.vision_tower.lr", "trainable"),
        ("stage4_instruction", "trainer.learning_rate", "trainer"),
        ("run_lmms", "tasks.0.overrides.generation_kwargs.do_sample", "tasks.overrides"),
    ],
)
def test_help_of_a_mappings_item_is_the_mappings(stage: str, key: str, above: str) -> None:
    model = MODELS[stage]
    assert recipe_help(model, key) == recipe_help(model, above)


def test_an_empty_prompt_is_refused() -> None:
    """It had the place of the embedding with `instruction`, which was then made without it."""
    with pytest.raises(RecipeError, match="prompts: an empty one"):
        load_recipe("paper_v6/stage2a", MODELS["stage2a_cache_text"], ["prompts=['', x]"])
    with pytest.raises(RecipeError, match="caption_prompts: an empty one"):
        load_recipe("paper_v6/stage2b", MODELS["stage2b_vision_encoder"], ["caption_prompts=['']"])


def test_weights_of_texts_that_are_joined_are_refused() -> None:
    model = MODELS["stage0_mntp"]
    with pytest.raises(RecipeError, match="sources: weight: all texts are joined"):
        load_recipe("released_code/stage0", model, ["sources.0.weight=2.0"])


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("paper_v6/stage2b", "learning_rates"),
        ("demo/control", "learning_rates"),
        ("llava15/stage3", "trainable"),
        ("llava15/stage4", "trainable"),
    ],
)
def test_one_rate_for_all_is_refused_where_each_part_has_its_own(path: str, own: str) -> None:
    model = MODELS[str(read_layers(Path(find_recipe(path))).get("stage"))]
    with pytest.raises(RecipeError, match=f"learning_rate: each part has its own, set {own}"):
        load_recipe(path, model, ["trainer.learning_rate=1e-4"])


@pytest.mark.parametrize(
    ("name", "override", "told"),
    [
        ("stage3_projector", "learning_rate=1e-4", "such as `trainable.multi_modal_projector`"),
        ("stage1_text_encoder", "learning_rate=1e-4", "did you mean `trainer.learning_rate`?"),
        ("stage2b_vision_encoder", "learning_rate=1e-4", "did you mean `learning_rates`?"),
        ("stage3_projector", "max_steps=3", "did you mean `trainer.max_steps`?"),
        ("stage3_projector", "dtype=bfloat16", "did you mean `vlm.dtype`?"),
        ("stage3_projector", "pakcing=false", "did you mean `packing`?"),
    ],
)
def test_a_key_at_the_wrong_place_is_told_the_right_one(
    repo_root: Path, name: str, override: str, told: str
) -> None:
    files = {"stage1_text_encoder": "paper_v6/stage1", "stage2b_vision_encoder": "paper_v6/stage2b"}
    path = repo_root / "recipes" / f"{files.get(name, 'llava15/stage3')}.yaml"
    with pytest.raises(RecipeError, match="1 problem\n") as refused:
        load_recipe(path, MODELS[name], [override])
    assert told in str(refused.value)


def test_a_recipe_of_another_stage_is_one_error(repo_root: Path) -> None:
    path = repo_root / "recipes" / "llava15" / "stage3.yaml"
    for name in ("stage4_instruction", "pipeline", "run_encoder"):
        with pytest.raises(RecipeError, match="1 problem\n") as refused:
            load_recipe(path, MODELS[name])
        assert "got stage3_projector" in str(refused.value)
        assert "`llm2clip-vlm train stage3_projector`" in str(refused.value)
    with pytest.raises(RecipeError, match=r"1 problem\n.*`llm2clip-vlm train pipeline`"):
        load_recipe(repo_root / "recipes/demo/pipeline.yaml", MODELS["stage3_projector"])


def test_every_program_tells_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert words_of(["r.yaml", "a=1"], "usage") == ["r.yaml", "a=1"]
    for words, code in (["--help"], 0), (["r.yaml", "-h"], 0), ([], 2):
        with pytest.raises(SystemExit) as ended:
            words_of(words, "the usage")
        assert ended.value.code == code
        told = capsys.readouterr()
        assert (told.err if code else told.out) == "the usage\n"


def test_a_recipe_that_is_not_there_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    for given, near in (
        ("recipes/llava15/stage3_eva2.yaml", "recipes/llava15/stage3_eva02.yaml"),
        (str(tmp_path / "mime.yaml"), str(tmp_path / "mine.yaml")),
    ):
        with pytest.raises(RecipeError, match="there is no such file; did you mean") as refused:
            load_recipe(given, MODELS["stage3_projector"])
        assert f"`{near}`" in str(refused.value)


def test_the_limits_of_yaml_at_the_border(tmp_path: Path) -> None:
    deepest = yaml_files.DEEPEST
    assert parse_yaml("[" * deepest + "]" * deepest, "x")
    with pytest.raises(RecipeError, match=f"nested more than {deepest} deep"):
        parse_yaml("[" * (deepest + 1) + "]" * (deepest + 1), "x")
    most = yaml_files.LARGEST_BYTES - 1  # a value counts for one more than its characters
    assert parse_yaml("x" * most, "x") == "x" * most
    with pytest.raises(RecipeError, match="anchors make more than"):
        parse_yaml("x" * (most + 1), "x")
    for number in range(deepest + 2):
        base = f"base: {number + 1}.yaml\n" if number <= deepest else "name: last\n"
        (tmp_path / f"{number}.yaml").write_text(base)
    assert load_recipe(tmp_path / "1.yaml", Outer).name == "last"
    with pytest.raises(RecipeError, match=f"at most {deepest} parents"):
        load_recipe(tmp_path / "0.yaml", Outer)
