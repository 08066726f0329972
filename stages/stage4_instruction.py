"""Stage 4: visual instruction tuning of projector and language model (and tower, if asked).

Purpose: LLaVA-1.5's second stage (2310.03744 section 4, table 9 right): conversations in the
    language model's chat template, loss on the answers.
Needs: stage 3's `model/` (or any `LlavaForConditionalGeneration` directory), LLaVA JSON.
Writes: `<output_dir>/model`, `metrics.jsonl`, `recipe.resolved.yaml`, `manifest.json`.

    python stages/stage4_instruction.py RECIPE.yaml key=value ...
    accelerate launch --config_file recipes/accelerate/zero3.yaml
        stages/stage4_instruction.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from llm2clip_vlm.chat_template import check_chat_template
from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_vlm import Stage4Recipe
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main, teardown
from llm2clip_vlm.handoff import is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.models.vlm import load_vlm, set_image_aspect_ratio
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.trainers import VlmTrainer, build_vlm_data, prepare_trainable

STAGE = "stage4_instruction"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage.

    Args:
        argv: Recipe path and `key=value` overrides; none = the command line's.
    """
    # recipe, arguments, seed
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, Stage4Recipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    parent = verify_parent(recipe.checkpoint, expect_stage=("stage3_projector", STAGE))

    arguments = build_training_arguments(recipe)
    if recipe.world is not None:
        with arguments.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    # model, trainable
    model, processor = load_vlm(recipe.checkpoint)
    check_chat_template(processor)
    if recipe.image_aspect_ratio is not None:
        set_image_aspect_ratio(processor, recipe.image_aspect_ratio)
    rates = prepare_trainable(model, recipe)

    # data
    bad = BadRecords(recipe.max_bad_records)
    samples, dataset, collator = build_vlm_data(recipe, processor, bad)
    if is_main():
        print(trainable_table(model, rates))
        print(f"{len(samples)} samples in {len(dataset)} rows; {bad.summary()}; the first:")
        print(samples.preview(processor.tokenizer))

    # trainer, train
    trainer = VlmTrainer(
        model,
        arguments,
        dataset,
        collator,
        processor,
        learning_rates=rates,
        callbacks=[MetricsJsonl(out / "metrics.jsonl")],
    )
    result = trainer.train(resume_from_checkpoint=last_checkpoint(arguments))

    # hand off (the metric of a VLM is its score in lmms-eval)
    trainer.export(out / "model")
    if is_main():
        print(f"{STAGE}: wrote {out / 'model'}; {trainer.summary(result)}")
        write_manifest(
            out,
            stage=STAGE,
            recipe=recipe,
            parents={"checkpoint": recipe.checkpoint},
            fingerprints=dict(parent["fingerprints"]) if parent else {},
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, **trainer.summary(result)},
        )
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
