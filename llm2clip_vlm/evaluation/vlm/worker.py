"""The subprocess that talks to lmms-eval: `python -P -m llm2clip_vlm.evaluation.vlm.worker JOBS`.

One process for all checkpoints and tasks, since importing lmms-eval costs 9 s; a process of its
own, since the import changes torch.distributed's timeout, the seeds, the warnings and PIL. It stops
at the first failure; the runner notes it and starts another process for the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llm2clip_vlm.evaluation.vlm import MODEL_ID
from llm2clip_vlm.evaluation.vlm.jobs import (
    JUDGE,
    RESULT_SCHEMA,
    EvaluationError,
    Job,
    data_hash,
    task_yaml,
)
from llm2clip_vlm.evaluation.vlm.samples import metric_errors, metrics_of, samples_of, summarise
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe
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
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    spec, folder = suite.tasks[job.task_index], output / job.checkpoint
    limit = suite.limit or spec.limit
    job.result_path(output).unlink(missing_ok=True)
    print(f"{job.checkpoint}: {spec.title or job.task}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        # No seeds: they would change the caller's random state. No bootstrap: it is clustered here.
        found = simple_evaluate(
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
    seconds = time.perf_counter() - started
    names = [metric["metric"] for metric in task.config.metric_list]
    documents, logged = len(task.eval_docs), found["samples"].get(spec.task) or []
    if not logged:
        raise EvaluationError(f"{job.checkpoint} / {job.task}: no document was answered")
    metrics = metrics_of(found["results"][spec.task])
    if not metrics:
        raise EvaluationError(f"{job.checkpoint} / {job.task}: none of {names} has a value")
    primary = next((name for name in names if name in metrics), names[0])
    whole = spec.program is not None
    samples = samples_of(logged, names, task.aggregation(), adapter.pictures, whole=whole)
    counts = summarise(samples, metrics[primary] if whole else None)
    counts["n_errors"] = min(limit or documents, documents) - len(samples)
    _refuse(job, counts, suite.max_empty if spec.max_empty is None else spec.max_empty)
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
        "prompt_example": adapter.prompt_example,
        "versions": versions(),
        "seconds": seconds,
    }
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    samples_path = job.samples_path(output)
    write_atomically(samples_path, lines)
    result["files"] = {samples_path.name: file_state(samples_path)}
    write_atomically(job.result_path(output), json.dumps(result, indent=2, ensure_ascii=False))
    return result


def _refuse(job: Job, counts: Mapping[str, Any], max_empty: float) -> None:
    if counts["n_errors"]:
        raise EvaluationError(
            f"{job.checkpoint} / {job.task}: {counts['n_errors']} documents have no answer"
        )
    if counts["n_empty"] > max_empty * counts["n"]:
        raise EvaluationError(
            f"{job.checkpoint} / {job.task}: {counts['n_empty']} of {counts['n']} answers are "
            f"empty, more than max_empty={max_empty}; look at the chat template and end token "
            f"of {job.path} before believing a score"
        )


def _settings(adapter: Any) -> dict[str, Any]:
    generator = adapter.generator
    processor = generator.processor
    return {
        "batch_size": generator.batch_size,
        "max_new_tokens": generator.max_new_tokens,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": str(generator.model.device),
        "model": type(generator.model).__name__,
        "processor": type(processor).__name__,
        "image_processor": type(processor.image_processor).__name__,
    }


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Loader of `datasets` for each kind of local file, gzipped or not."""

JUDGE_MARKS = ("OPENAI_API", "AZURE_", "llm_judge", "get_chat_response")
"""Text in a scorer's folder that means: another model is asked. Without its key lmms-eval prints
nonsense (0.0 or even 100.0), so such tasks are refused."""

STATIC_DESPITE_MARKS = frozenset({"mmbench_en_dev_static", "l2c_mmbench_cn_dev_static"})
"""Tasks whose scorer shares a file with a judge and never calls it."""


def load_config(yaml: Path) -> dict[str, Any]:
    """Read a task's YAML with includes merged and functions imported.

    A hub token is dropped: it makes public data sets fail without a login. Some modules make a
    client of the judge when they are imported, and where `openai` is installed it wants a key: it
    gets none that works, and is never asked (a suite with a judge needs a key of its own).
    """
    from lmms_eval.utils import load_yaml_config

    with patch.dict(os.environ, {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "none")}):
        config: dict[str, Any] = load_yaml_config(str(yaml), mode="full")
    kwargs = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "token"}
    config["dataset_kwargs"] = kwargs or None
    return config


