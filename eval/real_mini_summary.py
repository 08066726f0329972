"""Sums up a run of recipes/real_mini: what was above chance, above guessing, above wrong pictures.

Purpose: retrieval on held-out photographs against a random order, easy-VQA and photograph questions
    of the VLM against the majority answer and against the same VLM trained with shuffled pictures.
    Figures as they are, whether a goal is met or not.
Needs: a finished run (stage 1, stage 2b, both stage 4, lmms-eval).
Writes: `--output`, JSON; a table on standard output.
Launch: python eval/real_mini_summary.py --run runs/real_mini --output docs/results/real_mini.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.cli import guard
from llm2clip_vlm.evaluation.report_inputs import (
    read_cra,
    read_json,
    read_retrieval,
    read_scores,
    read_seconds,
)
from llm2clip_vlm.evaluation.retrieval import bootstrap_interval
from llm2clip_vlm.evaluation.stats import (
    load_samples,
    pair_samples,
    paired_bootstrap,
    rounded,
)
from llm2clip_vlm.evaluation.task_helpers import normalise
from llm2clip_vlm.files import write_atomically

TASKS = ("l2c_easy_vqa", "l2c_photo_vqa")
REAL, SHUFFLED = "real", "shuffled"
RESAMPLES = 10_000
PLACES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0: a goal that is missed is a result, too.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="output_dir of the pipeline")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    found = summary(arguments.run)
    write_atomically(arguments.output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print_table(found)
    print(arguments.output)
    return 0


def summary(run: Path) -> dict[str, Any]:
    """Everything that the run measured, in per cent.

    Args:
        run: The pipeline's `output_dir`.

    Returns:
        `{schema, date, data, cra, retrieval, <task>, goals, steps, seconds}`.

    Raises:
        ValueError: A result is missing, or both VLMs were not asked the same.
    """
    photos = read_retrieval({"llm2clip": str(run / "stage2b")})["llm2clip"]["captions"]
    retrieval = {way: against_chance(photos[way], photos["i2t"]["queries"]) for way in photos}
    scores = read_scores(run / "eval", [REAL, SHUFFLED], TASKS)
    found: dict[str, Any] = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": read_json(run / "data" / "prepared.json", "stages/prepare_real_mini.py")["counts"],
        "vision_tower": "random weights before stage 2b",
        "cra": read_cra(run / "stage1"),
        "retrieval": retrieval,
    }
    for task in TASKS:
        if limit := scores[task][REAL]["limit"]:
            raise ValueError(f"{run / 'eval'}: {task} was run on {limit} documents only")
        found[task] = questions(
            *(load_samples(run / "eval" / n / f"{task}.samples.jsonl") for n in (REAL, SHUFFLED))
        )
    easy = found[TASKS[0]]
    found["goals"] = {
        "retrieval_r1_above_chance": all(
            way["ci"][0] > way["chance_ci"][1] for way in retrieval.values()
        ),
        "retrieval_r10_above_chance": all(
            way["ci_r10"][0] > way["chance_ci_r10"][1] for way in retrieval.values()
        ),
        "easy_vqa_above_majority": easy["real_minus_majority"]["ci"][0] > 0,
        "easy_vqa_above_shuffled": easy["real_minus_shuffled"]["ci"][0] > 0,
    }
    found["seconds"] = read_seconds(str(run / "seconds.json"), {})
    return rounded(found, PLACES)


def against_chance(measured: Mapping[str, Any], images: int) -> dict[str, Any]:
    """One direction of retrieval beside a random order.

    Args:
        measured: What stage 2b wrote.
        images: Photographs in the gallery; the unit of chance's interval, although captions ask
            more often, because the captions of a photograph are not independent.

    Returns:
        `measured` with `chance_ci` and `chance_ci_r10`, the central 95 % of R@1 and R@10 in a
        random order.
    """
    found = dict(measured)
    for k, name in ((1, "chance_ci"), (10, "chance_ci_r10")):
        draws = np.random.default_rng(0).binomial(images, measured[f"chance_r{k}"] / 100, RESAMPLES)
        found[name] = [float(end) for end in np.percentile(100 * draws / images, [2.5, 97.5])]
    return found


def questions(real: list[dict[str, Any]], shuffled: list[dict[str, Any]]) -> dict[str, Any]:
    """The VLM, its control, and what needs no model.

    Args:
        real: Samples of the VLM.
        shuffled: Samples of the one that was trained with shuffled pictures.

    Returns:
        `real`, `shuffled`, `majority` (the commonest answer of the test set) and `best_blind` (the
        commonest one of each question's wording, known from the test set itself: no model that
        sees no picture can do better), each `{accuracy, ci, by_type}`, and two differences
        `{delta, ci}` by paired bootstrap over pictures.
    """
    paired = pair_samples(real, shuffled)
    targets = [normalise(str(sample["target"])) for sample in real]
    majority = Counter(targets).most_common(1)[0][0]
    wording: dict[str, Counter[str]] = defaultdict(Counter)
    for sample, target in zip(real, targets, strict=True):
        wording[sample["question"]][target] += 1
    guesses = [wording[sample["question"]].most_common(1)[0][0] for sample in real]
    constant = np.array([target == majority for target in targets], dtype=np.float64)
    blind = np.equal(targets, guesses).astype(np.float64)

    def score(correct: np.ndarray) -> dict[str, Any]:
        kinds = np.array([sample["type"] for sample in real])
        return {
            "accuracy": 100 * float(correct.mean()),
            "ci": list(bootstrap_interval(correct, paired.image_ids, RESAMPLES, 0)),
            "by_type": {k: 100 * float(correct[kinds == k].mean()) for k in sorted(set(kinds))},
        }

    def above(other: np.ndarray) -> dict[str, Any]:
        return paired_bootstrap(paired.correct_a, other, paired.image_ids, RESAMPLES)

    return {
        "questions": len(real),
        "images": len(set(paired.image_ids)),
        "real": score(paired.correct_a),
        "shuffled": score(paired.correct_b),
        "majority": {"answer": majority, **score(constant)},
        "best_blind": score(blind),
        "real_minus_majority": above(constant),
        "real_minus_shuffled": above(paired.correct_b),
        "real_minus_best_blind": above(blind),
    }


def print_table(found: Mapping[str, Any]) -> None:
    """What a reader wants first."""
    rows = {
        f"held-out photographs, {way} R@{k}": (row[f"r{k}"], row[f"ci{end}"])
        for way, row in found["retrieval"].items()
        for k, end in ((1, ""), (10, "_r10"))
    }
    for task in TASKS:
        for name in ("real", "shuffled", "majority", "best_blind"):
            rows[f"{task}, {name}"] = (found[task][name]["accuracy"], found[task][name]["ci"])
    for name, (value, (low, high)) in rows.items():
        print(f"{name:<34} {value:6.2f} [{low:.2f}, {high:.2f}]")
    print(", ".join(f"{goal}: {'yes' if met else 'NO'}" for goal, met in found["goals"].items()))


if __name__ == "__main__":
    sys.exit(guard(main))
