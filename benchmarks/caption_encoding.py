"""Captions encoded per second: our length-sorted batches against random batches of 32.

Both arms encode the same captions with the same model and precision, one after the other in this
run, and tokenize once; the baseline pads each batch of 32 to its longest caption, as a plain loop
over `tokenizer(..., padding=True)` does. Half of the captions are short (COCO), half long (human
and model descriptions of ImageInWords), which is also the official recipe's mix of short and long.
The tokenizer is a byte-level BPE of 8,192 pieces learned from these texts (1.3 tokens a word, as
an LLM's has); the model is a small Llama, since the ratio is one of tokens.

    python benchmarks/caption_encoding.py [--quick]

The texts are read from the folder in LLM2CLIP_SHARED_DATA, or from ../shared/data.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from llm2clip_vlm.models.text.text_encoder import TextEncoder

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LLM2CLIP_SHARED_DATA", ROOT.parent / "shared" / "data")) / "text"
BASELINE_BATCH = 32
MAX_LENGTH_TOKENS = 512


def read(name: str, column: str) -> list[str]:
    """Texts of a gzipped JSONL file."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as handle:
        return [text for line in handle if (text := json.loads(line).get(column, "").strip())]


def captions(count: int) -> list[str]:
    """Half short, half long, in random order."""
    draw = random.Random(0)
    long = read("iiw_long_human.jsonl.gz", "human_IIW")
    long += read("iiw_long_model.jsonl.gz", "model_IIW_P5B")
    short = read("coco_val2017_captions.jsonl.gz", "caption")
    mixed = draw.sample(short, count // 2) + draw.sample(long, count - count // 2)
    draw.shuffle(mixed)
    return mixed


def build_encoder(texts: list[str], folder: Path) -> TextEncoder:
    """A Llama of 2 layers and 128 dimensions with a tokenizer learned from the texts."""
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
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TextEncoder.from_pretrained(folder, max_length_tokens=MAX_LENGTH_TOKENS)


def measure(arm: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Its result, wall seconds and CPU seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = arm()
    return result, time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print medians, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=2048, help="captions")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="512 captions, 2 repeats")
    options = parser.parse_args()
    count, repeats = (512, 2) if options.quick else (options.count, options.repeats)
    torch.set_num_threads(1)
    texts = captions(count)
    with tempfile.TemporaryDirectory() as folder:
        encoder = build_encoder(texts, Path(folder))

    processed = {"ours": 0, "baseline": 0}
    arm = "ours"

    def count_tokens(_: object, __: object, batch: dict[str, Tensor]) -> None:
        processed[arm] += batch["input_ids"].numel()

    encoder.register_forward_pre_hook(count_tokens, with_kwargs=True)

    def ours() -> Tensor:
        return encoder.encode(texts, batch_tokens=options.batch_tokens)

    def baseline() -> Tensor:
        starts = range(0, count, BASELINE_BATCH)
        parts = (texts[i : i + BASELINE_BATCH] for i in starts)
        return torch.cat([encoder.encode(part, batch_tokens=10**9) for part in parts])

    lengths = [len(ids) for ids in encoder.tokens(texts)]
    sample = random.Random(1).sample(range(count), 64)
    wall: dict[str, list[float]] = {"ours": [], "baseline": []}
    cpu: dict[str, list[float]] = {"ours": [], "baseline": []}
    error = 0.0
    for _ in range(repeats):
        results = []
        for arm, program in (("ours", ours), ("baseline", baseline)):
            result, wall_s, cpu_s = measure(program)
            results.append(result)
            wall[arm].append(wall_s)
            cpu[arm].append(cpu_s)
        error = max(error, float((results[0] - results[1]).abs().max()))
    seen = {name: value / repeats for name, value in processed.items()}
    alone = torch.cat([encoder.encode([texts[row]]) for row in sample])
    error_alone = float((results[0][sample] - alone).abs().max())

    ratios = [b / a for a, b in zip(cpu["ours"], cpu["baseline"], strict=True)]
    ratio = statistics.median(ratios)
    speed = {name: count / statistics.median(values) for name, values in cpu.items()}
    real = {name: sum(lengths) / value for name, value in seen.items()}
    for name in ("ours", "baseline"):
        print(
            f"{name:<9} {speed[name]:8.1f} captions/s (CPU), "
            f"{count / statistics.median(wall[name]):8.1f} (wall), {real[name]:.3f} real tokens"
        )
    print(f"ratio     {ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    summary = {
        "name": "caption_encoding",
        "ours": round(speed["ours"], 1),
        "baseline": round(speed["baseline"], 1),
        "ratio": round(ratio, 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "equal": error_alone <= 1e-5 and error <= 1e-5,
        "real_tokens": round(real["ours"], 4),
        "real_tokens_baseline": round(real["baseline"], 4),
        "wall_ratio": round(
            statistics.median(b / a for a, b in zip(wall["ours"], wall["baseline"], strict=True)),
            3,
        ),
        "max_difference_one_by_one": error_alone,
        "settings": {
            "unit": "captions per CPU second, 1 thread, fp32",
            "captions": count,
            "mix": "half COCO val2017, half ImageInWords (human and model), shuffled",
            "tokens": {
                "mean": round(statistics.mean(lengths), 1),
                "median": statistics.median(lengths),
                "longest": max(lengths),
            },
            "batch_tokens": options.batch_tokens,
            "model": "Llama, 2 layers, 128 dimensions",
            "repeats": repeats,
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
