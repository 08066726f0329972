"""The subprocess that talks to lmms-eval: `python -P -m llm2clip_vlm.evaluation.vlm.worker JOBS`.

One process for all checkpoints and tasks, since importing lmms-eval costs 9 s; a process of its
own, since the import changes torch.distributed's timeout, the seeds, the warnings and PIL. It stops
at the first failure; the runner notes it and starts another process for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llm2clip_vlm.evaluation.vlm.jobs import JUDGE, RESULT_SCHEMA, EvaluationError, Job, data_hash
from llm2clip_vlm.evaluation.vlm.samples import (
    metric_errors,
    metrics_of,
    pair_samples,
    questions,
    samples_of,
    summarise,
)
from llm2clip_vlm.evaluation.vlm.tasks import build_task
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.metrics.statistics import cluster_sums, paired_bootstrap, sign_flip_test
from llm2clip_vlm.recipe.suite import SuiteRecipe
from llm2clip_vlm.runs.hashes import file_state
from llm2clip_vlm.runs.manifest import versions

_NO_MANAGER: Any = object()
"""Given in place of lmms-eval's task manager, which would index 1,700 files; task objects need
no manager."""


def main(argv: list[str] | None = None) -> int:
    """Run the jobs of a file that :mod:`llm2clip_vlm.evaluation.vlm.jobs` has written.

    Returns:
        0; a failure raises.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", type=Path)
    order = json.loads(parser.parse_args(argv).jobs.read_text(encoding="utf-8"))
    quiet()
    suite, tasks_dir = SuiteRecipe.model_validate(order["suite"]), Path(order["tasks_dir"])
    tasks: dict[int, Any] = {}
    adapter, loaded = None, None
    with tempfile.TemporaryDirectory(prefix="l2c-lmms-") as scratch:
        for job in (Job(**entry) for entry in order["jobs"]):
            if (index := job.task_index) not in tasks:
                judge = suite.judge == "environment"
                tasks[index] = build_task(suite.tasks[index], tasks_dir, scratch, judge=judge)
            if loaded != job.checkpoint:
                adapter = None  # its model goes before the next one comes
                loaded, adapter = job.checkpoint, load_adapter(job.path, suite)
            score(job, suite, tasks[index], adapter, Path(order["output"]))
    return 0


def load_adapter(path: str, suite: SuiteRecipe) -> Any:
    """Load a checkpoint behind lmms-eval's interface, for one task after another."""
    from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat
    from llm2clip_vlm.models.vlm.building import load_checkpoint

    model, processor = load_checkpoint(path, dtype=suite.dtype, device=suite.device)
    return Llm2ClipVlmChat(
        model=model,
        processor=processor,
        batch_size=suite.batch_size,
        max_new_tokens=suite.max_new_tokens,
    )


def quiet() -> None:
    """Undo what importing lmms-eval does, and leave only its warnings.

    It lets PIL pass truncated pictures; here such a picture is an error.
    """
    import datasets
    import lmms_eval.evaluator  # noqa: F401  (resets loguru's sinks, so it must come first)
    from loguru import logger
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="lmms-eval: {message}")
    datasets.disable_progress_bars()


