"""A finished run made of invented results: what `eval/report.py` and `demo/ab.py` read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

KINDS = ("count", "shape_at_place", "pattern_of_shape", "colour_of_shape")
RATES = {"base": 0.55, "llm2clip": 0.8, "control_long": 0.7}
R1 = {"base": 4.0, "llm2clip": 64.0, "control_long": 35.0}


def load_program(repo_root: Path, name: str) -> ModuleType:
    """A program of `eval/`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"l2c_eval_{name}", repo_root / f"eval/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn_piece(what: Any, piece: str = "chart", *more: Any) -> str:
    """A piece of a page, such as a chart, alone."""
    from llm2clip_vlm.evaluation.report import pages

    module: Any = pages._environment().get_template("pieces.html").module
    return str(getattr(module, piece)(what, *more))


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_world(root: Path, pictures: int = 8) -> Path:
    """`pairs_test.jsonl` and `vqa_test.jsonl` with pictures, as the world has them."""
    from world.pictures import render
    from world.scenes import draw_scene, long_caption, questions, short_caption

    pairs, rows = [], []
    for index in range(pictures):
        rng = np.random.default_rng([7, index])
        scene = draw_scene(rng, "test")
        name = f"images/test/{index:05d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        render(scene, rng).save(root / name)
        captions = {
            "short": [short_caption(scene, rng)],
            "long": [long_caption(scene, rng, "full")],
        }
        pairs.append({"id": f"test-{index}", "image": name, "captions": captions})
        for q in questions(scene, rng):
            if q.kind in KINDS:
                row = {"image_id": f"vqa-{index}", "question": q.question, "answer": q.answer}
                rows.append({"id": f"vqa-{index}-{q.kind}", "image": name, "type": q.kind, **row})
    write_lines(root / "pairs_test.jsonl", pairs)
    write_lines(root / "vqa_test.jsonl", rows)
    return root


def retrieval(r1: float, half: float = 4.0) -> dict[str, Any]:
    """A `results.json` of a tower."""
    return {
        "retrieval": {
            kind: {
                direction: {
                    "r1": r1 * share + extra,
                    "ci": [max(0.0, r1 * share + extra - half), r1 * share + extra + half],
                    "chance_r1": 0.1,
                    "queries": 1000,
                    "gallery": 1000,
                }
                for direction, extra in (("i2t", 0.0), ("t2i", 1.0))
            }
            for kind, share in (("short", 0.06), ("long", 1.0))
        }
    }


