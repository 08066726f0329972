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

import sys
from collections.abc import Sequence
from pathlib import Path

from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import is_main
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.recipe.vlm import Stage3Recipe
from llm2clip_vlm.runs.manifest import fingerprint_dir
from llm2clip_vlm.runs.ownership import foreign, remove, unsigned
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.vlm.vlm_run import compose_once, train_vlm

TOWER_STAGES = ("stage2b_vision_encoder", "clip_baseline")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    run = StageRun(argv, Stage3Recipe, __doc__)
    if run.finished():
        return
    vlm, composed = run.recipe.vlm, run.out / "composed"
    run.parent("vision_tower", vlm.vision_tower, *TOWER_STAGES)
    run.parent("language_model", vlm.language_model, "base_language_model")
    made_of = {n: fingerprint_dir(p) for n, p in run.parents.items() if Path(p).is_dir()}
    if vlm.projector is not None:
        run.parent("projector", vlm.projector, "stage3_projector", "stage4_instruction")
    args = run.arguments()
    if run.checkpoint is None and is_main() and composed.is_dir():
        foreign(composed, unsigned(composed))
        remove(composed)  # of a run that was killed early, maybe with other parents

    model, processor = compose_once(
        lambda: build_vlm(**vlm.model_dump(), seed=run.recipe.seed), composed, args
    )
    train_vlm(run, model, processor, base=composed, fingerprints=made_of, plain=run.recipe.plain)


if __name__ == "__main__":
    sys.exit(guard(main))
