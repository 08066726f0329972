"""Write-through: what is lacking is encoded once, kept, and found again to the bit."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip_vlm import embed
from llm2clip_vlm.data.cache import shards
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.filling import FillingCache
from llm2clip_vlm.data.cache.shards import CacheError, seal
from llm2clip_vlm.runs.ownership import OwnershipError
from tests.unit.test_embedding_cache import FINGERPRINT, TEXTS, Encoder, content


class Company(Encoder):
    """An encoder whose vectors depend a little on what is encoded beside them, as real ones do."""

    def __call__(self, texts: list[str]) -> Tensor:
        return super().__call__(texts) + 0.01 * len(texts)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def opened(path: Path, encoder: Encoder, rank: int = 0, shard_rows: int = 100) -> FillingCache:
    return FillingCache(path, encoder, FINGERPRINT, 4, rank=rank, shard_rows=shard_rows)


@contextmanager
def another_run(folder: Path) -> Iterator[None]:
    """A process that fills a cache, until it is killed."""
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        held = opened(folder, Encoder())
        os.write(says, b"!")
        time.sleep(60)
        held.close()
        os._exit(0)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_cold_cache_encodes_each_text_once(tmp_path: Path) -> None:
    encoder = Encoder()
    cache = opened(tmp_path, encoder)
    found = cache.lookup([TEXTS[1], TEXTS[0], TEXTS[1]])
    assert encoder.asked == [TEXTS[1], TEXTS[0]]
    assert torch.equal(found[0], found[2])
    assert torch.equal(cache.lookup(TEXTS[:3])[:2], found[[1, 0]])
    assert encoder.asked == [TEXTS[1], TEXTS[0], TEXTS[2]]
    cache.set_epoch(1)
    again = cache.lookup(TEXTS[:3])
    assert torch.equal(again[:2], found[[1, 0]])
    assert (len(encoder.asked), cache.encoded) == (3, 3)
    assert cache.lookup([]).shape == (0, 4)
    reference = EmbeddingCache.build(tmp_path / "built", TEXTS, Encoder(), FINGERPRINT)
    assert torch.equal(reference.lookup(TEXTS[:3]), again)


def test_a_warm_cache_is_only_read(tmp_path: Path) -> None:
    built = EmbeddingCache.build(tmp_path, TEXTS, Encoder(), FINGERPRINT, shard_rows=3)
    encoder = Encoder()
    cache = opened(tmp_path, encoder)
    assert torch.equal(cache.lookup([*TEXTS, "new"])[:10], built.lookup(TEXTS))
    assert encoder.asked == ["new"]


def test_ranks_see_each_others_rows_from_the_next_epoch(tmp_path: Path) -> None:
    encoders = [Company(), Company()]
    ranks = [opened(tmp_path, encoders[i], i) for i in range(2)]
    first = ranks[0].lookup(TEXTS[:4])
    other = ranks[1].lookup([TEXTS[3], "mine"])
    assert encoders[1].asked == [TEXTS[3], "mine"]
    for cache in ranks:
        cache.write()
    for cache in ranks:
        cache.set_epoch(1)
    assert torch.equal(ranks[0].lookup(["mine"])[0], other[1])
    assert torch.equal(ranks[1].lookup([TEXTS[3]])[0], first[3])  # the lower rank's row counts
    assert not torch.equal(first[3], other[0])
    assert [len(encoder.asked) for encoder in encoders] == [4, 2]


def test_sealing_turns_parts_into_shards(tmp_path: Path) -> None:
    EmbeddingCache.build(tmp_path, TEXTS[:3], Encoder(), FINGERPRINT, shard_rows=3)
    caches = [opened(tmp_path, Company(), i) for i in range(2)]
    wanted = caches[0].lookup(TEXTS)
    caches[1].lookup([TEXTS[9], "more"])
    for cache in caches:
        cache.close()
    with another_run(tmp_path), pytest.raises(OwnershipError, match="filling an embedding cache"):
        seal(tmp_path)  # nothing is taken from a run
    assert len(parts(tmp_path)) == 2
    assert len(EmbeddingCache.open(tmp_path)) == 12  # parts are read as they are, twice "text 9"
    seal(tmp_path)
    assert [name.partition("-")[0] for name in content(tmp_path)] == ["header.json", *3 * ["shard"]]
    sealed = EmbeddingCache.open(tmp_path)
    assert len(sealed) == 12
    sealed.verify()
    assert torch.equal(sealed.lookup(TEXTS[:9]), wanted[:9])


def test_a_cache_that_is_sealed_meanwhile_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process: between the listing of the files and the first of them, and later."""
    cache = opened(tmp_path, Encoder())
    wanted = cache.lookup(TEXTS)
    cache.close()
    before, listed, read = EmbeddingCache.open(tmp_path), [], shards.read_shard

    def sealed_first(path: Path, header: shards.Header) -> shards.Shard:
        if not listed:
            listed.append(path)
            seal(tmp_path)
        return read(path, header)

    monkeypatch.setattr(shards, "read_shard", sealed_first)
    assert torch.equal(EmbeddingCache.open(tmp_path).lookup(TEXTS), wanted)
    assert listed[0].name.startswith("part-") and not parts(tmp_path)
    assert torch.equal(before.lookup(TEXTS), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(before)).lookup(TEXTS), wanted)


