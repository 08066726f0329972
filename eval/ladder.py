"""Write down how far the ladder of validity was climbed.

Purpose: one JSON file for `docs/experiments.md` and the report, from results on disk. Rung 1 is
    measured here, on the shipped language model.
Needs: `recipes/demo/ladder/pipeline.yaml` run; `docs/results/ab.json` for rung 4, if there is one.
Writes: OUTPUT, rung to `{title, value, goal, passed}`; prints a table.
Launch: python eval/ladder.py runs/ladder docs/results/ladder.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.world_text_qa import text_qa_accuracy
from llm2clip_vlm.evaluation.report_inputs import read_json, read_optional
from llm2clip_vlm.files import write_atomically
from llm2clip_vlm.models.loading import load_complete, read_tokenizer

TASK = "l2c_world_vqa"
LANGUAGE_MODEL = "recipes/demo/base/models/language_model"
AB = "docs/results/ab.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the pipeline's output folder")
    parser.add_argument("output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)

    model = load_complete(AutoModelForCausalLM, LANGUAGE_MODEL).eval()
    tokenizer = read_tokenizer(LANGUAGE_MODEL)
    text_qa = text_qa_accuracy(model, tokenizer)
    pipeline = "recipes/demo/ladder/pipeline.yaml"
    oracle, supervised, base = (
        read_json(arguments.run / "eval" / name / f"{TASK}.json", pipeline)
        for name in ("oracle", "supervised", "base")
    )
    over_base = "world VQA, supervised tower over base tower (points, intervals apart)"
    rungs: dict[str, dict[str, Any]] = {
        "1": rung("text-only QA of the language model (%)", text_qa["all"]["accuracy"], 90.0),
        "2": rung("world VQA with oracle features (%)", oracle["score"], 90.0),
        "3": {
            **rung(over_base, supervised["score"] - base["score"], 0.0),
            "passed": supervised["score_ci"][0] > base["score_ci"][1],
            "supervised": {"value": supervised["score"], "ci": supervised["score_ci"]},
            "base": {"value": base["score"], "ci": base["score_ci"]},
        },
    }
    if found := read_optional(AB):
        row = found["ab"][TASK]["llm2clip-control_long"]
        title = "world VQA, llm2clip over control_long (points, p < 0.01)"
        passed = row["delta"] > 0 and row["p"] < 0.01
        more = {"passed": passed, "ci": row["ci"], "p": row["p"]}
        rungs["4"] = rung(title, row["delta"], 0.0) | more
    write_atomically(arguments.output, json.dumps(rungs, indent=2) + "\n")
    for name, result in rungs.items():
        mark = "passed" if result["passed"] else "NOT passed"
        print(f"rung {name}: {result['title']}: {result['value']:.1f}, {mark}")


def rung(title: str, value: float, goal: float) -> dict[str, Any]:
    """A rung that is passed from `goal` on."""
    return {"title": title, "value": round(value, 2), "goal": goal, "passed": value >= goal}


if __name__ == "__main__":
    sys.exit(guard(main))
