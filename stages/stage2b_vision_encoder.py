"""Stage 2b: the vision tower learns to agree with the frozen LLM's cached caption embeddings.

Paper: LLM2CLIP v6, section 3.2 (symmetric InfoNCE, text adaptor, gradients through the tower).
Needs: stage 2a's cache (or, with `write_through`, stage 1's text encoder: the cache is then filled
with what is drawn), a CLIP or other vision tower, image-text records.
Writes: `<output_dir>/model/` (LLM2CLIPModel), `vision_tower/` (the plain tower with its image
processor), `results.json` (retrieval), `metrics.jsonl`, `recipe.resolved.yaml`, `manifest.json`.

    python stages/stage2b_vision_encoder.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/stage2b_vision_encoder.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import is_main, say, teardown
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.loading import load_complete
from llm2clip_vlm.models.trainable import apply_trainable, train_last_blocks, trainable_table
from llm2clip_vlm.models.vision.towers import VisionTower, load_vision_tower
from llm2clip_vlm.recipe.encoder import Stage2bRecipe
from llm2clip_vlm.runs.manifest import HandoffError, fingerprint_dir
from llm2clip_vlm.training.adapters import add_lora
from llm2clip_vlm.training.encoder.caption_embeddings import (
    CaptionFeatures,
    TextInLoop,
    encoder_path,
)
from llm2clip_vlm.training.encoder.distillation import (
    prepare_keeping,
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
    run = StageRun(argv, Stage2bRecipe, __doc__)
    recipe, out, in_loop = run.recipe, run.out, run.recipe.text_in_loop
    if run.finished():
        return
    run.parent("vision_tower", recipe.vision_tower, "clip_baseline", "stage2b_vision_encoder")
    heads = recipe.heads_from and run.parent("heads", recipe.heads_from, run.stage)
    if recipe.inherit_text and recipe.inherit_text.clip:
        run.parent("inherit_text", recipe.inherit_text.clip, "clip_baseline")
    if encoder := in_loop.text_encoder if in_loop else recipe.write_through:
        # a cache that fills itself is no parent: it may grow on for another run
        run.parents["text_encoder"] = encoder_path(encoder)
    else:
        run.parents["cache"] = str(recipe.embedding_cache)
    args = run.arguments(dataloader_drop_last=True, neftune_noise_alpha=None)

    # model
    loop = TextInLoop(in_loop, args.device) if in_loop else None
    captions = loop or CaptionFeatures.open(recipe, args, resumes=run.checkpoint is not None)
    say(f"model: {recipe.vision_tower}, to agree with text embeddings of {captions.dim} numbers")
    tower = load_vision_tower(
        recipe.vision_tower, dtype=torch.float32, image_size_px=recipe.image_size_px
    )
    model = around(recipe, tower, captions, heads)
    lora = (
        add_lora(model.vision_tower, recipe.tower_lora, "tower_lora") if recipe.tower_lora else None
    )

    # trainable
    lrs = recipe.rates()
    if loop and in_loop:
        loop.attach(model, args)
        lrs["text_encoder"] = in_loop.learning_rate
    apply_trainable(model, lrs)
    train_last_blocks(model, "vision_tower", recipe.tower_last_blocks)

    # data
    frozen = frozen_tower(recipe, model.vision_tower, tower.image_processor, args.device)
    dataset = training_images(
        recipe,
        tower.image_processor,
        run.bad,
        captions if captions.in_workers else None,
        captions_per_image=recipe.captions_per_image,
        features=frozen,
        first=lambda captioned: captions.require(captioned, ()),
    )
    held_out = HeldOut(recipe, tower.image_processor, run.bad, frozen)
    captions.require(dataset, texts := held_out.texts())
    say(f"data: {len(dataset)} pairs; {len(texts)} texts of held-out images")
    keeping = prepare_keeping(
        recipe,
        model,
        tower.num_prefix_tokens,
        dataset.captions,
        captions.lookup,
        args.device,
        resumes=run.checkpoint is not None,
    )

    # trainer, train
    trainer = EncoderTrainer(
        model,
        args,
        dataset,
        learning_rates=lrs,
        layer_decay=recipe.layer_decay,
        micro_batch_size=recipe.micro_batch_size,
        text_inputs=captions,
        teacher=keeping.teacher,
        flops_per_image=prepare_model(model, dataset, captions, args.device),
        measure=lambda: logged(held_out(*keeping.kept(model).encoders(captions.lookup))),
        callbacks=[*run.callbacks, *captions.callbacks(), *keeping.callbacks],
    )
    say(trainable_table(model, lrs))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    trained = keeping.finish(model, lora)
    if loop:
        loop.merge(model, out / "text_encoder")
    trainer.export(out / "model")

    # evaluate (what was saved, not what is in memory), hand off
    saved = load_complete(LLM2CLIPModel, out / "model").eval().to(args.device)
    require_as_trained(trained, saved, out / "model", frozen)
    results = held_out(*saved.encoders(captions.lookup))
    say(f"evaluate: {logged(results)}")
    captions.finish()
    if is_main():
        tower.image_processor.save_pretrained(out / "model")
        exported = export_vision_tower(saved, tower.image_processor, out / "vision_tower")
        require_as_exported(saved, exported)
        made = {f"text_encoder.{name}": value for name, value in captions.fingerprints.items()}
        run.finish(made | {"vision_tower": fingerprint_dir(exported)}, results, pairs=len(dataset))
    teardown()


def around(recipe: Stage2bRecipe, tower: VisionTower, captions: Any, before: Any) -> LLM2CLIPModel:
    """Build the model around a tower, with new heads or those of `heads_from`.

    Args:
        recipe: The stage's recipe.
        tower: The tower.
        captions: Gives the text embeddings.
        before: Manifest of `heads_from`, where it has one.

    Raises:
        HandoffError: `heads_from` was trained against another text encoder.
        ValueError: Its heads have other shapes.
    """
    model = LLM2CLIPModel.from_vision_tower(tower.model, **recipe.heads(captions.dim))
    if recipe.heads_from is None:
        return model
    texts = before["fingerprints"] if before else {}
    for name, value in captions.fingerprints.items():
        if (was := texts.get(f"text_encoder.{name}", value)) != value:
            raise HandoffError(
                f"heads_from: {recipe.heads_from} was trained against another text encoder ({name} "
                f"{was!s:.16}, this run's is {value!s:.16}); train it again against this one"
            )
    model.take_heads(recipe.heads_from)
    return model


if __name__ == "__main__":
    sys.exit(guard(main))
