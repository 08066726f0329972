"""Stage 3: a new projector learns to feed a language model with a tower's patch features.

Purpose: LLaVA-1.5's feature alignment (2310.03744 section 4, table 9 left): image, caption,
    loss on the caption; tower and language model are frozen.
Needs: a vision tower (stage 2b's `vision_tower/`, or any CLIP), a causal language model,
    LLaVA JSON.
Writes: `<output_dir>/model` (a `LlavaForConditionalGeneration` directory), `metrics.jsonl`,
    `recipe.resolved.yaml`, `manifest.json`.

    python stages/stage3_projector.py RECIPE.yaml key=value ...
    accelerate launch --config_file recipes/accelerate/zero2.yaml
        stages/stage3_projector.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from llm2clip_vlm.chat_template import check_chat_template
from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_vlm import Stage3Recipe
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main, teardown
from llm2clip_vlm.handoff import fingerprint_dir, is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.models.vlm import build_vlm
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.trainers import (
    VlmTrainer,
    build_vlm_data,
    compose_once,
    prepare_trainable,
)

STAGE = "stage3_projector"
TOWER_STAGES = ("stage2b_vision_encoder", "clip_baseline", "ladder_tower")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage.

    Args:
        argv: Recipe path and `key=value` overrides; none = the command line's.
    """
    # recipe, arguments, seed
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, Stage3Recipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    parents = {
        "vision_tower": recipe.vlm.vision_tower,
        "language_model": recipe.vlm.language_model,
    }
    verify_parent(parents["vision_tower"], expect_stage=TOWER_STAGES)
    verify_parent(parents["language_model"], expect_stage="base_language_model")

    arguments = build_training_arguments(recipe)
    if recipe.world is not None:
        with arguments.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    # model, trainable
    model, processor = compose_once(
        lambda: build_vlm(**recipe.vlm.model_dump(), seed=recipe.seed), out / "composed", arguments
    )
    check_chat_template(processor)
    rates = prepare_trainable(model, recipe)

    # data
    bad = BadRecords(recipe.max_bad_records)
    samples, dataset, collator = build_vlm_data(recipe, processor, bad, plain=recipe.plain)
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
        shutil.rmtree(out / "composed", ignore_errors=True)
        print(f"{STAGE}: wrote {out / 'model'}; {trainer.summary(result)}")
        write_manifest(
            out,
            stage=STAGE,
            recipe=recipe,
            parents=parents,
            fingerprints={
                name: fingerprint_dir(path) for name, path in parents.items() if Path(path).is_dir()
            },
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, **trainer.summary(result)},
        )
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
