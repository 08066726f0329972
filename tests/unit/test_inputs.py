"""Everything that a recipe names and is not there, in one list, before anything begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.runs import inputs
from llm2clip_vlm.runs.inputs import (
    InputsError,
    missing_inputs,
    reader_of,
    require_inputs,
    writer_of,
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tower, an LLM (configs alone) and a data file."""
    for name in ("tower", "llm"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


STAGE3 = {
    "stage": "stage3_projector",
    "output_dir": "out",
    "vlm": {"vision_tower": "models/tower", "language_model": "models/llm"},
    "data": [{"path": "data.json", "image_root": "images"}],
    "trainable": {"multi_modal_projector": 1e-3},
}


def problems(values: dict[str, Any], *overrides: str) -> list[str]:
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe("recipe.yaml", RECIPES[values["stage"]], overrides)
    return list(missing_inputs(recipe, "recipe.yaml"))


def test_complete_inputs_are_no_problem(work: Path) -> None:
    assert problems(STAGE3) == []


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.0.path=none.json", "data.0.path: none.json: no such file"),
        ("data.0.path=none/*.tar", "data.0.path: none/*.tar: no such file"),
        ("data=[]", "data: expected at least one, got an empty list"),
        ("data.0.image_root=pics", "data.0.image_root: pics: no such folder"),
        ("vlm.vision_tower=models/no", "vlm.vision_tower: models/no: no such folder (from"),
        ("vlm.vision_tower=./x/y", "vlm.vision_tower: ./x/y: no such folder (from"),
        ("vlm.vision_tower=models", "no config.json in this folder; did you mean models/llm?"),
        ("vlm.language_model=org/name", "HF_HUB_OFFLINE is set; where there is a network: hf down"),
        ("vlm.projector=runs/x/model", "vlm.projector: runs/x/model: no such folder"),
        ("vlm.chat_template=own.jinja", "vlm.chat_template: own.jinja: no such file"),
        ("trainer.report_to=wandb", "pip install wandb"),
        ("trainer.report_to=[none,trackio]", "pip install trackio"),
        ("trainer.deepspeed=ds.json", "trainer.deepspeed: ds.json: no such file"),
        ("trainer.optim=adamw_bnb_8bit", "pip install bitsandbytes"),
        ("trainer.use_liger_kernel=true", "pip install liger_kernel"),
        (f"data.0.path={'a' * 5000}", "no such file"),
        (f"vlm.vision_tower=./{'a' * 300}", "no such folder"),
    ],
)
def test_each_missing_thing_has_its_key(work: Path, override: str, wanted: str) -> None:
    (found,) = problems(STAGE3, override)
    assert wanted in found


def test_all_problems_come_in_one_error(work: Path) -> None:
    values = {**STAGE3, "vlm": {"vision_tower": "models/no", "language_model": "models/no2"}}
    values["data"] = [{"path": "a.json"}, {"path": "b.json"}]
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputsError, match="4 things are missing") as caught:
        require_inputs(load_recipe("recipe.yaml", RECIPES["stage3_projector"]))
    assert {line.partition(":")[0] for line in caught.value.problems} == {
        "vlm.vision_tower",
        "vlm.language_model",
        "data.0.path",
        "data.1.path",
    }


def test_the_stage_that_writes_it_is_named(work: Path) -> None:
    Path("first.yaml").write_text("stage: stage2b_vision_encoder\noutput_dir: runs/mine/2b\n")
    Path("again.yaml").write_text("base: first.yaml\noutput_dir: runs/mine/again\n")
    (found,) = problems(STAGE3, "vlm.vision_tower=runs/mine/again/vision_tower")
    assert found.endswith(
        "run that stage first: llm2clip-vlm train stage2b_vision_encoder again.yaml"
    )
    (found,) = problems(STAGE3, "vlm.vision_tower=runs/paper_v6/stage2b/vision_tower")
    assert found.endswith("train stage2b_vision_encoder recipes/paper_v6/stage2b.yaml")
    Path("runs/mine/again/vision_tower").mkdir(parents=True)  # begun, not finished
    (found,) = problems(STAGE3, "vlm.vision_tower=runs/mine/again/vision_tower")
    assert "no config.json in this folder; run that stage first" in found
    assert writer_of("elsewhere/x", "recipe.yaml") is None


def test_a_shipped_parent_says_what_its_child_is(work: Path) -> None:
    Path("mine.yaml").write_text('base: "paper_v6/stage2b"\noutput_dir: runs/mine/2b\n')
    (found,) = problems(STAGE3, "vlm.vision_tower=runs/mine/2b/vision_tower")
    assert found.endswith("llm2clip-vlm train stage2b_vision_encoder mine.yaml")


