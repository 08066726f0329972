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

from llm2clip_vlm.models.vlm import build_vlm
from tests.lmms_rows import ROWS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Any:
    folder = tmp_path_factory.mktemp("lmms-tasks")
    for part in build_vlm(tiny_clip, tiny_llm):
        part.save_pretrained(folder / "vlm")
    done = subprocess.run(
        [sys.executable, "tests/integration/lmms_tasks_probe.py", folder / "vlm", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
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
    assert results["model"]["n"] == len(ROWS[task.removesuffix("_ocr")]) and best.keys()


def test_the_overrides_bring_the_papers_prompt(found: Any) -> None:
    with_ocr, without = (
        found["scores"][name]["model"]["prompt_example"]
        for name in ("textvqa_val_ocr", "textvqa_val")
    )
    assert "Reference OCR token: STOP" in with_ocr and "OCR" not in without
    assert "single word or phrase" in with_ocr
