"""The road of `recipes/real_mini` on real photographs and texts, a few steps a stage."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPO_ROOT

RECIPES = REPO_ROOT / "recipes" / "real_mini"
FEW = {"trainer.max_steps": 2, "trainer.warmup_steps": 0, "trainer.save_strategy": "no"}
SHORT: dict[str, dict[str, Any]] = {
    "prepare": {"easy_vqa_test_images": 3},
    "stage1": {"global_batch_size": 8, "train.0.limit": 40, "train.1.limit": 40}
    | {"evaluation.0.limit": 40, "trainer.per_device_train_batch_size": 8},
    "stage2a": {},
    "stage2b": {"global_batch_size": 8, "train.0.limit": 16, "evaluation.0.limit": 20}
    | {"trainer.per_device_train_batch_size": 8},
    "stage3": {"data.0.limit": 8, "global_batch_size": 4, "trainer.per_device_train_batch_size": 4},
    "stage4": {"data.0.limit": 8, "data.1.limit": 8, "global_batch_size": 4}
    | {"trainer.per_device_train_batch_size": 4},
}


def program() -> Any:
    from llm2clip_vlm.programs import find_program, load_program

    return load_program(find_program("prepare_real_mini", REPO_ROOT))


def shortened(out: Path) -> Path:
    """The shipped pipeline with a few steps a stage; everything below `out`."""
    recipe = yaml.safe_load((RECIPES / "pipeline.yaml").read_text(encoding="utf-8"))
    recipe["output_dir"] = str(out / "run")
    recipe["variables"]["result"] = str(out / "result.json")
    for step in recipe["steps"]:
        few = SHORT.get(step["name"].removesuffix("-shuffled"), {})
        trains = step["name"].startswith("stage") and step["name"] != "stage2a"
        step.setdefault("overrides", {}).update({**few, **(FEW if trains else {})})
        if step["name"] == "lmms-eval":
            # A model of two steps says nothing that could be wrong.
            step["arguments"].append("max_empty=1.0")
    path = out / "pipeline.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")
    out = tmp_path_factory.mktemp("real_mini")
    done = subprocess.run(
        [sys.executable, "stages/pipeline.py", str(shortened(out))],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "LLM2CLIP_SHARED_DATA": str(shared_data)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_road_ends_with_its_figures(run: Path) -> None:
    found = json.loads((run / "result.json").read_text())
    assert set(found["goals"]) == {
        "retrieval_r1_above_chance",
        "retrieval_r10_above_chance",
        "easy_vqa_above_majority",
        "easy_vqa_above_shuffled",
    }
    assert found["retrieval"]["i2t"]["queries"] == 20
    assert found["l2c_easy_vqa"]["images"] == 3
    assert found["l2c_easy_vqa"]["majority"]["answer"] in {"yes", "no"}
    assert set(found["l2c_photo_vqa"]["real"]["by_type"]) == {"presence", "count", "human"}
    assert found["cra"]["queries"] == 40
    assert {"stage1", "stage4", "stage4-shuffled", "lmms-eval"} <= set(found["seconds"])


@pytest.mark.slow
def test_nothing_that_is_measured_is_trained_on(run: Path, shared_data: Path) -> None:
    data = run / "run" / "data"
    held_out = {row["id"] for row in rows(data / "photos_held_out.jsonl")}
    captions = {text for row in rows(data / "photos_held_out.jsonl") for text in row["captions"]}
    trained = rows(data / "photos_train.jsonl")
    assert len(trained) > 1000 and len(held_out) > 300
    assert not held_out & {row["id"] for row in trained}
    # Few captions are so common that people wrote them twice.
    shared = captions & {text for row in trained for text in row["captions"]}
    assert len(shared) < 0.01 * len(captions)

    splits = {
        row["image"]: row["split"]
        for row in map(json.loads, (shared_data / "coco_mini" / "index.jsonl").open())
    }
    for record in json.loads((data / "photo_vqa_train.json").read_text()):
        assert splits[record["image"].removeprefix("coco_mini/")] == "train"
    asked = rows(data / "photo_vqa_test.jsonl")
    assert {splits[row["image"].removeprefix("photos/")] for row in asked} == {"val", "test"}
    for name in ("easy_vqa_test", "photo_vqa_test"):
        for row in rows(data / f"{name}.jsonl"):
            assert (data / row["image"]).is_file() and not (data / row["image"]).is_symlink()
    asked = rows(data / "easy_vqa_test.jsonl")
    assert {row["split"] for row in asked} == {"test"}
    records = json.loads((data / "easy_vqa_train.json").read_text())
    assert {record["image"].split("/")[1] for record in records} == {"train"}
    recipe = yaml.safe_load((RECIPES / "prepare.yaml").read_text())
    turns = {len(record["conversations"]) for record in records}
    assert max(turns) == 2 * recipe["turns_per_conversation"]


@pytest.mark.slow
def test_stage_1_leaves_out_captions_of_held_out_photographs(run: Path) -> None:
    from llm2clip_vlm.config import Stage1Recipe
    from llm2clip_vlm.data.bad_records import BadRecords
    from llm2clip_vlm.data.captions import read_captions
    from llm2clip_vlm.recipe import load_recipe

    data = run / "run" / "data"
    coco = str(data / "source" / "text" / "coco_val2017_captions.jsonl.gz")
    recipe = load_recipe(RECIPES / "stage1.yaml", Stage1Recipe, [f"train.0.path={coco}"])
    trained = {record.key for record in read_captions(recipe.train[0], BadRecords())}
    everything = recipe.train[0].model_copy(update={"drop_where": {}})
    dropped = {r.key for r in read_captions(everything, BadRecords())} - trained
    held_out = {row["id"] for row in rows(data / "photos_held_out.jsonl")}
    ours = {str(int(i.split("/")[1])) for i in held_out if i.startswith("coco_mini/")}
    assert len(dropped) > 90 and dropped <= ours
    assert not trained & ours


@pytest.mark.slow
def test_both_vlms_differ_in_their_pictures_alone(run: Path) -> None:
    recipes = [
        yaml.safe_load((run / "run" / name / "recipe.resolved.yaml").read_text())
        for name in ("stage4", "stage4_shuffled")
    ]
    for recipe, shuffled in zip(recipes, (False, True), strict=True):
        assert [source.pop("shuffle_images") for source in recipe["data"]] == [shuffled] * 2
        del recipe["output_dir"]
    assert recipes[0] == recipes[1]


def tar_with(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_only_named_files_leave_the_archive(tmp_path: Path) -> None:
    archive = tar_with(
        tmp_path / "a.tar.gz", **{"train/0.png": b"x", "../outside.png": b"y", "train/1.png": b"z"}
    )
    program().extract(archive, tmp_path / "out", {"train/0.png"})
    assert [p.name for p in (tmp_path / "out").rglob("*.png")] == ["0.png"]
    assert not (tmp_path / "outside.png").exists()


@pytest.mark.parametrize("name", ["../outside.png", "train/9.png"])
def test_an_archive_that_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", **{"../outside.png": b"y"})
    with pytest.raises(ValueError, match=f"1 pictures are missing, such as {name}"):
        program().extract(archive, tmp_path / "out", {name})
    assert not (tmp_path / "outside.png").exists()


def test_a_link_in_the_archive_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("train/0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
    with pytest.raises(ValueError, match="missing"):
        program().extract(tmp_path / "a.tar", tmp_path / "out", {"train/0.png"})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no coco_mini, easy_vqa"):
        program().find_data(str(tmp_path))


def test_questions_are_shared_out() -> None:
    module = program()
    asked = [{"image": "a.png", "question": f"q{i}", "answer": i} for i in range(5)]
    recipe = module.PrepareRecipe(output_dir="x", turns_per_conversation=2, vision_tower={})
    records = module.to_conversations(asked, recipe)
    assert [len(record["conversations"]) for record in records] == [4, 4, 2]
    assert len({record["id"] for record in records}) == 3
    first = [record["conversations"][0]["value"] for record in records]
    assert all(value.startswith("<image>\n") for value in first)
    pairs = {
        (human["value"].removeprefix("<image>\n"), gpt["value"])
        for record in records
        for human, gpt in zip(*[iter(record["conversations"])] * 2, strict=True)
    }
    assert pairs == {(f"q{i}", str(i)) for i in range(5)}
    other = module.to_conversations(asked, recipe.model_copy(update={"seed": 3}))
    assert other != records


def sample(number: int, target: str, answer: str, question: str = "q") -> dict[str, Any]:
    return {
        "doc_id": number,
        "image_id": str(number // 2),
        "question": question,
        "type": "yes_no",
        "target": target,
        "correct": float(target == answer),
    }


def test_the_summary_knows_what_guessing_is_worth() -> None:
    from llm2clip_vlm.programs import find_program, load_program

    summary = load_program(find_program("real_mini_summary", REPO_ROOT))
    targets = [("yes", "a"), ("yes", "a"), ("no", "b"), ("yes", "a"), ("no", "b"), ("red", "b")]
    real = [sample(i, target, target, asked) for i, (target, asked) in enumerate(targets)]
    wrong = [sample(i, target, "blue", asked) for i, (target, asked) in enumerate(targets)]
    found = summary.questions(real, wrong)
    assert found["real"]["accuracy"] == 100 and found["shuffled"]["accuracy"] == 0
    assert found["majority"]["answer"] == "yes" and found["majority"]["accuracy"] == 50
    assert found["best_blind"]["accuracy"] == pytest.approx(100 * 5 / 6)
    assert found["real_minus_majority"]["delta"] == 50
    chance = summary.against_chance({"chance_r1": 1.0, "chance_r10": 10.0}, 400)
    assert 0 < chance["chance_ci"][0] < 1 < chance["chance_ci"][1] < 3
    assert 6 < chance["chance_ci_r10"][0] < 10 < chance["chance_ci_r10"][1] < 14
