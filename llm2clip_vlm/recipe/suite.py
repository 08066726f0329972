"""Suites of lmms-eval tasks, and what they are expected to give."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.recipe.base import RecipeFile, Section


class LmmsTask(Section):
    """One lmms-eval task of a suite."""

    task: str
    """Name of a built-in task, of one under `eval/tasks/`, or below `--tasks DIR`."""
    name: str | None = None
    """Name of its result. None: that of the task. One task twice in a suite needs two names."""
    judge: bool = False
    """Its score comes from another model; see the suite's `judge`."""
    program: str | None = None
    """Program that its scorer starts (`java`); where it is missing, the task is left out, by name.
    Such a metric (CIDEr) is one of all documents together: a single one has no score."""
    data_files: str | None = None
    """Local file (parquet, json, jsonl) that replaces the task's own data set."""
    made_by: str | None = None
    """Command that makes `data_files` of what is published; shown where the file is missing."""
    limit: int | None = Field(default=None, ge=1)
    """First documents only; never written as the task's score without saying so."""
    title: str | None = None
    """Name in reports: a built-in task on other data never carries the benchmark's name alone."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Merged over the task's own YAML (`{lmms_eval_specific_kwargs: {default: {ocr: true}}}`);
    `null` removes a key (`{process_docs: null}`), `"!function llm2clip_vlm.MODULE.NAME"` is a
    function."""
    max_empty: float | None = Field(default=None, ge=0, le=1)
    """Share of empty answers above which no score is written. None: that of the suite."""
    other_pictures: bool = False
    """Ask everything again with the picture of another document, and report the difference: a model
    that answers as well with any picture does not look. Takes twice the time."""


class SuiteRecipe(RecipeFile):
    """A suite of lmms-eval tasks: which, on which data, and how (`eval/suites/*.yaml`)."""

    deviations: dict[str, str] = Field(default_factory=dict)
    """Where and why a task here differs from that of the paper."""
    data_dir: str = "."
    """Folder that `data_files` may name as `${data_dir}`."""
    batch_size: int = Field(default=64, ge=1)
    """Questions a forward pass. In half precision it can flip single answers: recorded."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Upper limit whatever a task asks for."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model; `auto` keeps that of the checkpoint."""
    device: str | None = None
    """Device to run on. None: `cuda` if there is one, else `cpu`."""
    limit: int | None = Field(default=None, ge=1)
    """First documents of every task only, in place of the tasks' own `limit`."""
    max_empty: float = Field(default=0.2, ge=0, le=1)
    """A task with a larger share of empty answers is refused: something is broken."""
    judge: Literal["none", "environment"] = "none"
    """`none`: tasks that need a judge are left out, by name. `environment`: they ask the one that
    lmms-eval finds in `OPENAI_API_KEY`, `OPENAI_API_URL` and `MODEL_VERSION`."""
    tasks: list[LmmsTask] = Field(min_length=1)
    """Tasks, run in this order."""


class ExpectedColumn(Section):
    """One column of a published table, and the results to compare with it."""

    results: list[str] = Field(min_length=1)
    """Names of the suite's results; their mean is compared."""
    metric: str = "exact_match"
    """Metric of lmms-eval."""
    metric_full: float = 1.0
    """Value of the metric for an answer sheet without an error."""
    value_full: float = 100.0
    """The published value for such a sheet."""
    n: int = Field(ge=1)
    """Questions: of them the noise of two runs follows."""
    prompt_has: list[str] = Field(default_factory=list)
    """Text that the published protocol puts into every prompt."""
    prompt_lacks: list[str] = Field(default_factory=list)
    """Text that the published protocol does not put into a prompt."""


class ExpectedScores(Section):
    """A published table (`eval/expected/*.yaml`), to compare results with."""

    base: str | None = None
    """One parent file whose values this file overrides."""
    source: str
    """Publication that prints the numbers."""
    notes: str = ""
    """Notes that a reader must know before comparing."""
    image_processor: str | None = None
    """Class (its first letters) that the published protocol corresponds to."""
    columns: dict[str, ExpectedColumn]
    """Columns by their names in the table."""
    rows: dict[str, dict[str, float]]
    """Rows by model: column to value. A column may be missing."""

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        for row, values in self.rows.items():
            if unknown := sorted(set(values) - set(self.columns)):
                raise ValueError(f"rows.{row}: {unknown} are no columns of {list(self.columns)}")
        return self
