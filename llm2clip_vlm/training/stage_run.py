"""Beginning and end of every stage program: recipe, parents, arguments, seed; manifest."""

from __future__ import annotations

import atexit
import json
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import TrainerCallback, TrainingArguments, set_seed

from llm2clip_vlm.constants import MANIFEST_NAME
from llm2clip_vlm.data.conversation.instruction import expand_mixtures
from llm2clip_vlm.data.conversation.token_table import read_instructions, size_px
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.data.reading.records import source_files
from llm2clip_vlm.distributed import await_files, is_main, say, shared_out
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.recipe.base import DataSource, RunRecipe
from llm2clip_vlm.recipe.reading import load_recipe, to_plain, words_of
from llm2clip_vlm.recipe.vlm import InstructionSource
from llm2clip_vlm.remote.addresses import is_remote
from llm2clip_vlm.runs import manifest
from llm2clip_vlm.runs.card import write_card
from llm2clip_vlm.runs.hashes import file_states, hash_json, meaning
from llm2clip_vlm.runs.inputs import reader_of, require_inputs
from llm2clip_vlm.runs.ownership import MARKER_NAME, Hold, foreign
from llm2clip_vlm.training.arguments import build_training_arguments
from llm2clip_vlm.training.callbacks import GracefulStop, MetricsJsonl
from llm2clip_vlm.training.checkpoints import newest_whole
from llm2clip_vlm.training.step_guard import Watchdog

R = TypeVar("R", bound=RunRecipe)
R2 = TypeVar("R2")

_DURING = frozenset(
    {manifest.RESOLVED_NAME, manifest.PARENTS_NAME}
    | set("checkpoints composed dropped.jsonl failures features measured.json".split())
    | {"metrics.jsonl"}
)
_AT_THE_END = frozenset(
    {MANIFEST_NAME}
    | set("adapter data language_model model results.json sentence_transformers".split())
    | set("text_encoder vision_tower".split())
)

_BEFORE_ANYTHING = {MARKER_NAME, manifest.RESOLVED_NAME, manifest.PARENTS_NAME, "composed"}

_TOWER = "train stage3_projector RECIPE vlm.vision_tower={}/vision_tower"
NEXT = {
    "stage0_mntp": "train stage1_text_encoder RECIPE text_encoder.language_model={}/language_model",
    "stage1_text_encoder": "train stage2a_cache_text RECIPE text_encoder={}/text_encoder",
    "stage2a_cache_text": "train stage2b_vision_encoder RECIPE embedding_cache={}",
    "stage2b_vision_encoder": _TOWER,
    "clip_baseline": _TOWER,
    "stage3_projector": "train stage4_instruction RECIPE checkpoint={}/model",
    "stage4_instruction": "eval --suite SUITE --checkpoint NAME={}/model --output DIR",
}
"""The command that reads what a stage has written."""


