"""The page of one encoder's evaluation: every task with its interval and chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_vlm.evaluation.report.comparison_pages import score_chart
from llm2clip_vlm.evaluation.report.inputs import Run, measured_in
from llm2clip_vlm.evaluation.report.pages import render


def encoder_page(folder: Path, whole: Mapping[str, Any]) -> str:
    """What `eval/run_encoder.py` found, as HTML.

    Args:
        folder: Where the results and samples of the tasks lie.
        whole: `{model, fingerprints, results: {task: result}}`.
    """
    run = Run("score", [str(folder)])
    for task, measured in measured_in(folder):  # those of another recipe may be there, too
        if task.partition(".")[0] in whole["results"] and ":" not in task:
            run.scores[task] = {None: measured}
    return render("encoder.html", chart_of_tasks=score_chart("Tasks", [run], {}), **whole)
