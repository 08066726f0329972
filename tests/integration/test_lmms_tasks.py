"""The suites name lmms-eval's own tasks, whose own scorers run on files in their schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.suite import SuiteRecipe
from tests.lmms_rows import ANSWERS, ROWS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Any:
    folder = tmp_path_factory.mktemp("lmms-tasks")
    for part in build_vlm(tiny_clip, tiny_llm, chat_template="vicuna_v1"):
        part.save_pretrained(folder / "vlm")
    done = subprocess.run(
        [sys.executable, "tests/integration/lmms_tasks_probe.py", folder / "vlm", folder],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OPENAI_API_KEY": "none",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_entry_of_the_suites_is_a_task_that_lmms_eval_has(found: Any) -> None:
    configs = found["configs"]
    assert configs["gqa"][1:] == ["lmms-lab-encoder/GQA", "testdev_balanced_instructions"]
    judged = {name for name, (judge, *_) in configs.items() if judge}
    assert judged == {"llava_in_the_wild", "mmvet"}


@pytest.mark.parametrize("task", [*ROWS, "textvqa_val_ocr"])
def test_own_scorers_on_local_files(found: Any, task: str) -> None:
    results = found["scores"][task]
    assert results["perfect"]["score"] == 100.0 and results["wrong"]["score"] == 0.0
    best, worst = (results[kind]["metrics"] for kind in ("perfect", "wrong"))
    first = results["perfect"]["primary_metric"]
    assert best[first] > worst[first] == 0.0, "the benchmark's own metric"
    rows = ROWS[task.removesuffix("_ocr")]
    asked = [row for row in rows if row.get("index", 0) < 1_000_000]
    assert results["model"]["n"] == len(asked) and best.keys()
    errors = results["perfect"]["metric_errors"]
    assert errors.keys() <= best.keys() and errors[first]["n"] == len(asked)


WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTIONS = "\nA. red\nB. blue\nC. green"
GOLDEN = {
    "vqav2_val": [f"what colour?{WORD}"] * 2,
    "gqa": [f"What colour?{WORD}"] * 2,
    "vizwiz_vqa_val": [
        "what colour?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.{WORD}"
    ]
    * 2,
    "scienceqa_img": [f"Context: Look.\nWhich?\nA. red\nB. blue{LETTER}"] * 2,
    "textvqa_val": [f"what colour?{WORD}"] * 2,
    "textvqa_val_ocr": [f"what colour?\nReference OCR token: STOP{WORD}"] * 2,
    "pope_random": [f"Is it red?{WORD}"] * 2,
    "mme": [f"Is it red?{WORD}", f"Is it blue?{WORD}"],
    "mmbench_en_dev_static": [f"Which?{OPTIONS}{LETTER}", f"Look.\nWhich?{OPTIONS}{LETTER}"] * 2,
    "l2c_mmbench_cn_dev_static": [f"哪个?{OPTIONS}\n请直接回答选项字母。"] * 2,
    "seedbench": [f"Which?{OPTIONS}\nD. none{LETTER}"] * 2,
    "mmvet": ["What is x?"],
    "llava_in_the_wild": ["What is this?"],
}
"""What LLaVA's scripts and question files ask of the documents in `tests/lmms_rows.py`."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize("task", GOLDEN)
def test_prompts_are_llavas_to_the_letter(found: Any, task: str) -> None:
    whole = [f"{SYSTEM} USER: <image>\n{question} ASSISTANT:" for question in GOLDEN[task]]
    assert [prompt.removeprefix("<s>") for prompt in found["prompts"][task]] == whole


PARSED = {
    "pope_random": [1] * 6 + [1] * 5 + [0] * 2 + [0] * 4,
    "mme": [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
    "scienceqa_img": [1] * 5 + [0] * 8 + [0, 1],
    "seedbench": [1, 1, 0, 0, 0, 0, 0, 0],
    "gqa": [1, 1, 1, 1, 0, 0, 0, 0],
    "vqav2_val": [1, 1, 1, 0.9, 0.3, 1, 0, 1],
    "textvqa_val_ocr": [0.6, 1, 1, 0],
    "vizwiz_vqa_val": [1, 0, 0.9],
}
"""What LLaVA's scripts make of `ANSWERS`; but for `A.` of ScienceQA, which the suite declares."""


@pytest.mark.parametrize("task", PARSED)
def test_answers_are_parsed_as_llavas_scripts_do(found: Any, task: str) -> None:
    texts = [f"{number}: {answer}" for number, (answer, _) in enumerate(ANSWERS[task])]
    made = dict(zip(texts, found["parses"][task], strict=True))
    assert made == pytest.approx(dict(zip(texts, PARSED[task], strict=True)))


def test_questions_of_one_picture_are_one_cluster_in_every_task(found: Any) -> None:
    for task, samples in found["samples"].items():
        rows = ROWS[task.removesuffix("_ocr")]
        if task not in ("scienceqa",):  # its second document is text alone
            assert len({sample["image_id"] for sample in samples}) == 1, task
        assert len(samples) == len(rows)
    turns = [(s["question_id"], s["turn"]) for s in found["samples"]["mmbench_en_dev_static"]]
    assert turns == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]


def test_what_is_unlike_the_paper_stands_in_the_result() -> None:
    suite = load_recipe(ROOT / "eval/suites/llava15.yaml", SuiteRecipe)
    names = {task.name or task.task for task in suite.tasks}
    assert suite.deviations.keys() <= names and "`A.`" in suite.deviations["scienceqa_img"]
