"""`llm2clip-vlm eval RECIPE` from end to end on a tiny CLIP and the world's dense part."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from world.files import WorldConfig, ensure_world
from world.scenes import SHAPES

from llm2clip_vlm import cli
from tests.report_fixtures import load_program
from tests.tiny import build_clip

WAYS = ("i2t", "t2i")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WorldConfig(seed=0, dir=str(tmp_path_factory.mktemp("world")), part="dense")
    return ensure_world(config, sizes={"dense_train": 12, "dense_test": 6})


def evaluate(path: Path, tasks: list[dict[str, Any]], *overrides: str, **more: Any) -> int:
    values = {"stage": "run_encoder", "output_dir": str(path / "out"), "bootstrap": 5}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values | more | {"tasks": tasks}))
    return cli.main(["eval", str(path / "recipe.yaml"), *overrides])


def test_the_worlds_dense_part_is_consistent(world: Path) -> None:
    document = json.loads((world / "instances_test.json").read_text())
    assert [kind["name"] for kind in document["categories"]] == list(SHAPES)
    for image in document["images"]:
        mask = np.asarray(Image.open(world / "SegmentationClass" / image["file_name"]))
        picture = Image.open(world / "JPEGImages" / image["file_name"])
        assert picture.size == (image["width"], image["height"]) == mask.shape[::-1]
        boxes = [box for box in document["annotations"] if box["image_id"] == image["id"]]
        assert {box["category_id"] for box in boxes} == set(mask[mask > 0].tolist())
        for box in boxes:
            y, x = np.nonzero(mask == box["category_id"])
            left, top, width, height = box["bbox"]
            assert (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1) == (left, top, width, height)
            assert box["area"] == len(x) > 20
    rows = [json.loads(line) for line in (world / "labels.jsonl").read_text().split("\n") if line]
    assert len(rows) == 18 and {row["split"] for row in rows} == {"train", "test"}
    names = (world / "objects.txt").read_text().split("\n")
    assert len(names) == 36 and {row["label"] for row in rows} <= set(names)


def test_what_a_later_task_lacks_is_told_first(
    tmp_path: Path, tiny_clip: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(world / "labels.jsonl")
    first = {"task": "zero_shot", "name": "a", "data": labels, "classes": str(world / "no.txt")}
    probe = {"train": {"data": labels}, "test": {"data": "nothing/*.jsonl"}}
    tasks = [first, {"task": "linear_probe", "name": "b", **probe}]
    assert evaluate(tmp_path, tasks, model="./no/tower") == 2
    told = capsys.readouterr().err
    for line in ("3 things are missing", "model: ./no/tower", "tasks.0.classes: ",
                 "tasks.1.test.data: nothing"):  # fmt: skip
        assert line in told
    assert not (tmp_path / "out").exists()


def test_every_task_of_a_recipe(
    tmp_path: Path, tiny_clip: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"data": str(world / "labels.jsonl"), "where": {"split": "test"}}
    masks = {"data": str(world), "classes": str(world / "shapes.txt"), "short_side_px": 32}
    tasks = [
        {"task": "zero_shot", "classes": str(world / "objects.txt"), **labels},
        {"task": "zero_shot_segmentation", "split": "test", **masks},
        {"task": "segmentation", "train_split": "train", "split": "test", "steps": 2, **masks},
    ]
    assert evaluate(tmp_path, tasks, model=str(tiny_clip)) == 0
    out = capsys.readouterr().out
    assert "zero_shot " in out and "top1" in out and "miou" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == str(tiny_clip) and set(results["fingerprints"]) == {"model"}
    for name, result in results["results"].items():
        assert result == json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert result["protocol"] and len(result["data_hash"]) == 64
        assert {"texts_cut", "seconds", "key", "task"} <= set(result)
    page = (tmp_path / "out" / "encoder.html").read_text()
    assert out.splitlines()[-1] == str(tmp_path / "out" / "encoder.html")
    found = results["results"]
    for name in ("zero_shot_segmentation", "segmentation"):
        low, high = found[name]["ci"]
        assert f"{found[name]['miou']:.1f} [{low:.1f}, {high:.1f}]" in page
        assert f"chance: {found[name]['chance_miou']:.1f}" in page and "IoU of each class" in page
    top1 = found["zero_shot"]
    assert f": {top1['top1']:.1f} [" in page and f"chance: {top1['chance_top1']:.1f}" in page
    # Results of another recipe in the same folder are none of this page's.
    assert evaluate(tmp_path, tasks[:1], model=str(tiny_clip)) == 0
    assert (
        "mean IoU" not in (tmp_path / "out" / "encoder.html").read_text().split("<figcaption>")[0]
    )


def test_only_what_changed_is_run_again(tmp_path: Path, tiny_clip: Path, world: Path) -> None:
    rows = (world / "labels.jsonl").read_text()
    data = tmp_path / "labels.jsonl"
    data.write_text(rows)
    task = {"task": "zero_shot", "data": str(data), "images": str(world), "name": "objects"}
    task["classes"] = str(world / "objects.txt")

    def key(*overrides: str, model: Path = tiny_clip) -> tuple[str, float]:
        assert evaluate(tmp_path, [task], *overrides, model=str(model)) == 0
        file = tmp_path / "out" / "objects.json"
        return json.loads(file.read_text())["key"], file.stat().st_mtime_ns

    first = key()
    assert key() == first and key("batch_size=3", "device=cpu") == first
    found = {first[0]}
    long = f"tasks.0.templates=['the {{}}{' large' * 50}']"
    for override in (
        "bootstrap=6",
        "seed=1",
        "dtype=bfloat16",
        "tasks.0.templates=['the {}']",
        long,
    ):
        found.add(key(override)[0])
    found.add(key(model=build_clip(tmp_path / "other", seed=1))[0])
    data.write_text(rows.replace('"split": "train"', '"split": "other"'))
    found.add(key()[0])
    assert len(found) == 8


def test_a_pattern_stands_for_the_files_that_it_names(repo_root: Path, tmp_path: Path) -> None:
    """Else a result would be taken for that of shards which have been replaced."""
    states_of = load_program(repo_root, "run_encoder").states_of
    task = {"data": str(tmp_path / "*.jsonl"), "templates": ["a {}, [seen] from above?"]}
    assert states_of(task) == []
    found = []
    for content in ("a", "ab"):
        (tmp_path / "0.jsonl").write_text(content)
        found += [states_of(task)]
    assert found[0] != found[1] and [*map(len, found)] == [1, 1]


def test_pictures_beside_the_data_and_behind_links_count(repo_root: Path, tmp_path: Path) -> None:
    states_of = load_program(repo_root, "run_encoder").states_of
    far, folder = tmp_path / "far", tmp_path / "data"
    far.mkdir(), folder.mkdir()
    (folder / "img").symlink_to(far)
    (far / "round").symlink_to(folder)
    (far / "0.jpg").write_text("a"), (folder / "rows.jsonl").write_text("{}")
    for task in ({"data": str(folder / "rows.jsonl"), "images": None}, {"images": str(folder)}):
        found = []
        for content in ("a", "ab"):
            (far / "0.jpg").write_text(content)
            found += [states_of(task)]
        assert found[0] != found[1] and [*map(len, found)] == [2, 2]


def test_samples_of_an_earlier_recipe_are_gone(
    tmp_path: Path, tiny_clip: Path, world: Path
) -> None:
    task = {"task": "retrieval", "benchmark": "records", "data": str(world / "labels.jsonl")}
    task |= {"name": "pairs", "where": {"split": "test"}}
    out = tmp_path / "out"
    for fields in (["label", "split"], ["label"]):
        assert evaluate(tmp_path, [task | {"fields": fields}], model=str(tiny_clip)) == 0
        left = {file.name for file in out.glob("*.samples.jsonl")}
        assert left == {f"pairs.{kind}.{way}.samples.jsonl" for kind in fields for way in WAYS}


def test_what_fails_leaves_no_results_of_before(
    tmp_path: Path, tiny_clip: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the scores of other weights would stand beside those that are new."""
    rows = (world / "labels.jsonl").read_text().replace('"label"', '"a b"')
    data = tmp_path / "rows.jsonl"
    data.write_text(rows.replace('"split"', '"a-b"'))
    task = {"task": "retrieval", "benchmark": "records", "data": str(data), "images": str(world)}
    out = tmp_path / "out"
    assert evaluate(tmp_path, [task | {"fields": ["a b"]}], model=str(tiny_clip)) == 0
    found = json.loads((out / "records.json").read_text())
    whole = json.loads((out / "results.json").read_text())
    assert found["checkpoint"]["sha256"] == whole["fingerprints"]["model"]
    assert evaluate(tmp_path, [task | {"fields": ["a b", "a-b"]}], model=str(tiny_clip)) == 2
    assert "would share a file; rename one" in capsys.readouterr().err
    assert not (out / "results.json").exists() and not (out / "encoder.html").exists()


