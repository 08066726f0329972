"""Caches that are damaged, foreign or built by somebody else: each is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llm2clip_vlm.data.cache import shards
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.cache.filling import FillingCache
from llm2clip_vlm.data.cache.shards import (
    HEADER_NAME,
    CacheError,
    Header,
    write_shard,
)
from llm2clip_vlm.data.text.text_keys import digests_of
from tests.unit.test_embedding_cache import FINGERPRINT, TEXTS, Encoder, name_of

FIELDS = {
    "text_weights": "9f…",
    "text_tokenizer": "07…",
    "instruction": "Retrieve: ",
    "pooling": "mean",
    "max_length_tokens": "512",
    "bidirectional": "True",
    "chat": "True",
}
SHARD = name_of(TEXTS[4:8])


def build(path: Path, fingerprint: dict[str, str] = FINGERPRINT, dim: int = 4) -> EmbeddingCache:
    return EmbeddingCache.build(path, TEXTS, Encoder(dim), fingerprint, shard_rows=4)


def header(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / HEADER_NAME).read_text())
    (folder / HEADER_NAME).write_text(json.dumps({**plain, **changes}))


def rewrite(folder: Path, metadata: bool = True, **tensors: Any) -> None:
    """A shard with other tensors, and its own header where `metadata`."""
    shard = folder / SHARD
    raw = shard.read_bytes()
    stated = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    kept = {
        name: value for name, value in (load_file(shard) | tensors).items() if value is not None
    }
    save_file(kept, shard, metadata=stated if metadata else None)


def write(folder: Path, content: bytes, name: str = SHARD) -> None:
    (folder / name).write_bytes(content)


def cut(folder: Path, share: float) -> None:
    content = (folder / SHARD).read_bytes()
    write(folder, content[: int(share * len(content))])


def flip(folder: Path, place: int) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[place] ^= 1
    write(folder, bytes(content))


def own_rows(folder: Path, rows: np.ndarray) -> None:
    """A shard with a right checksum whose rows are what they are."""
    keys = digests_of(TEXTS[4:8])
    write_shard(folder, Header(dim=4, fingerprint=FINGERPRINT), keys, rows.astype(np.float16))


def stranger(folder: Path, **changes: Any) -> None:
    """A shard of another cache among ours."""
    other = {"fingerprint": FINGERPRINT, "dim": 4} | changes
    build(folder.with_name("other"), **other)
    shutil.copy(folder.with_name("other") / SHARD, folder / SHARD)


OPENING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "header absent": (lambda f: (f / HEADER_NAME).unlink(), "no text embedding cache"),
    "header empty": (lambda f: write(f, b"", HEADER_NAME), "no header of an embedding cache"),
    "header cut": (lambda f: write(f, b'{"version": 3,', HEADER_NAME), "no header of an embedding"),
    "header not UTF-8": (lambda f: write(f, b"\xff\xfe{", HEADER_NAME), "no header"),
    "header a list": (
        lambda f: write(f, b"[2]", HEADER_NAME),
        "no header of an embedding cache: Input should be an object",
    ),
    "the version before": (lambda f: header(f, version=3), "version: Input should be 4, got 3"),
    "what came before versions": (lambda f: header(f, schema=2), "schema: Extra inputs"),
    "other numbers": (
        lambda f: header(f, dtype="float32"),
        "dtype: Input should be 'float16', got 'float32'",
    ),
    "width a text": (lambda f: header(f, dim="4"), "dim: Input should be a valid integer"),
    "width zero": (lambda f: header(f, dim=0), "dim: Input should be greater than"),
    "width true": (lambda f: header(f, dim=True), "dim: Input should be a valid integer"),
    "width another": (lambda f: header(f, dim=8), "dim is 4, expected 8"),
    "fingerprint a list": (lambda f: header(f, fingerprint=[]), "fingerprint: Input should be"),
    "fingerprint of numbers": (
        lambda f: header(f, fingerprint={"a": 1}),
        r"fingerprint\.a: Input should be a valid string",
    ),
    "shard empty": (lambda f: write(f, b""), f"{SHARD}: cannot be read"),
    "shard HTML": (lambda f: write(f, b"<!DOCTYPE html>" * 99), f"{SHARD}: cannot be read"),
    "shard cut at 30 %": (lambda f: cut(f, 0.3), f"{SHARD}: cannot be read"),
    "shard cut at 90 %": (lambda f: cut(f, 0.9), f"{SHARD}: cannot be read"),
    "shard with a huge header": (lambda f: write(f, b"\xff" * 64), f"{SHARD}: cannot be read"),
    "shard of weights": (lambda f: rewrite(f, metadata=False), f"{SHARD}: no header of an embed"),
    "keys absent": (lambda f: rewrite(f, keys=None), f"{SHARD}: holds .*expected"),
    "a tensor more": (lambda f: rewrite(f, more=np.zeros(3)), f"{SHARD}: holds .*more"),
    "fewer keys than rows": (
        lambda f: rewrite(f, keys=np.zeros((3, 32), np.uint8)),
        r"'torch.uint8 \[3, 32\]'.*expected",
    ),
    "short keys": (lambda f: rewrite(f, keys=np.zeros((4, 16), np.uint8)), r"\[4, 16\]"),
    "float32 rows": (lambda f: rewrite(f, embeds=np.ones((4, 4), np.float32)), "float32"),
    "rows of another width": (
        lambda f: rewrite(f, embeds=np.ones((4, 5), np.float16)),
        r"\[4, 5\]",
    ),
    "one row flat": (lambda f: rewrite(f, embeds=np.ones(4, np.float16)), r"float16 \[4\]"),
    "no row": (
        lambda f: rewrite(f, embeds=np.ones((0, 4), np.float16), keys=np.ones((0, 32), np.uint8)),
        f"{SHARD}: holds",
    ),
    "a bit of a key": (lambda f: flip(f, -1), f"{SHARD}: its keys have the sha256 .*, expected "),
    "another shard's name": (
        lambda f: shutil.copy(f / name_of(TEXTS[:4]), f / SHARD),
        f"{SHARD}: its keys have the sha256",
    ),
    "another encoder's shard": (
        lambda f: stranger(f, fingerprint={**FINGERPRINT, "pooling": "last"}),
        rf"{SHARD}: fingerprint\.pooling is 'last', expected 'mean'",
    ),
    "a wider encoder's shard": (lambda f: stranger(f, dim=6), f"{SHARD}: dim is 6, expected 4"),
    "shard a folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), "cannot be read"),
    "shard a dead link": (
        lambda f: ((f / SHARD).unlink(), os.symlink(f / "none", f / SHARD)),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", OPENING)
def test_it_is_not_opened(tmp_path: Path, case: str) -> None:
    spoil, message = OPENING[case]
    folder = tmp_path / "cache"
    build(folder)
    spoil(folder)
    with pytest.raises(CacheError, match=message):
        EmbeddingCache.open(folder)
    if case != "header absent":
        with pytest.raises(CacheError, match=message):
            build(folder)
        with pytest.raises(CacheError, match=message):
            EmbeddingCache.join(tmp_path / "merged", [folder])
        assert not (tmp_path / "merged").exists()


VERIFYING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a row": (lambda f: flip(f, -140), f"{SHARD}: sha256 is .*, expected "),
    "NaN": (lambda f: own_rows(f, np.full((4, 4), np.nan)), f"{SHARD}: row 0 has norm nan"),
    "infinite": (lambda f: own_rows(f, np.full((4, 4), np.inf)), "row 0 has norm inf"),
    "zero": (lambda f: own_rows(f, np.eye(4) * [1, 1, 0, 1]), "row 2 has norm 0.0, expected 1"),
    "not normalised": (lambda f: own_rows(f, np.ones((4, 4))), "row 0 has norm 2.0, expected 1"),
}


@pytest.mark.parametrize("case", VERIFYING)
def test_verification_names_the_file_and_merging_refuses_it(tmp_path: Path, case: str) -> None:
    spoil, message = VERIFYING[case]
    build(tmp_path / "cache")
    spoil(tmp_path / "cache")
    with pytest.raises(CacheError, match=message):
        EmbeddingCache.open(tmp_path / "cache").verify()
    with pytest.raises(CacheError, match=message):
        EmbeddingCache.join(tmp_path / "merged", [tmp_path / "cache"])
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert len(cache.lookup(TEXTS[:4])) == 4
    if "bit" not in case:
        for texts in (TEXTS, TEXTS[7:8]):  # also where another row of the shard is asked for
            with pytest.raises(CacheError, match=message):
                cache.lookup(texts)


@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_of_another_encoder_is_refused_by_the_fields_name(
    tmp_path: Path, field: str
) -> None:
    folder = tmp_path / "cache"
    build(folder, FIELDS)
    for changed in ({**FIELDS, field: "x"}, {k: v for k, v in FIELDS.items() if k != field}):
        message = rf"fingerprint\.{field} is {FIELDS[field]!r}, expected "
        for act in (
            lambda c=changed: EmbeddingCache.open(folder, c),
            lambda c=changed: build(folder, c),
        ):
            with pytest.raises(CacheError, match=message):
                act()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    build(tmp_path)
    for name in (
        "notes.txt",
        "shard-1.safetensors",
        "shard-00009.safetensors",
        "part-00000-00000.safetensors",
        f".{SHARD}.tmp",
    ):
        (tmp_path / name).write_bytes(b"x")
    assert len(build(tmp_path)) == 10
    assert (tmp_path / "shard-1.safetensors").read_bytes() == b"x"


def test_a_lost_shard_is_encoded_again(tmp_path: Path) -> None:
    build(tmp_path)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).unlink()
    assert EmbeddingCache.open(tmp_path).missing(TEXTS) == TEXTS[4:8]
    build(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == content


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)
def test_no_flipped_bit_is_served(tmp_path: Path, filled: bool, seed: int) -> None:
    """Each is refused by the file's name, or what is served is what was written."""
    if filled:
        filling = FillingCache(tmp_path, Encoder(), FINGERPRINT, 4)
        for start in range(0, len(TEXTS), 4):
            filling.lookup(TEXTS[start : start + 4])
            filling.write()
        filling.close()
    else:
        build(tmp_path)
    wanted = EmbeddingCache.open(tmp_path).lookup(TEXTS)
    chance, files = random.Random(seed), sorted(tmp_path.glob("[!.]*"))
    refused = 0
    for number in range(100):
        file = chance.choice(files)
        whole = file.read_bytes()
        content = bytearray(whole)
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        os.utime(file, ns=(number, number))  # a clock's tick may be longer than this loop's
        try:
            found = EmbeddingCache.open(tmp_path, FINGERPRINT).lookup(TEXTS)
        except CacheError as error:
            said = str(error)
            assert file.name in said or (file.name == HEADER_NAME and str(tmp_path) in said)
            refused += 1
        else:
            assert torch.equal(found, wanted)
        if filled and file.name != HEADER_NAME:
            try:
                again = FillingCache(tmp_path, Encoder(), FINGERPRINT, 4)
                assert torch.equal(again.lookup(TEXTS), wanted)
                again.close()
            except CacheError as error:
                said = str(error)
                assert file.name in said
        file.write_bytes(whole)
    assert refused > 90


