"""Running a suite: plan, resume, spawn, and an honest account of what failed.

Never call lmms-eval in a training process; call :func:`run_suite`, which spawns
:mod:`.lmms_worker` and reads files back.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llm2clip_vlm
from llm2clip_vlm.config_eval import SuiteRecipe
from llm2clip_vlm.evaluation.lmms_job import (
    EvaluationError,
    Job,
    check_checkpoints,
    left_out,
    plan,
)
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.ownership import MARKER_NAME, Hold

logger = logging.getLogger(__name__)

GATE_NAME = "score_gate.json"
"""File of `--expected` beside a checkpoint's results."""

_DISTRIBUTED = tuple(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK "
    "MASTER_ TORCHELASTIC_ ACCELERATE_ FSDP_".split()
)
"""How the variables of a distributed launch begin."""


def assets_dir() -> Path:
    """`eval/` of a checkout, or its copy inside an installed package."""
    package = Path(llm2clip_vlm.__file__).parent
    installed = package / "eval_assets"
    return installed if installed.is_dir() else package.parent / "eval"


def run_suite(
    suite: SuiteRecipe,
    checkpoints: Mapping[str, str | Path],
    output: str | Path,
    limit: int | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate checkpoints; what is already there for the same content is not done again.

    Args:
        suite: From `load_recipe(path, SuiteRecipe)`.
        checkpoints: Name -> directory of a vision-language model.
        output: Gets `<name>/<task>.json` and `<name>/<task>.samples.jsonl`, each written at once.
        limit: First documents of each task only, recorded in the result.

    Returns:
        `{checkpoint: {task: result}}`, every result as in its file.

    Raises:
        OwnershipError: Another evaluation writes there, or files lie there that none has written.
        EvaluationError: Something is missing before the start, or tasks failed; the message names
            them, the others are finished and kept.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise EvaluationError(f"limit: expected a whole number of documents, got {limit!r}")
    check_checkpoints(checkpoints)
    tasks, out = assets_dir() / "tasks", Path(output)
    jobs = plan(suite, checkpoints, tasks, limit)
    pending = [job for job in jobs if job.result(out) is None]
    logger.info("%d of %d evaluations to do", len(pending), len(jobs))
    for name, lacking in left_out(suite).items():
        logger.warning("%s: not run, for want of %s", name, lacking)
    holds = [
        _hold(out, name, [job for job in jobs if job.checkpoint == name]) for name in checkpoints
    ]
    failed: list[tuple[Job, int]] = []
    while pending:
        code = _spawn(suite, pending, out, tasks, limit)
        left = [job for job in pending if job.result(out) is None]
        if left:
            # The worker does jobs in order and stops at the first that fails (or kills it).
            failed.append((left[0], code))
            logger.error("%s / %s failed (exit %d)", left[0].checkpoint, left[0].task, code)
        pending = left[1:]
    for hold in holds:
        hold.release()
    if failed:
        names = ", ".join(f"{job.checkpoint} / {job.task} (exit {code})" for job, code in failed)
        raise EvaluationError(
            f"{len(failed)} of {len(jobs)} evaluations failed: {names}; the reasons are above, the "
            "others are finished, the same command tries again"
        )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        result = job.result(out)
        assert result is not None, "a finished job lost its file while we looked"
        found.setdefault(job.checkpoint, {})[job.task] = result
    return found


def _hold(output: Path, checkpoint: str, jobs: list[Job]) -> Hold:
    """A checkpoint's folder, in which nothing is overwritten that no evaluation has written."""
    folder, older = output / checkpoint, set()
    for file in () if (folder / MARKER_NAME).exists() else folder.glob("*.json"):
        with suppress(ValueError):  # a version without markers left these
            if {"schema", "spec_hash"} <= read_json(file).keys():
                older |= {file.name, f"{file.stem}.samples.jsonl", GATE_NAME}
    own = [job for job in jobs if job.checkpoint == checkpoint]
    paths = [path for job in own for path in (job.result_path(output), job.samples_path(output))]
    names = {GATE_NAME, *(path.name for path in paths)}
    return Hold(folder, "evaluation", names, older=older)


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment of the subprocess.

    The variables of a distributed launch are left out: a worker that found `WORLD_SIZE=8` would
    wait for seven others. The package's own folder is added, for a checkout without installation.
    """
    kept = {key: value for key, value in environ.items() if not key.startswith(_DISTRIBUTED)}
    root = str(Path(llm2clip_vlm.__file__).resolve().parent.parent)
    paths = [root, *kept.get("PYTHONPATH", "").split(os.pathsep)]
    kept["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept


def _spawn(
    suite: SuiteRecipe, jobs: list[Job], output: Path, tasks: Path, limit: int | None
) -> int:
    order = output / f".jobs-{os.getpid()}.json"
    given = {
        "suite": suite.model_dump(mode="json"),
        "jobs": [asdict(job) for job in jobs],
        "output": str(output),
        "tasks_dir": str(tasks),
        "limit": limit,
    }
    write_atomically(order, json.dumps(given))
    # -P: a folder `eval/` or `tasks/` beside the script must not become an importable package.
    command = [sys.executable, "-P", "-m", "llm2clip_vlm.evaluation.lmms_worker", str(order)]
    try:
        return subprocess.run(command, env=worker_environment(os.environ), check=False).returncode
    finally:
        order.unlink(missing_ok=True)
