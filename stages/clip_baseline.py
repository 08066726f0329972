"""Ordinary CLIP training with its own text tower: the base of the demo, and stage 2's controls.

Paper: LLM2CLIP v6, table "fine-tuned CLIP" (the same images, captions and steps, without the LLM).
Needs: a CLIPModel directory, or a config with a tokenizer, or any vision tower with the config of
a text tower and a tokenizer; image-text records.
Writes: `<output_dir>/model/` (CLIPModel, around another tower a VisionTextDualEncoderModel, with
tokenizer and image processor), `vision_tower/`,
`results.json` (retrieval with its own text tower), `metrics.jsonl`, `manifest.json`.

    python stages/clip_baseline.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/clip_baseline.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from llm2clip_vlm.chat.text_tokens import control_notice
from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import barrier, is_main, say, teardown
from llm2clip_vlm.models.clip import ClipTokens, clip_around_tower, clip_encoders, load_clip
from llm2clip_vlm.models.loading import load_complete
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.trainable import apply_trainable, train_last_blocks, trainable_table
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.encoder import ClipBaselineRecipe
from llm2clip_vlm.runs.manifest import fingerprint_dir
from llm2clip_vlm.training.encoder.distillation import (
    probe_embeds,
    require_as_exported,
    require_as_trained,
)
from llm2clip_vlm.training.encoder.encoder_eval import HeldOut, logged, training_images
from llm2clip_vlm.training.encoder.encoder_trainer import EncoderTrainer, prepare_model
from llm2clip_vlm.training.encoder.frozen_tower import frozen_tower
from llm2clip_vlm.training.export import export_vision_tower
from llm2clip_vlm.training.stage_run import StageRun


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    # recipe, parents, arguments, seed
    run = StageRun(argv, ClipBaselineRecipe, __doc__)
    recipe, out = run.recipe, run.out
    if run.finished():
        return
    if recipe.vision_tower is not None:
        run.parent("vision_tower", recipe.vision_tower, run.stage, "stage2b_vision_encoder")
    else:
        clip = recipe.clip if isinstance(recipe.clip, str) else str(recipe.tokenizer)
        run.parent("clip", clip, run.stage)
    if recipe.tokenizer not in (None, *run.parents.values()):
        run.parents["tokenizer"] = str(recipe.tokenizer)
    args = run.arguments(dataloader_drop_last=True, neftune_noise_alpha=None)

    # model
    say(f"model: starts from {next(iter(run.parents.values()))}, with its own text tower")
    model, tokenizer, image_processor = load_start(recipe)

    # trainable
    lrs = recipe.rates()
    apply_trainable(model, lrs)
    train_last_blocks(model, "vision_model", recipe.tower_last_blocks)

    # data
    frozen = frozen_tower(recipe, model.vision_model, image_processor, args.device)
    tokens = ClipTokens(tokenizer)
    dataset = training_images(recipe, image_processor, run.bad, tokens, features=frozen)
    tokens.prepare(dataset.captions())
    held_out = HeldOut(recipe, image_processor, run.bad, frozen)
    cut = f"{tokens.num_cut} captions fill the window of {tokens.window_tokens} tokens"
    say(f"data: {len(dataset)} pairs; {cut}")
    if notice := control_notice(tokens.control):
        say(notice)

    # trainer, train
    trainer = EncoderTrainer(
        model,
        args,
        dataset,
        learning_rates=lrs,
        flops_per_image=prepare_model(model, dataset, tokens, args.device),
        measure=lambda: logged(held_out(*clip_encoders(model.eval(), tokens))),
        callbacks=run.callbacks,
    )
    say(trainable_table(model, lrs))
    if not recipe.evaluate_only:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    run.claim_outputs()
    trained = probe_embeds(model.eval())
    trainer.export(out / "model")

    # evaluate (what was saved, not what is in memory), hand off
    if is_main():
        save_tokenizer(tokenizer, out / "model")
        image_processor.save_pretrained(out / "model")
    barrier()
    saved = load_complete(type(model), out / "model").eval().to(args.device)
    require_as_trained(trained, saved, out / "model", frozen)
    results = held_out(*clip_encoders(saved, tokens))
    say(f"evaluate: {logged(results)}")
    if is_main():
        exported = export_vision_tower(saved, image_processor, out / "vision_tower")
        require_as_exported(saved, exported)
        run.finish({"vision_tower": fingerprint_dir(exported)}, results, pairs=len(dataset))
    teardown()


def load_start(recipe: ClipBaselineRecipe) -> tuple[Any, Any, Any]:
    """Load the model, tokenizer and image processor that training starts from."""
    if recipe.vision_tower is None:
        return load_clip(recipe.clip or {}, recipe.tokenizer, recipe.text_window_tokens)
    tower = load_vision_tower(
        recipe.vision_tower, dtype=torch.float32, image_size_px=recipe.image_size_px
    )
    model, tokenizer = clip_around_tower(
        tower.model,
        recipe.text_model or {},
        str(recipe.tokenizer),
        projection_dim=recipe.projection_dim,
        logit_scale_init=recipe.logit_scale_init,
    )
    return model, tokenizer, tower.image_processor


if __name__ == "__main__":
    sys.exit(guard(main))
