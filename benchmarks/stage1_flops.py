"""FLOPs and CPU time of stage 1 per positive pair: ours against the released recipe's way.

Both train the same LoRA on the same pairs of a short and a long caption, in the same precision:

- the released way: queries, positives and random third captions ("hard negatives") of 64 pairs in
  three batches, each padded to its own longest caption, with gradient checkpointing;
- ours: all captions of the batch sorted by length and padded in groups, no third caption, no
  checkpointing. 64 pairs in one graph, and beside it 256 pairs through GradCache in micro-batches
  of 8,192 tokens (which the released way cannot do at all).

Lengths are those of real captions (`text/` of the shared data: COCO short ones, IIW long ones;
words and punctuation marks counted as tokens), drawn half as short-to-long, half the other way.
FLOPs are counted by torch on a model of Llama-3.1-8B's shape without weights; time is measured on
a small one.

    python benchmarks/stage1_flops.py [--quick]     (LLM2CLIP_SHARED_DATA names the data's folder)
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from arms import finish, ratio, take_turns
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from llm2clip_vlm.data.text.captions import CaptionPair
from llm2clip_vlm.losses.contrastive import caption_contrastive_loss
from llm2clip_vlm.models.text.caption_tokens import pad_tokens
from llm2clip_vlm.models.text.text_encoder import pool
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.training.adapters import add_adapter
from llm2clip_vlm.training.grad_cache import Embeds, cached_loss
from llm2clip_vlm.training.text.text_trainer import PairCollator

MAX_TOKENS, PAIRS, MANY_PAIRS, BUDGET_TOKENS = 512, 64, 256, 8192
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 384, "intermediate_size": 1344, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 6, "num_key_value_heads": 2}
GOALS = {"ratio": 0.27, "time_ratio": 3.0}
_TOKEN = re.compile(r"\w+|[^\w\s]")


def caption_lengths(folder: Path) -> tuple[list[int], list[int]]:
    """Tokens of short and of long captions, bos and eos included."""
    columns = {
        "coco_val2017_captions.jsonl.gz": "caption",
        "iiw_long_human.jsonl.gz": "human_IIW",
        "iiw_long_model.jsonl.gz": "model_IIW_P5B",
    }
    lengths: dict[str, list[int]] = {}
    for name, column in columns.items():
        with gzip.open(folder / "text" / name, "rt", encoding="utf-8") as lines:
            texts = [row[column] for row in map(json.loads, lines) if row.get(column)]
        lengths[name] = [min(MAX_TOKENS, len(_TOKEN.findall(text)) + 2) for text in texts]
    short, *long = lengths.values()
    return short, [length for part in long for length in part]


class Lengths:
    """Stands for the token table and the tokenizer: a text is as many tokens as its number says."""

    num_front_tokens, pad_token_id = 1, 0

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def items(self, _: str, text: int) -> np.ndarray[Any, Any]:
        """Token ids of a text."""
        return np.random.default_rng(text).integers(1, 1000, self.lengths[text])

    def ids(self, prompt: str) -> list[int]:
        """Of a prompt, of which there is none."""
        return []


def draw_pairs(short: list[int], long: list[int], count: int) -> tuple[Lengths, list[CaptionPair]]:
    """Pairs of a short and a long caption, each with a random third of the positive's kind."""
    rng = np.random.default_rng(0)
    lengths, pairs = [], []
    for record in range(count):
        kinds = [short, long] if rng.random() < 0.5 else [long, short]
        lengths += [int(rng.choice(kind)) for kind in (*kinds, kinds[1])]
        pairs.append(CaptionPair(record, 3 * record, 3 * record + 1, 0, 3 * record + 2))
    return Lengths(lengths), pairs


def build(shape: dict[str, int], rank: int, device: str) -> Any:
    """A bidirectional Llama with LoRA on all linear layers."""
    config = LlamaConfig(vocab_size=1000, pad_token_id=0, attn_implementation="eager", **shape)
    config.is_causal, config.use_cache = False, False
    with torch.device(device):
        model: Any = LlamaModel(config)
        model = add_adapter(model, LoraSection(r=rank, alpha=2 * rank, dropout=0.0)).train()
    return model


