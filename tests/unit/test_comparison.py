"""`llm2clip-vlm compare`: the right unit, corrected p values, flips with pictures, costs."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world.files import WorldConfig, ensure_world

from llm2clip_vlm import cli
from llm2clip_vlm.evaluation.report import comparison_pages
from llm2clip_vlm.evaluation.report.comparison import compare
from llm2clip_vlm.evaluation.report.comparison_pages import flip_examples, flipped
from llm2clip_vlm.evaluation.report.inputs import (
    ReportError,
    guesses,
    read_retrieval,
    read_run,
)
from llm2clip_vlm.metrics.segmentation import mean_iou
from llm2clip_vlm.metrics.statistics import holm, mcnemar_exact
from llm2clip_vlm.runs.hashes import file_state
from tests.report_fixtures import load_program, retrieval, write_json, write_lines, write_run
from tests.tiny import build_clip

TASK = "l2c_world_vqa"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1, 2), pictures=12)


def command(out: Path, *words: str) -> dict[str, Any]:
    """Run it; the JSON."""
    assert cli.main(["compare", *words, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def rows(run: Path, name: str, task: str = TASK) -> list[dict[str, Any]]:
    lines = (run / f"eval/{name}/{task}.samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_without_seeds_the_image_is_the_unit(run: Path, tmp_path: Path) -> None:
    a, b = "llm2clip-s0", "base-s0"
    found = command(tmp_path, str(run / f"eval/{a}"), str(run / f"eval/{b}/"))
    row = found["ab"][TASK][f"{a}-{b}"]
    right = [np.array([r["correct"] for r in rows(run, name)]) for name in (a, b)]
    assert row["delta"] == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert row["test"] == "paired sign-flip test over 12 images" and row["n_seeds"] == 1
    assert row["within_seed"][0]["mcnemar_p"] == mcnemar_exact(*right) != row["p"]
    assert row["ci"] == row["within_seed"][0]["ci"]
    assert found["runs"][a]["seeds"] == []


def test_with_seeds_the_seed_is_the_unit_and_holm_runs_over_benchmarks(
    run: Path, tmp_path: Path
) -> None:
    found = command(
        tmp_path,
        f"llm2clip={run}/eval/llm2clip-s{{seed}}",
        f"llm2clip={run}/ab/llm2clip-s{{seed}}",
        f"{run}/eval/base-s{{seed}}",
        f"base={run}/base",
        "--fixed=base",
    )
    pairs = {task: pair["llm2clip-base"] for task, pair in found["ab"].items()}
    row = pairs[TASK]
    by_seed = [
        100 * np.mean([x["correct"] - y["correct"] for x, y in zip(*both, strict=True)])
        for both in ((rows(run, f"llm2clip-s{s}"), rows(run, f"base-s{s}")) for s in (0, 1, 2))
    ]
    assert row["deltas_by_seed"] == pytest.approx(by_seed)
    assert row["p"] == 0.25 and row["test"] == "exact sign-flip test over 3 seeds"
    assert len(row["within_seed"]) == 3 and "within_seed" not in pairs[f"{TASK}:count"]
    # Retrieval of the base tower, which was not trained again, stands beside every seed.
    assert len(pairs["retrieval_long_i2t"]["deltas_by_seed"]) == 3
    tested = {task: pair["p"] for task, pair in pairs.items() if ":" not in task}
    assert {t: pairs[t]["p_holm"] for t in tested} == pytest.approx(holm(tested))
    assert "p_holm" not in pairs[f"{TASK}:count"]
    wins = found["wins"]["llm2clip-base"]
    assert wins["benchmarks"] == 6 == wins["higher"] + wins["lower"]
    assert wins["won"] == wins["lost"] == 0  # three seeds cannot win anything
    assert "no p is below 0.25" in (tmp_path / "compare.md").read_text()


def made(folder: Path, right: Any, **result: Any) -> Path:
    """Results of one checkpoint: a benchmark of one question a picture, or of these samples."""
    samples = [
        {"doc_id": n, "id": None, "image_id": str(n), "question": "q", "type": "", "target": "a"}
        | {"answer": "a", "unparsable": None}
        | (value if isinstance(value, dict) else {"correct": float(value)})
        for n, value in enumerate(right)
    ]
    write_lines(folder / "t.samples.jsonl", samples)
    result = {"task": "t", "checkpoint": {"path": str(folder)}, "seconds": 1.0} | result
    write_json(folder / "t.json", result)
    return folder


def seeds_of(folder: Path, name: str, seeds: Any, rng: np.random.Generator) -> str:
    for seed in seeds:
        made(folder / f"{name}-s{seed}", rng.random(60) < 0.7 + 0.05 * rng.normal())
    return f"{name}={folder}/{name}-s{{seed}}"


def test_several_seeds_against_one_run_give_no_p(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = seeds_of(tmp_path, "a", range(8), rng)
    for place in (made(tmp_path / "b", rng.random(60) < 0.6), tmp_path / "b-s{seed}"):
        if "{seed}" in str(place):
            shutil.copytree(tmp_path / "b", tmp_path / "b-s3")  # its only seed
        row = command(tmp_path / "out", a, f"b={place}")["ab"]["t"]["a-b"]
        assert row["p"] is None is row["ci"] and "p_holm" not in row
        assert "b is one run" in row["test"] and len(row["within_seed"]) == 8
        assert row["delta"] == pytest.approx(np.mean(row["deltas_by_seed"]))
        text = (tmp_path / "out/compare.md").read_text()
        assert "above b on 0 of 1 benchmarks, below on 0" in text and "b is one run" in text
    found = command(tmp_path / "out", a, f"b={tmp_path}/b", "--fixed", "b")["ab"]["t"]["a-b"]
    assert found["p"] is not None and found["test"].endswith("over 8 seeds, b fixed")
    # A model that has a seed was trained, whatever is said.
    found = command(tmp_path / "out", a, f"b={tmp_path}/b-s{{seed}}", "--fixed", "b")
    assert found["ab"]["t"]["a-b"]["p"] is None
    assert cli.main(["compare", a, f"b={tmp_path}/b", "--fixed", "c"]) == 2


@pytest.mark.parametrize("first", [0, 10])
def test_copies_of_one_run_are_no_seeds(tmp_path: Path, first: int) -> None:
    rng = np.random.default_rng(0)
    a, right = seeds_of(tmp_path, "a", range(8), rng), rng.random(60) < 0.2
    for seed in range(8):
        made(tmp_path / f"b-s{first + seed}", right)
    row = command(tmp_path / "out", a, f"b={tmp_path}/b-s{{seed}}")["ab"]["t"]["a-b"]
    assert row["p"] is None is row["ci"] and "p_holm" not in row
    assert "the seeds of b gave the same answers" in row["test"]


def test_seeds_of_the_same_weights_are_no_seeds(tmp_path: Path) -> None:
    """One checkpoint that was evaluated as two seeds: the others differ."""
    rng = np.random.default_rng(0)
    a = seeds_of(tmp_path, "a", range(6), rng)
    for seed in range(6):
        sha256 = str(min(seed, 4)) * 64
        right = np.random.default_rng(min(seed, 4)).random(60) < 0.2
        folder = tmp_path / f"b-s{seed}"
        made(folder, right, checkpoint={"path": str(folder), "sha256": sha256})
    row = command(tmp_path / "out", a, f"b={tmp_path}/b-s{{seed}}")["ab"]["t"]["a-b"]
    assert row["p"] is None is row["ci"]
    assert "the seeds of b are not all of different weights" in row["test"]


def test_seeds_of_one_tower_are_no_seeds(tmp_path: Path) -> None:
    """Results of stage 2 name no weights: its manifest does."""
    for name, seed in itertools.product("ab", range(6)):
        folder = tmp_path / f"{name}-s{seed}"
        write_json(folder / "results.json", retrieval(60.0 if name == "a" else 50.0 + seed))
        weights = {"model": name if name == "a" else f"b{seed}"}
        manifest = {"schema": 1, "stage": "stage2b", "seconds": 1.0, "outputs": weights}
        write_json(folder / "manifest.json", manifest)
    rows = command(tmp_path / "out", *(f"{n}={tmp_path}/{n}-s{{seed}}" for n in "ab"))["ab"]
    for row in (pairs["a-b"] for pairs in rows.values()):
        assert row["p"] is None is row["ci"]
        assert "the seeds of a are not all of different weights" in row["test"]


def test_recall_on_other_pictures_is_refused(tmp_path: Path, capsys: Any) -> None:
    """As many captions, of other pictures: the stages' manifests tell."""
    for name, digest, limit in (
        ("a", "1", None),
        ("b", "1", None),
        ("c", "2", None),
        ("d", "1", 9),
    ):
        write_json(tmp_path / name / "results.json", retrieval(60.0))
        source = {"path": f"{name}.jsonl", "limit": limit, "fields": ["captions"]}
        parents = {"evaluation.0": {"path": "x", "files": {f"{name}.jsonl": [9, 9, digest]}}}
        manifest = {"schema": 1, "seconds": 1.0, "parents": parents}
        write_json(
            tmp_path / name / "manifest.json", manifest | {"recipe": {"evaluation": [source]}}
        )
    places = {name: str(tmp_path / name) for name in "abcd"}
    assert command(tmp_path / "out", places["a"], places["b"])["ab"]
    for other in "cd":
        assert cli.main(["compare", places["a"], places[other]]) == 2
        assert "expected one gallery" in capsys.readouterr().err
        with pytest.raises(ReportError, match=f"{other}: captions: expected as for a"):
            read_retrieval({name: places[name] for name in ("a", other)})
    assert len(read_retrieval({name: places[name] for name in "ab"})) == 2


