"""Planning, hashing and resuming evaluations, and the environment of the subprocess."""

from __future__ import annotations

import json
import re
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.evaluation.report.inputs import read_run
from llm2clip_vlm.evaluation.vlm import jobs as lmms_jobs
from llm2clip_vlm.evaluation.vlm import llava15
from llm2clip_vlm.evaluation.vlm import worker as lmms_worker
from llm2clip_vlm.evaluation.vlm.jobs import (
    EvaluationError,
    Job,
    check_checkpoints,
    data_hash,
    left_out,
    plan,
    run_suite,
    spec_hash,
    task_yaml,
    worker_environment,
)
from llm2clip_vlm.evaluation.vlm.samples import metric_errors, metrics_of, samples_of, summarise
from llm2clip_vlm.evaluation.vlm.task_helpers import pixel_hash
from llm2clip_vlm.evaluation.vlm.tasks import STATIC_DESPITE_MARKS, build_task, merge, redirect
from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe
from llm2clip_vlm.runs.hashes import file_state
from tests.tiny import write_image
from tests.tiny_towers import build_tower

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "demo" / "tasks"
OWN = ROOT / "eval" / "tasks"


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
        plan(suite(data, tasks=[task, task]), {"a": model_dir}, TASKS)
    other = {**task, "name": "again"}
    jobs = plan(suite(data, tasks=[task, other]), {"a": model_dir}, TASKS)
    assert [job.task for job in jobs] == ["l2c_world_exist", "again"]
    assert jobs[1].result_path(Path("out")) == Path("out/a/again.json")
    assert jobs[0].spec_hash == jobs[1].spec_hash  # the name says nothing about the score
    one, two = task | {"title": "World"}, other | {"title": "World"}
    with pytest.raises(EvaluationError, match=r"\['World'\] given twice; give each a `title`"):
        plan(suite(data, tasks=[one, two]), {"a": model_dir}, TASKS)


def test_a_data_set_that_several_tasks_read_is_fetched_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = SuiteRecipe.model_validate(
        {"tasks": [{"task": "pope_pop"}, {"task": "textvqa_val"}, {"task": "pope_adv"}]}
    )
    configs = lambda yaml: {"dataset_path": f"lmms-lab/{yaml.stem[:4]}"}  # noqa: E731
    monkeypatch.setattr("llm2clip_vlm.evaluation.vlm.tasks.load_config", configs)
    load_program(find_program("run_lmms")).print_prefetch(found, OWN)
    fetch = "hf download --repo-type dataset lmms-lab"
    assert capsys.readouterr().out.splitlines() == [
        f"{fetch}/pope  # pope_pop: all of it, pope_adv: all of it",
        f"{fetch}/text  # textvqa_val: all of it",
    ]


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"github/stage4/model: no such folder \(from"):
        check_checkpoints({"a": tmp_path / "github" / "stage4" / "model"})