def refuse_judge(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task whose score comes from another model.

    Raises:
        EvaluationError: A file in its scorer's folder mentions a judge.
    """
    if name in STATIC_DESPITE_MARKS:
        return
    functions = [config.get("process_results")]
    functions += [metric.get("aggregation") for metric in config.get("metric_list") or []]
    # The whole folder: a scorer may reach its judge through a module beside it. Ours ask none.
    folders = {
        Path(inspect.getfile(given)).parent
        for given in functions
        if callable(given) and not given.__module__.startswith("llm2clip_vlm.")
    }
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        marks = [mark for mark in JUDGE_MARKS if mark in file.read_text(encoding="utf-8")]
        if marks:
            raise EvaluationError(
                f"task {name}: its scorer asks a judge model ({marks[0]} in {file.name}); mark it "
                "`judge: true` and give the suite `judge: environment`"
            )


def redirect(config: dict[str, Any], data: Path, cache_dir: str | None) -> None:
    """Make a task read a local file instead of its data set.

    Args:
        config: Changed in place; the split keeps its name.
        data: Parquet, JSON lines, JSON or CSV. Its folder becomes the task's `image_root`.
        cache_dir: Where `datasets` keeps its copy. None: its usual place.

    Raises:
        EvaluationError: A file of another kind, or a task without a split.
    """
    suffix = Path(data.name.removesuffix(".gz")).suffix
    if suffix not in LOADERS:
        raise EvaluationError(f"data file {data}: expected one of {', '.join(LOADERS)}")
    split = config.get("test_split") or config.get("validation_split")
    if split is None:
        raise EvaluationError(f"task {config.get('task')}: has neither test nor validation split")
    config["dataset_path"], config["dataset_name"] = LOADERS[suffix], None
    config["dataset_kwargs"] = {"data_files": {str(split).strip(): str(data.resolve())}}
    config["test_split"] = str(split).strip()
    if cache_dir is not None:
        config["dataset_kwargs"]["cache_dir"] = cache_dir
    kwargs = config.get("lmms_eval_specific_kwargs") or {}
    if "image_root" in kwargs.get("default", {}):
        kwargs["default"]["image_root"] = str(data.resolve().parent)


def merge(config: dict[str, Any], overrides: Mapping[str, Any], *, inside: bool = False) -> None:
    """Lay a suite's overrides over a task's configuration, in place.

    A text `!function MODULE.NAME` stands for a function of this package or of lmms-eval.

    Raises:
        EvaluationError: A key that lmms-eval's `TaskConfig` does not have, or no such function.
    """
    from lmms_eval.api.task import TaskConfig

    if not inside:
        known = {field.name for field in dataclasses.fields(TaskConfig)}
        if unknown := sorted(set(overrides) - known):
            raise EvaluationError(f"overrides: {unknown} are no keys of an lmms-eval task")
    for key, value in overrides.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(config.get(key), dict):
            merge(config[key], value, inside=True)
        else:
            config[key] = _with_functions(value)


def _with_functions(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_functions(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _with_functions(item) for key, item in value.items()}
    if not (isinstance(value, str) and value.startswith("!function ")):
        return value
    module, _, name = value.removeprefix("!function ").strip().rpartition(".")
    if module.partition(".")[0] not in ("llm2clip_vlm", "lmms_eval"):
        raise EvaluationError(f"overrides: {value}: expected a function of llm2clip_vlm, lmms_eval")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"overrides: {value}: {error}") from None


def build_task(
    spec: LmmsTask, tasks_dir: Path, cache_dir: str | None = None, *, judge: bool = False
) -> Any:
    """Build the lmms-eval task object of a suite's entry, for the chat adapter.

    Args:
        spec: The suite's entry.
        tasks_dir: Folder of further tasks, as of :func:`~llm2clip_vlm.evaluation.vlm.jobs.plan`.
        cache_dir: See :func:`redirect`.
        judge: Whether there is a judge; tasks marked as needing one may then be built.

    Returns:
        A `ConfigurableMessagesTask`.

    Raises:
        EvaluationError: A judge task, another output than text, or a bad override.
        Exception: Whatever kept the data set from loading (lmms-eval retries, then hides it).
    """
    from lmms_eval.api.task import ConfigurableMessagesTask
    from tenacity import RetryError

    config = load_config(task_yaml(spec.task, tasks_dir))
    if not (judge and spec.judge):
        refuse_judge(spec.task, config)
    merge(config, spec.overrides)
    if spec.data_files:
        redirect(config, Path(spec.data_files), cache_dir)
    if config.get("output_type", "generate_until") != "generate_until":
        raise EvaluationError(
            f"task {spec.task}: output_type {config['output_type']}; only generate_until is scored "
            "(lmms-eval 0.7 breaks multiple_choice; use the task's generating variant)"
        )
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL_ID)
    except RetryError as error:
        error.reraise()


if __name__ == "__main__":
    sys.exit(main())
