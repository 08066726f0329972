"""The cache finds an embedding by its text, survives interruptions, and refuses what differs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor

from llm2clip_vlm.cli import main
from llm2clip_vlm.data.cache import shards
from llm2clip_vlm.data.cache.embeddings import EmbeddingCache, MissingTextError
from llm2clip_vlm.data.cache.shards import (
    HEADER_NAME,
    CacheError,
    Header,
)
from llm2clip_vlm.data.text import text_keys
from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES, digests_of, text_digests
from llm2clip_vlm.recipe.text import Stage2aRecipe
from llm2clip_vlm.runs.manifest import HandoffError, write_manifest
from llm2clip_vlm.training.encoder.caption_embeddings import CaptionFeatures

NO_RECORDS: Any = SimpleNamespace(
    kinds=[],
    each_caption=lambda: iter(()),
    records=SimpleNamespace(made_of=[], digests=lambda _: iter(())),
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
        seed = int.from_bytes(text_digests([text])[:4], "big")
        return F.normalize(
            torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)), dim=0
        )


def build(path: Path, texts: list[str] = TEXTS, encoder: Encoder | None = None) -> EmbeddingCache:
    return EmbeddingCache.build(path, texts, encoder or Encoder(), FINGERPRINT, shard_rows=3)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*.*"))}


def name_of(texts: list[str]) -> str:
    return f"shard-{hashlib.sha256(digests_of(texts).tobytes()).hexdigest()}.safetensors"


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
    assert header == {"version": 4, "dtype": "float16", "dim": 4, "fingerprint": FINGERPRINT}
    names = [name_of(TEXTS[at : at + 3]) for at in range(0, 10, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [HEADER_NAME, *sorted(names)]
    shards = [load_file(tmp_path / name) for name in names]
    assert [len(shard["keys"]) for shard in shards] == [3, 3, 3, 1]
    assert (shards[1]["embeds"].dtype, shards[1]["embeds"].shape) == (np.float16, (3, 4))
    assert shards[1]["keys"][0].tobytes() == text_digests([TEXTS[3]])
    with safe_open(tmp_path / names[0], "numpy") as file:
        stated = json.loads(file.metadata()["embedding_cache"])
    assert {**header, "sha256": stated["sha256"]} == stated


def test_keys_with_an_equal_beginning_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"a": bytes(24), "b": bytes(7) + b"\1" + bytes(16), "d": b"\1" * 24, "e": b"\2" * 24}
    digests = {text: b"\1" + bytes(7) + end for text, end in ends.items()} | {"c": bytes(32)}
    monkeypatch.setattr(
        text_keys, "text_digests", lambda texts, _="": b"".join(digests[text] for text in texts)
    )
    cache = build(tmp_path, ["a", "b", "c"])
    assert cache.missing(["a", "b", "c", "d", "e"]) == ["d", "e"]
    assert cache.find(["b", "a", "c", "b"]).tolist() == [1, 0, 2, 1]


def test_goes_on_after_an_interruption(tmp_path: Path) -> None:
    first = Encoder(fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, encoder=first)
    half = tmp_path / f".{name_of(TEXTS[6:9])}.{os.uname().nodename}.abc"
    half.mkdir()
    (half / "shard").write_bytes(b"half a shard")
    second = Encoder()
    cache = build(tmp_path, encoder=second)
    assert (first.asked, second.asked) == (TEXTS[:6], TEXTS[6:])
    cache.verify()
    build(tmp_path / "whole")
    assert content(tmp_path / "whole") == content(tmp_path)
    assert not list(tmp_path.glob(".*"))


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


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.ones(2, 4), r"returned \(2, 4\), expected \(3, dim\) for 3 texts such as 'text 0'"),
        (torch.ones(3), r"returned \(3,\)"),
        (torch.zeros(3, 4), "3 of 3 embeddings are not finite or zero, such as that of 'text 0'"),
        (torch.full((3, 4), torch.nan), "3 of 3 embeddings"),
        (torch.tensor([[1.0], [torch.inf], [1.0]]), "1 of 3 .* such as that of 'text 1'"),
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


def test_rows_are_read_by_number(tmp_path: Path) -> None:
    cache = build(tmp_path)
    numbers = cache.find([TEXTS[7], TEXTS[1], TEXTS[2], TEXTS[7]])
    rows = cache.read(numbers)
    assert rows.dtype == torch.float16
    assert torch.equal(rows.float(), cache.lookup([TEXTS[7], TEXTS[1], TEXTS[2], TEXTS[7]]))
    assert torch.equal(cache.read(numbers[1:3]), rows[1:3])  # both in one shard
    for wrong in (-1, 10):
        with pytest.raises(CacheError, match=r"rows (3 to 10|-1 to 3) were asked"):
            cache.read(np.array([3, wrong]))


def test_a_pickled_cache_opens_its_files_again(tmp_path: Path) -> None:
    cache = build(tmp_path)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).lookup(TEXTS), cache.lookup(TEXTS))


def test_one_caption_has_a_row_for_each_prompt(tmp_path: Path) -> None:
    def asked(word: str) -> Callable[[list[str]], Tensor]:
        encoder = Encoder()
        return lambda texts: encoder([f"{word}{text}" for text in texts])

    encoders = {"": asked(""), "Colours: ": asked("c"), "Shapes: ": asked("s")}
    cache = EmbeddingCache.build(tmp_path, TEXTS, encoders, FINGERPRINT, shard_rows=7)
    assert len(cache) == 30
    plain = build(tmp_path / "plain")
    assert torch.equal(cache.lookup(TEXTS), plain.lookup(TEXTS))
    wanted = F.normalize(encoders["Shapes: "](TEXTS), dim=1)
    torch.testing.assert_close(cache.lookup(TEXTS, "Shapes: "), wanted, atol=1e-3, rtol=0)
    assert cache.missing(TEXTS, "Other: ") == TEXTS
    with pytest.raises(MissingTextError, match="with the prompt 'Other: ', such as 'text 0'"):
        cache.lookup(TEXTS, "Other: ")
    more = EmbeddingCache.build(tmp_path / "plain", TEXTS, encoders, FINGERPRINT)
    assert len(more) == 30
    assert torch.equal(more.lookup(TEXTS, "Shapes: "), cache.lookup(TEXTS, "Shapes: "))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_three_writers_make_the_bytes_of_one(tmp_path: Path, order: tuple[int, ...]) -> None:
    texts = [f"caption {i}" for i in range(40)]
    build(tmp_path / "one", texts)
    encoders = [Encoder() for _ in range(3)]
    for i in order:
        for folder in ("together", f"slice-{i}"):
            EmbeddingCache.build(
                tmp_path / folder, texts, encoders[i], FINGERPRINT, shard_rows=3, writer=(i, 3)
            )
    assert content(tmp_path / "together") == content(tmp_path / "one")
    assert sorted(text for encoder in encoders for text in encoder.asked) == sorted(2 * texts)
    assert len(EmbeddingCache.open(tmp_path / "slice-1")) == 13
    EmbeddingCache.join(tmp_path / "merged", [tmp_path / f"slice-{i}" for i in order])
    assert content(tmp_path / "merged") == content(tmp_path / "one")


def test_a_writer_without_a_shard_says_what_the_cache_is(tmp_path: Path) -> None:
    cache = EmbeddingCache.build(tmp_path, TEXTS, Encoder(), FINGERPRINT, writer=(1, 2))
    assert (len(cache), cache.dim) == (0, 4)
    assert cache.missing(TEXTS) == TEXTS


def test_writers_share_a_small_build_and_say_what_they_will_do(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(3000)]
    planned: list[int] = []
    for i in range(2):
        encoder = Encoder()
        EmbeddingCache.build(
            tmp_path, texts, encoder, FINGERPRINT, writer=(i, 2), planned=planned.append
        )
    assert sum(planned) == 3000
    assert max(planned) <= 1600, "one of two writers has (nearly) all the work"
    assert EmbeddingCache.open(tmp_path).find(texts).min() >= 0


def test_two_writers_of_one_shard_leave_it_whole(tmp_path: Path) -> None:
    def meanwhile(texts: list[str]) -> Tensor:
        build(tmp_path / "two")
        return Encoder()(texts)

    EmbeddingCache.build(tmp_path / "two", TEXTS, meanwhile, FINGERPRINT, shard_rows=3)
    build(tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_costs_of_all_caches_are_joined_and_half_a_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in (("a", TEXTS[:6]), ("b", TEXTS[6:])):
        build(tmp_path / name, texts)
        row = {"texts": len(texts), "seconds": 1.0, "cut": 0, "at": len(texts)}
        (tmp_path / name / "encode_cost.jsonl").write_text(json.dumps(row) + "\n")
    with (tmp_path / "b/encode_cost.jsonl").open("a") as log:
        log.write('{"texts": 99, "sec')  # killed meanwhile
    for _ in range(2):  # into one of the sources, and again
        assert main(["embed", "merge", *(str(tmp_path / name) for name in "aab")]) == 0
    assert main(["embed", "report", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "cost           10 texts in 2.0 s" in told
    assert f'not counted    {tmp_path}/a/encode_cost.jsonl:3: \'{{"texts": 99' in told


def test_verify_misses_what_stage_2a_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path)
    recipe = Stage2aRecipe(output_dir=str(tmp_path), text_encoder="llm", sources=[])
    facts: dict[str, Any] = {"parents": {}, "fingerprints": {}, "seconds": 0}
    write_manifest(tmp_path, stage=recipe.stage, recipe=recipe, **facts)
    assert main(["embed", "verify", str(tmp_path)]) == 0
    (lost := min(tmp_path.glob("shard-*"))).unlink()  # of a copy that was cut off
    assert main(["embed", "verify", str(tmp_path)]) == 2
    assert f"{lost.name} is not what stage 2a left (1 such files)" in capsys.readouterr().err


def test_joining_copies_shards_and_may_be_repeated(tmp_path: Path) -> None:
    build(tmp_path / "a", TEXTS[:6])
    build(tmp_path / "b", TEXTS[4:])
    joined = EmbeddingCache.join(tmp_path / "m", [tmp_path / "a", tmp_path / "b"])
    assert len(joined) == 12  # two texts are in both
    assert torch.equal(joined.lookup(TEXTS), build(tmp_path / "whole").lookup(TEXTS))
    joined.verify()
    before = content(tmp_path / "m")
    assert before == content(tmp_path / "a") | content(tmp_path / "b")
    EmbeddingCache.join(tmp_path / "m", [tmp_path / "b", tmp_path / "a"])
    assert content(tmp_path / "m") == before
    last = sorted(before)[-1]
    (tmp_path / "m" / last).unlink()  # killed before the last shard
    EmbeddingCache.join(tmp_path / "m", [tmp_path / "a", tmp_path / "b"])
    assert content(tmp_path / "m") == before
    by_hand = shutil.copytree(tmp_path / "a", tmp_path / "by_hand")
    shutil.copytree(tmp_path / "b", by_hand, dirs_exist_ok=True)
    assert torch.equal(EmbeddingCache.open(by_hand).lookup(TEXTS), joined.lookup(TEXTS))
    EmbeddingCache.build(tmp_path / "other", TEXTS, Encoder(), {**FINGERPRINT, "pooling": "last"})
    with pytest.raises(CacheError, match=r"other: fingerprint\.pooling is 'last', expected 'mean'"):
        EmbeddingCache.join(tmp_path / "m", [tmp_path / "a", tmp_path / "other"])
    EmbeddingCache.build(tmp_path / "wide", TEXTS, Encoder(dim=5), FINGERPRINT)
    with pytest.raises(CacheError, match="wide: dim is 5, expected 4"):
        EmbeddingCache.join(tmp_path / "m", [tmp_path / "a", tmp_path / "wide"])


def test_opening_reads_no_rows(tmp_path: Path) -> None:
    """Half a million rows of 8 KiB (on disk a hole) take the memory of their keys."""
    rows, dim = 500_000, 4096
    keys = np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8)
    header = Header(dim=dim, fingerprint=FINGERPRINT)
    shards.write_header(tmp_path, header)
    layout = {
        "__metadata__": {"embedding_cache": header.written(sha256="0" * 64)},
        "embeds": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, 2 * rows * dim]},
        "keys": {
            "dtype": "U8",
            "shape": [rows, 32],
            "data_offsets": [2 * rows * dim, 2 * rows * dim + 32 * rows],
        },
    }
    words = json.dumps(layout).encode()
    words += b" " * (-len(words) % 8)
    name = f"shard-{hashlib.sha256(keys.tobytes()).hexdigest()}.safetensors"
    with (tmp_path / name).open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        file.seek(2 * rows * dim, os.SEEK_CUR)
        file.write(keys.tobytes())

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before = resident_mib()
    cache = EmbeddingCache.open(tmp_path)
    assert cache.find_digests(keys[[7, rows - 1]]).tolist() == [7, rows - 1]
    assert resident_mib() - before < 100
    with pytest.raises(CacheError, match="sha256 is"):
        shards.Shard(tmp_path, keys[:1], cache.shards[0].embeds[:1], "", "").touch()


def _read_shards(cache: EmbeddingCache, log: Path) -> str:
    """Look all texts up, and note the shards that are read whole for it."""
    checksum = shards._checksum

    def noted(array: Any) -> str:
        with log.open("a") as file:
            file.write(f"{len(array)}\n")
        return checksum(array)

    shards._checksum = noted
    try:
        cache.lookup(TEXTS)
    except CacheError as error:
        return str(error)
    finally:
        shards._checksum = checksum
    return ""


def test_the_workers_of_a_process_read_a_shard_whole_once(tmp_path: Path) -> None:
    cache, log = build(tmp_path / "cache"), tmp_path / "read"
    first = EmbeddingCache.open(cache.directory)

    def in_a_worker() -> tuple[str, int]:
        log.write_text("")
        with multiprocessing.get_context("fork").Pool(1) as pool:
            error = pool.apply(_in_worker, (first, log))
        return error, len(log.read_text().splitlines())

    assert in_a_worker() == ("", len(cache.shards))
    assert in_a_worker() == ("", 0)  # another one
    assert _read_shards(first, log) == "" and not log.read_text()  # nor the process itself
    last = cache.shards[-1].path
    content = bytearray(last.read_bytes())
    content[-DIGEST_BYTES * len(cache.shards[-1].keys) - 3] ^= 1  # of a row: the keys come last
    last.write_bytes(content)
    os.utime(last, ns=(1, 1))
    error, read = in_a_worker()
    assert f"{last.name}: sha256 is" in error and read >= 1


def _in_worker(cache: EmbeddingCache, log: Path) -> str:
    return _read_shards(cache, log)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    texts = [f"caption {i}" for i in range(100)]
    EmbeddingCache.build(tmp_path, texts, Encoder(), FINGERPRINT, shard_rows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        assert len(EmbeddingCache.open(tmp_path).lookup(texts)) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_old_cache_is_refused_with_the_command_that_rebuilds_it(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(folder)
    header = json.loads((folder / HEADER_NAME).read_text())
    (folder / HEADER_NAME).write_text(json.dumps(header | {"version": 3}))
    with pytest.raises(
        CacheError, match=r"should be 4, got 3; delete .*`llm2clip-vlm embed build R"
    ):
        EmbeddingCache.open(folder)
    (folder / "recipe.resolved.yaml").write_text("")
    command = f"`mv {folder} {folder}.old && llm2clip-vlm embed build {folder}.old/recipe.resolved"
    with pytest.raises(CacheError, match=re.escape(command)):
        EmbeddingCache.open(folder)


def slow_encode(texts: list[str]) -> Tensor:
    time.sleep(0.002)
    return Encoder(dim=64)(texts)


def num_shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.safetensors")))


def in_a_child(folder: Path, kill_at: int | None, then_s: float = 0.0) -> bool:
    """Builds in a process of its own; whether it ended.

    Killed with -9 so many seconds after it has so many shards (whatever the machine's load).
    """
    child = os.fork()
    if not child:
        texts = [f"caption {i}" for i in range(300)]
        EmbeddingCache.build(folder, texts, slow_encode, FINGERPRINT, shard_rows=10)
        os._exit(0)
    if kill_at is not None:
        until = time.monotonic() + 60
        while num_shards(folder) < kill_at and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(then_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_builds_end_byte_identical(tmp_path: Path, kills: int) -> None:
    assert in_a_child(tmp_path / "whole", None)
    rng = np.random.default_rng(kills)
    folder, killed, rows = tmp_path / "killed", 0, 0
    while killed < kills:
        # by turns at any moment from its start, and after one, two or three shards more
        if in_a_child(folder, num_shards(folder) + killed % 4, rng.uniform(0.0, 0.02)):
            shutil.rmtree(folder)  # it was done: begin anew
            continue
        killed += 1
        if (folder / HEADER_NAME).is_file():
            cache = EmbeddingCache.open(folder)
            cache.verify()
            rows = max(rows, len(cache))
    assert rows
    assert in_a_child(folder, None)
    assert content(folder) == content(tmp_path / "whole")
    assert len(content(folder)) == 31


@pytest.mark.parametrize("norm", [0.98, 1.02, 0.5])
def test_a_row_that_is_no_unit_vector_is_refused_and_rounding_is_not(norm: float) -> None:
    row = F.normalize(torch.ones(1, 4), dim=1)
    for fine in (1.0, 1.0009, 0.9991):  # what float16 does to a unit vector
        assert shards.require_unit(row * fine, "cache:", ["a"]) is not None
    with pytest.raises(CacheError, match=r"cache: 'a' has norm .*, expected 1"):
        shards.require_unit(row * norm, "cache:", ["a"])


def test_embeddings_of_prompts_stand_behind_their_caption(tmp_path: Path) -> None:
    encoders: dict[str, Any] = {
        name: lambda part, name=name: Encoder()([name + text for text in part])
        for name in ("", "what ", "who ")
    }
    cache = EmbeddingCache.build(tmp_path, ["a dog", "two cats"], encoders, FINGERPRINT)
    features = CaptionFeatures(cache, {}, ["what ", "who "])
    found = features(["two cats", "a dog"])["text_features"]
    want = [encoders[p]([text])[0] for text in ("two cats", "a dog") for p in encoders]
    want = [row / row.norm() for row in want]
    torch.testing.assert_close(found, torch.stack(want), atol=1e-3, rtol=0)
    assert features.lookup(["a dog"]).shape == (1, 4)
    with pytest.raises(HandoffError, match=r"1 of 1 captions .* with the prompt 'why '"):
        CaptionFeatures(cache, {}, ["why "]).require(NO_RECORDS, ["a dog"])
