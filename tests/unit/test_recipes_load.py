"""Every YAML file that ships is read by the model that it is for."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from world.recipe import LanguageModelRecipe

from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.pipeline import COMMAND, expand
from llm2clip_vlm.recipe.base import RunRecipe, Section
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe, save_resolved
from llm2clip_vlm.recipe.report import ReportRecipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.suite import SuiteRecipe
from llm2clip_vlm.training.arguments import check_choices, shares_of_a_step

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
FILES = sorted(
    path
    for folder in ("recipes", "eval/suites", "demo/suites")
    for path in (ROOT / folder).rglob("*.yaml")
    if path not in ACCELERATE
)
MODELS: dict[str, type[BaseModel]] = {
    **RECIPES,
    "base_language_model": LanguageModelRecipe,
    "pipeline": PipelineRecipe,
    "report": ReportRecipe,
    "run_encoder": EncoderEvalRecipe,
    "run_lmms": SuiteRecipe,
}
PROGRAM = re.compile(r"\b(?:stages|eval|demo)/(\w+)\.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def header(path: Path) -> str:
    """The comment that a file opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def model_of(program: str) -> type[BaseModel]:
    """The recipe that a program reads: one of the library's, or its own."""
    if program in MODELS:
        return MODELS[program]
    module = load_program(find_program(program))
    (model,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Section)
        and value.__module__ == module.__name__
        and value.__name__.endswith("Recipe")
    )
    return model


def program_of(path: Path) -> str:
    """The program that reads a file: lmms-eval's runner, or the first that its comment names."""
    if path.parent.name == "suites":
        return "run_lmms"
    found = [name for name in PROGRAM.findall(header(path)) if name != "draw_world"]
    assert found, f"{name(path)}: the opening comment has no launch line with a program"
    return str(found[0])


