"""Broken image-text data: named, counted once, listed, never trained on; too much stops the run."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from llm2clip_vlm.data.image_text.dataset import ImageTextDataset, collate
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.images import MAX_IMAGE_BYTES, ImageError
from llm2clip_vlm.data.reading.shards import PackedImage
from llm2clip_vlm.recipe.base import ImageTextSource
from llm2clip_vlm.remote.addresses import RemoteError
from tests.image_corpus import BROKEN, GOOD, HTML, jpeg, photo
from tests.image_text_files import FORMATS, add, write_folder, write_parquet, write_tar
from tests.unit.test_image_text import processor

GOOD_ROWS = [(f"good{i}", jpeg(64 + i, 64), f"caption {i}") for i in range(3)]
MIXED = [
    *((f"g{i}", make(), f"good {name}") for i, (name, make) in enumerate(GOOD.items())),
    *((f"b{i}", make(), f"broken {name}") for i, (name, (make, _)) in enumerate(BROKEN.items())),
]

CAPTIONS: dict[str, tuple[object, str]] = {
    "empty": ("", "empty caption"),
    "blank": (" \t\u3000", "empty caption"),
    "of no width": ("\u200b\u200d", "empty caption"),
    "null": (None, "no caption"),
    "an empty list": ([], "no caption"),
    "NaN": (float("nan"), "is float"),
    "a number": (7, "is int"),
    "the word None": ("None", "only says 'None'"),
    "the word nan": ("nan", "only says 'nan'"),
    "20,000 characters": ("word " * 4000, "19999 characters"),
    "NUL": ("a dog\x00", "damaged text"),
    "half a character": ("a dog \ud83d", "damaged text"),
    "a URL": ("https://host/a.jpg?x=1", "URL or a file name"),
    "a list of pandas": ("['a dog', 'a cat']", "a list or mapping written as text"),
    "a list with an apostrophe": ("""["a man's dog", 'a cat']""", "a list or mapping written as"),
    "a list with nothing in it": ("['a dog', None]", "a list or mapping written as text"),
    "a tuple": ("('a dog', 'a cat')", "a list or mapping written as text"),
    "a mapping": ("{'raw': 'a dog', 'more': 'a cat'}", "a list or mapping written as text"),
    "sentences": ("[{'raw': 'a dog'}]", "a list or mapping written as text"),
    "a file name": ("IMG_1234.JPG", "URL or a file name"),
}
FINE_CAPTIONS = [
    "🐕🏖️",
    "كلب على الشاطئ",
    "a",
    "none of them is red",
    "see https://host for more",
    "[a] b",
    "(a dog) and a 'cat'",
    "{a dog} b",
]


def reasons(bad: BadRecords) -> str:
    return "; ".join(bad.examples)


@pytest.mark.parametrize("name", CAPTIONS)
def test_what_is_no_caption_is_named(tmp_path: Path, name: str) -> None:
    caption, reason = CAPTIONS[name]
    source = write_folder(tmp_path / "a.jsonl", [*GOOD_ROWS, ("x", jpeg(), caption)])
    bad = BadRecords(limit=1)
    assert [r.key for r in read_image_text(source, bad)] == ["good0", "good1", "good2"]
    assert bad.count == 1 and reason in reasons(bad) and "a.jsonl:4" in reasons(bad)
    with pytest.raises(RecordError, match=reason):
        read_image_text(source, BadRecords())


def test_unusual_captions_are_kept(tmp_path: Path) -> None:
    rows = [(str(i), jpeg(), caption) for i, caption in enumerate(FINE_CAPTIONS)]
    records = read_image_text(write_folder(tmp_path / "a.jsonl", rows), BadRecords())
    assert [r.captions["captions"][0] for r in records] == FINE_CAPTIONS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_that_is_no_utf8_costs_its_row_alone(tmp_path: Path, name: str) -> None:
    for key, image, _ in GOOD_ROWS:
        (tmp_path / f"{key}.jpg").write_bytes(image)
    rows = [b'{"id": "good%d", "image": "good%d.jpg", "captions": "caf%s"}' % (i, i, text)
            for i, text in enumerate((b"\xc3\xa9", b"\xe9", b"e"))]  # fmt: skip
    if name == "a.csv":
        cells = ((0, b"\xc3\xa9"), (1, b"\xe9"), (2, b"e"))
        rows = [b"id,image,captions", *(b"good%d,good%d.jpg,caf%s" % (i, i, t) for i, t in cells)]
    (tmp_path / name).write_bytes(b"\n".join(rows) + b"\n")
    bad = BadRecords(limit=1)
    records = read_image_text(ImageTextSource(path=str(tmp_path / name)), bad)
    assert [r.key for r in records] == ["good0", "good2"]
    assert bad.count == 1 and "cannot be read as UTF-8" in reasons(bad)


@pytest.mark.parametrize("image", ["../a.jpg", "/etc/hostname", "https://h/a.jpg", "pipe:cat a.jpg",
                                   "s3://b/a.jpg", "x/../../a.jpg", "", 3])  # fmt: skip
def test_no_path_leaves_the_folder(tmp_path: Path, image: object) -> None:
    source = write_folder(tmp_path / "a.jsonl", GOOD_ROWS)
    with Path(source.path).open("a") as handle:
        handle.write(json.dumps({"id": "x", "image": image, "captions": "c"}) + "\n")
    bad = BadRecords(limit=1)
    assert len(read_image_text(source, bad)) == 3
    assert bad.count == 1


@pytest.mark.parametrize("path", ["pipe:cat {0}", "ftp://host/{0}", "{0}.gz", "file://{0}"])
def test_a_source_is_a_file_and_nothing_else(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", GOOD_ROWS).path
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("a command was run"))
    refused = r"no such file|unknown kind|expected s3://"
    with pytest.raises((RecordError, RemoteError), match=refused):
        read_image_text(ImageTextSource(path=path.format(shard)), BadRecords())


def shard_with(tmp_path: Path, *members: tuple[str, bytes]) -> ImageTextSource:
    source = write_tar(tmp_path / "a.tar", GOOD_ROWS)
    with tarfile.open(source.path, "a") as shard:
        for name, data in members:
            add(shard, name, data)
    return source


SHARDS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no image": ([("x.txt", b"c"), ("x.json", b"{}")], "no image"),
    "an image only": ([("x.jpg", jpeg())], "no caption"),
    "a path in the JSON": ([("x.txt", b"c"), ("x.json", b'{"image": "/etc/hosts"}')], "no image"),
    "two images": ([("x.jpg", jpeg()), ("x.png", jpeg()), ("x.txt", b"c")], "image occurs twice"),
    "a text twice": ([("x.jpg", jpeg()), ("x.txt", b"c"), ("x.txt", b"d")], "txt occurs twice"),
    "a key again": ([("good1.jpg", jpeg()), ("good1.txt", b"other")], "occurs twice"),
    "invalid UTF-8": ([("x.jpg", jpeg()), ("x.txt", b"\xff\xfe")], "utf-8"),
    "no JSON": ([("x.jpg", jpeg()), ("x.txt", b"c"), ("x.json", b"{")], "no JSON"),
    "JSON of another kind": ([("x.jpg", jpeg()), ("x.json", b"[1]")], "expected an object"),
    "JSON without end": ([("x.jpg", jpeg()), ("x.json", b"[" * 100_000)], "no JSON"),
    "a text of 5 MiB": ([("x.jpg", jpeg()), ("x.txt", b"a" * 5 * 2**20)], "bytes of text"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_broken_sample_costs_itself_alone(tmp_path: Path, name: str) -> None:
    members, reason = SHARDS[name]
    bad = BadRecords(limit=1)
    records = read_image_text(shard_with(tmp_path, *members), bad)
    left = ["good0", "good2"] if name == "a key again" else ["good0", "good1", "good2"]
    assert [r.key for r in records] == left
    assert bad.count == 1 and reason in reasons(bad)


def test_links_and_devices_are_not_followed(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", GOOD_ROWS)
    with tarfile.open(source.path, "a") as shard:
        for kind, name in ((tarfile.SYMTYPE, "x.jpg"), (tarfile.LNKTYPE, "y.txt"),
                           (tarfile.FIFOTYPE, "z.json")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            shard.addfile(member)
        add(shard, "../../escape.jpg", jpeg())
        add(shard, "../../escape.txt", b"a name is no path")
    bad = BadRecords(limit=3)
    records = read_image_text(source, bad)
    assert [r.key for r in records] == ["good0", "good1", "good2", "../../escape"]
    assert records[3].encoded().size == (96, 64)  # read from the shard
    assert bad.count == 3 and "a link, device" in reasons(bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize(
    ("damage", "keys", "reason"),
    [
        (lambda d: d[: d.index(b"good2.jpg") + 700], 2, "inside good2.jpg"),
        (lambda d: d[: d.index(b"good2.jpg") + 100], 2, "ends too early"),
        (lambda d: d[: d.index(b"good2.txt")], 2, "no end marker"),
        (lambda d: d.replace(b"good2.jpg", b"\x07ood2.jpg", 1), 2, "damaged header"),
    ],
    ids=["inside an image", "inside a header", "between samples", "a header"],
)
def test_a_damaged_shard_gives_what_is_whole(
    tmp_path: Path, damage: Callable[[bytes], bytes], keys: int, reason: str
) -> None:
    source = write_tar(tmp_path / "a.tar", GOOD_ROWS)
    Path(source.path).write_bytes(damage(Path(source.path).read_bytes()))
    bad = BadRecords(limit=2)
    records = read_image_text(source, bad)
    assert [r.key for r in records] == ["good0", "good1", "good2"][:keys]
    assert reason in reasons(bad)
    assert [r.encoded().data for r in records] == [row[1] for row in GOOD_ROWS[:keys]]


@pytest.mark.parametrize("content", [b"", b"no tar", b"\x1f\x8b\x08" + b"x" * 600])
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(RecordError, match=r"a\.tar: no uncompressed tar file"):
        read_image_text(ImageTextSource(path=str(tmp_path / "a.tar")), BadRecords(9))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json"])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 but not really")
    with pytest.raises(RecordError, match=r"cannot be read|no JSON"):
        read_image_text(ImageTextSource(path=str(tmp_path / name)), BadRecords(9))


def test_a_row_without_bytes_is_met_when_it_is_its_turn(tmp_path: Path) -> None:
    rows = [*GOOD_ROWS, ("none", None, "a caption")]
    records = read_image_text(write_parquet(tmp_path / "a.parquet", rows), BadRecords())
    bad = BadRecords(limit=1)
    assert len(ImageTextDataset(records, processor(), bad=bad)) == 3
    assert "holds no bytes" in reasons(bad)


def test_a_shard_that_shrinks_under_the_run_is_named(tmp_path: Path) -> None:
    records = read_image_text(write_tar(tmp_path / "a.tar", GOOD_ROWS), BadRecords())
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    image = records[2].image
    assert isinstance(image, PackedImage)
    with pytest.raises(ImageError, match="has changed"):
        records[2].open()
    with pytest.raises(ImageError, match="expected at most"):
        PackedImage(tmp_path / "a.tar", 0, MAX_IMAGE_BYTES + 1).read()


def test_annotations_without_their_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    document = {
        "images": [{"id": 1, "file_name": "0.jpg"}, {"id": 2, "file_name": "1.jpg"}, "odd"],
        "annotations": [
            {"image_id": 1, "caption": "a dog"}, {"image_id": 1, "caption": "one dog"},
            {"image_id": 9, "caption": "of nothing"}, {"caption": "of nobody"},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(document))
    bad = BadRecords(limit=9)
    (record,) = read_image_text(ImageTextSource(path=str(tmp_path / "a.json")), bad)
    assert record.captions["captions"] == ["a dog", "one dog"]
    assert bad.count == 4
    for reason in ("not in `images`", "no object with an image_id", "str, expected", "no caption"):
        assert reason in reasons(bad)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shard.tar", "pairs.jsonl", "rows.parquet"])
def test_each_broken_image_counts_once_and_is_never_trained_on(
    tmp_path: Path, name: str, workers: int
) -> None:
    """Two epochs, two workers, a resume: the list has each broken image once."""
    source = FORMATS[name](tmp_path / name, MIXED)
    for run in range(2):
        bad = BadRecords.beside(tmp_path / "out", 0, 0.9, resumes=run == 1)
        data = ImageTextDataset(
            read_image_text(source, bad), processor(), bad=bad, preload_limit_bytes=0, fast=True
        )
        loader = DataLoader(data, batch_size=5, num_workers=workers, collate_fn=collate)
        for epoch in range(2):
            data.set_epoch(epoch)
            for batch in loader:
                assert all(text.startswith("good ") for text in batch["captions"])
                assert not torch.isnan(batch["pixel_values"]).any()
        assert bad.summary().startswith(f"{len(BROKEN)} bad record(s) skipped")
    rows = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
    assert sorted(row["where"].split(":b")[1] for row in rows) == sorted(
        map(str, range(len(BROKEN)))
    )
    for row in rows:
        assert BROKEN[list(BROKEN)[int(row["where"].split(":b")[1])]][1] in row["why"]


def test_a_run_that_too_many_have_stopped_stops_again(tmp_path: Path) -> None:
    for resumes in (False, True):
        bad = BadRecords.beside(tmp_path, 1, 0, resumes=resumes)
        bad.add("a:1", "broken")
        with pytest.raises(RecordError, match=r"2 bad record\(s\), 1 allowed; the last is a:2"):
            bad.add("a:2", "broken")
    more = BadRecords.beside(tmp_path, 2, 0, resumes=True)
    more.take(0, [("a:1", "broken"), ("a:2", "broken")])
    assert more.count == 2
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    assert {row["where"] for row in rows} == {"a:1", "a:2"}


def test_a_fresh_run_begins_a_new_list(tmp_path: Path) -> None:
    BadRecords.beside(tmp_path, 1, 0, resumes=False).add("a:1", "old")
    assert BadRecords.beside(tmp_path, 1, 0, resumes=True).summary().startswith("1 bad")
    assert BadRecords.beside(tmp_path, 1, 0, resumes=False).summary() == "no bad records"


def test_the_budget_is_a_share_of_all_records(tmp_path: Path) -> None:
    rows = [(str(i), b"", f"caption {i}") for i in range(200)]
    rows[3:5] = [("3", b"", ""), ("4", b"", " ")]
    source = write_folder(tmp_path / "a.jsonl", rows)
    bad = BadRecords(fraction=0.01)
    assert len(read_image_text(source, bad)) == 198
    assert (bad.allowed, bad.count) == (2, 2)
    with pytest.raises(RecordError, match=r"3 bad record\(s\), 2 allowed of 200 records"):
        bad.add("a.jsonl:9", "one more")
    with pytest.raises(RecordError, match=r"2 bad record\(s\), 0 allowed"):
        read_image_text(source, BadRecords(fraction=0.004))
    assert len(read_image_text(source, BadRecords(limit=2, fraction=0.004))) == 198


def test_too_many_broken_images_stop_a_worker_loudly(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a.jsonl", MIXED)
    bad = BadRecords.beside(tmp_path / "out", 2, 0, resumes=False)
    records = read_image_text(source, bad)
    data = ImageTextDataset(records, processor(), bad=bad, preload_limit_bytes=0)
    with pytest.raises(RecordError, match=r"3 bad record\(s\), 2 allowed"):
        list(DataLoader(data, batch_size=4, num_workers=1, collate_fn=collate))


def test_reasons_are_summed_up(tmp_path: Path) -> None:
    bad = BadRecords(limit=20)
    for i in range(12):
        bad.add(f"a:{i}", f"an empty caption in 'c{i}'")
    assert "12 x an empty caption in *" in bad.summary()


def test_names_with_half_characters_do_not_stop_the_report(tmp_path: Path) -> None:
    bad = BadRecords.beside(tmp_path, 1, 0, resumes=False)
    bad.add("a\udcff:1", "why \ud83d")
    io.TextIOWrapper(io.BytesIO(), encoding="utf-8").write(bad.summary())
    assert photo().size == (96, 64)


def test_files_of_one_name_lines_and_ids_are_told_apart(tmp_path: Path) -> None:
    """Line 3 of a file, the record with the id 3 and line 3 of its namesake are three records."""
    bad = BadRecords.beside(tmp_path / "out", 9, 0, resumes=False)
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        rows = [("1", jpeg(), "a dog"), ("3", b"", "a broken one"), ("2", jpeg(), "")]
        records = read_image_text(write_folder(tmp_path / folder / "pairs.jsonl", rows), bad)
        assert len(ImageTextDataset(records, processor(), bad=bad)) == 1
    assert bad.count == 4
    assert len((tmp_path / "out" / "dropped.jsonl").read_text().splitlines()) == 4


def test_a_ledger_torn_by_a_kill_is_mended(tmp_path: Path) -> None:
    bad = BadRecords.beside(tmp_path, 9, 0, resumes=False)
    bad.add("a:1", "first")
    with (tmp_path / "dropped.jsonl").open("a") as handle:
        handle.write('{"where": "a:2", "w')
    again = BadRecords.beside(tmp_path, 9, 0, resumes=True)
    again.add("a:2", "second")
    again.add("a:1", "first")
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    assert [row["where"] for row in rows] == ["a:1", "a:2"] and again.count == bad.count == 2


def test_rows_without_an_id_are_never_one_twice(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text('{"image": "x.jpg", "captions": "a dog"}\n' * 2)
    source = ImageTextSource(path=str(tmp_path / "*" / "p.jsonl"))
    assert len(read_image_text(source, BadRecords())) == 4


def test_texts_in_columns_of_bytes_and_damaged_text_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array([b"a dog", b"caf\xe9", "une fée".encode()])
    names = pa.array([f"{i}.jpg" for i in range(3)])
    for column in (texts, texts.view(pa.string())):
        parquet.write_table(pa.table({"image": names, "captions": column}), tmp_path / "a.parquet")
        bad = BadRecords(1)
        records = read_image_text(ImageTextSource(path=str(tmp_path / "a.parquet")), bad)
        assert [r.captions["captions"] for r in records] == [["a dog"], ["une fée"]]
        assert bad.count == 1 and "a.parquet:2" in reasons(bad) and "UTF-8" in reasons(bad)


def damaged(source: ImageTextSource, how: str) -> None:
    """A shard whose second sample's text has an impossible size, or another shard behind it."""
    path = Path(source.path)
    data = bytearray(path.read_bytes())
    at = data.index(b"good1.txt")
    if how == "concatenated":
        path.write_bytes(data + data)
        return
    data[at + 124 : at + 136] = b"\xff" * 12 if how == "negative size" else b"77777777777\0"
    header = data[at : at + 148] + b" " * 8 + data[at + 156 : at + 512]
    data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "keys", "reason"),
    [
        ("negative size", ["good0"], "inside good1.txt"),
        ("huge size", ["good0"], "inside good1.txt"),
        ("concatenated", ["good0", "good1", "good2"], "data behind its end"),
    ],
)
def test_what_tarfile_takes_without_a_word(
    tmp_path: Path, how: str, keys: list[str], reason: str
) -> None:
    source = write_tar(tmp_path / "a.tar", GOOD_ROWS)
    damaged(source, how)
    bad = BadRecords(limit=1)
    assert [r.key for r in read_image_text(source, bad)] == keys
    assert bad.count == 1 and reason in reasons(bad)


