"""Every format gives the same records, by number, from a table that notices when it is outdated."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip_vlm.data.image_text import index as image_text_index
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
from llm2clip_vlm.data.image_text.index import ImageTextRecords, read_image_text, read_sources
from llm2clip_vlm.data.reading import shards, table
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.runs.hashes import data_files
from tests.image_corpus import jpeg
from tests.image_text_files import FORMATS, Samples, add, write_folder, write_parquet, write_tar
from tests.unit.test_image_text import processor

SAMPLES: Samples = [(f"{i:05d}", jpeg(40 + i, 40), f"ein Bild, Nr. {i} 图") for i in range(8)]


def read(source: ImageTextSource) -> ImageTextRecords:
    return read_image_text(source, BadRecords())


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same(
    tmp_path: Path, name: str, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if indexed:
        monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    records = read(FORMATS[name](tmp_path / name, SAMPLES))
    assert len(records) == len(SAMPLES)
    for record, (key, image, caption) in zip(records, SAMPLES, strict=True):
        assert record.key == key or name == "captions_val.json"
        assert [text for texts in record.captions.values() for text in texts] == [caption]
        assert record.encoded().data == image
    assert [r.key for r in records[2:4]] == [records[2].key, records[3].key]
    assert records[-1].key == records[7].key
    with pytest.raises(IndexError):
        records[8]


@pytest.mark.parametrize("name", ["shard.tar", "rows.parquet", "data.arrow", "pairs.jsonl"])
def test_forked_workers_and_pickling_read_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    records = read(FORMATS[name](tmp_path / name, SAMPLES))
    _ = records[0].encoded()  # something is open before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        got = pool.starmap(_data, [(records, i) for i in range(8)])  # pickled on the way
    assert got == [image for _, image, _ in SAMPLES]
    assert pickle.loads(pickle.dumps(records))[5] == records[5]


def _data(records: ImageTextRecords, index: int) -> bytes:
    return records[index].encoded().data


def test_an_index_is_used_until_the_data_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    source = write_folder(tmp_path / "pairs.jsonl", SAMPLES)
    source = source.model_copy(update={"index_dir": str(tmp_path / "index")})
    assert len(read(source)) == 8
    (index,) = (tmp_path / "index").iterdir()
    made = index.stat().st_mtime_ns

    def no_reading(*_: object) -> None:
        raise AssertionError("the data were read again")

    with monkeypatch.context() as patch:
        patch.setattr(image_text_index, "_rows", no_reading)
        assert len(read(source)) == 8
        os.utime(source.path, ns=(1, 1))
        with pytest.raises(AssertionError, match="read again"):
            read(source)
    write_folder(Path(source.path), SAMPLES[:5])
    assert len(read(source)) == 5
    assert index.stat().st_mtime_ns != made
    index.write_bytes(index.read_bytes()[:-100])
    assert len(read(source)) == 5
    assert len(read(source.model_copy(update={"limit": 2}))) == 2
    assert len(list((tmp_path / "index").iterdir())) == 2  # one per selection, nothing left over


def test_bad_rows_count_when_an_index_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    source = write_folder(tmp_path / "pairs.jsonl", [*SAMPLES, ("late", jpeg(), " ")])
    for _ in range(2):
        bad = BadRecords(limit=1)
        assert len(read_image_text(source, bad)) == 8
        assert (bad.count, bad.total) == (1, 9)
        with pytest.raises(RecordError, match="empty caption"):
            read(source)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    (tmp_path / "file").write_text("in the way")
    source = write_folder(tmp_path / "pairs.jsonl", SAMPLES)
    with pytest.raises(RecordError, match="set `index_dir`"):
        read(source.model_copy(update={"index_dir": str(tmp_path / "file" / "below")}))


def test_a_pattern_reads_all_shards_but_not_the_embeddings(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", SAMPLES[:3])
    write_tar(tmp_path / "00001.tar", SAMPLES[3:])
    write_tar(tmp_path / "00000_text_embeddings.tar", SAMPLES)
    source = ImageTextSource(path=str(tmp_path / "*.tar"), fields=["txt"])
    records = read(source)
    assert [record.key for record in records] == [key for key, _, _ in SAMPLES]
    assert [record.encoded().data for record in records] == [image for _, image, _ in SAMPLES]
    with pytest.raises(RecordError, match="no such file"):
        read(source.model_copy(update={"path": str(tmp_path / "x*.tar")}))


def test_two_stars_are_any_number_of_folders(tmp_path: Path) -> None:
    """As at an address, and in what a manifest hashes."""
    places = ["a.tar", "x/b.tar", "x/y/c.tar"]
    for place, sample in zip(places, SAMPLES, strict=False):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / place, [sample])
    source = ImageTextSource(path=str(tmp_path / "**/*.tar"), fields=["txt"])
    assert [record.key for record in read(source)] == ["00000", "00001", "00002"]
    assert data_files(source.path) == [tmp_path / place for place in places]


def test_seven_captions_from_the_json_columns(tmp_path: Path) -> None:
    columns = ("raw_caption", *(f"{size}{who}_captions" for who in ("IB", "SV", "LLA")
                                for size in ("short", "long")))  # fmt: skip
    captions = {name: f"{name} of it" for name in columns}
    source = write_tar(tmp_path / "a.tar", [("0", jpeg(), captions)])
    (record,) = read(source)
    assert record.captions == {name: [text] for name, text in captions.items()}
    data = ImageTextDataset(read(source), processor(), {"raw_caption": 3, "longSV_captions": 1})
    drawn = set()
    for epoch in range(30):
        data.set_epoch(epoch)
        drawn.add(data.caption(0))
    assert drawn == {"raw_caption of it", "longSV_captions of it"}


def test_members_are_joined_by_key_not_by_position(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for key, image, _ in SAMPLES:
            add(shard, f"dir/{key}.JPG", image)
        for key, _, caption in reversed(SAMPLES):
            add(shard, f"dir/{key}.txt", caption.encode())
    records = read(ImageTextSource(path=str(tmp_path / "a.tar"), fields=["txt"]))
    assert [(r.key, r.captions["txt"]) for r in records] == [
        (f"dir/{key}", [caption]) for key, _, caption in SAMPLES
    ]


def test_dots_in_a_key_do_not_join_samples(tmp_path: Path) -> None:
    samples = [(f"photo.{i}", image, text) for i, (_, image, text) in enumerate(SAMPLES)]
    records = read(write_tar(tmp_path / "a.tar", samples))
    assert [(r.key, r.captions["txt"][0]) for r in records] == [(k, t) for k, _, t in samples]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    """As of the other formats of text."""
    (record,) = read(write_tar(tmp_path / "a.tar", [("a", jpeg(), "\ufeffa dog")]))
    assert record.captions == {"txt": ["a dog"]}


def test_group_by_in_a_table_of_images(tmp_path: Path) -> None:
    samples = [(f"{i // 2}", jpeg(40 + i // 2), f"caption {i}") for i in range(6)]
    source = write_parquet(tmp_path / "a.parquet", samples, row_group_size=2)
    records = read(source.model_copy(update={"group_by": "id"}))
    assert [r.captions["caption"] for r in records] == [
        [f"caption {2 * i}", f"caption {2 * i + 1}"] for i in range(3)
    ]
    assert records[2].encoded().size[0] == 42


@pytest.mark.parametrize("write", [write_parquet, write_tar], ids=["parquet", "tar"])
def test_captions_of_another_picture_are_not_joined_to_the_first(
    write: Any, tmp_path: Path
) -> None:
    """Bytes are compared where rows have no names of pictures."""
    path = tmp_path / ("a.tar" if write is write_tar else "a.parquet")
    pictures = [jpeg(40), jpeg(40), jpeg(40), jpeg(48)]
    samples = [(f"{i}", picture, f"a dog, {i // 2}") for i, picture in enumerate(pictures)]
    source = write(path, samples)
    bad = BadRecords(1)
    (kept,) = read_image_text(source.model_copy(update={"group_by": source.fields[0]}), bad)
    assert kept.captions == {source.fields[0]: ["a dog, 0"] * 2}
    assert "have different images" in bad.examples[0]


def test_a_selection_keeps_its_records(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a.jsonl", SAMPLES[:4])
    second = write_tar(tmp_path / "b.tar", SAMPLES[4:])
    both = read_sources([first, second], BadRecords())
    places = [f"{tmp_path / 'b.tar'}:00006", f"{tmp_path / 'a.jsonl'}:2:00001"]
    assert [r.where for r in both.take([6, 1])] == places
    assert both.kinds() == {"captions", "txt"}
    assert both.has_kinds(["txt"]).tolist() == [False] * 4 + [True] * 4
    assert len(both.take(both.has_kinds(["txt"])).take(np.array([True, False, True, False]))) == 2


def test_kinds_are_known_without_reading_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = read_sources([write_folder(tmp_path / "a.jsonl", SAMPLES)] * 2, BadRecords())
    kept = image_text_index.ImageTextTable
    monkeypatch.setattr(kept, "__getitem__", lambda *_: pytest.fail("read"))
    assert both.kinds() == {"captions"} and both.has_kinds(["captions"]).all()


def test_a_table_knows_63_kinds(tmp_path: Path) -> None:
    kinds = {f"kind {i}": "a dog" for i in range(64)}
    few = dict(list(kinds.items())[:63])
    records = read(write_folder(tmp_path / "a.jsonl", [("0", jpeg(), few)]))
    assert records.has_kinds(["kind 62"]).all() and not records.has_kinds(["kind 63"]).any()
    with pytest.raises(RecordError, match=r"a\.jsonl: more than 63 kinds"):
        read(write_folder(tmp_path / "a.jsonl", [("0", jpeg(), kinds)]))


def test_the_table_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    source = write_folder(tmp_path / "pairs.jsonl", SAMPLES)
    read(source)
    (index,) = (tmp_path / ".llm2clip-index").iterdir()
    assert b'["00000", 0, "1", ' in index.read_bytes()


def test_no_flipped_bit_of_a_table_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged table is named, and made again where it is asked for."""
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    source = write_folder(tmp_path / "pairs.jsonl", SAMPLES)
    wanted = list(read(source))
    (index,) = (tmp_path / ".llm2clip-index").iterdir()
    whole, chance = index.read_bytes(), random.Random(0)
    for number in range(150):
        flipped = bytearray(whole)
        bit = chance.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        index.write_bytes(flipped)
        os.utime(index, ns=(number, number))  # a clock's tick may be longer than this loop's
        with pytest.raises(ValueError, match=re.escape(str(index))):
            table.Table(index)
        if number % 10 == 0:
            assert list(read(source)) == wanted
            assert index.read_bytes() == whole