def test_seeds_that_are_right_everywhere_are_no_copies(tmp_path: Path) -> None:
    b = seeds_of(tmp_path, "b", range(6), np.random.default_rng(0))
    for seed in range(6):
        made(tmp_path / f"a-s{seed}", [True] * 60)
    row = command(tmp_path / "out", f"a={tmp_path}/a-s{{seed}}", b)["ab"]["t"]["a-b"]
    assert row["test"] == "exact sign-flip test over 6 seeds" and row["p"] == 2 / 2**6


def test_seeds_of_a_mean_iou_are_told_from_copies_by_their_counts(tmp_path: Path) -> None:
    rng, there = np.random.default_rng(0), np.full((40, 2), 100)
    for name, seed in itertools.product("ab", range(6)):
        counts = np.stack([rng.binomial(there, 0.8 if name == "a" else 0.5), there, there], 1)
        samples = [{"correct": None, "answer": "", "counts": one} for one in counts.tolist()]
        folder = made(tmp_path / f"{name}-s{seed}", samples)
        found = {"task": "t", "checkpoint": {"path": str(folder)}, "seconds": 1.0}
        found["miou"] = float(mean_iou(counts.sum(0)))
        write_json(folder / "t.json", found)
        write_json(folder / "results.json", {"results": {"t": found | {"miou": 99.0}}})  # stale
    places = [f"{name}={tmp_path}/{name}-s{{seed}}" for name in "ab"]
    found = command(tmp_path / "out", *places)
    row = found["ab"]["t"]["a-b"]
    assert row["test"] == "exact sign-flip test over 6 seeds" and row["p"] == 2 / 2**6
    assert max(found["accuracies"]["b"]["t"]) < 60 < min(found["accuracies"]["a"]["t"]) < 90


