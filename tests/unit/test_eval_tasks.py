"""Scorers of our own lmms-eval tasks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.evaluation.vlm.task_helpers import (
    doc_to_text,
    doc_to_visual,
    exact_match,
    exact_match_result,
)
from tests.tiny import write_image

TASKS = Path(__file__).resolve().parents[2] / "demo/tasks"

KINDS = [["red", "blue", "green"], ["star", "circle", "ring"], ["plain", "striped", "checked"]]
RED_STAR = ("red", "star", "striped")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, TASKS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def caption() -> ModuleType:
    return load("l2c_world_caption/utils.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a striped red star and a blue circle", [RED_STAR, ("blue", "circle", None)]),
        ("north : striped and crimson , a star .", [RED_STAR]),
        ("the north holds a red star , striped .", [RED_STAR]),
        ("a star that is red and striped and a blue ring", [RED_STAR, ("blue", "ring", None)]),
        ("red star , blue ring", [("red", "star", None), ("blue", "ring", None)]),
        ("A RED STAR. A red star!", [("red", "star", None)] * 2),
        ("a star . red", [(None, "star", None)]),
        ("three things on black", []),
        ("", []),
    ],
)  # fmt: skip
def test_objects_found_in_a_caption(caption: ModuleType, text: str, expected: list) -> None:
    assert caption.find_objects(text, KINDS, {"crimson": "red"}) == expected


def doc(*things: list[str]) -> dict[str, Any]:
    return {
        "attributes": [list(thing) for thing in things],
        "synonyms": {"crimson": "red", "banded": "striped", "absent": None},
        "vocabulary": json.dumps(KINDS),
    }


def test_attribute_f1_counts_objects_and_their_patterns(caption: ModuleType) -> None:
    truth = doc(["red", "star", "striped"], ["blue", "ring", "plain"])

    def score(text: str) -> tuple[float, float]:
        found = caption.process_results(truth, [text])
        return found["attribute_f1"]["score"], found["object_f1"]["score"]

    assert score("a banded crimson star . a plain blue ring .") == (1.0, 1.0)
    # Right objects, no patterns: 2 of 4 units, none invented.
    assert score("a red star . a blue ring .") == (pytest.approx(4 / 6), 1.0)
    # The pattern belongs to another object; colour and shape must match together.
    assert score("a plain red star . a blue ring .")[0] == pytest.approx(2 * 2 / 7)
    assert score("a blue star . a red ring .") == (0.0, 0.0)
    # Saying one thing often does not pay.
    assert score("a red star . " * 4)[1] == pytest.approx(2 / 6)
    assert caption.process_results(truth, ["the sea"])["unparsable"] == 1.0
    items = [caption.process_results(truth, [t])["attribute_f1"] for t in ("a red star", "")]
    assert caption.precision(items) == 1.0 and caption.recall(items) == 1 / 8
    assert caption.f1(items) == pytest.approx(2 / 9)


def test_the_vocabulary_comes_from_all_documents(caption: ModuleType) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"attributes": [["red", "star", "plain"]]}, {"attributes": [["blue", "ring", "x"]]}]
    with_words = caption.process_docs(datasets.Dataset.from_list(rows))
    assert json.loads(with_words[0]["vocabulary"]) == [
        ["blue", "red"],
        ["ring", "star"],
        ["plain", "x"],
    ]


def test_existence_scores() -> None:
    exist = load("l2c_world_exist/utils.py")
    answers = [("yes", "yes"), ("no", "Yes "), ("yes", "no"), ("no", "no"), ("no", "yes.")]
    found = [
        exist.process_results({"answer": true, "category": "popular"}, [said])
        for true, said in answers
    ]
    assert [item["accuracy"] for item in found] == [1, 0, 0, 1, 0]
    assert [item["yes_rate"] for item in found] == [1, 1, 0, 0, 0]
    assert [item["unparsable"] for item in found] == [0, 0, 0, 0, 1]
    items = [item["f1"] for item in found]
    assert (exist.precision(items), exist.recall(items), exist.f1(items)) == (0.5, 0.5, 0.5)
    assert exist.f1(items[3:]) == 0.0 and found[0]["type"] == "popular"


def test_questions_with_yes_and_with_no_are_a_pair_of_mme() -> None:
    datasets = pytest.importorskip("datasets")
    borrowed = load("l2c_world_borrowed/utils.py")
    kinds = ("random", "popular", "popular", "random")  # a category may have no other question
    rows = [{"category": kind, "answer": ("yes", "no")[n % 2]} for n, kind in enumerate(kinds)]
    found = borrowed.mme_docs(datasets.Dataset.from_list(rows))
    assert {*found["category"]} == {"existence"}
    pairs = [*zip(found["question_id"], found["answer"], strict=True)]
    assert pairs == [("0", "yes"), ("0", "no"), ("1", "yes"), ("1", "no")]
    numbered = borrowed.pope_docs(datasets.Dataset.from_list(rows))
    assert numbered["question_id"][:2] == ["0", "1"] and numbered["category"][0] == "random"


def test_prompt_picture_and_exact_match(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "x.png")
    record = {"question": " what ? ", "image": "images/x.png", "answer": "Red"}
    kwargs = {"image_root": str(tmp_path), "pre_prompt": "Q: ", "post_prompt": " A:"}
    assert doc_to_text(record, kwargs) == "Q: what ? A:"
    assert doc_to_visual(record, kwargs)[0].size == (32, 32)
    with pytest.raises(ImageError):
        doc_to_visual({**record, "image": "../x.png"}, kwargs)
    assert exact_match(record, ["  red\n"]) == 1.0
    assert exact_match_result(record, ["red"]) == {"accuracy": 1.0}
    assert exact_match(record, ["red ."]) == 0.0