def make_arms(
    model: Any, table: Lengths, pairs: Sequence[CaptionPair], device: str
) -> dict[str, tuple[Callable[[], None], int, float]]:
    """Each arm: one forward and backward pass, its pairs, its share of real tokens."""

    def embed(group: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: value.to(device) for name, value in group.items()}
        # without weights there are no values that a mask could be built from
        mask = None if device == "meta" else moved["attention_mask"]
        hidden = model(input_ids=moved["input_ids"], attention_mask=mask).last_hidden_state
        return pool(hidden, moved["pool_mask"], "mean")

    def pad(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return pad_tokens([table.items("ids", row) for row in rows], 0, 1)

    def contrast(query: torch.Tensor, positive: torch.Tensor, **more: Any) -> torch.Tensor:
        if device == "meta":  # the loss's own FLOPs are a millionth
            return sum((x.sum() for x in more.values()), query.sum() + positive.sum())
        return caption_contrastive_loss(query, positive, 50.0, not more, **more)

    few = pairs[:PAIRS]
    towers = [pad([getattr(p, role) for p in few]) for role in ("query", "positive", "negative")]

    def released() -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            {"use_reentrant": False, "preserve_rng_state": device != "meta"}
        )
        query, positive, negative = (embed(tower) for tower in towers)
        contrast(query, positive, negatives=negative).backward()
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()

    def ours(count: int, budget: int | None) -> tuple[Callable[[], None], float]:
        chosen = [pair._replace(negative=-1) for pair in pairs[:count]]
        batch = PairCollator(table, table, [""], budget)(chosen)  # type: ignore[arg-type]
        groups, order = batch["groups"], batch["order"].to(device)

        def loss(embeds: Embeds) -> torch.Tensor:
            query, positive = embeds.rows[0][order].chunk(2)
            return contrast(query, positive)

        def step() -> None:
            def embed_all(parts: Sequence[dict[str, torch.Tensor]]) -> Embeds:
                return Embeds((torch.cat([embed(part) for part in parts]),))

            chunks = [groups] if budget is None else [[group] for group in groups]
            accelerator = Accelerator(cpu=True)
            accelerator.backward(cached_loss(accelerator, model, chunks, embed_all, loss))

        return step, real_share(groups)

    direct, share = ours(PAIRS, None)
    cached, cached_share = ours(MANY_PAIRS, BUDGET_TOKENS)
    return {
        "released": (released, PAIRS, real_share(towers)),
        "ours": (direct, PAIRS, share),
        "gradcache": (cached, MANY_PAIRS, cached_share),
    }


def real_share(groups: Sequence[dict[str, torch.Tensor]]) -> float:
    """Real tokens over processed ones."""
    real = sum(int(group["attention_mask"].sum()) for group in groups)
    return round(real / sum(group["input_ids"].numel() for group in groups), 4)


def main() -> None:
    """Print FLOPs and seconds a pair of each arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 3 repeats")
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLM2CLIP_SHARED_DATA", here))
    if not (folder / "text").is_dir():
        sys.exit(f"skipped: no folder {folder / 'text'}; set LLM2CLIP_SHARED_DATA to the real data")
    short, long = caption_lengths(folder)
    table, pairs = draw_pairs(short, long, MANY_PAIRS)

    flops = {}
    for name, (step, count, share) in make_arms(
        build(LLAMA_8B, 16, "meta"), table, pairs, "meta"
    ).items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops() / count
        print(f"{name:10s} {flops[name] / 1e12:6.2f} TFLOP a pair, {share:.0%} real tokens")

    small = SMALL | ({"hidden_size": 96, "intermediate_size": 336} if args.quick else {})
    repeats = 3 if args.quick else args.repeats
    arms = make_arms(build(small, 2, "cpu"), table, pairs, "cpu")
    timed = {name: arms[name][0] for name in ("released", "ours")}
    for step in timed.values():
        step()
    seconds = take_turns(timed, repeats)
    for name, values in seconds.items():
        cpu, wall = (statistics.median(values[kind]) for kind in ("cpu", "wall"))
        print(f"{name:10s} {cpu:.2f} s of CPU, {wall:.2f} s of wall for {PAIRS} pairs")
    time_ratio, time_spread = ratio(seconds, "released", "ours")
    finish(
        "stage1_flops",
        ours=round(flops["ours"] / 1e12, 3),
        baseline=round(flops["released"] / 1e12, 3),
        ratio=round(flops["ours"] / flops["released"], 4),
        ratio_gradcache=round(flops["gradcache"] / flops["released"], 4),
        spread=[0.0, 0.0],
        time_ratio=time_ratio,
        time_spread=time_spread,
        equal=None,
        real_tokens={name: share for name, (_, _, share) in arms.items()},
        goals=GOALS,
        settings={
            "unit": "TFLOP a positive pair, Llama-3.1-8B's shape, LoRA r=16",
            "timed_model": small,
            "pairs": PAIRS,
            "pairs_gradcache": MANY_PAIRS,
            "micro_batch_tokens": BUDGET_TOKENS,
            "repeats": repeats,
            "mean_tokens": [round(statistics.mean(kind), 1) for kind in (short, long)],
            "attention": "eager",
        },
    )


if __name__ == "__main__":
    main()
