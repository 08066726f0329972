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
from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.text.captions import read_captions
from llm2clip_vlm.data.text.masking import MaskedRows
from llm2clip_vlm.distributed import is_main, say, teardown
from llm2clip_vlm.models.loading import load_complete, read_config, read_tokenizer
from llm2clip_vlm.models.text.open_layers import require_attention, set_causal
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.trainable import set_precision, trainable_table
from llm2clip_vlm.recipe.text import MntpRecipe
from llm2clip_vlm.runs.manifest import fingerprint_dir
from llm2clip_vlm.training.adapters import add_adapter, merge_adapter
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.strict_resume import StrictTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    # recipe, parents, arguments, seed
    run = StageRun(argv, MntpRecipe, __doc__)
    recipe, out = run.recipe, run.out
    if run.finished():
        return
    run.parent("language_model", recipe.language_model, "base_language_model")
    args = run.arguments(ddp_find_unused_parameters=False)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{run.stage}: ZeRO-3 splits the weights that are merged here; use ZeRO-2 or DDP"
        )

    # model
    say(f"model: {recipe.language_model}, its attention made bidirectional")
    config = read_config(recipe.language_model)
    config.is_causal = False
    llm = load_complete(
        AutoModelForCausalLM, recipe.language_model, config=config, dtype=recipe.dtype
    )
    set_causal(llm, False)
    require_attention(llm.eval(), recipe.bidirectional)
    tokenizer = read_tokenizer(recipe.language_model)

    # trainable
    model: Any = add_adapter(llm, recipe.lora) if recipe.lora else llm
    dtype = set_precision(model, args)
    say(trainable_table(model))

    # data
    records = chain.from_iterable(read_captions(source, run.bad) for source in recipe.sources)
    rows = MaskedRows(
        [text for record in records for text in record.texts],
        tokenizer,
        recipe.max_length_tokens,
        recipe.mask_token,
        recipe.mask_probability,
        recipe.seed,
    )
    say(f"data: {len(rows)} rows of {recipe.max_length_tokens} tokens")

    # trainer, train: the causal-LM loss predicts each token from the place before it, as MNTP does
    trainer = StrictTrainer(model, args, train_dataset=rows, callbacks=run.callbacks)
    trainer.train(resume_from_checkpoint=run.checkpoint)

    # hand off (stage 1 evaluates the encoder that begins with it)
    if is_main():
        merged, rounding = merge_adapter(model, dtype)
        merged.save_pretrained(out / "language_model")
        save_tokenizer(tokenizer, out / "language_model")
        trained = {"language_model": fingerprint_dir(out / "language_model")}
        extra: dict[str, Any] = {"rows": len(rows)}
        if recipe.lora:
            say(rounding)
            extra["merge_loss"] = rounding.share
        run.finish(trained, **extra)
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
