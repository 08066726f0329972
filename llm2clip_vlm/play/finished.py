"""What finished runs left below a folder, found by their manifests."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest
from llm2clip_vlm.training.callbacks import read_losses

VLM_STAGES = ("stage4_instruction",)
"""Stages whose models one can talk with."""
ENCODER_STAGES = ("stage2b_vision_encoder", "clip_baseline")
"""Stages whose models find pictures by words."""


@dataclass(frozen=True)
class FinishedRun:
    """A stage that finished."""

    name: str
    """Its folder below the one that was searched."""
    folder: Path
    """Where it is."""
    stage: str
    """The program."""
    seconds: float
    """Wall time."""
    losses: list[tuple[int, float]]
    """Steps and losses."""
    photos: str | None
    """Folder with the pictures that it was evaluated with."""


def finished_runs(root: str | Path) -> list[FinishedRun]:
    """Find the stages below a folder, the latest first; what no stage left is skipped."""
    found = []
    files = sorted(Path(root).rglob(MANIFEST_NAME), key=lambda file: -file.stat().st_mtime)
    for folder in (file.parent for file in files):
        try:
            manifest = read_manifest(folder) or {}
        except HandoffError:  # around one run: another program's file, or damaged
            continue
        source = next(iter(manifest["recipe"].get("evaluation") or ()), None) or {}
        photos = source.get("image_root")
        if photos is None and "path" in source:
            photos = str(Path(source["path"]).parent)
        photos = photos and from_run(folder, manifest, photos)
        name = folder.relative_to(root).as_posix()
        losses: list[tuple[int, float]] = []
        with suppress(ValueError):  # a damaged log is no reason to hide a model
            losses = read_losses(folder / "metrics.jsonl")
        stage, seconds = manifest["stage"], manifest["seconds"]
        found.append(FinishedRun(name, folder, stage, seconds, losses, photos))
    return found


def from_run(folder: Path, manifest: dict[str, Any], path: str) -> str:
    """Find what a recipe named from the folder in which it was run, wherever this process is.

    Args:
        folder: Output of a finished stage.
        manifest: Its manifest.
        path: Path that the recipe gives; absolute, from where the stage was started, or a hub id.

    Returns:
        A path that is there, or else the same.
    """
    output = Path(manifest["recipe"].get("output_dir") or folder).parts
    whole = folder.resolve().parts
    if Path(path).exists() or whole[-len(output) :] != output:
        return path
    there = Path(*whole[: -len(output)], path)
    return str(there) if there.exists() else path
