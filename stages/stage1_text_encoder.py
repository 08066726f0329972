"""Stage 1: a decoder LLM becomes a text encoder that tells captions of different images apart.

Paper: LLM2CLIP v6, section 3.1 and appendix C.1 (caption-contrastive fine-tuning with LoRA).
Needs: any Hugging Face decoder LLM, and records with at least two captions of one image each, or
    pairs of texts.
Writes: `<output_dir>/text_encoder/` (merged and bidirectional; what stage 2a reads), `adapter/`
    (the LoRA alone, for the causal base: PEFT does not keep `is_causal`),
    `sentence_transformers/` (the same vectors for `SentenceTransformer(...)`, without this
    package), `results.json` (`cra`: caption retrieval before and after, with its interval),
    `metrics.jsonl`, `recipe.resolved.yaml`, `manifest.json`.

    python stages/stage1_text_encoder.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/stage1_text_encoder.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import Stage1Recipe
from llm2clip_vlm.data.captions import (
    CRA_PROTOCOL,
    CaptionPairs,
    CaptionRecord,
    read_captions,
    retrieval_task,
)
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main, teardown
from llm2clip_vlm.evaluation.retrieval import recall_at_k
from llm2clip_vlm.handoff import is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.embedder_export import export_sentence_transformers
from llm2clip_vlm.training.encoder_trainer import check_contrastive_arguments
from llm2clip_vlm.training.scheduled_eval import ScheduledEvaluation
from llm2clip_vlm.training.text_trainer import CaptionContrastiveTrainer, add_adapter

STAGE = "stage1_text_encoder"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise SystemExit(__doc__)
    recipe = load_recipe(words[0], Stage1Recipe, words[1:])
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    llm = recipe.text_encoder.language_model
    verify_parent(llm, expect_stage=("base_language_model", "stage0_mntp"))

    args = build_training_arguments(
        recipe, dataloader_drop_last=True, ddp_find_unused_parameters=False
    )
    check_contrastive_arguments(args, grad_cache=recipe.micro_batch_tokens is not None)
    if recipe.world is not None:
        with args.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    encoder = TextEncoder.from_section(
        recipe.text_encoder, args.device, load_in_4bit=recipe.load_in_4bit
    )

    model: Any = encoder.backbone
    if recipe.lora:
        model = add_adapter(encoder.backbone, recipe.lora)

    bad = BadRecords(recipe.max_bad_records)
    sources = [read_captions(source, bad, min_captions=2) for source in recipe.train]
    weights = [source.weight for source in recipe.train]
    pairs = CaptionPairs(sources, weights, recipe.seed, rules=recipe.train)
    held_out = [
        r for source in recipe.evaluation for r in read_captions(source, bad, min_captions=2)
    ]
    results: dict[str, Any] = {}
    if is_main():
        print(trainable_table(model))
        print(f"{sum(map(len, sources))} records, {len(pairs.texts)} captions; {bad.summary()}")
        results |= caption_accuracy(encoder, held_out, "before")
    metrics = MetricsJsonl(out / "metrics.jsonl")
    callbacks: list[TrainerCallback] = [metrics]
    if recipe.evaluation_steps and held_out:
        measure = partial(caption_accuracy, encoder, held_out, "cra")
        callbacks.append(ScheduledEvaluation(recipe.evaluation_steps, measure, metrics))

    trainer = CaptionContrastiveTrainer(
        model,
        args,
        pairs,
        encoder=encoder,
        scale=recipe.scale,
        symmetric=recipe.symmetric,
        micro_batch_tokens=recipe.micro_batch_tokens,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args))

    if is_main():
        encoder = hand_off(recipe, encoder, model, args.device)
        results |= caption_accuracy(encoder, held_out, "after")
        (out / "results.json").write_text(json.dumps({"cra": results}, indent=2) + "\n")
        print(f"{STAGE}: caption retrieval accuracy {results or 'not evaluated'}, {out}")
        write_manifest(
            out,
            stage=STAGE,
            recipe=recipe,
            parents={"language_model": recipe.text_encoder.language_model},
            fingerprints=encoder.fingerprint,
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, "captions": len(pairs.texts)},
        )
    teardown()


def hand_off(
    recipe: Stage1Recipe, encoder: TextEncoder, model: Any, device: torch.device
) -> TextEncoder:
    """Merge and write the encoder in each form; read it back, as the next stage will."""
    out = Path(recipe.output_dir)
    if recipe.lora:
        model.save_pretrained(out / "adapter")
        if recipe.load_in_4bit:  # merging into four bits would lose what was learned
            from peft import PeftModel

            encoder = TextEncoder.from_section(recipe.text_encoder, device)
            model = PeftModel.from_pretrained(encoder.backbone, out / "adapter")
        encoder.backbone = model.merge_and_unload()
    encoder.save_pretrained(out / "text_encoder")
    encoder = TextEncoder.from_pretrained(out / "text_encoder", device=device)
    export_sentence_transformers(encoder, out / "text_encoder", out / "sentence_transformers")
    return encoder


def caption_accuracy(
    encoder: TextEncoder, records: Sequence[CaptionRecord], name: str
) -> dict[str, Any]:
    """CRA in %: the share of first captions that find another caption of their image first."""
    if not records:
        return {}
    queries, gallery, positives = retrieval_task(records)
    found = recall_at_k(encoder.encode(queries), encoder.encode(gallery), positives, ks=1)
    return {
        name: found.recall[1],
        f"{name}_ci": list(found.ci[1]),
        "queries": len(queries),
        "gallery": len(gallery),
        "protocol": CRA_PROTOCOL,
    }


if __name__ == "__main__":
    sys.exit(guard(main))