def write_tower(folder: Path, r1: float, seconds: float = 61.0) -> Path:
    """Results, curve and manifest of stage 2."""
    write_json(folder / "results.json", retrieval(r1))
    write_curve(folder)
    manifest = {
        "schema": 1,
        "seconds": seconds,
        "recipe_hash": "a" * 64,
        "versions": {"torch": "2"},
        "outputs": {},
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def write_curve(folder: Path, steps: int = 40) -> None:
    rows = [
        {"step": s, "seconds": float(s), "loss": 0.4 + 4 / (1 + s / 6) + 0.05 * (s % 3)}
        for s in range(1, steps)
    ]
    write_lines(folder / "metrics.jsonl", rows)


def write_scores(
    folder: Path, world: Path, rate: float, rng: np.random.Generator, name: str = "x"
) -> None:
    """`l2c_world_vqa` and a graded `l2c_world_caption` of one checkpoint."""
    rows = [json.loads(line) for line in (world / "vqa_test.jsonl").read_text().splitlines()]
    samples = []
    for number, row in enumerate(rows):
        right = bool(rng.random() < rate)
        samples.append(
            {
                "doc_id": number,
                "id": row["id"],
                "image_id": row["image_id"],
                "question": row["question"],
                "type": row["type"],
                "answer": row["answer"] if right else "nonsense",
                "target": row["answer"],
                "correct": float(right),
                "unparsable": float(not right),
            }
        )
    asked = {"type": "", "question": "Describe the picture."}
    graded = [{**s, **asked, "correct": float(rng.random() * 0.2 + rate / 2)} for s in samples[::4]]
    for task, title, found in (
        ("l2c_world_vqa", "World VQA", samples),
        ("l2c_world_caption", "World captions", graded),
    ):
        score = 100 * float(np.mean([s["correct"] for s in found]))
        by_type = {
            kind: {
                "score": 100 * float(np.mean([s["correct"] for s in found if s["type"] == kind])),
                "n": 1,
            }
            for kind in sorted({s["type"] for s in found})
        }
        write_lines(folder / f"{task}.samples.jsonl", found)
        write_json(
            folder / f"{task}.json",
            {
                "task": task,
                "title": title,
                "limit": None,
                "n": len(found),
                "n_empty": 0,
                "n_cut": 7,
                "n_unparsable": None,
                "score": score,
                "score_ci": [score - 3, score + 3],
                "by_type": by_type,
                "spec_hash": "s",
                "seconds": 1.0,
                "checkpoint": {
                    "name": name,
                    "path": f"runs/none/{name}/model",
                    "sha256": hashlib.sha256(name.encode()).hexdigest(),
                },
                "data": {"path": str(world / "vqa_test.jsonl")},
            },
        )


def write_run(root: Path, seeds: Sequence[int] = (0,), pictures: int = 8) -> Path:
    """All stages of a run below `root`; the recipe's mapping is in `report_recipe`."""
    world = write_world(root / "world/seed-0", pictures)
    cra: dict[str, Any] = {"after": 96.9, "after_ci": [95.5, 98.0]}
    cra |= {"raw_bidirectional": 20.5, "raw_causal": 45.5, "before": 20.5, "before_ci": [17, 24]}
    write_json(root / "stage1/results.json", {"cra": {**cra, "queries": 1000}})
    write_curve(root / "stage1")
    for place, (tower, rate) in enumerate(RATES.items()):
        write_tower(root / tower, R1[tower])
        write_curve(root / f"stage3/{tower}")
        for seed in seeds:
            rng = np.random.default_rng([seed, place])
            name = f"{tower}-s{seed}"
            write_curve(root / f"stage4/{name}")
            write_tower(root / f"ab/{name}", R1[tower] + float(rng.normal(0, 1.5)))
            jittered = rate + float(rng.normal(0, 0.01))
            write_scores(root / f"eval/{name}", world, jittered, rng, name)
    return root


def report_recipe(root: Path, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """A recipe of `eval/report.py` for :func:`write_run`, without models."""
    return {
        "output_dir": str(root / "out"),
        "stage1": str(root / "stage1"),
        "towers": {tower: str(root / tower) for tower in RATES},
        "tower_notes": {tower: f"what {tower} is" for tower in RATES},
        "stage3": {tower: str(root / f"stage3/{tower}") for tower in RATES},
        "vlms": {
            tower: {str(seed): str(root / f"stage4/{tower}-s{seed}") for seed in seeds}
            for tower in RATES
        },
        "evaluation": str(root / "eval"),
        "headline_task": "l2c_world_vqa",
        "ab": str(root / "ab.json"),
    }


def ab_recipe(root: Path, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """A recipe of `demo/ab.py` for :func:`write_run`."""
    return {
        "towers": list(RATES),
        "seeds": list(seeds),
        "pairs": [["llm2clip", "control_long"], ["llm2clip", "base"]],
        "evaluation": str(root / "eval"),
        "tasks": ["l2c_world_vqa", "l2c_world_caption"],
        "retrieval": {
            "llm2clip": str(root / "ab/llm2clip-s{seed}"),
            "control_long": str(root / "ab/control_long-s{seed}"),
            "base": str(root / "base"),
        },
        "resamples": 200,
        "output": str(root / "ab.json"),
        "pages": str(root / "compared"),
    }
