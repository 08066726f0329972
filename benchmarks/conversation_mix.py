"""The mix of conversations that the benchmarks of stages 3 and 4 are run on, measured on real data.

- Texts: tokens (SmolLM2's tokenizer) of real questions and answers, as ten quantiles (5 to 95 %):
  LLaVA-Pretrain's prompts and captions (2,183), DAQUAR's questions (9,459), questions on COCO
  pictures (VQAv2 and presence or count, 3,303), and people's descriptions of pictures (IIW, 612).
- Turns: the mean turns of a sample of FineVision's 169 subsets with pictures, weighted by their
  samples (15.9 M), from the table that it publishes (2510.17269). How turns spread within a subset
  is not published.

A conversation has one picture. One with a single turn is any of the four kinds, as likely; one with
more asks DAQUAR's or COCO's questions. Without the descriptions nearly nothing would be trained,
while FineVision's mean answer to a picture has 77 tokens. Long conversations are cut.

    python benchmarks/conversation_mix.py [--measure DATA TOKENIZER]
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TURNS = {  # share of samples in per mille
    1: 523, 2: 73, 3: 19, 4: 13, 5: 50, 6: 2, 7: 112, 8: 118, 9: 12, 10: 4, 11: 40, 12: 13,
    13: 9, 15: 1, 31: 2, 129: 9,
}  # fmt: skip
TEXTS = {  # tokens of questions, of answers
    "caption": ([4, 6, 6, 9, 9, 10, 11, 11, 11, 11], [6, 8, 9, 10, 11, 12, 14, 16, 19, 22]),
    "daquar": ([6, 6, 7, 7, 8, 9, 9, 10, 11, 13], [1, 1, 1, 1, 1, 2, 2, 3, 3, 5]),
    "coco": ([8, 8, 8, 8, 8, 8, 9, 10, 10, 11], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "description": ([6] * 10, [115, 151, 172, 195, 216, 243, 269, 297, 340, 417]),
}
TEMPLATE = 3
"""Tokens that the chat template adds to a turn: two roles and an end (ChatML: ten)."""

Turn = tuple[int, int]
"""Tokens of a question, tokens of its answer."""


def draw_conversations(count: int, seed: int = 0) -> list[list[Turn]]:
    """Turns of so many conversations."""
    draw = np.random.default_rng(seed)
    shares = np.array(list(TURNS.values()), float)
    conversations = []
    for turns in draw.choice(list(TURNS), count, p=shares / shares.sum()):
        kinds = list(TEXTS) if turns == 1 else ["daquar", "coco"]
        questions, answers = TEXTS[str(draw.choice(kinds))]
        drawn = (draw.choice(questions, turns), draw.choice(answers, turns))
        conversations.append([(int(q), int(a)) for q, a in zip(*drawn, strict=True)])
    return conversations


def draw_lengths(count: int, visual: int, max_tokens: int, seed: int = 0) -> list[Turn]:
    """Tokens of each sample, cut at `max_tokens`, and how many of them are trained."""
    found = []
    for turns in draw_conversations(count, seed):
        length, trained = visual, 0
        for question, answer in turns:
            if length + question + answer + TEMPLATE > max_tokens:
                break
            length, trained = length + question + answer + TEMPLATE, trained + answer + 1
        found.append((length, trained))
    return found


def pairs(data: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, question and answer of each turn below a folder."""
    for row in json.loads((data / "llava_pretrain_2k/llava_format.json").read_text()):
        human, gpt = (turn["value"] for turn in row["conversations"][:2])
        yield "caption", human.replace("<image>", "").strip(), gpt
    files = {"daquar/index.jsonl": "daquar", "coco_mini/vqav2_human.jsonl": "coco"}
    files["coco_mini/templated_presence_count.jsonl"] = "coco"
    for name, kind in files.items():
        for row in map(json.loads, (data / name).open()):
            yield kind, row["question"], str(row["answer"])
    with gzip.open(data / "text/iiw_long_human.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            yield "description", "Describe the picture in detail.", row["human_IIW"]


def measure(data: Path, tokenizer: Any) -> dict[str, tuple[list[int], list[int]]]:
    """What `TEXTS` is, from the data."""
    lengths: dict[str, tuple[list[int], list[int]]] = {}
    for kind, *texts in pairs(data):
        for kept, text in zip(lengths.setdefault(kind, ([], [])), texts, strict=True):
            kept.append(len(tokenizer(text)["input_ids"]))

    def quantiles(own: list[int]) -> list[int]:
        found: list[int] = np.percentile(own, np.arange(5, 100, 10)).round().astype(int).tolist()
        return found

    return {kind: (quantiles(asked), quantiles(said)) for kind, (asked, said) in lengths.items()}


def main() -> None:
    """Print the mix, or measure it again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs=2, metavar=("DATA", "TOKENIZER"), help="two folders")
    parser.add_argument("--quick", action="store_true", help="changes nothing")
    measured = parser.parse_args().measure
    if measured:
        from transformers import AutoTokenizer

        found = measure(Path(measured[0]), AutoTokenizer.from_pretrained(measured[1]))
        print("\n".join(f"{kind}: {texts}" for kind, texts in found.items()))
        return
    lengths, trained = np.array(draw_lengths(10_000, 0, 2048)).T
    marks = {f"p{mark}": int(np.percentile(lengths, mark)) for mark in (5, 50, 95, 99)}
    share = round(float(trained.sum() / lengths.sum()), 4)
    mean = round(float(lengths.mean()), 1)
    print(json.dumps({"name": "conversation_mix", "tokens": mean, "trained": share, **marks}))


if __name__ == "__main__":
    main()