def test_results_of_several_weights_are_no_run(tmp_path: Path, capsys: Any) -> None:
    a, b = tmp_path / "a", made(tmp_path / "b", [0, 0, 1])
    for task, sha256 in (("pope", "1" * 64), ("t", "2" * 64)):
        made(a, [1, 0, 1], checkpoint={"path": "runs/stage4/model", "sha256": sha256})
        for end in (".json", ".samples.jsonl"):
            (a / f"t{end}").rename(a / f"{task}{end}")
    assert cli.main(["compare", str(a), str(b)]) == 2
    said = capsys.readouterr().err
    assert f"{a}: expected results of one model" in said
    assert "pope of 111111111111, t of 222222222222" in said
    assert command(tmp_path / "out", str(a), str(b), "--task", "t")["accuracies"]["a"]["t"]
    found = json.loads((a / "t.json").read_text())  # who made it is not known
    write_json(a / "t.json", found | {"checkpoint": {"path": "x"}})
    assert {*command(tmp_path / "out", str(a), str(b))["ab"]} == {"t"}


def test_recall_in_other_galleries_is_refused(tmp_path: Path, capsys: Any) -> None:
    places = []
    for name, gallery in (("a", 100), ("b", 5000)):
        for seed in range(2):
            found = retrieval(60.0 + seed)
            for ways in found["retrieval"].values():
                for way in ways.values():
                    way["gallery"] = way["queries"] = gallery
            write_json(tmp_path / f"{name}-s{seed}/results.json", found)
        places.append(f"{name}={tmp_path}/{name}-s{{seed}}")
    assert cli.main(["compare", *places]) == 2
    said = capsys.readouterr().err
    assert "retrieval_short_i2t: a, b: expected one gallery" in said
    assert "'gallery': 100}" in said and "'gallery': 5000}" in said
    found = command(tmp_path / "out", places[0], f"c={tmp_path}/a-s{{seed}}")
    assert found["runs"]["a"]["seconds"] == {} and len(found["ab"]) == 4