def test_nothing_of_the_users_is_lost(
    tmp_path: Path, tiny_clip: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "retrieval", "benchmark": "records", "data": str(world / "labels.jsonl")}
    task |= {"name": "pairs", "where": {"split": "test"}, "fields": ["label"]}
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pairs.json", "pairs.label.i2t.samples.jsonl", "results.json"):
        (out / name).write_text("mine")
        assert evaluate(tmp_path, [task], model=str(tiny_clip)) == 2
        said = capsys.readouterr().err
        assert "no run of this program has written" in said and name in said
        assert [file.name for file in out.iterdir()] == [name]
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    for name in ("pairs.xlsx", "pairs.md", "notes.txt"):
        (out / name).write_text("mine")
    for bootstrap in (5, 6):
        assert evaluate(tmp_path, [task], f"bootstrap={bootstrap}", model=str(tiny_clip)) == 0
        assert all((out / n).read_text() == "mine" for n in ("pairs.xlsx", "pairs.md", "notes.txt"))
    # what lies there must be what was written
    result, samples = out / "pairs.json", out / "pairs.label.i2t.samples.jsonl"
    stamp, text = result.stat().st_mtime_ns, samples.read_text()
    for change in (samples.unlink, lambda: samples.write_text(text[:-30])):
        change()
        assert evaluate(tmp_path, [task], "bootstrap=6", model=str(tiny_clip)) == 0
        assert samples.read_text() == text and result.stat().st_mtime_ns > stamp
        stamp = result.stat().st_mtime_ns
    assert evaluate(tmp_path, [task], "bootstrap=6", model=str(tiny_clip)) == 0
    assert result.stat().st_mtime_ns == stamp


