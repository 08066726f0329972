"""The sections of the report, each from the facts that it shows to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm2clip_vlm.config_eval import ReportRecipe
from llm2clip_vlm.evaluation import report as page
from llm2clip_vlm.evaluation.charts import Line, Mark, bar_chart, dot_chart, line_chart
from llm2clip_vlm.evaluation.examples import Example
from llm2clip_vlm.handoff import read_manifest


@dataclass
class Facts:
    """Everything that the report says."""

    recipe: ReportRecipe
    """What is compared."""
    retrieval: dict[str, dict[str, dict[str, dict[str, Any]]]]
    """Tower to kind of caption to direction to R@1."""
    verdict: page.Verdict
    """What retrieval says of the headline."""
    cra: dict[str, Any] | None = None
    """Caption separability; None = no stage 1."""
    scores: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Task to checkpoint to result, the headline's task first; empty = no VLM."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step to wall time."""
    ladder: dict[str, Any] | None = None
    """Rungs; None = not run."""
    ab: dict[str, Any] | None = None
    """The committed A/B; None = not run."""
    curves: dict[str, list[Line]] = field(default_factory=dict)
    """Panel to curves of the training loss."""
    retrieved: list[Example] = field(default_factory=list)
    """Captions retrieved."""
    answers: list[Example] = field(default_factory=list)
    """Questions answered."""

    def colour(self, tower: str) -> int:
        """The series of a tower: the two of the headline stand out."""
        others = [name for name in self.recipe.towers if name not in self.recipe.headline]
        order = [*self.recipe.headline, *others]
        return order.index(tower) if tower in order else len(order)

    def shown(self) -> list[str]:
        """Towers of the examples: the headline's two, and the first of the others."""
        others = [name for name in self.recipe.towers if name not in self.recipe.headline]
        return [*self.recipe.headline, *others[:1]]

    def checkpoints(self, tower: str) -> list[str]:
        """Names of a tower's VLMs in the evaluation folder, seed by seed."""
        return [f"{tower}-s{seed}" for seed in self.recipe.vlms[tower]]

    def results(self, task: str, tower: str) -> list[dict[str, Any]]:
        """Results of a task, seed by seed."""
        return [self.scores[task][name] for name in self.checkpoints(tower)]

    def accuracies(self, task: str) -> dict[str, list[float]]:
        """Tower to its scores by seed, in per cent."""
        return {
            tower: [float(result["score"]) for result in self.results(task, tower)]
            for tower in self.recipe.vlms
        }

    def title(self, task: str) -> str:
        """A task's name for people, with the cut where one was made."""
        result = next(iter(self.scores[task].values()))
        cut = f" (first {result['limit']} only)" if result.get("limit") else ""
        return f"{result['title']}{cut}"


def render(facts: Facts, template: Path) -> str:
    """The page.

    Args:
        facts: What it shows.
        template: See :func:`~llm2clip_vlm.evaluation.report.page`.
    """
    world = facts.recipe.world
    place = f"The embedded world, seed {world.seed} · " if world else ""
    body = "".join(
        [
            the_question(facts),
            the_answer(facts),
            retrieval_section(facts),
            retrieved_section(facts),
            vlm_section(facts),
            answers_section(facts),
            ab_section(facts),
            ladder_section(facts),
            curves_section(facts),
            cost_section(facts),
            page.section("What was not shown", page.bullets(not_shown(facts))),
            made_with(facts),
        ]
    )
    written = f"{place}written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return page.page(template, facts.recipe.title, written, body)


def the_question(facts: Facts) -> str:
    """What is asked, and who takes part."""
    a, b = facts.recipe.headline
    return page.section(
        "The question",
        page.paragraph(
            "CLIP learns from short captions, with a small text tower of its own. LLM2CLIP first "
            "teaches a language model to tell captions apart (stage 1), then trains the vision "
            "tower against that model's caption embeddings (stage 2). Does such a tower match "
            "long captions to pictures better, and is it a better eye for a vision-language "
            f"model (stages 3 and 4)? The towers compared: {a} against {b}, others beside them."
        ),
        page.table(
            ["tower", "what it is"],
            [[name, page.TOWER_NOTES.get(name, "")] for name in facts.recipe.towers],
        ),
    )