def test_a_damaged_extended_header_ends_the_shard(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", GOOD_ROWS)
    with tarfile.open(source.path, "a", format=tarfile.PAX_FORMAT) as shard:
        member = tarfile.TarInfo("x.jpg")
        member.pax_headers = {"GNU.sparse.map": "1,x"}
        shard.addfile(member)
    bad = BadRecords(limit=1)
    assert len(read_image_text(source, bad)) == 3
    assert "ends too early: invalid literal" in reasons(bad)


def test_a_member_whose_name_is_no_utf8(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", [("caf\udce9", jpeg(), "a dog"), *GOOD_ROWS])
    records = read_image_text(source, BadRecords())
    assert [r.key for r in records] == ["caf\udce9", "good0", "good1", "good2"]
    assert len(ImageTextDataset(records, processor())) == 4


@pytest.mark.parametrize(
    "content", [gzip.compress(b"{}\n" * 9, mtime=0), "{}\n".encode("utf-16"), HTML]
)
def test_a_file_of_bad_lines_alone_is_reported_as_such(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    bad = BadRecords.beside(tmp_path, 0, 0.01, resumes=False)
    with pytest.raises(RecordError, match=r"bad record\(s\), 0 allowed.*a.jsonl:"):
        read_image_text(ImageTextSource(path=str(tmp_path / "a.jsonl")), bad)
    assert (tmp_path / "dropped.jsonl").is_file()
