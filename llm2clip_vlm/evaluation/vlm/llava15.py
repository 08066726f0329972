"""Prompts and parsers of LLaVA-1.5's evaluation scripts, where lmms-eval's tasks differ.

Suites name these functions in a task's `overrides`, as
`"!function llm2clip_vlm.evaluation.vlm.llava15.pope_results"`; lmms-eval calls them as it calls its
own. What still differs from the paper is listed under the suite's `deviations`.

Paper: arXiv 2310.03744; LLaVA `llava/eval/*.py`, `scripts/convert_*.py`, `docs/Evaluation.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]
Kwargs = Mapping[str, Any] | None


def plain_text(doc: Doc, kwargs: Kwargs = None) -> str:
    """The question in its original case (lmms-eval changes it), then what must follow it.

    With `ocr: true` the document's OCR tokens stand between them, as in LLaVA's TextVQA file.
    """
    kwargs = kwargs or {}
    tokens = f"\nReference OCR token: {', '.join(doc['ocr_tokens'])}" if kwargs.get("ocr") else ""
    return f"{kwargs.get('pre_prompt', '')}{doc['question']}{tokens}{kwargs.get('post_prompt', '')}"


def mmbench_text(doc: Doc, kwargs: Kwargs = None) -> str:
    """MMBench's hint, question and options, each on its line (`model_vqa_mmbench.py`)."""
    lines = [] if _is_none(doc.get("hint")) else [str(doc["hint"])]
    lines.append(str(doc["question"]))
    for letter in "ABCD":
        if _is_none(doc.get(letter)):
            break
        lines.append(f"{letter}. {doc[letter]}")
    return "\n".join(lines) + str((kwargs or {}).get("post_prompt", ""))


def _is_none(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or (isinstance(value, str) and value.lower() in ("nan", "none"))


def pope_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """No where the first sentence has the word no or not, else yes (`eval_pope.py`)."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    words = results[0].split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "not", "no"} & set(words) else "yes"
    clear = said == "no" or "yes" in map(str.lower, words)
    return {**pope_process_results(doc, [said]), "unparsable": float(not clear)}


def mme_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Yes or no within the first four letters (MME's `calculation.py`)."""
    from lmms_eval.tasks.mme.utils import mme_process_results

    start = results[0].lower().strip()[:4]
    said = next((word for word in ("yes", "no") if word in start), "other")
    return {**mme_process_results(doc, [said]), "unparsable": float(said == "other")}


def scienceqa_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """A letter, `A. ...`, or `The answer is A` (`eval_science_qa.py`; `A.` is taken, too)."""
    text = results[0].strip()
    letters = "ABCDE"[: len(doc["choices"])]
    if re.match(r"[A-E](\.? *$|\. )", text):
        said = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z])(?:.|$)", text)
        said = found[0] if len(found) == 1 else ""
    known = said != "" and said in letters
    right = known and letters.index(said) == doc["answer"]
    return {"exact_match": float(right), "unparsable": float(not known)}


def seedbench_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The letter and nothing else (`convert_seed_for_submission.py`)."""
    text = results[0].strip()
    known = text in ("A", "B", "C", "D")
    row = {"pred": text if known else "-", "answer": doc["answer"]}
    row["question_id"] = doc["question_id"]
    found = {f"seed_{doc['data_type']}": row, "seed_all": row}
    return {**found, "unparsable": float(not known)}


def gqa_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Equal in lower case without full stops at the end (`convert_gqa_for_eval.py`)."""
    return {"exact_match": float(results[0].strip().rstrip(".").lower() == doc["answer"])}


def vqav2_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """VQA accuracy of the answer as LLaVA submits it (`convert_vqav2_for_submission.py`)."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    return vqav2_process_results_val(doc, [EvalAIAnswerProcessor()(results[0])])
