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

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import is_main, say
from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.recipe.vlm import Stage3Recipe
from llm2clip_vlm.runs.manifest import fingerprint_dir
from llm2clip_vlm.runs.ownership import foreign, remove, unsigned
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm import vlm_run

TOWER_STAGES = ("stage2b_vision_encoder", "clip_baseline")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    # recipe, parents, arguments, seed
    run = StageRun(argv, Stage3Recipe, __doc__)
    if run.finished():
        return
    recipe, composed = run.recipe, run.out / "composed"
    vlm = recipe.vlm
    run.parent("vision_tower", vlm.vision_tower, *TOWER_STAGES)
    run.parent("language_model", vlm.language_model, "base_language_model")
    parents = run.parents.items() if is_main() else ()  # which alone hands them on
    made_of = {n: fingerprint_dir(p) for n, p in parents if Path(p).is_dir()}
    if vlm.projector is not None:
        run.parent("projector", vlm.projector, "stage3_projector", "stage4_instruction")
    if vlm.chat_template is not None and os.path.isfile(vlm.chat_template):
        run.parents["chat_template"] = vlm.chat_template
    args = run.arguments(**vlm_run.EXACT_LOSS)
    if run.checkpoint is None and is_main() and composed.is_dir():
        foreign(composed, unsigned(composed))
        remove(composed)  # left by a run that was killed early, maybe with other parents

    # model
    say(f"model: composes {vlm.vision_tower}, a projector and {vlm.language_model}")
    model, processor = vlm_run.compose_once(
        lambda: vlm_run.tried(*build_vlm(**vlm.model_dump(), seed=recipe.seed), recipe),
        composed,
        args,
        load_in_4bit=recipe.load_in_4bit,
    )

    # trainable
    parts = vlm_run.prepare_trainable(model, recipe)
    dtype = set_precision(model, args)

    # data
    fitting, leak = vlm_run.padded_instead(model, recipe, args)
    data = vlm_run.build_vlm_data(fitting, processor, run.bad, args, plain=recipe.plain)

    # trainer, train
    trainer = vlm_run.build_trainer(run, model, processor, data, parts, composed, dtype)
    result = trainer.train(resume_from_checkpoint=run.checkpoint)

    # hand off (the metric of a VLM is its score in lmms-eval)
    vlm_run.hand_off(run, trainer, result, made_of, padded_because=leak)


if __name__ == "__main__":
    sys.exit(guard(main))
