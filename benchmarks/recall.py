"""Retrieval metrics: ours against clip_benchmark's own, against ten lines of torch, and the limit.

All arms get the same unit embeddings of 5,000 images and 25,000 captions (width 512, paired so that
R@1 is about that of a CLIP on COCO) and give hit@1, 5 and 10 in both directions:

- `clip_benchmark.metrics.zeroshot_retrieval.evaluate`, as installed, at its command's batch of 64,
  with a model whose encoders hand out the prepared embeddings;
- ten lines of torch: chunks of the product, ranks by comparison (`torch_lines`);
- the limit: the matrix product alone, by numpy, which is faster than torch's here.

Ours also counts ties within 1e-6 of a cosine, against the model, which no other arm does; it draws
no intervals here. Equality is judged on 400 images, where there are no ties, and means: no query
apart. `limit_ratio` is our time over that of the product.

    python benchmarks/recall.py [--quick]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from arms import finish, ratio, take_turns, use_peers
from torch import Tensor

from llm2clip_vlm.metrics.retrieval import retrieval_report

WIDTH, KS, BATCH, UNTIED = 512, (1, 5, 10), 64, 400
CHUNK_IMAGES = 320  # the fastest of 50, 150, 320 and 500 here
GOALS = {"ratio": 20.0, "ratio_torch": 1.5, "limit_ratio": 1.5, "memory_ratio": 10.0}

Recall = dict[str, float]
ROOM: dict[str, Any] = {}


def embeds(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, five captions of each, and the image of each caption."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(images, WIDTH), dim=-1)
    owners = torch.arange(5 * images) // 5
    text = F.normalize(0.14 * image[owners] + F.normalize(torch.randn(5 * images, WIDTH)), dim=-1)
    return image, text, owners


def ours(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """The library's."""
    found = retrieval_report(image, {"all": text}, {"all": owners.tolist()}, bootstrap=0)["all"]
    return {f"{way}@{k}": found[way][f"r{k}"] for way in ("i2t", "t2i") for k in KS}


class Prepared:
    """A model for clip_benchmark whose embeddings are there already."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def encode_image(self, images: Tensor) -> Tensor:
        """Args: images: Their embeddings."""
        return images

    def encode_text(self, numbers: Tensor) -> Tensor:
        """Args: numbers: Rows of the captions."""
        return self.text[numbers]


def clip_benchmark(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """The peer's."""
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    captions = [[str(5 * i + j) for j in range(5)] for i in range(len(image))]
    batches = [(image[i : i + BATCH], captions[i : i + BATCH]) for i in range(0, len(image), BATCH)]

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([int(text) for text in texts])

    found: Any = evaluate(
        Prepared(text), batches, tokenizer, "cpu", amp=False, recall_k_list=list(KS)
    )
    names = {"i2t": "text_retrieval_recall", "t2i": "image_retrieval_recall"}
    return {f"{way}@{k}": 100 * found[f"{name}@{k}"] for way, name in names.items() for k in KS}


