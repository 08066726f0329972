"""Two documents for each of 16 built-in lmms-eval tasks, in the schema of its data set.

`PERFECT` is what a perfect model writes, `WRONG` one that is always wrong.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image


def _png(colour: str) -> dict[str, Any]:
    stored = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stored, "PNG")
    return {"bytes": stored.getvalue(), "path": f"{colour}.png"}


RED = _png("red")
_LETTERS = {"A": "red", "B": "blue", "C": "green", "D": "none"}
_TEN = ["red"] * 10


def _vqa(answers: Any) -> dict[str, Any]:
    return {"question": "what colour?", "answers": answers}


ROWS: dict[str, list[dict[str, Any]]] = {
    "mme": [
        {"question_id": "existence/1.png", "image": RED, "category": "existence"}
        | {"question": f"Is it {colour}? Please answer yes or no.", "answer": answer}
        for colour, answer in (("red", "Yes"), ("blue", "No"))
    ],
    "pope": [
        {"id": str(n), "question_id": str(n), "question": "Is it red?", "answer": answer}
        | {"image_source": f"image-{n}", "image": RED, "category": "random"}
        for n, answer in enumerate(("yes", "no"))
    ],
    "pope_random": [
        {"id": str(n), "question_id": str(n), "question": "Is it red?", "answer": answer}
        | {"image_source": f"image-{n}", "image": RED, "category": "random"}
        for n, answer in enumerate(("yes", "no"))
    ],
    "gqa": [
        {"id": str(n), "imageId": str(n), "question": "What colour?", "answer": colour}
        | {"image": RED, "fullAnswer": f"It is {colour}."}
        for n, colour in enumerate(("red", "blue"))
    ],
    "textvqa_val": [
        _vqa(_TEN) | {"question_id": n, "image_id": str(n), "image": RED, "ocr_tokens": ["STOP"]}
        for n in range(2)
    ],
    "vqav2_val": [
        _vqa([{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(10)])
        | {"question_id": n, "image_id": n, "image": RED, "multiple_choice_answer": "red"}
        | {"question_type": "what", "answer_type": "other"}
        for n in range(2)
    ],
    "vizwiz_vqa_val": [
        _vqa(_TEN) | {"question_id": f"VizWiz_val_{n}", "image": RED, "category": "other"}
        for n in range(2)
    ],
    "scienceqa": [
        {"image": image, "question": "Which?", "choices": ["red", "blue"], "answer": n}
        | {"hint": "", "subject": "natural science"}
        for n, image in enumerate((RED, None))
    ],
    "scienceqa_img": [
        {"image": RED, "question": "Which?", "choices": ["red", "blue"], "answer": n}
        | {"hint": "Look.", "subject": "natural science"}
        for n in range(2)
    ],
    "mmbench_en_dev_static": [
        # Two questions of one picture, each asked in two turns.
        {"index": index, "question": "Which?", "hint": hint, "answer": letter, "image": RED}
        | {"category": "colour", "L2-category": "perception", "source": "x", "split": "dev"}
        | _LETTERS
        for index, hint, letter in (
            (0, "nan", "A"),
            (1, "Look.", "B"),
            (1_000_000, "nan", "B"),
            (1_000_001, "Look.", "A"),
        )
    ],
    "l2c_mmbench_cn_dev_static": [
        {"index": n, "question": "哪个?", "hint": "nan", "answer": letter, "image": RED}
        | {"category": "colour", "L2-category": "perception", "source": "x", "split": "dev"}
        | _LETTERS
        for n, letter in enumerate("AB")
    ],
    "seedbench": [
        {"question_id": str(n), "question": "Which?", "image": [RED], "answer": letter}
        | {f"choice_{key.lower()}": text for key, text in _LETTERS.items()}
        | {"data_type": "image", "data_id": str(n), "question_type_id": 1}
        for n, letter in enumerate("AB")
    ],
    "mmmu_val": [
        {"id": f"validation_Art_{n}", "question": "Which is it? <image 1>", "answer": letter}
        | {"options": "['red', 'blue']", "question_type": "multiple-choice", "image_1": RED}
        for n, letter in enumerate("AB")
    ],
    "ai2d": [
        {"question": "Which?", "options": ["red", "blue"], "answer": str(n), "image": RED}
        for n in range(2)
    ],
    "mmvp": [
        {"Index": n + 1, "Question": "Which?", "Options": "(a) red (b) blue", "image": RED}
        | {"Correct Answer": f"({letter})"}
        for n, letter in enumerate("ab")
    ],
    "realworldqa": [
        {"question": "Which?\nA. red\nB. blue", "answer": letter, "image": RED, "image_path": "x"}
        for letter in "AB"
    ],
    "mmstar": [
        {"index": n, "question": "Which? A: red, B: blue", "answer": letter, "image": RED}
        | {"category": "math", "l2_category": "geometry"}
        for n, letter in enumerate("AB")
    ],
    "cv_bench_2d": [
        {"idx": n, "type": "2D", "task": "Count", "image": RED, "question": "Which?"}
        | {"choices": ["red", "blue"], "answer": f"({letter})", "prompt": "Which? (A) red (B) blue"}
        | {"source": "ADE20K"}
        for n, letter in enumerate("AB")
    ],
}
"""By task."""

PERFECT: dict[str, list[str]] = {
    "mme": ["Yes", "No"],
    "pope": ["yes", "no"],
    "pope_random": ["Yes, there is.", "No, there is not."],
    "mmbench_en_dev_static": ["A", "B", "B", "A"],
    "gqa": ["Red", "blue."],
    "textvqa_val": ["red", "red"],
    "vqav2_val": ["red", "red"],
    "vizwiz_vqa_val": ["red", "red"],
}
"""Answers in words; where a task is not named they are `A` and `B`."""

WRONG = {task: ["zebra", "zebra"] for task in PERFECT} | {
    "pope_random": ["No.", "zebra"],
    "mmbench_en_dev_static": ["B", "B", "B", "B"],
}
"""The same; where a task is not named they are `B` and `A` (scorers find letters in any word)."""


JUDGED_ROWS: dict[str, list[dict[str, Any]]] = {
    "mmvet": [
        {"question_id": "v1_0", "question": "What is x?", "answer": "x", "image": RED}
        | {"capability": "ocr"}
    ],
    "llava_in_the_wild": [
        {"question_id": 1, "question": "What is this?", "image": RED, "category": "conv"}
        | {"gpt_answer": "x", "caption": "x", "image_id": "001.jpg"}
    ],
}
"""Documents of tasks that ask a judge: for their prompts alone."""


def write_rows(folder: Path, task: str) -> Path:
    """The task's documents as a parquet file."""
    rows = {**ROWS, **JUDGED_ROWS}[task]
    made: dict[str, Any] = {}
    for name, value in rows[0].items():
        if name.startswith("image") and isinstance(value, dict):
            made[name] = ImageFeature()
        elif name == "image" and isinstance(value, list):
            made[name] = List(ImageFeature())
    guessed = Dataset.from_list([{k: v for k, v in row.items() if k not in made} for row in rows])
    features = Features({**guessed.features, **made})
    file = folder / f"{task}.parquet"
    Dataset.from_list(rows, features=features).to_parquet(str(file))
    return file


