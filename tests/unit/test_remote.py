"""Shards that are not on this machine: the same records and bytes, whatever the network does."""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip_vlm.cli import guard
from llm2clip_vlm.data.conversation.instruction import expand_mixtures
from llm2clip_vlm.data.image_text.index import ImageTextRecords, read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.records import source_files
from llm2clip_vlm.data.text.captions import read_captions
from llm2clip_vlm.recipe.base import CaptionSource, ImageTextSource
from llm2clip_vlm.recipe.vlm import InstructionSource
from llm2clip_vlm.remote import addresses, range_cache, ranges
from llm2clip_vlm.remote.addresses import RemoteError, look_up, missing_remote
from llm2clip_vlm.remote.range_cache import RangeCache
from llm2clip_vlm.remote.ranges import RemoteFile
from llm2clip_vlm.runs.manifest import changed_parent, parent_state
from tests.image_text_files import write_folder, write_parquet, write_tar
from tests.remote_server import SLOW_S, Faults, s3_served, served

SHARDS, ROWS = 3, 12
SHARD_RANGES = ROWS + 1  # a picture each, and the shard read through


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(768)).save(buffer, "PNG")
    return buffer.getvalue()


def uncompressed(seed: int) -> bytes:
    """A picture that has as many bytes as any other."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (seed, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def write_shard(path: Path, seed: int) -> None:
    rows = [(f"{seed}-{i}", picture(seed * ROWS + i), f"text {i} of {seed}") for i in range(ROWS)]
    write_tar(path, rows)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with shards."""
    folder = tmp_path / "store"
    folder.mkdir()
    for seed in range(SHARDS):
        write_shard(folder / f"{seed:02}.tar", seed)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of earlier tests' servers, and no test waits."""
    look_up.cache_clear()
    monkeypatch.setattr(addresses, "_LONGEST_WAIT_S", 0.0)
    yield
    look_up.cache_clear()


def source(path: Any, cache: Path, **keys: Any) -> ImageTextSource:
    keys = {"fields": ["txt"]} | keys
    return ImageTextSource(path=str(path), cache_dir=str(cache), **keys)


def read(path: Any, cache: Path, **keys: Any) -> ImageTextRecords:
    bad = BadRecords()
    records = read_image_text(source(path, cache, **keys), bad)
    assert bad.count == 0
    return records


def content(records: ImageTextRecords) -> list[Any]:
    return [(r.key, r.place, r.captions, r.identity, r.encoded().data) for r in records]


def series(url: str) -> str:
    return f"{url}/{{00..{SHARDS - 1:02}}}.tar"