def torch_lines(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """The obvious fast way: a query's rank is the number of items above its best positive."""
    own = (image[owners] * text).sum(1)
    best = torch.full((len(image),), -1.0).scatter_reduce(0, owners, own, "amax")
    of_images, of_texts = [], torch.zeros(len(text), dtype=torch.int64)
    for i in range(0, len(image), CHUNK_IMAGES):
        scores = image[i : i + CHUNK_IMAGES] @ text.T
        of_images.append((scores > best[i : i + CHUNK_IMAGES, None] + 1e-7).sum(1))
        of_texts += (scores > own + 1e-7).sum(0)  # the product's last bit differs from the sum's
    ranks = {"i2t": torch.cat(of_images), "t2i": of_texts}
    return {f"{w}@{k}": 100 * (r < k).double().mean().item() for w, r in ranks.items() for k in KS}


def product(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """The limit: all scores, written to memory that is there, and nothing done with them."""
    size = (len(image), len(text))
    if ROOM.get("size") != size:
        ROOM.update(size=size, scores=np.zeros(size, np.float32))
    np.matmul(image.numpy(), text.numpy().T, out=ROOM["scores"])
    return {}


ARMS: dict[str, Callable[[Tensor, Tensor, Tensor], Recall]] = {
    "ours": ours,
    "clip_benchmark": clip_benchmark,
    "torch_lines": torch_lines,
    "product": product,
}
PEERS = ("clip_benchmark", "torch_lines")


def difference(results: dict[str, Recall]) -> float:
    """Largest difference of the peers from ours in per cent."""
    mine = results["ours"]
    return max(abs(value - mine[key]) for peer in PEERS for key, value in results[peer].items())


def tie_rates(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """Share of queries that tie within the library's tolerance, 1e-6 of a cosine."""
    found = retrieval_report(image, {"all": text}, {"all": owners.tolist()}, bootstrap=0)["all"]
    return {way: found[way]["tie_rate"] for way in ("i2t", "t2i")}


def peak_mib(arm: str, images: int) -> float:
    """Memory that the arm needs on top of its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--images", str(images), "--memory-of", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_peak(arm: str, images: int) -> None:
    """Prints the growth of this process's peak in MiB."""
    ARMS[arm](*embeds(20))  # what the first call loads is not the arm's
    inputs = embeds(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ARMS[arm](*inputs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Print time, memory and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="1,000 images, 3 rounds")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    use_peers("clip_benchmark.metrics.zeroshot_retrieval")
    images, repeats = (1000, 3) if args.quick else (args.images, args.repeats)
    if args.memory_of:
        measure_peak(args.memory_of, images)
        return
    peaks = {arm: peak_mib(arm, images) for arm in ("ours", *PEERS)}
    inputs, same = embeds(images), embeds(UNTIED)
    untied = {arm: function(*same) for arm, function in ARMS.items()}
    results: dict[str, Recall] = {}

    def timed(arm: str) -> None:
        results[arm] = ARMS[arm](*inputs)

    timed("product")
    seconds = take_turns({arm: partial(timed, arm) for arm in ARMS}, repeats)
    for arm, values in seconds.items():
        cpu, wall = (statistics.median(values[kind]) for kind in ("cpu", "wall"))
        print(f"{arm:14s} {cpu:7.2f} s of CPU, {wall:.2f} s of wall, {peaks.get(arm, 0):.0f} MiB")
    print({key: round(value, 3) for key, value in results["ours"].items()})
    point = F.normalize(torch.ones(300, 8), dim=-1)
    constant = ours(point[:60], point, torch.arange(300) // 5)
    chance = {"i2t": 100.0 * 5 / 300, "t2i": 100.0 / 60}
    factor, spread = ratio(seconds, "clip_benchmark", "ours")
    of_torch, spread_torch = ratio(seconds, "torch_lines", "ours")
    of_limit, spread_limit = ratio(seconds, "ours", "product")
    one_hit = 100.0 / (5 * UNTIED)
    finish(
        "recall",
        ours=round(statistics.median(seconds["ours"]["cpu"]), 3),
        baseline=round(statistics.median(seconds["clip_benchmark"]["cpu"]), 3),
        ratio=factor,
        spread=spread,
        ratio_torch=of_torch,
        spread_torch=spread_torch,
        limit_ratio=of_limit,
        spread_limit=spread_limit,
        memory_ratio=round(peaks["clip_benchmark"] / peaks["ours"], 2),
        memory_mib={arm: round(value) for arm, value in peaks.items()},
        difference=difference(untied),
        difference_at_size=difference(results),
        ties_at_size=tie_rates(*inputs),
        constant_at_most_chance=all(constant[f"{way}@1"] <= chance[way] for way in chance),
        equal=difference(untied) < one_hit / 2 and not any(tie_rates(*same).values()),
        goals=GOALS,
        settings={
            "images": images,
            "texts": 5 * images,
            "width": WIDTH,
            "ks": KS,
            "repeats": repeats,
            "unit": "s of CPU",
            "clip_benchmark_batch": BATCH,
            "limit": "our time over that of the matrix product alone (numpy)",
            "equal": f"hit rates of {UNTIED} images without ties",
        },
    )


if __name__ == "__main__":
    main()
