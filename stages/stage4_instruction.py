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
from functools import partial

from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import say
from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.models.vlm.building import load_vlm
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm import vlm_run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    # recipe, parents, arguments, seed
    run = StageRun(argv, Stage4Recipe, __doc__)
    if run.finished():
        return
    recipe, base = run.recipe, run.recipe.checkpoint
    parent = run.parent("checkpoint", base, "stage3_projector", run.stage)
    args = run.arguments(**vlm_run.EXACT_LOSS)

    # model
    say(f"model: loads {base}")
    prepare = partial(vlm_run.prepare_processor, recipe)
    model, processor = load_vlm(
        base, load_in_4bit=recipe.load_in_4bit, device=args.device, check=prepare
    )
    prepare(processor)

    # trainable
    parts = vlm_run.prepare_trainable(model, recipe)
    dtype = set_precision(model, args)

    # data
    fitting, leak = vlm_run.padded_instead(model, recipe, args)
    data = vlm_run.build_vlm_data(fitting, processor, run.bad, args)

    # trainer, train
    trainer = vlm_run.build_trainer(run, model, processor, data, parts, base, dtype)
    result = trainer.train(resume_from_checkpoint=run.checkpoint)

    # hand off (the metric of a VLM is its score in lmms-eval)
    made_of = dict(parent["fingerprints"]) if parent else {}
    vlm_run.hand_off(run, trainer, result, made_of, padded_because=leak)


if __name__ == "__main__":
    sys.exit(guard(main))
