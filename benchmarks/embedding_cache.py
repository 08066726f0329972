"""Text embeddings by text, what training asks for, and whether the cache survives kill -9.

`ratio` is against lmdb, the store that people take for this: keyed by the same SHA-256, read in one
transaction a batch, without copying (`buffers=True`), rows joined once as ours are (`ratio_stack`:
by `numpy.stack`, as most people would). `ratio_dict` is against a
dict from text to row and a numpy memmap, which holds all texts in the memory of each process and
notices nothing. Both store float32, so that they convert nothing, and take twice the bytes; `equal`
compares the rows with both to float16's rounding. Ours, too, gives float32, has hashed each shard
and looked at each row's norm before (once, as in training), and fails by name where a text is
missing. `limit_ratio` is our time over that of copying as many float32 rows from one array.
All read a batch's rows at random; the page cache is warm.

    python benchmarks/embedding_cache.py [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import finish, ratio, take_turns, use_peers
from torch import Tensor

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache, Encode
from llm2clip_vlm.data.cache.filling import FillingCache

DIM = 4096
BATCH = 512
FINGERPRINT = {"text_weights": "random"}


def caption(number: int) -> str:
    """A caption of about 250 characters."""
    return f"picture {number}: " + "red star and blue rings; " * 9 + "end"


def slow_encode(texts: list[str]) -> Tensor:
    """Vectors that depend on the text alone."""
    time.sleep(0.002)
    seeds = [int.from_bytes(text.encode()[-4:], "big") for text in texts]
    return torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(s)) for s in seeds])


def survives(folder: Path, kills: int) -> bool:
    """Whether a build killed at random moments ends with the bytes of one that was not."""
    texts = [f"caption {i:05d}" for i in range(600)]

    def build(target: Path, kill_after_s: float | None) -> bool:
        child = os.fork()
        if not child:
            EmbeddingCache.build(target, texts, slow_encode, FINGERPRINT, shard_rows=20)
            os._exit(0)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0

    started = time.monotonic()
    build(folder / "whole", None)
    whole_s = time.monotonic() - started
    draw = random.Random(0)
    done = 0
    while done < kills:
        if build(folder / "killed", draw.uniform(0, whole_s / 2)):
            shutil.rmtree(folder / "killed")
        else:
            done += 1
    build(folder / "killed", None)
    ends = [
        {path.name: path.read_bytes() for path in (folder / name).glob("[!.]*")}
        for name in ("whole", "killed")
    ]
    return ends[0] == ends[1]


def stored(folder: Path, texts: list[str], rows: Tensor) -> Any:
    """An lmdb environment with all rows as float32."""
    use_peers("lmdb")
    store = importlib.import_module("lmdb").open(str(folder), map_size=2**35)
    with store.begin(write=True) as transaction:
        for text, row in zip(texts, rows.numpy(), strict=True):
            transaction.put(hashlib.sha256(text.encode()).digest(), row.tobytes())
    return store


def run(read: Callable[[Any], object], batches: list[Any]) -> None:
    """Reads each batch, and lets go of it, as training does."""
    for batch in batches:
        read(batch)


def fill(target: Path, texts: list[str], encode: Encode) -> None:
    """A cold cache that is filled as it is asked, and removed."""
    filling = FillingCache(target, encode, FINGERPRINT, DIM)
    for start in range(0, len(texts), BATCH):
        filling.lookup(texts[start : start + BATCH])
    filling.close()
    shutil.rmtree(target)


def main() -> None:
    """Print medians, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="4,000 rows, 3 repeats, 2 kills")
    options = parser.parse_args()
    count, repeats, kills = options.rows, options.repeats, options.kills
    if options.quick:
        count, repeats, kills = 4000, 3, 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [caption(number) for number in range(count)]
        place = {text: row for row, text in enumerate(texts)}
        rows = torch.nn.functional.normalize(
            torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))
        )

        def encode(part: list[str]) -> Tensor:
            return rows[[place[text] for text in part]]

        cache = EmbeddingCache.build(folder / "cache", texts, encode, FINGERPRINT, shard_rows=1500)
        np.save(folder / "rows.npy", rows.numpy())
        mapped = np.asarray(np.load(folder / "rows.npy", mmap_mode="r"))
        store = stored(folder / "lmdb", texts, rows)
        drawn = np.random.default_rng(1).integers(0, count, (count // BATCH, BATCH))
        wanted = [[texts[number] for number in batch] for batch in drawn.tolist()]

        def by_lmdb(batch: list[str]) -> Tensor:
            with store.begin(buffers=True) as transaction:
                keys = [hashlib.sha256(text.encode()).digest() for text in batch]
                flat = bytearray().join([transaction.get(key) for key in keys])
            return torch.frombuffer(flat, dtype=torch.float32).view(-1, DIM)

        def by_stack(batch: list[str]) -> Tensor:
            with store.begin(buffers=True) as transaction:
                keys = [hashlib.sha256(text.encode()).digest() for text in batch]
                each = [np.frombuffer(transaction.get(key), np.float32) for key in keys]
                return torch.from_numpy(np.stack(each))

        def by_dict(batch: list[str]) -> Tensor:
            return torch.from_numpy(mapped[[place[text] for text in batch]])

        equal = all(
            torch.allclose(cache.lookup(batch), other(batch), atol=1e-3, rtol=0)
            for batch in wanted[:2]
            for other in (by_lmdb, by_stack, by_dict)
        )

        found = [cache.find(batch) for batch in wanted]
        copied = torch.empty(BATCH, DIM)
        arms = {
            "lookup": lambda: run(cache.lookup, wanted),
            "lmdb": lambda: run(by_lmdb, wanted),
            "lmdb_stack": lambda: run(by_stack, wanted),
            "dict": lambda: run(by_dict, wanted),
            "by_number": lambda: run(cache.read, found),
            "copy": lambda: run(lambda _: copied.copy_(rows[:BATCH]), wanted),
            "write_through": lambda: fill(folder / "cold", texts[:1024], encode),
        }
        for arm in arms.values():
            arm()
        seconds = take_turns(arms, repeats)
        bytes_ours = sum(each.path.stat().st_size for each in cache.shards) / count
        bytes_lmdb = (folder / "lmdb" / "data.mdb").stat().st_size / count
        survived = survives(folder, kills)
        store.close()

    served = dict.fromkeys(arms, drawn.size) | {"write_through": 1024}
    rate = {name: served[name] / statistics.median(arm["cpu"]) for name, arm in seconds.items()}
    for name, value in rate.items():
        print(f"{name:<14} {value:12.0f} rows/s (CPU), {1e6 / value:6.2f} us a row")
    print(f"bytes a row    {bytes_ours:.0f}, lmdb {bytes_lmdb:.0f}; {kills} kills: {survived}")
    value, spread = ratio(seconds, "lmdb", "lookup")
    finish(
        "embedding_cache",
        ours=round(rate["lookup"]),
        baseline=round(rate["lmdb"]),
        ratio=value,
        spread=spread,
        ratio_stack=ratio(seconds, "lmdb_stack", "lookup")[0],
        ratio_dict=ratio(seconds, "dict", "lookup")[0],
        equal=equal and survived,
        limit_ratio=ratio(seconds, "lookup", "copy")[0],
        bytes_ratio=round(bytes_ours / bytes_lmdb, 4),
        by_number_rows_per_s=round(rate["by_number"]),
        write_through_rows_per_s=round(rate["write_through"]),
        byte_identical_after_kills=survived,
        settings={
            "unit": "rows per CPU second, page cache warm",
            "dim": DIM,
            "rows": count,
            "shards": len(cache.shards),
            "batch": BATCH,
            "kills": kills,
            "repeats": repeats,
            "limit": "copying as many float32 rows",
        },
    )


if __name__ == "__main__":
    main()
