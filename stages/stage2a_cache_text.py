"""Stage 2a: the frozen text encoder's embedding of every caption, cached by content.

Paper: LLM2CLIP v6, section 3.2 and table A4 (offline text features make stage 2 cheap).
Needs: stage 1's `text_encoder/` (or a raw LLM: the ablation without stage 1), and all files whose
    texts stage 2b and its evaluation will ask for.
Writes: `<output_dir>/` (an `EmbeddingCache`: `header.json` and shards), `encode_cost.jsonl`,
    `recipe.resolved.yaml`, `manifest.json`. Texts that are there already are not encoded again:
    after an interruption or with more sources the same command goes on.

    python stages/stage2a_cache_text.py RECIPE.yaml key=value ...
    accelerate launch --num_processes 8 stages/stage2a_cache_text.py RECIPE.yaml key=value ...

The processes of a launch, or separate ones with `slice=i/n`, write the same files as a single one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.shards import cache_names, read_header
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.text.captions import UniqueTexts, read_captions
from llm2clip_vlm.distributed import barrier, is_main, rank, say, teardown, world_size
from llm2clip_vlm.embed import COST_NAME
from llm2clip_vlm.models.text.text_encoder import TextEncoder, require_equal
from llm2clip_vlm.recipe.reading import save_resolved
from llm2clip_vlm.recipe.text import Stage2aRecipe
from llm2clip_vlm.training.encoder.caption_embeddings import encoder_path, load_caption_encoder
from llm2clip_vlm.training.encoder.encoder_eval import prompts_of
from llm2clip_vlm.training.stage_run import StageRun


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]."""
    # recipe, parents
    run = StageRun(argv, Stage2aRecipe, __doc__)
    recipe, out = run.recipe, run.out
    if read_header(out) and run.finished():
        return
    if world_size() > 1:  # one rank may have far more to do than another
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    if is_main():
        run.hold(shared=recipe.slice is not None, known=[*cache_names(out), COST_NAME])
        run.note_data()
        if not read_header(out):  # else it may yet be refused, for another encoder
            save_resolved(recipe, out / "recipe.resolved.yaml")
    barrier()

    # data
    tables = [read_captions(source, run.bad) for source in recipe.sources]
    prompts = (prompts_of(read_image_text(each, run.bad), each) for each in recipe.zero_shot)
    texts = UniqueTexts(tables, [*chain.from_iterable(prompts)])
    say(f"data: {texts.total} texts, {len(texts)} different ones")
    if not texts:
        raise ValueError(f"{out}: no text to embed; expected a caption in `sources` or `zero_shot`")

    # model
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    say(f"model: the text encoder {encoder_path(recipe.text_encoder)} on {device}")
    encoder = load_caption_encoder(recipe.text_encoder, device)

    def encode(with_prompt: TextEncoder, part: list[str]) -> Tensor:
        began, before = time.monotonic(), with_prompt.tokens.num_truncated
        embeds = with_prompt.encode(part, batch_tokens=recipe.batch_tokens, show_progress=bar)
        cost = {"texts": len(part), "seconds": round(time.monotonic() - began, 3)}
        cost |= {"cut": with_prompt.tokens.num_truncated - before, "at": time.time()}
        with (out / COST_NAME).open("a") as log:
            log.write(json.dumps(cost) + "\n")
        return embeds

    prompted = {"": encoder}
    for prompt in recipe.prompts:
        settings = replace(encoder.settings, instruction=prompt)
        prompted[prompt] = TextEncoder(encoder.backbone, encoder.tokenizer, settings)
    encoders = {prompt: partial(encode, each) for prompt, each in prompted.items()}
    part, parts = map(int, (recipe.slice or "0/1").split("/"))
    writer = (part * world_size() + rank(), parts * world_size())
    with tqdm(unit="text", disable=not is_main()) as bar:
        cache = EmbeddingCache.build(
            out, texts, encoders, encoder.fingerprint, writer=writer, planned=bar.reset
        )
    barrier()

    # evaluate (a few rows again), hand off
    if encoder.tokens.longest:  # of what this process has encoded
        print(encoder.tokens.told())
    if is_main() and recipe.slice is None:
        cache = EmbeddingCache.open(out)
        check_rows(cache, prompted, texts)
        say(f"cache: {len(cache)} rows of {cache.dim}, {texts.total / len(texts):.2f} texts a row")
        run.parents["text_encoder"] = encoder_path(recipe.text_encoder)
        save_resolved(recipe, out / "recipe.resolved.yaml")
        run.finish(
            encoder.fingerprint, rows=len(cache), texts=texts.total, different_texts=len(texts)
        )
    teardown()


def check_rows(
    cache: EmbeddingCache, encoders: Mapping[str, TextEncoder], texts: Sequence[str]
) -> None:
    """Encode a short, a medium and a long text alone: the cache must hold the same vectors."""
    some = range(0, len(texts), -(-len(texts) // 1024) or 1)  # of a thousand from all over the list
    by_length = sorted((texts[n] for n in some), key=len)
    texts = [*by_length[:1], *by_length[len(some) // 2 :][:1], *by_length[-1:]]
    for prompt, encoder in encoders.items() if texts else ():
        require_equal(
            f"{cache.directory}, prompt {prompt!r}, such as {texts[:1]!s:.60}",
            torch.cat([encoder.encode([text]) for text in texts]),
            cache.lookup(texts, prompt),
            "what is cached is not what the encoder gives; delete the directory and start again",
            encoder.backbone.dtype,
        )


if __name__ == "__main__":
    sys.exit(guard(main))
