"""Joins what `recipes/real/ab.yaml` measured on photographs, over seeds.

Purpose: separability of captions by each text encoder, retrieval of each tower and scores of each
    VLM seed by seed, and the comparisons between arms with the seed as the unit (t interval, exact
    sign-flip test). What is not there yet is named under `missing`, and nothing stands for it.
Needs: a run folder of that pipeline, and what it prepared; of other_llm.yaml another, if any. An
    earlier result can give what takes longest, the VLMs; its commit is named beside them.
Writes: `<output>` (JSON), and prints a table.
Launch: python demo/real_ab.py --run runs/real_ab --data runs/real/data --main stage1_causal \
    --seeds 0 1 2 3 4 5 --output docs/results/real.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from world.results import git_state, rounded

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import read_captions
from llm2clip_vlm.evaluation.report.inputs import DIRECTIONS, read_retrieval
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.metrics.separability import PROTOCOL, caption_separability
from llm2clip_vlm.metrics.statistics import seed_summary
from llm2clip_vlm.recipe.base import CaptionSource

TEXTS = ("raw_causal", "raw_bidirectional", "stage1_causal", "stage1_bidirectional")
"""Text encoders: SmolLM2 as it is with each kind of attention, and after stage 1."""
SHARED = "stage1_causal"
"""The one of `make real`, which has its cache."""
TOWERS = (*TEXTS, "control_long")
"""What a tower was trained against."""
VLMS = ("base", "control_long", "llm2clip", "llm2clip_shuffled", "text_only")
"""What a VLM looks through."""
TASKS = {"daquar": "l2c_daquar", "coco": "l2c_photo_vqa", "captions": "captions"}
"""Name of a task in the table to its result file's."""
ALIKE = ("n", "limit", "primary_metric", "generation_kwargs")
"""What the results of a task must have in common, beside data and wording (not pictures)."""
OTHER = "other_pictures"
"""What a result says of the same questions with the pictures of others."""
ELSEWHERE = f"_{OTHER}"
"""Ends the name of such a score in the table."""
TITLES = {
    "retrieval_i2t": "tower trained on, image → text",
    "retrieval_t2i": "tower trained on, text → image",
    "retrieval_frozen_i2t": "frozen tower, image → text",
    "retrieval_frozen_t2i": "frozen tower, text → image",
    "l2c_daquar": "DAQUAR",
    "l2c_photo_vqa": "COCO presence and count",
    "captions": "captions, CIDEr x 100",
}
"""What `eval/report.py` calls the comparisons."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="output_dir of the pipeline")
    parser.add_argument("--data", required=True, type=Path, help="what prepare_real.py wrote")
    parser.add_argument("--main", required=True, choices=TEXTS, help="the arm called llm2clip")
    parser.add_argument("--seeds", required=True, type=int, nargs="+", help="training seeds")
    parser.add_argument("--other", type=Path, help="output_dir of recipes/real/other_llm.yaml")
    parser.add_argument("--earlier", type=Path, help="a result that gives the VLMs missing here")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    given = parser.parse_args(argv)
    missing: list[str] = []
    git = git_state(given.output)
    run, beside = given.run, given.data.parent / "stage2a"
    photos = {arm: beside if arm == SHARED else run / "cache" / arm for arm in TEXTS}
    caches = {"photos": photos, "long": {arm: run / "long" / arm for arm in TEXTS}}
    found: dict[str, Any] = {
        "commit": git["commit"],
        "git": git,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": "photographs of Flickr8k val",
        "seconds": sum(cost["seconds"] for cost in optional(given.run / "costs.json").values()),
        "llm2clip": given.main,
        "seeds": given.seeds,
        "separability": separability(given.data, caches, missing),
        "retrieval": retrieval(given.run, given.seeds, missing),
        "vlm": vlm(given.run, given.seeds, missing),
    }
    if given.other:
        both = {kind: {arm: given.other / arm for arm in TEXTS} for kind in caches}
        scores = separability(given.data, both, missing)
        found["separability_other"] = {given.other.name: scores}
    if given.earlier:  # its towers are others: never compared with what is here
        old = dict(read_json(given.earlier))
        now, then = found["separability"], old["separability"]
        same = then["protocol"] == PROTOCOL  # others differ by tens of points
        given_on = ("vlm", "separability_other")[: 1 + same]
        found |= {name: old[name] for name in given_on if not found.get(name)}
        found["separability"] = now | {k: then[k] | now[k] for k in caches if same}
        found["earlier"] = old["commit"]
    found["tests"] = tests(found, given.main)
    found["costs"] = optional(given.run / "costs.json")
    found["missing"] = [os.path.relpath(path, given.run) for path in missing]  # of no machine
    found |= {"ab": drawn(found["tests"]), "titles": TITLES}
    write_atomically(given.output, json.dumps(rounded(found, 3), indent=1) + "\n")
    show(found)
    print(f"{given.output}; missing: {len(missing)} results")


def optional(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none yet."""
    return dict(read_json(file)) if file.is_file() else {}