def test_two_pairs_that_are_written_alike_are_refused(tmp_path: Path, capsys: Any) -> None:
    places = [f"{name}={made(tmp_path / name, [1, 0])}" for name in ("x", "x-y", "y-z", "z")]
    assert cli.main(["compare", *places]) == 2
    assert "x-y-z: two pairs are written so; rename one run" in capsys.readouterr().err


def test_seeds_in_common_are_pairs_and_others_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = seeds_of(tmp_path, "a", range(4), rng), seeds_of(tmp_path, "b", range(10, 13), rng)
    found = command(tmp_path / "out", a, b)
    row, one, two = found["ab"]["t"]["a-b"], *(found["accuracies"][n]["t"] for n in "ab")
    delta = np.mean(one) - np.mean(two)
    as_far = [
        abs(np.mean(chosen) - np.mean(np.delete([*one, *two], places))) >= abs(delta) - 1e-9
        for places in map(list, itertools.combinations(range(7), 4))
        for chosen in [np.array([*one, *two])[places]]
    ]
    assert row["p"] == pytest.approx(np.mean(as_far)) and row["delta"] == pytest.approx(delta)
    assert row["deltas_by_seed"] == [] and "within_seed" not in row and row["n_seeds"] == 3
    assert "4 seeds against 3 others" in row["test"] and row["ci"][0] < delta < row["ci"][1]
    assert found["wins"]["a-b"]["least_p"] == pytest.approx(2 / 35)


def test_damaged_and_mixed_results_are_refused(tmp_path: Path, capsys: Any) -> None:
    good = made(tmp_path / "good", [1, 0, 1])
    twice = made(tmp_path / "twice", [{"correct": 1.0}, {"correct": 0.0, "doc_id": 0}])
    nan = made(tmp_path / "nan", [1, float("nan"), 1])
    cent = made(tmp_path / "cent", [1, 30, 1])
    less = made(tmp_path / "less", [1, 0])
    states = {"t.samples.jsonl": [(good / "t.samples.jsonl").stat().st_size, 0, "of others"]}
    others = made(tmp_path / "others", [1, 0, 1], files=states)
    made(tmp_path / "s1", [1, 0, 1])
    cases = [
        ([f"a={good}", f"b={twice}"], "document 0 is there twice"),
        ([f"a={good}", f"b={nan}"], "document 1: expected a score from 0 to 1, got nan"),
        ([f"a={good}", f"b={cent}"], "document 1: expected a score from 0 to 1, got 30"),
        ([f"a={good}", f"b={less}"], "got 3 and 2"),
        ([f"a={good}", f"b={others}"], "t.samples.jsonl: changed since"),
        ([f"a={good}", f"b={good}", f"b={tmp_path}/s{{seed}}"], "and in another place"),
    ]
    for words, message in cases:
        assert cli.main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
    # Seeds of one run that were not evaluated alike are named.
    for seed, limit in ((0, None), (1, 3)):
        made(tmp_path / f"x-s{seed}", [1, 0, 1], spec_hash=str(limit), limit=limit)
        made(tmp_path / f"y-s{seed}", [0, 0, 1], spec_hash=str(limit), limit=limit)
    found = command(tmp_path / "out", f"x={tmp_path}/x-s{{seed}}", f"y={tmp_path}/y-s{{seed}}")
    assert found["ab"]["t"]["x-y"]["differs"] == ["spec_hash", "limit"]