def the_answer(facts: Facts) -> str:
    """One sentence from the numbers, what is known of the VLM, and key figures."""
    a, b = facts.recipe.headline
    task = facts.recipe.headline_task
    effect = (facts.ab or {}).get("ab", {}).get(task, {}).get(f"{a}-{b}")
    if facts.scores:
        name, accuracies = facts.title(task), facts.accuracies(task)
    else:
        name, accuracies = task, {}
    entries = []
    if facts.cra:
        before, after = facts.cra["before"], facts.cra["after"]
        entries.append(
            ("Captions told apart (R@1)", f"{after:.1f} %", f"{before:.1f} % before stage 1")
        )
    for direction, arrow in page.DIRECTIONS.items():
        one, two = (facts.retrieval[tower]["long"][direction]["r1"] for tower in (a, b))
        entries.append((f"Long captions, {arrow}", f"{one:.1f} %", f"{b} {two:.1f} %"))
    if a in accuracies and b in accuracies:
        one, two = (sum(accuracies[t]) / len(accuracies[t]) for t in (a, b))
        entries.append((f"{name}, VLM", f"{one:.1f} %", f"{b} {two:.1f} %"))
    answer = page.paragraph(facts.verdict.sentence) + page.paragraph(
        page.vlm_sentence(name, accuracies, facts.recipe.headline, effect), "sub"
    )
    return page.section(
        "The answer",
        f'<div class="answer {facts.verdict.state}">{answer}</div>',
        page.tiles(entries),
        page.paragraph(f"Large figures are those of {a}.", "quiet"),
    )


def retrieval_section(facts: Facts) -> str:
    """Caption separability, then every tower's R@1 for each kind of caption."""
    blocks = []
    if facts.cra:
        bars = [
            Mark(label, facts.cra[key], facts.cra.get(f"{key}_ci"), colour)
            for label, key, colour in (
                ("before stage 1", "before", 2),
                ("after stage 1", "after", 0),
            )
        ]
        blocks.append(
            page.figure(
                bar_chart({"One caption finds its paraphrase": bars}, "Caption separability", 100),
                f"R@1 in per cent among {facts.cra.get('queries', '?')} held-out captions; before: "
                "the same model, bidirectional, not tuned. Whiskers: 95 % bootstrap interval.",
            )
        )
    kinds = next(iter(facts.retrieval.values()))
    groups = {}
    for kind in kinds:
        for direction, arrow in page.DIRECTIONS.items():
            groups[f"{kind.replace('_', ' ')} captions, {arrow}"] = [
                _retrieval_mark(facts, tower, kind, direction) for tower in facts.retrieval
            ]
    first = kinds["long"]["i2t"]
    blocks.append(
        page.figure(
            bar_chart(groups, "Retrieval R@1 of each tower"),
            f"R@1 in per cent among {first.get('queries', '?')} unseen pictures (chance "
            f"{first.get('chance_r1', 0):.1f} %). Whiskers: 95 % interval, bootstrap by picture; "
            "training was not repeated. Many pictures share a short caption, and an equal caption "
            "of another picture counts as a miss, so short captions have a low ceiling.",
        )
    )
    return page.section("Retrieval", *blocks)


def _retrieval_mark(facts: Facts, tower: str, kind: str, direction: str) -> Mark:
    found = facts.retrieval[tower][kind][direction]
    low_high = (found["ci"][0], found["ci"][1]) if found.get("ci") else None
    return Mark(tower, found["r1"], low_high, facts.colour(tower))


def retrieved_section(facts: Facts) -> str:
    """The caption that each tower ranks first for the first test pictures."""
    title = "Captions retrieved"
    if not facts.retrieved:
        return page.section(title, page.NOT_RUN)
    return page.section(
        title,
        page.paragraph(
            f"The first {len(facts.retrieved)} pictures of the test set, and the long caption "
            "among those of all test pictures that each tower ranks first.",
            "quiet",
        ),
        page.example_cards(facts.retrieved, same_text=True),
    )


def vlm_section(facts: Facts) -> str:
    """Scores of the VLMs, task by task and by question type."""
    title = "Vision-language models"
    if not facts.scores:
        return page.section(title, page.NOT_RUN)
    task, towers = facts.recipe.headline_task, list(facts.recipe.vlms)
    tasks = {facts.title(t): [_vlm_mark(facts, t, tower) for tower in towers] for t in facts.scores}
    kinds = list(next(iter(facts.scores[task].values()))["by_type"])
    types = {
        kind.replace("_", " "): [
            Mark(
                tower,
                _mean([r["by_type"][kind]["score"] for r in facts.results(task, tower)]),
                colour=facts.colour(tower),
            )
            for tower in towers
        ]
        for kind in kinds
    }
    seeds = max(len(found) for found in facts.recipe.vlms.values())
    whiskers = "95 % interval, bootstrap by picture" if seeds == 1 else "none; rings are seeds"
    blocks = [
        page.figure(
            bar_chart(tasks, "Score of each VLM", 100),
            f"Mean score in per cent as lmms-eval gives it. Trainings a tower: {seeds}. Whiskers: "
            f"{whiskers}. No p value is given here: it would be about these questions, not about "
            "training again.",
        )
    ]
    if len(kinds) > 1:
        blocks.append(
            page.figure(
                dot_chart(types, "By type of question"),
                f"{facts.title(task)} by type of question, per cent right.",
            )
        )
    rows = [
        [name, facts.title(t), result["n"], result["n_empty"], result["n_unparsable"]]
        for t, results in facts.scores.items()
        for name, result in results.items()
    ]
    header = ["checkpoint", "task", "questions", "empty", "unparsable"]
    shown = [[str("-" if cell is None else cell) for cell in row] for row in rows]
    details = f"<details><summary>Answers counted</summary>{page.table(header, shown)}</details>"
    return page.section(title, *blocks, details)


