"""Stage 1's Trainer against sentence-transformers' own, step by step on the same pairs.

Ours is `CaptionContrastiveTrainer`; the peer is `SentenceTransformerTrainer` with
`MultipleNegativesRankingLoss` (scale and both directions as ours), on our own export of the same
encoder and with the same LoRA. Both train the same batches in the same order, so each step's loss
must be equal; ours tokenizes its captions in the time that is measured, as the peer does. Four
mixes of captions:

- `mixed`: a short and a long caption of a record, either of them the anchor;
- `directed`: the short one is the anchor, so that the peer's two columns have like lengths;
- `short`: two short captions;
- `cached`: `mixed` with twice the pairs through GradCache, against
  `CachedMultipleNegativesRankingLoss` with its best `mini_batch_size` here.

The limit is a batch without padding: `limit_ratio` is the share of real tokens in what ours
computes (mixed). Captions are real (COCO's short ones; ImageInWords' long ones) where the folder in
LLM2CLIP_SHARED_DATA (or ../shared/data) is there, else random words of like lengths.

    python benchmarks/stage1_training.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import sentence_transformers
import torch
from arms import finish, ratio, take_turns
from caption_encoding import DATA, MODEL, build_encoder, long_texts, short_texts
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import CaptionPairs, read_captions
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.recipe.base import CaptionPairSource, LoraSection
from llm2clip_vlm.training.adapters import add_adapter, lora_config
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers
from llm2clip_vlm.training.text.text_trainer import CaptionContrastiveTrainer

SCALE, LEARNING_RATE = 50.0, 1e-4
BUDGET_TOKENS = 4096
"""Ours through GradCache: tokens of a forward pass."""
MINI_BATCH = 4
"""The peer's: the fastest of 4, 8, 16, 32 and 64, and of `mini_batch_num_tokens` 2,048 and 4,096
(its columns are not sorted by length)."""
GOALS = {"ratio_mixed": 2.2, "ratio_directed": 1.5, "ratio_short": 1.2, "ratio_cached": 2.2}


def write_records(path: Path, mix: str, count: int) -> None:
    """Pairs of different texts, of lengths as the mix says."""
    short, long = short_texts(2 * count), long_texts(count)
    with path.open("w") as file:
        for row in range(count):
            captions = {"short": [short[row]], "long": [long[row]]}
            if mix == "short":
                captions = {"short": short[2 * row : 2 * row + 2], "long": []}
            file.write(json.dumps(captions) + "\n")


class _InOrder(DefaultBatchSampler):
    """Rows as they stand: in the order in which ours takes them."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(SequentialSampler(dataset), **options)


class Arms:
    """Both Trainers of a mix, with their data.

    Args:
        mix: One of the docstring's.
        folder: The encoder, in `encoder`, and its export, in `export`.
        batch: Pairs of a step.
        steps: Steps of a round.
    """

    def __init__(self, mix: str, folder: Path, batch: int, steps: int) -> None:
        cached = mix == "cached"
        write_records(path := folder / f"{mix}.jsonl", mix, batch * steps)
        self.rule = CaptionPairSource(
            path=str(path), directed=mix == "directed", fields=["short", "long"]
        )
        self.encoder = TextEncoder.from_pretrained(folder / "encoder")
        self.pairs = self.read()
        drawn = [self.pairs[0, int(record)] for record in self.pairs.order(0)]
        lora = LoraSection(r=16, alpha=32, dropout=0.0)
        options: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": batch,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_drop_last": True,
        }

        torch.manual_seed(0)
        model = add_adapter(self.encoder.backbone, lora)
        self.own = CaptionContrastiveTrainer(
            model,
            TrainingArguments(**options),
            self.pairs,
            encoder=self.encoder,
            scale=SCALE,
            micro_batch_tokens=BUDGET_TOKENS if cached else None,
        )
        self.collator = cast("Any", self.own.data_collator)
        batches = [self.collator(drawn[at : at + batch]) for at in range(0, len(drawn), batch)]
        masks = [group["attention_mask"] for found in batches for group in found["groups"]]
        self.real_tokens = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

        peer = SentenceTransformer(str(folder / "export"), device="cpu")
        torch.manual_seed(0)
        peer.add_adapter(lora_config(lora))
        loss: Any = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
        self.peer = SentenceTransformerTrainer(
            peer,
            SentenceTransformerTrainingArguments(**options, batch_sampler=_InOrder),
            Dataset.from_dict(
                {
                    "anchor": [pair.query for pair in drawn],
                    "positive": [pair.positive for pair in drawn],
                }
            ),
            loss=loss(
                peer,
                scale=SCALE,
                directions=("query_to_doc", "doc_to_query"),
                partition_mode="per_direction",
                **({"mini_batch_size": MINI_BATCH} if cached else {}),
            ),
        )

    def read(self) -> CaptionPairs:
        """The pairs, with tokens made anew."""
        tokens = partial(self.encoder.settings.tokens, self.encoder.tokenizer)
        table = read_captions(self.rule, BadRecords(), min_captions=2, tokens=tokens, keep=False)
        return CaptionPairs([table], [self.rule], seed=0)

    def ours(self) -> None:
        """A round, tokens made anew."""
        self.own.train_dataset = self.read()
        self.own.train()

    def theirs(self) -> None:
        """A round."""
        self.peer.train()

    def difference(self) -> float:
        """How far the losses of the last round's steps are apart, at most."""
        own, peer = (
            [row["loss"] for row in trainer.state.log_history if "loss" in row]
            for trainer in (self.own, self.peer)
        )
        return max(abs(a - b) for a, b in zip(own, peer, strict=True))