def test_records_and_bytes_equal_those_of_local_files(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with served(store) as (url, faults):
        local = content(read(store / "*.tar", cache))
        assert content(read(series(url), cache)) == local and len(local) == SHARDS * ROWS
        assert faults.seen["RANGE"] == SHARDS * SHARD_RANGES
        assert content(read(series(url), cache)) == local
        assert content(pickle.loads(pickle.dumps(read(series(url), cache)))) == local
        assert faults.seen["RANGE"] == SHARDS * SHARD_RANGES  # all of it was kept


def test_tables_and_index_files_at_an_address(store: Path, tmp_path: Path) -> None:
    rows = [(f"k{i}", picture(i), f"text {i}") for i in range(10)]
    write_parquet(store / "rows.parquet", rows)
    write_folder(store / "pairs.jsonl", rows)
    cache = tmp_path / "cache"
    with served(store) as (url, faults):
        for name, keys in (
            ("rows.parquet", {"fields": ["caption"]}),
            ("pairs.jsonl", {"fields": ["captions"], "image_root": str(store)}),
        ):
            local = content(read(store / name, cache, **keys))
            assert content(read(f"{url}/{name}", cache, **keys)) == local
            before = faults.seen["RANGE"]
            assert content(read(f"{url}/{name}", cache, **keys)) == local
            assert faults.seen["RANGE"] == before


@pytest.mark.parametrize("write", [write_parquet, write_tar], ids=["parquet", "tar"])
def test_captions_of_another_picture_are_not_joined_to_the_first(
    write: Any, tmp_path: Path
) -> None:
    """Nor where both pictures have as many bytes."""
    pictures = [uncompressed(n) for n in (1, 1, 2, 3)]
    rows = [(f"{n}", data, f"a dog, {n // 2}") for n, data in enumerate(pictures)]
    path = tmp_path / ("a.tar" if write is write_tar else "a.parquet")
    made, bad = write(path, rows), BadRecords(1)
    with served(tmp_path) as (url, _):
        at = source(f"{url}/{path.name}", tmp_path / "cache", fields=made.fields)
        (kept,) = read_image_text(at.model_copy(update={"group_by": made.fields[0]}), bad)
    assert kept.captions == {made.fields[0]: ["a dog, 0"] * 2}
    assert "have different images" in bad.examples[0]


def test_captions_of_two_stages_read_a_shard_through_once(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with served(store) as (url, faults):
        remote = CaptionSource(path=series(url), fields=["txt"], cache_dir=str(cache))
        local = remote.model_copy(update={"path": str(store / "*.tar")})
        found = list(read_captions(remote, BadRecords()))
        assert found == list(read_captions(local, BadRecords()))
        assert faults.seen["RANGE"] == SHARDS
        where = remote.model_copy(update={"where": {"status": "ok"}})
        assert list(read_captions(where, BadRecords())) == found
        read(series(url), cache)
        assert faults.seen["RANGE"] == SHARDS


def test_a_server_that_does_not_tell_contents_apart_is_refused(store: Path, tmp_path: Path) -> None:
    """What was kept of the first shard would be taken for the second, which is as long."""
    with served(store, tagged=False) as (url, _):
        for seed in (0, 7):
            write_shard(store / "00.tar", seed)
            with pytest.raises(RemoteError, match="neither entity tag nor date"):
                read(f"{url}/00.tar", tmp_path / "cache")


def test_bad_records_of_a_shard_are_named_each_time(store: Path, tmp_path: Path) -> None:
    write_tar(store / "00.tar", [("a", picture(1), "a dog"), ("b", picture(2), " ")])
    with (store / "00.tar").open("r+b") as shard:
        shard.truncate(8 * 512)  # ends inside the second sample
    with served(store) as (url, _):
        told = []
        for _ in range(2):
            bad = BadRecords(limit=3)
            records = read_image_text(source(f"{url}/00.tar", tmp_path / "cache"), bad)
            told.append((len(records), bad.examples))
    assert told[0] == told[1] and told[0][0] == 1
    assert told[0][1][0].startswith(f"{url}/00.tar: the shard ends too early")


@pytest.mark.parametrize("fault", ["503", "cut", "short", "slow"])
def test_a_fault_loses_and_doubles_nothing(store: Path, tmp_path: Path, fault: str) -> None:
    local = content(read(store / "*.tar", tmp_path / "cache"))
    with served(store) as (url, faults):
        faults.plan = [fault] + ["", fault, fault, ""] * (1 if fault == "slow" else 20)
        assert content(read(series(url), tmp_path / "cache")) == local


@pytest.mark.parametrize("fault", ["503", "cut", "short"])
def test_what_fails_for_good_is_no_bad_record(store: Path, tmp_path: Path, fault: str) -> None:
    with served(store) as (url, faults):
        records = read(series(url), tmp_path / "cache")
        faults.always = fault
        at = records[ROWS].image
        named = f"{url}/01.tar: bytes {at.start} to {at.start + at.size - 1}: .*after 8 tries"
        with pytest.raises(RemoteError, match=named):
            records[ROWS].encoded()
        assert faults.seen["RANGE"] == SHARDS + addresses.ATTEMPTS
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(RemoteError, match=r"0.\.tar: bytes 0 to"):
            read(series(url), tmp_path / "cache")


def test_a_loader_ends_on_a_network_that_is_down(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPImageProcessor

    from llm2clip_vlm.data.image_text.dataset import ImageTextDataset

    bad = BadRecords(limit=99)
    with served(store) as (url, faults):
        records = read_image_text(source(series(url), tmp_path / "cache"), bad)
        small = {"height": 32, "width": 32}
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=small)
        dataset = ImageTextDataset(records, processor, bad=bad, preload_limit_bytes=0)
        wanted = dataset[3]["pixel_values"]
        shutil.rmtree(tmp_path / "cache")
        faults.always = "503"
        assert guard(lambda: dataset[3]) == 2
        assert f"error: {url}/00.tar: bytes" in capsys.readouterr().err
        assert bad.count == 0
        faults.always = ""
        assert dataset[3]["pixel_values"].equal(wanted)


def test_a_changed_object_is_noticed(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with served(store) as (url, _):
        records = read(series(url), cache)
        state = parent_state(series(url))
        kept = records[ROWS].encoded().data
        assert changed_parent(state) is None
        write_shard(store / "01.tar", 7)
        with pytest.raises(RemoteError, match=r"01\.tar: bytes .*has changed since"):
            records[ROWS + 1].encoded()
        assert records[ROWS].encoded().data == kept  # of the contents that the table is of
        look_up.cache_clear()
        assert changed_parent(state) == series(url)
        local = content(read(store / "*.tar", cache))
        assert content(read(series(url), cache)) == local and local[ROWS][0] == "7-0"


def test_a_batch_is_fetched_beside_each_other(store: Path, tmp_path: Path) -> None:
    with served(store) as (url, faults):
        records = read(series(url), tmp_path / "cache")
        faults.always = "slow"
        started = time.monotonic()
        records.fetch_ahead(range(ROWS))
        assert (
            faults.seen["RANGE"] == SHARDS + ROWS and time.monotonic() - started < SLOW_S * ROWS / 2
        )
        faults.always = "503"
        assert len(content(records[:ROWS])) == ROWS
        asked = faults.seen["RANGE"]
        with pytest.raises(RemoteError, match=r"01\.tar: bytes .*after 8 tries"):
            records.fetch_ahead(range(ROWS, ROWS + 2))
        assert faults.seen["RANGE"] == asked + 2 * addresses.ATTEMPTS  # no reader tries it again


def test_what_is_missing_is_named_without_fetching(store: Path) -> None:
    with served(store) as (url, faults):
        assert missing_remote(series(url)) is None
        for path, told in (
            (f"{url}/{{00..04}}.tar", r"/03\.tar: .*no such file: correct the path"),
            (f"{url}/*.tar", "lists no files; name each, or a series"),
            (f"{url}/00.tar?key=secret", "without user, password or query"),
            (f"{url.replace('//', '//me:secret@')}/00.tar", "without user, password or query"),
            ("ftp://host/00.tar", "expected s3://BUCKET/KEY"),
            ("file:///etc/passwd", "expected s3://BUCKET/KEY"),
            ("s3://bucket", "expected s3://BUCKET/KEY"),
        ):
            with pytest.raises(RemoteError, match=told):
                look_up(path)
        assert faults.seen["RANGE"] == faults.bytes == 0
        write_shard(store / "x.arrow", 0)
        with pytest.raises(RecordError, match="unknown kind of file"):
            source_files(ImageTextSource(path=f"{url}/x.arrow", cache_dir=str(store / "cache")))


def test_the_hub_is_not_asked_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "is_offline", lambda: True)
    problem = missing_remote("hf://datasets/org/name/00.tar")
    assert problem == (
        "hf://datasets/org/name/00.tar: HF_HUB_OFFLINE is set, or the hub cannot be reached"
    )


def test_an_address_inside_a_data_file_is_followed_nowhere(store: Path, tmp_path: Path) -> None:
    with served(store) as (url, faults):
        row = {"id": "a", "image": f"{url}/00.tar", "captions": ["a dog"]}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        for path, keys in (
            (tmp_path / "pairs.jsonl", {}),
            (f"{url}/pairs.jsonl", {"image_root": str(tmp_path)}),
        ):
            shutil.copy(tmp_path / "pairs.jsonl", store)
            bad = BadRecords(limit=1)
            keys |= {"fields": ["captions"]}
            with pytest.raises(RecordError, match="all of its 1 records are bad"):
                read_image_text(source(path, tmp_path / "cache", **keys), bad)
            assert "got a URL" in bad.examples[0]
        listed = tmp_path / "mixture.yaml"
        listed.write_text(json.dumps({"datasets": [{"json_path": f"{url}/00.tar"}]}))
        with pytest.raises(RecordError, match="an address in a data file"):
            expand_mixtures([InstructionSource(path=str(listed))])
        assert faults.seen["RANGE"] == 1  # of pairs.jsonl


def key_of(number: int) -> str:
    return f"{number % 256:02x}{number:062x}"


def taken(cache: RangeCache) -> int:
    """Bytes there, while nobody may remove or add any."""
    with (cache.folder / "used").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(size for number in range(256) for _, size, _ in cache._files(number))


def test_the_bound_holds_and_the_longest_unused_goes(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 50_000)
    for number in range(40):
        cache.write(key_of(number), bytes([number]) * 1_000)
        os.utime(cache.place(key_of(number)), ns=(number, number))
    assert cache.read(key_of(0), 1_000) == bytes(1_000)  # from now on the last that was used
    for number in range(40, 60):
        cache.write(key_of(number), bytes([number]) * 1_000)
        assert taken(cache) <= 50_000
    kept = [n for n in range(60) if cache.read(key_of(n), 1_000) == bytes([n]) * 1_000]
    assert kept[0] == 0 and kept[1:] == list(range(kept[1], 60)) and 40 <= len(kept) <= 50
    cache.write(key_of(99), bytes(60_000))
    assert cache.read(key_of(99), 60_000) is None and taken(cache) > 40_000
    (tmp_path / "used").unlink()  # what is there is counted again
    cache.write(key_of(70), bytes(20_000))
    assert taken(cache) <= 50_000


def test_what_others_are_about_to_write_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, checksum = RangeCache(tmp_path, 50_000), range_cache._checksum
    for number in range(45):
        cache.write(key_of(number), bytes(1_000))

    def others_write_first(data: bytes) -> bytes:
        monkeypatch.setattr(range_cache, "_checksum", checksum)
        for number in range(45, 49):  # the first finds the folder full, and counts it again
            cache.write(key_of(number), bytes(1_000))
        return checksum(data)

    monkeypatch.setattr(range_cache, "_checksum", others_write_first)
    cache.write(key_of(99), bytes(4_000))  # small enough to wait in a buffer
    assert cache.read(key_of(99), 4_000) == bytes(4_000)
    assert 40_000 < taken(cache) <= 50_000


def test_a_cache_that_may_only_be_read_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = RangeCache(tmp_path, 50_000)
    cache.write(key_of(1), b"x" * 9)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.read(key_of(1), 9) == b"x" * 9


def test_what_is_damaged_counts_as_absent(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 50_000)
    for number, damage in enumerate((b"", b"x" * 1_004, b"y" * 7)):
        cache.write(key_of(number), bytes(1_000))
        cache.place(key_of(number)).write_bytes(damage)
        assert cache.read(key_of(number), 1_000) is None
        cache.write(key_of(number), bytes(1_000))
        assert cache.read(key_of(number), 1_000) == bytes(1_000)
    shutil.rmtree(tmp_path / "ranges")
    (tmp_path / "ranges").write_text("no folder")
    cache.write(key_of(1), b"x")  # logged, no more
    assert cache.read(key_of(1), 1) is None


def fill(folder: Path, seed: int) -> None:
    cache, draw = RangeCache(folder, 200_000), random.Random(seed)
    while True:
        number = draw.randrange(400)
        wanted = bytes([number % 251]) * (500 + number)
        found = cache.read(key_of(number), len(wanted))
        assert found in (None, wanted)
        if found is None:
            cache.write(key_of(number), wanted)


def test_processes_that_are_killed_leave_nothing_torn(tmp_path: Path) -> None:
    context, cache, most = multiprocessing.get_context("fork"), RangeCache(tmp_path, 200_000), 0
    draw = random.Random(0)
    for seed in range(0, 12, 2):
        pair = [context.Process(target=fill, args=(tmp_path, seed + i)) for i in range(2)]
        for process in pair:
            process.start()
        ends = time.monotonic() + draw.uniform(0.05, 0.3)
        # On a busy machine the first of them need longer until there is something to push out.
        while time.monotonic() < ends or (most <= 100_000 and time.monotonic() < ends + 20):
            most = max(most, taken(cache))
        assert all(process.is_alive() for process in pair)
        for process in pair:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        for number in range(400):
            wanted = bytes([number % 251]) * (500 + number)
            assert cache.read(key_of(number), len(wanted)) in (None, wanted)
    assert 100_000 < most <= 200_000


@pytest.fixture
def bucket(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any, Faults]]:
    """The shards in a bucket of a server that speaks S3."""
    for name in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(name, reason=f"{name} is not installed: extra `dev`")
    with s3_served(monkeypatch) as (url, client, faults):
        for file in store.glob("*.tar"):
            client.upload_file(str(file), "shards", f"data/{file.name}")
        yield f"{url}/data", client, faults


def test_a_bucket_of_s3(store: Path, tmp_path: Path, bucket: tuple[str, Any, Faults]) -> None:
    url, client, faults = bucket
    cache = tmp_path / "cache"
    local = content(read(store / "*.tar", cache))
    listed, named = look_up(f"{url}/*.tar"), look_up(series(url))
    assert listed == named and all(state.tag for state in listed)
    assert content(read(f"{url}/*.tar", cache)) == local
    shutil.rmtree(cache / "ranges")
    faults.plan = ["503", "cut", "", "cut", "503"]
    records = read(f"{url}/*.tar", cache)
    assert content(records) == local and not faults.plan
    for path, told in (
        (f"{url}/nothing.tar", "no such file: correct the path"),
        (f"{url}/none/*.tar", "no file matches"),
    ):
        assert told in str(missing_remote(path))
    shutil.rmtree(cache / "ranges")
    write_shard(store / "01.tar", 7)
    client.upload_file(str(store / "01.tar"), "shards", "data/01.tar")
    with pytest.raises(RemoteError, match=r"01\.tar: bytes .*has changed since"):
        content(records)
    ranges._opened.cache_clear()  # as in another process
    with pytest.raises(RemoteError, match=r"01\.tar: it has changed since"):
        content(records)
    look_up.cache_clear()
    assert content(read(f"{url}/*.tar", cache)) == content(read(store / "*.tar", cache))


def test_credentials_come_from_the_environment(
    tmp_path: Path, bucket: tuple[str, Any, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, _ = bucket
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    addresses._file_system.cache_clear()
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert "set the credentials in the environment" in str(missing_remote(f"{url}/00.tar"))
    finally:
        addresses._file_system.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_skips_what_is_far(store: Path, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(ranges._STREAM_BYTES * 3)
    (store / "large.tar").write_bytes(data)
    with served(store) as (url, faults):
        (state,) = look_up(f"{url}/large.tar")
        file = RemoteFile(state, RangeCache(tmp_path, 2**30))
        with file.open() as handle:
            assert handle.read(9) == data[:9]
            handle.seek(len(data) - 8)
            assert handle.read() == data[-8:] and handle.read(1) == b""
        assert faults.seen["RANGE"] == 2 and faults.bytes == ranges._STREAM_BYTES + 9 + 8