def test_pictures_are_identified_by_their_pixels(tmp_path: Path) -> None:
    right = [{"correct": float(n % 4 == 0)} for n in range(16)]
    hashed = [row | {"image_id": f"pixels:{n // 4}"} for n, row in enumerate(right)]
    new, old = made(tmp_path / "new", hashed), made(tmp_path / "old", right, generation_kwargs={})
    worse = made(tmp_path / "worse", [row | {"correct": 0.0} for row in hashed])
    other = made(tmp_path / "other", [row | {"image_id": "pixels:x"} for row in hashed])
    row = command(tmp_path / "out", f"a={new}", f"b={worse}")["ab"]["t"]["a-b"]
    assert row["test"].endswith("over 4 images") and row["p"] == 2 / 2**4
    # Samples from before pictures were hashed take them from the other side, or say so.
    row = command(tmp_path / "out", f"a={old}", f"b={worse}")["ab"]["t"]["a-b"]
    assert row["test"].endswith("over 4 images") and "pictures_unknown" not in row
    row = command(tmp_path / "out", f"a={old}", f"b={made(tmp_path / 'c', [0] * 16)}")
    assert row["ab"]["t"]["a-b"]["test"].endswith("over 16 images")
    assert "may count as independent" in (tmp_path / "out/compare.md").read_text()
    assert cli.main(["compare", f"a={new}", f"b={other}"]) == 2


def test_turns_of_a_question_are_one_question(tmp_path: Path) -> None:
    """MMBench: right only if each turn is; a question's turns are no questions of their own."""
    rows = [
        {"question_id": str(q), "turn": turn, "image_id": f"pixels:{q // 2}"}
        | {"correct": float(q % 2 == 0 or turn < 1), "answer": "AB"[turn]}
        for turn in (0, 1)
        for q in range(6)
    ]
    rows.append(rows[0] | {"question_id": "9", "turn": 1})  # its first turn was not asked
    found = command(
        tmp_path / "out",
        f"a={made(tmp_path / 'a', rows)}",
        f"b={made(tmp_path / 'b', [row | {'correct': 0.0} for row in rows])}",
    )
    assert found["accuracies"] == {"a": {"t": [50.0]}, "b": {"t": [0.0]}}
    row = found["ab"]["t"]["a-b"]
    assert row["within_seed"][0]["n"] == 6 and row["test"].endswith("over 3 images")
    assert found["flips"]["t"]["a-b"][0]["doc_id"] == 0


def test_what_no_seed_tests_is_no_part_of_the_correction(run: Path, tmp_path: Path) -> None:
    names = ("llm2clip", "base")
    places = [f"{n}={run}/{place}" for n in names for place in (f"eval/{n}-s{{seed}}", n)]
    found = command(tmp_path, *places)  # retrieval of towers that were trained once
    wins = found["wins"]["llm2clip-base"]
    assert (wins["benchmarks"], wins["tested"], wins["n_seeds"]) == (6, 2, 3)
    assert "correction over 2 benchmarks none can" in (tmp_path / "compare.md").read_text()


def test_each_option_does_something(run: Path, tmp_path: Path, capsys: Any) -> None:
    places = [str(run / f"eval/{name}-s0") for name in ("llm2clip", "base", "control_long")]
    whole = command(tmp_path / "a", *places)
    pairs = ["llm2clip-s0-base-s0", "llm2clip-s0-control_long-s0", "base-s0-control_long-s0"]
    assert [*whole["wins"]] == pairs
    few = command(tmp_path / "b", *places[:2], "--task", TASK)
    assert {task.partition(":")[0] for task in few["ab"]} == {TASK}
    assert {*few["ab"]} < {*whole["ab"]}
    assert '<article class="card">' in (tmp_path / "b/compare.html").read_text()
    odd = shutil.copytree(run / "eval/base-s0", tmp_path / "lr=1/base-s0")
    found = command(tmp_path / "c", str(odd), f"x={odd}", "--task", TASK)
    assert [*found["runs"]] == ["base-s0", "x"]
    capsys.readouterr()
    assert cli.main(["compare", places[0], "--task", TASK, places[1]]) == 0
    assert "| World VQA | " in capsys.readouterr().out