def separability(
    data: Path, caches: Mapping[str, Mapping[str, Path]], missing: list[str]
) -> dict[str, Any]:
    """Caption retrieval accuracy (`metrics/separability.py`) of cached embeddings, by kind, arm."""
    files = {"photos": data / "flickr8k_val/index.jsonl", "long": data / "long_texts.jsonl"}
    found: dict[str, Any] = {"protocol": PROTOCOL}
    for kind, file in files.items():
        records = read_captions(CaptionSource(path=str(file)), BadRecords(0), min_captions=2)
        found[kind] = {}
        for arm, folder in caches[kind].items():
            if not (folder / "manifest.json").is_file():
                missing.append(str(folder))
                continue
            lookup = EmbeddingCache.open(folder).lookup
            got = caption_separability([record.texts for record in records], lookup)
            found[kind][arm] = {"r1": got.recall[1], "ci": list(got.ci[1]), "n": len(records)}
    return found


def retrieval(run: Path, seeds: Sequence[int], missing: list[str]) -> dict[str, Any]:
    """R@1, 5 and 10 of each tower by seed.

    Raises:
        ReportError: Towers were tested on other photographs or captions.
    """
    arms = [name for tower in TOWERS for name in (tower, f"frozen_{tower}")]
    places = {(a, seed): run / "towers" / f"{a}-s{seed}" for a in arms for seed in seeds}
    missing += [str(f) for f in places.values() if not (f / "manifest.json").is_file()]
    there = {key: f for key, f in places.items() if (f / "manifest.json").is_file()}
    made = read_retrieval({f.name: str(f) for f in there.values()}) if there else {}
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for arm, _ in there):
        rows = {s: made[f.name]["captions"] for (a, s), f in there.items() if a == arm}
        found[arm] = {"seeds": [*rows]} | {
            way: {f"r{k}": [row[way][f"r{k}"] for row in rows.values()] for k in (1, 5, 10)}
            for way in DIRECTIONS
        }
    return found


def vlm(run: Path, seeds: Sequence[int], missing: list[str]) -> dict[str, Any]:
    """Scores of each VLM by task and seed: per cent right; of captions CIDEr, times 100.

    Raises:
        ValueError: VLMs were asked other questions, as with another `--limit`, or otherwise.
    """
    found: dict[str, Any] = {}
    for task, name in TASKS.items():
        alike: dict[str, list[str]] = {}
        for tower in VLMS[: -1 if task == "captions" else None]:  # text alone describes nothing
            files = {seed: run / "eval" / f"{tower}-s{seed}" / f"{name}.json" for seed in seeds}
            missing += [str(file) for file in files.values() if not file.is_file()]
            there = {seed: dict(read_json(f)) for seed, f in files.items() if f.is_file()}
            for seed, r in there.items():
                worded = {k: v for k, v in r.get("overrides", {}).items() if k != "doc_to_visual"}
                said = [r.get("data", {}).get("sha256"), worded, *map(r.get, ALIKE)]
                alike.setdefault(str(said), []).append(f"{tower}-s{seed}")
            asked = {"": there}
            asked[ELSEWHERE] = {s: r[OTHER] | {"n": r["n"]} for s, r in there.items() if OTHER in r}
            for ending, results in asked.items():
                if results:
                    rows = found.setdefault(task, {"seeds": {}, "questions": {}})
                    rows[tower + ending] = [float(result["score"]) for result in results.values()]
                    rows["seeds"][tower + ending] = list(results)
                    rows["questions"][tower + ending] = [r["n"] for r in results.values()]
        if len(alike) > 1:
            raise ValueError(f"{task}: expected one number of questions, data, ..., got {alike}")
    return found


