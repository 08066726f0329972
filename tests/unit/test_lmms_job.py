"""Planning, hashing and resuming evaluations, and the environment of the subprocess."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from llm2clip_vlm.config_eval import LmmsTask, SuiteRecipe
from llm2clip_vlm.data.images import ImageError
from llm2clip_vlm.evaluation import lmms_worker
from llm2clip_vlm.evaluation.lmms_job import (
    EvaluationError,
    Job,
    data_hash,
    left_out,
    plan,
    spec_hash,
    task_yaml,
)
from llm2clip_vlm.evaluation.lmms_rows import to_mme_rows, to_pope_rows
from llm2clip_vlm.evaluation.lmms_runner import run_suite, worker_environment
from llm2clip_vlm.evaluation.lmms_samples import metrics_of, samples_of, summarise
from llm2clip_vlm.evaluation.lmms_tasks import STATIC_DESPITE_MARKS, merge
from llm2clip_vlm.evaluation.task_helpers import pixel_hash
from llm2clip_vlm.recipe import load_recipe
from tests.tiny import write_image

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "eval" / "tasks"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for index in range(3):
        write_image(tmp_path / "images" / f"{index}.png", index)
        for answer in ("yes", "no"):
            rows.append(
                {
                    "id": f"{index}{answer}",
                    "image": f"images/{index}.png",
                    "image_id": f"i{index}",
                    "question": f"is there a {answer} ?",
                    "answer": answer,
                    "type": "exist",
                    "category": "random",
                }
            )
    file = tmp_path / "exist_test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_task_twice_needs_two_names(data: Path, model_dir: Path) -> None:
    task = {"task": "l2c_world_exist", "data_files": str(data)}
    with pytest.raises(EvaluationError, match="give each a `name`"):
        plan(suite(data, tasks=[task, task]), {"a": model_dir}, TASKS, None)
    other = {**task, "name": "again"}
    jobs = plan(suite(data, tasks=[task, other]), {"a": model_dir}, TASKS, None)
    assert [job.task for job in jobs] == ["l2c_world_exist", "again"]
    assert jobs[1].result_path(Path("out")) == Path("out/a/again.json")
    assert jobs[0].spec_hash == jobs[1].spec_hash  # the name says nothing about the score


def test_without_a_judge_its_tasks_are_left_out_by_name(
    data: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    task = {"task": "l2c_world_exist", "data_files": str(data)}
    tasks = [task, {"task": "mmvet", "judge": True}]
    quiet = suite(data, tasks=tasks)
    assert left_out(quiet) == ["mmvet"]
    assert [job.task for job in plan(quiet, {"a": model_dir}, TASKS, None)] == ["l2c_world_exist"]
    asked = suite(data, tasks=tasks, judge="environment")
    with pytest.raises(EvaluationError, match="OPENAI_API_KEY"):
        plan(asked, {"a": model_dir}, TASKS, None)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert left_out(asked) == []
    assert len(plan(asked, {"a": model_dir}, TASKS, None)) == 2


def suite(data: Path, **values: Any) -> SuiteRecipe:
    task = {"task": "l2c_world_exist", "data_files": str(data)}
    return SuiteRecipe.model_validate({"tasks": [task], **values})


def records(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


@pytest.mark.parametrize("file", sorted((ROOT / "eval" / "suites").glob("*.yaml")))
def test_every_suite_loads_and_names_tasks_that_exist(file: Path) -> None:
    loaded = load_recipe(file, SuiteRecipe)
    for task in loaded.tasks:
        found = task_yaml(task.task, TASKS)
        assert found.is_relative_to(TASKS) == task.task.startswith("l2c_")
        if task.data_files and not task.task.startswith("l2c_"):
            assert task.title and task.title.lower() != task.task


def test_own_tasks_have_our_prefix_and_no_namesake_in_lmms_eval(tmp_path: Path) -> None:
    for file in TASKS.rglob("*.yaml"):
        assert file.stem.startswith("l2c_") and f"task: {file.stem}\n" in file.read_text()
        with pytest.raises(EvaluationError):
            task_yaml(file.stem, tmp_path)  # a built-in of that name would win in silence
    assert all(task_yaml(name, TASKS) for name in STATIC_DESPITE_MARKS)


def test_unknown_task_and_group_get_a_suggestion() -> None:
    with pytest.raises(EvaluationError, match="l2c_world_vqa"):
        task_yaml("l2c_world_vqq", TASKS)
    with pytest.raises(EvaluationError, match="a group"):
        task_yaml("pope_full", TASKS)


def test_spec_hash_changes_with_all_that_decides_a_score(data: Path, tmp_path: Path) -> None:
    base = suite(data)

    def digest(recipe: SuiteRecipe, limit: int | None = None) -> str:
        return spec_hash(recipe, recipe.tasks[0], TASKS, limit)

    first = digest(base)
    assert first == digest(suite(data))
    titled = suite(data)
    titled.tasks[0].title = "another name"
    assert digest(titled) == first
    changed = [digest(base, limit=2)]
    others = {"batch_size": 8, "max_new_tokens": 9, "dtype": "bfloat16", "max_empty": 1.0}
    changed += [digest(suite(data, **{name: value})) for name, value in others.items()]
    task = LmmsTask(task="l2c_world_exist", data_files=str(data), overrides={"repeats": 1})
    changed.append(spec_hash(base, task, TASKS, None))
    write_image(data.parent / "images" / "1.png", seed=99)
    changed.append(digest(base))
    data.write_text(data.read_text().replace("is there", "can you see"))
    changed.append(digest(base))
    assert len({first, *changed}) == 9


def test_another_judge_is_another_score(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, plain = LmmsTask(task="mmvet", judge=True), LmmsTask(task="pope")
    hashes: dict[str, set[str]] = {"mmvet": set(), "pope": set()}
    for name in ("model-a", "model-b"):
        monkeypatch.setenv("MODEL_VERSION", name)
        for task in (judged, plain):
            hashes[task.task].add(spec_hash(suite(data), task, TASKS, None))
    assert len(hashes["mmvet"]) == 2 and len(hashes["pope"]) == 1


def test_images_that_a_csv_names_are_part_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    file.write_text("image,question,answer\na.png,what ?,red\n")
    hashes = set()
    for seed in (0, 1):
        write_image(tmp_path / "a.png", seed)
        hashes.add(data_hash(file))
    assert len(hashes) == 2


def test_a_result_counts_only_for_its_content(data: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (job,) = plan(suite(data), {"a": model_dir}, TASKS, None)
    assert job.result(out) is None
    job.result_path(out).parent.mkdir(parents=True)
    content = {
        "schema": 1,
        "spec_hash": job.spec_hash,
        "checkpoint": {"sha256": job.sha256},
    }
    job.result_path(out).write_text(json.dumps(content))
    assert job.result(out) is None  # no samples: it was not finished
    job.samples_path(out).write_text("")
    assert job.result(out) == content
    (model_dir / "model.safetensors").write_bytes(b"other weights")
    (again,) = plan(suite(data), {"a": model_dir}, TASKS, None)
    assert again.result(out) is None
    stale = Job(**{**job.__dict__, "spec_hash": "x"})
    assert stale.result(out) is None


def test_what_is_missing_is_named_before_the_start(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    def run(recipe: SuiteRecipe, **values: Any) -> None:
        run_suite(recipe, {"a": model_dir}, tmp_path / "out", **values)

    with pytest.raises(EvaluationError, match=r"no\s+config.json"):
        run_suite(suite(data), {"a": tmp_path / "absent"}, tmp_path / "out")
    with pytest.raises(EvaluationError, match="checkpoint name"):
        run_suite(suite(data), {"a/b": model_dir}, tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"absent\.jsonl"):
        run(suite(tmp_path / "absent.jsonl"))
    with pytest.raises(EvaluationError, match="twice"):
        run(SuiteRecipe(tasks=[LmmsTask(task="pope"), LmmsTask(task="pope")]))
    with pytest.raises(EvaluationError, match="title"):
        run(SuiteRecipe(tasks=[LmmsTask(task="pope", data_files=str(data), convert="pope")]))
    for limit in (0, 0.5, True):
        with pytest.raises(EvaluationError, match="whole number"):
            run(suite(data), limit=limit)
    (data.parent / "images" / "2.png").unlink()
    with pytest.raises(ImageError, match=r"2\.png"):
        run(suite(data))
    assert not (tmp_path / "out").exists()


def test_the_worker_does_not_inherit_a_distributed_launch() -> None:
    given = {
        "PATH": "/bin",
        "WORLD_SIZE": "8",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "TORCHELASTIC_RUN_ID": "x",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "/elsewhere",
    }
    kept = worker_environment(given)
    assert kept["HF_HUB_OFFLINE"] == "1" and kept["PATH"] == "/bin"
    assert kept["PYTHONPATH"].split(":") == [str(ROOT), "/elsewhere"]
    assert set(kept) == {"PATH", "HF_HUB_OFFLINE", "PYTHONPATH", "TOKENIZERS_PARALLELISM"}


def test_the_worker_holds_one_model_at_a_time(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adapter:
        """Stands for a model."""

    loaded: list[weakref.ref[Adapter]] = []

    def load(path: str, suite: SuiteRecipe) -> Adapter:
        assert not any(before() for before in loaded)
        adapter = Adapter()
        loaded.append(weakref.ref(adapter))
        return adapter

    monkeypatch.setattr(lmms_worker, "load_adapter", load)
    for name in ("quiet", "prepare", "score"):
        monkeypatch.setattr(lmms_worker, name, lambda *_: None)
    jobs = plan(suite(data), {"a": model_dir, "b": model_dir}, TASKS, None)
    order = {"suite": suite(data).model_dump(mode="json"), "limit": None}
    order |= {"jobs": [asdict(job) for job in jobs], "output": "out", "tasks_dir": str(TASKS)}
    file = tmp_path / "order.json"
    file.write_text(json.dumps(order))
    assert lmms_worker.main([str(file)]) == 0 and len(loaded) == 2


def test_pope_and_mme_rows(data: Path) -> None:
    rows = to_pope_rows(records(data), data.parent)
    assert [row["answer"] for row in rows] == ["yes", "no"] * 3
    assert rows[2]["image_source"] == "i1" and rows[2]["image"]["bytes"].startswith(b"\x89PNG")
    lonely = [*records(data), {**records(data)[0], "id": "x"}]
    pairs = to_mme_rows(lonely, data.parent)
    assert len(pairs) == 6  # the seventh has no partner
    for question_id in {row["question_id"] for row in pairs}:
        both = [row["answer"] for row in pairs if row["question_id"] == question_id]
        assert sorted(both) == ["No", "Yes"]
    with pytest.raises(ValueError, match="yes or no"):
        to_pope_rows([{**records(data)[0], "answer": "maybe"}], data.parent)
    with pytest.raises(ValueError, match="got none"):
        to_mme_rows(records(data)[:1], data.parent)


def logged(doc_id: int, answer: str, score: Any, **extra: Any) -> dict[str, Any]:
    doc = {
        "id": f"d{doc_id}",
        "image": f"{doc_id // 2}.png",
        "question": "q",
        "type": f"t{doc_id % 2}",
    }
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": "yes" if doc_id % 2 else "no",
        "arguments": ["prompt", {}],
        "filtered_resps": [answer],
        "acc": score,
        **extra,
    }


def test_samples_carry_what_statistics_need() -> None:
    items = [logged(n, "yes", {"score": float(n % 2)}) for n in (3, 1, 0, 2)]
    items[1]["filtered_resps"], items[2]["filtered_resps"] = [" "], ["Perhaps"]
    samples = samples_of(items, ["other", "acc"])
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
    assert [sample["correct"] for sample in samples] == [0, 1, 0, 1]
    assert [sample["image_id"] for sample in samples] == ["0.png", "0.png", "1.png", "1.png"]
    assert [sample["unparsable"] for sample in samples] == [1, 1, 0, 0]
    found = summarise(samples)
    assert found["n"] == 4 and found["n_empty"] == 1 and found["n_unparsable"] == 2
    assert found["score"] == 50.0 and found["by_type"]["t1"] == {"score": 100.0, "n": 2}
    assert found["score_ci"] == [50.0, 50.0]  # each image has one of both
    with pytest.raises(EvaluationError, match="no value of nothing"):
        samples_of(items, ["nothing"])


@pytest.mark.parametrize("column", ["image_id", "imageId", "image_source", "data_id", "docId"])
def test_questions_of_one_picture_are_one_cluster(column: str) -> None:
    items = [logged(n, "yes", 1.0) for n in range(4)]
    for number, item in enumerate(items):
        item["doc"] = {"id": str(number), "question_id": number, column: f"picture {number // 2}"}
    images = [sample["image_id"] for sample in samples_of(items, ["acc"])]
    assert images == ["picture 0", "picture 0", "picture 1", "picture 1"]


def test_pixels_tell_pictures_where_the_model_saw_them() -> None:
    items = [logged(n, "yes", 1.0) for n in range(3)]
    samples = samples_of(items, ["acc"], {}, {0: "x", 1: "x"})
    ids = [sample["image_id"] for sample in samples]
    assert ids[0] == ids[1] == "pixels:x" and ids[2] == "pixels:none, document 2"
    assert summarise(samples)["n_images"] == 2
    pictures = [Image.new(mode, (4, 3), "red") for mode in ("RGB", "RGBA", "P", "RGB")]
    assert len({pixel_hash([picture]) for picture in pictures}) == 1
    others = [Image.new("RGB", size, "red") for size in ((3, 4), (12, 1), (4, 3))]
    others[2].putpixel((0, 0), (254, 0, 0))
    assert len({pixel_hash([picture]) for picture in [pictures[0], *others]}) == 4


def test_answers_without_a_score_or_twice_are_refused() -> None:
    items = [logged(n, "yes", 1.0) for n in range(3)]
    with pytest.raises(EvaluationError, match=r"\[1\] were answered twice"):
        samples_of([*items, items[1]], ["acc"])
    with pytest.raises(EvaluationError, match="document 0: no value"):
        samples_of([logged(0, "yes", float("nan"))], ["acc"])
    assert metrics_of({"a,none": float("nan"), "b,none": 1.0}) == {"b": 1.0}


def test_functions_in_overrides_are_ours_or_lmms_evals() -> None:
    config: dict[str, Any] = {"doc_to_text": "x"}
    merge(config, {"doc_to_text": "!function llm2clip_vlm.evaluation.llava15.plain_text"})
    assert config["doc_to_text"]({"question": "Q"}, {"post_prompt": "!"}) == "Q!"
    for text in ("os.system", "llm2clip_vlm.evaluation.llava15.none", "llm2clip_vlm.no.such"):
        with pytest.raises(EvaluationError, match=text.rpartition(".")[2]):
            merge(config, {"metric_list": [{"aggregation": f"!function {text}"}]})


def test_open_answers_are_not_called_unparsable_unless_the_task_says_so() -> None:
    items = [logged(n, "free text", 1.0) for n in range(4)]
    for number, item in enumerate(items):
        item["target"] = f"caption {number}"
    assert summarise(samples_of(items, ["acc"]))["n_unparsable"] is None
    items[0]["unparsable"] = 1.0
    assert summarise(samples_of(items, ["acc"]))["n_unparsable"] == 1


def test_metrics_leave_out_errors_names_and_the_target_rate() -> None:
    given = {
        "alias": "pope",
        "pope_accuracy,none": 0.5,
        "pope_accuracy_stderr,none": "N/A",
        "pope_accuracy_stderr_clt,none": 0.1,
        "pope_yes_ratio,none": 0.5,
        "submission,none": None,
    }
    assert metrics_of(given) == {"pope_accuracy": 0.5}
