"""Pre-trains the demo's base language model on the embedded world's text, from bare lists upward.

Not a stage of the road: users bring a pretrained LLM, and the demo ships this one. It stands here
so that the shipped weights can be made again.

Needs: nothing. Writes: `<output_dir>/model/` (LlamaForCausalLM, tokenizer, chat template),
`results.json` (text-only QA on held-out scenes), `metrics.jsonl`, `manifest.json`.

    python stages/base_language_model.py recipes/demo/base/language_model.yaml key=value ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_base import LanguageModelRecipe
from llm2clip_vlm.data.world_text import ASK_SHORT, CHAT_TEMPLATE, build_tokenizer
from llm2clip_vlm.data.world_text_qa import TextBatches, text_qa_accuracy
from llm2clip_vlm.handoff import fingerprint_dir, is_complete, write_manifest
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.strict_resume import StrictTrainer

STAGE = "base_language_model"
SPECIALS = {
    "pad": "<pad>",
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "<|end|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
}


def _only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return items[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, LanguageModelRecipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    steps = sum(phase.steps for phase in recipe.phases)
    arguments = build_training_arguments(
        recipe,
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
    )
    set_seed(recipe.seed)

    tokenizer = build_tokenizer(SPECIALS, recipe.window_tokens, more=ASK_SHORT)
    tokenizer.chat_template = CHAT_TEMPLATE
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos")]
    ids = {name: getattr(tokenizer, name) for name in names}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **recipe.config))
    print(trainable_table(model))

    dataset: Dataset[dict[str, torch.Tensor]] = TextBatches(recipe.phases, tokenizer, recipe.seed)
    trainer = StrictTrainer(
        model,
        arguments,
        data_collator=_only,
        train_dataset=dataset,
        callbacks=[MetricsJsonl(out / "metrics.jsonl")],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments))

    model.eval()
    accuracy = text_qa_accuracy(model, tokenizer, scenes=recipe.evaluation_scenes)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "results.json").write_text(json.dumps({"text_qa": accuracy}, indent=2) + "\n")
    print(f"{STAGE}: text-only QA {accuracy['all']['accuracy']:.1f} % on held-out scenes, {out}")
    write_manifest(
        out,
        stage=STAGE,
        recipe=recipe,
        parents={},
        fingerprints={"language_model": fingerprint_dir(out / "model")},
        seconds=time.monotonic() - started,
    )


if __name__ == "__main__":
    sys.exit(guard(main))
