"""GQA's questions and pictures in one file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, asked: list[str]) -> None:
    for part in ("instructions", "images"):
        (folder / f"testdev_balanced_{part}").mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": str(n), "imageId": i, "question": "q", "answer": "a"} for n, i in enumerate(asked)
    ]
    Dataset.from_list(rows).to_parquet(
        str(folder / "testdev_balanced_instructions/testdev-0.parquet")
    )
    images = [{"id": name, "image": Image.new("RGB", (4, 4), name)} for name in ("red", "blue")]
    features = Features({"id": Value("string"), "image": ImageFeature()})
    Dataset.from_list(images, features=features).to_parquet(
        str(folder / "testdev_balanced_images/testdev-0.parquet")
    )


def run(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/join_gqa.py", str(folder), str(out)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_question_gets_its_own_picture(tmp_path: Path) -> None:
    write(tmp_path / "gqa", ["blue", "red", "blue"])
    out = tmp_path / "data" / "gqa.parquet"
    done = run(tmp_path / "gqa", out)
    assert done.returncode == 0 and "3 questions about 2 pictures" in done.stdout, done.stderr
    assert pq.read_table(out).column_names == ["id", "imageId", "question", "answer", "image"]
    files = {"testdev": str(out)}
    joined = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["testdev"]
    pixels = [row["image"].convert("RGB").getpixel((0, 0)) for row in joined]
    assert pixels == [(0, 0, 255), (255, 0, 0), (0, 0, 255)]


def test_two_downloads_in_one_folder_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "gqa/snapshots/a", ["blue"])
    write(tmp_path / "gqa/snapshots/b", ["blue"])
    done = run(tmp_path / "gqa", tmp_path / "gqa.parquet")
    assert done.returncode == 2 and "come twice; does it hold two downloads?" in done.stderr


def test_a_missing_picture_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "gqa", ["blue", "green"])
    done = run(tmp_path / "gqa", tmp_path / "gqa.parquet")
    assert done.returncode == 2 and "none for 1 ids, the first is 'green'" in done.stderr
    assert not (tmp_path / "gqa.parquet").exists()


def test_where_the_joined_file_is_missing_its_command_is_told(
    tmp_path: Path, repo_root: Path
) -> None:
    pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")
    from llm2clip_vlm.evaluation.vlm.jobs import EvaluationError, run_suite
    from llm2clip_vlm.recipe.reading import load_recipe
    from llm2clip_vlm.recipe.suite import SuiteRecipe

    suite = load_recipe(repo_root / "eval/suites/llava15.yaml", SuiteRecipe, ["data_dir=nowhere"])
    suite.tasks = [task for task in suite.tasks if task.task == "gqa"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"gqa_testdev_balanced\.parquet: not there") as told:
        run_suite(suite, {"a": tmp_path}, tmp_path / "out")
    assert "python eval/join_gqa.py GQA nowhere/gqa_testdev_balanced.parquet" in str(told.value)