def test_flips_are_the_documents_that_differ_and_have_their_pictures(run: Path) -> None:
    a, b = (read_run(n, {f"{run}/eval/{n}-s0": None}) for n in ("llm2clip", "base"))
    right = [
        {r["doc_id"]: r["correct"] for r in rows(run, f"{n}-s0")} for n in ("llm2clip", "base")
    ]
    found = flipped(a, b, TASK)
    assert {f["doc_id"] for f in found} == {d for d in right[0] if right[0][d] != right[1][d]}
    assert all(f["rates"] == [right[0][f["doc_id"]], right[1][f["doc_id"]]] for f in found)
    shown = flip_examples(a, b, TASK, 2)
    assert len(shown) == 2 + min(2, sum(f["better"] == "base" for f in found))
    for example in shown:
        assert example.picture is not None
        assert [right for _, right in example.found.values()] in ([True, False], [False, True])
        assert all((text == example.expected) == right for text, right in example.found.values())
    seeds = [read_run(n, {f"{run}/eval/{n}-s{{seed}}": None}) for n in ("llm2clip", "base")]
    example = flip_examples(*seeds, TASK, 1)[0]
    assert re.search(r"\(right in [23] of 3 seeds\)", example.found["llm2clip"][0])
    best = flipped(*seeds, TASK)[0]["rates"]
    assert abs(best[0] - best[1]) == 1.0
    # Graded answers: half of the score is not right.
    example = flip_examples(*seeds, "l2c_world_caption", 1)[0]
    for text, score in example.found.values():
        assert re.search(r"\(mean score 0\.\d\d over 3 seeds\)", text)
        assert score is not None and 0 < score < 1


def test_scorers_of_the_same_answers_count_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, rate in (("a", 0.75), ("b", 0.55)):
        for task, suffix in (("one", ""), ("two", ""), ("other", "?")):
            made(tmp_path / name, rng.random(60) < rate)
            for end in (".json", ".samples.jsonl"):
                (tmp_path / name / f"t{end}").rename(tmp_path / name / f"{task}{end}")
            lines = tmp_path / name / f"{task}.samples.jsonl"
            found = [json.loads(line) for line in lines.read_text().splitlines()]
            found = [
                r | {"answer": f"{name}{r['doc_id']}", "question": f"q{suffix}"} for r in found
            ]
            write_lines(lines, found[: 50 if task == "two" else 60])
    found = command(tmp_path / "out", f"a={tmp_path}/a", f"b={tmp_path}/b")
    pairs = {task: pair["a-b"] for task, pair in found["ab"].items()}
    assert pairs["two"]["judged_with"] == "one" and "judged_with" not in pairs["other"]
    largest = max(pairs["one"]["p"], pairs["two"]["p"])
    assert pairs["one"]["p"] != pairs["two"]["p"] and {*pairs} == {"one", "two", "other"}
    corrected = holm({"one": largest, "other": pairs["other"]["p"]})
    assert pairs["one"]["p_holm"] == pairs["two"]["p_holm"] == corrected["one"]
    assert pairs["other"]["p_holm"] == corrected["other"]
    wins = found["wins"]["a-b"]
    assert wins["benchmarks"] == wins["tested"] == 2 and wins["higher"] + wins["lower"] <= 2
    assert "two, a-b: judges the same answers as one" in (tmp_path / "out/compare.md").read_text()


