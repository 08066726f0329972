"""lmms-eval's task objects for a suite's entries: read, overridden, pointed at local files."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llm2clip_vlm.evaluation.vlm import MODEL_ID
from llm2clip_vlm.evaluation.vlm.jobs import EvaluationError, task_yaml
from llm2clip_vlm.recipe.suite import LmmsTask

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
        EvaluationError: A judge task, another output than text, a bad override, a file that names
            another task, several filters, or a first metric that is better the lower it is.
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
    if (name := config.get("task")) != spec.task:
        raise EvaluationError(f"task {spec.task}: its file says `task: {name}`; give both one name")
    main, *_ = config.get("metric_list") or [{}]
    if not main.get("higher_is_better", True):
        raise EvaluationError(
            f"task {spec.task}: its first metric, {main['metric']}, is better the lower it is, and "
            "comparisons take more for better; put another first: overrides: {metric_list: [...]}"
        )
    if len(filters := [f["name"] for f in config.get("filter_list") or []]) > 1:
        raise EvaluationError(
            f"task {spec.task}: filters {filters} give each metric several values; keep one: "
            "overrides: {filter_list: [...]}"
        )
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL_ID)
    except RetryError as error:
        error.reraise()
