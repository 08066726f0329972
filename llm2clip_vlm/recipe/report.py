"""The recipes of the report and the A/B."""

from __future__ import annotations

from pydantic import Field

from llm2clip_vlm.recipe.base import OutputDir, RecipeFile


class ReportRecipe(RecipeFile):
    """Recipe of `eval/report.py`: what it reads and shows. What is not given is `not run`."""

    output_dir: OutputDir
    """Folder of `report.html` and `report.json`."""
    title: str = "Does an LLM's caption embedding make a better vision tower?"
    """Heading: the question."""
    data: str = ""
    """Training and evaluation data, for readers, such as `photographs of Flickr8k`."""
    stage1: str | None = None
    """Stage 1's output directory."""
    cache: str | None = None
    """Stage 2a's output directory; needed to show what an `LLM2CLIPModel` retrieves."""
    towers: dict[str, str] = Field(min_length=1)
    """Output directory of stage 2b or `clip_baseline` (`results.json`) by the tower's name, in the
    order in which they are shown."""
    tower_notes: dict[str, str] = Field(default_factory=dict)
    """Description of each tower, for readers."""
    tower_models: dict[str, str] = Field(default_factory=dict)
    """Model of each tower, where that is not `<towers.NAME>/model`."""
    headline: list[str] = Field(
        default_factory=lambda: ["llm2clip", "control_long"], min_length=2, max_length=2
    )
    """The two towers of the answer: the question is whether the first beats the second."""
    encoders: dict[str, str] = Field(default_factory=dict)
    """Output of `eval/run_encoder.py` by the tower's name; what is not there is not shown."""
    stage3: dict[str, str] = Field(default_factory=dict)
    """Output directory of stage 3 by any label, for its training curve."""
    vlms: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Tower's name to `{"<seed>": stage 4's output directory}`."""
    evaluation: str | None = None
    """Folder of `eval/run_lmms.py`, with a checkpoint `<tower>-s<seed>` for each of `vlms`."""
    headline_task: str = ""
    """lmms-eval task of the answer, needed where VLMs were evaluated; its questions are shown."""
    ab: str | None = None
    """Result of `demo/ab.py` that was committed last."""
    costs: str | None = None
    """JSON of the pipeline: step to seconds, CPU seconds and peak memory; without it the stages'
    manifests are read for their seconds."""
    captions: str = "long"
    """Kind of caption of the answer (a column of the towers' `evaluation`). A kind of the same name
    and `_seen`, in wording that was trained on, stands in the answer, too."""
    photographs: str | None = None
    """Captioned pictures to show retrieval on. None: no pictures are shown."""
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