def test_markdown_holds_what_data_said_as_text(tmp_path: Path, capsys: Any) -> None:
    odd = "a|b\n# <img src=x> `c` [d](http://e.f)"
    for name in ("x", "y"):
        made(tmp_path / name, [1, 0, 1], title=odd + "\x1b[31m")
    command(tmp_path / "out", f"p|q={tmp_path}/x", f"y={tmp_path}/y")
    text = (tmp_path / "out/compare.md").read_text()
    assert r"| a\|b # &lt;img src=x> \`c\` \[d\](http\://e.f)" in text
    assert "<img" not in text and r"## p\|q minus y" in text
    assert "\x1b" not in capsys.readouterr().out
    for line in text.splitlines():
        if line.startswith("| a"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 9, line


def test_a_task_that_a_run_lacks_is_told_with_the_nearest(run: Path, capsys: Any) -> None:
    """All its results were listed, with every kind of question of every task."""
    words = [f"{n}={run}/eval/{n}-s0" for n in ("llm2clip", "base")]
    assert cli.main(["compare", *words, "--task", f"{TASK}s"]) == 2
    told = capsys.readouterr().err
    assert f"no results of {TASK}s; did you mean `{TASK}`?; has " in told
    assert f"{TASK}:" not in told


def test_scores_stand_beside_what_needs_no_picture(run: Path, tmp_path: Path) -> None:
    words = [f"{n}={run}/eval/{n}-s0" for n in ("llm2clip", "base")]
    found = command(tmp_path, *words, *(f"{n}={run}/{n}" for n in ("llm2clip", "base")))
    best = guesses(rows(run, "llm2clip-s0"))["best rule without the picture"][""]
    html = (tmp_path / "compare.html").read_text()
    chart = html.split('aria-label="Scores"')[1].split("</figure>")[0]
    assert "chance 0.1" in chart and f"best rule without the picture {best:.1f}" in chart
    score = found["accuracies"]["base"][TASK][0]
    assert re.search(
        rf'title="base: {score:.1f} \[\d', chart
    )  # an interval where there is one seed


def test_cost_is_that_of_every_stage_behind_the_checkpoints(run: Path, tmp_path: Path) -> None:
    def stage(name: str, seconds: float, *parents: Path) -> Path:
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        manifest = {"schema": 1, "stage": name.partition("-")[0], "seconds": seconds}
        linked = {str(i): {"path": str(parent)} for i, parent in enumerate(parents)}
        write_json(folder.parent / "manifest.json", {**manifest, "parents": linked})
        return folder

    first = stage("stage1", 5.0)
    for seed in (0, 1):
        place = tmp_path / f"eval/x-s{seed}"
        tuned = stage(f"stage4-{seed}", 2.0, first, tmp_path / "not-here")
        result = json.loads((run / f"eval/base-s{seed}/{TASK}.json").read_text())
        write_json(place / f"{TASK}.json", {**result, "checkpoint": {"path": str(tuned)}})
        write_lines(place / f"{TASK}.samples.jsonl", rows(run, f"base-s{seed}"))
    x = read_run("x", {f"{tmp_path}/eval/x-s{{seed}}": None})
    y = read_run("y", {f"{run}/eval/llm2clip-s{{seed}}": None}, seeds=(1, 0))
    found = compare([x, y], [("x", "y")], 200)
    # Stage 1 is shared by both seeds and is counted once.
    assert found["runs"]["x"]["seconds"] == {"stage1": 5.0, "stage4": 4.0, "evaluation": 2.0}
    assert found["runs"]["y"]["seconds"] == {"evaluation": 4.0}
    assert found["runs"]["y"]["seeds"] == [0, 1]


def test_what_was_not_evaluated_alike_is_said(run: Path, tmp_path: Path) -> None:
    for name, version in (("a", "1"), ("b", "2")):
        result = json.loads((run / f"eval/base-s0/{TASK}.json").read_text())
        other = {"spec_hash": version, "versions": {"torch": version, "pillow": "1"}}
        write_json(tmp_path / name / f"{TASK}.json", {**result, **other})
        write_lines(tmp_path / name / f"{TASK}.samples.jsonl", rows(run, f"base-s{version}"))
    found = command(tmp_path / "out", str(tmp_path / "a"), str(tmp_path / "b"))
    assert found["ab"][TASK]["a-b"]["differs"] == ["spec_hash", "versions.torch"]
    assert "differ: spec_hash, versions.torch" in (tmp_path / "out/compare.html").read_text()


def test_two_encoders_are_compared_item_by_item(
    tmp_path: Path, tiny_clip: Path, repo_root: Path, capsys: Any
) -> None:
    config = WorldConfig(seed=0, dir=str(tmp_path), part="dense")
    world = ensure_world(config, sizes={"dense_train": 12, "dense_test": 6})
    data = {"data": str(world / "labels.jsonl"), "where": {"split": "test"}}
    masks = {"data": str(world), "classes": str(world / "shapes.txt"), "short_side_px": 32}
    tasks = [
        {"task": "zero_shot", "classes": str(world / "objects.txt"), "name": "objects", **data},
        {"task": "retrieval", "benchmark": "records", "fields": ["label"], "name": "pairs", **data},
        {"task": "zero_shot_segmentation", "split": "test", **masks},
    ]
    tasks.append({**tasks[0], "name": "again", "templates": ["the {}"]})
    models = {"a": tiny_clip, "b": build_clip(tmp_path / "model", seed=1)}
    for name, model in models.items():
        values = {"stage": "run_encoder", "output_dir": str(tmp_path / name), "model": str(model)}
        recipe = write_json(tmp_path / f"{name}.yaml", {**values, "bootstrap": 5, "tasks": tasks})
        load_program(repo_root, "run_encoder").main([str(recipe)])
    found = command(tmp_path / "out", str(tmp_path / "a"), str(tmp_path / "b"))
    rows = {task: pairs["a-b"] for task, pairs in found["ab"].items()}
    pairs = {"pairs.label.i2t", "pairs.label.t2i"}
    assert {*rows} == {"objects", "again", "zero_shot_segmentation"} | pairs
    for name in models:
        top1 = json.loads((tmp_path / name / "objects.json").read_text())["top1"]
        pairs = json.loads((tmp_path / name / "pairs.json").read_text())["kinds"]["label"]
        assert found["accuracies"][name]["objects"] == pytest.approx([top1])
        assert found["accuracies"][name]["pairs.label.i2t"] == pytest.approx([pairs["i2t"]["r1"]])
        results = json.loads((tmp_path / name / "results.json").read_text())["results"]
        spent = sum(result["seconds"] for result in results.values())
        assert found["runs"][name]["seconds"] == pytest.approx({"evaluation": spent})
    assert rows["objects"]["test"] == "paired sign-flip test over 6 images"
    masked, mious = rows["zero_shot_segmentation"], [
        found["accuracies"][name]["zero_shot_segmentation"][0] for name in models
    ]  # fmt: skip
    assert masked["p"] is None and "differs" not in rows["objects"]
    assert masked["test"] == "paired bootstrap over 6 images"
    assert masked["delta"] == pytest.approx(mious[0] - mious[1])
    assert masked["ci"][0] <= masked["delta"] <= masked["ci"][1]
    interval = "[{:+.1f}, {:+.1f}]".format(*masked["ci"])
    assert interval in (tmp_path / "out/compare.html").read_text()
    file = tmp_path / "b/zero_shot_segmentation.samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["counts"][2][0] += 1
    write_lines(file, lines)
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert f"{file}: changed since" in capsys.readouterr().err
    result = tmp_path / "b/zero_shot_segmentation.json"
    told = json.loads(result.read_text())
    write_json(result, {**told, "files": {file.name: file_state(file)}})
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "made on different data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/eval/base-s0"], "at least two runs"),
        (["{run}/eval/base-s0", "{run}/eval/none"], "none: no such folder"),
        (["{run}/eval/base-s0", "x={run}/base"], "no benchmark in common"),
        (
            ["a={run}/eval/base-s{seed}", "b={run}/eval/llm2clip-s0", "b={run}/eval/base-s1"],
            "b: l2c",
        ),
        (["a={run}/eval/base-s{seed}", "b={run}/less/base-s{seed}"], r"b has no seed \[1\]"),
        (["{run}/eval/base-s0", "x={run}/other"], "different data"),
        (["{run}/eval/base-s0", "{run}/eval/base-s1", "--task", "pope"], "pope"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    run: Path, capsys: Any, words: list[str], message: str
) -> None:
    for target, seed in (("less/base-s0", 0), ("less/base-s2", 2), ("other", 0)):
        changed = rows(run, f"base-s{seed}")
        if target == "other":
            changed[3]["target"] = "another"
        write_lines(run / target / f"{TASK}.samples.jsonl", changed)
        result = json.loads((run / f"eval/base-s{seed}/{TASK}.json").read_text())
        write_json(run / target / f"{TASK}.json", result)
    assert cli.main(["compare", *(word.replace("{run}", str(run)) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("differs", ["limit", "judge"], "not evaluated alike, these differ: limit, judge"),
        ("pictures_unknown", True, "may count as independent: evaluate again"),
        ("judged_with", "pope", "judges the same answers as POPE, and counts once with it"),
    ],
)
def test_what_sets_a_comparison_apart_is_said(key: str, value: Any, said: str) -> None:
    assert said in comparison_pages._REMARKS[key](value, {"pope": "POPE"})