def score(job: Job, suite: SuiteRecipe, task: Any, adapter: Any, output: Path) -> dict[str, Any]:
    """Evaluate one task on one checkpoint and write its samples, then its result.

    Args:
        job: The job.
        suite: Settings to record.
        task: Result of :func:`build_task`.
        adapter: A live chat adapter.
        output: Folder of all results.

    Returns:
        The result as written.

    Raises:
        EvaluationError: Documents are missing from the samples, or too many answers are empty.
    """
    spec, folder = suite.tasks[job.task_index], output / job.checkpoint
    where = f"{job.checkpoint} / {job.task}"
    limit = suite.limit or spec.limit
    job.result_path(output).unlink(missing_ok=True)
    asked = (task.config.generation_kwargs or {}).get("max_new_tokens") or 0
    most = suite.max_new_tokens
    told = f"; answers end at max_new_tokens={most} of the suite, not {asked}"
    cut = told if asked > most else ""
    print(f"{job.checkpoint}: {spec.title or job.task}{cut}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    found = _answered(adapter, suite, task, folder, limit)
    names = [m["metric"] for m in task.config.metric_list if m.get("higher_is_better", True)]
    documents, logged = len(task.eval_docs), found["samples"].get(spec.task) or []
    if not logged:
        raise EvaluationError(f"{where}: no document was answered")
    metrics = metrics_of(found["results"][spec.task])
    # The first that documents have a value of: another in its place would be another score.
    primary = next((n for n in names if any(d.get(n) is not None for d in logged)), names[0])
    if primary not in metrics:
        raise EvaluationError(f"{where}: {primary} of all documents is no number; got {metrics}")
    whole = spec.program is not None
    pictures, prompt, num_cut = adapter.pictures, adapter.prompt_example, adapter.num_cut
    samples = samples_of(logged, names, task.aggregation(), pictures, whole=whole)
    counts = summarise(samples, metrics[primary] if whole else None) | {"n_cut": num_cut}
    counts["n_errors"] = min(limit or documents, documents) - len(samples)
    if counts["n_errors"]:
        raise EvaluationError(f"{where}: {counts['n_errors']} documents have no answer")
    max_empty = suite.max_empty if spec.max_empty is None else spec.max_empty
    if counts["n_empty"] > max_empty * counts["n"]:
        raise EvaluationError(
            f"{where}: {counts['n_empty']} of {counts['n']} answers are empty, more than "
            f"max_empty={max_empty}; look at the chat template and end token of {job.path} before "
            "believing a score"
        )
    seen = {}
    if spec.other_pictures:
        if not pictures:
            raise EvaluationError(
                f"{where}: other_pictures: expected documents with pictures, got none; leave the "
                "key out for this task"
            )
        found = _answered(adapter, suite, task, folder, limit, other_pictures=True)
        others = samples_of(
            found["samples"][spec.task], names, task.aggregation(), pictures, whole=whole
        )
        score = 100 * metrics_of(found["results"][spec.task])[primary] if whole else None
        seen["other_pictures"] = against_others(samples, others, score)
    split = task.config.test_split or task.config.validation_split
    result = {
        "schema": RESULT_SCHEMA,
        "task": job.task,
        "title": spec.title or job.task,
        "limit": limit,
        "documents": documents,
        "metrics": metrics,
        # A scorer that starts a program takes seconds a time: not a hundred times more.
        "metric_errors": metric_errors(
            logged, samples, {} if spec.program else metrics, task.aggregation()
        ),
        "primary_metric": primary,
        **counts,
        **seen,
        "checkpoint": {"name": job.checkpoint, "path": job.path, "sha256": job.sha256},
        "spec_hash": job.spec_hash,
        "data": {
            "path": spec.data_files,
            "sha256": data_hash(Path(spec.data_files)) if spec.data_files else None,
            "fingerprint": getattr(task.dataset[split], "_fingerprint", None),
        },
        "settings": _settings(adapter),
        "deviation": suite.deviations.get(job.task),
        "overrides": spec.overrides,
        "judge": {name: os.environ.get(name) for name in JUDGE} if spec.judge else None,
        "generation_kwargs": task.config.generation_kwargs,
        "prompt_example": prompt,
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    samples_path = job.samples_path(output)
    write_atomically(samples_path, lines)
    result["files"] = {samples_path.name: file_state(samples_path)}
    write_atomically(job.result_path(output), json.dumps(result, indent=2, ensure_ascii=False))
    return result


def _answered(
    adapter: Any,
    suite: SuiteRecipe,
    task: Any,
    folder: Path,
    limit: int | None,
    *,
    other_pictures: bool = False,
) -> dict[str, Any]:
    """Have lmms-eval ask and score a task."""
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    adapter.other_pictures = other_pictures
    try:
        # No seeds: they would change the caller's random state. No bootstrap: it is clustered here.
        found: dict[str, Any] = simple_evaluate(
            model=adapter,
            tasks=[task],
            task_manager=_NO_MANAGER,
            limit=limit,
            bootstrap_iters=0,
            batch_size=suite.batch_size,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            process_docs_parallel=1,
            cli_args=argparse.Namespace(
                output_path=str(folder),
                process_with_media=False,
                reasoning_tags=None,
                agentic_trace_mode="basic",
            ),
        )
    except RetryError as error:
        error.reraise()
    finally:
        adapter.other_pictures = False
    return found


def against_others(
    samples: list[dict[str, Any]], others: list[dict[str, Any]], score: float | None
) -> dict[str, Any]:
    """Compare answers with those that were given at other documents' pictures.

    Args:
        samples: The task's samples; each gets the other answer as `other_answer`, in place.
        others: Samples of the same documents.
        score: What the others score together. None: the mean of their documents.

    Returns:
        `{score}`, and where documents have scores `{delta, ci, n, images, p}`: own minus other
        pictures in percentage points, resampled and sign-flipped by picture.
    """
    for sample, other in zip(samples, others, strict=True):
        sample["other_answer"] = other["answer"]
    if score is not None:
        return {"score": score}
    pairs = pair_samples(questions(samples), questions(others))
    right = pairs.correct_a, pairs.correct_b
    found = paired_bootstrap(*right, pairs.image_ids)
    p = sign_flip_test(cluster_sums(right[0] - right[1], pairs.image_ids))
    return {"score": 100 * float(right[1].mean()), **found, "p": p}


def _settings(adapter: Any) -> dict[str, Any]:
    generator, processor = adapter.generator, adapter.generator.processor
    return {
        "batch_size": generator.batch_size,
        "max_new_tokens": generator.max_new_tokens,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": str(generator.model.device),
        "model": type(generator.model).__name__,
        "processor": type(processor).__name__,
        "image_processor": type(processor.image_processor).__name__,
    }


if __name__ == "__main__":
    sys.exit(main())