def tests(found: dict[str, Any], llm2clip: str) -> dict[str, Any]:
    """Differences between arms over the seeds that both have."""
    made: dict[str, Any] = {}

    def compare(name: str, a: dict[int, float], b: dict[int, float]) -> None:
        if len(shared := sorted(a.keys() & b.keys())) > 1:
            made[name] = seed_summary([a[seed] - b[seed] for seed in shared])

    def recalls(arm: str, way: str) -> dict[int, float]:
        row = found["retrieval"].get(arm)
        return dict(zip(row["seeds"], row[way]["r1"], strict=True)) if row else {}

    for prefix in ("", "frozen_"):
        for way in ("i2t", "t2i"):
            ours = recalls(prefix + llm2clip, way)
            for other in (tower for tower in TOWERS if tower != llm2clip):
                name = f"{prefix}{way}_r1_llm2clip_minus_{other}"
                compare(name, ours, recalls(prefix + other, way))
    for task, scores in found["vlm"].items():
        by_seed = {t: dict(zip(s, scores[t], strict=True)) for t, s in scores["seeds"].items()}
        ours = by_seed.pop("llm2clip", {})
        for other in (*VLMS, f"llm2clip{ELSEWHERE}"):
            if other in by_seed:
                compare(f"{task}_llm2clip_minus_{other}", ours, by_seed[other])
    return made


def drawn(tests: dict[str, Any]) -> dict[str, Any]:
    """The comparisons by task and pair, as `eval/report.py` draws them."""
    rows: dict[str, Any] = {}
    for name, row in tests.items():
        what, _, other = name.partition("_llm2clip_minus_")
        pairs = rows.setdefault(TASKS.get(what, f"retrieval_{what.removesuffix('_r1')}"), {})
        pairs[f"llm2clip-{other}"] = {**row, "n_seeds": len(row["deltas_by_seed"])}
    return rows


def show(found: dict[str, Any]) -> None:
    """The table, for a terminal."""
    for llm, scores in {"": found["separability"], **found.get("separability_other", {})}.items():
        for arm, kind in itertools.product(TEXTS, ("photos", "long")):
            if row := scores[kind].get(arm):
                (low, high), shown = row["ci"], f"{llm} {kind:<7} {arm:<22}"
                print(f"separability {shown} {row['r1']:5.1f} [{low:.1f}, {high:.1f}]")
    for arm, row in found["retrieval"].items():
        means = (f"{way} {sum(row[way]['r1']) / len(row['seeds']):5.1f}" for way in ("i2t", "t2i"))
        print(f"R@1 {arm:<29} {', '.join(means)} ({len(row['seeds'])} seeds)")
    for task, scores in found["vlm"].items():
        for tower in scores["seeds"]:
            mean = sum(scores[tower]) / len(scores[tower])
            print(f"{task:<9} {tower:<23} {mean:5.1f} ({len(scores[tower])} seeds)")
    for name, row in found["tests"].items():
        low, high = row["ci"]
        print(f"{name}: {row['delta']:+.1f} [{low:.1f}, {high:.1f}], p = {row['p']:.3g}")


if __name__ == "__main__":
    sys.exit(guard(main))
