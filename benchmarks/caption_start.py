"""What a start of stages 1 and 2a costs as the captions grow: CPU time and memory of a process.

Synthetic records with two captions each, as in `start_up.py`. A start of stage 1 reads the captions
and their token ids, counts the different ones, draws an epoch's order and makes the first batch; a
start of stage 2a reads the captions, sees that the cache holds them all, and reads a thousand for
its last comparison. *First* is where there is no table yet, *warm* each later start. Memory is what
the process holds for itself alone (`RssAnon`) beyond the imports: at its end, and at its most.

With `--shards`, instead: CPU and wall time of four loader workers, which read rows of a cache of so
many shards (33 MB each) at random, until each worker has had rows of all of them.

    python benchmarks/caption_start.py [--captions 100000 1000000] [--shards 32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from arms import finish
from start_up import REPOSITORY, write_data

BATCH = 64


def own_mib() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def stage1(folder: Path) -> Any:
    """From the recipe's source to the first batch."""
    from torch.utils.data import DataLoader

    from llm2clip_vlm.data.reading.bad_records import BadRecords
    from llm2clip_vlm.data.text.captions import (
        CaptionPairs,
        EpochSampler,
        UniqueTexts,
        read_captions,
    )
    from llm2clip_vlm.models.loading import read_tokenizer
    from llm2clip_vlm.models.text.text_encoder_settings import TextEncoderSettings
    from llm2clip_vlm.recipe.base import CaptionPairSource
    from llm2clip_vlm.training.text.text_trainer import PairCollator

    tokens = partial(TextEncoderSettings().tokens, read_tokenizer(folder / "llm"))
    rule = CaptionPairSource(path=str(folder / "pairs.jsonl"))

    def start() -> Any:
        table = read_captions(rule, BadRecords(), min_captions=2, tokens=tokens)
        texts = len(UniqueTexts([table]))
        pairs = CaptionPairs([table], [rule], seed=0)
        loader = DataLoader(
            pairs, BATCH, sampler=EpochSampler(pairs), collate_fn=PairCollator(tokens())
        )
        batches = iter(loader)
        assert next(batches)["texts"].shape == (BATCH, 2)
        return texts, table, pairs, batches

    return start


def stage2a(folder: Path) -> Any:
    """From the recipe's source to the end, where the cache holds all captions."""
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.data.reading.bad_records import BadRecords
    from llm2clip_vlm.data.text.captions import UniqueTexts, read_captions
    from llm2clip_vlm.recipe.base import ImageTextSource

    source = ImageTextSource(path=str(folder / "pairs.jsonl"))

    def encode(texts: list[str]) -> Any:
        raise AssertionError(f"{len(texts)} captions are not in the cache")

    def start() -> Any:
        texts = UniqueTexts([read_captions(source, BadRecords())])
        cache = EmbeddingCache.build(folder / "cache", texts, encode, {"model": "none"})
        some = [*islice(texts, 1024)]
        assert min(cache.find(some)) >= 0
        return len(texts), texts, cache

    return start


def measure(stage: str, folder: Path) -> None:
    """One start; prints its costs."""
    import torch

    from llm2clip_vlm.data.reading import table

    table.TABLE_FILE_FROM_BYTES = 0  # the small sizes take the way of the large ones
    torch.set_num_threads(1)
    start = {"stage1": stage1, "stage2a": stage2a}[stage](folder)
    most, running = [own_mib()], True

    def watch() -> None:
        while running:
            most.append(own_mib())
            time.sleep(0.01)

    thread = Thread(target=watch)
    thread.start()
    began = time.process_time()
    held = start()
    seconds, running = time.process_time() - began, False
    thread.join()
    cost = {"captions": held[0], "seconds": seconds, "mib": own_mib() - most[0]}
    print(json.dumps(cost | {"most_mib": max(most) - most[0]}), flush=True)


class Rows:
    """A data set of a cache's rows."""

    def __init__(self, folder: Path) -> None:
        from llm2clip_vlm.data.cache.embeddings import EmbeddingCache

        self.cache = EmbeddingCache.open(folder)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, numbers: list[int]) -> int:
        return len(self.cache.read(np.array(numbers)))


def first_reads(folder: Path, count: int) -> dict[str, float]:
    """Seconds until four workers have read rows of all shards, and again."""
    from torch.utils.data import DataLoader

    from llm2clip_vlm.data.cache import shards
    from llm2clip_vlm.data.text.text_keys import digests_of

    header = shards.Header(dim=1024, fingerprint={"model": "none"})
    shards.write_header(folder, header)
    rows = np.full((16384, 1024), 1024**-0.5, np.float16)
    for number in range(count):
        keys = digests_of([f"{number} {row}" for row in range(len(rows))])
        shards.write_shard(folder, header, keys, rows)
    data: Any = Rows(folder)
    found: dict[str, float] = {}
    for name in ("first", "again"):
        loader = DataLoader(data, 512, shuffle=True, num_workers=4, collate_fn=int)
        wall, cpu = time.monotonic(), sum(os.times()[2:4])
        batches = iter(loader)
        assert [next(batches) for _ in range(16)] == [512] * 16
        del batches, loader
        found[f"wall_s_{name}"] = round(time.monotonic() - wall, 2)
        found[f"cpu_s_{name}"] = round(sum(os.times()[2:4]) - cpu, 2)
    return found


def main() -> None:
    """Print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="20,000 and 60,000 captions")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int)
    options = parser.parse_args()
    if options.shards:
        with tempfile.TemporaryDirectory() as name:
            found = first_reads(Path(name), options.shards)
        finish("caption_start", **found, settings={"shards": options.shards, "workers": 4})
        return
    if options.start:
        measure(options.start[0], Path(options.start[1]))
        return
    sizes = [20_000, 60_000] if options.quick else options.captions
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, list[list[float]]] = {"stage1": [], "stage2a": []}
    print(f"{'':8} {'captions':>10} {'first s':>8} {'warm s':>8} {'warm MiB':>9} {'at most':>8}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_data(folder := Path(name) / "data", size // 2)
            llm = [sys.executable, "-m", "tests.tiny", "llm", str(folder / "llm")]
            subprocess.run(llm, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
            for stage, found in rows.items():
                starts = []
                for _ in range(3):  # the second of stage 2a sorts the cache's keys no more
                    command = [sys.executable, __file__, "--start", stage, str(folder)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    starts.append(json.loads(done.stdout.splitlines()[-1]))
                first, warm = starts[0], starts[-1]
                assert warm["captions"] == size
                found.append([size, first["seconds"], warm["seconds"]])
                found[-1] += [warm["mib"], warm["most_mib"]]
                print("{:8} {:10} {:8.2f} {:8.2f} {:9.1f} {:8.1f}".format(stage, *found[-1]))
    grown = {
        stage: [round((b - a) / (n - m) * 1e6, 2) for a, b in zip(least, most, strict=True)]
        for stage, ((m, *least), *_, (n, *most)) in rows.items()
    }
    names = ("seconds_first", "seconds", "mib", "mib_at_most")
    finish(
        "caption_start",
        **{
            f"{name}_per_million_{stage}": value
            for stage, values in grown.items()
            for name, value in zip(names, values, strict=True)
        },
        settings={"sizes": sizes, "limit_mib": 50},
    )


if __name__ == "__main__":
    main()
