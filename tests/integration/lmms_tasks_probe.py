"""Run by test_lmms_tasks.py in a process of its own: importing lmms-eval changes global state.

`python lmms_tasks_probe.py CHECKPOINT FOLDER` prints one JSON object: for each task the score of a
perfect model, of one that is always wrong, and the result of the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat
from llm2clip_vlm.evaluation.vlm.generation import Answer
from llm2clip_vlm.evaluation.vlm.jobs import Job, task_yaml
from llm2clip_vlm.evaluation.vlm.tasks import build_task, load_config, merge
from llm2clip_vlm.evaluation.vlm.worker import quiet, score
from llm2clip_vlm.models.vlm.building import load_checkpoint
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe
from tests.lmms_rows import ANSWERS, JUDGED_ROWS, PERFECT, ROWS, WRONG, write_rows

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "eval" / "tasks"
SUITES = ("llava15", "vision_centric")


def entries() -> dict[str, LmmsTask]:
    """Entries of both suites, overrides included; a plain one for tasks that are in none."""
    found = {name: LmmsTask(task=name) for name in ROWS}
    for suite in SUITES:
        for task in load_recipe(ROOT / "eval" / "suites" / f"{suite}.yaml", SuiteRecipe).tasks:
            found[task.name or task.task] = task
    return found


class Scripted:
    """A generator that renders prompts and answers what it was told."""

    def __init__(self, generator: Any, answers: list[str]) -> None:
        self._generator, self._answers = generator, answers
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, prompts: Any, options: Any, progress: Any) -> list[Answer]:
        self.prompts += [prompt.text for prompt in prompts]
        return [Answer(text, 1) for text in self._answers]


def main() -> None:
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    quiet()
    model, processor = load_checkpoint(checkpoint, device="cpu")
    found: dict[str, Any] = {"configs": {}, "scores": {}, "prompts": {}, "samples": {}}
    for name, entry in entries().items():
        config = load_config(task_yaml(entry.task, TASKS))
        found["configs"][name] = [entry.judge, config["dataset_path"], config.get("dataset_name")]
        if entry.task in JUDGED_ROWS:
            data = write_rows(folder, entry.task)
            spec = entry.model_copy(update={"data_files": str(data)})
            task = build_task(spec, TASKS, str(folder / "cache"), judge=True)
            chat = Llm2ClipVlmChat(model=model, processor=processor).generator
            assert chat is not None
            asked = [chat.render(task.doc_to_messages(doc)).text for doc in task.eval_docs]
            found["prompts"][name] = asked
        if entry.task not in ROWS:
            continue
        data = write_rows(folder, entry.task)
        spec = entry.model_copy(update={"max_empty": 1.0, "data_files": str(data)})
        task = build_task(spec, TASKS, str(folder / "cache"))
        suite = SuiteRecipe(tasks=[spec], max_new_tokens=4)
        adapter = Llm2ClipVlmChat(model=model, processor=processor, max_new_tokens=4)
        answers = {
            "perfect": PERFECT.get(spec.task, ["A", "B"]),
            "wrong": WRONG.get(spec.task, ["B", "A"]),
        }
        results = {}
        for kind in ("perfect", "wrong", "model"):
            if kind == "model":
                adapter = Llm2ClipVlmChat(model=model, processor=processor, max_new_tokens=4)
            else:
                adapter.generator = Scripted(adapter.generator, answers[kind])
            job = Job(kind, checkpoint, "sha", 0, name, "spec")
            results[kind] = score(job, suite, task, adapter, output=folder)
            if kind == "perfect":
                found["prompts"][name] = adapter.generator.prompts  # type: ignore[union-attr]
                lines = job.samples_path(folder).read_text().splitlines()
                found["samples"][name] = [json.loads(line) for line in lines]
        found["scores"][name] = results
    found["parses"] = {
        name: [right(name, *case) for case in cases] for name, cases in ANSWERS.items()
    }
    print(json.dumps(found))


def right(name: str, answer: str, target: Any) -> float:
    """What the suite's metric makes of an answer."""
    entry = entries()[name]
    config = load_config(task_yaml(entry.task, TASKS))
    merge(config, entry.overrides)
    doc = {**ROWS[entry.task][0], **({"answers": target} if "vqa" in name else {"answer": target})}
    found = config["process_results"](doc, [answer])
    value = next(v for key, v in found.items() if key not in ("unparsable", "submission"))
    if isinstance(value, dict):
        value = value.get("score", float(value.get("pred") == value.get("answer")))
    return float(value)


if __name__ == "__main__":
    main()
