"""Pre-trains the demo's base language model on the drawn world's text, from bare lists upward.

Not a stage of the pipeline: users bring a pretrained LLM, and the demo ships this one. It stands
here so that the shipped weights can be made again.

Needs: nothing. Writes: `<output_dir>/model/` (LlamaForCausalLM, tokenizer, chat template),
`results.json` (text-only QA on held-out scenes), `metrics.jsonl`, `manifest.json`.

    python demo/base_language_model.py recipes/demo/base/language_model.yaml key=value ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from world.questions import TextBatches, text_qa_accuracy
from world.recipe import LanguageModelRecipe
from world.texts import ASK_SHORT, CHAT_TEMPLATE, build_tokenizer

from llm2clip_vlm.cli import guard
from llm2clip_vlm.distributed import is_main, teardown
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.runs.manifest import fingerprint_dir
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.strict_resume import StrictTrainer

SPECIALS = {
    "pad": "<pad>",
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "<|end|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]; goes on from its last checkpoint."""
    run = StageRun(argv, LanguageModelRecipe, __doc__)
    recipe, out = run.recipe, run.out
    if run.finished():
        return
    args = run.arguments(
        max_steps=sum(phase.steps for phase in recipe.phases),
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
    )
    _ = run.bad  # nothing is read here, but all ranks begin its list together

    tokenizer = build_tokenizer(SPECIALS, recipe.window_tokens, more=ASK_SHORT)
    tokenizer.chat_template = CHAT_TEMPLATE
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos")]
    ids = {name: getattr(tokenizer, name) for name in names}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **recipe.config))
    dataset: Dataset[dict[str, torch.Tensor]] = TextBatches(recipe.phases, tokenizer, recipe.seed)
    trainer = StrictTrainer(
        model, args, data_collator=itemgetter(0), train_dataset=dataset, callbacks=run.callbacks
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)

    if is_main():
        print(trainable_table(model))
        model.eval()
        accuracy = text_qa_accuracy(model, tokenizer, scenes=recipe.evaluation_scenes)
        print(f"{run.stage}: text-only QA {accuracy['all']['accuracy']:.1f} % on held-out scenes")
        model.save_pretrained(out / "model")
        save_tokenizer(tokenizer, out / "model")
        run.finish({"language_model": fingerprint_dir(out / "model")}, {"text_qa": accuracy})
    teardown()


if __name__ == "__main__":
    sys.exit(guard(main))