def test_without_a_judge_its_tasks_are_left_out_by_name(
    data: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    task = {"task": "l2c_world_exist", "data_files": str(data)}
    tasks = [task, {"task": "mmvet", "judge": True}]
    quiet = suite(data, tasks=tasks)
    assert left_out(quiet) == {"mmvet": "a judge"}
    assert [job.task for job in plan(quiet, {"a": model_dir}, TASKS)] == ["l2c_world_exist"]
    asked = suite(data, tasks=tasks, judge="environment")
    with pytest.raises(EvaluationError, match="OPENAI_API_KEY"):
        plan(asked, {"a": model_dir}, TASKS)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert left_out(asked) == {}
    assert len(plan(asked, {"a": model_dir}, TASKS)) == 2


def suite(data: Path, **values: Any) -> SuiteRecipe:
    task = {"task": "l2c_world_exist", "data_files": str(data)}
    return SuiteRecipe.model_validate({"tasks": [task], **values})


@pytest.mark.parametrize("file", sorted(ROOT.glob("*/suites/*.yaml")))
def test_every_suite_loads_and_names_tasks_that_exist(file: Path) -> None:
    loaded = load_recipe(file, SuiteRecipe)
    for task in loaded.tasks:
        found = task_yaml(task.task, TASKS)
        assert found.is_relative_to(ROOT / file.parts[-3] / "tasks") == task.task.startswith("l2c_")
        if task.data_files and not task.task.startswith("l2c_"):
            assert task.title and task.title.lower() != task.task


def test_own_tasks_have_our_prefix_and_no_namesake_in_lmms_eval(tmp_path: Path) -> None:
    built_in = {name for _, name in lmms_jobs._builtin_tasks()}
    for file in ROOT.glob("*/tasks/**/*.yaml"):
        assert file.stem.startswith("l2c_") and f"task: {file.stem}\n" in file.read_text()
        assert file.stem not in built_in
    for file in OWN.rglob("*.yaml"):
        assert task_yaml(file.stem, tmp_path) == file, "ours are found beside the caller's"
    mine = tmp_path / "mine" / "gqa.yaml"
    mine.parent.mkdir()
    mine.write_text("task: gqa\n")
    assert task_yaml("gqa", tmp_path) == mine, "the caller's come first"
    assert all(task_yaml(name, TASKS) for name in STATIC_DESPITE_MARKS)


def test_unknown_task_and_group_get_a_suggestion() -> None:
    with pytest.raises(EvaluationError, match="l2c_world_vqa"):
        task_yaml("l2c_world_vqq", TASKS)
    with pytest.raises(EvaluationError, match="a group"):
        task_yaml("pope_full", TASKS)


def test_spec_hash_changes_with_all_that_decides_a_score(data: Path, tmp_path: Path) -> None:
    base = suite(data)

    def digest(recipe: SuiteRecipe) -> str:
        return spec_hash(recipe, recipe.tasks[0], TASKS)

    first = digest(base)
    assert first == digest(suite(data))
    titled = suite(data)
    titled.tasks[0].title = "another name"
    assert digest(titled) == first
    changed = []
    others = {
        "limit": 2,
        "batch_size": 8,
        "max_new_tokens": 9,
        "dtype": "bfloat16",
        "max_empty": 1.0,
    }
    changed += [digest(suite(data, **{name: value})) for name, value in others.items()]
    task = LmmsTask(task="l2c_world_exist", data_files=str(data), overrides={"repeats": 1})
    changed.append(spec_hash(base, task, TASKS))
    task = LmmsTask(task="l2c_world_exist", data_files=str(data), program="java")
    changed.append(spec_hash(base, task, TASKS))  # a metric of all documents, no mean of theirs
    write_image(data.parent / "images" / "1.png", seed=99)
    changed.append(digest(base))
    data.write_text(data.read_text().replace("is there", "can you see"))
    changed.append(digest(base))
    assert len({first, *changed}) == 10


def test_another_judge_is_another_score(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, plain = LmmsTask(task="mmvet", judge=True), LmmsTask(task="pope")
    hashes: dict[str, set[str]] = {"mmvet": set(), "pope": set()}
    for name in ("model-a", "model-b"):
        monkeypatch.setenv("MODEL_VERSION", name)
        for task in (judged, plain):
            hashes[task.task].add(spec_hash(suite(data), task, TASKS))
    assert len(hashes["mmvet"]) == 2 and len(hashes["pope"]) == 1


def test_images_that_a_csv_names_are_part_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    file.write_text("image,second,question,answer\na.png,B.JPG,what ?,red\n")
    (tmp_path / "B.JPG").write_bytes(b"one")
    hashes = set()
    for seed in (0, 1):
        write_image(tmp_path / "a.png", seed)
        hashes.add(data_hash(file))
    (tmp_path / "B.JPG").write_bytes(b"another")  # a task's own column, known by its suffix
    assert len({*hashes, data_hash(file)}) == 3


def test_a_result_counts_only_for_its_content(data: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (job,) = plan(suite(data), {"a": model_dir}, TASKS)
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
    (again,) = plan(suite(data), {"a": model_dir}, TASKS)
    assert again.result(out) is None
    stale = Job(**{**job.__dict__, "spec_hash": "x"})
    assert stale.result(out) is None


def test_what_is_missing_is_named_before_the_start(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    def run(recipe: SuiteRecipe) -> None:
        run_suite(recipe, {"a": model_dir}, tmp_path / "out", TASKS)

    stage = tmp_path / "stage4"
    stage.mkdir()
    (stage / "model").symlink_to(model_dir)
    for folder, told in (
        (tmp_path / "absent", r"checkpoint a: .*/absent: no such folder"),
        (
            Path("runs/llava15/clip/stage4/model"),
            r"train stage4_instruction recipes/llava15/stage4",
        ),
        (stage, r"did you mean .*/stage4/model\?"),
    ):
        with pytest.raises(EvaluationError, match=told):
            run_suite(suite(data), {"a": folder}, tmp_path / "out", TASKS)
    tower = build_tower("eva02", tmp_path / "tower")
    with pytest.raises(ModelError, match=r"expected a vision-language model.*, got Eva02Vision"):
        run_suite(suite(data), {"a": tower}, tmp_path / "out", TASKS)
    drawn = suite(data)
    drawn.tasks[0].data_files = str(tmp_path / "not_drawn_yet.jsonl")
    with pytest.raises(EvaluationError, match=r"absent: no such folder"):
        run_suite(drawn, {"a": tmp_path / "absent"}, tmp_path / "out", TASKS)
    with pytest.raises(EvaluationError, match="checkpoint name"):
        run_suite(suite(data), {"a/b": model_dir}, tmp_path / "out", TASKS)
    with pytest.raises(EvaluationError, match=r"absent\.jsonl"):
        run(suite(tmp_path / "absent.jsonl"))
    with pytest.raises(EvaluationError, match="twice"):
        run(SuiteRecipe(tasks=[LmmsTask(task="pope"), LmmsTask(task="pope")]))
    for limit in (0, 0.5):
        with pytest.raises(ValidationError, match="limit"):
            suite(data, limit=limit)
    (data.parent / "images" / "2.png").unlink()
    with pytest.raises(ImageError, match=r"2\.png"):
        run(suite(data))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("acc", 0.653, "acc"), ("gpt_eval_score", 65.3, "gpt_eval_score"), ("mme", 812.5, "accuracy")],
)
def test_a_card_names_the_metric_that_the_score_is(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    metric: str, value: float, said: str,
) -> None:  # fmt: skip
    """MME's metric is a sum of points: 65.3 % right answers are not 65.3 of its 2,000."""

    def spawn(recipe: SuiteRecipe, jobs: list[Job], out: Path, tasks: Path) -> int:
        (job,) = jobs
        result = {"schema": 1, "spec_hash": job.spec_hash, "checkpoint": {"sha256": job.sha256}}
        result |= {"limit": None, "documents": 3, "title": "T", "score": 65.3}
        result |= {"primary_metric": metric, "metrics": {metric: value}}
        job.result_path(out).parent.mkdir(parents=True, exist_ok=True)
        job.samples_path(out).write_text("")
        job.result_path(out).write_text(json.dumps(result))
        return 0

    cards: list[Any] = []
    monkeypatch.setattr(lmms_jobs, "_spawn", spawn)
    monkeypatch.setattr(lmms_jobs, "add_scores", lambda *given: cards.append(given))
    run_suite(suite(data), {"a": model_dir}, tmp_path / "out", TASKS)
    assert cards == [(model_dir, {"T": (said, 65.3)})]


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
    for name in ("quiet", "build_task", "score"):
        monkeypatch.setattr(lmms_worker, name, lambda *_, **__: None)
    jobs = plan(suite(data), {"a": model_dir, "b": model_dir}, TASKS)
    order: dict[str, Any] = {"suite": suite(data).model_dump(mode="json")}
    order |= {"jobs": [asdict(job) for job in jobs], "output": "out", "tasks_dir": str(TASKS)}
    file = tmp_path / "order.json"
    file.write_text(json.dumps(order))
    assert lmms_worker.main([str(file)]) == 0 and len(loaded) == 2


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
    # Each of two images has one of both: see the interval of equal means.
    assert found["score_ci"] == pytest.approx([50 * 0.025**0.5, 100 - 50 * 0.025**0.5])
    with pytest.raises(EvaluationError, match="no value of nothing"):
        samples_of(items, ["nothing"])


def test_a_metric_of_all_documents_is_no_score_of_each(tmp_path: Path) -> None:
    """CIDEr of one document alone is 0: its words are as rare as the document."""
    items = [
        {**logged(n, "a dog runs", {"pred": "a dog runs"}), "target": "answer"} for n in (0, 1)
    ]
    samples = samples_of(items, ["acc"], {"acc": lambda values: 0.0}, whole=True)
    assert [(s["correct"], s["unparsable"]) for s in samples] == [(None, None)] * 2
    found = summarise(samples, 0.072)
    assert found["score"] == pytest.approx(7.2) and found["score_ci"] is None
    assert found["by_type"] == {"": {"score": found["score"], "n": 2}}
    (tmp_path / "captions.json").write_text(json.dumps({"title": "Captions", **found}))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "captions.samples.jsonl").write_text(lines)
    run = read_run("a", {str(tmp_path): None})
    assert run.values("captions") == [found["score"]] and list(run.scores) == ["captions"]


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
        samples_of([logged(0, "yes", None)], ["acc"])
    assert metrics_of({"a,none": float("nan"), "b,none": 1.0}) == {"b": 1.0}
    assert metrics_of({"a,none": np.int64(3), "a_stderr,none": 1.0}) == {"a": 3.0}
    with pytest.raises(EvaluationError, match="acc: a value for each of several filters"):
        metrics_of({"acc,none": 0.5, "acc,flexible": 0.9})


@pytest.mark.parametrize("value", [30.0, -0.5, {"score": 100}, np.float32(2), np.nan])
def test_a_score_that_is_not_from_0_to_1_is_refused(value: Any) -> None:
    """Though the document has a second metric, which would count for this document alone."""
    with pytest.raises(EvaluationError, match="document 0: acc: expected a score from 0 to 1, got"):
        samples_of([logged(0, "yes", value, second=1.0)], ["acc", "second"])


@pytest.mark.parametrize(
    "value", [True, 1, np.float32(1), np.bool_(True), np.int64(1), 1 + 4e-16, {"pred": "x"}]
)
def test_numbers_of_every_kind_are_scores(value: Any) -> None:
    judge_likes_it_better_than_the_reference = {"acc": lambda values: 114.3}
    (sample,) = samples_of(
        [logged(0, "a", value)], ["acc"], judge_likes_it_better_than_the_reference
    )
    assert sample["correct"] == 1 and json.dumps(sample["correct"]) == "1.0"


def test_a_task_that_cannot_be_scored_is_refused_before_an_answer(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(TASKS / "l2c_world_exist", mine)
    (mine / "l2c_world_exist.yaml").rename(mine / "my_exist.yaml")
    with pytest.raises(EvaluationError, match="task my_exist: its file says `task: l2c_world_ex"):
        build_task(LmmsTask(task="my_exist"), mine)
    less = {"metric": "yes_rate", "aggregation": "mean", "higher_is_better": False}
    for others in ([], [{**less, "metric": "f1", "higher_is_better": True}]):
        task = LmmsTask(task="l2c_world_exist", overrides={"metric_list": [less, *others]})
        with pytest.raises(EvaluationError, match="first metric, yes_rate, is better the lower"):
            build_task(task, TASKS)
    several = [{"name": n, "filter": [{"function": "take_first"}]} for n in ("strict", "loose")]
    task = LmmsTask(task="l2c_world_exist", overrides={"filter_list": several})
    with pytest.raises(EvaluationError, match=r"filters \['strict', 'loose'\] give each"):
        build_task(task, TASKS)


def test_functions_in_overrides_are_of_two_packages() -> None:
    config: dict[str, Any] = {"doc_to_text": "x"}
    merge(config, {"doc_to_text": "!function llm2clip_vlm.evaluation.vlm.llava15.plain_text"})
    assert config["doc_to_text"]({"question": "Q"}, {"post_prompt": "!"}) == "Q!"
    for text in ("os.system", "llm2clip_vlm.evaluation.vlm.llava15.none", "llm2clip_vlm.no.such"):
        with pytest.raises(EvaluationError, match=text.rpartition(".")[2]):
            merge(config, {"metric_list": [{"aggregation": f"!function {text}"}]})


def test_open_answers_are_not_called_unparsable_unless_the_task_says_so() -> None:
    items = [logged(n, "free text", 1.0) for n in range(4)]
    for number, item in enumerate(items):
        item["target"] = f"caption {number}"
    assert summarise(samples_of(items, ["acc"]))["n_unparsable"] is None
    items[0]["unparsable"] = 1.0
    assert summarise(samples_of(items, ["acc"]))["n_unparsable"] == 1


def test_an_answer_of_several_right_ones_can_be_parsed() -> None:
    """A list of references is not one target: no answer would ever be in such a set."""
    items = [logged(n, "yes", 1.0) | {"target": ["yes", "yeah"]} for n in range(6)]
    items[0]["filtered_resps"] = ["perhaps"]
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


def test_a_change_of_versions_code_or_task_file_makes_results_stale(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS / "l2c_world_exist", folder / "l2c_world_exist")
    recipe = suite(data)

    def digest() -> str:
        return spec_hash(recipe, recipe.tasks[0], folder)

    found = [digest()]
    for name in ("lmms_eval", "transformers"):
        monkeypatch.setattr(lmms_jobs, "versions", lambda name=name: {name: "0.0"})
        found.append(digest())
    monkeypatch.setattr(lmms_jobs, "SCORING_CODE", lmms_jobs.SCORING_CODE[1:])
    found.append(digest())
    for file in ("l2c_world_exist.yaml", "utils.py"):
        with (folder / "l2c_world_exist" / file).open("a") as handle:
            handle.write("# changed\n")
        found.append(digest())
    for above in ("_base.yaml", "common.py"):  # what `include: ../_base.yaml` names
        (folder / above).write_text("# new\n")
        found.append(digest())
    (folder / "shared").mkdir()
    for file, text in (
        ("l2c_world_exist/l2c_world_exist.yaml", "include: [../shared/_a.yaml]\n"),
        ("shared/_a.yaml", "include: _b.yaml  # of l2c_world_exist.yaml, ../shared/_a.yaml\n"),
        ("shared/_b.yaml", "repeats: 1\n"),
        ("shared/_b.yaml", "repeats: 2\n"),
    ):
        with (folder / file).open("a") as handle:
            handle.write(text)
        found.append(digest())
    assert len(set(found)) == len(found) == 12


def test_the_code_that_scores_is_what_prompts_and_scorers_import() -> None:
    package, listed = ROOT / "llm2clip_vlm", set(lmms_jobs.SCORING_CODE)
    needed = {
        "evaluation/vlm/generation.py",
        "evaluation/vlm/llava15.py",
        "evaluation/vlm/task_helpers.py",
    }
    for _ in range(3):
        for name in list(needed):
            text = (package / name).read_text()
            for module, names in re.findall(
                r"^from llm2clip_vlm\.([\w.]+) import (.+)", text, re.M
            ):
                path = module.replace(".", "/")
                below = [f"{path}/{name.split()[0]}.py" for name in names.split(", ")]
                needed.update(below if (package / path).is_dir() else [f"{path}.py"])
    assert needed - {"constants.py"} <= listed
    assert all((package / name).is_file() for name in listed)


def test_a_result_of_another_version_or_with_changed_samples_is_made_again(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    (job,) = plan(suite(data), {"a": model_dir}, TASKS)
    samples = job.samples_path(tmp_path)
    samples.parent.mkdir(parents=True)
    samples.write_text("{}\n")
    whole = {"schema": 1, "spec_hash": job.spec_hash, "checkpoint": {"sha256": job.sha256}}
    whole["files"] = {samples.name: file_state(samples)}
    for changed, good in (({}, True), ({"schema": 2}, False), ({"schema": None}, False)):
        job.result_path(tmp_path).write_text(json.dumps(whole | changed))
        assert (job.result(tmp_path) is not None) == good
    job.result_path(tmp_path).write_text(json.dumps(whole))
    samples.write_text("{ }\n")
    assert job.result(tmp_path) is None


def scored(
    data: Path, model_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch,
    answers: list[str], *, first: int | None = None, documents: int = 4,
    pictures: dict[int, str] | None = None, most: int = 512,
    metrics: dict[str, float] | None = None, **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """What the worker makes of these answers, without lmms-eval's evaluator."""
    entry = {"task": "l2c_world_exist", "data_files": str(data)}
    settings = {"max_empty": 0.25, "limit": first, "max_new_tokens": most}
    recipe = suite(data, tasks=[entry | values], **settings)
    (job,) = plan(recipe, {"a": model_dir}, TASKS)
    items = [logged(n, answer, float(n % 2), wrong=0.25) for n, answer in enumerate(answers)]
    given: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        given.update(arguments)
        name, found = "l2c_world_exist", items
        if arguments["model"].other_pictures:
            found = [logged(n, f"other {n}", 0.0) for n in range(len(answers))]
        return {"samples": {name: found}, "results": {name: metrics or {"acc,none": 0.5}}}

    module = SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)  # type: ignore[arg-type]
    config = SimpleNamespace(
        metric_list=[
            {"metric": "f1"}, {"metric": "wrong", "higher_is_better": False}, {"metric": "acc"}
        ],
        test_split="test", validation_split=None, generation_kwargs={"max_new_tokens": 4},
    )  # fmt: skip
    task = SimpleNamespace(
        config=config, eval_docs=range(documents), dataset={"test": object()},
        aggregation=lambda: {"acc": np.mean},
    )  # fmt: skip
    model = SimpleNamespace(dtype=torch.float32, device="cpu")
    processor = SimpleNamespace(image_processor=object())
    generator = SimpleNamespace(model=model, processor=processor, batch_size=3, max_new_tokens=9)
    adapter = SimpleNamespace(generator=generator, prompt_example="p")
    adapter.pictures, adapter.num_cut = {0: "x"} if pictures is None else pictures, 2
    result = lmms_worker.score(job, recipe, task, adapter, out)
    assert not adapter.other_pictures
    assert given["limit"] == (first or values.get("limit"))
    assert given["batch_size"] == recipe.batch_size
    assert given["bootstrap_iters"] == 0 and given["tasks"] == [task]
    assert json.loads(job.result_path(out).read_text()) == result == job.result(out)
    return result


def test_a_score_says_of_what_it_is(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def make(answers: list[str], **values: Any) -> dict[str, Any]:
        return scored(data, model_dir, tmp_path / "out", monkeypatch, answers, **values)

    found = make(["yes", "", "no", "no"])  # a quarter may be empty
    assert (found["n"], found["n_empty"], found["n_errors"], found["documents"]) == (4, 1, 0, 4)
    assert found["n_cut"] == 2 and "max_new_tokens" not in capsys.readouterr().err
    make(["yes", "", "no", "no"], most=3)
    said = "a: l2c_world_exist; answers end at max_new_tokens=3 of the suite, not 4\n"
    assert capsys.readouterr().err == said
    assert (found["primary_metric"], found["metrics"], found["score"]) == ("acc", {"acc": 0.5}, 50)
    assert found["n_images"] == 4 and found["limit"] is None and found["prompt_example"] == "p"
    assert found["settings"]["batch_size"] == 3 and found["settings"]["max_new_tokens"] == 9
    assert found["generation_kwargs"] == {"max_new_tokens": 4}
    assert found["data"]["sha256"] == data_hash(data)
    with pytest.raises(EvaluationError, match=r"2 of 4 answers are empty, more than max_empty=0\."):
        make(["yes", "", " ", "no"])
    assert make(["yes", "", " ", "no"], max_empty=0.5)["n_empty"] == 2
    with pytest.raises(EvaluationError, match="1 documents have no answer"):
        make(["yes"] * 3)
    assert make(["yes"] * 3, limit=3)["limit"] == 3
    assert make(["yes"] * 3, limit=9, first=3)["limit"] == 3, "the suite's comes first"
    assert make(["yes"] * 4, limit=9)["n_errors"] == 0
    with pytest.raises(EvaluationError, match="no document was answered"):
        make([])
    lost = {"f1,none": 0.25, "acc,none": np.nan}  # the documents have no f1
    with pytest.raises(EvaluationError, match=r"acc of all documents is no number; got {'f1'"):
        make(["yes"] * 4, metrics=lost)


def test_a_model_is_asked_with_other_pictures_too(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(**values: Any) -> dict[str, Any]:
        out = tmp_path / "out"
        return scored(data, model_dir, out, monkeypatch, ["yes", "no", "no", "no"], **values)

    assert "other_pictures" not in make()
    found = make(other_pictures=True)
    other = found["other_pictures"]
    assert found["score"] == 50 and other["score"] == 0 and other["delta"] == 50
    assert other["images"] == 4 and other["p"] == 0.5, "two of four differ, both to one side"
    samples = (tmp_path / "out" / "a" / "l2c_world_exist.samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["other_answer"] for line in samples] == [
        f"other {n}" for n in range(4)
    ]
    assert make(other_pictures=True, program="java")["other_pictures"] == {"score": 50.0}
    with pytest.raises(EvaluationError, match="expected documents with pictures, got none"):
        make(other_pictures=True, pictures={})


def test_after_a_failure_the_rest_is_done(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"task": "l2c_world_exist", "data_files": str(data)}
    recipe = suite(data, tasks=[entry | {"name": name} for name in "abc"])
    spawned: list[list[str]] = []

    def spawn(suite: Any, jobs: list[Job], out: Path, *_: Any) -> int:
        spawned.append([job.task for job in jobs])
        for job in jobs:
            if job.task == "b":
                return 3
            content = {"schema": 1, "spec_hash": job.spec_hash}
            job.samples_path(out).write_text("")
            job.result_path(out).write_text(
                json.dumps(content | {"checkpoint": {"sha256": job.sha256}})
            )
        return 0

    monkeypatch.setattr(lmms_jobs, "_spawn", spawn)
    with pytest.raises(EvaluationError, match=r"1 of 3 evaluations failed: m / b \(exit 3\)"):
        run_suite(recipe, {"m": model_dir}, tmp_path / "out", TASKS)
    assert spawned == [["a", "b", "c"], ["c"]]
    with pytest.raises(EvaluationError, match="m / b"):
        run_suite(recipe, {"m": model_dir}, tmp_path / "out", TASKS)
    assert spawned[2:] == [["b"]]


def test_a_closed_set_has_at_most_64_answers() -> None:
    for targets, closed in ((64, True), (65, False)):
        items = [logged(n, "never", 0.0) | {"target": str(n % targets)} for n in range(200)]
        found = summarise(samples_of(items, ["acc"]))["n_unparsable"]
        assert found == (200 if closed else None)


def test_turns_and_single_documents_by_hand() -> None:
    items = [logged(n, "a", {"index": index}) for n, index in enumerate([3, 2_000_003, 4])]
    samples = samples_of(items, ["acc"], {"acc": lambda values: 100.0 * values[0]["index"] + 100})
    assert [(s["question_id"], s["turn"]) for s in samples] == [("3", 0), ("3", 2), ("4", 0)]
    assert [s["correct"] for s in samples] == [1.0] * 3  # alone its index is 0; 100 is 1


def test_empty_answers_of_turns_are_empty() -> None:
    """Joined they are ` |  | `, and `max_empty` would not refuse a model that says nothing."""
    asked = [(0, "", 1), (1_000_000, "", 0), (1, "a", 1), (1_000_001, " ", 0), (2, "a", 1)]
    items = [logged(n, said, {"index": i, "score": s}) for n, (i, said, s) in enumerate(asked)]
    found = summarise(samples_of(items, ["acc"]))
    assert (found["n"], found["n_empty"]) == (3, 2)


def test_the_rows_of_one_question_stay_together_in_the_jackknife() -> None:
    """MME's score asserts both rows of a question; here their pictures differ."""

    def score(rows: list[dict[str, Any]]) -> float:
        asked = Counter(row["question_id"] for row in rows)
        assert set(asked.values()) == {2}
        return float(len(asked))

    items = [logged(n, "a", {"question_id": str(n // 2), "score": 1.0}) for n in range(12)]
    pictures = {n: str(n) for n in range(12)}
    found = metric_errors(
        items, samples_of(items, ["acc"], {}, pictures), {"acc": 6.0}, {"acc": score}
    )["acc"]
    without = [value for value in found["without"] if value is not None]
    assert sum(6 - value for value in without) == 6 and found["n"] == 12
    assert found["se"] == pytest.approx(((len(without) - 1) * np.var(without)) ** 0.5)


@pytest.mark.parametrize(
    ("text", "choices", "said"),
    [
        ("B", 4, "B"), ("B.", 4, "B"), ("B. a dog", 4, "B"), ("The answer is C.", 4, "C"),
        ("The answer is A. The answer is B.", 4, None), ("BA", 4, None), ("E", 4, None),
        ("E", 5, "E"), ("b", 4, None), ("dog", 4, None), (" D ", 4, "D"),
    ],
)  # fmt: skip
def test_scienceqa_answers(text: str, choices: int, said: str | None) -> None:
    doc = {"choices": ["x"] * choices, "answer": "ABCDE".index(said or "A")}
    found = llava15.scienceqa_results(doc, [text])
    assert found == {"exact_match": float(said is not None), "unparsable": float(said is None)}
    doc["answer"] = (doc["answer"] + 1) % choices
    assert llava15.scienceqa_results(doc, [text])["exact_match"] == 0.0


def test_llava15_parses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def process(doc: Any, results: list[str]) -> dict[str, Any]:
        said.extend(results)
        return {}

    for name in ("pope", "mme"):
        module = SimpleNamespace(**{f"{name}_process_results": process})
        monkeypatch.setitem(sys.modules, f"lmms_eval.tasks.{name}.utils", module)  # type: ignore[arg-type]

    def of(parse: Any, text: str) -> tuple[str, float]:
        unparsable = parse({}, [text])["unparsable"]
        return said.pop(), unparsable

    pope = {"Yes, it is. No.": ("yes", 0), "No, there is": ("no", 0), "it is not": ("no", 0)}
    pope |= {"NO": ("yes", 1), "a dog": ("yes", 1), "yes": ("yes", 0), "not,": ("no", 0)}
    assert {text: of(llava15.pope_results, text) for text in pope} == pope
    mme = {"Yes.": ("yes", 0), " no": ("no", 0), "a no": ("no", 0), "um, no": ("other", 1)}
    mme |= {"eh no": ("other", 1)}
    assert {text: of(llava15.mme_results, text) for text in mme} == mme
    doc = {"answer": "A", "data_type": "Spatial", "question_id": 3}
    found = llava15.seedbench_results(doc, [" B\n"])
    assert found["seed_all"] == {"pred": "B", "answer": "A", "question_id": 3}
    assert found["seed_Spatial"] == found["seed_all"] and found["unparsable"] == 0.0
    assert llava15.seedbench_results(doc, ["B."])["unparsable"] == 1.0
    for text, right in {"Red.": 1, "red": 1, "red .": 0, " red.. ": 1, "reddish": 0}.items():
        assert llava15.gqa_results({"answer": "red"}, [text]) == {"exact_match": float(right)}
    question = {
        "question": "Q?",
        "hint": "nan",
        "A": "one",
        "B": "two",
        "C": float("nan"),
        "D": "x",
    }
    assert llava15.mmbench_text(question, {"post_prompt": "!"}) == "Q?\nA. one\nB. two!"
    assert llava15.mmbench_text(question | {"hint": "H"}).startswith("H\nQ?\n")
    text = llava15.plain_text(
        {"question": "Q", "ocr_tokens": ["a", "b"]},
        {"ocr": True, "pre_prompt": "<", "post_prompt": ">"},
    )
    assert text == "<Q\nReference OCR token: a, b>"


def test_a_task_reads_a_local_file_under_the_name_of_its_split(tmp_path: Path) -> None:
    for name, loader in (("a.jsonl", "json"), ("a.json.gz", "json"), ("a.parquet", "parquet")):
        roots = {"default": {"image_root": "x", "pre_prompt": "p"}, "other": {"image_root": "y"}}
        config: dict[str, Any] = {"validation_split": " val ", "dataset_name": "n"}
        config["lmms_eval_specific_kwargs"] = roots
        redirect(config, tmp_path / name, str(tmp_path / "cache"))
        assert (config["dataset_path"], config["dataset_name"]) == (loader, None)
        assert config["dataset_kwargs"] == {
            "data_files": {"val": str(tmp_path / name)},
            "cache_dir": str(tmp_path / "cache"),
        }
        assert config["test_split"] == "val"
        assert roots["default"] == {"image_root": str(tmp_path), "pre_prompt": "p"}
    both = {"test_split": "test", "validation_split": "val"}
    redirect(both, tmp_path / "a.csv", None)
    assert both["test_split"] == "test" and "cache_dir" not in both["dataset_kwargs"]
    with pytest.raises(EvaluationError, match="neither test nor validation split"):
        redirect({"task": "t"}, tmp_path / "a.csv", None)
    with pytest.raises(EvaluationError, match="expected one of"):
        redirect(dict(both), tmp_path / "a.txt", None)


def test_overrides_go_into_mappings_and_null_removes() -> None:
    config: dict[str, Any] = {"generation_kwargs": {"a": 1, "b": 2}, "process_docs": 3, "task": "t"}
    given = {"generation_kwargs": {"b": None, "c": 4}, "process_docs": None, "task": "u"}
    merge(config, given)
    assert config == {"generation_kwargs": {"a": 1, "c": 4}, "task": "u"}
    with pytest.raises(EvaluationError, match="no keys of an lmms-eval task"):
        merge(config, {"generation_kwarg": {}})


def test_a_task_whose_scorer_needs_an_absent_program_is_left_out_by_name(tmp_path: Path) -> None:
    tasks = [{"task": "flickr30k_test", "program": name} for name in ("sh", "no-such-program")]
    tasks[1]["name"] = "captions"
    suite = SuiteRecipe.model_validate({"tasks": tasks})
    assert left_out(suite) == {"captions": "no-such-program"}
