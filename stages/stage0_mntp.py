"""Optional step before stage 1: the LLM learns to guess masked tokens with bidirectional attention.

Paper: LLM2Vec (arXiv 2404.05961), masked next token prediction; LLM2CLIP v6 table 6 leaves it out
(79.7/77.2 with it, 80.4/77.9 without), the released code has it.
Needs: any Hugging Face decoder LLM, and texts.
Writes: `<output_dir>/language_model/` (merged; what stage 1's `text_encoder.language_model` names),
    `metrics.jsonl`, `recipe.resolved.yaml`, `manifest.json`.

    python stages/stage0_mntp.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/stage0_mntp.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import MntpRecipe
from llm2clip_vlm.data.captions import read_captions
from llm2clip_vlm.data.masking import MaskedRows
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main, teardown
from llm2clip_vlm.handoff import fingerprint_dir, is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.strict_resume import StrictResumeMixin
from llm2clip_vlm.training.text_trainer import add_adapter

STAGE = "stage0_mntp"


class MntpTrainer(StrictResumeMixin, Trainer):
    """The causal-LM loss predicts each token from the place before it, which is MNTP's."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise SystemExit(__doc__)
    recipe = load_recipe(words[0], MntpRecipe, words[1:])
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    verify_parent(recipe.language_model, expect_stage="base_language_model")
    args = build_training_arguments(recipe, ddp_find_unused_parameters=False)
    if recipe.world is not None:
        with args.main_process_first(local=False, desc="writing the world"):
            ensure_world(recipe.world)
    set_seed(recipe.seed)

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{STAGE}: ZeRO-3 splits the weights that are merged here; use ZeRO-2 or DDP"
        )
    config = AutoConfig.from_pretrained(recipe.language_model)
    config.is_causal = False
    llm = AutoModelForCausalLM.from_pretrained(
        recipe.language_model, config=config, dtype=recipe.dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
    model: Any = add_adapter(llm, recipe.lora) if recipe.lora else llm

    bad = BadRecords(recipe.max_bad_records)
    records = chain.from_iterable(read_captions(source, bad) for source in recipe.sources)
    rows = MaskedRows(
        [text for record in records for text in record.texts],
        tokenizer,
        recipe.max_length_tokens,
        recipe.mask_token,
        recipe.mask_probability,
        recipe.seed,
    )
    if is_main():
        print(trainable_table(model))
        print(f"{len(rows)} rows of {recipe.max_length_tokens} tokens; {bad.summary()}")

    metrics = MetricsJsonl(out / "metrics.jsonl")
    trainer = MntpTrainer(model, args, train_dataset=rows, callbacks=[metrics])
    trainer.train(resume_from_checkpoint=last_checkpoint(args))

    if is_main():
        merged = model.merge_and_unload() if recipe.lora else model
        merged.save_pretrained(out / "language_model")
        tokenizer.save_pretrained(out / "language_model")
        print(f"{STAGE}: {out / 'language_model'}")
        write_manifest(
            out,
            stage=STAGE,
            recipe=recipe,
            parents={"language_model": recipe.language_model},
            fingerprints={"language_model": fingerprint_dir(out / "language_model")},
            seconds=time.monotonic() - started,
            extra={"bad_records": bad.count, "rows": len(rows)},
        )
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
