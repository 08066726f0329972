"""A folder of finished stages with tiny models, as `llm2clip-vlm app` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import build_clip, write_image


def write_stage(folder: Path, stage: str, **recipe: Any) -> Path:
    """Makes a folder a finished stage's; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"schema": 1, "stage": stage, "recipe": recipe, "fingerprints": {}, "seconds": 90.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"step": step, "loss": 4.0 / step} for step in range(1, 6)] + [{"step": 5, "eval": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_finished(root: Path, tiny_llm: Path) -> Path:
    """Two VLMs, two encoders, photographs and a report; returns the run's folder."""
    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

    run = root / "run"
    for seed in range(8):
        write_image(root / "photos" / f"{seed}.png", seed, size_px=64)
    for seed, name in enumerate(("mine", "rival")):
        clip = build_clip(run / "towers" / name / "model", seed)
        write_stage(
            run / "towers" / name, "clip_baseline",
            evaluation=[{"path": "x.jsonl", "image_root": str(root / "photos")}],
        )  # fmt: skip
        save_vlm(*build_vlm(clip, tiny_llm), run / "vlm" / name / "model")
        write_stage(run / "vlm" / name, "stage4_instruction")
    (run / "report.html").write_text("<h1>What was found</h1>")
    return run