def test_a_folder_of_models_is_no_hub_id_before_it_is_there(work: Path) -> None:
    Path("models").rename("kept")
    words = ("vlm.language_model=kept/llm", "vlm.vision_tower=models/eva02-clip-l14-336")
    (found,) = problems(STAGE3, *words)
    assert "write it first" in found and "hf download" not in found


def test_a_recipe_beside_it_that_is_its_own_parent_is_no_obstacle(work: Path) -> None:
    Path("round.yaml").write_text(f"base: ../{work.name}/round.yaml\n")
    (found,) = problems(STAGE3, "vlm.vision_tower=runs/no/x")
    assert found.startswith("vlm.vision_tower: runs/no/x: no such folder")


def test_the_recipe_that_reads_what_another_writes(work: Path, repo_root: Path) -> None:
    folder = repo_root / "recipes" / "llava15"
    for ending in ("", "_eva02", "_qwen25_0_5b"):
        found = reader_of("stage4_instruction", folder / f"stage3{ending}.yaml")
        assert found == f"recipes/llava15/stage4{ending}.yaml"
    Path("before.yaml").write_text("stage: stage3_projector\noutput_dir: runs/a\n")
    Path("other.yaml").write_text("stage: stage4_instruction\ncheckpoint: runs/ab/model\n")
    assert reader_of("stage4_instruction", "before.yaml") is None
    Path("next.yaml").write_text("base: other.yaml\ncheckpoint: runs/a/model\n")
    assert reader_of("stage4_instruction", "before.yaml") == "next.yaml"
    assert reader_of("stage4_instruction", "none.yaml") is None


def test_a_mixture_names_its_own_missing_files(work: Path) -> None:
    Path("mix.yaml").write_text(json.dumps({"datasets": [{"json_path": "no.json"}]}))
    (found,) = problems(STAGE3, "data.0.path=mix.yaml")
    assert "mix.yaml: no.json: no such file" in found


def test_a_cache_that_fills_itself_may_be_absent(work: Path) -> None:
    values = {
        "stage": "stage2b_vision_encoder",
        "output_dir": "out",
        "vision_tower": "models/tower",
        "embedding_cache": "cache",
        "train": [{"path": "data.json"}],
    }
    assert problems(values) == ["embedding_cache: cache: no cache of stage 2a there"]
    assert problems(values, "write_through=models/llm") == []
    Path("text.yaml").write_text("stage: stage1_text_encoder\noutput_dir: runs/text\n")
    Path("runs/text").mkdir(parents=True)  # finished, and no cache
    (found,) = problems(values, "embedding_cache=runs/text")
    assert found == "embedding_cache: runs/text: no cache of stage 2a there"
    assert problems(values, "write_through={language_model: models/none}") != []


def test_space_and_permission(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    (work / "models/llm/model.safetensors").write_bytes(b"0" * 1000)
    free = inputs._LEAST_DISK_BYTES + 1999  # it is composed first, and at the end exported
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda _: usage(0, 0, free))
    (found,) = problems(STAGE3)
    assert "output_dir: out: 0.1 GB are free there" in found
    Path("out").mkdir()
    Path("out/manifest.json").write_text("{}")  # what is needed may be there already
    assert problems(STAGE3) == []
    monkeypatch.setattr(inputs.os, "access", lambda *_: False)
    (found,) = problems(STAGE3)
    assert "no permission to write in out" in found


@pytest.mark.parametrize(
    ("status", "wanted"),
    [(200, None), (None, "does not answer"), (401, "log in"), (404, "has no model of that name")],
)
def test_what_the_hub_says(
    work: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, wanted: str | None
) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(inputs, "ask_hub", lambda path: asked.append(path) or status)
    inputs._missing_on_hub.cache_clear()
    found = inputs.missing_model(f"org/answers-{status}")
    assert (found is None) if wanted is None else (wanted in str(found))
    assert asked == [f"api/models/org/answers-{status}/auth-check"]


def test_train_asks_before_torch_is_imported(work: Path) -> None:
    """And leaves no output directory behind."""
    Path("recipe.yaml").write_text(yaml.safe_dump({**STAGE3, "data": [{"path": "no.json"}]}))
    code = (
        "import sys; from llm2clip_vlm.cli import main; "
        "code = main(['train', 'stage3_projector', 'recipe.yaml']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert ended.returncode == 2 and "data.0.path: no.json: no such file" in ended.stderr
    assert not Path("out").exists()
