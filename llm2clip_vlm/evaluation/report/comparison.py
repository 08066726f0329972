"""Comparing runs benchmark by benchmark: how large a difference is, and whether it would stay.

Where both runs were trained with several seeds the seed is the unit: the exact sign-flip test and
the t interval (equal seeds), or the permutation test and Welch's interval (other seeds), say
whether training again would show the difference again. One run against several has neither: its own
seed is a draw, too, and nobody knows how far it fell. Between two single runs the image is the
unit: paired sign-flip test and bootstrap tell these checkpoints apart, and nothing more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.report.inputs import Measured, ReportError, Run, unlike
from llm2clip_vlm.evaluation.vlm.samples import PairedSamples, pair_samples
from llm2clip_vlm.metrics import statistics as stats
from llm2clip_vlm.metrics.segmentation import paired_iou
from llm2clip_vlm.runs.manifest import read_manifest

ALPHA = 0.05
"""A difference counts as won or lost where its p value, corrected by Holm, is below this."""

_IDENTITY = ("spec_hash", "protocol", "data_hash", "list_hash")

_SETTINGS = "limit overrides data settings judge generation_kwargs prompt_example versions".split()


def compare(
    runs: Sequence[Run], pairs: Sequence[Sequence[str]], resamples: int = 10_000
) -> dict[str, Any]:
    """Compare runs on every benchmark that both of a pair have.

    Args:
        runs: At least two.
        pairs: Names `(a, b)`: a minus b.
        resamples: Bootstrap draws.

    Returns:
        `{schema, date, titles, runs: {name: {places, seeds, seconds}}, accuracies: {name: {task:
        by seed}}, ab: {task: {"a-b": row}}, wins: {"a-b": counts}}`; a row has `delta`, `ci`, `p`
        (percentage points; the last two None where nothing can be said), `deltas_by_seed` (empty
        where the two have other seeds), `n_seeds` (the fewer), `test`, `least_p` (that this many
        seeds can give), for a benchmark (not for a question type) `p_holm`, corrected over the
        benchmarks of the pair (scorers that judge the same answers count once: `judged_with` names
        the first of them), and `within_seed`: bootstrap and McNemar over images, seed by seed.

    Raises:
        ReportError: A pair shares no benchmark, has only some seeds in common, answered other
            documents, or is written like another pair.
    """
    by_name = {run.name: run for run in runs}
    effects: dict[str, dict[str, Any]] = {}
    wins = {}
    for a, b in pairs:
        if f"{a}-{b}" in wins:
            raise ReportError(f"{a}-{b}: two pairs are written so; rename one run: NAME=FOLDER")
        one, two = by_name[a], by_name[b]
        rows = {t: _effect(t, one, two, resamples) for t in one.scores if t in two.scores}
        if not rows:
            raise ReportError(
                f"{a} and {b}: no benchmark in common: {[*one.scores]}, {[*two.scores]}"
            )
        groups = _same_answers([task for task in rows if ":" not in task], one, two)
        # The largest p of scorers that judge the same answers holds for each of them.
        known = {g[0]: [rows[t]["p"] for t in g if rows[t]["p"] is not None] for g in groups}
        tested = stats.holm({lead: max(ps) for lead, ps in known.items() if ps})
        signs = []
        for lead, *others in groups:
            deltas = [rows[task]["delta"] for task in (lead, *others)]
            sign = (min(deltas) > 0) - (max(deltas) < 0)
            signs.append((sign, tested.get(lead, 1) < ALPHA))
            for task in (lead, *others) if lead in tested else ():
                rows[task]["p_holm"] = tested[lead]
            for task in others:
                rows[task]["judged_with"] = lead
        seeds = {rows[task]["n_seeds"] for task in tested} or {1}
        wins[f"{a}-{b}"] = {
            "a": a,
            "b": b,
            "benchmarks": len(groups),
            "tested": len(tested),
            "n_seeds": 1 if 1 in seeds else max(seeds),
            "least_p": min((rows[task].get("least_p", 0.0) for task in tested), default=0.0),
            "higher": sum(sign > 0 for sign, _ in signs),
            "lower": sum(sign < 0 for sign, _ in signs),
            "won": sum(sign > 0 and sure for sign, sure in signs),
            "lost": sum(sign < 0 and sure for sign, sure in signs),
        }
        for task, row in rows.items():
            effects.setdefault(task, {})[f"{a}-{b}"] = row
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "titles": {t: next(iter(m.values())).title for r in runs for t, m in r.scores.items()},
        "runs": {
            run.name: {
                "places": list(run.places),
                "seeds": sorted({s for m in run.scores.values() for s in m if s is not None}),
                "seconds": run_seconds(run),
            }
            for run in runs
        },
        "accuracies": {run.name: {task: run.values(task) for task in run.scores} for run in runs},
        "ab": effects,
        "wins": wins,
    }


def run_seconds(run: Run) -> dict[str, float]:
    """Wall time behind a run: each stage that its checkpoints descend from, and the evaluation.

    Stages are known by their manifests; those of other machines cost nothing here.
    """
    found = [m for task, seeds in run.scores.items() if ":" not in task for m in seeds.values()]
    judged = [m for m in found if m.result]
    places = {m.folder for m in found if not m.result}
    places |= {Path(m.result["checkpoint"]["path"]) for m in judged}
    manifests: dict[Path, dict[str, Any]] = {}
    while places:
        place = places.pop().resolve()
        for folder in (place, place.parent):
            manifest = None if folder in manifests else read_manifest(folder)
            if manifest is not None:
                manifests[folder] = manifest
                places |= {Path(p["path"]) for p in manifest.get("parents", {}).values()}
    seconds: dict[str, float] = defaultdict(float)
    for manifest in manifests.values():
        seconds[str(manifest.get("stage"))] += float(manifest["seconds"])
    # Several benchmarks may come from one result, and several results from one kind of task.
    spent = {(m.folder, m.result.get("key", m.result["task"])): m.result["seconds"] for m in judged}
    evaluation = float(sum(spent.values()))
    return dict(sorted(seconds.items())) | ({"evaluation": evaluation} if evaluation else {})


def _same_answers(tasks: Sequence[str], a: Run, b: Run) -> list[list[str]]:
    """Benchmarks in groups: all of one judge the same answers to the same questions, or a part."""
    said = {
        task: {
            (run.name, seed, s["image_id"], s["question"], s["answer"])
            for run in (a, b)
            for seed, measured in run.scores[task].items()
            for s in measured.samples
            if s.get("answer")
        }
        for task in tasks
    }
    groups: list[list[str]] = []
    for task, answers in said.items():
        for group in groups:
            other = said[group[0]]
            if answers and other and (answers <= other or other <= answers):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def _effect(task: str, a: Run, b: Run, resamples: int) -> dict[str, Any]:
    first, second = a.scores[task], b.scores[task]
    seeds, paired = _matched(task, a, b)
    measured = [(seed, _of(first, seed), _of(second, seed)) for seed in seeds]
    deltas = [one.value - two.value for _, one, two in measured] if paired else []
    row: dict[str, Any] = {"delta": float(np.mean(a.values(task)) - np.mean(b.values(task)))}
    row |= {"ci": None, "p": None, "deltas_by_seed": deltas, "test": "none: answers not kept"}
    row["n_seeds"] = len(deltas) or min(len(first), len(second))
    row |= _over_seeds(task, a, b, deltas)
    everyone = [found.result for found in (*first.values(), *second.values())]
    if galleries := unlike([m.size for m in (*first.values(), *second.values())]):
        raise ReportError(
            f"{task}: {a.name}, {b.name}: expected one gallery, got {galleries}; test again"
        )
    differs = [key for other in everyone for key in _differences(everyone[0], other)]
    if differs and ":" not in task:
        row["differs"] = list(dict.fromkeys(differs))
    if ":" in task and len(seeds) > 1:
        return row
    for seed, one, two in measured:
        try:
            # Of seeds that are no pairs one draw is enough: it sees whether the data are the same.
            found = _over_images(one, two, resamples if paired else 1)
        except ValueError as error:
            raise ReportError(f"{task}: {one.folder} and {two.folder}: {error}") from None
        if found is None:
            continue
        within, answers = found
        if answers and not answers.pictures_known and "generation_kwargs" in one.result:
            row["pictures_unknown"] = True
        if paired:
            row.setdefault("within_seed", []).append({"seed": seed, **within})
        if len(deltas) == 1:
            row |= {"ci": within["ci"], "test": f"paired bootstrap over {within['images']} images"}
            if answers:
                differences = answers.correct_a - answers.correct_b
                row["p"] = stats.sign_flip_test(stats.cluster_sums(differences, answers.image_ids))
                row["test"] = f"paired sign-flip test over {within['images']} images"
    return row


def _over_seeds(task: str, a: Run, b: Run, deltas: list[float]) -> dict[str, Any]:
    """What a test with the seed as the unit says, or why there is none; of one pair, nothing.

    Args:
        task: The task.
        a: A run.
        b: Another.
        deltas: Differences by seed. Empty: the seeds are no pairs.
    """
    first, second = a.scores[task], b.scores[task]
    lone = next((run for run in (a, b) if len(run.scores[task]) == 1), None)
    for run in (a, b):
        if alike := _copies(run.scores[task]):
            return {"test": f"none: the seeds of {run.name} {alike}; are they one run?"}
    if not deltas:
        test = f"exact permutation test, {len(first)} seeds against {len(second)} others"
        least = 2.0 / math.comb(len(first) + len(second), len(first))
        found = stats.unpaired_summary(a.values(task), b.values(task))
        return found | {"test": test, "least_p": least}
    if len(deltas) == 1:
        return {}
    if lone is None or (lone.fixed and None in lone.scores[task]):
        against = f", {lone.name} fixed" if lone else ""
        test = f"exact sign-flip test over {len(deltas)} seeds{against}"
        return stats.seed_summary(deltas) | {"test": test, "least_p": 2.0 / 2 ** len(deltas)}
    return {
        "test": f"none: {lone.name} is one run, and its seed counts, too; a test over seeds needs "
        "several on both sides"
    }


def _over_images(
    one: Measured, two: Measured, resamples: int
) -> tuple[dict[str, Any], PairedSamples | None] | None:
    """Two single results with the image as the unit.

    Returns:
        `{delta, ci, n, images, mcnemar_p}`, and the answers, which a mean IoU does not have. None:
        neither answers nor counts of pixels were kept.

    Raises:
        ValueError: They are of different data.
    """
    if len(one.counts) and len(two.counts):
        return paired_iou(one.counts, two.counts, resamples) | {"mcnemar_p": None}, None
    if not (one.scored and two.scored):
        return None
    answers = pair_samples(one.scored, two.scored)
    scores = answers.correct_a, answers.correct_b
    within = stats.paired_bootstrap(*scores, answers.image_ids, resamples)
    mcnemar_p = stats.mcnemar_exact(*scores) if stats.is_binary(*scores) else None
    return within | {"mcnemar_p": mcnemar_p}, answers


def _copies(found: Mapping[int | None, Measured]) -> str | None:
    """What tells that seeds are one run, copied. None: nothing does.

    Two have the same weights, or all gave the same answers, some of them wrong.
    """
    made_by = list(filter(None, (one.weights() for one in found.values())))
    if len({*made_by}) < len(made_by):
        return "are not all of different weights"
    said = [
        [(s["doc_id"], s.get("answer"), s["correct"], s.get("counts")) for s in one.samples]
        for one in found.values()
    ]
    alike = said.count(said[0]) == len(said) > 1 and any(s[2] != 1 for s in said[0])
    return "gave the same answers" if alike else None


def _matched(task: str, a: Run, b: Run) -> tuple[list[int | None], bool]:
    """Seeds side by side, and whether they are pairs.

    A single run stands beside each of the other's seeds. Two sets without a common seed are no
    pairs; sets that share some are refused, since most often one of the seeds failed.
    """
    first, second = a.scores[task], b.scores[task]
    if min(len(first), len(second)) == 1:
        return list(first if len(first) > len(second) else second), True
    for run, mine, others in ((a, first, second), (b, second, first)):
        if mine.keys() & others.keys() and (lost := [seed for seed in others if seed not in mine]):
            raise ReportError(
                f"{task}: {run.name} has no seed {lost}: compare equal sets of seeds, or sets "
                "without a common seed"
            )
    return list(first), first.keys() == second.keys()


def _of(found: Mapping[int | None, Measured], seed: int | None) -> Measured:
    """What stands beside a seed: its own score, a single run's, or that of an unpaired seed."""
    return found[seed] if seed in found and len(found) > 1 else next(iter(found.values()))


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Which settings of two results differ, where their specifications do."""
    if not (one and two):
        return []
    found = [key for key in _IDENTITY if one.get(key) != two.get(key)]
    for key in _SETTINGS if found else ():
        x, y = (v if isinstance(v, Mapping) else {"": v} for v in (one.get(key), two.get(key)))
        found += [f"{key}.{k}".strip(".") for k in {**x, **y} if x.get(k) != y.get(k)]
    return found
