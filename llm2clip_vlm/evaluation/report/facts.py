"""Facts of a report on a whole run, and the words and charts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from llm2clip_vlm.evaluation.report.charts import Line, Mark, bar_chart, line_chart
from llm2clip_vlm.evaluation.report.comparison import difference_chart
from llm2clip_vlm.evaluation.report.examples import Example
from llm2clip_vlm.evaluation.report.inputs import DIRECTIONS, Run
from llm2clip_vlm.recipe.report import ReportRecipe


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison, in words."""

    state: str
    """`above`, `below`, `mixed` or `overlapping`; of VLMs `undecided` (one training) or not."""
    sentence: str
    """In words, with the numbers."""
    short: str
    """The same for one line of a terminal."""


def retrieval_verdict(
    retrieval: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    headline: Sequence[str],
    kind: str = "long",
) -> Verdict:
    """Whether the first tower retrieves better, with intervals apart.

    Args:
        retrieval: From :func:`~llm2clip_vlm.evaluation.report.inputs.read_retrieval`.
        headline: Two towers.
        kind: Kind of caption.

    Returns:
        `above` only where the 95 % intervals of R@1 are apart in both directions; `below` likewise
        the other way round; `mixed` where they are apart in one direction, or disagree.
    """
    a, b = headline
    signs: dict[str, int] = {}
    numbers = []
    for direction, arrow in DIRECTIONS.items():
        first, second = (retrieval[name][kind][direction] for name in headline)
        numbers.append(f"{arrow} {first['r1']:.1f} % against {second['r1']:.1f} %")
        (low, high), (least, most) = (found.get("ci") or (0, 100) for found in (first, second))
        signs[arrow] = int(low > most) - int(high < least)
    tail = "the 95 % intervals are apart in both directions"
    match sorted(set(signs.values())):
        case [1]:
            state, words = "above", f"Yes, in retrieval: {a} is above {b}"
        case [-1]:
            state, words = "below", f"No: in retrieval {a} is below {b}"
        case [0]:
            state, words = "overlapping", f"Not shown: in retrieval {a} and {b} are not told apart"
            tail = "the 95 % intervals overlap"
        case [-1, 1]:
            state, words = "mixed", f"Mixed: {a} is above {b} in one direction, below in the other"
        case _:
            state = "mixed"
            words = f"Partly: {a} and {b} differ in one direction of retrieval only"
            tail = f"apart in {next(arrow for arrow, sign in signs.items() if sign)}"
    figures = ", ".join(numbers)
    what = f"R@1 with {worded(kind)} of unseen pictures: {figures}"
    short = f"R@1 with {worded(kind)} of {a} against {b}: {figures} ({tail})"
    return Verdict(state, f"{words} ({what}; {tail}).", short)


def worded(kind: str) -> str:
    """A kind of caption for people."""
    return "captions" if kind == "captions" else f"{kind.replace('_', ' ')} captions"


