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

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import Stage2bRecipe
from llm2clip_vlm.data.image_text import ImageTextDataset, read_sources
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import barrier, is_main, teardown
from llm2clip_vlm.evaluation.retrieval import retrieval_report
from llm2clip_vlm.handoff import fingerprint_dir, is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.models.trainable import apply_trainable, freeze_unused, trainable_table
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.caption_cache import CaptionFeatures
from llm2clip_vlm.training.encoder_eval import evaluate_retrieval, llm2clip_encoders, read_held_out
from llm2clip_vlm.training.encoder_trainer import EncoderTrainer, check_contrastive_arguments
from llm2clip_vlm.training.export import add_lora, export_vision_tower
from llm2clip_vlm.training.keeping import prepare_keeping

TOWER_STAGES = ("clip_baseline", "stage2b_vision_encoder")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage.

    Args:
        argv: Recipe path and `key=value` overrides; none = the command line's.
    """
    # recipe, arguments, seed
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, Stage2bRecipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{recipe.stage}: {out} is finished, nothing to do")
        return
    args = build_training_arguments(recipe, dataloader_drop_last=True)
    check_contrastive_arguments(args, grad_cache=recipe.micro_batch_size is not None)
    if recipe.world is not None:
        with args.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    # model
    verify_parent(recipe.vision_tower, expect_stage=TOWER_STAGES)
    captions = CaptionFeatures.open(recipe.embedding_cache, recipe.write_through, args)
    tower = load_vision_tower(
        recipe.vision_tower, dtype=torch.float32, image_size_px=recipe.image_size_px
    )
    model = LLM2CLIPModel.from_vision_tower(
        tower.model,
        text_embed_dim=captions.dim,
        projection_dim=recipe.projection_dim,
        adaptor_num_blocks=recipe.text_adaptor.num_blocks,
        adaptor_expansion=recipe.text_adaptor.expansion,
        logit_scale_init_value=recipe.logit_scale_init,
        logit_bias_init_value=recipe.logit_bias_init if recipe.loss == "sigmoid" else None,
    )
    lora = add_lora(model.vision_tower, recipe.tower_lora) if recipe.tower_lora else None

    # trainable
    lrs = recipe.learning_rates.model_dump() | {"logit_scale": recipe.learning_rates.text_adaptor}
    if recipe.loss == "sigmoid":
        lrs["logit_bias"] = recipe.learning_rates.text_adaptor
    if recipe.tower_training == "frozen":
        del lrs["vision_tower"]
    apply_trainable(model, lrs)

    # data
    bad = BadRecords.beside(
        out,
        recipe.max_bad_records,
        recipe.max_bad_fraction,
        resumes=last_checkpoint(args) is not None,
    )
    records = read_sources(recipe.train, bad)
    held_out = read_held_out(recipe.evaluation, bad)
    dataset = ImageTextDataset(
        records,
        tower.image_processor,
        recipe.caption_weights,
        recipe.seed,
        captions if captions.complete else None,
        bad=bad,
        captions_per_image=recipe.captions_per_image,
        augmentation=recipe.augmentation,
        fast=recipe.image_decoding == "fast",
        as_uint8=True,
        show_progress=is_main(),
    )
    captions.require(dataset, held_out)
    keeping = prepare_keeping(
        recipe, model, tower.num_prefix_tokens, dataset.captions, captions.lookup, args
    )
    first = [0, 1 % len(dataset)]
    sample = dataset.__getitems__(first) | captions([dataset.caption(i) for i in first])
    freeze_unused(
        model,
        lambda: (
            model(
                dataset.to_float(sample["pixel_values"]), sample["text_features"], return_loss=True
            ).loss
        ),
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
        callbacks=[MetricsJsonl(out / "metrics.jsonl"), *captions.callbacks(), *keeping.callbacks],
    )
    if is_main():
        print(trainable_table(model, lrs), flush=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(args))
    keeping.finish(model, lora)
    trainer.export(out / "model")

    # evaluate (what was saved, not what is in memory), hand off
    if is_main():
        saved = LLM2CLIPModel.from_pretrained(out / "model").eval().to(args.device)
        retrieval = evaluate_retrieval(
            held_out,
            tower.image_processor,
            *llm2clip_encoders(saved, captions.lookup),
            retrieval_report,
            bad=bad,
        )
        captions.finish()
        (out / "results.json").write_text(json.dumps({"retrieval": retrieval}, indent=2) + "\n")
        tower.image_processor.save_pretrained(out / "model")
        exported = export_vision_tower(saved, tower.image_processor, out / "vision_tower")
        print(f"{bad.summary()}; results in {out / 'results.json'}", flush=True)
        write_manifest(
            out,
            stage=recipe.stage,
            recipe=recipe,
            parents={"vision_tower": recipe.vision_tower, **captions.parents},
            fingerprints={"vision_tower": fingerprint_dir(exported), **captions.fingerprints},
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, "pairs": len(dataset)},
        )
    barrier()
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