class StageRun(Generic[R]):
    """One run of a stage program.

    What the recipe names and is not there is refused at once. Then, in this order:
    :meth:`finished`, :meth:`parent` for each thing that it reads, :meth:`arguments`, the stage's
    own work, and on the main process :meth:`finish`.

    Args:
        argv: Recipe path and `key=value` overrides. None: those of the command line.
        recipe_class: The stage's recipe.
        usage: Text that is printed for `--help`, or where there are no arguments.

    Raises:
        InputsError: Files, folders, models, packages or space are missing; nothing was written.
    """

    args: TrainingArguments | None = None
    """Set by :meth:`arguments`."""

    def __init__(
        self, argv: Sequence[str] | None, recipe_class: type[R], usage: str | None
    ) -> None:
        self._started = time.monotonic()
        words = words_of(argv, usage)
        self._source = words[0]
        self.recipe: R = load_recipe(self._source, recipe_class, words[1:])
        require_inputs(self.recipe, self._source)
        self.stage = str(getattr(self.recipe, "stage", recipe_class.__name__))
        self.out = Path(self.recipe.output_dir)
        self.parents: dict[str, str] = {}
        """Parents by the names that the manifest gives them."""
        watchdog = Watchdog(self.recipe.hang_timeout_s)
        self.callbacks: list[TrainerCallback] = [
            *(_Progress(self), watchdog, GracefulStop(self._release))
        ]
        """Callbacks for the trainer, before its others."""
        self._hold: Hold | None = None
        self.data: dict[str, dict[str, Any]] = {}
        """States of the data when they were read, some of the pictures too."""

    def finished(self, *files: str) -> bool:
        """Whether the output is there already, made from this recipe and these parents.

        Args:
            files: Files that must be there, too.
        """
        done = all((self.out / name).is_file() for name in files)
        done = done and manifest.is_complete(self.out, self.recipe)
        if done:
            say(f"{self.stage}: {self.out} is finished, nothing to do")
        return done

    def parent(self, name: str, path: str, *stages: str) -> dict[str, Any] | None:
        """Verify something that the stage reads, before the output directory is claimed.

        Args:
            name: What the manifest calls it.
            path: Directory, file, pattern or hub id.
            stages: Stages that may have written it. None: any.

        Returns:
            Its manifest, if a stage of this project wrote it.

        Raises:
            HandoffError: Another stage wrote it, its files were changed, or the run would write
                over it.
        """
        if Path(path).resolve().is_relative_to(self.out.resolve()):
            raise manifest.HandoffError(
                f"{name}: {path} lies in output_dir, where the run would write over it; choose "
                "another output_dir"
            )
        self.parents[name] = path
        return manifest.verify_parent(path, *stages)

    def arguments(self, **forced: Any) -> TrainingArguments:
        """Claim the output directory, and seed.

        Args:
            **forced: Trainer arguments that the stage fixes.

        Raises:
            HandoffError: The directory holds a run with another recipe, or from other parents or
                data.
            OwnershipError: Another run writes there, or files lie there that no run has written.
            RecordError: A data file is not there.
        """
        steps, *held_out = (
            getattr(self.recipe, name, None)
            for name in ("evaluation_steps", "evaluation", "zero_shot")
        )
        if steps and any(held_out):
            forced |= {"eval_strategy": "steps", "eval_steps": steps}
        elif not any(held_out):
            forced |= {"eval_strategy": "no"}  # there is nothing that it would measure
        self.args = build_training_arguments(self.recipe, **forced)
        if is_main():
            self.hold()
        self.note_data()
        resumes = self.checkpoint is not None
        if is_main():
            manifest.claim_output_dir(self.recipe)
            self.data = manifest.claim_parents(self.out, self.parents, resumes=resumes)
        set_seed(self.recipe.seed)
        return self.args

    def hold(self, *, shared: bool = False, known: Collection[str] = ()) -> None:
        """Take the output directory for this run alone. Call it on the main process.

        Args:
            shared: Other processes that say so too may write there at the same time.
            known: Names there whose content says that a run has written them.

        Raises:
            OwnershipError: Another run writes there, or files lie there that no run has written.
            HandoffError: What a run left there has been changed since.
        """
        if not (shared or self.out.exists()):  # others may be at work in it
            atexit.register(_leave_nothing, self.out)
        self._hold = Hold(self.out, self.stage, _DURING, alone=True, shared=shared, known=known)
        there = {path.name for path in self.out.iterdir()} & _AT_THE_END
        foreign(self.out, sorted(there - self._hold.names))
        manifest.refuse_changed_outputs(self.out)

    def claim_outputs(self) -> None:
        """Begin to write what the run leaves: from here on it is not what its manifest says.

        Training does so at its end; what leaves something without it calls this before.
        """
        if self._hold is not None:
            self._hold.claim(_AT_THE_END)
            (self.out / MANIFEST_NAME).unlink(missing_ok=True)

    def note_data(self) -> None:
        """Take the recipe's data files for parents.

        Raises:
            RecordError: One is not there, or no conversation in it can be used.
        """
        for name, sources in self.recipe:
            for number, source in enumerate(sources if isinstance(sources, list) else ()):
                if not isinstance(source, DataSource):
                    continue
                listed: Sequence[DataSource] = [source]
                if isinstance(source, InstructionSource):
                    listed = expand_mixtures([source])
                files = [str(file) for each in listed for file in source_files(each)]
                for each in listed:
                    if isinstance(each, InstructionSource):
                        _require_record(each)
                if source.path:
                    self.parents[f"{name}.{number}"] = source.path
                    files = [each.path for each in listed if each.path != source.path]
                self.parents |= {f"{name}.{number}.{n}": file for n, file in enumerate(files)}

    @cached_property
    def checkpoint(self) -> str | None:
        """Checkpoint that the trainer resumes from, as rank 0 found it. None: a fresh run."""
        if self.args is None:
            return None
        folder = str(self.args.output_dir)
        (found,) = shared_out([None], lambda _: newest_whole(folder))
        if found is not None:
            await_files(found)
        return found

    @cached_property
    def bad(self) -> BadRecords:
        """Takes what cannot be used, in `dropped.jsonl`. Ask for it first on all ranks."""
        recipe = self.recipe
        resumes = self.checkpoint is not None
        return BadRecords.beside(
            self.out, recipe.max_bad_records, recipe.max_bad_fraction, resumes=resumes
        )

    def measured(self, name: str, measure: Callable[[], R2], of: Any = None) -> R2:
        """Measure, and keep the result in `measured.json`: a killed run does not measure it again.

        Call it on all ranks.

        Args:
            name: What the file calls it.
            measure: Returns the result, as JSON; called on all ranks, or on none.
            of: What it depends on beside recipe, data and parents.
        """
        path, known, key = self.out / "measured.json", dict[str, Any](), ""
        if is_main():
            known = read_json(path) if path.is_file() else known
            key = hash_json([meaning(self.recipe), read_json(self.out / manifest.PARENTS_NAME), of])
        row = known.get(name, {})
        kept = row["found"] if row.get("of") == key else None
        (kept,) = shared_out([kept], lambda mine: mine)  # that of the main process
        if kept is None:
            kept = measure()
            if is_main():
                known[name] = {"of": key, "found": kept}
                write_atomically(path, json.dumps(known, indent=2) + "\n")
        return kept

    def finish(
        self,
        fingerprints: Mapping[str, str],
        results: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        """Write `results.json` and, last of all, the manifest. Call it on the main process.

        Args:
            fingerprints: Hashes that the next stage compares.
            results: What was measured. None: no such file.
            **extra: Anything else worth keeping, such as `pairs`.
        """
        self.claim_outputs()
        if results is not None:
            write_atomically(self.out / "results.json", json.dumps(results, indent=2) + "\n")
        for part in sorted(self.out.iterdir()):
            if part.name in _AT_THE_END and part.is_dir():
                write_card(
                    part,
                    f"train {self.stage}",
                    parents=self.parents,
                    versions=manifest.versions(),
                    recipe=to_plain(self.recipe),
                    results=results,
                )
        say(f"{self.stage}: {self.bad.summary()}; wrote {self.out}")
        if command := NEXT.get(self.stage):
            recipe = reader_of(command.split()[1], self._source) or "RECIPE"
            command = command.format(shlex.quote(str(self.out)))
            say(f"next: llm2clip-vlm {command.replace('RECIPE', shlex.quote(recipe), 1)}")
        manifest.write_manifest(
            self.out,
            stage=self.stage,
            recipe=self.recipe,
            parents={**self.parents, **self.data},
            fingerprints=fingerprints,
            seconds=time.monotonic() - self._started,
            extra={"bad_records": self.bad.count, **extra},
        )
        self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()


def _require_record(source: InstructionSource) -> None:
    """Look for one usable conversation, before minutes are spent on the models."""
    bad = Refused()
    if source.dataset or is_remote(source.path):
        return
    for record in read_instructions(source, bad):
        try:
            for image in record.images:
                size_px(source.folder, image, source.follow_links)
            return
        except ImageError as error:
            bad.add(record.key, str(error))
    raise RecordError(f"{source.title}: no usable record; the first is {bad.first}")


def _leave_nothing(folder: Path) -> None:
    """Remove the output directory that this process made, where the run came to nothing."""
    if not folder.is_dir():
        return
    content = {file.name for file in folder.iterdir() if file.is_dir() or file.stat().st_size}
    if content <= _BEFORE_ANYTHING:  # and empty files, such as a list of no bad records
        shutil.rmtree(folder)


class _Progress(MetricsJsonl):
    """Log of the run, which also claims its outputs before they change."""

    def __init__(self, run: StageRun[Any]) -> None:
        super().__init__(run.out / "metrics.jsonl")
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what comes, and take the manifest away: the directory is no longer finished."""
        if state.is_world_process_zero:
            (self.path.parent / MANIFEST_NAME).unlink(missing_ok=True)
            dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
            if pictures := file_states(getattr(dataset, "some_pictures", list)()):
                self._run.data["pictures"] = {"path": min(pictures), "pictures": pictures}
            batch = self._run.recipe.global_batch_size
            say(
                f"train: from step {state.global_step} to {state.max_steps}, {batch} samples a step"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Claim the outputs: the weights are exported next."""
        self._run.claim_outputs()