def test_what_two_ranks_met_together_is_kept_once(tmp_path: Path) -> None:
    caches = [opened(tmp_path, encoder, i) for i, encoder in enumerate((Encoder(), Company()))]
    wanted, other = [cache.lookup(TEXTS[:3]) for cache in caches]
    for cache in caches:
        cache.close()
    seal(tmp_path)
    sealed = EmbeddingCache.open(tmp_path)
    assert len(sealed) == 3
    assert torch.equal(sealed.lookup(TEXTS[:3]), wanted)
    assert not torch.equal(other, wanted)


BATCHES = [TEXTS[:3], TEXTS[2:6], ["a", "b"], TEXTS[5:9], ["c"], [*TEXTS[8:], "a"], ["d", TEXTS[0]]]


@pytest.mark.parametrize("killed", range(1, len(BATCHES) + 1))
@pytest.mark.parametrize("again", [0, 1])
def test_a_killed_run_finds_the_same_bits(tmp_path: Path, killed: int, again: int) -> None:
    def run(name: str, start: int, stop: int) -> tuple[FillingCache, list[Tensor]]:
        cache, found = opened(tmp_path / name, Company(), shard_rows=4), []
        for step in range(start, stop):
            found.append(cache.lookup(BATCHES[step]))
            if step % 3 == 2:
                cache.write()  # before a checkpoint
        return cache, found

    whole, wanted = run("whole", 0, len(BATCHES))
    run("killed", 0, killed)
    # from the last checkpoint, or (it was not whole) from the one before
    start = max(0, 3 * (killed // 3 - again))
    resumed, found = run("killed", start, len(BATCHES))
    for cache in (whole, resumed):
        cache.close()
    for got, rows in zip(found, wanted[start:], strict=True):
        assert torch.equal(got, rows)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_killed_rank_sees_of_others_what_it_saw_before(tmp_path: Path) -> None:
    """Parts of the same epoch are another rank's own, also where a run resumes."""
    ranks = [opened(tmp_path, Company(), i) for i in range(2)]
    ranks[0].lookup(TEXTS[:4])
    mine = ranks[1].lookup(TEXTS[3:5])
    for cache in ranks:
        cache.write()
    resumed = opened(tmp_path, encoder := Company(), 1)
    assert torch.equal(resumed.lookup(TEXTS[3:5]), mine)
    resumed.lookup(TEXTS[:1])
    assert encoder.asked == TEXTS[:1]


def test_a_process_killed_while_it_fills(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        cache = opened(tmp_path, Company())
        cache.lookup(TEXTS[:3])
        cache.lookup(TEXTS[:7])
        cache.write()
        cache.lookup(TEXTS)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    encoder = Company()
    cache = opened(tmp_path, encoder)
    expected = opened(tmp_path / "whole", Company())
    for batch in (TEXTS[:3], TEXTS[:7]):
        assert torch.equal(cache.lookup(batch), expected.lookup(batch))
    assert encoder.asked == []
    assert torch.equal(cache.lookup(TEXTS), expected.lookup(TEXTS))
    assert encoder.asked == TEXTS[7:]


def test_refusals(tmp_path: Path) -> None:
    first = opened(tmp_path, Encoder())
    first.close()
    with another_run(tmp_path), pytest.raises(OwnershipError, match="in use by another run"):
        opened(tmp_path, Encoder())
    with pytest.raises(CacheError, match="after the cache was closed"):
        first.lookup(TEXTS)
    with pytest.raises(CacheError, match=r"fingerprint\.pooling is 'mean', expected 'last'"):
        FillingCache(tmp_path, Encoder(), {**FINGERPRINT, "pooling": "last"}, 4)
    with pytest.raises(CacheError, match="dim is 4, expected 5"):
        FillingCache(tmp_path, Encoder(), FINGERPRINT, 5)
    broken = FillingCache(tmp_path, lambda t: torch.full((len(t), 4), torch.nan), FINGERPRINT, 4)
    with pytest.raises(CacheError, match="not finite or zero, such as that of 'x'"):
        broken.lookup(["x"])
    broken.close()
    assert len(EmbeddingCache.open(tmp_path)) == 0


def test_a_loader_worker_may_not_encode(tmp_path: Path) -> None:
    cache = opened(tmp_path, Encoder())
    loader = DataLoader(
        TEXTS, num_workers=1, collate_fn=cache.lookup, multiprocessing_context="fork"
    )
    with pytest.raises(CacheError, match="in a data loader's worker"):
        next(iter(loader))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    cache = opened(tmp_path, Encoder())
    cache.lookup(TEXTS)
    cache.close()
    (path,) = parts(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[-340] ^= 1  # of a row: ten keys come last
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=f"{path.name}: sha256 is"):
        opened(tmp_path, Encoder()).lookup(TEXTS)
    with pytest.raises(CacheError, match="sha256 is"):
        EmbeddingCache.open(tmp_path).verify()
    with pytest.raises(CacheError, match=f"{path.name}: sha256 is"):
        EmbeddingCache.open(tmp_path).read(np.arange(1, 10))
    damaged[-40] ^= 1  # of a key
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=f"{path.name}: its keys have the sha256"):
        opened(tmp_path, Encoder())


def test_a_full_shard_is_written_at_once(tmp_path: Path) -> None:
    cache = opened(tmp_path, Encoder(), shard_rows=4)
    wanted = [cache.lookup(TEXTS[:3])]
    assert not parts(tmp_path)
    wanted.append(cache.lookup(TEXTS[3:8]))
    assert len(parts(tmp_path)) == 1  # with all that was encoded together
    assert torch.equal(cache.lookup(TEXTS[:8]), torch.cat(wanted))
    assert cache.encoded == len(EmbeddingCache.open(tmp_path)) == 8


def test_the_command_counts_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = opened(tmp_path, Encoder())
    for text in TEXTS[:4]:
        cache.lookup([text])
    cache.close()
    size = parts(tmp_path)[0].stat().st_size
    assert embed.main("embed", ["report", str(tmp_path)]) is None
    assert embed.main("embed", ["verify", str(tmp_path)]) is None
    said = capsys.readouterr().out
    assert "0 shards, 1 parts of unfinished runs" in said and f"bytes          {size} " in said
    assert "4 rows in 1 files" in said
    assert embed.main("embed", ["merge", str(tmp_path), str(tmp_path)]) is None
    assert not parts(tmp_path)
    assert len(EmbeddingCache.open(tmp_path)) == 4
