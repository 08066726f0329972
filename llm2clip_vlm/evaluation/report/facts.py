"""Facts of a report on a whole run, and the words and charts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any

from llm2clip_vlm.evaluation.report.charts import Chart, Curves, Line, Mark
from llm2clip_vlm.evaluation.report.comparison_pages import difference_chart, score_chart
from llm2clip_vlm.evaluation.report.examples import Example
from llm2clip_vlm.evaluation.report.inputs import DIRECTIONS, Run, guesses
from llm2clip_vlm.recipe.report import ReportRecipe

Retrieval = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""Tower to kind of caption to direction to R@1."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison, in words."""

    state: str
    """`above`, `below`, `mixed` or `overlapping`; of VLMs `undecided` (one training) or not."""
    sentence: str
    """Verdict in words, with the numbers."""
    short: str
    """The same for one line of a terminal."""


def retrieval_verdict(retrieval: Retrieval, headline: Sequence[str], kind: str = "long") -> Verdict:
    """Whether the first tower retrieves better, with intervals apart.

    Args:
        retrieval: Result of :func:`~llm2clip_vlm.evaluation.report.inputs.read_retrieval`.
        headline: Two towers.
        kind: Kind of caption.

    Returns:
        `above` only where the 95 % intervals of R@1 are apart in both directions; `below` likewise
        the other way round; `mixed` where they are apart in one direction, or disagree. Where the
        towers were also tested with a kind `<kind>_seen`, in wording that they were trained on, the
        words say what that shows, too.
    """
    state, start, words, figures, tail = _outcome(retrieval, headline, kind)
    what = f"R@1 with {worded(kind)} of unseen pictures: {figures}"
    short = f"R@1 with {worded(kind)} of {headline[0]} against {headline[1]}: {figures} ({tail})"
    sentence = f"{start}{words} ({what}; {tail})."
    if (seen := f"{kind}_seen") in retrieval[headline[0]]:
        _, _, words, figures, tail = _outcome(retrieval, headline, seen)
        sentence += f" In wording seen in training {words} ({figures}; {tail})."
        short += f"; in wording seen in training {figures} ({tail})"
    return Verdict(state, sentence, short)


def _outcome(retrieval: Retrieval, headline: Sequence[str], kind: str) -> tuple[str, ...]:
    """State, start of the sentence, what is said of the towers, figures, and why."""
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
            found = "above", "Yes, in retrieval: ", f"{a} is above {b}"
        case [-1]:
            found = "below", "No: in retrieval ", f"{a} is below {b}"
        case [0]:
            found = "overlapping", "Not shown: in retrieval ", f"{a} and {b} are not told apart"
            tail = "the 95 % intervals overlap"
        case [-1, 1]:
            found = "mixed", "Mixed: ", f"{a} is above {b} in one direction, below in the other"
        case _:
            words = f"{a} and {b} differ in one direction of retrieval only"
            found = "mixed", "Partly: ", words
            tail = f"apart in {next(arrow for arrow, sign in signs.items() if sign)}"
    return (*found, ", ".join(numbers), tail)


def worded(kind: str) -> str:
    """A kind of caption for people."""
    return "captions" if kind == "captions" else f"{kind.replace('_', ' ')} captions"


