"""Report what a run of all stages found.

Purpose: one self-contained page for people and one JSON file for programs, from results that lie
    on disk. Nothing is measured here but the examples (pictures with what the towers retrieve).
Needs: results of stages 1 and 2, of `eval/run_lmms.py` and `demo/ab.py`; what is not there is shown
    as not run.
Writes: `<output_dir>/report.html`, `<output_dir>/report.json`; prints one line.
Launch: python eval/report.py recipes/demo/report.yaml [key=value ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.evaluation.report import examples, inputs
from llm2clip_vlm.evaluation.report.charts import Line
from llm2clip_vlm.evaluation.report.facts import Facts, charts, retrieval_verdict
from llm2clip_vlm.evaluation.report.inputs import Measured, ReportError
from llm2clip_vlm.evaluation.report.pages import render
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.recipe.reading import load_recipe, words_of
from llm2clip_vlm.recipe.report import ReportRecipe
from llm2clip_vlm.runs.manifest import read_manifest
from llm2clip_vlm.runs.ownership import write_pages
from llm2clip_vlm.training.callbacks import read_losses


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program: RECIPE [key=value ...]."""
    words = words_of(argv, __doc__)
    recipe = load_recipe(words[0], ReportRecipe, words[1:])
    facts = collect(recipe)
    if recipe.photographs and recipe.examples:
        add_examples(facts, recipe.photographs)
    out = Path(recipe.output_dir)
    page = render("report.html", facts=facts, charts=charts(facts))
    whole = json.dumps(as_json(facts), indent=2, ensure_ascii=False)
    write_pages(out, "report", {"report.html": page, "report.json": whole + "\n"})
    separability = ""
    if cra := facts.cra:
        separability = f"caption separability {cra['after']:.1f} % ({facts.untrained_shown}); "
    found = [verdict.short for verdict in (facts.verdict, facts.vlm_verdict()) if verdict]
    print(f"{separability}{'; VLM: '.join(found)}; report: {out / 'report.html'}")
    return 0


def collect(recipe: ReportRecipe) -> Facts:
    """Read all results.

    Raises:
        ReportError: One is missing, or does not fit the others.
    """
    if lost := {*recipe.headline, *recipe.tower_models} - {*recipe.towers}:
        raise ReportError(
            f"headline, tower_models: {sorted(lost)}: expected towers of {list(recipe.towers)}"
        )
    retrieval = inputs.read_retrieval(recipe.towers)
    if recipe.captions not in (kinds := retrieval[recipe.headline[0]]):
        raise ReportError(f"captions: {recipe.captions}: expected one of {list(kinds)}")
    stages = {"stage1": recipe.stage1, "stage2a": recipe.cache}
    stages |= {f"stage2-{name}": folder for name, folder in recipe.towers.items()}
    stages |= {f"stage3-{name}": folder for name, folder in recipe.stage3.items()}
    stages |= {f"stage4-{t}-s{s}": f for t, seeds in recipe.vlms.items() for s, f in seeds.items()}
    made = {n: found for n, folder in stages.items() if folder and (found := read_manifest(folder))}
    vlms, judged = [], list[tuple[str, Measured]]()
    if recipe.evaluation and recipe.vlms:
        vlms = inputs.read_vlms(
            recipe.evaluation, {t: [*map(int, found)] for t, found in recipe.vlms.items()}
        )
        if (task := recipe.headline_task) not in vlms[0].scores:
            raise ReportError(f"headline_task: {task}: expected one of {list(vlms[0].scores)}")
        for run in vlms:
            run.scores = {task: run.scores[task], **run.scores}
            judged += [(f"stage4-{run.name}-s{seed}", m) for seed, m in run.scores[task].items()]
    costs = inputs.read_optional(recipe.costs) or {}
    there = {n: f for n, f in recipe.encoders.items() if Path(f, "results.json").is_file()}
    encoders = {name: inputs.read_run(name, {folder: None}) for name, folder in there.items()}
    own = encoders.keys() - recipe.tower_models.keys()
    judged += [(f"stage2-{n}", of[None]) for n in own for of in encoders[n].scores.values()]
    for stage, measured in judged:
        model = made.get(stage, {}).get("outputs", {}).get("model")
        if model and measured.weights() not in (None, model):
            raise ReportError(
                f"{measured.folder}: these scores are of other weights than the model of {stage}: "
                "it was trained again since; run `llm2clip-vlm eval` again"
            )
    return Facts(
        recipe,
        retrieval=retrieval,
        verdict=retrieval_verdict(retrieval, recipe.headline, recipe.captions),
        cra=inputs.read_cra(recipe.stage1) if recipe.stage1 else None,
        vlms=vlms,
        encoders=encoders,
        seconds={name: float(found["seconds"]) for name, found in (costs or made).items()},
        costs=costs,
        manifests={n: made[f"stage2-{n}"] for n in recipe.towers if f"stage2-{n}" in made},
        ab=inputs.read_optional(recipe.ab),
        curves=curves(recipe),
    )


