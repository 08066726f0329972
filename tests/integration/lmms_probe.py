"""Run by test_lmms_eval.py in a process of its own: importing lmms-eval changes global state.

`python lmms_probe.py CHECKPOINT WORLD` prints one JSON object: what each trap does today.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageFile

from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat
from llm2clip_vlm.evaluation.vlm.jobs import EvaluationError, Job, task_yaml
from llm2clip_vlm.evaluation.vlm.tasks import build_task, load_config, merge, refuse_judge
from llm2clip_vlm.evaluation.vlm.worker import quiet, score
from llm2clip_vlm.models.vlm.building import load_checkpoint
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe

TASKS = Path(__file__).resolve().parents[2] / "demo" / "tasks"

Texts = list[str]


def answers(adapter: Any, task: Any) -> Texts:
    from lmms_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model=adapter,
        tasks=[task],
        task_manager=object(),
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        process_docs_parallel=1,
        cli_args=argparse.Namespace(
            output_path="unused",
            process_with_media=False,
            reasoning_tags=None,
            agentic_trace_mode="basic",
        ),
    )
    (logged,) = found["samples"].values()
    return [item["filtered_resps"][0] for item in logged]


def build(name: str, data: Path, **overrides: Any) -> Any:
    return build_task(LmmsTask(task=name, overrides=overrides, data_files=str(data)), TASKS)


def refusal(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (ValueError, OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def random_state() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def main() -> None:
    checkpoint, world = sys.argv[1], Path(sys.argv[2])
    vqa = world / "vqa_test.jsonl"
    imported = ImageFile.LOAD_TRUNCATED_IMAGES
    quiet()
    found: dict[str, Any] = {"truncated": [imported, ImageFile.LOAD_TRUNCATED_IMAGES]}

    model, processor = load_checkpoint(checkpoint, device="cpu")
    live = {"model": model, "processor": processor}
    task = build("l2c_world_vqa", vqa)
    task.build_all_requests(limit=1)
    arguments = task.instances[0].args
    found["chat_arguments"] = [callable(a) or type(a).__name__ for a in arguments]

    chat = Llm2ClipVlmChat(**live, batch_size=64)
    found["batched"] = answers(chat, task)
    found["again"] = answers(chat, task)
    found["one_by_one"] = answers(Llm2ClipVlmChat(**live, batch_size=1), task)

    before = random_state()
    job = Job("a", checkpoint, "sha", 0, "l2c_world_vqa", "spec")
    suite = SuiteRecipe(tasks=[LmmsTask(task="l2c_world_vqa", data_files=str(vqa))], limit=2)
    scored = score(job, suite, task, chat, output=Path(sys.argv[3]))
    found["random_state_kept"] = random_state() == before
    found["limit"] = [scored["n"], scored["limit"], scored["documents"]]
    nothing = Llm2ClipVlmChat(**live)
    nothing.generator._answer = lambda *_: __import__(  # type: ignore[union-attr]
        "llm2clip_vlm.evaluation.vlm.generation", fromlist=["Answer"]
    ).Answer("", 1)
    found["empty"] = refusal(lambda: score(job, suite, task, nothing, output=Path(sys.argv[3])))
    found["stale_result_left"] = job.result_path(Path(sys.argv[3])).exists()

    found["multiple_choice_chat"] = refusal(
        lambda: build("l2c_world_vqa", vqa, output_type="multiple_choice", generation_kwargs=None)
    )

    from lmms_eval.api.model import lmms

    cleaned = Llm2ClipVlmChat(**live)
    cleaned.module = torch.nn.Linear(1, 1)  # type: ignore[attr-defined]
    lmms.clean(cleaned)
    found["base_clean_deletes_modules"] = not hasattr(cleaned, "module")

    pope = load_config(task_yaml("pope", TASKS))
    found["token"] = pope["dataset_kwargs"]
    found["judge"] = {
        name: refusal(lambda name=name: refuse_judge(name, load_config(task_yaml(name, TASKS))))
        for name in ("mmvet", "llava_in_the_wild", "hallusion_bench_image", "pope", "mme")
    }
    found["override"] = refusal(merge, pope, {"doc_to_txt": 1})
    prompted = build(
        "l2c_world_vqa", vqa, lmms_eval_specific_kwargs={"default": {"post_prompt": " please"}}
    )
    found["override_prompt"] = prompted.doc_to_text(prompted.eval_docs[0])

    from lmms_eval.api.task import ConfigurableTask as Retried

    Retried.download.retry.sleep = lambda seconds: None  # 5 tries, 2 s apart
    found["missing_data"] = refusal(lambda: build("l2c_world_vqa", world / "absent.jsonl"))
    found["error_type"] = issubclass(EvaluationError, ValueError)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
