"""Judge an encoder: retrieval, compositional checks, classification, segmentation, detection.

Purpose: every task of a recipe on one checkpoint; each result names its protocol, the hash of its
    data, ties and intervals. A task whose result is there for the same weights, settings and files
    is not run again.
Needs: an `LLM2CLIPModel` with its text encoder, a CLIP or SigLIP, or (without texts) any vision
    tower; benchmarks in their published formats.
Writes: `<output_dir>/<name>.json` for each task, `<name>*.samples.jsonl` where a score is of items
    or images (for `llm2clip-vlm compare`), `results.json`, and `encoder.html` for people.
Launch: llm2clip-vlm eval recipes/eval/world.yaml model=runs/demo/towers/llm2clip/model
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.reading.images import picture_suffixes
from llm2clip_vlm.distributed import find_device
from llm2clip_vlm.evaluation.encoder import zero_shot
from llm2clip_vlm.evaluation.encoder.detection import detection
from llm2clip_vlm.evaluation.encoder.encoders import load_encoder
from llm2clip_vlm.evaluation.encoder.probes import linear_probe
from llm2clip_vlm.evaluation.encoder.segmentation import linear_segmentation, zero_shot_segmentation
from llm2clip_vlm.evaluation.report.comparison_pages import encoder_page
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from llm2clip_vlm.recipe.reading import load_recipe, words_of
from llm2clip_vlm.remote.addresses import is_remote, look_up
from llm2clip_vlm.runs.hashes import changed_files, data_files, file_state, hash_json
from llm2clip_vlm.runs.inputs import require_benchmarks
from llm2clip_vlm.runs.ownership import Hold

TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "retrieval": zero_shot.retrieval,
    "cra": zero_shot.caption_accuracy,
    "compositional": zero_shot.compositional,
    "zero_shot": zero_shot.classification,
    "linear_probe": linear_probe,
    "zero_shot_segmentation": zero_shot_segmentation,
    "segmentation": linear_segmentation,
    "detection": detection,
}

VERSION = 6
"""Version of the results; raised when a score or a hash is computed in another way, or more of an
item is kept."""

PAGE = "encoder.html"
"""What people read."""

_DETAILS = frozenset({"kinds", "categories", "iou", "images", "chance", "items", "queries"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    words = words_of(argv, __doc__)
    recipe = load_recipe(words[0], EncoderEvalRecipe, words[1:])
    names = [task.name or getattr(task, "benchmark", task.task) for task in recipe.tasks]
    if again := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"tasks: two are called {again[0]!r}; give them a `name`")
    if odd := [name for name in names if not re.fullmatch(r"[\w-]+", name)]:
        raise ValueError(f"tasks: name {odd[0]!r}: expected letters, digits, _ and -")
    require_benchmarks(recipe)
    out, results = Path(recipe.output_dir), {}
    written = {f"{name}.json" for name in ("results", *names)} | {PAGE, *files_of(out, names)}
    hold = Hold(out, "encoder evaluation", written)
    encoder = load_encoder(
        recipe.model,
        recipe.text_encoder,
        device=find_device(recipe.device),
        dtype=getattr(torch, recipe.dtype),
        batch_size=recipe.batch_size,
    )
    for name, task in zip(names, recipe.tasks, strict=True):
        settings = task.model_dump()
        common = [VERSION, encoder.fingerprints, recipe.dtype, recipe.bootstrap, recipe.seed]
        key = hash_json([settings, common, sorted(states_of(settings))])
        file = out / f"{name}.json"
        found = read_optional(file)
        if found.get("key") != key or any(changed_files(found.get("files", {}), out)):
            # What an earlier recipe left must not be taken for this one's: there may be less now.
            for old in (*fnmatch.filter(hold.names, f"{name}.*"), "results.json", PAGE):
                (out / old).unlink(missing_ok=True)
            started, cut = time.monotonic(), encoder.num_cut()
            found = {"task": task.task, **TASKS[task.task](task, encoder, recipe)}
            hits = found.pop("samples", {})
            places = [re.sub(r"[^\w.-]", "-", f"{name}{kind}") + ".samples.jsonl" for kind in hits]
            if len({*places}) < len(places):
                raise ValueError(f"{name}: kinds {[*hits]} would share a file; rename one")
            samples = dict(zip(places, starmap(sample_lines, hits.values()), strict=True))
            hold.claim(samples)
            for place, text in samples.items():
                write_atomically(out / place, text)
            found["files"] = {place: file_state(out / place) for place in samples}
            found["texts_cut"] = encoder.num_cut() - cut
            found |= {"seconds": round(time.monotonic() - started, 3), "key": key}
            weights = encoder.fingerprints["model"]
            found["checkpoint"] = {"path": recipe.model, "sha256": weights}
            write_atomically(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        results[name] = found
        print(f"{name:<24} {', '.join(figures(found))}", flush=True)
    whole = {"model": recipe.model, "fingerprints": encoder.fingerprints, "results": results}
    write_atomically(out / "results.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / PAGE, encoder_page(out, whole))
    hold.release()
    print(out / PAGE)


def files_of(folder: Path, names: Sequence[str]) -> set[str]:
    """Files of a folder that have the names of these tasks' files."""
    patterns = [end for name in names for end in (f"{name}.json", f"{name}*.samples.jsonl")]
    return {file.name for pattern in patterns for file in folder.glob(pattern)}


def read_optional(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    with suppress(ValueError):
        return dict(read_json(file))
    return {}


def sample_lines(images: Sequence[Any], found: Sequence[Any]) -> str:
    """One JSON line an item, as `llm2clip-vlm compare` reads them.

    Args:
        images: Image of each item.
        found: Whether it is right; or counts, where the score is one of all images together.
    """
    rest = {"id": None, "question": "", "type": "", "target": "", "answer": ""}
    lines = []
    for number, (image, one) in enumerate(zip(images, found, strict=True)):
        counted = isinstance(one, np.ndarray)
        kept = {"correct": None, "counts": one.tolist()} if counted else {"correct": float(one)}
        lines.append(json.dumps({"doc_id": number, "image_id": str(image)} | kept | rest) + "\n")
    return "".join(lines)


def states_of(value: Any) -> list[str]:
    """States of the files that a task's settings name, by pattern too, or below its folders."""
    if isinstance(value, dict | list):
        parts = list(value.values() if isinstance(value, dict) else value)
        if isinstance(value, dict) and value.get("images", "") is None:
            near = below(Path(value["data"]).parent) if os.path.isfile(value["data"]) else ()
            parts += [str(file) for file in near if file.suffix.lower() in picture_suffixes()]
        return [state for part in parts for state in states_of(part)]
    if not isinstance(value, str):
        return []
    if is_remote(value):
        return [str([*file]) for file in look_up(value)]
    # Path.exists raises where a text is too long for a name.
    places = [Path(value)] if os.path.exists(value) else data_files(value)
    files = [file for place in places for file in (place, *below(place))]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in states]


def below(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links to folders too, each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, file) for file in files)


def figures(result: dict[str, Any], above: str = "") -> list[str]:
    """The numbers of a result on one line, without its details."""
    found = []
    for name, value in result.items():
        if isinstance(value, dict) and name not in _DETAILS:
            found += figures(value, f"{above}{name} ")
        elif isinstance(value, float) and name not in {"seconds", "l2"}:
            found.append(f"{above}{name} {value:.3g}")
    return found


if __name__ == "__main__":
    sys.exit(guard(main))
