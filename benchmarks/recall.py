"""Time and memory of retrieval metrics: ours against the one-hot, top-k way of CLIP_benchmark.

Both get the same unit embeddings of 5,000 images and 25,000 captions (width 512, paired so that
R@1 is about that of a CLIP on COCO) and give hit@1, 5 and 10 in both directions. The baseline is
CLIP_benchmark's way: all scores and a table of positive pairs, then for each k and each 64 queries
`topk`, `one_hot` over the gallery, and a sum over the products. Neither draws intervals here. Among
125 million cosines some are closer than 1e-6, which the library counts as ties, against the model;
equality is judged on 400 images, where there are none.

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

import torch
import torch.nn.functional as F
from arms import finish, ratio, take_turns
from torch import Tensor

from llm2clip_vlm.metrics.retrieval import retrieval_report

WIDTH, KS, BATCH, UNTIED = 512, (1, 5, 10), 64, 400
GOALS = {"ratio": 20.0, "memory_ratio": 10.0, "difference": 1e-9}

Recall = dict[str, float]


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


def one_hot(image: Tensor, text: Tensor, owners: Tensor) -> Recall:
    """The baseline."""
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owners] = True
    found = {}
    for way, table, pairs in (("i2t", scores.T, positive.T), ("t2i", scores, positive)):
        for k in KS:
            hits = torch.cat([hit(table[i : i + BATCH], pairs[i : i + BATCH], k)
                              for i in range(0, len(table), BATCH)])  # fmt: skip
            found[f"{way}@{k}"] = 100.0 * (hits > 0).double().mean().item()
    return found


def hit(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    """Share of each query's positives that are among its k best."""
    best = torch.topk(scores, k, dim=1).indices
    marked = F.one_hot(best, num_classes=scores.shape[1])
    return (marked * positive[:, None]).sum(dim=(1, 2)) / positive.sum(dim=1)


ARMS: dict[str, Callable[[Tensor, Tensor, Tensor], Recall]] = {"ours": ours, "one_hot": one_hot}


def difference(results: dict[str, Recall]) -> float:
    """Largest difference of the arms in per cent."""
    return max(abs(value - results["one_hot"][key]) for key, value in results["ours"].items())


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1,000 images, 3 repeats")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    images, repeats = (1000, 3) if args.quick else (args.images, args.repeats)
    if args.memory_of:
        measure_peak(args.memory_of, images)
        return
    peaks = {arm: peak_mib(arm, images) for arm in ARMS}
    small, inputs = embeds(20), embeds(images)
    results: dict[str, Recall] = {arm: function(*small) for arm, function in ARMS.items()}

    def timed(arm: str) -> None:
        results[arm] = ARMS[arm](*inputs)

    seconds = take_turns({arm: partial(timed, arm) for arm in ARMS}, repeats)
    same = embeds(UNTIED)
    untied = {arm: function(*same) for arm, function in ARMS.items()}
    for arm, values in seconds.items():
        cpu, wall = (statistics.median(values[kind]) for kind in ("cpu", "wall"))
        print(f"{arm:8s} {cpu:7.2f} s of CPU, {wall:.2f} s of wall, {peaks[arm]:.0f} MiB")
    print({key: round(value, 3) for key, value in results["ours"].items()})
    point = F.normalize(torch.ones(300, 8), dim=-1)
    constant = ours(point[:60], point, torch.arange(300) // 5)
    chance = {"i2t": 100.0 * 5 / 300, "t2i": 100.0 / 60}
    factor, spread = ratio(seconds, "one_hot", "ours")
    finish(
        "recall",
        ours=round(statistics.median(seconds["ours"]["cpu"]), 3),
        baseline=round(statistics.median(seconds["one_hot"]["cpu"]), 3),
        ratio=factor,
        spread=spread,
        wall_ratio=ratio(seconds, "one_hot", "ours", "wall")[0],
        memory_ratio=round(peaks["one_hot"] / peaks["ours"], 2),
        memory_mib={arm: round(value) for arm, value in peaks.items()},
        difference=difference(untied),
        difference_at_size=difference(results),
        ties_at_size=tie_rates(*inputs),
        constant_at_most_chance=all(constant[f"{way}@1"] <= chance[way] for way in chance),
        equal=difference(untied) <= GOALS["difference"] and not any(tie_rates(*same).values()),
        goals=GOALS,
        settings={
            "images": images,
            "texts": 5 * images,
            "width": WIDTH,
            "ks": KS,
            "repeats": repeats,
            "unit": "s of CPU",
            "baseline": "topk, one_hot and products, 64 queries at a time, as CLIP_benchmark does",
        },
    )


if __name__ == "__main__":
    main()
