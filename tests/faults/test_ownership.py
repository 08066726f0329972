"""Stages beside somebody else's files, beside each other, and after their data were changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.models.vlm import building
from llm2clip_vlm.runs.inputs import InputsError
from llm2clip_vlm.runs.manifest import PARENTS_NAME, RESOLVED_NAME, HandoffError
from llm2clip_vlm.runs.ownership import MARKER_NAME, OwnershipError
from llm2clip_vlm.training.vlm import vlm_run
from tests.tiny import CHAT_TEMPLATE
from tests.vlm_fixtures import run_here, write_llava, write_recipe

Three = Callable[..., Path]


@pytest.fixture
def three(tmp_path: Path, tiny_clip: Path, tiny_llm: Path) -> Three:
    """Writes a recipe of stage 3 with other values."""
    write_llava(tmp_path)

    def write(**values: Any) -> Path:
        return write_recipe(
            tmp_path / "recipe.yaml",
            **{
                "output_dir": str(tmp_path / "out"),
                "vlm": {"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)},
                "data": [{"path": str(tmp_path / "llava.json")}],
                "trainable": {"multi_modal_projector": 1e-2},
                **values,
            },
        )

    return write


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARKER_NAME)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


FOREIGN = (
    "composed/mine.bin",
    "checkpoints/checkpoint-2/mine.bin",
    "model/model.safetensors",
    "adapter/mine.bin",
    "metrics.jsonl",
    "results.json",
    "manifest.json",
    "thesis.txt",
)


def test_a_folder_of_foreign_files_is_refused(tmp_path: Path, three: Three) -> None:
    for name in FOREIGN:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"mine": 1}')
        before = content(tmp_path / "out")
        refusal = HandoffError if name == MANIFEST_NAME else OwnershipError
        with pytest.raises(refusal, match=name.split("/")[0]):
            run_here("stage3_projector", three())
        assert content(tmp_path / "out") == before
        assert not (tmp_path / "out" / MARKER_NAME).exists()
        shutil.rmtree(tmp_path / "out")


def test_data_are_looked_for_before_anything_is_made(tmp_path: Path, three: Three) -> None:
    with pytest.raises(InputsError, match=r"none\.json: no such file"):
        run_here("stage3_projector", three(data=[{"path": str(tmp_path / "none.json")}]))
    for wrong in ({"image_root": str(tmp_path / "images")}, {"path": str(tmp_path / "no.json")}):
        (tmp_path / "no.json").write_text('[{"id": 1}]')
        source = {"path": str(tmp_path / "llava.json"), **wrong}
        with pytest.raises(RecordError, match=r"no usable record; the first is .*json:"):
            run_here("stage3_projector", three(data=[source]))
    assert content(tmp_path / "out") == {}


LATE: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": ({"trainable": {"language_model": {"lr": 1e-2, "last_blocks": 99}}}, "last blocks"),
    "adapter": ({"language_model_lora": {"r": 2}}, "language_model_lora: trainable has no"),
    "layers": (
        {"trainable": {"language_model": 1e-3}, "language_model_lora": {"r": 2,
         "target_modules": ["nope"]}}, "nope"),
    "length": ({"max_length_tokens": 8}, "no usable record; the first is .*beyond max_length"),
    "measuring": ({"trainer": {"eval_strategy": "steps", "eval_steps": 1}}, "eval_strategy"),
    "pictures": ({"data": [{"path": "llava.json", "image_root": "lfs"}]}, "does not decode"),
    "template": ({"vlm": {"chat_template": "{% for m in messages %}{{ m"}}, "end of print"),
    "answers": ({"vlm": {"chat_template": "{% for m in messages %}x{% endfor %}"}}, "generation"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_what_cannot_be_trained_is_not_composed(
    tmp_path: Path, three: Three, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes would be written before the message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lfs" / "images").mkdir(parents=True)
    for image in (tmp_path / "images").iterdir():
        (tmp_path / "lfs" / "images" / image.name).write_text("version https://git-lfs.github.com")
    values, told = LATE[name]
    recipe = yaml.safe_load(three().read_text())
    vlm = recipe["vlm"] | values.get("vlm", {})
    with pytest.raises(ValueError, match=told):
        run_here("stage3_projector", three(**values | {"vlm": vlm}))
    assert not (tmp_path / "out" / "composed").exists()


def test_a_template_is_looked_for_before_the_weights(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "load_complete", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(ValueError, match="chat_template 'vicuna' is neither"):
        building.build_vlm(tiny_clip, tiny_llm, chat_template="vicuna")


def test_a_refused_run_leaves_its_folder_to_the_next(tmp_path: Path, three: Three) -> None:
    recipe = three(trainable={"language_model": {"lr": 1e-2, "last_blocks": 99}})
    with pytest.raises(ValueError, match="last blocks of language_model"):
        run_here("stage3_projector", recipe)
    run_here("stage3_projector", three())
    assert (tmp_path / "out" / MANIFEST_NAME).is_file()
    with pytest.raises(HandoffError, match="holds a run with another recipe: seed"):
        run_here("stage3_projector", three(seed=5))


def test_a_run_from_start_to_end(
    tmp_path: Path, three: Three, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user adds stays; what is changed is named; what is gone is made again."""
    out = tmp_path / "out"
    run_here("stage3_projector", three())
    made = content(out)
    assert not (out / "composed").exists()
    mine = ("notes.txt", "model/README.md", "checkpoints/checkpoint-4/notes.txt")
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    capsys.readouterr()
    run_here("stage3_projector", three())
    assert "nothing to do" in capsys.readouterr().out

    (out / "model" / "model.safetensors").unlink()
    run_here("stage3_projector", three())
    assert "nothing to do" not in capsys.readouterr().out
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == made[weights]
    assert all((out / name).read_text() == "mine" for name in mine)

    for name in (weights, "model/config.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-5])
        with pytest.raises(HandoffError, match=rf"{name} was changed after stage3_projector wrote"):
            run_here("stage3_projector", three())
        assert (out / name).read_bytes() == whole[:-5]
        (out / name).write_bytes(whole)
    run_here("stage3_projector", three())
    assert "nothing to do" in capsys.readouterr().out

    moved = tmp_path / "elsewhere"
    shutil.copytree(out, moved, copy_function=shutil.copyfile)  # other dates
    run_here("stage3_projector", three(output_dir=str(moved)))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("killed", [True, False])
def test_other_data_are_refused(tmp_path: Path, three: Three, killed: bool) -> None:
    out, data = tmp_path / "out", tmp_path / "llava.json"
    saving = {"save_strategy": "steps", "save_steps": 2} if killed else {}
    recipe = three(trainer=saving)
    run_here("stage3_projector", recipe)
    if killed:
        shutil.rmtree(out / "checkpoints" / "checkpoint-4")
        (out / MANIFEST_NAME).unlink()
        shutil.rmtree(out / "model")
    before, rows = content(out), json.loads(data.read_text())
    for changed in (rows[:-1], rows[::-1], [*rows, rows[0]]):
        data.write_text(json.dumps(changed))
        with pytest.raises(HandoffError, match=rf"other data \(data\.0\): {data} has been changed"):
            run_here("stage3_projector", recipe)
        assert content(out) == before
    data.unlink()
    with pytest.raises(InputsError, match=r"llava\.json: no such file"):
        run_here("stage3_projector", three())


@pytest.mark.parametrize("name", ["llava.json", "mine.jinja"])
def test_what_a_recipe_names_at_second_hand_is_watched(
    tmp_path: Path, three: Three, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture's files, and a file with the chat template."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: llava.json}]")
    recipe = three(data=[{"path": "mix.yaml", "image_root": "."}])
    values = yaml.safe_load(recipe.read_text())
    values["vlm"]["chat_template"] = "mine.jinja"
    recipe.write_text(yaml.safe_dump(values))
    run_here("stage3_projector", recipe)
    (tmp_path / name).write_text((tmp_path / name).read_text() + " ")
    with pytest.raises(HandoffError, match=rf"other data \(.*\): {name} has been changed"):
        run_here("stage3_projector", recipe)


def test_what_a_killed_run_composed_is_replaced_but_nothing_of_mine(
    tmp_path: Path, three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(vlm_run, "build_vlm_data", lambda *_, **__: 1 / 0)  # after composing
        with pytest.raises(ZeroDivisionError):
            run_here("stage3_projector", three())
    assert (out / "composed" / "model.safetensors").is_file()
    (out / "composed" / "mine.bin").write_text("mine")
    with pytest.raises(OwnershipError, match=r"composed holds what no run .*: mine\.bin"):
        run_here("stage3_projector", three())
    assert (out / "composed" / "mine.bin").read_text() == "mine"
    (out / "model").mkdir()
    (out / "model" / "mine.bin").write_text("mine")
    with pytest.raises(OwnershipError, match="model"):  # no run has come so far
        run_here("stage3_projector", three())
    assert {PARENTS_NAME, RESOLVED_NAME} <= content(out).keys()


def test_a_refused_build_leaves_the_recipe_of_the_cache(tmp_path: Path, tiny_llm: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"image": "a.png", "captions": "a red dog"}')
    values: dict[str, Any] = {"stage": "stage2a_cache_text", "output_dir": str(tmp_path / "out")}
    values |= {"sources": [{"path": str(tmp_path / "c.jsonl")}]}
    recipe, kept = tmp_path / "r.yaml", tmp_path / "out" / RESOLVED_NAME
    recipe.write_text(yaml.safe_dump(values | {"text_encoder": {"language_model": str(tiny_llm)}}))
    run_here("stage2a_cache_text", recipe)
    before = kept.read_text()
    other = {"language_model": str(tiny_llm), "pooling": "last"}
    recipe.write_text(yaml.safe_dump(values | {"text_encoder": other}))
    with pytest.raises(ValueError, match="embeddings of two encoders never share a cache"):
        run_here("stage2a_cache_text", recipe)
    assert kept.read_text() == before


def test_a_refused_run_leaves_no_folder(tmp_path: Path, three: Three) -> None:
    """And the corrected command finds nothing in its way."""
    code = "import sys; from llm2clip_vlm.cli import main; sys.exit(main(sys.argv[1:]))"
    trainable = {"language_model": {"lr": 1e-3, "last_blocks": 99}}  # known once it is composed
    words = ["train", "stage3_projector", str(three(trainable=trainable))]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "last blocks of language_model" in ended.stderr
    assert not (tmp_path / "out").exists()