def test_a_row_in_anothers_place_is_not_served(tmp_path: Path) -> None:
    cache = build(tmp_path)
    shard = tmp_path / SHARD
    rows = load_file(shard)["embeds"]
    rewrite(tmp_path, embeds=rows[[1, 0, 2, 3]])
    opened = EmbeddingCache.open(tmp_path)
    assert torch.equal(opened.lookup(TEXTS[:4]), cache.lookup(TEXTS[:4]))  # of another shard
    with pytest.raises(CacheError, match=f"{SHARD}: sha256 is"):
        opened.lookup([TEXTS[4]])


def test_a_file_that_only_looks_like_a_part_stays_as_it_is(tmp_path: Path) -> None:
    build(tmp_path)
    mine = tmp_path / f"part-00000-00000-{64 * 'a'}.safetensors"
    for text in ("my thesis, chapter one", "\0" * 7 + "\1" + "{" * 100):
        mine.write_text(text)
        with pytest.raises(CacheError, match=rf"{mine.name}: cannot be read"):
            FillingCache(tmp_path, Encoder(), FINGERPRINT, 4)
        assert mine.read_text() == text


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    hashed: list[int] = []
    checksum = shards._checksum
    monkeypatch.setattr(
        shards,
        "_checksum",
        lambda array: (array.dtype == np.float16 and hashed.append(len(array))) or checksum(array),
    )
    for _ in range(2):
        cache = EmbeddingCache.open(tmp_path)
        cache.lookup(TEXTS)
    assert sorted(hashed) == [2, 4, 4]
    cache.verify()
    assert len(hashed) == 6