def check(path: Path, program: str, overrides: list[str]) -> Any:
    recipe = load_recipe(path, model_of(program), overrides)
    if isinstance(recipe, RunRecipe):
        check_choices(recipe.trainer)
    return recipe


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_recipes() -> None:
    folders = {path.relative_to(ROOT).parts[1] for path in FILES}
    assert {"demo", "llava15", "paper_v6", "released_code", "suites"} <= folders


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_recipe_loads(path: Path, tmp_path: Path) -> None:
    recipe = check(path, program_of(path), [])
    save_resolved(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml", type(recipe)) == recipe


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_recipe_opens_with_its_own_launch_line(path: Path) -> None:
    text = re.sub(r"\\?\n#\s*", "", header(path))
    assert name(path) in text, f"{name(path)} is not in its comment"
    for program in PROGRAM.findall(text):
        assert find_program(program)
    for given in re.findall(r"--config_file (\S+)", text):
        assert (ROOT / given).is_file()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_recipe_names_the_stage_that_reads_it(path: Path) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "stage" in written and written["stage"] in MODELS:
        assert written["stage"] == program_of(path)


@pytest.mark.parametrize(
    "path", [path for path in FILES if program_of(path) == "pipeline"], ids=name
)
def test_every_step_of_a_pipeline_gets_a_recipe_that_loads(path: Path) -> None:
    jobs = expand(load_recipe(path, PipelineRecipe))
    assert jobs
    folders: dict[str, str] = {}
    for job in jobs:
        assert job.step.program == COMMAND or find_program(job.step.program)
        for word in job.step.launch:
            assert not word.endswith(".yaml") or Path(word).is_file()
        if job.step.recipe is None:
            continue
        recipe = check(Path(job.recipe[0]), job.step.program, job.recipe[1:])
        if isinstance(recipe, RunRecipe):
            other = folders.setdefault(recipe.output_dir, job.name)
            assert other == job.name, f"{job.name} and {other} write {recipe.output_dir}"
            _, accumulation = shares_of_a_step(recipe, processes_of(job.step.launch))
            assert accumulation == 1 or not recipe.contrastive, job.name


def processes_of(launch: list[str]) -> int:
    """How many processes a step's launcher starts."""
    files = [word for word in launch if word.endswith(".yaml")]
    counts = [yaml.safe_load((ROOT / file).read_text())["num_processes"] for file in files]
    counts += [
        int(n) for word, n in pairwise(launch) if word in {"--nproc_per_node", "--num_processes"}
    ]
    return counts[-1] if counts else 1


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_an_accelerate_file_is_known_to_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == {"ddp": 8, "zero2": 8, "zero3": 8, "multinode": 16}.get(
        path.stem, 2
    )
    if "zero" in path.stem or path.stem == "multinode":
        stage = 2 if "zero2" in path.stem else 3
        assert config.deepspeed_config["zero_stage"] == stage
        assert config.deepspeed_config.get("zero3_init_flag") is (stage == 3)
    if config.num_machines > 1:
        # Without it accelerate looks for pdsh and a host file.
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def load(path: str, program: str) -> Any:
    return check(ROOT / path, program, [])


def test_t74_no_recipe_trains_in_fp16() -> None:
    for path in [*FILES, *ACCELERATE]:
        values = yaml.safe_load(path.read_text())
        assert "fp16" not in values.get("trainer", {}), path
        assert values.get("mixed_precision") != "fp16", path


def test_llava15_has_the_papers_values() -> None:
    first = load("recipes/llava15/stage3.yaml", "stage3_projector")
    second = load("recipes/llava15/stage4.yaml", "stage4_instruction")
    assert (first.global_batch_size, second.global_batch_size) == (256, 128)
    assert first.trainable == {"multi_modal_projector": 1e-3}
    assert second.trainable == {"multi_modal_projector": 2e-5, "language_model": 2e-5}
    assert (first.vlm.image_aspect_ratio, second.image_aspect_ratio) == ("square", "pad")
    assert first.vlm.vision_feature_layer == -2
    for recipe in (first, second):
        assert recipe.max_length_tokens == 2048
        assert recipe.trainer["warmup_steps"] == 0.03
        assert recipe.trainer["weight_decay"] == 0.0
        assert recipe.trainer["lr_scheduler_type"] == "cosine"
    assert second.checkpoint == f"{first.output_dir}/model"
    for other, same in (("stage3_llm2clip", first), ("stage4_llm2clip", second)):
        variant = load(f"recipes/llava15/{other}.yaml", same.stage)
        assert variant.trainer == same.trainer
        assert variant.output_dir != same.output_dir


def test_paper_and_released_code_differ_where_they_do() -> None:
    paper = load("recipes/paper_v6/stage2b.yaml", "stage2b_vision_encoder")
    code = load("recipes/released_code/stage2b.yaml", "stage2b_vision_encoder")
    assert (paper.trainer["num_train_epochs"], code.trainer["num_train_epochs"]) == (4, 20)
    assert (paper.layer_decay, code.layer_decay) == (1.0, 0.85)
    assert paper.global_batch_size == code.global_batch_size == 4096
    assert set(code.caption_weights) == {"shortSV_captions", "longSV_captions"}
    dense = sum(v for k, v in paper.caption_weights.items() if k != "raw_caption")
    assert paper.caption_weights["raw_caption"] == dense, "half real, half dense"
    first = load("recipes/paper_v6/stage1.yaml", "stage1_text_encoder")
    second = load("recipes/released_code/stage1.yaml", "stage1_text_encoder")
    assert (first.global_batch_size, second.global_batch_size) == (2048, 512)


STAGE2B = sorted(
    path
    for folder in ("paper_v6", "released_code")
    for path in (ROOT / "recipes" / folder).glob("stage2b*")
)


@pytest.mark.parametrize("path", STAGE2B, ids=name)
def test_stages_of_a_folder_fit_together(path: Path) -> None:
    """A stage 2b finds every text in the cache of a stage 2a, which reads a stage 1's encoder."""
    stages = {
        kind: [check(other, program, []) for other in sorted(path.parent.glob(f"{kind}*.yaml"))]
        for kind, program in (
            ("stage0", "stage0_mntp"),
            ("stage1", "stage1_text_encoder"),
            ("stage2a", "stage2a_cache_text"),
        )
    }
    stage2b = load(name(path), "stage2b_vision_encoder")
    if stage2b.text_in_loop is None:
        (stage2a,) = (r for r in stages["stage2a"] if r.output_dir == stage2b.embedding_cache)
        cached = {(s.path, field) for s in stage2a.sources for field in s.fields}
        sources = (*stage2b.train, *stage2b.evaluation)
        assert {(s.path, field) for s in sources for field in s.fields} <= cached
        encoder = stage2a.text_encoder
        assert stage2a.deviations
    else:
        encoder = stage2b.text_in_loop.text_encoder
    (stage1,) = (r for r in stages["stage1"] if f"{r.output_dir}/text_encoder" == encoder)
    model = stage1.text_encoder.language_model
    assert not model.startswith("runs/") or model in {
        f"{stage0.output_dir}/language_model" for stage0 in stages["stage0"]
    }
    assert stage1.deviations
    assert stage2b.deviations


def test_the_variants_are_there() -> None:
    """Three scales of data, five towers, two LLMs."""
    towers = {load(name(path), "stage2b_vision_encoder").vision_tower for path in STAGE2B}
    assert towers == {
        "openai/clip-vit-base-patch16",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14-336",
        "models/eva02-clip-l14-336",
        "google/siglip2-so400m-patch14-224",
    }
    stems = {path.stem for path in STAGE2B if path.parent.name == "paper_v6"}
    assert {"stage2b_3m", "stage2b", "stage2b_60m", "stage2b_llama32_1b"} <= stems


def test_every_stage4_of_llava15_starts_from_a_stage3() -> None:
    folder = ROOT / "recipes" / "llava15"
    made = {
        f"{load(name(path), 'stage3_projector').output_dir}/model"
        for path in folder.glob("stage3*.yaml")
    }
    for path in folder.glob("stage4*.yaml"):
        assert load(name(path), "stage4_instruction").checkpoint in made, path


def test_a_typing_error_is_refused() -> None:
    with pytest.raises(RecipeError, match="trainable"):
        load_recipe(
            ROOT / "recipes/llava15/stage3.yaml",
            MODELS["stage3_projector"],
            ["trainable.projector=1.0e-3"],
        )