def test_errors_are_one_message(
    tmp_path: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "cra", "benchmark": "coco", "data": "nowhere.json"}
    assert evaluate(tmp_path, [task, task], model=str(tiny_clip)) == 2
    assert "two are called 'coco'" in capsys.readouterr().err
    assert evaluate(tmp_path, [task], model=str(tiny_clip)) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert evaluate(tmp_path, [task | {"task": "cre"}], model=str(tiny_clip)) == 2
    assert "tasks" in capsys.readouterr().err
    assert evaluate(tmp_path, [task | {"name": "../x"}], model=str(tiny_clip)) == 2
    assert "name '../x'" in capsys.readouterr().err


def test_the_recipe_decides_which_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []

    def load(path: Path) -> Any:
        return SimpleNamespace(main=lambda words: ran.append((path.stem, *words)))

    monkeypatch.setattr(cli, "load_program", load)
    (tmp_path / "a.yaml").write_text("notes: x\nstage: run_encoder\n")
    (tmp_path / "b.yaml").write_text("tasks: []\n")
    cli.main(["eval", str(tmp_path / "a.yaml"), "seed=1"])
    assert cli.main(["eval", str(tmp_path / "b.yaml")]) == 2, "a suite is given by --suite"
    cli.main(["eval", "--suite", "x"])
    cli.main(["eval"])
    assert ran == [
        ("run_encoder", str(tmp_path / "a.yaml"), "seed=1"),
        ("run_lmms", "--suite", "x"),
        ("run_lmms",),
    ]
