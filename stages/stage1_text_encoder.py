"""Stage 1: a decoder LLM becomes a text encoder that tells captions of different images apart.

Paper: LLM2CLIP v6, section 3.1 and appendix C.1 (caption-contrastive fine-tuning with LoRA).
Needs: any Hugging Face decoder LLM, and records with at least two captions of one image each, or
    pairs of texts.
Writes: `<output_dir>/text_encoder/` (merged and bidirectional; what stage 2a reads), `adapter/`
    (the LoRA alone, for the causal base: PEFT does not keep `is_causal`),
    `sentence_transformers/` (the same vectors for `SentenceTransformer(...)`, without this
    package), `results.json` (`cra`: caption retrieval with its interval, of the LLM as it came, by
    causal and by bidirectional attention, and `after` training; `before` is the one that trains),
    `measured.json` (the same as soon as it is known), `metrics.jsonl`, `recipe.resolved.yaml`,
    `manifest.json`.

    python stages/stage1_text_encoder.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/stage1_text_encoder.py RECIPE.yaml key=value ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.text.captions import CaptionPairs, CaptionRecord, UniqueTexts, read_captions
from llm2clip_vlm.distributed import await_files, is_main, say, shared_out, teardown, world_size
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.metrics.separability import PROTOCOL, caption_separability
from llm2clip_vlm.models.text.open_layers import turned
from llm2clip_vlm.models.text.text_encoder import PROBE_TEXTS, TextEncoder, require_equal
from llm2clip_vlm.models.trainable import set_precision, trainable_table
from llm2clip_vlm.recipe.text import Stage1Recipe
from llm2clip_vlm.training.adapters import Rounding, add_adapter, merge_adapter
from llm2clip_vlm.training.stage_run import StageRun
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers
from llm2clip_vlm.training.text.text_trainer import CaptionContrastiveTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]; goes on from its last checkpoint."""
    # recipe, parents, arguments, seed
    run = StageRun(argv, Stage1Recipe, __doc__)
    recipe = run.recipe
    if run.finished():
        return
    llm = recipe.text_encoder.language_model
    run.parent("language_model", llm, "base_language_model", "stage0_mntp")
    args = run.arguments(dataloader_drop_last=True, ddp_find_unused_parameters=False)

    # model
    say(f"model: {llm} as a text encoder")
    encoder = TextEncoder.from_section(
        recipe.text_encoder, args.device, load_in_4bit=recipe.load_in_4bit
    )

    # trainable
    model: Any = add_adapter(encoder.backbone, recipe.lora) if recipe.lora else encoder.backbone
    named = recipe.text_encoder.dtype == "float16"
    dtype = set_precision(model, args, named_fp16=named)
    say(trainable_table(model))

    # data
    tokens = partial(encoder.settings.tokens, encoder.tokenizer)
    sources = [
        read_captions(source, run.bad, min_captions=2, tokens=tokens) for source in recipe.train
    ]
    pairs = CaptionPairs(sources, recipe.train, recipe.seed)
    held_out = list(
        chain.from_iterable(read_captions(s, run.bad, min_captions=2) for s in recipe.evaluation)
    )
    captions = len(UniqueTexts(sources)) if is_main() else 0  # for people alone
    say(f"data: {sum(map(len, sources))} records, {captions} captions")
    for source in sources:
        say(source.table.facts["told"])
    results = before_training(run, encoder, held_out)

    # trainer, train
    trainer = CaptionContrastiveTrainer(
        model,
        args,
        pairs,
        encoder=encoder,
        scale=recipe.scale,
        symmetric=recipe.symmetric,
        micro_batch_tokens=recipe.micro_batch_tokens,
        measure=lambda: {"cra": caption_accuracy(encoder, held_out, "cra")["cra"]},
        callbacks=run.callbacks,
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)

    # evaluate (what was saved, not what is in memory), hand off
    extra: dict[str, Any] = {}
    live = None
    if is_main():
        live, rounding = hand_off(recipe, encoder, model, args.device, dtype)
        if rounding.lost:
            say(rounding)
            extra["merge_loss"] = rounding.share
    await_files(run.out / "text_encoder")
    encoder = TextEncoder.from_pretrained(run.out / "text_encoder", device=args.device)
    if live is not None:
        what, again = f"{run.out}/text_encoder", encoder.encode(PROBE_TEXTS)
        remedy = "the encoder was not written as it was trained; go on from the last checkpoint"
        require_equal(what, live, again, remedy, encoder.backbone.dtype)
    made_by = encoder.fingerprint if is_main() else None  # all weights are hashed
    results |= separability(run, encoder, held_out, "after", of=made_by)
    if is_main():
        extra["cra"] = results
        run.finish(encoder.fingerprint, extra, captions=captions)
    teardown()


