"""Ordinary CLIP training with its own text tower: the base of the demo, and stage 2's controls.

Paper: LLM2CLIP v6, table "fine-tuned CLIP" (the same images, captions and steps, without the LLM).
Needs: a CLIPModel directory, or a config with a tokenizer; image-text records.
Writes: `<output_dir>/model/` (CLIPModel, tokenizer, image processor), `vision_tower/`,
`results.json` (retrieval with its own text tower), `metrics.jsonl`, `manifest.json`.

    python stages/clip_baseline.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/clip_baseline.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPModel, set_seed

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_base import ClipBaselineRecipe
from llm2clip_vlm.data.image_text import ImageTextDataset, read_sources
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import barrier, is_main, teardown
from llm2clip_vlm.evaluation.retrieval import retrieval_report
from llm2clip_vlm.handoff import fingerprint_dir, is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.clip import ClipTokens, load_clip
from llm2clip_vlm.models.trainable import apply_trainable, trainable_table
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.encoder_eval import clip_encoders, evaluate_retrieval, read_held_out
from llm2clip_vlm.training.encoder_trainer import EncoderTrainer, check_contrastive_arguments
from llm2clip_vlm.training.export import export_vision_tower


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage.

    Args:
        argv: Recipe path and `key=value` overrides; none = the command line's.
    """
    # recipe, arguments, seed
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, ClipBaselineRecipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{recipe.stage}: {out} is finished, nothing to do")
        return
    args = build_training_arguments(recipe, dataloader_drop_last=True)
    check_contrastive_arguments(args)
    if recipe.world is not None:
        with args.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    # model
    start = recipe.clip if isinstance(recipe.clip, str) else str(recipe.tokenizer)
    verify_parent(start, expect_stage="clip_baseline")
    model, tokenizer, image_processor = load_clip(
        recipe.clip, recipe.tokenizer, recipe.text_window_tokens
    )

    # trainable
    rates = dict(recipe.learning_rates)
    projections = rates.pop("projections", None)
    lrs: dict[str, float] = {str(part): lr for part, lr in rates.items()}
    if projections is not None:
        lrs |= dict.fromkeys(("visual_projection", "text_projection", "logit_scale"), projections)
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
    tokens = ClipTokens(tokenizer)
    dataset = ImageTextDataset(
        records,
        image_processor,
        recipe.caption_weights,
        recipe.seed,
        tokens,
        bad=bad,
        augmentation=recipe.augmentation,
        fast=recipe.image_decoding == "fast",
        as_uint8=True,
        show_progress=is_main(),
    )
    tokens.prepare(dataset.captions())

    # trainer, train
    trainer = EncoderTrainer(
        model,
        args,
        dataset,
        learning_rates=lrs,
        layered_part="vision_model",
        callbacks=[MetricsJsonl(out / "metrics.jsonl")],
    )
    if is_main():
        print(trainable_table(model, lrs), flush=True)
        print(f"{tokens.num_cut} captions fill the window of {tokens.window_tokens} tokens")
    if not recipe.evaluate_only:
        trainer.train(resume_from_checkpoint=last_checkpoint(args))
    trainer.export(out / "model")

    # evaluate (what was saved, not what is in memory), hand off
    if is_main():
        tokenizer.save_pretrained(out / "model")
        image_processor.save_pretrained(out / "model")
        saved = CLIPModel.from_pretrained(out / "model").eval().to(args.device)
        retrieval = evaluate_retrieval(
            held_out, image_processor, *clip_encoders(saved, tokens), retrieval_report, bad=bad
        )
        (out / "results.json").write_text(json.dumps({"retrieval": retrieval}, indent=2) + "\n")
        exported = export_vision_tower(saved, image_processor, out / "vision_tower")
        print(f"{bad.summary()}; results in {out / 'results.json'}", flush=True)
        write_manifest(
            out,
            stage=recipe.stage,
            recipe=recipe,
            parents={"clip": start},
            fingerprints={"vision_tower": fingerprint_dir(exported)},
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, "pairs": len(dataset)},
        )
    barrier()
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
