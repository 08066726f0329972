"""Running a suite of lmms-eval tasks: plan, resume, spawn, and a report of what failed.

Never call lmms-eval in a training process; call :func:`run_suite`, which spawns
:mod:`~llm2clip_vlm.evaluation.vlm.worker` and reads files back.

Light on purpose: whether anything is left to do is known without importing torch or lmms-eval.
A result belongs to one checkpoint content and one task specification; when either changes, the file
is stale and is made again. lmms-eval's own response cache is never used: its key is the path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import llm2clip_vlm
from llm2clip_vlm.data.reading.images import resolve_image
from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.data.reading.shards import IMAGE_SUFFIXES
from llm2clip_vlm.files import find_shipped, read_json, write_atomically
from llm2clip_vlm.recipe.reading import did_you_mean
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe
from llm2clip_vlm.runs.card import add_scores, metric_and_score
from llm2clip_vlm.runs.hashes import changed_files, fingerprint_dir, fingerprint_file, hash_json
from llm2clip_vlm.runs.inputs import missing_model
from llm2clip_vlm.runs.manifest import versions
from llm2clip_vlm.runs.ownership import Hold

logger = logging.getLogger(__name__)

RESULT_SCHEMA = 1
"""Version of the result files."""

SCORING_CODE = (
    "chat/jinja_budget.py",
    "chat/labels.py",
    "chat/template.py",
    "chat/text_tokens.py",
    "data/reading/cut_images.py",
    "data/reading/images.py",
    "data/reading/samples.py",
    "evaluation/vlm/adapter.py",
    "evaluation/vlm/generation.py",
    "evaluation/vlm/llava15.py",
    "evaluation/vlm/samples.py",
    "evaluation/vlm/shared_prefix.py",
    "evaluation/vlm/task_helpers.py",
    "evaluation/vlm/tasks.py",
    "evaluation/vlm/token_queue.py",
    "evaluation/vlm/worker.py",
    "models/equal.py",
    "models/vision/image_mode.py",
)
"""Files of this package whose change makes earlier results stale."""

JUDGE = ("MODEL_VERSION", "OPENAI_API_URL", "API_TYPE")
"""Environment variables by which lmms-eval knows which model judges, and where."""

_TASK_LINE = re.compile(rb"^task\s*:\s*[\"']?([\w.\-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)


class EvaluationError(ValueError):
    """An evaluation that cannot be made, or whose numbers would not mean what they say."""


@dataclass(frozen=True)
class Job:
    """One task on one checkpoint."""

    checkpoint: str
    """Its name in results and reports."""
    path: str
    """Its directory."""
    sha256: str
    """Fingerprint of its content."""
    task_index: int
    """Place of the task in the suite."""
    task: str
    """Name of the result: that of the task, unless the suite gives another."""
    spec_hash: str
    """Hash of everything but the checkpoint that decides the score."""

    def result_path(self, output: Path) -> Path:
        """File of the result; it is written last."""
        return output / self.checkpoint / f"{self.task}.json"

    def samples_path(self, output: Path) -> Path:
        """File of the samples."""
        return output / self.checkpoint / f"{self.task}.samples.jsonl"

    def result(self, output: Path) -> dict[str, Any] | None:
        """Read the finished result. None: there is no result of this content."""
        file = self.result_path(output)
        if not file.is_file() or not self.samples_path(output).is_file():
            return None
        damaged = f"{file} is damaged; delete it to have it made again"
        try:
            found: dict[str, Any] = read_json(file)
        except ValueError as error:
            raise EvaluationError(f"{damaged} ({error})") from None
        files, judged = found.get("files", {}), found.get("checkpoint", {})
        if not (isinstance(files, dict) and isinstance(judged, dict)):
            raise EvaluationError(damaged)
        made_of = found.get("schema"), found.get("spec_hash"), judged.get("sha256")
        same = made_of == (RESULT_SCHEMA, self.spec_hash, self.sha256)
        return found if same and not any(changed_files(files, file.parent)) else None


def task_yaml(name: str, tasks_dir: Path) -> Path:
    """Find the YAML of a task: below `tasks_dir`, else shipped here, else built into lmms-eval.

    Raises:
        EvaluationError: No such task, with the nearest names.
    """
    own = [file for folder in (tasks_dir, own_tasks()) for file in sorted(folder.rglob("*.yaml"))]
    if found := next((file for file in own if file.stem == name), None):
        return found
    names = {path.stem for path in own}
    for path, built_in in _builtin_tasks():
        if built_in == name:
            return path
        names.add(built_in)
    raise EvaluationError(
        f"task {name!r}: not below {tasks_dir} and not built into lmms-eval (a group? name its "
        f"tasks instead){did_you_mean(name, names)}"
    )


def _builtin_tasks() -> Iterator[tuple[Path, str]]:
    """Every built-in task's file and name, by reading instead of importing (0.3 s, not 8)."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("lmms_eval is not installed; pip install 'llm2clip_vlm[eval]'")
    for path in sorted((Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml")):
        if match := _TASK_LINE.search(path.read_bytes()):
            yield path, match.group(1).decode()


def plan(suite: SuiteRecipe, checkpoints: Mapping[str, str | Path], tasks_dir: Path) -> list[Job]:
    """All jobs of a suite, checkpoint by checkpoint.

    Args:
        suite: Tasks and data.
        checkpoints: Name -> directory.
        tasks_dir: Folder of further tasks, which come before our own.

    Returns:
        A job for each checkpoint and task; without the tasks that :func:`left_out` names.

    Raises:
        EvaluationError: A checkpoint, task, data file or image that is not there, a name that is no
            file name, two tasks of one name or title, or a judge asked for that has no key.
    """
    check_checkpoints(checkpoints)
    names = [task.name or task.task for task in suite.tasks]
    titles = [task.title or task.name or task.task for task in suite.tasks]
    for key, given in (("name", names), ("title", titles)):  # charts and cards go by titles
        if twice := {name for name in given if given.count(name) > 1}:
            raise EvaluationError(f"tasks: {sorted(twice)} given twice; give each a `{key}`")
    if suite.judge == "environment" and not os.environ.get("OPENAI_API_KEY"):
        raise EvaluationError(
            "judge: environment: expected OPENAI_API_KEY, got none; without it lmms-eval writes 0 "
            "or 100; set it, or leave `judge: none`"
        )
    specs = {
        index: spec_hash(suite, task, tasks_dir)
        for index, task in enumerate(suite.tasks)
        if names[index] not in left_out(suite)
    }
    digests = {name: fingerprint_dir(folder) for name, folder in checkpoints.items()}
    return [
        Job(name, str(checkpoints[name]), digest, index, names[index], spec)
        for (name, digest), (index, spec) in product(digests.items(), specs.items())
    ]


def check_checkpoints(checkpoints: Mapping[str, str | Path]) -> None:
    """Look for the checkpoints, before anything takes time.

    Raises:
        EvaluationError: One is not there, or its name is no file name.
        ModelError: It is a GGUF file, or no VLM.
    """
    from llm2clip_vlm.models.checkpoint_files import refuse_gguf, require_vlm

    for name, folder in checkpoints.items():
        if not re.fullmatch(r"[\w.\-]+", name) or name.startswith("."):
            raise EvaluationError(f"checkpoint name {name!r}: expected letters, digits, _ - .")
        if not (Path(folder) / "config.json").is_file():
            refuse_gguf(Path(folder))
            why = missing_model(str(folder))
            if why is None or "hf download" in why:
                why = (
                    f"{folder}: expected a model directory, found no config.json; of the hub: "
                    f"`hf download {folder} --local-dir DIR`, then name DIR"
                )
            raise EvaluationError(f"checkpoint {name}: {why}")
        require_vlm(folder)


def left_out(suite: SuiteRecipe) -> dict[str, str]:
    """Results that a suite does not make here, and what is missing for them."""
    found = {}
    for task in suite.tasks:
        if task.judge and suite.judge != "environment":
            found[task.name or task.task] = "a judge"
        elif task.program and shutil.which(task.program) is None:
            found[task.name or task.task] = task.program
    return found


def spec_hash(suite: SuiteRecipe, task: LmmsTask, tasks_dir: Path) -> str:
    """Hash of what decides a score besides the checkpoint: task files, data, settings, code.

    Raises:
        EvaluationError: The task, its data file or one of its images is missing.
    """
    roots = (tasks_dir.resolve(), own_tasks().resolve())
    yamls = [task_yaml(task.task, tasks_dir).resolve()]
    for file in yamls:  # and those that they include, wherever they lie
        words = re.findall(r"[\w./-]+yaml\b", file.read_text(encoding="utf-8"))
        named = {(file.parent / word).resolve() for word in words}
        yamls += [path for path in named.difference(yamls) if path.is_file()]
    folders = {yaml.parent for yaml in yamls}
    folders |= {up for part in folders for up in part.parents if any(map(up.is_relative_to, roots))}
    files = [f for part in folders for end in ("*.py", "*yaml") for f in part.glob(end)]
    parts = {
        "task": task.model_dump(mode="json", exclude=_SAME_SCORE),
        "whole": task.program is not None,  # a metric of all documents, not a mean of theirs
        "limit": suite.limit,
        "files": _files_hash(sorted(files)),
        "code": _files_hash([Path(llm2clip_vlm.__file__).parent / name for name in SCORING_CODE]),
        "data": data_hash(Path(task.data_files), task.made_by) if task.data_files else None,
        "settings": [suite.batch_size, suite.max_new_tokens, suite.dtype, suite.max_empty],
        "judge": [os.environ.get(name) for name in JUDGE] if task.judge else None,
        "versions": [versions().get(name) for name in ("lmms_eval", "transformers")],
    }
    return hash_json(parts)


_SAME_SCORE = {"data_files", "made_by", "title", "name", "program"}
"""Keys of a task that change no score by themselves."""


def data_hash(file: Path, made_by: str | None = None) -> str:
    """Hash of a data file and, but for a table that holds them, of every image that it names.

    An image is what `image` names, and any other file of an image's suffix that a row names.

    Args:
        file: The file.
        made_by: Command that makes it, for the message.

    Raises:
        EvaluationError: The file or an image is missing.
    """
    if not file.is_file():
        words = (find_shipped(word) for word in (made_by or "").split(" "))
        remedy = f"make it: {' '.join(words)}" if made_by else "write it"
        raise EvaluationError(f"data file {file}: not there; set data_dir, or {remedy}")
    digest = hashlib.sha256(fingerprint_file(file).encode())
    if file.suffix != ".parquet":
        rows = [*iter_rows(file)]
        images = dict.fromkeys(str(row["image"]) for row in rows if row.get("image"))
        others = dict.fromkeys(v for row in rows for v in row.values() for v in _pictures(v))
        named = [resolve_image(file.parent, name) for name in images]
        named += [path for v in others if v not in images and (path := file.parent / v).is_file()]
        for path in named:
            digest.update(fingerprint_file(path).encode())
    return digest.hexdigest()


def _pictures(value: Any) -> list[str]:
    """Names of pictures in a column's value, a list of them or a single one."""
    names = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    return [v for v in names if v.rpartition(".")[2].lower() in IMAGE_SUFFIXES]


def _files_hash(files: Sequence[Path]) -> str:
    return hash_json([[file.name, fingerprint_file(file)] for file in files])


GATE_NAME = "score_gate.json"
"""File of `--expected` beside a checkpoint's results."""

_DISTRIBUTED = tuple(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK "
    "MASTER_ TORCHELASTIC_ ACCELERATE_ FSDP_".split()
)
"""Prefixes of the variables of a distributed launch."""


def own_tasks() -> Path:
    """The folder of our own tasks."""
    return Path(find_shipped("eval/tasks", here=False))


def run_suite(
    suite: SuiteRecipe,
    checkpoints: Mapping[str, str | Path],
    output: str | Path,
    tasks_dir: Path | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate checkpoints; results that are there for the same content are kept.

    Args:
        suite: Suite from `load_recipe(path, SuiteRecipe)`.
        checkpoints: Name -> directory of a vision-language model.
        output: Gets `<name>/<task>.json` and `<name>/<task>.samples.jsonl`, each written at once.
        tasks_dir: Folder of the caller's own tasks, whose Python files are run. None: ours alone.

    Returns:
        `{checkpoint: {task: result}}`, every result as in its file.

    Raises:
        OwnershipError: Another evaluation writes there, or files lie there of no evaluation.
        EvaluationError: Something is missing before the start, or tasks failed; the message names
            them, the others are finished and kept.
    """
    tasks, out = own_tasks() if tasks_dir is None else tasks_dir.resolve(), Path(output)
    if not tasks.is_dir():
        raise EvaluationError(f"{tasks}: expected a folder of lmms-eval tasks, found none")
    jobs = plan(suite, checkpoints, tasks)
    pending = [job for job in jobs if job.result(out) is None]
    logger.info("%d of %d evaluations to do", len(pending), len(jobs))
    for name, lacking in left_out(suite).items():
        logger.warning("%s: not run, for want of %s", name, lacking)
    written = [path for job in jobs for path in (job.result_path(out), job.samples_path(out))]
    own = {GATE_NAME, *(path.name for path in written)}
    holds = [Hold(out / name, "evaluation", own) for name in checkpoints]
    failed: list[tuple[Job, int]] = []
    while pending:
        code = _spawn(suite, pending, out, tasks)
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
        assert result is not None, "a finished job lost its file meanwhile"
        found.setdefault(job.checkpoint, {})[job.task] = result
    for name, results in found.items():
        whole = (r for r in results.values() if (r["limit"] or r["documents"]) >= r["documents"])
        add_scores(Path(checkpoints[name]), {r["title"]: metric_and_score(r) for r in whole})
    return found


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


def _spawn(suite: SuiteRecipe, jobs: list[Job], output: Path, tasks: Path) -> int:
    order = output / f".jobs-{os.getpid()}.json"
    given = {
        "suite": suite.model_dump(mode="json"),
        "jobs": [asdict(job) for job in jobs],
        "output": str(output),
        "tasks_dir": str(tasks),
    }
    write_atomically(order, json.dumps(given))
    # -P: a folder `eval/` or `tasks/` beside the script must not become an importable package.
    command = [sys.executable, "-P", "-m", "llm2clip_vlm.evaluation.vlm.worker", str(order)]
    try:
        return subprocess.run(command, env=worker_environment(os.environ), check=False).returncode
    finally:
        order.unlink(missing_ok=True)
