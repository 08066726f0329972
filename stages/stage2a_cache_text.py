"""Stage 2a: every caption's embedding by the frozen text encoder, cached by content.

Paper: LLM2CLIP v6, section 3.2 and table A4 (offline text features make stage 2 cheap).
Needs: stage 1's `text_encoder/` (or a raw LLM: the ablation without stage 1), and all files whose
    texts stage 2b and its evaluation will ask for.
Writes: `<output_dir>/` (an `EmbeddingCache`: shards, keys, `header.json`), `recipe.resolved.yaml`,
    `manifest.json`. Texts that are there already are not encoded again: after an interruption or
    with more sources the same command goes on.

    python stages/stage2a_cache_text.py RECIPE.yaml key=value ...

Under a launcher with several processes the first one encodes and the others leave at once: the
cache has one writer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config import Stage2aRecipe
from llm2clip_vlm.data.captions import read_captions
from llm2clip_vlm.data.embedding_cache import HEADER_NAME, EmbeddingCache
from llm2clip_vlm.data.records import BadRecords
from llm2clip_vlm.data.world_files import ensure_world
from llm2clip_vlm.distributed import is_main
from llm2clip_vlm.handoff import is_complete, verify_parent, write_manifest
from llm2clip_vlm.models.text_encoder import TextEncoder
from llm2clip_vlm.recipe import load_recipe, save_resolved

STAGE = "stage2a_cache_text"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: RECIPE [key=value ...]."""
    if not is_main():
        return
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise SystemExit(__doc__)
    recipe = load_recipe(words[0], Stage2aRecipe, words[1:])
    out = Path(recipe.output_dir)
    if is_complete(out, recipe) and (out / HEADER_NAME).is_file():
        print(f"{STAGE}: {out} is finished, nothing to do")
        return
    if recipe.world is not None:
        ensure_world(recipe.world)

    bad = BadRecords(recipe.max_bad_records)
    read = [read_captions(source, bad) for source in recipe.sources]
    texts = [text for record in chain.from_iterable(read) for text in record.texts]
    unique = list(dict.fromkeys(texts))
    print(f"{len(texts)} texts, {len(unique)} different ones; {bad.summary()}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(recipe.text_encoder, str):
        path = recipe.text_encoder
        verify_parent(path, expect_stage="stage1_text_encoder")
        encoder = TextEncoder.from_pretrained(path, device=device)
    else:
        path = recipe.text_encoder.language_model
        verify_parent(path, expect_stage=("base_language_model", "stage1_text_encoder"))
        encoder = TextEncoder.from_section(recipe.text_encoder, device)

    def encode(part: list[str]) -> Tensor:
        return encoder.encode(part, batch_tokens=recipe.batch_tokens, show_progress=True)

    save_resolved(recipe, out / "recipe.resolved.yaml")
    cache = EmbeddingCache.build(out, unique, encode, encoder.fingerprint)
    print(f"{STAGE}: {len(cache)} rows of {cache.dim}, {len(texts) / len(unique):.2f} texts a row")
    write_manifest(
        out,
        stage=STAGE,
        recipe=recipe,
        parents={
            "text_encoder": path,
            **{f"sources.{i}": source.path for i, source in enumerate(recipe.sources)},
        },
        fingerprints=encoder.fingerprint,
        seconds=time.monotonic() - started,
        extra={
            "rows": len(cache),
            "texts": len(texts),
            "truncated": encoder.tokens.num_truncated,
            "bad_records": bad.count,
        },
    )


if __name__ == "__main__":
    sys.exit(guard(main))
