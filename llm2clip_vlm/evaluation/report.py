"""Building blocks of a report: what the numbers say in words, and pieces of a page.

Text that comes from data is escaped here, so that callers may pass anything; arguments named `html`
or `svg` are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from llm2clip_vlm.evaluation.charts import CHART_CSS, Effect, forest_chart
from llm2clip_vlm.evaluation.examples import Example, data_uri

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
"""Directions of retrieval and how they are written."""

TOWER_NOTES = {
    "base": "CLIP as it is shipped, trained on short captions only",
    "llm2clip": "base, trained further against the tuned LLM's caption embeddings",
    "control": "base, trained further on the same pictures, captions and steps with its own text "
    "encoder; long captions are cut at its window",
    "control_long": "as control, but with a text window that holds the whole caption: base, the "
    "same pictures, captions and steps, its own text encoder",
    "no_stage1": "as llm2clip, with the embeddings of the LLM before stage 1",
}
"""What the demo's towers are."""

NOT_RUN = '<p class="absent">not run</p>'
"""Stands where an input was not given."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison says."""

    state: str
    """`above`, `below`, `mixed` or `overlapping`."""
    sentence: str
    """In words, with the numbers."""
    short: str
    """The same for one line of a terminal."""


def retrieval_verdict(
    retrieval: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    headline: Sequence[str],
    kind: str = "long",
) -> Verdict:
    """Whether the first tower retrieves better than the second, with intervals apart.

    Args:
        retrieval: From :func:`~llm2clip_vlm.evaluation.report_inputs.read_retrieval`.
        headline: Two towers.
        kind: Kind of caption.

    Returns:
        `above` only where the 95 % intervals of R@1 are apart in both directions; `below` likewise
        the other way round; `mixed` where they are apart in one direction, or disagree.
    """
    first, second = headline
    signs, numbers = [], []
    for direction, arrow in DIRECTIONS.items():
        a, b = (retrieval[name][kind][direction] for name in headline)
        numbers.append(f"{arrow} {a['r1']:.1f} % against {b['r1']:.1f} %")
        intervals = a.get("ci"), b.get("ci")
        if intervals[0] is None or intervals[1] is None:
            signs.append(0)
            continue
        signs.append(
            int(intervals[0][0] > intervals[1][1]) - int(intervals[0][1] < intervals[1][0])
        )
    figures = ", ".join(numbers)
    what = f"R@1 with {kind} captions of unseen pictures: {figures}"
    if set(signs) == {1}:
        state, words = "above", f"Yes, in retrieval: {first} is above {second}"
        tail = "the 95 % intervals are apart in both directions"
    elif set(signs) == {-1}:
        state, words = "below", f"No: in retrieval {first} is below {second}"
        tail = "the 95 % intervals are apart in both directions"
    elif set(signs) == {0}:
        state, words = (
            "overlapping",
            f"Not shown: in retrieval {first} and {second} are not told apart",
        )
        tail = "the 95 % intervals overlap"
    else:
        state, words = (
            "mixed",
            f"Partly: {first} and {second} differ in one direction of retrieval only",
        )
        if set(signs) == {1, -1}:
            words = f"Mixed: {first} is above {second} in one direction, below in the other"
        apart = [arrow for arrow, sign in zip(DIRECTIONS.values(), signs, strict=True) if sign]
        tail = f"apart in {' and '.join(apart)}"
    return Verdict(
        state,
        f"{words} ({what}; {tail}).",
        f"{kind}-caption R@1 of {first} against {second}: {figures} ({tail})",
    )


def vlm_sentence(
    title: str,
    accuracies: Mapping[str, Sequence[float]],
    headline: Sequence[str],
    effect: Mapping[str, Any] | None,
) -> str:
    """What is known of the towers as the eyes of a VLM.

    Args:
        title: Of the task.
        accuracies: Tower to its accuracies by seed, in per cent.
        headline: Two towers.
        effect: The A/B's entry for this task and these towers; none = not run.

    Returns:
        Sentences; only the A/B may carry a claim.
    """
    means = ", ".join(f"{name} {sum(v) / len(v):.1f} %" for name, v in accuracies.items())
    count = max((len(v) for v in accuracies.values()), default=0)
    times = "one training each, which settles nothing" if count == 1 else f"{count} trainings each"
    here = f"As the eyes of a VLM: {title} {means} ({times})." if means else ""
    if effect is None:
        return f"{here} The A/B over training seeds was not run.".strip()
    low, high = effect["ci"]
    return (
        f"{here} The committed A/B over {effect['n_seeds']} seeds: {headline[0]} minus "
        f"{headline[1]} = {effect['delta']:+.1f} points [{low:+.1f}, {high:+.1f}], "
        f"p = {effect['p']:.2g} (exact sign-flip test, the seed as the unit)."
    ).strip()


