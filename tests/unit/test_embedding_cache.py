"""The cache finds an embedding by its text, survives interruptions, and refuses what differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.data.embedding_cache import (
    HEADER_NAME,
    CacheError,
    EmbeddingCache,
    MissingTextError,
    text_digest,
)

FINGERPRINT = {"text_weights": "abc", "pooling": "mean"}
TEXTS = [f"text {i}" for i in range(10)]


class Encoder:
    """A deterministic embedding of each text; remembers what it was asked for."""

    def __init__(self, dim: int = 4, fail_after: int | None = None) -> None:
        self.dim = dim
        self.fail_after = fail_after
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += texts
        return 3 * torch.stack([self.of(text) for text in texts])

    def of(self, text: str) -> Tensor:
        seed = int.from_bytes(text_digest(text)[:4], "big")
        return F.normalize(
            torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)), dim=0
        )


def build(path: Path, texts: list[str] = TEXTS, encoder: Encoder | None = None) -> EmbeddingCache:
    return EmbeddingCache.build(path, texts, encoder or Encoder(), FINGERPRINT, shard_rows=3)


def test_looks_up_by_text_in_any_order(tmp_path: Path) -> None:
    encoder = Encoder()
    cache = build(tmp_path, [*TEXTS, TEXTS[0]], encoder)
    assert encoder.asked == TEXTS
    assert (len(cache), cache.dim) == (10, 4)
    order = [TEXTS[i] for i in (9, 0, 0, 4)]
    found = cache.lookup(order)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.stack([encoder.of(t) for t in order]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(cache[TEXTS[4]], found[3])
    assert TEXTS[3] in cache
    assert "other" not in cache
    assert cache.lookup([]).shape == (0, 4)


def test_layout_on_disk(tmp_path: Path) -> None:
    build(tmp_path)
    header = json.loads((tmp_path / HEADER_NAME).read_text())
    assert header["rows"] == 10
    assert header["fingerprint"] == FINGERPRINT
    assert [shard["rows"] for shard in header["shards"]] == [3, 3, 3, 1]
    rows, keys = np.load(tmp_path / "shard-00001.npy"), np.load(tmp_path / "keys-00001.npy")
    assert (rows.dtype, rows.shape) == (np.float16, (3, 4))
    assert keys[0].tobytes() == text_digest(TEXTS[3])
    assert not list(tmp_path.glob(".*"))


def test_digests_with_zero_bytes_at_the_end_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"a": b"\1" + bytes(31), "b": b"\1\1" + bytes(30), "c": bytes(32), "d": b"\1" * 32}
    monkeypatch.setattr("llm2clip_vlm.data.embedding_cache.text_digest", digests.__getitem__)
    cache = build(tmp_path, ["a", "b", "c"])
    assert cache.missing(["a", "b", "c", "d"]) == ["d"]
    torch.testing.assert_close(cache["b"], cache.lookup(["a", "b"])[1])


def test_goes_on_after_an_interruption(tmp_path: Path) -> None:
    first = Encoder(fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, encoder=first)
    (tmp_path / "shard-00002.npy").write_bytes(b"half a shard")  # killed before the header
    second = Encoder()
    cache = build(tmp_path, encoder=second)
    assert (first.asked, second.asked) == (TEXTS[:6], TEXTS[6:])
    torch.testing.assert_close(cache.lookup(TEXTS), build(tmp_path / "whole").lookup(TEXTS))
    cache.verify()


def test_adds_only_what_is_missing(tmp_path: Path) -> None:
    build(tmp_path, TEXTS[:4])
    encoder = Encoder()
    assert len(build(tmp_path, TEXTS, encoder)) == 10
    assert encoder.asked == TEXTS[4:]
    again = Encoder()
    build(tmp_path, TEXTS[::-1], again)
    assert again.asked == []


def test_missing_texts_are_named(tmp_path: Path) -> None:
    cache = build(tmp_path)
    assert cache.missing(["x", TEXTS[0], "y", "x"]) == ["x", "y"]
    with pytest.raises(
        MissingTextError, match=r"2 text\(s\) are not among the 10 .* 'x'.*stage 2a"
    ):
        cache.lookup([TEXTS[0], "x", "y", "x"])


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({**FINGERPRINT, "pooling": "last"}, "pooling is 'mean', expected 'last'"),
        ({"pooling": "mean"}, "text_weights is 'abc', expected None"),
        ({**FINGERPRINT, "width": "8"}, "width is None, expected '8'"),
    ],
)
def test_refuses_another_fingerprint(tmp_path: Path, other: dict[str, str], field: str) -> None:
    build(tmp_path)
    EmbeddingCache.open(tmp_path, FINGERPRINT)
    with pytest.raises(CacheError, match=field):
        EmbeddingCache.open(tmp_path, other)
    with pytest.raises(CacheError, match=field):
        EmbeddingCache.build(tmp_path, TEXTS, Encoder(), other)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    cache = build(tmp_path)
    cache.verify()
    for name, field in (("shard-00001.npy", "sha256"), ("keys-00000.npy", "keys_sha256")):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CacheError, match=rf"{name}: checksum {field} is .*, expected "):
            EmbeddingCache.open(tmp_path).verify()
        (tmp_path / name).write_bytes(content)


def test_open_refuses_what_is_no_whole_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no text embedding cache"):
        EmbeddingCache.open(tmp_path)
    build(tmp_path)
    np.save(tmp_path / "shard-00000.npy", np.zeros((2, 4), np.float16))
    with pytest.raises(CacheError, match=r"float16\(2, 4\), expected float16\(3, 4\)"):
        EmbeddingCache.open(tmp_path)
    (tmp_path / "shard-00000.npy").write_bytes(b"x")
    with pytest.raises(CacheError, match="cannot be read"):
        EmbeddingCache.open(tmp_path)
    (tmp_path / "shard-00000.npy").unlink()
    with pytest.raises(CacheError, match="absent"):
        EmbeddingCache.open(tmp_path)
    header = json.loads((tmp_path / HEADER_NAME).read_text())
    (tmp_path / HEADER_NAME).write_text(json.dumps({**header, "schema": 9}))
    with pytest.raises(CacheError, match="schema is 9, expected 1"):
        EmbeddingCache.open(tmp_path)
    (tmp_path / HEADER_NAME).write_text("{")
    with pytest.raises(CacheError, match="no JSON"):
        EmbeddingCache.open(tmp_path)


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.ones(2, 4), r"returned \(2, 4\), expected \(3, dim\)"),
        (torch.ones(3), r"returned \(3,\)"),
        (torch.zeros(3, 4), "3 of 3 embeddings are not finite or zero"),
        (torch.full((3, 4), torch.nan), "3 of 3 embeddings"),
    ],
)
def test_refuses_bad_embeddings(tmp_path: Path, embeds: Tensor, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        EmbeddingCache.build(tmp_path, TEXTS[:3], lambda _: embeds, FINGERPRINT)


def test_refuses_another_width_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no text to embed"):
        build(tmp_path, [])
    build(tmp_path)
    with pytest.raises(CacheError, match=r"returned \(1, 5\), expected \(1, 4\)"):
        build(tmp_path, ["new"], Encoder(dim=5))
