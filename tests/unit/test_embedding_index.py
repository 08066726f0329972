"""Whether a cache holds all captions is found by digests, once, and never taken on trust."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip_vlm.data.cache import embeddings
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
from llm2clip_vlm.data.image_text.index import read_sources
from llm2clip_vlm.data.reading import table
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.text_keys import digests_of
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.encoder.caption_embeddings import CaptionFeatures
from tests.unit.test_embedding_cache import FINGERPRINT, Encoder
from tests.unit.test_image_text import processor

COUNT = 1203  # three batches of a table


def texts_of(kind: str) -> list[str]:
    return [f"{kind} caption of picture {n}, größer" for n in range(COUNT)]


def build(folder: Path, texts: list[str], **more: Any) -> EmbeddingCache:
    return EmbeddingCache.build(folder, texts, Encoder(), FINGERPRINT, shard_rows=300, **more)


def index_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(".index-*") if not file.suffix)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    monkeypatch.setattr(table, "_BATCH", 500)
    monkeypatch.setattr(embeddings, "INDEX_FILE_FROM_ROWS", 1)


def dataset(folder: Path, weights: dict[str, float] | None = None) -> ImageTextDataset:
    path = folder / "pairs.jsonl"
    rows = [
        {"id": str(n), "image": "a.png", "captions": {"short": [short], "long": [long, long]}}
        for n, (short, long) in enumerate(zip(texts_of("short"), texts_of("long"), strict=True))
    ]
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_sources([ImageTextSource(path=str(path))], BadRecords())
    return ImageTextDataset(records, processor(), weights, preload_limit_bytes=0)


def test_the_tables_digests_are_the_caches_keys(tmp_path: Path, large: None) -> None:
    data = dataset(tmp_path)
    got = np.concatenate(list(data.records.digests(["long"])))
    want = digests_of([text for text in texts_of("long") for _ in range(2)])
    assert np.array_equal(got, want)
    every = np.concatenate(list(data.records.digests(data.kinds)))
    assert {row.tobytes() for row in every} == {
        hashlib.sha256(text.encode()).digest() for text in data.captions()
    }


def test_captions_are_looked_for_once(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path)
    all_texts = texts_of("short") + texts_of("long")
    short = CaptionFeatures(build(tmp_path / "cache", all_texts[:COUNT]), {})
    message = "1203 of 2406 captions are not in the cache .*, for example 'long caption of pic"
    for _ in range(2):
        with pytest.raises(HandoffError, match=message):
            short.require(data, [])
    short.require(dataset(tmp_path, {"short": 1.0}), [])  # the other kind is not drawn
    with pytest.raises(HandoffError, match="1203 of 2406"):
        short.require(data, [])
    cache = build(tmp_path / "cache", all_texts)
    CaptionFeatures(cache, {}).require(data, ["short caption of picture 7, größer"])
    for reads in ("each_caption", "captions"):
        monkeypatch.setattr(ImageTextDataset, reads, lambda _: pytest.fail("read again"))
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCache, "holds", lambda *_: pytest.fail("looked again"))
        CaptionFeatures(EmbeddingCache.open(tmp_path / "cache"), {}).require(data, [])
        with pytest.raises(HandoffError, match=r"1 of 1 captions .* 'a new one'"):
            CaptionFeatures(cache, {}).require(data, ["a new one"])
        with pytest.raises(pytest.fail.Exception, match="looked again"):
            CaptionFeatures(cache, {}).require(data_of_one_more(tmp_path / "more"), [])
    for path in (tmp_path / "cache").glob("shard-*"):  # one is lost: what was noted is no longer so
        path.unlink()
        break
    with pytest.raises(pytest.fail.Exception, match="read again"):
        CaptionFeatures(EmbeddingCache.open(tmp_path / "cache"), {}).require(data, [])


def data_of_one_more(folder: Path) -> ImageTextDataset:
    folder.mkdir()
    row = {"id": "x", "image": "a.png", "captions": {"short": ["one more"]}}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return dataset(folder)


def test_a_caption_that_is_not_drawn_may_be_absent(tmp_path: Path, large: None) -> None:
    data = dataset(tmp_path)
    data.records = data.records.take(np.arange(COUNT) > 4)
    cache = CaptionFeatures(build(tmp_path / "cache", data.captions()), {})
    cache.require(data, [])
    with pytest.raises(HandoffError, match="10 of 2406 captions"):
        cache.require(dataset(tmp_path), [])


def test_the_sorted_keys_are_mapped_and_the_same_as_in_memory(tmp_path: Path, large: None) -> None:
    cache = build(tmp_path, texts_of("short"))
    (file,) = index_files(tmp_path)
    again = EmbeddingCache.open(tmp_path)
    assert not again._order.flags.owndata and not again._order.flags.writeable
    in_memory = EmbeddingCache(tmp_path, cache.header, [shard.path for shard in cache.shards])
    order = random.Random(0).sample(texts_of("short"), 200)
    for each in (again, in_memory):
        assert each.find([*order, "other"]).tolist() == [*cache.find(order).tolist(), -1]
        assert torch.equal(each.lookup(order), cache.lookup(order))
    assert file.stat().st_size == 24 * COUNT + 32
    grown = build(tmp_path, [*texts_of("short"), "one more"])
    (newer,) = index_files(tmp_path)
    assert newer != file and grown.find(["one more"]).tolist() != [-1]


def test_a_damaged_index_is_made_again(tmp_path: Path, large: None) -> None:
    cache = build(tmp_path, texts_of("short"))
    (file,) = index_files(tmp_path)
    whole, chance = file.read_bytes(), random.Random(0)
    for number in range(30):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << number % 8
        file.unlink()  # others have it mapped
        file.write_bytes(content if number % 3 else content[: number * 10])
        assert torch.equal(
            EmbeddingCache.open(tmp_path).lookup(texts_of("short")),
            cache.lookup(texts_of("short")),
        )
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, texts_of("short"))
    index_files(tmp_path)[0].unlink()

    def refuse(path: Path) -> Any:
        raise PermissionError(path)

    monkeypatch.setattr(embeddings, "written_hashed", refuse)
    assert EmbeddingCache.open(tmp_path).missing(["x", *texts_of("short")]) == ["x"]
    assert not index_files(tmp_path)