def add_examples(facts: Facts, pictures: str) -> None:
    """What three towers retrieve for the first test pictures, and what their first VLMs answer."""
    recipe, task, own = facts.recipe, facts.recipe.headline_task, facts.recipe.tower_models
    shown = recipe.order()[:3]
    facts.retrieved = examples.retrieved_captions(
        {name: Path(own.get(name, f"{recipe.towers[name]}/model")) for name in shown},
        read_image_text(ImageTextSource(path=pictures), BadRecords(0)),
        recipe.captions,
        recipe.examples,
        EmbeddingCache.open(recipe.cache) if recipe.cache else None,
    )
    runs = [run for name in shown for run in facts.vlms if run.name == name]
    if runs:
        first = {task: {run.name: run.first(task) for run in runs} for task in facts.tasks}
        samples = {task: {name: m.samples for name, m in of.items()} for task, of in first.items()}
        data = next(iter(first[task].values())).result["data"]["path"]
        facts.answers = examples.answered_questions(samples[task], Path(data), recipe.examples)
        facts.one_photograph = examples.one_photograph(facts.retrieved, samples.values())


def curves(recipe: ReportRecipe) -> dict[str, list[Line]]:
    """Training loss of each stage that left a `metrics.jsonl`."""
    panels: dict[str, list[tuple[str, str]]] = {
        "Stage 1: text encoder": [("", recipe.stage1)] if recipe.stage1 else [],
        "Stage 2: vision towers": list(recipe.towers.items()),
        "Stage 3: projectors": list(recipe.stage3.items()),
        "Stage 4: instruction tuning": [
            (tower, folder) for tower, seeds in recipe.vlms.items() for folder in seeds.values()
        ],
    }
    found: dict[str, list[Line]] = {}
    for panel, runs in panels.items():
        for tower, folder in runs:
            if points := read_losses(Path(folder) / "metrics.jsonl"):
                steps, losses = zip(*points, strict=True)
                line = Line(tower, steps, losses, recipe.colour(tower))
                found.setdefault(panel, []).append(line)
    return found


def as_json(facts: Facts) -> dict[str, Any]:
    """What programs read: absent results are null or empty."""
    recipe = facts.recipe
    by_type = {
        run.name: {
            task: [
                {kind: entry["score"] for kind, entry in measured.result["by_type"].items()}
                for measured in run.scores[task].values()
            ]
            for task in facts.tasks
        }
        for run in facts.vlms
    }
    return {
        "schema": 1,
        "finding": facts.verdict.sentence,
        "finding_vlm": vlm.sentence if (vlm := facts.vlm_verdict()) else None,
        "verdict": facts.verdict.state,
        "headline": recipe.headline,
        "data": recipe.data,
        "cra": facts.cra,
        "retrieval": facts.retrieval,
        "encoders": {
            name: {task: run.values(task)[0] for task in run.scores}
            for name, run in facts.encoders.items()
        },
        "without_the_picture": facts.guesses,
        "vlm": {run.name: {task: run.values(task) for task in facts.tasks} for run in facts.vlms},
        "vlm_by_type": by_type,
        "seeds": {tower: list(seeds) for tower, seeds in recipe.vlms.items()},
        "seconds": facts.seconds,
        "ab": facts.ab,
        "not_shown": facts.not_shown(),
    }


if __name__ == "__main__":
    sys.exit(guard(main))
