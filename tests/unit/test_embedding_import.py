"""The released code's files: joined by key, whatever their order, and nothing unpickled."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2clip_vlm.data.embedding_import import import_official
from llm2clip_vlm.data.embedding_shards import CacheError
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError

COLUMNS = ("shortSV_captions", "longSV_captions")
FINGERPRINT = {"text_weights": "Llama-3-8B-Instruct-CC"}
DIM = 8


def vector(key: str, column: str) -> np.ndarray:
    seed = int(key) * 2 + COLUMNS.index(column)
    return np.random.default_rng(seed).normal(size=DIM).astype("<f4") * 30


def caption(key: str, column: str) -> str:
    return f"{column} of {key}"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write(folder: Path, name: str, keys: list[str], *, order: int = 1, **changed: Any) -> Path:
    """An image shard and its embeddings, whose members come in another order if `order` is -1."""
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for key in keys:
            add(tar, f"{key}.jpg", b"\xff\xd8")
            row = {column: caption(key, column) for column in COLUMNS}
            add(tar, f"{key}.json", json.dumps(row).encode())
    path = folder / f"{name}_text_embeddings.tar"
    with tarfile.open(path, "w") as tar:
        for key in keys[::order]:
            for column in COLUMNS:
                member = f"{key}.{column}"
                add(tar, member, changed.pop(member, vector(key, column).tobytes()))
        for member, content in changed.items():
            add(tar, member, content)
    return path


def test_rows_find_their_captions_in_any_order(tmp_path: Path) -> None:
    keys = [f"{i:09d}" for i in range(12)]
    tars = [write(tmp_path, f"{n:05d}", keys[3 * n : 3 * n + 3], order=(-1) ** n) for n in range(4)]
    tars.append(write(tmp_path, "00004", keys[:2]))  # the same captions again
    bad = BadRecords()
    cache = import_official(tmp_path / "cache", tars, FINGERPRINT, bad)
    assert (len(cache), cache.dim, bad.count) == (24, DIM, 0)
    assert cache.fingerprint == FINGERPRINT
    for column in COLUMNS:
        wanted = torch.from_numpy(np.stack([vector(key, column) for key in keys]))
        found = cache.lookup([caption(key, column) for key in keys])
        torch.testing.assert_close(found, F.normalize(wanted, dim=1), atol=1e-3, rtol=0)
    cache.verify()
    again = import_official(tmp_path / "cache", tars, FINGERPRINT, bad)
    assert len(again) == 24
    with pytest.raises(CacheError, match=r"fingerprint\.text_weights is 'Llama-3-8B-Instruct-CC'"):
        import_official(tmp_path / "cache", tars, {"text_weights": "other"}, bad)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (np.full(DIM, np.nan, "<f4").tobytes(), "an embedding of norm nan"),
        (np.full(DIM, np.inf, "<f4").tobytes(), "an embedding of norm inf"),
        (bytes(4 * DIM), "an embedding of norm 0.0"),
        (np.ones(DIM + 1, "<f4").tobytes(), "an embedding of width 9, expected 8"),
        (b"123", "3 bytes, expected float32"),
        (b"", "0 bytes, expected float32"),
        (pickle.dumps([1.0] * 7) + b"..", "expected float32|norm|width"),
    ],
    ids=["nan", "inf", "zero", "wide", "odd", "empty", "pickle"],
)
def test_a_broken_embedding_is_named_and_counted(tmp_path: Path, content: bytes, why: str) -> None:
    member = f"000000002.{COLUMNS[1]}"
    tar = write(tmp_path, "00000", ["000000001", "000000002"], **{member: content})
    with pytest.raises(RecordError, match=rf"00000_text_embeddings.tar:{member}: .*({why})"):
        import_official(tmp_path / "cache", [tar], FINGERPRINT, BadRecords())
    bad = BadRecords(1)
    cache = import_official(tmp_path / "cache", [tar], FINGERPRINT, bad)
    assert (len(cache), bad.count) == (3, 1)
    assert cache.missing([caption("000000002", COLUMNS[1])])


def test_members_without_a_caption_and_damaged_files(tmp_path: Path) -> None:
    stray = {"000000009.shortSV_captions": bytes(4 * DIM), "000000001.text": bytes(4 * DIM)}
    tar = write(tmp_path, "00000", ["000000001"], **stray)
    bad = BadRecords(2)
    assert len(import_official(tmp_path / "a", [tar], FINGERPRINT, bad)) == 2
    assert "no caption 'shortSV_captions' for the key '000000009'" in bad.summary()
    tar.write_bytes(tar.read_bytes()[: 512 + 512 + 512 + 9])  # inside the second member
    bad = BadRecords(1)
    assert len(import_official(tmp_path / "b", [tar], FINGERPRINT, bad)) == 1
    assert "damaged from here on" in bad.summary()
    write(tmp_path, "00000", ["000000001", "000000002"])
    damaged = bytearray(tar.read_bytes())
    damaged[damaged.index(b"000000002.")] ^= 1  # a header: `tarfile` takes it for the end
    tar.write_bytes(damaged)
    bad = BadRecords(1)
    assert len(import_official(tmp_path / "d", [tar], FINGERPRINT, bad)) == 2
    assert "damaged from here on (a damaged header" in bad.summary()
    with pytest.raises(RecordError, match=r"no embeddings at .*absent_text_embeddings\.tar"):
        import_official(tmp_path / "c", [tmp_path / "absent_text_embeddings.tar"], {}, bad)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(RecordError, match=r"no image shard with the captions at .*00000\.tar"):
        import_official(tmp_path / "c", [tar], FINGERPRINT, bad)
    assert not (tmp_path / "c").exists()
