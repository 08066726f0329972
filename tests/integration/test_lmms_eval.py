"""lmms-eval with a tiny LLaVA: the runner from the command line, and one test a trap.

Everything that imports lmms-eval's evaluator runs in another process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from huggingface_hub import ModelCard
from world.files import WorldConfig, ensure_world

from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.runs.card import write_card
from tests.tiny import write_image

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vqa_test": 4, "exist_test": 4, "caption_test": 3}
SMALL = dict.fromkeys(
    ("text", "text_val", "short", "pairs_train", "pairs_val", "pairs_test", "instruct"), 2
)
WORLD_TASKS = [f"l2c_world_{name}" for name in ("vqa", "exist", "caption", "pope", "mme")]


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_lmms(output: Path, world: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    base = ["eval/run_lmms.py", "--tasks", "demo/tasks", "--output", output]
    return run(*base, *more, f"data_dir={world}", "max_empty=1.0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture(scope="module")
def world(place: Path) -> Path:
    return ensure_world(WorldConfig(dir=str(place / "world")), sizes={**SMALL, **SIZES})


@pytest.fixture(scope="module")
def checkpoints(tiny_clip: Path, tiny_llm: Path, place: Path) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate("ab"):
        found[name] = place / name
        for part in build_vlm(tiny_clip, tiny_llm, seed=seed):
            part.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def first_run(
    place: Path, world: Path, checkpoints: dict[str, Path]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    given = [f"--checkpoint={name}={path}" for name, path in checkpoints.items()]
    output = place / "out"
    return output, run_lmms(output, world, "--suite=demo/suites/world.yaml", *given)


def result(output: Path, checkpoint: str, task: str) -> dict[str, Any]:
    return json.loads((output / checkpoint / f"{task}.json").read_text())


def samples(output: Path, checkpoint: str, task: str) -> list[dict[str, Any]]:
    text = (output / checkpoint / f"{task}.samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_every_task_of_every_checkpoint_has_a_result(first_run: Any) -> None:
    output, finished = first_run
    assert finished.returncode == 0, finished.stderr[-3000:]
    for checkpoint in "ab":
        for task in WORLD_TASKS:
            found = result(output, checkpoint, task)
            assert found["n"] == len(samples(output, checkpoint, task)) == found["documents"]
            assert found["n_errors"] == 0 and found["limit"] is None
            assert found["settings"]["image_processor"] == "CLIPImageProcessorPil"
            assert found["prompt_example"].count("<image>") == 1
            assert found["checkpoint"]["sha256"] and found["versions"]["lmms_eval"]
    assert not list(output.glob(".jobs*")) and not list(output.rglob(".*.json.*"))
    assert finished.stdout.count("\n") == 12 and "pope scorer on world data" in finished.stdout


def test_the_questions_were_asked_with_other_pictures_too(first_run: Any) -> None:
    output, finished = first_run
    assert finished.stdout.count("with other pictures") == 2
    for checkpoint in "ab":
        vqa = result(output, checkpoint, "l2c_world_vqa")
        other, asked = vqa["other_pictures"], samples(output, checkpoint, "l2c_world_vqa")
        assert other["delta"] == pytest.approx(vqa["score"] - other["score"])
        assert (other["n"], other["images"]) == (40, 4)
        assert any(sample["answer"] != sample["other_answer"] for sample in asked)
        assert "other_pictures" not in result(output, checkpoint, "l2c_world_exist")


def test_own_metrics_and_types(first_run: Any) -> None:
    output, _ = first_run
    vqa = result(output, "a", "l2c_world_vqa")
    assert len(vqa["by_type"]) == 10 and vqa["n"] == 40
    assert vqa["score"] == pytest.approx(100 * vqa["metrics"]["accuracy"])
    exist = result(output, "a", "l2c_world_exist")
    assert set(exist["metrics"]) == {"accuracy", "precision", "recall", "f1", "yes_rate"}
    assert set(exist["by_type"]) <= {"random", "popular", "adversarial"}
    caption = result(output, "a", "l2c_world_caption")
    assert "attribute_f1" in caption["metrics"] and "object_f1" in caption["metrics"]
    images = {sample["image_id"] for sample in samples(output, "a", "l2c_world_mme")}
    assert len(images) == 4  # intervals go by picture
    assert all(image.startswith("pixels:") for image in images)


def test_builtin_scorers_ran_with_their_own_prompts_and_useless_metrics_are_left_out(
    first_run: Any,
) -> None:
    output, _ = first_run
    pope = result(output, "a", "l2c_world_pope")
    assert "Answer the question using a single word or phrase." in pope["prompt_example"]
    assert "pope_f1_score" in pope["metrics"] and "pope_yes_ratio" not in pope["metrics"]
    assert "POPE" not in pope["title"]
    mme = result(output, "a", "l2c_world_mme")
    assert "Please answer yes or no" not in mme["prompt_example"]
    assert "mme_perception_score" in mme["metrics"]


@pytest.mark.slow
def test_overwritten_weights_are_evaluated_again_and_nothing_else(
    first_run: Any, world: Path, checkpoints: dict[str, Path], place: Path
) -> None:
    output, _ = first_run
    copy = shutil.copytree(output, place / "again")
    # What each evaluation left; the folder's marker is written by every run.
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("[!.]*.json")}
    moved = shutil.copytree(checkpoints["b"], place / "moved")
    given = [f"--checkpoint=a={checkpoints['a']}", f"--checkpoint=b={moved}"]
    idle = run_lmms(copy, world, "--suite=demo/suites/world.yaml", *given)
    assert idle.returncode == 0 and "0 of 10 evaluations to do" in idle.stderr
    shutil.copy(checkpoints["a"] / "model.safetensors", moved / "model.safetensors")
    finished = run_lmms(copy, world, "--suite=demo/suites/world.yaml", *given)
    assert finished.returncode == 0 and "5 of 10 evaluations to do" in finished.stderr
    for file, time in before.items():
        assert (file.stat().st_mtime_ns == time) == (file.parent.name == "a")
    assert samples(copy, "b", "l2c_world_pope") == samples(copy, "a", "l2c_world_pope")
    assert samples(output, "b", "l2c_world_pope") != samples(output, "a", "l2c_world_pope")


@pytest.mark.slow
def test_a_failing_task_is_named_the_others_finish_and_the_exit_code_is_2(
    world: Path, checkpoints: dict[str, Path], place: Path
) -> None:
    suite = place / "broken.yaml"
    row = json.loads((world / "vqa_test.jsonl").read_text().split("\n")[0])
    (world / "no_answer.jsonl").write_text(json.dumps({"id": 1, "image": row["image"]}) + "\n")
    suite.write_text(
        "tasks:\n"
        f"- {{task: l2c_photo_vqa, data_files: {world}/no_answer.jsonl}}\n"
        f"- {{task: l2c_world_vqa, data_files: {world}/vqa_test.jsonl, limit: 3}}\n"
    )
    given = (f"--suite={suite}", f"--checkpoint=a={checkpoints['a']}")
    output = place / "broken"
    given = ("--tasks=demo/tasks", *given)
    finished = run("eval/run_lmms.py", "--output", output, *given, "max_empty=1.0")
    assert finished.returncode == 2
    assert "a / l2c_photo_vqa (exit 1)" in finished.stderr and "question" in finished.stderr
    assert not (output / "a" / "l2c_photo_vqa.json").exists()
    assert result(output, "a", "l2c_world_vqa")["n"] == 3
    assert run("eval/run_lmms.py", "--output", output, *given, "tasks.0.tusk=1").returncode == 2


@pytest.fixture(scope="module")
def probe(world: Path, checkpoints: dict[str, Path], place: Path) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    finished = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("lmms_probe.py")),
            str(checkpoints["a"]),
            str(world),
            str(place / "probe"),
        ],
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.strip().split("\n")[-1])


@pytest.mark.slow
def test_trap_chat_requests_have_six_arguments(probe: dict[str, Any]) -> None:
    assert probe["chat_arguments"] == ["str", True, "dict", "int", "str", "str"]


@pytest.mark.slow
def test_batch_size_does_not_change_answers_and_a_live_model_survives(
    probe: dict[str, Any],
) -> None:
    assert probe["batched"] == probe["one_by_one"] == probe["again"]
    assert len(set(probe["batched"])) > 1
    assert probe["base_clean_deletes_modules"]  # why the adapter overrides clean()


@pytest.mark.slow
def test_multiple_choice_is_refused(probe: dict[str, Any]) -> None:
    assert "only generate_until is scored" in probe["multiple_choice_chat"]


@pytest.mark.slow
def test_trap_seeds_and_truncated_pictures(probe: dict[str, Any]) -> None:
    assert probe["random_state_kept"]
    assert probe["truncated"][1] is False  # lmms-eval had set it


@pytest.mark.slow
def test_trap_limit_is_recorded_and_empty_answers_are_refused(probe: dict[str, Any]) -> None:
    assert probe["limit"] == [2, 2, 40]
    assert "2 of 2 answers are empty" in probe["empty"]
    assert not probe["stale_result_left"]


@pytest.mark.slow
def test_trap_hub_token_judges_and_hidden_causes(probe: dict[str, Any]) -> None:
    assert probe["token"] is None
    judged = {name for name, said in probe["judge"].items() if "judge model" in said}
    assert judged == {"mmvet", "llava_in_the_wild", "hallusion_bench_image"}
    assert "doc_to_txt" in probe["override"]
    assert probe["override_prompt"].endswith(" please")
    assert probe["missing_data"].startswith("FileNotFoundError")


def test_the_score_gate_of_a_finished_run(
    first_run: Any, world: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    output, _ = first_run
    table = tmp_path / "table.yaml"
    column = "{results: [l2c_world_exist], metric: accuracy, n: 16, prompt_has: [zebra]}"
    table.write_text(f"source: a paper\ncolumns: {{X: {column}}}\nrows: {{m: {{X: 50.0}}}}\n")
    given = ["--suite=demo/suites/world.yaml", f"--checkpoint=a={checkpoints['a']}"]
    done = run_lmms(output, world, *given, f"--expected={table}:m")
    assert done.returncode == 0 and "score gate against m, a paper" in done.stdout, done.stderr
    (row,) = json.loads((output / "a" / "score_gate.json").read_text())
    ours = result(output, "a", "l2c_world_exist")["metrics"]["accuracy"]
    assert row["ours"] == pytest.approx(100 * ours) and "prompt lacks 'zebra'" in row["differs"]
    wrong = run_lmms(output, world, *given, f"--expected={table}:n")
    assert wrong.returncode == 2 and "expected FILE:ROW, one of m" in wrong.stderr


def test_the_lines_of_extend_md_make_a_task(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """docs/extend.md: a task, its Python file and a suite; the score goes into the model's card."""
    page = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
    for _, name, text in re.findall(r"```(yaml|python)\n# (my_\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for n in range(3):
        write_image(tmp_path / f"my_tasks/{n}.png", seed=n)
    rows = [{"image": f"{n}.png", "question": "what color ?", "answer": "red"} for n in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "my_tasks/questions.jsonl").write_text(lines)
    model = shutil.copytree(checkpoints["a"], tmp_path / "model")
    assert write_card(model, "train x", parents={}, versions={})
    (command,) = re.findall(r"`llm2clip-vlm (eval --suite my_suite.yaml .*?)`", page)
    words = command.replace("runs/mine/stage4/model", str(model)).split()
    finished = run("-m", "llm2clip_vlm.cli", *words, "max_empty=1.0", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = result(tmp_path / "runs/eval", "mine", "my_vqa")
    assert found["n"] == found["n_images"] == 3 and found["title"] == "My questions"
    (row,) = ModelCard.load(model / "README.md").data.eval_results
    assert (row.metric_name, row.metric_value) == ("My questions", found["score"])
