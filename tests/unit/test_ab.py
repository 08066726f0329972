"""The A/B over seeds: numbers by hand, one unit, no comparison of different things."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from world.results import git_state, rounded

from llm2clip_vlm.files import find_program, load_program
from llm2clip_vlm.runs.ownership import MARKER_NAME, OwnershipError
from tests.report_fixtures import ab_recipe, write_json, write_lines, write_run

HEADLINE = "llm2clip-control_long"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program(find_program("ab"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), seeds=(0, 1, 2), pictures=24)


def make(program: ModuleType, run: Path, out: Path, **changes: Any) -> dict[str, Any]:
    recipe = {**ab_recipe(run), "output": str(out / "ab.json"), **changes}
    assert program.main([str(write_json(out / "recipe.yaml", recipe))]) == 0
    found: dict[str, Any] = json.loads((out / "ab.json").read_text())
    return found


def rates(run: Path, tower: str, kind: str | None = None) -> list[float]:
    found = []
    for seed in (0, 1, 2):
        file = run / f"eval/{tower}-s{seed}/l2c_world_vqa.samples.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        right = [row["correct"] for row in rows if kind in (None, row["type"])]
        found.append(100 * sum(right) / len(right))
    return found


def test_differences_by_hand(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found = make(program, run, tmp_path)
    for task, kind in (("l2c_world_vqa", None), ("l2c_world_vqa:count", "count")):
        a, b = rates(run, "llm2clip", kind), rates(run, "control_long", kind)
        row = found["ab"][task][HEADLINE]
        assert found["accuracies"]["llm2clip"][task] == pytest.approx(a, abs=1e-5)
        assert row["deltas_by_seed"] == pytest.approx(np.subtract(a, b), abs=1e-5)
        assert row["delta"] == pytest.approx(np.mean(a) - np.mean(b), abs=1e-5)
        assert row["ci"][0] < row["delta"] < row["ci"][1] and row["n_seeds"] == 3
    # Three differences of one sign: 2 of 8 sign patterns are as extreme.
    assert found["ab"]["l2c_world_vqa"]["llm2clip-base"]["p"] == 0.25 == found["smallest_p"]


def test_retrieval_is_compared_the_same_way(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found = make(program, run, tmp_path)
    by_seed = [
        json.loads((run / f"ab/llm2clip-s{seed}/results.json").read_text())["retrieval"]["long"]
        for seed in (0, 1, 2)
    ]
    accuracies = found["accuracies"]
    assert accuracies["llm2clip"]["retrieval_long_i2t"] == pytest.approx(
        [r["i2t"]["r1"] for r in by_seed], abs=1e-5
    )
    assert accuracies["base"]["retrieval_long_t2i"] == [5.0]  # not trained again
    assert set(found["ab"]["retrieval_long_t2i"]) == {HEADLINE, "llm2clip-base"}
    assert found["titles"]["retrieval_long_i2t"] == "long, image → text"
    assert "within_seed" not in found["ab"]["retrieval_long_i2t"][HEADLINE]


def test_a_part_goes_into_the_whole(program: ModuleType, run: Path, tmp_path: Path) -> None:
    """Arms that were run again stand beside what was not."""
    whole = make(program, run, tmp_path)
    before = {f: f.read_bytes() for f in (tmp_path / "ab.svg", run / "compared/compare.md")}
    arms = {"pairs": [["llm2clip", "base"]], "towers": ["llm2clip", "base"], "block": "again"}
    arms["retrieval"] = {
        t: p for t, p in ab_recipe(run)["retrieval"].items() if t != "control_long"
    }
    found = make(program, run, tmp_path, **arms, retrieval_only=["llm2clip", "base"])
    again = found.pop("again")
    assert found == whole and all(f.read_bytes() == text for f, text in before.items())
    task = "retrieval_long_i2t"
    assert again["accuracies"]["llm2clip"][task] == whole["accuracies"]["llm2clip"][task]
    assert set(again["ab"][task]) == {"llm2clip-base"} and "l2c_world_vqa" not in again["ab"]


def test_within_seed_is_secondary(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found = make(program, run, tmp_path)["ab"]
    rows = found["l2c_world_vqa"][HEADLINE]["within_seed"]
    assert [row["seed"] for row in rows] == [0, 1, 2] and rows[0]["images"] == 24
    assert 0 < rows[0]["mcnemar_p"] <= 1
    deltas = found["l2c_world_vqa"][HEADLINE]["deltas_by_seed"]
    assert [row["delta"] for row in rows] == pytest.approx(deltas, abs=1e-5)
    graded = found["l2c_world_caption"][HEADLINE]["within_seed"]
    assert graded[0]["mcnemar_p"] is None
    assert "within_seed" not in found["l2c_world_vqa:count"][HEADLINE]


def test_origin_is_recorded_and_files_are_whole(
    program: ModuleType, run: Path, tmp_path: Path, capsys: Any
) -> None:
    found = make(program, run, tmp_path, data="drawn", notes="why")
    assert found["git"]["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["git"]["commit"])
    assert re.match(r"\d{4}-\d\d-\d\dT", found["date"]) and len(found["recipe_hash"]) == 64
    assert found["data"] == "drawn" and found["notes"] == "why"
    origin = found["checkpoints"]["llm2clip-s2"]
    assert origin["sha256"] == hashlib.sha256(b"llm2clip-s2").hexdigest()
    assert origin["spec_hash"]["l2c_world_vqa"] == "s"
    ElementTree.fromstring((tmp_path / "ab.svg").read_text())
    files = [MARKER_NAME, "ab.json", "ab.svg", "recipe.yaml"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    assert str(run) not in (tmp_path / "ab.json").read_text()
    out = capsys.readouterr().out
    assert "llm2clip minus control_long" in out and "no p is below 0.25" in out


def test_numbers_are_cut() -> None:
    assert rounded({"a": [0.12345678, "b"], "c": 3}, 3) == {"a": [0.123, "b"], "c": 3}


def test_without_git_the_commit_is_unknown(monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(Path("docs/results/ab.json")) == {"commit": None, "dirty": None}


def test_each_choice_changes_the_comparison(program: ModuleType, run: Path, tmp_path: Path) -> None:
    found = make(program, run, tmp_path)
    chart = (tmp_path / "ab.svg").read_text()
    few = make(
        program,
        run,
        tmp_path / "few",
        seeds=[2, 0],
        tasks=["l2c_world_caption"],
        pairs=[["control_long", "llm2clip"]],
        retrieval_kinds=["short"],
        resamples=500,
    )
    assert set(few["ab"]) == {
        "l2c_world_caption",
        "retrieval_short_i2t",
        "retrieval_short_t2i",
    }
    whole = found["ab"]["l2c_world_caption"][HEADLINE]
    turned = few["ab"]["l2c_world_caption"]["control_long-llm2clip"]
    assert turned["deltas_by_seed"] == [-whole["deltas_by_seed"][2], -whole["deltas_by_seed"][0]]
    assert turned["within_seed"][0]["ci"][1] != -whole["within_seed"][2]["ci"][0]  # resamples
    assert few["recipe_hash"] != found["recipe_hash"]
    assert "llm2clip minus control_long, 3 training seeds" in chart
    assert "control_long minus llm2clip, 2" in (tmp_path / "few/ab.svg").read_text()
    make(program, run, tmp_path / "few", pages=str(tmp_path / "few/pages"))
    assert "control_long" in (tmp_path / "few/pages/compare.md").read_text()
    no_vlm = make(program, run, tmp_path / "only", retrieval_only=["base"])
    assert all(task.startswith("retrieval_") for task in no_vlm["accuracies"]["base"])
    assert "llm2clip-base" in no_vlm["ab"]["retrieval_long_i2t"]
    assert "llm2clip-base" not in no_vlm["ab"]["l2c_world_vqa"]
    no_retrieval = make(program, run, tmp_path / "none", retrieval={})
    assert not any(task.startswith("retrieval_") for task in no_retrieval["ab"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0, 9]}, "llm2clip-s9|base-s9"),
        ({"tasks": ["pope"]}, "pope"),
        ({"evaluation": "nowhere"}, "nowhere"),
        ({"retrieval_kinds": ["middle"]}, "retrieval_middle_i2t"),
        ({"seeds": [0]}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: expected each seed once"),
        ({"pairs": [["llm2clip", "other"]]}, "pairs: expected two names"),
        ({"pairs": [["base", "base"]]}, "pairs: expected two names"),
        ({"retrieval": {"other": "x"}}, "retrieval: expected names"),
        ({"retrieval_only": ["other"]}, "retrieval_only: expected names"),
        ({"retrieval_only": ["base", "llm2clip", "control_long"]}, "no tower has a VLM"),
    ],
)
def test_bad_recipes(
    program: ModuleType, run: Path, tmp_path: Path, changes: Any, words: str
) -> None:
    recipe = {**ab_recipe(run), "output": str(tmp_path / "ab.json"), **changes}
    with pytest.raises(ValueError, match=words):
        program.main([str(write_json(tmp_path / "recipe.yaml", recipe))])
    assert not (tmp_path / "ab.json").exists()


def test_checkpoints_that_answered_other_questions_are_refused(
    program: ModuleType, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", seeds=(0, 1))
    file = run / "eval/base-s1/l2c_world_vqa.samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [{**row, "target": "other"} for row in rows])
    recipe = write_json(tmp_path / "recipe.yaml", ab_recipe(run, (0, 1)))
    with pytest.raises(ValueError, match="base-s1"):
        program.main([str(recipe)])
    write_lines(file, rows)
    result = run / "eval/base-s1/l2c_world_vqa.json"
    write_json(result, {**json.loads(result.read_text()), "spec_hash": "other"})
    with pytest.raises(ValueError, match="not evaluated alike: spec_hash"):
        program.main([str(recipe)])


def test_what_no_run_has_written_is_not_replaced(
    program: ModuleType, run: Path, tmp_path: Path
) -> None:
    mine = write_json(tmp_path / "ab.json", {"mine": 1})
    with pytest.raises(OwnershipError, match=r"ab\.json"):
        make(program, run, tmp_path)
    assert json.loads(mine.read_text()) == {"mine": 1}


def test_the_committed_result_may_be_made_again(program: ModuleType, repo_root: Path) -> None:
    """`docs/results` is signed, so that `make ab` replaces what a clone brought."""
    signed = json.loads((repo_root / "docs/results" / MARKER_NAME).read_text())
    assert signed == {"holder": None, "names": ["ab.json", "ab.svg"]}


def test_every_field_is_explained(program: ModuleType) -> None:
    assert all(field.description for field in program.AbRecipe.model_fields.values())
