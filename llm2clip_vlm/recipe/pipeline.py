"""The recipe of a pipeline."""

from __future__ import annotations

from pydantic import Field

from llm2clip_vlm.recipe.base import OutputDir, RecipeFile, Section


class PipelineStep(Section):
    """One program of a pipeline."""

    name: str
    """Unique name; may hold `{variable}` of `for_each`."""
    program: str
    """A program of `stages/` or `eval/` without its ending, such as `stage1_text_encoder`, or
    `llm2clip-vlm` with a command under `arguments`."""
    recipe: str | None = None
    """Recipe that the program reads. None: the program takes options only."""
    overrides: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """`key=value` arguments after the recipe; may hold `{variable}`."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments, as they are; may hold `{variable}`."""
    launch: list[str] = Field(default_factory=list)
    """Launcher before the program, such as `[python, -m, accelerate.commands.launch, --config_file,
    ...]`; empty = plain python."""
    needs: list[str] = Field(default_factory=list)
    """Steps that must be finished first; may hold `{variable}`. A name that ends in `*` stands for
    all steps that begin so."""
    for_each: dict[str, list[str | int]] = Field(default_factory=dict)
    """Variables and their values: the step is run for every combination."""
    all_cores: bool = False
    """Run alone, with every core; otherwise up to `jobs` steps share them."""
    seconds: float | None = Field(default=None, gt=0)
    """What it took on another machine: until it has run here, the time left is guessed from this
    and from how the other steps compare. None: the time left is not known until then."""
    outputs: list[str] = Field(default_factory=list)
    """Files whose presence means that a program without a manifest is finished; empty = it is run
    each time."""


class PipelineRecipe(RecipeFile):
    """Programs in the order of their needs, each skipped where it is finished."""

    output_dir: OutputDir
    """Folder of logs and state."""
    jobs: int = Field(default=2, ge=1)
    """Steps at a time; each gets its share of the cores."""
    grace_s: int = Field(default=580, ge=1)
    """Seconds that steps have from SIGTERM to SIGKILL when the pipeline is stopped or dies: a stage
    saves its checkpoint in them. 580 fits the SLURM lines of `docs/multi-gpu.md`."""
    steps: list[PipelineStep]
    """The programs."""
    common: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Overrides for the recipes of all steps, such as `{variables.data: ${variables.data}}`."""
    next: str | None = None
    """Command to go on with, printed at the end."""
    frozen: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of files by path. A file with another hash is refused before anything runs."""
