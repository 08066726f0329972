"""The report: words follow from numbers, the page stands alone, what is absent says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from llm2clip_vlm.evaluation.report import facts
from llm2clip_vlm.evaluation.report.charts import Chart, Curves, Line, Mark
from llm2clip_vlm.evaluation.report.examples import (
    Example,
    answered_questions,
    one_photograph,
    retrieved_captions,
    sample_pictures,
)
from llm2clip_vlm.evaluation.report.inputs import (
    ReportError,
    guesses,
    measured_in,
    read_retrieval,
    read_vlms,
)
from llm2clip_vlm.evaluation.report.pages import clock, data_uri, markdown, render
from llm2clip_vlm.evaluation.vlm.samples import PIXELS, load_samples
from llm2clip_vlm.evaluation.vlm.task_helpers import pixel_hash
from llm2clip_vlm.recipe.report import ReportRecipe
from tests.report_fixtures import (
    KINDS,
    RATES,
    drawn_piece,
    load_program,
    report_recipe,
    retrieval,
    write_json,
    write_lines,
    write_run,
    write_tower,
    write_world,
)


@pytest.fixture(scope="module")
def program(repo_root: Path) -> ModuleType:
    return load_program(repo_root, "report")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1))


def make(
    program: ModuleType, run: Path, out: Path, seeds: tuple[int, ...] = (0,), **changes: Any
) -> tuple[dict[str, Any], str]:
    """Run the program with a changed recipe; the report as JSON and as HTML."""
    recipe = {**report_recipe(run, seeds), "output_dir": str(out), **changes}
    assert program.main([str(write_json(out / "recipe.yaml", recipe))]) == 0
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


NOT_RUN = '<p class="absent">not run</p>'


def test_json_has_the_pinned_keys(program: ModuleType, run: Path, tmp_path: Path) -> None:
    cost = {"cpu_seconds": 2.0, "peak_memory_gb": 0.5}
    costs = {"stage1": cost | {"seconds": 3.0}, "eval": cost | {"seconds": 4}}
    write_json(tmp_path / "costs.json", costs)
    found, _ = make(
        program,
        run,
        tmp_path,
        seeds=(1, 0),
        costs=str(tmp_path / "costs.json"),
    )
    assert found["cra"]["before"] == 20.5 and found["cra"]["after"] == 96.9
    assert found["retrieval"]["llm2clip"]["long"]["t2i"]["r1"] == 65.0
    assert found["retrieval"]["base"]["short"]["i2t"]["ci"][1] == pytest.approx(4.24)
    assert found["seconds"] == {"stage1": 3.0, "eval": 4.0}
    for tower in RATES:
        by_seed = [
            json.loads((run / f"eval/{tower}-s{seed}/l2c_world_vqa.json").read_text())["score"]
            for seed in (1, 0)
        ]
        assert found["vlm"][tower]["l2c_world_vqa"] == by_seed


def test_the_page_stands_alone_and_the_line_is_one(
    program: ModuleType, run: Path, tmp_path: Path, capsys: Any
) -> None:
    _, html = make(program, run, tmp_path)
    out = capsys.readouterr().out
    assert (
        out.count("\n") == 1
        and str(tmp_path / "report.html") in out
        and "96.9 % (raw LLM, causal 45.5 %" in out
    )
    assert "64.0 % against 35.0 %" in out
    links = re.findall(r"(?:https?:)?//[\w.]+", html)
    assert set(links) <= {"http://www.w3.org"}
    counted = html.split("<summary>Answers counted")[1].split("</details>")[0]
    assert re.search(r">\s*cut\s*<", counted) and re.search(r">\s*7\s*<", counted)
    assert not re.search(r"<(script|link|iframe)|@import|url\((?!#)|src=\"(?!data:)", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert html.count("prefers-color-scheme") == 1 and "viewport" in html


def test_absent_inputs_are_not_run_and_no_p_is_printed(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    assert "The last committed A/B" not in make(program, run, tmp_path, ab=None)[1]
    found, html = make(program, run, tmp_path)
    assert found["ab"] is None
    for heading in ("The last committed A/B", "Captions retrieved"):
        assert re.search(rf"<h2>{heading}</h2>\s*{NOT_RUN}", html), heading
    assert not re.search(r"\bp\s*[=<]\s*0|\bp 0\.", html)
    assert any("No A/B over training seeds is at hand" in s for s in found["not_shown"])
    assert any("One VLM was trained for each tower" in s for s in found["not_shown"])
    bare, html = make(program, run, tmp_path, stage1=None, evaluation=None, vlms={}, stage3={})
    assert bare["cra"] is None and bare["vlm"] == {}
    assert re.search(rf"<h2>Vision-language models</h2>\s*{NOT_RUN}", html)


def test_the_committed_ab_is_labelled(
    program: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    effect = {"delta": 9.0, "ci": [7.0, 11.0], "p": 0.0078, "deltas_by_seed": [8.0, 10.0]}
    ab = {
        "date": "2031-02-03T04:05:06+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "seeds": list(range(8)),
        "data": "the drawn world, seed 5",
        "titles": {"l2c_world_vqa": "World VQA"},
        "ab": {"l2c_world_vqa": {"llm2clip-control_long": {**effect, "n_seeds": 8}}},
    }
    _, html = make(program, run, tmp_path, ab=str(write_json(tmp_path / "ab.json", ab)))
    label = "the drawn world, seed 5, made 2031-02-03 at commit 0123456789ab with changes"
    assert f"Not part of this run: 8 training seeds for each tower, {label}" in html
    assert "= +9.0 points [+7.0, +11.0], p = 0.0078" in html
    assert "+9.0 [+7.0, +11.0]" in html
    said = capsys.readouterr().out
    assert "VLM: not decided by this run (A/B over 8 seeds: +9.0 points [+7.0, +11.0])" in said


def test_an_ab_without_a_test_decides_nothing(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    effect = {"delta": 9.0, "ci": None, "p": None, "deltas_by_seed": [8.0, 10.0], "n_seeds": 2}
    ab: dict[str, Any] = {
        "date": "2031-02-03",
        "seeds": [0, 1],
        "titles": {},
        "data": "",
        "git": {"commit": "0" * 12, "dirty": False},
    }
    for ci in (None, [7.0, 11.0]):
        row = {**effect, "ci": ci, "test": "none: base is one run"}
        ab["ab"] = {"l2c_world_vqa": {"llm2clip-control_long": row}}
        found, _ = make(program, run, tmp_path, ab=str(write_json(tmp_path / "ab.json", ab)))
        assert "Not decided by the A/B: +9.0 points (none: base is one run)" in found["finding_vlm"]


def test_towers_of_other_galleries_are_refused(tmp_path: Path) -> None:
    found, places = retrieval(60.0), {name: str(tmp_path / name) for name in "ab"}
    write_json(tmp_path / "a/results.json", found)
    found["retrieval"]["long"]["t2i"]["gallery"] = 5000
    write_json(tmp_path / "b/results.json", found)
    with pytest.raises(ReportError, match=r"b: captions: expected as for a.*'gallery': 5000"):
        read_retrieval(places)
    del found["retrieval"]["long"]
    write_json(tmp_path / "b/results.json", found)
    with pytest.raises(ReportError, match="b: captions: expected as for a"):
        read_retrieval(places)


def test_scores_of_weights_that_are_gone_are_refused(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    """Stage 4 was run again, the evaluation was not."""
    judged = json.loads((run / "eval/base-s0/l2c_world_vqa.json").read_text())["checkpoint"]
    manifest = {"schema": 1, "seconds": 1.0, "outputs": {"model": judged["sha256"]}}
    vlms = report_recipe(run)["vlms"] | {"base": {"0": str(tmp_path / "base")}}
    write_json(tmp_path / "base/manifest.json", manifest)
    make(program, run, tmp_path, vlms=vlms)
    write_json(tmp_path / "base/manifest.json", manifest | {"outputs": {"model": "other"}})
    with pytest.raises(
        ReportError, match="other weights than the model of stage4-base-s0: it was trained again"
    ):
        make(program, run, tmp_path, vlms=vlms)


def test_tasks_of_an_encoder_that_was_trained_again_are_refused(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    """`make demo` trains the tower anew; the evaluation of its other tasks was made by hand."""
    folder, tower = tmp_path / "encoder", tmp_path / "tower"
    judged = {"path": str(tower / "model"), "sha256": "old"}
    write_json(folder / "parts.json", {"miou": 41.5, "checkpoint": judged})
    write_json(folder / "results.json", {})
    write_tower(tower, 60.0)
    manifest = json.loads((tower / "manifest.json").read_text())
    places = {"encoders": {"base": str(folder)}}
    places["towers"] = report_recipe(run)["towers"] | {"base": str(tower)}
    for sha in ("old", "new"):
        write_json(tower / "manifest.json", manifest | {"outputs": {"model": sha}})
        if sha == "old":
            assert make(program, run, tmp_path, **places)[0]["encoders"] == {
                "base": {"parts": 41.5}
            }
    with pytest.raises(
        ReportError, match=r"encoder: these scores are of other weights than .* stage2-base"
    ):
        make(program, run, tmp_path, **places)
    make(program, run, tmp_path, **places, tower_models={"base": str(tmp_path)})


def test_what_needs_no_picture_is_a_line_in_every_chart_with_a_score(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    parts = {"miou": 41.5, "chance_miou": 2.8, "ci": [40.1, 43.2]}
    write_json(tmp_path / "encoder/parts.json", parts)
    write_json(tmp_path / "encoder/results.json", {})
    found, html = make(program, run, tmp_path, encoders={"base": str(tmp_path / "encoder")})
    drawn = dict(re.findall('<figure[^>]*aria-label="([^"]+)">(.*?)</figure>', html, re.DOTALL))
    rules = found["without_the_picture"]["l2c_world_vqa"]
    best = rules["best rule without the picture"]
    assert found["without_the_picture"]["l2c_world_caption"] == {}, "graded answers have no rule"
    expected = {
        "Caption separability": "chance: 0.1",
        "Retrieval R@1 of each tower": "chance: 0.1",
        "Tasks of the encoders": "chance: 2.8",
        "Score of each VLM": f"best rule without the picture: {best['']:.1f}",
        "By type of question": f"best rule without the picture: {best['colour_of_shape']:.1f}",
    }
    assert set(drawn) == set(expected)
    for title, what in expected.items():
        assert f'title="{what}" style="left:' in drawn[title], title
    assert "base: 41.5 [40.1, 43.2]" in drawn["Tasks of the encoders"], "mean IoU has no interval"


@pytest.mark.parametrize(
    ("limit", "documents", "words"), [(10, 40, " (first 10 only)"), (40, 40, "")]
)
def test_a_cut_task_says_so(tmp_path: Path, limit: int, documents: int, words: str) -> None:
    root = write_run(tmp_path)
    file = root / "eval/llm2clip-s0/l2c_world_caption.json"
    more = {"limit": limit, "documents": documents}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    titles = dict(measured_in(file.parent))
    assert titles["l2c_world_caption"].title == "World captions" + words
    assert titles["l2c_world_vqa"].title == "World VQA"


def test_whether_a_model_looks_is_shown(program: ModuleType, tmp_path: Path) -> None:
    root = write_run(tmp_path)
    assert "Does it look" not in make(program, root, tmp_path / "a")[1]
    looked = {"score": 41.25, "delta": 12.5, "ci": [8.0, 17.0], "p": 0.0004}
    for task, found in (("l2c_world_vqa", looked), ("l2c_world_caption", {"score": 3.0})):
        file = root / f"eval/llm2clip-s0/{task}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"other_pictures": found}))
    page = make(program, root, tmp_path / "b")[1]
    assert "Does it look" in page and "+12.5 [+8.0, +17.0], p = 0.0004" in page
    assert "41.2" in page and "no interval" in page


def test_rules_without_the_picture() -> None:
    def ask(question: str, target: str, count: int) -> list[dict[str, Any]]:
        sample = {"question": question, "target": target, "type": question[0], "correct": 0.0}
        return [sample] * count

    often = ask("a1", "Yes", 15) + ask("a1", "no", 5) + ask("a2", "no", 18) + ask("a2", "yes", 2)
    rarely = ask("b1", "red", 1) + ask("b2", "red", 1) + ask("b3", "blue", 1)
    found = guesses([*often, *rarely])
    assert found["one answer always"] == pytest.approx({"": 2300 / 43, "a": 57.5, "b": 0})
    best = found["best rule without the picture"]
    assert best == pytest.approx({"": 3500 / 43, "a": 82.5, "b": 200 / 3})
    assert guesses([*often, {**often[0], "correct": 0.5}]) == {}


def test_other_tasks_of_encoders_are_shown_where_they_were_run(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    whole = {"results": {"parts": {"miou": 41.5}, "names": {"top1": 75.0, "chance_top1": 5.0}}}
    write_json(folder / "results.json", {"results": {"parts": {"miou": 1.5}, "lost": {"ap": 2.0}}})
    for name, result in whole["results"].items():
        write_json(folder / f"{name}.json", result)
    rest = {"type": "", "question": "", "target": "", "answer": ""}
    samples = [{"doc_id": n, "image_id": str(n), "correct": float(n > 0), **rest} for n in range(4)]
    write_lines(folder / "names.samples.jsonl", samples)
    encoders = {"llm2clip": str(folder), "base": str(tmp_path / "nowhere")}
    found, html = make(program, run, tmp_path, encoders=encoders)
    assert found["encoders"] == {"llm2clip": {"names": 75.0, "parts": 41.5}}
    # Not the figures of an earlier evaluation, whose `results.json` is still there.
    assert "llm2clip: 75.0 [" in html and "parts, mean IoU" in html and "chance: 5.0" in html
    _, html = make(program, run, tmp_path)
    assert "Other tasks" not in html


def test_each_choice_changes_the_report(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found, html = make(program, run, tmp_path)
    assert found["verdict"] == "above" and next(iter(found["vlm"]["base"])) == "l2c_world_vqa"
    assert "Stage 3: projectors" in html and "Does an LLM" in html
    turned, html = make(
        program,
        run,
        tmp_path,
        seeds=(0, 1),
        headline=["control_long", "llm2clip"],
        headline_task="l2c_world_caption",
        title="<b>Other & title</b>",
        stage3={},
        not_shown=["Nothing about 5 < 6."],
    )
    assert turned["verdict"] == "below" and next(iter(turned["vlm"]["base"])) == "l2c_world_caption"
    assert "Stage 3: projectors" not in html
    assert "<h1>&lt;b&gt;Other &amp; title&lt;/b&gt;</h1>" in html
    assert "<li>Nothing about 5 &lt; 6.</li>" in html
    assert "World captions" in html.split("The answer")[1].split("<section")[0]


def test_seconds_come_from_manifests(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found, _ = make(program, run, tmp_path)
    assert found["seconds"] == {f"stage2-{tower}": 61.0 for tower in RATES}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"headline": ["llm2clip", "other"]}, ["headline", "other"]),
        ({"headline_task": "pope"}, ["headline_task", "pope", "l2c_world_vqa"]),
        (
            {"towers": {"llm2clip": "nowhere"}, "headline": ["llm2clip"] * 2},
            ["nowhere/results.json"],
        ),
        ({"vlms": {"base": {"7": "x"}}}, ["base-s7", "llm2clip-vlm eval"]),
        ({"stage1": "nowhere"}, ["nowhere/results.json", "stage1_text_encoder"]),
        ({"tower_models": {"bse": "x"}}, ["tower_models", "bse"]),
        ({"unknown": 1}, ["unknown"]),
    ],
)
def test_what_is_missing_is_named(
    program: ModuleType,
    run: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    recipe = {**report_recipe(run), "output_dir": str(tmp_path), **changes}
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are matched below)
        program.main([str(write_json(tmp_path / "recipe.yaml", recipe))])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "report.html").exists()


def test_results_of_other_data_are_refused(tmp_path: Path) -> None:
    sample = {"doc_id": 0, "image_id": "0", "question": "q", "target": "a", "type": ""}
    vlms = {"a": [0], "b": [0]}
    for name, spec in (("a-s0", "1"), ("b-s0", "2")):
        write_json(tmp_path / name / "t.json", {"spec_hash": spec, "limit": None})
        write_lines(tmp_path / name / "t.samples.jsonl", [{**sample, "correct": 1.0}])
        write_json(tmp_path / name / "score_gate.json", [])  # no result of a task
    with pytest.raises(ReportError, match="spec_hash differs"):
        read_vlms(tmp_path, vlms)
    write_json(tmp_path / "b-s0/t.json", {"spec_hash": "1", "limit": 10})
    with pytest.raises(ReportError, match="limit differs"):
        read_vlms(tmp_path, vlms)
    write_json(tmp_path / "b-s0/t.json", {"spec_hash": "1", "limit": None})
    assert [run.values("t") for run in read_vlms(tmp_path, vlms)] == [[100.0], [100.0]]
    write_json(tmp_path / "b-s0/u.json", {})
    write_lines(tmp_path / "b-s0/u.samples.jsonl", [{**sample, "correct": 1.0}])
    with pytest.raises(ReportError, match=r"a-s0/u\.json"):
        read_vlms(tmp_path, vlms)


def towers(first: tuple[float, float], second: tuple[float, float]) -> dict[str, Any]:
    found = {"a": retrieval(0)["retrieval"], "b": retrieval(0)["retrieval"]}
    for name, values in (("a", first), ("b", second)):
        for direction, value in zip(("i2t", "t2i"), values, strict=True):
            found[name]["long"][direction] = {"r1": value, "ci": [value - 2, value + 2]}
    return found


@pytest.mark.parametrize(
    ("first", "second", "state", "words"),
    [
        ((60, 61), (30, 31), "above", "Yes, in retrieval: a is above b"),
        ((30, 31), (60, 61), "below", "No: in retrieval a is below b"),
        ((60, 61), (59, 60), "overlapping", "Not shown"),
        ((60, 61), (30, 60), "mixed", "apart in image → text)"),
        ((60, 30), (30, 60), "mixed", "in one direction, below in the other"),
        # Intervals that touch are not apart.
        ((34, 34), (30, 30), "overlapping", "Not shown"),
    ],
)
def test_verdict(first: Any, second: Any, state: str, words: str) -> None:
    found = facts.retrieval_verdict(towers(first, second), ("a", "b"))
    assert found.state == state and words in found.sentence
    assert f"{first[0]:.1f} % against {second[0]:.1f} %" in found.short


def test_wording_seen_in_training_stands_in_the_verdict_too() -> None:
    found, seen = towers((60, 61), (30, 31)), towers((50, 51), (90, 91))
    for name in found:
        found[name]["long_seen"] = seen[name]["long"]
    verdict = facts.retrieval_verdict(found, ("a", "b"))
    assert verdict.state == "above" and "Yes, in retrieval: a is above b" in verdict.sentence
    assert "In wording seen in training a is below b (image → text 50.0 %" in verdict.sentence
    assert "in wording seen in training image → text 50.0 % against 90.0 %" in verdict.short
    assert "seen in training" not in facts.retrieval_verdict(seen, ("a", "b")).sentence


def test_the_vlm_is_never_a_claim_without_the_ab(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    _, one = make(program, run, tmp_path)
    assert "As the eyes of a VLM: not decided by this run" in one
    assert "No A/B over training seeds is at hand." in one
    assert "Another processor gives other figures" in one
    answer = one.split("The answer")[1].split("<section")[0]
    assert "World VQA" not in answer, "a figure of one training stands as an answer"
    _, two = make(program, run, tmp_path, seeds=(0, 1))
    assert "2 trainings each" in two and "rings are seeds" in two
    assert "bootstrap by picture. No p value" in " ".join(one.split())


def texts(svg: str) -> list[str]:
    return [
        "".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag[-4:] == "text"
    ]


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Mark("x", 20.0, (10.0, 30.0)), Mark("y", 40.0, points=[35.0, 45.0])]
    html = drawn_piece(Chart("t", {"g<1>": rows}, 100, {"g<1>": {"chance": 5.0}}))
    assert re.findall('class="bar" style="width:([^;"]+)', html) == ["20.00%", "40.00%"]
    assert 'class="whisker" style="left:10.00%;right:calc(100% - 30.00%)"' in html
    assert re.findall('class="ring" style="left:([^;"]+)', html) == ["35.00%", "45.00%"]
    assert html.count('title="chance: 5.0" style="left:5.00%"') == 2
    assert 'title="x: 20.0 [10.0, 30.0]"' in html and "<h4>g&lt;1&gt;</h4>" in html


def test_a_loss_that_was_no_number_is_left_out_of_its_curve(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    rows = [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": float("nan")}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    recipe = ReportRecipe.model_validate({**report_recipe(run), "stage1": str(tmp_path)})
    (line,) = next(lines for name, lines in program.curves(recipe).items() if "1" in name)
    assert (line.x, line.y) == ((2,), (1.5,))


def test_curves_stand_where_their_axes_say() -> None:
    drawn = Curves("t", [Line("l", [1, 2, 3], [3.0, 2.0, 1.0]), Line("m", [1, 3], [1.0, 1.5], 1)])
    assert drawn.ticks("x") == drawn.ticks("y") == [1.0, 1.5, 2.0, 2.5, 3.0]
    html = drawn_piece(drawn, "curves")
    assert 'd="M46.0 8.0L204.0 107.0L362.0 206.0"' in html and "<title>l: 3.000 → 1.000" in html
    assert {"l", "m", "step", "2.5"} <= set(re.findall(r">([^<>]+)<", html))
    dashes = re.findall(r"stroke-dasharray: ([^\"]+)", html)
    assert dashes[:2] == dashes[2:] and len(set(dashes)) == 2, "a legend of the lines' dashes"
    one = drawn_piece(Curves("t", [Line("", [5], [2.0])]), "curves")
    assert 'class="keys"' not in one and '"M46.0 206.0"' in one
    seeds = [Line("same", [1, 2], [3.0, y]) for y in (1.0, 2.0)]
    assert drawn_piece(Curves("t", seeds), "curves").count("</svg>same</span>") == 1
    long = drawn_piece(Curves("t", [Line("a" * 30 + "b" * 30, [1, 2], [3.0, 2.0])]), "curves")
    assert "a" * 13 + "…" + "b" * 12 in long and "a" * 30 + "b" * 30 in long


def test_arrows_stand_left_and_right_of_zero_and_an_axis_holds_all_marks() -> None:
    rows = {"One": [Mark("x", 2.0, (-1.0, 5.0))], "Two": [Mark("y", -30.0, points=[-41.0])]}
    chart = Chart("t", rows, sides=("b better", "a better"))
    html = drawn_piece(chart)
    for heading, low, high in (("One", -1.0, 5.0), ("Two", -41.0, 0.0)):
        ticks = chart.ticks(heading)
        assert ticks[0] <= low and ticks[-1] >= high and 0.0 in ticks
        zero = 100 * -ticks[0] / (ticks[-1] - ticks[0])
        assert 20 < zero < 80, "no room for an arrow"
        assert f'class="tick zero" style="left:{zero:.2f}%"' in html
        assert f'style="grid-template-columns:{zero:.2f}% 1fr"' in html
    assert html.count("<span>← b better</span><span>a better →</span>") == 2
    for nothing in ([], [Mark("x", 0.0)]):
        assert (
            Chart("t", {"g": nothing}).ticks("g")[0] == 0.0 < Chart("t", {"g": []}).ticks("g")[-1]
        )
        assert Chart("t", {"g": nothing}, sides=("a", "b")).ticks("g")[0] < 0
    bars = [Chart("t", {"g": [Mark("CIDEr", value)]}, 100).ticks("g") for value in (60.0, 115.0)]
    assert bars[0][-1] == 100 and bars[1][-1] >= 115


def test_a_drawing_of_differences_stands_alone() -> None:
    rows = [Mark("x", 2.0, (-1.0, 5.0), points=[0.0, 4.0], note="p 0.5"), Mark("y" * 40, -1.0)]
    sides = ("b better", "a better")
    svg = render("differences.svg", chart=Chart("t", {"One": rows, "Two": rows[:1]}, sides=sides))
    assert {"← b better", "a better →"} <= set(texts(svg)) and texts(svg).count("p 0.5") == 2
    assert "+2.0 [-1.0, +5.0]" in texts(svg) and "-1.0" in texts(svg)
    assert "y" * 13 + "…" + "y" * 12 in texts(svg) and "y" * 40 in svg
    assert "prefers-color-scheme" in svg and "fill: var(--bg)" in svg
    # The arrows stand left and right of zero.
    for left, zero, right in zip(
        re.findall(r'x="([\d.]+)"[^>]*>← b better', svg),
        re.findall(r'<line class="" x1="([\d.]+)"', svg),
        re.findall(r'x="([\d.]+)"[^>]*>a better →', svg),
        strict=True,
    ):
        assert float(zero) - float(left) == float(right) - float(zero) == 6.0


def test_a_large_picture_becomes_a_small_jpeg() -> None:
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    )
    assert data_uri(noise).startswith("data:image/jpeg;base64,") and len(data_uri(noise)) < 60_000
    assert data_uri(noise.resize((32, 32))).startswith("data:image/png;base64,")
    assert len(data_uri(noise, 640)) > 4 * len(data_uri(noise))


def test_durations_are_for_people() -> None:
    assert clock(59.6) == "1 min 00 s" and clock(3) == "3 s"


def test_pictures_are_found_by_id_by_place_or_inside_the_file(tmp_path: Path) -> None:
    import io

    import pyarrow
    import pyarrow.parquet

    world = write_world(tmp_path, 2)
    rows = [json.loads(line) for line in (world / "vqa_test.jsonl").read_text().splitlines()]
    place = len(rows) - 1
    named = {"doc_id": 0, "id": rows[place]["id"], "question": "?"}
    placed = {"doc_id": place, "id": None, "question": rows[place]["question"]}
    wanted = Image.open(world / rows[place]["image"]).convert("RGB").tobytes()
    for sample in (named, placed):
        found = sample_pictures(world / "vqa_test.jsonl", [sample])
        picture = found[sample["doc_id"]]
        assert picture is not None and picture.tobytes() == wanted
    assert sample_pictures(world / "vqa_test.jsonl", [{**placed, "question": "?"}]) == {}
    assert sample_pictures(tmp_path / "none.jsonl", [named]) == sample_pictures(None, []) == {}
    buffer = io.BytesIO()
    Image.open(world / rows[place]["image"]).save(buffer, "PNG")
    table = pyarrow.Table.from_pylist(
        [{"question": "q", "image": {"bytes": buffer.getvalue(), "path": None}}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    sample = {"doc_id": 0, "id": None, "question": "q"}
    picture = sample_pictures(tmp_path / "x.parquet", [sample])[0]
    assert picture is not None and picture.tobytes() == wanted


def test_the_picture_of_another_row_is_not_shown(tmp_path: Path) -> None:
    """The task leaves the first row out; all ask the same."""
    for name, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": "what ?"} for name in range(3)]
    file = tmp_path / "rows.jsonl"
    write_lines(file, rows)
    samples = [
        {"doc_id": n, "id": None, "question": "what ?", "type": str(n), "answer": "a"}
        | {"target": "a", "correct": 1.0}
        | {"image_id": PIXELS + pixel_hash([Image.new("RGB", (8, 8), colour)])}
        for n, colour in enumerate(("lime", "lime"))
    ]
    found = sample_pictures(file, samples)
    assert found[0] is None and found[1] is not None and found[1].getpixel((0, 0)) == (0, 255, 0)
    shown = answered_questions({"a": samples[:1]}, file, 2)
    assert [example.picture for example in shown] == [None]


def test_questions_differ_in_type_and_picture(run: Path) -> None:
    files = {n: run / f"eval/{n}-s0/l2c_world_vqa.samples.jsonl" for n in ("llm2clip", "base")}
    samples = {name: load_samples(file) for name, file in files.items()}
    data = run / "world/seed-0/vqa_test.jsonl"
    found = answered_questions(samples, data, 10)
    assert len(found) == len(KINDS) and len(answered_questions(samples, data, 2)) == 2
    for example in found:
        assert list(example.found) == ["llm2clip", "base"]
        assert all((text == example.expected) == right for text, right in example.found.values())
    changed = [{**sample, "question": "other ?"} for sample in samples["base"]]
    with pytest.raises(ReportError, match="expected the question"):
        answered_questions({**samples, "base": changed}, data, 2)


def test_only_a_full_score_is_right() -> None:
    said = {"a": ("full", 1.0), "b": ("half", 0.5), "c": ("nothing", 0.0), "d": ("open", None)}
    html = drawn_piece([Example(None, "q", "x", said)], "cards")
    marks = re.findall(r'<dt>(\w)</dt><dd class="(\w*)">\w+ <b>(.*?)</b>', html)
    assert marks == [
        ("a", "right", "✓ right"), ("b", "", "score 0.50"), ("c", "wrong", "✗ wrong"), ("d", "", "")
    ]  # fmt: skip


def test_one_photograph_tells_the_story(program: ModuleType, run: Path, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (300, 200), colour) for colour in ("red", "blue")]
    retrieved = [
        Example(p, c, c, {"llm2clip": (f"first of {c}", 1.0), "control_long": ("other", 0.0)})
        for p, c in zip(pictures, ("red caption", "blue caption"), strict=True)
    ]
    sample = {"doc_id": 3, "image_id": PIXELS + pixel_hash(pictures[1:]), "correct": None}
    sample |= {"question": "Say what is there.", "target": "answer"}
    vlms = {"llm2clip": [{**sample, "answer": "the sea"}], "base": [{**sample, "answer": "no"}]}
    none = {name: [{**row[0], "image_id": "x"}] for name, row in vlms.items()}
    assert one_photograph(retrieved, [none]) is None
    both = one_photograph(retrieved, [none, vlms])
    assert both is not None and both[0] is retrieved[1] and both[1].picture is pictures[1]
    assert both[1].expected == "blue caption" and both[1].found["llm2clip"] == ("the sea", None)
    names = ["llm2clip", "control_long"]
    html = " ".join(drawn_piece(both, "story", names).split())
    assert html.count("<img") == 1 and "first of blue caption" in html and "the sea" in html
    assert "Say what is there." in html and html.count("<dd>blue caption</dd>") == 1
    assert "no <b>" not in html
    assert html.count("<b>✓ right") == 1
    # Other pictures: two photographs; without a VLM one.
    two = drawn_piece([retrieved[0], both[1]], "story", names)
    assert two.count("<img") == 2 and "first of red" in two
    assert drawn_piece(retrieved[:1], "story", names).count("<img") == 1


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("a | b", r"a \| b"),
        ("two\nlines", "two lines"),
        ("<script>x</script> p < 0.05", "&lt;script>x&lt;/script> p < 0.05"),
        ("`code` *x* _y_ ~z~ $m$", r"\`code\` \*x\* \_y\_ \~z\~ \$m\$"),
        ("[here](http://x.y) www.z", r"\[here\](http\://x.y) www\.z"),
        ("# head", r"\# head"),
        ("1. item", r"1\. item"),
        ("&lt; a & b", "&amp;lt; a & b"),
        ("l2c_world_vqa, image → text", "l2c_world_vqa, image → text"),
    ],
)
def test_markdown_shows_a_text_as_it_is(said: str, written: str) -> None:
    assert markdown(said) == written


def test_the_caption_ranked_first_is_shown(
    program: ModuleType, run: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import torch

    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.data.image_text.index import read_image_text
    from llm2clip_vlm.data.reading.bad_records import BadRecords
    from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
    from llm2clip_vlm.models.vision.towers import load_vision_tower
    from llm2clip_vlm.recipe.base import ImageTextSource

    world = write_world(tmp_path / "world/seed-0")
    records = read_image_text(ImageTextSource(path=str(world / "pairs_test.jsonl")), BadRecords(0))
    captions = [record.captions["long"][0] for record in records]
    tower = load_vision_tower(str(tiny_clip))
    model = LLM2CLIPModel.from_vision_tower(
        tower.model, text_embed_dim=8, projection_dim=8, adaptor_num_blocks=1
    ).eval()
    model.save_pretrained(tmp_path / "model")
    tower.image_processor.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    cache = EmbeddingCache.build(
        tmp_path / "cache", captions, lambda t: torch.randn(len(t), 8, generator=generator), {}
    )
    models = {"llm2clip": tmp_path / "model", "base": tiny_clip}
    found = retrieved_captions(models, records, "long", 3, cache)
    pixels = tower.image_processor(images=[r.open() for r in records[:3]], return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixels["pixel_values"])
        best = (images @ model.get_text_features(cache.lookup(captions)).T).argmax(1)
    assert [e.found["llm2clip"][0] for e in found] == [captions[i] for i in best]
    for number, example in enumerate(found):
        assert example.expected == captions[number]
        assert all(right == (text == captions[number]) for text, right in example.found.values())
        assert example.found["base"][0] in captions
    with pytest.raises(ReportError, match="cache"):
        retrieved_captions(models, records, "long", 3, None)

    # The whole page, and what `examples`, `cache`, `world` and `tower_models` do in it.
    changes: dict[str, Any] = {
        "data": "Drawn & coloured",
        "photographs": str(tmp_path / "world/seed-0/pairs_test.jsonl"),
        "cache": str(tmp_path / "cache"),
        "tower_models": {
            "llm2clip": str(tmp_path / "model"),
            "base": str(tiny_clip),
            "control_long": str(tiny_clip),
        },
        "examples": 2,
    }
    _, html = make(program, run, tmp_path, **changes)
    assert html.count('<article class="card">') == 4 and html.count("data:image/png") == 6
    assert "Drawn &amp; coloured" in html and html.index("one-picture") < html.index("The question")
    _, html = make(program, run, tmp_path, **{**changes, "examples": 0})
    assert "<article" not in html and "one-picture" not in html


def test_texts_of_others_stay_texts_and_no_socket_is_opened(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions, answers, types and titles with tags, by `report` and by `compare`."""
    import socket

    def refuse(*given: Any) -> None:
        raise AssertionError(f"a socket: {given}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    evil = "<script>alert(1)</script>"
    run = write_run(tmp_path / "run", seeds=(0,))
    for file in run.rglob("*.samples.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        texts = ("question", "answer", "target")
        write_lines(file, [row | {key: evil + row[key] for key in texts} for row in rows])
        result = file.with_name(file.name.replace(".samples.jsonl", ".json"))
        write_json(result, json.loads(result.read_text()) | {"title": evil})
    (tmp_path / "page").mkdir()
    _, page = make(program, run, tmp_path / "page")
    folders = sorted({file.parent for file in run.rglob("*.samples.jsonl")})[:2]
    compare = load_program(Path(__file__).parents[2], "compare")
    names = [f"r{number}={folder}" for number, folder in enumerate(folders)]
    assert compare.main([*names, "--out", str(tmp_path / "compared")]) == 0
    pages = [page, (tmp_path / "compared" / "compare.html").read_text()]
    assert all("<script>alert" not in text and "&lt;script&gt;alert" in text for text in pages)