def _vqav2(**counts: int) -> list[dict[str, Any]]:
    answers = [text.replace("_", " ") for text, count in counts.items() for _ in range(count)]
    return [{"answer": text, "answer_id": n} for n, text in enumerate(answers)]


ANSWERS: dict[str, list[tuple[str, Any]]] = {
    "pope_random": [
        *((text, "yes") for text in ("Yes", "yes.", "Yes, there is", "YES", "There is one.", "")),
        *(
            (text, "no")
            for text in ("No", "no.", "No, there is not", "There is no dog", "It is not")
        ),
        *((text, "yes") for text in ("No.", "There is not, yes")),
        *((text, "no") for text in ("NO", "Yes. No.", "nothing", "none")),
    ],
    "mme": [
        *((text, "Yes") for text in ("Yes", "yes.", "Yes, it is", " a yes", "y", "It is. Yes")),
        *((text, "No") for text in ("No", "NO.", "not sure", "now", "n", "A. no", "Unknown")),
    ],
    "scienceqa_img": [
        *((text, 0) for text in ("A", "A. red", "The answer is A.", "The answer is A", "A.")),
        *((text, 0) for text in ("a", "(A)", "red", "B", "A, red", "", "Answer: A", "C")),
        ("The answer is A. The answer is B.", 0),
        ("B. The answer is A.", 1),
    ],
    "seedbench": [(text, "A") for text in ("A", " A ", "A.", "A. red", "a", "Apple", "B", "")],
    "gqa": [
        *((text, "red") for text in ("red", "Red", "red.", "Red..", "a red", "red, blue", "blue")),
        ("tshirt", "t-shirt"),
    ],
    "vqav2_val": [
        ("red", _vqav2(red=10)),
        ("Red.", _vqav2(red=10)),
        ("a red", _vqav2(red=10)),
        ("red", _vqav2(red=3, blue=7)),
        ("red", _vqav2(red=1, blue=9)),
        ("two", _vqav2(**{"2": 10})),
        ("green", _vqav2(red=10)),
        ("the man's", _vqav2(**{"man 's": 10})),
    ],
    "textvqa_val_ocr": [
        ("Dakota", ["dakota"] * 2 + ["x"] * 8),
        ("dakota digital", ["Dakota Digital"] * 10),
        ("x.", ["x"] * 10),
        ("y", ["x"] * 10),
    ],
    "vizwiz_vqa_val": [
        ("Unanswerable", ["unanswerable"] * 4 + ["x"] * 6),
        ("unsuitable", ["unanswerable"] * 10),
        ("red", ["red"] * 3 + ["blue"] * 7),
    ],
}
"""Answers and targets, by column; what LLaVA's scripts make of them stands in the test."""