@dataclass
class Facts:
    """Everything that the report says."""

    recipe: ReportRecipe
    """What is compared."""
    retrieval: dict[str, dict[str, dict[str, dict[str, Any]]]]
    """Tower to kind of caption to direction to R@1."""
    verdict: Verdict
    """What retrieval says of the headline."""
    cra: dict[str, Any] | None = None
    """Caption separability; None = no stage 1."""
    scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Task to checkpoint to result, the headline's task first; empty = no VLM."""
    guesses: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Task to what needs no picture to what it gets, by type of question (`""` = all)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step to wall time."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Step to seconds, CPU seconds and peak memory; empty = not measured."""
    encoders: dict[str, Run] = field(default_factory=dict)
    """Tower to results of its other tasks."""
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tower to its manifest."""
    ab: dict[str, Any] | None = None
    """The committed A/B; None = not run."""
    curves: dict[str, list[Line]] = field(default_factory=dict)
    """Panel to curves of the training loss."""
    retrieved: list[Example] = field(default_factory=list)
    """Captions retrieved."""
    answers: list[Example] = field(default_factory=list)
    """Questions answered."""

    @property
    def untrained(self) -> dict[str, str]:
        """What :attr:`cra` has of the LLM as it came: words to key."""
        ways = ("causal", "bidirectional", "partial")
        found = {f"raw LLM, {w}": f"raw_{w}" for w in ways if f"raw_{w}" in (self.cra or {})}
        return found or {"before stage 1": "before"}  # of an older run

    @property
    def untrained_shown(self) -> str:
        """The same with its figures."""
        figures = self.cra or {}
        return ", ".join(f"{w} {figures[key]:.1f} %" for w, key in self.untrained.items())

    def results(self, task: str, tower: str) -> list[dict[str, Any]]:
        """Results of a task, seed by seed."""
        return [self.scores[task][f"{tower}-s{seed}"] for seed in self.recipe.vlms[tower]]

    def accuracies(self, task: str) -> dict[str, list[float]]:
        """Tower to its scores by seed, in per cent."""
        return {
            tower: [float(result["score"]) for result in self.results(task, tower)]
            for tower in self.recipe.vlms
            if task in self.scores
        }

    def vlm_verdict(self) -> Verdict | None:
        """What this run and the A/B say of the headline's VLMs; None = none was scored."""
        (a, b), task = self.recipe.headline, self.recipe.headline_task
        found = self.accuracies(task)
        if a not in found or b not in found:
            return None
        count = min(len(found[a]), len(found[b]))
        means = ", ".join(f"{name} {np.mean(found[name]):.1f} %" for name in (a, b))
        state = f"{self.title(task)} {means} ({count} trainings each)"
        if count == 1:
            state = "not decided by this run"
        effect = ((self.ab or {}).get("ab", {}).get(task) or {}).get(f"{a}-{b}")
        short = other = "the A/B over training seeds was not run"
        if effect is not None:
            figures = "{delta:+.1f} points [{ci[0]:+.1f}, {ci[1]:+.1f}]".format(**effect)
            short = f"A/B over {effect['n_seeds']} seeds: {figures}"
            other = (
                f"the committed A/B over {effect['n_seeds']} training seeds, not part of this run: "
                f"{a} minus {b} = {figures}, p = {effect['p']:.2g} (exact sign-flip test, the seed "
                "as the unit)"
            )
        why = ", which has one training each and so settles nothing" if count == 1 else ""
        sentence = f"As the eyes of a VLM: {state}{why}. {other[0].upper()}{other[1:]}."
        return Verdict("decided" if count > 1 else "undecided", sentence, f"{state} ({short})")

    def title(self, task: str) -> str:
        """A task's name for people, with the cut where one was made."""
        result = next(iter(self.scores.get(task, {}).values()), {})
        cut = f" (first {result['limit']} only)" if result.get("limit") else ""
        return f"{result.get('title', task)}{cut}"

    def not_shown(self) -> list[str]:
        """What a reader might take from this page, and must not."""
        seeds = [len(found) for found in self.recipe.vlms.values()]
        sentences = {
            "The intervals of retrieval resample test pictures; no tower was trained twice "
            "here.": True,
            "One VLM was trained for each tower: a difference between them may be the luck of one "
            "training seed, whatever its interval over questions.": 1 in seeds,
            "No VLM was evaluated.": not self.scores,
            "Another processor gives other figures, by some points where a VLM is short of "
            "convergence: it rounds sums otherwise, and training carries that on.": True,
            "The A/B over training seeds was not run, so nothing is claimed of the VLMs.": self.ab
            is None,
        }
        return [text for text, holds in sentences.items() if holds] + self.recipe.not_shown


