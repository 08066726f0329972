"""Write-through: what is lacking is encoded once, kept, and found again to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip_vlm import embed
from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.data.embedding_fill import FillingCache, seal
from llm2clip_vlm.data.embedding_shards import CacheError
from tests.unit.test_embedding_cache import FINGERPRINT, TEXTS, Encoder


class Company(Encoder):
    """An encoder whose vectors depend a little on what is encoded beside them, as real ones do."""

    def __call__(self, texts: list[str]) -> Tensor:
        return super().__call__(texts) + 0.01 * len(texts)


def journal_path(folder: Path, epoch: int, rank: int) -> Path:
    return folder / f"journal-{epoch:05d}-{rank:05d}"


def opened(path: Path, encoder: Encoder, rank: int = 0) -> FillingCache:
    return FillingCache(path, encoder, FINGERPRINT, 4, rank=rank)


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
        cache.set_epoch(1)
    assert torch.equal(ranks[0].lookup(["mine"])[0], other[1])
    assert torch.equal(ranks[1].lookup([TEXTS[3]])[0], first[3])  # the lower rank's row counts
    assert not torch.equal(first[3], other[0])
    assert [len(encoder.asked) for encoder in encoders] == [4, 2]


def test_sealing_turns_journals_into_shards(tmp_path: Path) -> None:
    EmbeddingCache.build(tmp_path, TEXTS[:3], Encoder(), FINGERPRINT, shard_rows=3)
    caches = [opened(tmp_path, Company(), i) for i in range(2)]
    wanted = caches[0].lookup(TEXTS)
    caches[1].lookup([TEXTS[9], "more"])
    with pytest.raises(CacheError, match=r"journal-0.*another process is writing it"):
        seal(tmp_path)  # while a run fills it, nothing is taken from it
    for cache in caches:
        cache.close()
    assert len(EmbeddingCache.open(tmp_path)) == 12  # journals are read as they are, twice "text 9"
    sealed = seal(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "header.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    assert len(sealed) == 11
    sealed.verify()
    assert torch.equal(sealed.lookup(TEXTS), wanted)


def test_a_killed_run_finds_the_same_bits(tmp_path: Path) -> None:
    batches = [TEXTS[:3], TEXTS[2:6], TEXTS[5:9], [*TEXTS[8:], TEXTS[0]]]
    whole = opened(tmp_path / "whole", Company())
    wanted = [whole.lookup(batch) for batch in batches]
    size = journal_path(tmp_path / "whole", 0, 0).stat().st_size
    for kept in range(0, size, 7):  # killed while any byte of the journal was written
        folder = tmp_path / f"killed-{kept}"
        opened(folder, Company()).close()
        journal_path(folder, 0, 0).write_bytes(
            journal_path(tmp_path / "whole", 0, 0).read_bytes()[:kept]
        )
        resumed = opened(folder, Company())
        for batch, rows in zip(batches, wanted, strict=True):
            assert torch.equal(resumed.lookup(batch), rows), kept


def test_a_process_killed_while_it_fills(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        cache = opened(tmp_path, Company())
        cache.lookup(TEXTS[:3])
        cache.lookup(TEXTS[:7])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    encoder = Company()
    cache = opened(tmp_path, encoder)
    expected = opened(tmp_path / "whole", Company())
    assert torch.equal(cache.lookup(TEXTS[:3]), expected.lookup(TEXTS[:3]))
    assert torch.equal(cache.lookup(TEXTS[:7]), expected.lookup(TEXTS[:7]))
    assert encoder.asked == []


def test_refusals(tmp_path: Path) -> None:
    first = opened(tmp_path, Encoder())
    with pytest.raises(CacheError, match="journal-00000-00000: another process is writing it"):
        opened(tmp_path, Encoder())
    first.close()
    with pytest.raises(CacheError, match="after the cache was closed"):
        first.lookup(TEXTS)
    with pytest.raises(CacheError, match=r"fingerprint\.pooling is 'mean', expected 'last'"):
        FillingCache(tmp_path, Encoder(), {**FINGERPRINT, "pooling": "last"}, 4)
    with pytest.raises(CacheError, match="dim is 4, expected 5"):
        FillingCache(tmp_path, Encoder(), FINGERPRINT, 5)
    broken = FillingCache(tmp_path, lambda t: torch.full((len(t), 4), torch.nan), FINGERPRINT, 4)
    with pytest.raises(CacheError, match="not finite or zero, such as that of 'x'"):
        broken.lookup(["x"])
    assert len(EmbeddingCache.open(tmp_path)) == 0


def test_a_loader_worker_may_not_encode(tmp_path: Path) -> None:
    cache = opened(tmp_path, Encoder())
    loader = DataLoader(
        TEXTS, num_workers=1, collate_fn=cache.lookup, multiprocessing_context="fork"
    )
    with pytest.raises(CacheError, match="in a data loader's worker"):
        next(iter(loader))


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    cache = opened(tmp_path, Encoder())
    cache.lookup(TEXTS)
    cache.close()
    path = journal_path(tmp_path, 0, 0)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    for act in (lambda: opened(tmp_path, Encoder()), lambda: seal(tmp_path)):
        with pytest.raises(CacheError, match="journal-00000-00000: sha256 is"):
            act()
    with pytest.raises(CacheError, match="sha256 is"):
        EmbeddingCache.open(tmp_path).verify()
    with pytest.raises(CacheError, match="journal-00000-00000: sha256 is"):
        EmbeddingCache.open(tmp_path).read(np.arange(1, 10))


def test_the_command_counts_files_not_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = opened(tmp_path, Encoder())
    for text in TEXTS[:4]:
        cache.lookup([text])
    size = journal_path(tmp_path, 0, 0).stat().st_size
    assert embed.main(["report", str(tmp_path)]) is None
    assert embed.main(["verify", str(tmp_path)]) is None
    said = capsys.readouterr().out
    assert "0 shards, 1 journals" in said and f"bytes          {size} " in said
    assert "4 rows in 1 files" in said
