"""The recipe models of pipelines, evaluation suites, the A/B and the report."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.config import OutputDir, RecipeFile, Section


class LmmsTask(Section):
    """One lmms-eval task of a suite."""

    task: str
    """Name of a built-in task, or of one under `eval/tasks/`."""
    name: str | None = None
    """Name of its result; none = the task's. One task twice in a suite needs two names."""
    judge: bool = False
    """Its score comes from another model; see the suite's `judge`."""
    program: str | None = None
    """Program that its scorer starts (`java`); a task without it is left out, by name."""
    data_files: str | None = None
    """Local file (parquet, json, jsonl) that replaces the task's own data set."""
    limit: int | None = Field(default=None, ge=1)
    """First documents only; never written as the task's score without saying so."""
    title: str | None = None
    """Name in reports: a built-in task on other data never carries the benchmark's name alone."""
    convert: Literal["pope", "mme"] | None = None
    """`data_files` is the world's `exist_test.jsonl`, to be rewritten in the schema that this
    built-in task reads. Such a task needs a `title`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Merged over the task's own YAML (`{lmms_eval_specific_kwargs: {default: {ocr: true}}}`);
    `null` removes a key (`{process_docs: null}`), `"!function llm2clip_vlm.MODULE.NAME"` is a
    function."""
    max_empty: float | None = Field(default=None, ge=0, le=1)
    """Share of empty answers above which no score is written; none = the suite's."""


class SuiteRecipe(RecipeFile):
    """Which lmms-eval tasks are run, on which data, and how (`eval/suites/*.yaml`)."""

    deviations: dict[str, str] = Field(default_factory=dict)
    """Where and why a task here differs from the paper's."""
    data_dir: str = "."
    """Folder that `data_files` may name as `${data_dir}`."""
    batch_size: int = Field(default=64, ge=1)
    """Questions a forward pass. In half precision it can flip single answers: recorded."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Upper limit whatever a task asks for."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` keeps the checkpoint's."""
    device: str | None = None
    """Where to run; none = `cuda` if there is one, else `cpu`."""
    max_empty: float = Field(default=0.2, ge=0, le=1)
    """A task with a larger share of empty answers is refused: something is broken."""
    judge: Literal["none", "environment"] = "none"
    """`none`: tasks that need a judge are left out, by name. `environment`: they ask the one that
    lmms-eval finds in `OPENAI_API_KEY`, `OPENAI_API_URL` and `MODEL_VERSION`."""
    tasks: list[LmmsTask] = Field(min_length=1)
    """In the order in which they are run."""


class ExpectedColumn(Section):
    """One column of a published table, and what of ours it is."""

    results: list[str] = Field(min_length=1)
    """Names of the suite's results; their mean is compared."""
    metric: str = "exact_match"
    """lmms-eval's metric."""
    metric_full: float = 1.0
    """Its value for an answer sheet without an error."""
    value_full: float = 100.0
    """The published value for such a sheet."""
    n: int = Field(ge=1)
    """Questions: of them the noise of two runs follows."""
    prompt_has: list[str] = Field(default_factory=list)
    """Text that the published protocol puts into every prompt."""
    prompt_lacks: list[str] = Field(default_factory=list)
    """Text that it does not."""


class ExpectedScores(Section):
    """A published table (`eval/expected/*.yaml`), to be compared with results of ours."""

    base: str | None = None
    """One parent file whose values this file overrides."""
    source: str
    """Where the numbers are printed."""
    notes: str = ""
    """What a reader must know before comparing."""
    image_processor: str | None = None
    """Class (its first letters) that the published protocol corresponds to."""
    columns: dict[str, ExpectedColumn]
    """By the name that the table gives."""
    rows: dict[str, dict[str, float]]
    """By model: column to value. A column may be missing."""

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        for row, values in self.rows.items():
            if unknown := sorted(set(values) - set(self.columns)):
                raise ValueError(f"rows.{row}: {unknown} are no columns of {list(self.columns)}")
        return self


class PipelineStep(Section):
    """One program of a pipeline."""

    name: str
    """Unique; may hold `{variable}` of `for_each`."""
    program: str
    """A program of `stages/` or `eval/` without its ending, such as `stage1_text_encoder`."""
    recipe: str | None = None
    """Recipe that the program reads; none for programs that take options only."""
    overrides: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """`key=value` arguments after the recipe; may hold `{variable}`."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments, as they are; may hold `{variable}`."""
    launch: list[str] = Field(default_factory=list)
    """Launcher before the program, such as `[accelerate, launch, --config_file, ...]`; empty =
    plain python."""
    needs: list[str] = Field(default_factory=list)
    """Steps that must be finished first; may hold `{variable}`. A name that ends in `*` stands for
    all steps that begin so."""
    for_each: dict[str, list[str | int]] = Field(default_factory=dict)
    """Variables and their values: the step is run for every combination."""
    all_cores: bool = False
    """Run alone, with every core; otherwise up to `jobs` steps share them."""
    outputs: list[str] = Field(default_factory=list)
    """For a program without a manifest: files whose presence means that it is finished; empty = it
    is run each time."""