def hand_off(
    recipe: Stage1Recipe, encoder: TextEncoder, model: Any, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, Rounding]:
    """Merge and write the encoder in each form.

    Returns:
        A few vectors of what was trained, and what saving the merged weights in `dtype` loses.
    """
    out = Path(recipe.output_dir)
    if recipe.lora:
        model.save_pretrained(out / "adapter")
        if recipe.load_in_4bit:  # merging into four bits would lose what was learned
            from peft import PeftModel

            encoder = TextEncoder.from_section(recipe.text_encoder, device)
            model = PeftModel.from_pretrained(encoder.backbone, out / "adapter").eval()
    live = encoder.encode(PROBE_TEXTS)  # the adapter not yet merged
    encoder.backbone, rounding = merge_adapter(model, dtype)
    encoder.save_pretrained(out / "text_encoder")
    export_sentence_transformers(encoder, out / "text_encoder", out / "sentence_transformers")
    return live, rounding


def before_training(
    run: StageRun[Stage1Recipe], encoder: TextEncoder, records: Sequence[CaptionRecord]
) -> dict[str, Any]:
    """Measure the untrained LLM, by its own attention and, where it has both, by the other.

    Most decoders never were bidirectional, so `raw_causal` is what training has to beat.
    """
    own = encoder.settings.bidirectional
    names = {False: "raw_causal", True: "raw_bidirectional", "partial": "raw_partial"}
    measured = separability(run, encoder, records, names[own])
    before = {key.replace(names[own], "before"): value for key, value in measured.items()}
    for way in (False, True):
        if way == own or encoder.settings.embedder or not records:
            continue
        try:
            with turned(encoder.backbone, way):
                measured |= separability(run, encoder, records, names[way])
        except ModelError as error:
            say(f"no {names[way]}: {error}")
    return before | measured


def separability(
    run: StageRun[Stage1Recipe],
    encoder: TextEncoder,
    records: Sequence[CaptionRecord],
    name: str,
    of: Any = None,
) -> dict[str, Any]:
    """Measure :func:`caption_accuracy`, then keep and report it at once."""
    measured = run.measured(name, lambda: caption_accuracy(encoder, records, name), of)
    shown = "not evaluated"
    if measured:
        low, high = measured[f"{name}_ci"]
        shown = f"{measured[name]:.1f} % [{low:.1f}, {high:.1f}]"
    say(f"caption separability, {name}: {shown}")
    return measured


def caption_accuracy(
    encoder: TextEncoder, records: Sequence[CaptionRecord], name: str
) -> dict[str, Any]:
    """Measure CRA in %: the share of first captions whose nearest text is of their image."""
    if not records:
        return {}

    def embed(texts: list[str]) -> Tensor:
        share = -(-len(texts) // world_size())
        parts = [texts[start : start + share] for start in range(0, len(texts), share)]
        return torch.cat(shared_out(parts, lambda p: encoder.encode(p, show_progress=is_main())))

    result = caption_separability([record.texts for record in records], embed)
    return {
        name: result.recall[1],
        f"{name}_ci": list(result.ci[1]),
        "queries": len(records),
        "gallery": result.gallery,
        "protocol": PROTOCOL,
    }


if __name__ == "__main__":
    sys.exit(guard(main))
