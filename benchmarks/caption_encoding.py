"""Captions encoded per second: ours against `SentenceTransformer.encode` of the same encoder.

The peer opens our export; it sorts by length in characters and pads batches of 32, its default
(`ratio`), or of 8, which are its fastest with this small model (`ratio_batch_8`). Both tokenize in
the time that is measured, and their vectors must be equal. Half of the captions are short (COCO),
half long (human and model descriptions of ImageInWords), which is also the official recipe's mix.
The tokenizer is a byte-level BPE of 8,192 pieces learned from these texts (1.3 tokens a word, as an
LLM's has); the model is a small Llama, since the ratio is one of tokens. `limit_ratio` is the share
of real tokens in what ours computes, `ratio_tokens` the peer's tokens, padding counted, over ours.

    python benchmarks/caption_encoding.py [--quick]

The texts are read from the folder in LLM2CLIP_SHARED_DATA, or from ../shared/data; without it,
random words of like lengths are drawn, and `settings` say so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from arms import finish, ratio, take_turns
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.training.text.embedder_export import export_sentence_transformers

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LLM2CLIP_SHARED_DATA", ROOT.parent / "shared" / "data")) / "text"
MAX_LENGTH_TOKENS = 512
MODEL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GOALS = {"ratio": 1.7, "limit_ratio": 0.98}


def read(name: str, column: str, mean_words: int) -> list[str]:
    """Texts of a gzipped JSONL file; where it is absent, random words of about such lengths."""
    if not (DATA / name).is_file():
        draw = random.Random(name)
        lengths = [max(3, round(draw.lognormvariate(0, 0.4) * mean_words)) for _ in range(4096)]
        return [" ".join(f"w{draw.randrange(2000)}" for _ in range(n)) for n in lengths]
    with gzip.open(DATA / name, "rt", encoding="utf-8") as handle:
        return [text for line in handle if (text := json.loads(line).get(column, "").strip())]


def short_texts(count: int) -> list[str]:
    """Different short captions, in random order."""
    texts = sorted(set(read("coco_val2017_captions.jsonl.gz", "caption", 10)))
    return random.Random(0).sample(texts, count)


def long_texts(count: int) -> list[str]:
    """Different long captions, in random order."""
    texts = read("iiw_long_human.jsonl.gz", "human_IIW", 200)
    texts += read("iiw_long_model.jsonl.gz", "model_IIW_P5B", 150)
    return random.Random(0).sample(sorted(set(texts)), count)


def build_encoder(texts: list[str], folder: Path) -> TextEncoder:
    """A small Llama with a tokenizer learned from the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=1024, **MODEL)
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TextEncoder.from_pretrained(folder, max_length_tokens=MAX_LENGTH_TOKENS)


def main() -> None:
    """Print captions a second of both, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--count", type=int, default=2048, help="captions")
    parser.add_argument("--batch-tokens", type=int, help="of ours; default: that of `encode`")
    parser.add_argument("--quick", action="store_true", help="512 captions, 3 rounds")
    options = parser.parse_args()
    count, rounds = (512, 3) if options.quick else (options.count, options.rounds)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    texts = short_texts(count // 2) + long_texts(count // 2)
    random.Random(1).shuffle(texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = build_encoder(texts, folder / "llm")
        encoder.save_pretrained(folder / "encoder")
        export_sentence_transformers(encoder, folder / "encoder", folder / "export")
        peer = SentenceTransformer(str(folder / "export"), device="cpu")
    own = {} if options.batch_tokens is None else {"batch_tokens": options.batch_tokens}
    computed: list[tuple[int, int]] = []

    def look(_: object, __: object, batch: dict[str, Tensor]) -> None:
        computed.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))

    def ours() -> Tensor:
        return encoder.encode(texts, **own)

    def theirs(batch: int = 32) -> Tensor:
        return peer.encode(texts, batch_size=batch, convert_to_tensor=True)

    theirs_computed = 0

    def look_there(_: object, given: tuple[dict[str, Tensor], ...]) -> None:
        nonlocal theirs_computed
        theirs_computed += given[0]["input_ids"].numel()

    watches = [
        encoder.register_forward_pre_hook(look, with_kwargs=True),
        peer[0].register_forward_pre_hook(look_there),
    ]
    error = float((ours() - theirs()).abs().max())
    for watch in watches:
        watch.remove()
    padded = sum(tokens for _, tokens in computed)
    real = sum(tokens for tokens, _ in computed) / padded
    seconds = take_turns({"theirs": theirs, "batch_8": lambda: theirs(8), "ours": ours}, rounds)
    speed = {arm: count / statistics.median(found["cpu"]) for arm, found in seconds.items()}
    faster, spread = ratio(seconds, "theirs", "ours")
    faster_8, spread_8 = ratio(seconds, "batch_8", "ours")
    for arm, value in speed.items():
        print(f"{arm:7s} {value:8.1f} captions/s of CPU")
    print(
        f"ratio {faster} {spread}, to batches of 8 {faster_8}; {real:.4f} real tokens in "
        f"{len(computed)} batches"
    )
    lengths = [len(ids) for ids in encoder.tokens(texts)]
    settings: dict[str, Any] = {
        "unit": "captions per CPU second; limit_ratio: share of real tokens",
        "captions": count,
        "texts": "COCO and ImageInWords" if DATA.is_dir() else "drawn lengths",
        "mean_tokens": round(statistics.mean(lengths), 1),
        "longest": max(lengths),
        "batches": len(computed),
        "batch_tokens": options.batch_tokens or "default",
        "model": MODEL,
        "dtype": "float32",
        "rounds": rounds,
        "sentence_transformers": sentence_transformers.__version__,
    }
    finish(
        "caption_encoding",
        ours=round(speed["ours"], 1),
        baseline=round(speed["theirs"], 1),
        ratio=faster,
        spread=spread,
        ratio_batch_8=faster_8,
        spread_batch_8=spread_8,
        equal=error <= 1e-5,
        limit_ratio=round(real, 4),
        ratio_tokens=round(theirs_computed / padded, 4),
        max_difference=error,
        goals=GOALS,
        settings=settings,
    )


if __name__ == "__main__":
    main()
