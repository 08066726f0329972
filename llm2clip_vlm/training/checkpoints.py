"""A checkpoint counts when it is whole: the list of its files, with hashes, is written last."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm2clip_vlm.distributed import world_size
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.fingerprint import HandoffError, fingerprint_file

logger = logging.getLogger(__name__)

SEAL_NAME = "files.json"
"""Processes that wrote a checkpoint, and sha256 of each file; without it, it is unfinished."""


def seal_checkpoint(folder: str | Path) -> None:
    """Mark a checkpoint as whole. Call it when all processes have written their files.

    Args:
        folder: The checkpoint.
    """
    root = Path(folder)
    seal = {"world_size": world_size(), "files": _hashes(root)}
    write_atomically(root / SEAL_NAME, json.dumps(seal, indent=1))


def damage(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint: unfinished, a file missing or changed; none = nothing.

    Args:
        folder: The checkpoint; its files are hashed.
    """
    root = Path(folder)
    if not (root / SEAL_NAME).is_file():
        return "it was not finished"
    try:
        wanted = json.loads((root / SEAL_NAME).read_bytes())["files"]
    except ValueError:
        return f"{SEAL_NAME} is cut or changed"
    found = _hashes(root)
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    return f"{changed[0]} is missing, cut or changed" if changed else None


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(f for f in root.rglob("*") if f.is_file() and f.name != SEAL_NAME)
    with ThreadPoolExecutor(8) as pool:
        names = (file.relative_to(root).as_posix() for file in files)
        return dict(zip(names, pool.map(fingerprint_file, files), strict=True))


def remove_unfinished(directory: str | Path, step: int) -> None:
    """Make room for the checkpoint of a step: leftovers of killed runs go, and damaged ones.

    Args:
        directory: Where the checkpoints are.
        step: The step that is written next; later ones were passed over when the run resumed.
    """
    for number, folder in _checkpoints(Path(directory)):
        if number >= step or not (folder / SEAL_NAME).is_file():
            shutil.rmtree(folder)


def newest_whole(directory: str | Path) -> str | None:
    """The checkpoint of the latest step that is whole; what is passed over is logged.

    Args:
        directory: Where the checkpoints are, if there are any.

    Raises:
        HandoffError: Another number of processes wrote it: optimizer shards, random states and the
            order of the samples are theirs.
    """
    for _, folder in sorted(_checkpoints(Path(directory)), reverse=True):
        if (problem := damage(folder)) is not None:
            logger.warning("%s is passed over: %s", folder, problem)
            continue
        written = json.loads((folder / SEAL_NAME).read_text())["world_size"]
        if written != world_size():
            raise HandoffError(
                f"{folder}: world_size: it was written by {written} processes, here are "
                f"{world_size()}; start {written}, or delete the checkpoints and begin anew"
            )
        return str(folder)
    return None


def _checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    for folder in directory.glob("checkpoint-*"):
        if folder.is_dir() and (step := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            yield int(step[1]), folder
