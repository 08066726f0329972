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
from collections.abc import Sequence

from llm2clip_vlm.cli import guard
from llm2clip_vlm.models.vision.image_mode import set_image_aspect_ratio
from llm2clip_vlm.models.vlm.building import load_vlm
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm.vlm_run import train_vlm


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    run = StageRun(argv, Stage4Recipe, __doc__)
    if run.finished():
        return
    recipe = run.recipe
    parent = run.parent("checkpoint", recipe.checkpoint, "stage3_projector", run.stage)
    args = run.arguments()

    model, processor = load_vlm(
        recipe.checkpoint, load_in_4bit=recipe.load_in_4bit, device=args.device
    )
    if recipe.image_aspect_ratio is not None:
        set_image_aspect_ratio(processor, recipe.image_aspect_ratio)
    made_of = dict(parent["fingerprints"]) if parent else {}
    train_vlm(run, model, processor, base=recipe.checkpoint, fingerprints=made_of)


if __name__ == "__main__":
    sys.exit(guard(main))
