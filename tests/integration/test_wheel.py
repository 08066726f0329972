"""The wheel: what it holds, and that its command works far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llm2clip_vlm import cli

pytestmark = pytest.mark.slow

SOURCES = ("llm2clip_vlm", "stages", "recipes", "eval", "demo", "pyproject.toml", "README.md")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in SOURCES:
        place = repo_root / name
        if place.is_dir():
            junk = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(place, source / name, ignore=junk)
        elif place.is_file():
            shutil.copy(place, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_pip_finds_versions_for_every_extra(wheel: Path, repo_root: Path) -> None:
    """What README tells people to type resolves: no pin is in the way of what an extra asks for."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "-c"]
    words = [*pip, repo_root / "constraints/cpu.txt", f"{wheel}[train,eval,app,remote,timm]"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode and "conflict" not in done.stderr:
        pytest.skip(f"no package index here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    run(*pip, wheel, cwd=target.parent)
    return target


def command(installed: Path, *words: str | Path, cwd: Path) -> str:
    """Run the installed command; the checkout must not be what is imported."""
    code = (
        "import sys, llm2clip_vlm.cli as cli;"
        f"assert cli.__file__.startswith({str(installed)!r}), cli.__file__;"
        "sys.exit(cli.main())"
    )
    # -P keeps the working directory out, PYTHONPATH comes before an editable install's finder.
    return run(sys.executable, "-P", "-c", code, *words, cwd=cwd, PYTHONPATH=str(installed)).stdout


def test_the_wheel_holds_nothing_but_the_package(wheel: Path, repo_root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "llm2clip_vlm",
        f"llm2clip_vlm-{cli.__version__}.dist-info",
    }
    assert "llm2clip_vlm/py.typed" in names
    for folder, mapped in (("stages", "stages"), ("recipes", "recipes"), ("eval", "eval_assets")):
        for file in (repo_root / folder).rglob("*"):
            hidden = file.name.startswith(".") or "__pycache__" in file.parts
            if file.is_file() and not hidden:
                place = file.relative_to(repo_root / folder).as_posix()
                assert f"llm2clip_vlm/{mapped}/{place}" in names, place
    for file in (repo_root / "llm2clip_vlm").rglob("*.py"):
        assert file.relative_to(repo_root).as_posix() in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_entry_points_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "llm2clip-vlm = llm2clip_vlm.cli:main" in text
    assert "llm2clip_vlm = llm2clip_vlm.evaluation.vlm:manifest" in text


def test_the_command_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    assert "stage4_instruction" in command(installed, "train", "--help", cwd=tmp_path)
    if (installed / "llm2clip_vlm" / "stages" / "stage3_projector.py").is_file():
        text = command(installed, "help", "stage3_projector", cwd=tmp_path)
        assert "Recipe keys (Stage3Recipe)" in text


def test_a_stage_runs_elsewhere(
    installed: Path, tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    """Stage 3, two steps on three records, with the recipe and data of somebody else."""
    from tests.tiny import write_image

    if not (installed / "llm2clip_vlm" / "stages" / "stage3_projector.py").is_file():
        pytest.skip("stages/stage3_projector.py is not there")
    rows = []
    for index in range(4):
        write_image(tmp_path / "images" / f"{index}.png", seed=index)
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the star ?"},
            {"from": "gpt", "value": "a red star"},
        ]
        rows.append({"id": str(index), "image": f"images/{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
stage: stage3_projector
output_dir: out
global_batch_size: 2
vlm: {{vision_tower: {tiny_clip}, language_model: {tiny_llm}}}
data: [{{path: data.json}}]
max_length_tokens: 64
trainable: {{multi_modal_projector: 1e-3}}
trainer: {{per_device_train_batch_size: 2, max_steps: 100}}
"""
    )
    command(
        installed, "train", "stage3_projector", "recipe.yaml", "trainer.max_steps=2", cwd=tmp_path
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "stage3_projector"
    assert manifest["recipe"]["trainer"]["max_steps"] == 2
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_shipped_suites_and_pipelines_are_found_elsewhere(installed: Path, tmp_path: Path) -> None:
    told = command(
        *(installed, "eval", "--suite", "demo/suites/world.yaml", "--tasks", "demo/tasks"),
        *("--prefetch",),
        cwd=tmp_path,
    )
    assert "l2c_world" in told
    code = (
        "from llm2clip_vlm.pipeline import Pipeline;"
        "from llm2clip_vlm.recipe.reading import load_recipe;"
        "from llm2clip_vlm.recipe.pipeline import PipelineRecipe;"
        "made = Pipeline(load_recipe('recipes/demo/pipeline.yaml', PipelineRecipe));"
        "made._refuse_thawed();"
        "print(*(word for job in made.jobs for word in job.command()))"
    )
    words = run(
        sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)
    ).stdout.split()
    assert f"{installed}/llm2clip_vlm/recipes/accelerate/zero2_cpu.yaml" in words
    assert not [word for word in words if word.startswith(("recipes/", "eval/", "demo/"))]


def test_what_is_shipped_is_found_by_its_name(installed: Path, tmp_path: Path) -> None:
    """Without a checkout: suites, recipes, accelerate's files, templates."""
    told = command(installed, "eval", "--suite", "llava15", "--prefetch", cwd=tmp_path)
    assert "hf download --repo-type dataset" in told
    code = (
        "import os, torch, types; from llm2clip_vlm import cli;"
        "from llm2clip_vlm.chat.template import find_chat_template;"
        "none = types.SimpleNamespace(chat_template=None);"
        "assert 'ASSISTANT' in find_chat_template('vicuna_v1', none);"
        "cli._require_inputs = lambda *_: None;"
        "torch.cuda.device_count = lambda: 8;"
        "os.execv = lambda path, words: None;"
        "cli.main(['train', 'stage4', 'llava15/stage4', '--gpus', '8'])"
    )
    line = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert f"{installed}/llm2clip_vlm/recipes/accelerate/zero3.yaml" in line
    assert f"{installed}/llm2clip_vlm/stages/stage4_instruction.py" in line


def test_init_from_the_wheel_makes_a_folder_whose_files_come_first(
    installed: Path, tmp_path: Path
) -> None:
    command(installed, "init", tmp_path / "mine", "--recipe", "real", cwd=tmp_path)
    files = {str(f.relative_to(tmp_path / "mine")) for f in (tmp_path / "mine").rglob("*.*")}
    assert {"README.md", "recipes/real/pipeline.yaml", "recipes/real/chat_template.jinja"} <= files
    assert {"recipes/real/gpu/stage3.yaml", "eval/suites/real.yaml"} <= files
    code = (
        "from llm2clip_vlm.pipeline import Pipeline;"
        "from llm2clip_vlm.recipe.reading import load_recipe;"
        "from llm2clip_vlm.recipe.pipeline import PipelineRecipe;"
        "made = Pipeline(load_recipe('recipes/real/pipeline.yaml', PipelineRecipe));"
        "print(*(word for job in made.jobs for word in job.recipe))"
    )
    words = run(
        sys.executable, "-P", "-c", code, cwd=tmp_path / "mine", PYTHONPATH=str(installed)
    ).stdout.split()
    assert "recipes/real/stage3.yaml" in words, "the copy, not the package's"
