"""How every stage program begins and ends: recipe, parents, arguments, seed; manifest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import TrainingArguments, set_seed

from llm2clip_vlm.config import RunRecipe
from llm2clip_vlm.data.bad_records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main
from llm2clip_vlm.handoff import (
    HandoffError,
    claim_parents,
    is_complete,
    verify_parent,
    write_manifest,
)
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.checkpoints import newest_whole

R = TypeVar("R", bound=RunRecipe)


class StageRun(Generic[R]):
    """One run of a stage program.

    In this order: :meth:`finished`, :meth:`parent` for each thing that it reads,
    :meth:`arguments`, the stage's own work, and on the main process :meth:`finish`.

    Args:
        argv: Recipe path and `key=value` overrides; none = the command line's.
        recipe_class: The stage's recipe.
        usage: What is printed where there are no words.
    """

    args: TrainingArguments | None = None
    """Set by :meth:`arguments`."""

    def __init__(
        self, argv: Sequence[str] | None, recipe_class: type[R], usage: str | None
    ) -> None:
        self._started = time.monotonic()
        words = list(sys.argv[1:] if argv is None else argv)
        if not words:
            raise SystemExit(usage)
        self.recipe: R = load_recipe(words[0], recipe_class, words[1:])
        self.stage = str(getattr(self.recipe, "stage", recipe_class.__name__))
        self.out = Path(self.recipe.output_dir)
        self.parents: dict[str, str] = {}
        """What the manifest names as parents."""
        self.metrics = MetricsJsonl(self.out / "metrics.jsonl")

    def finished(self, *files: str) -> bool:
        """Whether the output is there already, made from this recipe and these parents.

        Args:
            files: Must be there too.
        """
        done = is_complete(self.out, self.recipe) and all((self.out / n).is_file() for n in files)
        if done and is_main():
            print(f"{self.stage}: {self.out} is finished, nothing to do")
        return done

    def parent(self, name: str, path: str, *stages: str) -> dict[str, Any] | None:
        """Verify something that the stage reads, before the output directory is claimed.

        Args:
            name: What the manifest calls it.
            path: Directory, file, pattern or hub id.
            stages: Those that may have written it; none = any.

        Returns:
            Its manifest, if a stage of this project wrote it.

        Raises:
            HandoffError: Another stage wrote it, its files were changed, or the run would write
                over it.
        """
        if Path(path).resolve().is_relative_to(self.out.resolve()):
            raise HandoffError(
                f"{name}: {path} lies in output_dir, where the run would write over it; choose "
                "another output_dir"
            )
        self.parents[name] = path
        return verify_parent(path, *stages)

    def arguments(self, **forced: Any) -> TrainingArguments:
        """Claim the output directory, write the embedded world if the recipe has one, and seed.

        Args:
            **forced: Trainer arguments that the stage fixes.

        Raises:
            HandoffError: The directory holds a run with another recipe, or from other parents.
        """
        steps, *held_out = (
            getattr(self.recipe, name, None)
            for name in ("evaluation_steps", "evaluation", "zero_shot")
        )
        if steps and any(held_out):
            forced |= {"eval_strategy": "steps", "eval_steps": steps}
        self.args = build_training_arguments(self.recipe, **forced)
        if is_main():
            claim_parents(self.out, self.parents, resumes=self.checkpoint is not None)
        if self.recipe.world is not None:
            with self.args.main_process_first(local=False, desc="writing the world"):
                ensure_world(self.recipe.world)
        set_seed(self.recipe.seed)
        return self.args

    @cached_property
    def checkpoint(self) -> str | None:
        """What the trainer resumes from, as found at the start; none in a fresh run."""
        return None if self.args is None else newest_whole(str(self.args.output_dir))

    @cached_property
    def bad(self) -> BadRecords:
        """Takes what cannot be used, in `dropped.jsonl`. Ask for it first on all ranks."""
        recipe = self.recipe
        resumes = self.checkpoint is not None
        return BadRecords.beside(
            self.out, recipe.max_bad_records, recipe.max_bad_fraction, resumes=resumes
        )

    def finish(
        self,
        fingerprints: Mapping[str, str],
        results: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        """Write `results.json` and, last of all, the manifest. Call it on the main process.

        Args:
            fingerprints: Hashes that the next stage compares.
            results: What was measured; none = no such file.
            **extra: Anything else worth keeping, such as `pairs`.
        """
        if results is not None:
            (self.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{self.stage}: {self.bad.summary()}; wrote {self.out}", flush=True)
        write_manifest(
            self.out,
            stage=self.stage,
            recipe=self.recipe,
            parents=self.parents,
            fingerprints=fingerprints,
            seconds=time.monotonic() - self._started,
            extra={"bad_records": self.bad.count, **extra},
        )