def main() -> None:
    """Print each mix's seconds a step and its ratio, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 32 pairs")
    parser.add_argument("--mixes", nargs="+", default=["mixed", "directed", "short", "cached"])
    options = parser.parse_args()
    rounds, batch = (3, 32) if options.quick else (options.rounds, 64)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    differences, real, seconds_a_step = {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = build_encoder([*short_texts(1024), *long_texts(1024)], folder / "llm")
        encoder.save_pretrained(folder / "encoder")
        export_sentence_transformers(encoder, folder / "encoder", folder / "export")
        for mix in options.mixes:
            factor, steps = {"cached": (2, 1), "short": (1, 6)}.get(mix, (1, 1))
            arms = Arms(mix, folder, factor * batch, steps)
            turns: dict[str, Callable[[], None]] = {"theirs": arms.theirs, "ours": arms.ours}
            for turn in turns.values():
                turn()
            gc.freeze()  # each call of `train` begins with a collection: leave the models out of it
            differences[mix] = arms.difference()
            real[mix] = round(arms.real_tokens, 4)
            seconds = take_turns(turns, rounds)
            differences[mix] = max(differences[mix], arms.difference())
            medians = {a: statistics.median(seconds[a]["cpu"]) / steps for a in turns}
            seconds_a_step[mix] = {name: round(value, 4) for name, value in medians.items()}
            found[f"ratio_{mix}"], found[f"spread_{mix}"] = ratio(seconds, "theirs", "ours")
            print(
                f"{mix:9s} {seconds_a_step[mix]} s a step, ratio {found[f'ratio_{mix}']} "
                f"{found[f'spread_{mix}']}, {real[mix]:.3f} real tokens, "
                f"losses {differences[mix]:.1e} apart",
                flush=True,
            )
    first = options.mixes[0]
    finish(
        "stage1_training",
        ours=seconds_a_step[first]["ours"],
        baseline=seconds_a_step[first]["theirs"],
        ratio=found[f"ratio_{first}"],
        spread=found[f"spread_{first}"],
        **found,
        equal=max(differences.values()) < 1e-3,
        limit_ratio=real[first],
        goals=GOALS,
        settings={
            "unit": "s of CPU a step; limit_ratio: share of real tokens",
            "real_tokens": real,
            "seconds_a_step": seconds_a_step,
            "loss_difference": differences,
            "captions": "COCO and ImageInWords" if DATA.is_dir() else "drawn lengths",
            "pairs": batch,
            "pairs_cached": 2 * batch,
            "micro_batch_tokens": BUDGET_TOKENS,
            "mini_batch_size": MINI_BATCH,
            "model": MODEL,
            "lora": 16,
            "dtype": "float32",
            "rounds": rounds,
            "sentence_transformers": sentence_transformers.__version__,
        },
    )


if __name__ == "__main__":
    main()