def _vlm_mark(facts: Facts, task: str, tower: str) -> Mark:
    results = facts.results(task, tower)
    values = [float(result["score"]) for result in results]
    if len(values) > 1:
        return Mark(tower, _mean(values), None, facts.colour(tower), values)
    low, high = results[0]["score_ci"]
    return Mark(tower, values[0], (low, high), facts.colour(tower))


def answers_section(facts: Facts) -> str:
    """What the VLMs said to some questions."""
    title = "Questions and answers"
    if not facts.answers:
        return page.section(title, page.NOT_RUN)
    return page.section(
        title,
        page.paragraph(
            f"{facts.title(facts.recipe.headline_task)}: the first question of each type, one "
            "picture each; VLMs of the first seed.",
            "quiet",
        ),
        page.example_cards(facts.answers, same_text=False),
    )


def ab_section(facts: Facts) -> str:
    """The committed A/B, which alone may carry the claim."""
    title = "The last committed A/B"
    if facts.ab is None:
        return page.section(title, page.NOT_RUN, page.paragraph("Run it with make ab.", "quiet"))
    ab, pair = facts.ab, facts.recipe.headline
    git = ab.get("git") or {}
    commit = str(git.get("commit") or "unknown")[:12] + (
        " with changes" if git.get("dirty") else ""
    )
    world = f", world seed {ab['world']['seed']}" if ab.get("world") else ""
    charts = page.ab_charts(ab, pair)
    return page.section(
        title,
        page.paragraph(
            f"Not part of this run: {len(ab['seeds'])} training seeds for each tower{world}, made "
            f"{str(ab['date'])[:10]} at commit {commit}. {pair[0]} minus {pair[1]}; the seed is "
            "the unit: exact sign-flip test, t interval."
        ),
        *(page.figure(svg, heading=name) for name, svg in charts.items()),
        "" if charts else page.NOT_RUN,
        page.paragraph(
            "Diamonds: mean difference; rings: one training seed each; whiskers: 95 % interval. "
            "Rows in grey are question types of the row above them and were not corrected for "
            "their number.",
            "quiet",
        ),
    )


def ladder_section(facts: Facts) -> str:
    """What had to hold before the A/B was worth running."""
    found = page.ladder_table(facts.ladder) if facts.ladder else page.NOT_RUN
    return page.section("The ladder of validity", found)


def curves_section(facts: Facts) -> str:
    """Training loss of each stage."""
    title = "Training curves"
    if not facts.curves:
        return page.section(title, page.NOT_RUN)
    figures = "".join(
        page.figure(line_chart(lines, f"{name}, training loss"), heading=name)
        for name, lines in facts.curves.items()
    )
    note = "Training loss. Towers that were not trained in this run have no curve."
    return page.section(
        title, page.paragraph(note, "quiet"), f'<div class="curves">{figures}</div>'
    )


def cost_section(facts: Facts) -> str:
    """Wall time of each step."""
    found = page.durations(facts.seconds) if facts.seconds else page.NOT_RUN
    note = "Wall time of each step; steps that ran side by side overlap."
    return page.section("What it cost", page.paragraph(note, "quiet"), found)


def not_shown(facts: Facts) -> list[str]:
    """What a reader might take from this page, and must not."""
    found = ["The intervals of retrieval resample test pictures; no tower was trained twice here."]
    if facts.recipe.vlms and min(len(seeds) for seeds in facts.recipe.vlms.values()) == 1:
        found.append(
            "One VLM was trained for each tower: a difference between them may be the luck of one "
            "training seed, whatever its interval over questions."
        )
    if not facts.scores:
        found.append("No VLM was evaluated.")
    if facts.ab is None:
        found.append("The A/B over training seeds was not run, so nothing is claimed of the VLMs.")
    if facts.ladder is None:
        found.append("The ladder of validity was not run.")
    if facts.recipe.world is not None:
        found.append(
            "Pictures and texts are procedural and small, and so are the models: nothing here says "
            "how large the effect is with real weights on photographs."
        )
    lost = [name for name in page.TOWER_NOTES if name not in facts.recipe.towers]
    if lost:
        found.append(f"Towers that are not part of this run: {', '.join(lost)}.")
    return [*found, *facts.recipe.not_shown]


def made_with(facts: Facts) -> str:
    """Versions and recipes behind the headline."""
    rows = []
    for tower, folder in facts.recipe.towers.items():
        manifest = read_manifest(folder)
        if manifest is not None:
            versions = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
            rows.append([tower, manifest["recipe_hash"][:12], versions])
    return (
        page.section("Made with", page.table(["tower", "recipe", "versions"], rows)) if rows else ""
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