def test_rows_beyond_the_first_batch_and_group_keep_their_image_and_number(
    tmp_path: Path,
) -> None:
    """Batches of 64 rows, groups of 100: each image lies in its own row of its own group."""
    import pyarrow as pa
    from pyarrow import parquet

    images = [f"image {n}".encode() for n in range(230)]
    data = pa.table({"image": images, "id": list(range(230))})
    parquet.write_table(data, tmp_path / "a.parquet", row_group_size=100)
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, data.schema) as writer,
    ):
        writer.write_table(data, max_chunksize=100)
    for name in ("a.parquet", "a.arrow"):
        rows = list(shards.table_rows(tmp_path / name, Refused()))
        assert [number for number, _ in rows] == list(range(1, 231))
        assert [row["id"] for _, row in rows] == list(range(230))
        assert [row["image"].read() for _, row in rows] == images


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_was_replaced_is_read_anew(tmp_path: Path, name: str) -> None:
    """In the same process, too: a table of it would be kept as one of the new file."""
    import pyarrow as pa
    from pyarrow import parquet

    for text in ("a red dog", "a blue cat, and more"):
        data, path = pa.table({"image": [text.encode()], "text": [text]}), tmp_path / name
        path.unlink(missing_ok=True)  # its pages are mapped
        if name == "a.parquet":
            parquet.write_table(data, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
                writer.write_table(data)
        ((_, row),) = shards.table_rows(path, Refused())
        assert (row["text"], row["image"].read()) == (text, text.encode())


@pytest.mark.parametrize("write", [write_parquet, write_tar], ids=["parquet", "tar"])
def test_pictures_of_a_file_that_is_replaced_meanwhile_are_not_paired(
    write: Any, tmp_path: Path
) -> None:
    """The captions were read from the old one, in whose places others' pictures lie now."""
    path = tmp_path / ("a.tar" if write is write_tar else "a.parquet")
    samples = [(f"{i}", jpeg(40, 40), f"a dog, {i}") for i in range(4)]
    records = read(write(path, samples))
    assert records[1].encoded().data == samples[1][1]
    write(path, samples[::-1])
    for kept in (records, pickle.loads(pickle.dumps(records))):
        with pytest.raises(ImageError, match="has changed since it was looked up; start again"):
            kept[1].encoded()
    assert read(write(path, samples[::-1]))[2].key == "1"


def test_a_list_of_one_picture_is_that_picture(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    lists = [[{"bytes": jpeg(40 + n), "path": None} for n in range(count)] for count in (1, 2)]
    table = pa.table({"image": lists, "captions": ["a dog", "two dogs"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    one, two = read(ImageTextSource(path=str(tmp_path / "a.parquet")))
    assert one.encoded().data == jpeg(40)
    with pytest.raises(ImageError, match=r"2 image\(s\) in 'image', 1 expected"):
        two.encoded()


def test_a_text_of_exactly_the_limit_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_TEXT_BYTES", 20)
    samples = [(str(n), jpeg(40, 40), "x" * length) for n, length in enumerate((20, 21))]
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for key, image, text in samples:
            add(shard, f"{key}.jpg", image)
            add(shard, f"{key}.txt", text.encode())
    bad = Refused()
    assert [key for key, _ in shards.tar_rows(tmp_path / "a.tar", bad)] == ["0"]
    assert bad.rows[0][0].endswith("a.tar:1") and "21 bytes of text" in bad.rows[0][1]


def test_at_most_63_kinds_of_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(jpeg(40, 40))
    for count, good in ((63, True), (64, False)):
        row = {"id": 0, "image": "a.png", "caption": {f"kind {n}": "red" for n in range(count)}}
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        source = ImageTextSource(path=str(tmp_path / "a.jsonl"), fields=["caption"])
        if good:
            found = read(source)
            assert found.has_kinds({"kind 62"}).tolist() == [True]
            assert found.has_kinds({"kind 63"}).tolist() == [False]
        else:
            with pytest.raises(RecordError, match="more than 63 kinds"):
                read(source)


def test_other_keys_of_one_hash_are_other_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_text_index, "hash", lambda text: 7, raising=False)
    source = write_folder(tmp_path / "pairs.jsonl", SAMPLES)
    assert [record.key for record in read(source)] == [key for key, *_ in SAMPLES]


def test_filters_are_part_of_a_tables_name_and_the_folder_none_of_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE_FILE_FROM_BYTES", 0)
    for folder in "ab":
        (tmp_path / folder).mkdir()
    source = write_folder(tmp_path / "a" / "pairs.jsonl", SAMPLES)
    whole = read(source)
    key = SAMPLES[3][0]
    few = read(source.model_copy(update={"where": {source.id_field: key}}))
    assert [record.key for record in few] == [key]
    assert len(read(source.model_copy(update={"limit": 2}))) == 2
    moved = read(write_folder(tmp_path / "b" / "pairs.jsonl", SAMPLES))
    assert [r.identity for r in whole] == [r.identity for r in moved]
    other = read(write_folder(tmp_path / "b" / "others.jsonl", SAMPLES))
    assert not {r.identity for r in whole} & {r.identity for r in other}