@dataclass
class Facts:
    """Everything that the report says."""

    recipe: ReportRecipe
    """What is compared."""
    retrieval: Retrieval
    """What each tower retrieves."""
    verdict: Verdict
    """What retrieval says of the headline."""
    cra: dict[str, Any] | None = None
    """Caption separability. None: no stage 1."""
    vlms: list[Run] = field(default_factory=list)
    """Towers with the scores of their VLMs, seed by seed, the headline's task first; empty = no
    VLM."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step to wall time."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Step to seconds, CPU seconds and peak memory; empty = not measured."""
    encoders: dict[str, Run] = field(default_factory=dict)
    """Tower to results of its other tasks."""
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tower to its manifest."""
    ab: dict[str, Any] | None = None
    """The committed A/B. None: not run."""
    curves: dict[str, list[Line]] = field(default_factory=dict)
    """Panel to curves of the training loss."""
    retrieved: list[Example] = field(default_factory=list)
    """Captions retrieved."""
    answers: list[Example] = field(default_factory=list)
    """Questions answered."""
    one_photograph: tuple[Example, Example] | None = None
    """Retrieved and answered for the same photograph. None: there is no such one."""

    @property
    def story(self) -> list[Example]:
        """What stands at the top: captions retrieved, then answers, if only of one photograph."""
        found = self.one_photograph or [*self.retrieved[:1], *self.answers[:1]]
        return [example for example in found if example.found.keys() & {*self.recipe.headline}]

    @property
    def tasks(self) -> list[str]:
        """Tasks of the VLMs, the headline's first."""
        return [task for task in (self.vlms[0].scores if self.vlms else ()) if ":" not in task]

    @property
    def guesses(self) -> dict[str, dict[str, dict[str, float]]]:
        """Task to what needs no picture to what it gets, by type of question (`""` = all)."""
        return {task: guesses(self.vlms[0].first(task).samples) for task in self.tasks}

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

    def accuracies(self, task: str) -> dict[str, list[float]]:
        """Tower to its scores by seed, in per cent."""
        return {run.name: run.values(task) for run in self.vlms}

    def counted(self, task: str) -> list[list[Any]]:
        """Checkpoint, questions, empty, cut and unparsable answers."""
        keys = ("n", "n_empty", "n_cut", "n_unparsable")
        return [
            [f"{run.name}-s{seed}", *(measured.result.get(key) for key in keys)]
            for run in self.vlms
            for seed, measured in run.scores[task].items()
        ]

    def looks(self) -> list[list[str]]:
        """Checkpoint, task, its score, that with other pictures, and the difference."""
        rows = []
        for run, task in product(self.vlms, self.tasks):
            for seed, measured in run.scores[task].items():
                if other := measured.result.get("other_pictures"):
                    figures = "{delta:+.1f} [{ci[0]:+.1f}, {ci[1]:+.1f}], p = {p:.2g}"
                    delta = figures.format(**other) if "delta" in other else "no interval"
                    scores = [f"{value:.1f}" for value in (measured.value, other["score"])]
                    rows.append([f"{run.name}-s{seed}", self.title(task), *scores, delta])
        return rows

    def vlm_verdict(self) -> Verdict | None:
        """What this run and the A/B say of the headline's VLMs. None: none was scored."""
        (a, b), task = self.recipe.headline, self.recipe.headline_task
        found = self.accuracies(task)
        if a not in found or b not in found:
            return None
        count = min(len(found[a]), len(found[b]))
        means = ", ".join(f"{name} {fmean(found[name]):.1f} %" for name in (a, b))
        state = f"{self.title(task)} {means} ({count} trainings each)"
        if count == 1:
            state = "not decided by this run"
        effect = ((self.ab or {}).get("ab", {}).get(task) or {}).get(f"{a}-{b}")
        short = other = "no A/B over training seeds is at hand"
        if effect is not None and None in (effect["ci"], effect["p"]):
            short = other = "not decided by the A/B: {delta:+.1f} points ({test})".format(**effect)
        elif effect is not None:
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
        return self.vlms[0].first(task).title if self.vlms else task

    def not_shown(self) -> list[str]:
        """What a reader might take from this page, and must not."""
        seeds = [len(found) for found in self.recipe.vlms.values()]
        sentences = {
            "The intervals of retrieval resample test pictures; no tower was trained twice "
            "here.": True,
            "One VLM was trained for each tower: a difference between them may be the luck of one "
            "training seed, whatever its interval over questions.": 1 in seeds,
            "No VLM was evaluated.": not self.vlms,
            "Another processor gives other figures, by some points where a VLM is short of "
            "convergence: it rounds sums otherwise, and training carries that on.": True,
            "No A/B over training seeds is at hand, so nothing is claimed of the VLMs.": (
                self.recipe.headline_task not in (self.ab or {}).get("ab", {})
            ),
        }
        return [text for text, holds in sentences.items() if holds] + self.recipe.not_shown


def charts(facts: Facts) -> dict[str, Any]:
    """Charts of the report: `cra`, `retrieval`, `scores`, `types`, `ab`, and `curves` by panel."""
    recipe, task = facts.recipe, facts.recipe.headline_task
    drawn: dict[str, Any] = {"types": None, "ab": None, "encoders": None}
    if cra := facts.cra:
        named = facts.untrained | {"after stage 1": "after"}
        bars = [
            Mark(label, cra[name], cra.get(f"{name}_ci"), 0 if name == "after" else 2 + place)
            for place, (label, name) in enumerate(named.items())
        ]
        heading = "One caption finds its paraphrase"
        chance = {heading: {"chance": 100 / cra["queries"]}} if "queries" in cra else {}
        drawn["cra"] = Chart("Caption separability", {heading: bars}, 100, chance)
    first, groups, chances = facts.retrieval[recipe.headline[0]], {}, {}
    for kind, way in product(first, DIRECTIONS):
        name = f"{worded(kind)}, {DIRECTIONS[way]}"
        rows = {tower: found[kind][way] for tower, found in facts.retrieval.items()}
        groups[name] = [
            Mark(tower, row["r1"], row.get("ci"), recipe.colour(tower))
            for tower, row in rows.items()
        ]
        if "chance_r1" in first[kind][way]:
            chances[name] = {"chance": first[kind][way]["chance_r1"]}
    drawn["retrieval"] = Chart("Retrieval R@1 of each tower", groups, guesses=chances)
    colours = {tower: recipe.colour(tower) for tower in recipe.order()}
    if facts.encoders:
        runs = list(facts.encoders.values())
        drawn["encoders"] = score_chart("Tasks of the encoders", runs, colours)
    if facts.vlms:
        drawn["scores"] = score_chart("Score of each VLM", facts.vlms, colours)
        kinds = list(facts.vlms[0].first(task).result["by_type"])
        if len(kinds) > 1:
            rule, found = max(facts.guesses[task].items(), key=lambda g: g[1][""], default=("", {}))
            groups = {
                kind.replace("_", " "): [
                    Mark(r.name, fmean(r.values(f"{task}:{kind}")), colour=recipe.colour(r.name))
                    for r in facts.vlms
                ]
                for kind in kinds
            }
            known = {kind.replace("_", " "): {rule: found[kind]} for kind in kinds if found}
            drawn["types"] = Chart("By type of question", groups, 100, known)
    if facts.ab is not None:
        drawn["ab"] = difference_chart(facts.ab, recipe.headline)
    curves = facts.curves.items()
    drawn["curves"] = {name: Curves(f"{name}, training loss", lines) for name, lines in curves}
    return drawn
