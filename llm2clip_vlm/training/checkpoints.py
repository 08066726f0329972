"""A checkpoint counts when it is whole: the list of its files, with hashes, is written last."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from llm2clip_vlm.constants import SEAL_NAME
from llm2clip_vlm.distributed import world_size
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.runs import hashes
from llm2clip_vlm.runs.ownership import MARKER_NAME, remove, sign

logger = logging.getLogger(__name__)


def seal_checkpoint(
    folder: str | Path, samples: int | None = None, pictures: Iterable[Path] = ()
) -> None:
    """Mark a checkpoint as whole. Call it when all processes have written their files.

    Args:
        folder: The checkpoint.
        samples: Samples that the run trains on, see :func:`refuse_other_samples`.
        pictures: Files of some of their pictures.
    """
    root = Path(folder)
    (root / MARKER_NAME).unlink(missing_ok=True)
    states = {"pictures": hashes.file_states(pictures), "files": _hashes(root)}
    seal = {"world_size": world_size(), "samples": samples} | states
    write_atomically(root / SEAL_NAME, json.dumps(seal, indent=1))


def refuse_other_samples(folder: str | Path, samples: int) -> None:
    """Refuse to go on with more or fewer samples: their order would be another.

    Data files are compared before, pictures beside them here: one that has come or gone makes a
    sample more or less, and of a few the bytes are looked at.

    Args:
        folder: The checkpoint.
        samples: Samples now.

    Raises:
        HandoffError: Gives both numbers, or names a picture.
    """
    seal = _seal(Path(folder)) or {}
    if (before := seal.get("samples")) not in (None, samples):
        raise hashes.HandoffError(
            f"{folder} was trained on {before} samples, now there are {samples}: pictures have "
            "come, gone or been damaged since, and the samples would come in another order; put "
            "them back as they were, or choose another output_dir"
        )
    for picture in hashes.changed_files(seal.get("pictures") or {}):
        raise hashes.HandoffError(
            f"{picture} has been changed or removed since {folder} was trained, and maybe other "
            "pictures, too; put them back as they were, or choose another output_dir"
        )


def damage(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint: unfinished, a file missing or changed. None: it is whole.

    Args:
        folder: The checkpoint; its files are hashed.
    """
    root = Path(folder)
    if not (root / SEAL_NAME).is_file():
        return "it was not finished"
    if (seal := _seal(root)) is None:
        return f"{SEAL_NAME} is cut or changed"
    wanted, found = seal["files"], _hashes(root)
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    return f"{changed[0]} is missing, cut or changed" if changed else None


def _seal(root: Path) -> dict[str, Any] | None:
    """Read a checkpoint's seal. None: it cannot be read."""
    try:
        seal: dict[str, Any] = read_json(root / SEAL_NAME)
    except ValueError:
        return None
    keys = {"files": dict, "world_size": int}
    return seal if all(isinstance(seal.get(k), kind) for k, kind in keys.items()) else None


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(
        f for f in root.rglob("*") if f.is_file() and f.name not in (SEAL_NAME, MARKER_NAME)
    )
    with ThreadPoolExecutor(8) as pool:
        names = (file.relative_to(root).as_posix() for file in files)
        return dict(zip(names, pool.map(hashes.fingerprint_file, files), strict=True))


def make_room(directory: str | Path, step: int) -> None:
    """Make room for the checkpoint of a step, and mark its folder as one that is being written.

    What a killed run left unfinished is deleted, and nothing else: a whole or damaged checkpoint in
    the way, and later ones (they were passed over when the run resumed), are kept under another
    name, and so is what no run has put there.

    Args:
        directory: Where the checkpoints are.
        step: The step that is written next.
    """
    root = Path(directory)
    for number, folder in list(_checkpoints(root)):
        sealed = (folder / SEAL_NAME).is_file()
        if not sealed and (folder / MARKER_NAME).is_file():
            shutil.rmtree(folder)
        elif number == step or (sealed and number > step):
            names = (root / f"set-aside-{folder.name}-{n}" for n in count(1))
            aside = next(name for name in names if not name.exists())
            folder.rename(aside)
            logger.warning("%s is in the way of this run and was kept as %s", folder, aside)
    new = root / f"checkpoint-{step}"
    new.mkdir(parents=True, exist_ok=True)
    sign(new)


def rotate(directory: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints: the files that their seals list.

    Args:
        directory: Where the checkpoints are.
        limit: Number that stays. None: all.
        best: A checkpoint that stays, as the last one does.
    """
    sealed = [(step, folder) for step, folder in _checkpoints(Path(directory)) if _seal(folder)]
    kept = {folder for _, folder in sorted(sealed)[-1:]} | ({Path(best)} if best else set())
    surplus = len(sealed) - max(limit, len(kept)) if limit and limit > 0 else 0
    old = [folder for _, folder in sorted(sealed) if folder not in kept]
    for folder in old[: max(surplus, 0)]:
        if not remove(folder, [*(_seal(folder) or {"files": {}})["files"], SEAL_NAME]):
            logger.warning("%s was removed but for files that no run has written", folder)


def newest_whole(directory: str | Path) -> str | None:
    """The checkpoint of the latest step that is whole; what is passed over is logged.

    Args:
        directory: Where the checkpoints are, if there are any.

    Raises:
        HandoffError: Another number of processes wrote it, over which ZeRO has split the optimizer.
    """
    for _, folder in sorted(_checkpoints(Path(directory)), reverse=True):
        if (problem := damage(folder)) is not None:
            logger.warning("%s is passed over: %s", folder, problem)
            continue
        written = (_seal(folder) or {})["world_size"]
        if written != world_size():
            note = f"{folder} was written by {written} processes, now there are {world_size()}"
            if (folder / "latest").is_file():  # DeepSpeed's
                raise hashes.HandoffError(
                    f"{note}, and ZeRO has split the optimizer over them; start {written}, or "
                    "delete the checkpoints and begin anew"
                )
            logger.warning(
                "%s: weights, optimizer and the samples of each step stay; the model's random "
                "numbers (dropout) are drawn anew, and sums are rounded in another order",
                note,
            )
        return str(folder)
    return None


def _checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    for folder in directory.glob("checkpoint-*"):
        if folder.is_dir() and (step := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            yield int(step[1]), folder
