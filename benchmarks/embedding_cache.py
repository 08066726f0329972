"""Random rows per second and bytes per row of the embedding cache, and whether it survives kill -9.

The baseline is the layout of LLM2CLIP's released code: float32 vectors as members of a tar beside
each image shard, streamed in file order by Python's `tarfile`, which is what its loader
(webdataset) does, grouped by key; of a sample's two captions one is drawn and decoded, as its
`get_text` does. That loader cannot read at random at all: it is given its best case, a sequential
read that the page cache serves, and none of webdataset's own overhead. Ours reads rows at random
from all shards. One row is one embedding that reaches training; `ratio_counting_unused` counts the
caption that the baseline reads over, too. By text the digest and the search are included, and
rows come as float32.

    python benchmarks/embedding_cache.py [--quick]

A baseline of our own making is printed beside it: the same tar with an index of offsets, which
neither the released code nor webdataset has.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from arms import finish, take_turns
from torch import Tensor

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.filling import FillingCache

DIM = 4096
COLUMNS = ("shortSV_captions", "longSV_captions")
SAMPLES_PER_TAR = 1000
BATCH = 512
FINGERPRINT = {"text_weights": "random"}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_official(folder: Path, samples: int) -> list[Path]:
    """Embeddings of captions, as the released code leaves them."""
    tars = []
    for start in range(0, samples, SAMPLES_PER_TAR):
        tars.append(folder / f"{start // SAMPLES_PER_TAR:05d}_text_embeddings.tar")
        with tarfile.open(tars[-1], "w") as embeddings:
            for sample in range(start, min(start + SAMPLES_PER_TAR, samples)):
                for name in COLUMNS:
                    content = vector(caption(sample, name)).tobytes()
                    add(embeddings, f"{sample:09d}.{name}", content)
    return tars


def vector(text: str) -> np.ndarray:
    """The embedding of a caption: not normalised, as in those files."""
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM, dtype=np.float32)


def caption(sample: int, column: str) -> str:
    """A caption of about 250 characters."""
    return f"{column} of picture {sample}: " + "red star and blue rings; " * 8 + "end"


def stream(tars: list[Path]) -> Iterator[np.ndarray]:
    """One embedding of each sample, in file order."""
    draw = random.Random(0)
    for path in tars:
        with path.open("rb") as handle, tarfile.open(fileobj=handle, mode="r|*") as tar:
            current, contents = "", []
            for member in tar:
                key = member.name.split(".", 1)[0]
                if key != current and contents:
                    yield np.frombuffer(draw.choice(contents), np.float32)
                    contents = []
                current = key
                part = tar.extractfile(member)
                assert part is not None
                contents.append(part.read())
            if contents:
                yield np.frombuffer(draw.choice(contents), np.float32)


def offsets(tars: list[Path]) -> list[tuple[Path, int]]:
    """Where every vector lies: an index that the official layout does not have."""
    found = []
    for path in tars:
        with tarfile.open(path) as tar:
            found += [(path, member.offset_data) for member in tar]
    return found


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


def main() -> None:
    """Print medians, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=12_000, help="of two captions each")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2,000 samples, 3 repeats, 2 kills")
    options = parser.parse_args()
    samples, repeats, kills = options.samples, options.repeats, options.kills
    if options.quick:
        samples, repeats, kills = 2000, 3, 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = write_official(folder, samples)
        texts = [caption(sample, column) for sample in range(samples) for column in COLUMNS]

        def encode(part: list[str]) -> Tensor:
            return torch.from_numpy(np.stack([vector(text) for text in part]))

        cache = EmbeddingCache.build(folder / "cache", texts, encode, FINGERPRINT, shard_rows=8000)
        rng = np.random.default_rng(1)
        numbers = rng.integers(0, len(cache), samples)
        batches = [numbers[i : i + BATCH] for i in range(0, samples, BATCH)]
        wanted = [texts[i] for i in rng.integers(0, len(texts), samples)]
        index = offsets(tars)
        handles = {path: path.open("rb", buffering=0) for path in tars}

        def indexed() -> None:
            for number in numbers.tolist():
                path, start = index[number]
                np.frombuffer(os.pread(handles[path].fileno(), 4 * DIM, start), np.float32)

        def cold() -> None:
            target = folder / "cold"
            filling = FillingCache(target, lambda part: vectors[: len(part)], FINGERPRINT, DIM)
            for start in range(0, 1024, BATCH):
                filling.lookup(texts[start : start + BATCH])
            filling.close()
            shutil.rmtree(target)

        vectors = torch.randn(BATCH, DIM)
        seconds = take_turns(
            {
                "rows": lambda: sum(len(cache.read(batch)) for batch in batches),
                "tar": lambda: sum(1 for _ in stream(tars)),
                "by_text": lambda: sum(
                    len(cache.lookup(wanted[i : i + BATCH])) for i in range(0, samples, BATCH)
                ),
                "indexed_tar": indexed,
                "cold": cold,
            },
            repeats,
        )
        for handle in handles.values():
            handle.close()
        first = torch.from_numpy(np.stack(list(stream(tars[:1]))))  # one of each sample's two
        rows = cache.lookup(texts[: 2 * len(first)]).unflatten(0, (-1, 2))
        cosine = float(torch.cosine_similarity(rows, first[:, None], dim=-1).max(1).values.min())
        bytes_ours = sum(each.path.stat().st_size for each in cache.shards) / len(cache)
        bytes_theirs = sum(path.stat().st_size for path in tars) / len(texts)
        survived = survives(folder, kills)

    rate = {name: samples / statistics.median(arm["cpu"]) for name, arm in seconds.items()}
    rate["cold"] = 1024 / statistics.median(seconds["cold"]["cpu"])
    for name, value in rate.items():
        wall = statistics.median(seconds[name]["wall"])
        print(f"{name:<12} {value:12.0f} rows/s (CPU), {wall:.3f} s wall a round")
    rounds = [t / r for t, r in zip(seconds["tar"]["cpu"], seconds["rows"]["cpu"], strict=True)]
    print(f"bytes a row  {bytes_ours:.0f} against {bytes_theirs:.0f}; {kills} kills: {survived}")
    finish(
        "embedding_cache",
        ours=round(rate["rows"]),
        baseline=round(rate["tar"]),
        ratio=round(rate["rows"] / rate["tar"], 2),
        spread=[round(min(rounds), 2), round(max(rounds), 2)],
        equal=survived and cosine >= 0.99999,
        bytes_ratio=round(bytes_ours / bytes_theirs, 4),
        wall_ratio=round(
            statistics.median(seconds["tar"]["wall"]) / statistics.median(seconds["rows"]["wall"]),
            2,
        ),
        ratio_counting_unused=round(rate["rows"] / rate["tar"] / 2, 2),
        by_text_rows_per_s=round(rate["by_text"]),
        indexed_tar_rows_per_s=round(rate["indexed_tar"]),
        write_through_rows_per_s=round(rate["cold"]),
        least_cosine=round(cosine, 8),
        byte_identical_after_kills=survived,
        settings={
            "unit": "rows per CPU second, page cache warm",
            "dim": DIM,
            "rows": 2 * samples,
            "shards": len(cache.shards),
            "batch": BATCH,
            "kills": kills,
            "repeats": repeats,
        },
    )


if __name__ == "__main__":
    main()
