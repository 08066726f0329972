"""Captions of stages 1 and 2a lie in the mapped table: the same as read, made once, never held."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.reading import table
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text import captions
from llm2clip_vlm.data.text.captions import CaptionPairs, CaptionRecord, UniqueTexts, read_captions
from llm2clip_vlm.data.text.text_keys import digests_of
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer
from llm2clip_vlm.recipe.base import CaptionPairSource
from tests.tiny import WORDS, llm_tokenizer
from tests.unit.test_captions import records, table_of
from tests.unit.test_embedding_cache import FINGERPRINT, Encoder

COUNT = 1203  # three batches of a table
NOT_UTF8 = os.fsdecode(b"caf\xe9.jsonl")


@pytest.fixture
def source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> CaptionPairSource:
    # pytest-xdist cannot send a log with a name that is no UTF-8
    caplog.set_level(logging.ERROR, logger="llm2clip_vlm")
    lines: list[Any] = [
        {"id": f"{n}", "captions": {"short": [f"dog {n // 2}"], "long": [f"dog {n} 图", "dog 0"]}}
        for n in range(COUNT)
    ]
    lines[700:700] = [{"captions": ["alone"]}, {"captions": ["a", " "]}]
    (tmp_path / NOT_UTF8).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return CaptionPairSource(path=str(tmp_path / NOT_UTF8))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    monkeypatch.setattr(table, "_BATCH", 500)


def read(source: CaptionPairSource, **more: Any) -> Any:
    return read_captions(source, BadRecords(limit=2), min_captions=2, **more)


def test_a_mapped_table_is_what_was_read_and_read_once(
    source: CaptionPairSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*read(source)]
    assert len(small) == COUNT and small[-1].captions["short"] == [f"dog {(COUNT - 1) // 2}"]
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    assert [*read(source, keep=False)] == small
    assert not (tmp_path / ".llm2clip-index").exists()
    source = source.model_copy(update={"index_dir": str(tmp_path / "index")})
    assert [*read(source)] == small
    (file,) = (tmp_path / "index").iterdir()
    made = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(captions, "_usable", lambda *_: pytest.fail("read again"))
        bad = BadRecords(limit=2)
        again = read_captions(source, bad, min_captions=2)
        assert [*again] == small and again.kinds == ["short", "long"]
        assert (bad.count, bad.total) == (2, COUNT + 2)
        assert "1 different caption(s), expected at least 2" in bad.summary()
        weighted = source.model_copy(update={"weight": 2.0, "prompts": {"*": "find "}})
        assert [*read(weighted)] == small  # nothing of it decides on the records
    file.write_bytes(file.read_bytes()[:-40])
    assert [*read(source)] == small and file.stat().st_mtime_ns != made
    assert len(read_captions(source, BadRecords(limit=1))) == COUNT + 1  # one caption is enough
    directed = {"directed": True, "fields": ["captions.short", "captions.long"]}
    assert len(read(source.model_copy(update=directed))) == COUNT
    assert len(list((tmp_path / "index").iterdir())) == 3  # one for each rule


def _texts(source: CaptionPairSource) -> list[str]:
    return [*UniqueTexts([read(source)])]


def test_three_processes_at_once_read_the_same(source: CaptionPairSource, large: None) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        first, *others = pool.map(_texts, [source] * 3)
    assert others == [first, first] and len(first) == COUNT + (COUNT + 1) // 2


def test_token_ids_are_made_once_for_each_way_to_make_them(
    source: CaptionPairSource, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(room: int = 8, **more: Any) -> CaptionTokenizer:
        return CaptionTokenizer(llm_tokenizer(), room, **more)

    found = read(source, tokens=tokens)
    told = found.table.facts["told"]
    assert "max_length_tokens 8; the longest text has" in told
    for row in (0, 499, 500, COUNT - 1):
        assert [ids.tolist() for ids in found[row].ids] == tokens()(found[row].texts)
    with monkeypatch.context() as patch:
        patch.setattr(CaptionTokenizer, "__call__", lambda *_: pytest.fail("tokenised again"))
        again = read(source, tokens=tokens)
        assert again.table.facts["told"] == told
        pairs = CaptionPairs([again], [source], seed=0)
        drawn = pairs[0, 700]
        wanted = [pickle.loads(pickle.dumps(pairs))[0, 700].ids[n].tolist() for n in (0, 1)]
    assert wanted == [ids.tolist() for ids in drawn.ids]
    assert wanted == tokens()([drawn.query, drawn.positive])
    for other in ({"room": 4}, {"instruction": WORDS[0]}, {"pooling": "eos"}):
        changed = partial(tokens, **other)
        row = read(source, tokens=changed)[3]
        assert [ids.tolist() for ids in row.ids] == changed()(row.texts)
    # this tokenizer puts an eos after each text anyway
    assert len(list((tmp_path / ".llm2clip-index").iterdir())) == 3
    assert [*read(source)][3].ids == ()


def test_texts_of_several_tables_are_counted_once_in_order() -> None:
    parts = [
        records(5),
        table_of([CaptionRecord("x", {"a": ["r 3 1", "new", "new"], "b": ["new", "r 0 0"]})]),
        records(3, name="s"),
    ]
    more = ["prompt", "r 1 1", "prompt", "s 2 2"]
    texts = [text for part in parts for record in part for text in record.texts] + more
    found = UniqueTexts(parts, more)
    assert [*found] == list(dict.fromkeys(texts))
    digests = digests_of([*found])
    assert np.array_equal(np.concatenate([*found.keys()]), digests)
    assert np.array_equal(np.concatenate([*found.keys("p")]), digests_of([*found], "p"))
    assert (found.total, len(found)) == (len(texts) - 1, len(set(texts)))
    assert [*UniqueTexts([], more)] == list(dict.fromkeys(more))
    assert [*UniqueTexts([])] == []
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_build_reads_only_the_texts_that_the_cache_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_BATCH", 7)
    read: set[int] = set()
    plain = UniqueTexts.__getitem__

    def noted(self: UniqueTexts, number: int) -> Any:
        read.add(number)
        return plain(self, number)

    monkeypatch.setattr(UniqueTexts, "__getitem__", noted)
    texts = UniqueTexts([records(20), records(9, name="s")])
    prompts = {"": Encoder(), "p": Encoder()}

    def build(folder: str, given: Sequence[str], encoders: Any) -> EmbeddingCache:
        where = tmp_path / folder
        return EmbeddingCache.build(where, given, encoders, FINGERPRINT, shard_rows=16)

    build("cache", [*texts][:30], Encoder())
    for lacking in ({*range(30, len(texts))}, set()):
        read.clear()
        cache = build("cache", texts, Encoder())
        assert read == lacking
    assert cache.find([*texts]).min() >= 0
    build("cache", texts, prompts)
    build("whole", [*texts][:30], Encoder())
    build("whole", [*texts], Encoder())
    build("whole", [*texts, *texts], prompts)
    both = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).glob("shard-*")}
        for folder in ("cache", "whole")
    ]
    assert both[0] == both[1] and len(both[0]) > 10