class PipelineRecipe(RecipeFile):
    """Programs in the order of their needs, each skipped where it is finished."""

    output_dir: OutputDir
    """Where logs and the state go."""
    jobs: int = Field(default=2, ge=1)
    """Steps at a time; each gets its share of the cores."""
    steps: list[PipelineStep]
    """The programs."""
    common: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Overrides for the recipes of all steps, such as `{variables.data: ${variables.data}}`."""
    frozen: dict[str, str] = Field(default_factory=dict)
    """Files that must be these: path to SHA-256. Another file is refused before anything runs."""


class ReportRecipe(RecipeFile):
    """What `eval/report.py` reads, and what it says about it. What is not given is `not run`."""

    output_dir: OutputDir
    """Where `report.html` and `report.json` go."""
    title: str = "Does an LLM's caption embedding make a better vision tower?"
    """Heading: the question."""
    data: str = ""
    """What it was trained and measured on, for readers, such as `photographs of Flickr8k`."""
    stage1: str | None = None
    """Stage 1's output directory."""
    cache: str | None = None
    """Stage 2a's output directory; needed to show what an `LLM2CLIPModel` retrieves."""
    towers: dict[str, str] = Field(min_length=1)
    """Tower's name to the output directory of stage 2b or `clip_baseline` (`results.json`), in the
    order in which they are shown."""
    tower_notes: dict[str, str] = Field(default_factory=dict)
    """Tower's name to what it is, for readers."""
    tower_models: dict[str, str] = Field(default_factory=dict)
    """Tower's name to its model, where that is not `<towers.NAME>/model`."""
    headline: list[str] = Field(
        default_factory=lambda: ["llm2clip", "control_long"], min_length=2, max_length=2
    )
    """The two towers of the answer: the first is asked to beat the second."""
    encoders: dict[str, str] = Field(default_factory=dict)
    """Tower's name to what `eval/run_encoder.py` wrote; what is not there is not shown."""
    stage3: dict[str, str] = Field(default_factory=dict)
    """Any label to a stage 3 output directory, for its training curve."""
    vlms: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Tower's name to `{"<seed>": stage 4's output directory}`."""
    evaluation: str | None = None
    """Folder of `eval/run_lmms.py`, with a checkpoint `<tower>-s<seed>` for each of `vlms`."""
    headline_task: str = ""
    """lmms-eval task of the answer, needed where VLMs were evaluated; its questions are shown."""
    ab: str | None = None
    """The last committed A/B, as `eval/ab.py` writes it."""
    seconds: str | None = None
    """JSON of the pipeline: step to seconds; without it the stages' manifests are asked."""
    costs: str | None = None
    """JSON of the pipeline: step to seconds, CPU seconds and peak memory."""
    captions: str = "long"
    """Kind of caption of the answer (a column of the towers' `evaluation`)."""
    photographs: str | None = None
    """Captioned pictures to show retrieval on; None: none are shown."""
    examples: int = Field(default=6, ge=0)
    """Pictures shown with retrieved captions, and questions shown with answers."""
    not_shown: list[str] = Field(default_factory=list)
    """Sentences for the section *What was not shown*, beside those that follow from the numbers."""

    def order(self) -> list[str]:
        """Towers by rank: the headline's two, then the others."""
        return list(dict.fromkeys([*self.headline, *self.towers]))

    def colour(self, tower: str) -> int:
        """A tower's series in charts."""
        order = self.order()
        return order.index(tower) % 6 if tower in order else 0


class AbRecipe(RecipeFile):
    """What `eval/ab.py` compares: towers over training seeds, the seed as the unit."""

    towers: list[str] = Field(min_length=2)
    """Names, in the order in which they are shown."""
    seeds: list[int] = Field(min_length=2)
    """Training seeds; each reseeds stage 2 and the VLM."""
    pairs: list[list[str]] = Field(min_length=1)
    """Comparisons `[a, b]` (a minus b); the first is the headline."""
    evaluation: str
    """Folder of `eval/run_lmms.py`, with a checkpoint `<tower>-s<seed>` for each VLM."""
    tasks: list[str] = Field(min_length=1)
    """lmms-eval tasks; those with question types are also compared type by type."""
    retrieval: dict[str, str] = Field(default_factory=dict)
    """Tower to its stage 2 output directory, with `{seed}` in it where it was trained again."""
    retrieval_only: list[str] = Field(default_factory=list)
    """Towers for which no VLM was trained: they are compared in retrieval alone."""
    retrieval_kinds: list[str] = Field(default_factory=lambda: ["short", "long"])
    """Kinds of caption of `results.json`; R@1 in both directions is compared."""
    resamples: int = Field(default=10_000, ge=100)
    """Bootstrap draws of the comparison within a seed."""
    data: str = ""
    """What they were trained and measured on, for readers."""
    output: str = "docs/results/ab.json"
    """Where the result goes; the chart lies beside it, as `.svg`."""
    block: str | None = None
    """Key of an earlier `output` below which this result goes; all else there stays as it is, and
    no chart or page is written. None = the result is the whole file."""
    pages: str
    """Folder of the comparison for people and papers (`compare.html`, `compare.md`)."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1] or set(pair) - set(self.towers):
                raise ValueError(f"pairs: expected two names of {self.towers}, got {pair}")
        if set(self.retrieval) - set(self.towers):
            raise ValueError(
                f"retrieval: expected names of {self.towers}, got {sorted(self.retrieval)}"
            )
        if set(self.retrieval_only) - set(self.retrieval):
            raise ValueError(
                f"retrieval_only: expected names of retrieval, got {self.retrieval_only}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each seed once, got {self.seeds}")
        return self