def charts(facts: Facts) -> dict[str, Any]:
    """Charts of the report: `cra`, `retrieval`, `scores`, `types`, `ab`, and `curves` by panel."""
    recipe, task = facts.recipe, facts.recipe.headline_task
    drawn: dict[str, Any] = {"types": "", "ab": "", "encoders": ""}
    if cra := facts.cra:
        named = facts.untrained | {"after stage 1": "after"}
        bars = [
            Mark(label, cra[name], cra.get(f"{name}_ci"), 0 if name == "after" else 2 + place)
            for place, (label, name) in enumerate(named.items())
        ]
        heading = "One caption finds its paraphrase"
        chance = {heading: {"chance": 100 / cra["queries"]}} if "queries" in cra else {}
        drawn["cra"] = bar_chart({heading: bars}, "Caption separability", 100, chance)
    first, groups, chances = facts.retrieval[recipe.headline[0]], {}, {}
    for kind, way in product(first, DIRECTIONS):
        name = f"{worded(kind)}, {DIRECTIONS[way]}"
        groups[name] = [_recall(facts, tower, kind, way) for tower in facts.retrieval]
        if "chance_r1" in first[kind][way]:
            chances[name] = {"chance": first[kind][way]["chance_r1"]}
    drawn["retrieval"] = bar_chart(groups, "Retrieval R@1 of each tower", guesses=chances)
    tasks = {
        task: seeds[None].title for r in facts.encoders.values() for task, seeds in r.scores.items()
    }
    if tasks:
        groups = {
            title: [
                Mark(tower, run.values(task)[0], colour=recipe.colour(tower))
                for tower, run in facts.encoders.items()
                if task in run.scores
            ]
            for task, title in tasks.items()
        }
        chances = {
            tasks[task]: {"chance": float(seeds[None].result[key])}
            for run in facts.encoders.values()
            for task, seeds in run.scores.items()
            for key in ("chance_top1", "chance_miou")
            if key in seeds[None].result
        }
        drawn["encoders"] = bar_chart(groups, "Other tasks of the encoders", 100, chances)
    if facts.scores:
        groups = {
            facts.title(name): [_score(facts, name, tower) for tower in recipe.vlms]
            for name in facts.scores
        }
        guesses = {
            facts.title(name): {rule: kinds[""] for rule, kinds in facts.guesses[name].items()}
            for name in facts.scores
        }
        drawn["scores"] = bar_chart(groups, "Score of each VLM", 100, guesses)
        kinds = list(next(iter(facts.scores[task].values()))["by_type"])
        if len(kinds) > 1:
            rule, found = max(facts.guesses[task].items(), key=lambda g: g[1][""], default=("", {}))
            groups = {
                kind.replace("_", " "): [
                    Mark(tower, _by_type(facts, tower, kind), colour=recipe.colour(tower))
                    for tower in recipe.vlms
                ]
                for kind in kinds
            }
            guesses = {kind.replace("_", " "): {rule: found[kind]} for kind in kinds if found}
            drawn["types"] = bar_chart(groups, "By type of question", 100, guesses)
    if facts.ab is not None:
        drawn["ab"] = difference_chart(facts.ab, recipe.headline)
    drawn["curves"] = {
        name: line_chart(lines, f"{name}, training loss") for name, lines in facts.curves.items()
    }
    return drawn


def _recall(facts: Facts, tower: str, kind: str, way: str) -> Mark:
    found = facts.retrieval[tower][kind][way]
    return Mark(tower, found["r1"], found.get("ci"), facts.recipe.colour(tower))


def _by_type(facts: Facts, tower: str, kind: str) -> float:
    results = facts.results(facts.recipe.headline_task, tower)
    return float(np.mean([result["by_type"][kind]["score"] for result in results]))


def _score(facts: Facts, task: str, tower: str) -> Mark:
    results, colour = facts.results(task, tower), facts.recipe.colour(tower)
    if len(results) == 1:
        return Mark(tower, results[0]["score"], results[0]["score_ci"], colour)
    values = facts.accuracies(task)[tower]
    return Mark(tower, float(np.mean(values)), None, colour, values)
