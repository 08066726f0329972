"""How much padding costs a text encoder: our length-sorted batches against batches in given order.

Both encode the same captions with the same model in this run; the embeddings must agree. The
baseline is what a plain loop over `tokenizer(..., padding=True)` does, at the same batch budget.

    python benchmarks/length_sorted_encoding.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from llm2clip_vlm.data.world import draw_scene, long_caption, short_caption
from llm2clip_vlm.models.text_encoder import TextEncoder

MODEL = "recipes/demo/base/models/language_model"
BATCH, BATCH_TOKENS = 64, 64 * 64


def captions(count: int) -> list[str]:
    """Half short, half long captions, shuffled."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "text") for _ in range(count)]
    return [
        short_caption(scene, rng) if i % 2 else long_caption(scene, rng, "full")
        for i, scene in enumerate(scenes)
    ]


def main() -> None:
    """Print seconds of both and their ratio with its spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    encoder = TextEncoder.from_pretrained(MODEL, max_length_tokens=96)
    texts = captions(2048)

    def in_order() -> torch.Tensor:
        parts = [
            encoder.encode(texts[i : i + BATCH], batch_tokens=10**9)
            for i in range(0, len(texts), BATCH)
        ]
        return torch.cat(parts)

    def sorted_by_length() -> torch.Tensor:
        return encoder.encode(texts, batch_tokens=BATCH_TOKENS)

    torch.testing.assert_close(in_order(), sorted_by_length(), atol=1e-4, rtol=1e-4)
    ratios, ours, theirs = [], [], []
    for _ in range(repeats):
        started = time.perf_counter()
        in_order()
        middle = time.perf_counter()
        sorted_by_length()
        ended = time.perf_counter()
        theirs.append(middle - started)
        ours.append(ended - middle)
        ratios.append(theirs[-1] / ours[-1])
    print(f"given order      {statistics.median(theirs):.2f} s (median of {repeats})")
    print(f"sorted by length {statistics.median(ours):.2f} s")
    print(
        f"ratio            {statistics.median(ratios):.2f} x "
        f"[{min(ratios):.2f}, {max(ratios):.2f}] on {torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    main()