def ab_charts(ab: Mapping[str, Any], pair: Sequence[str]) -> dict[str, str]:
    """Forest plots of an A/B for one pair of towers.

    Args:
        ab: What `eval/ab.py` wrote.
        pair: Two towers.

    Returns:
        Heading to an `<svg>` element; empty where the pair was not compared.
    """
    panels: dict[str, list[Effect]] = {"VLM accuracy, points": [], "Retrieval R@1, points": []}
    heads = list(panels)
    for task, pairs in ab["ab"].items():
        row = pairs.get("-".join(pair))
        if row is None:
            continue
        by_type = ":" in task
        panels[heads[task.startswith("retrieval_")]].append(
            Effect(
                task.partition(":")[2].replace("_", " ")
                if by_type
                else ab["titles"].get(task, task),
                row["delta"],
                (row["ci"][0], row["ci"][1]),
                row["deltas_by_seed"],
                "" if by_type else f"p {row['p']:.2g}",
                strong=not by_type,
            )
        )
    labels = (f"{pair[1]} better", f"{pair[0]} better")
    return {
        head: forest_chart(rows, f"{head}: {pair[0]} minus {pair[1]}", labels)
        for head, rows in panels.items()
        if rows
    }


def section(title: str, *html: str) -> str:
    """A part of the page; empty blocks are left out."""
    anchor = "".join(c if c.isalnum() else "-" for c in title.lower())
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(html)}</section>'


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>'


def figure(svg: str, caption: str = "", heading: str = "") -> str:
    """A chart that scrolls sideways on a narrow screen, with a heading and a caption."""
    above = f"<h3>{escape(heading)}</h3>" if heading else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{above}<div class="scroll">{svg}</div>{below}</figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """A table; numbers stand on the right."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="number">{cell:.1f}</td>'
            if isinstance(cell, float)
            else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return _table(f"<tr>{head}</tr>", body)


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Key figures.

    Args:
        entries: What it is, its value, and what it is to be compared with.
    """
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
            f"<small>{escape(other)}</small></div>"
            for name, value, other in entries
        )
        + "</div>"
    )


def bullets(items: Sequence[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def durations(seconds: Mapping[str, float]) -> str:
    """Time of each step, with a bar, and the sum."""
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{_clock(value)}</td>'
        f'<td class="wide"><div class="share" style="width:{100 * value / longest:.1f}%"></div>'
        "</td></tr>"
        for name, value in seconds.items()
    )
    whole = _clock(sum(seconds.values()))
    total = f'<tr class="total"><td>sum</td><td class="number">{whole}</td><td></td></tr>'
    head = '<tr><th scope="col">step</th><th scope="col">wall time</th><td></td></tr>'
    return _table(head, rows + total)


def example_cards(examples: Sequence[Example], same_text: bool) -> str:
    """Pictures with what each model said of them.

    Args:
        examples: What to show.
        same_text: The question is the expected text itself (a caption): it is written once.
    """
    cards = []
    for example in examples:
        said = "".join(
            f'<dt>{escape(name)}</dt><dd class="{"right" if right else "wrong"}">'
            f"{escape(text) or '(nothing)'} <b>{'✓ right' if right else '✗ wrong'}</b></dd>"
            for name, (text, right) in example.found.items()
        )
        asked = "" if same_text else f"<h3>{escape(example.asked)}</h3>"
        label = "its caption" if same_text else "answer"
        cards.append(
            f'<article class="card"><img src="{data_uri(example.picture)}" '
            f'alt="{escape("test picture" if not same_text else example.expected)}">'
            f"<div>{asked}<dl><dt>{label}</dt><dd>{escape(example.expected)}</dd>{said}</dl></div>"
            "</article>"
        )
    return f'<div class="cards{" long" if same_text else ""}">{"".join(cards)}</div>'


def ladder_table(ladder: Mapping[str, Any]) -> str:
    """The rungs of the ladder of validity.

    Args:
        ladder: Rung to `{title, value, goal, passed, ...}`; other shapes are written out.
    """
    rows = []
    for name, rung in ladder.items():
        if not isinstance(rung, Mapping):
            rows.append([name, _words(rung), "", ""])
            continue
        rest = {k: v for k, v in rung.items() if k not in ("title", "goal", "passed", "value")}
        passed = rung.get("passed")
        state = "" if passed is None else "✓ passed" if passed else "✗ not passed"
        value = _words(rung.get("value", rest))
        note = f" ({_words(rest)})" if "value" in rung and rest else ""
        rows.append(
            [str(rung.get("title", name)), value + note, _words(rung.get("goal", "")), state]
        )
    return table(["rung", "found", "goal", ""], rows)


def page(template: str | Path, title: str, subtitle: str, html: str) -> str:
    """The whole page.

    Args:
        template: HTML file with `$title`, `$subtitle`, `$chart_css` and `$body`.
        title: Heading.
        subtitle: Line below it.
        html: Sections.
    """
    text = Template(Path(template).read_text(encoding="utf-8"))
    return text.substitute(
        title=escape(title), subtitle=escape(subtitle), chart_css=CHART_CSS, body=html
    )


def _table(head: str, body: str) -> str:
    rows = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{rows}</table></div>'


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    return str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
