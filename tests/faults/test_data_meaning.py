"""Data that would change its meaning in silence, and files that would fill the memory."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import resource
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm2clip_vlm.data.conversation.token_table import read_instructions
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.images import EncodedImage, ImageError, open_image
from llm2clip_vlm.data.reading.records import iter_records, iter_rows
from llm2clip_vlm.evaluation.encoder.benchmarks import read_retrieval
from llm2clip_vlm.recipe.base import CaptionSource, ImageTextSource, RunRecipe
from llm2clip_vlm.recipe.evaluation import RetrievalTask
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe
from llm2clip_vlm.recipe.vlm import InstructionSource
from tests.image_corpus import encode, jpeg, photo

TURNS = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]


def small(before: int) -> bool:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(share: float, end: bytes = b"IEND") -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo()))
    header = struct.pack(">IIBBBBB", 96, 64, 8, 2, 0, 0, 0)
    data = zlib.compress(rows[: int(len(rows) * share)])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(end, b"")


def between_scans(scans: int) -> bytes:
    data = jpeg(240, 160, progressive=True)
    at = 0
    for _ in range(scans + 1):
        at = data.index(b"\xff\xda", at + 1)
    tables = data.rfind(b"\xff\xc4", 0, at)
    return data[: tables if data.rfind(b"\xff\xda", 0, at) < tables else at] + b"\xff\xd9"


def half(kind: str, **options: object) -> bytes:
    data = encode(photo(240, 160), kind, **options)
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def cmyk() -> bytes:
    data = encode(photo(240, 160).convert("CMYK"))
    return data[: len(data) // 2] + b"\xff\xd9"


def tiff() -> bytes:
    data = encode(photo(240, 160), "TIFF", compression="jpeg")
    return data[: len(data) // 2] + bytes(300) + data[len(data) // 2 + 300 :]


CUT = {
    "PNG without its last rows": lambda: png(0.99),
    "PNG of a tenth": lambda: png(0.1),
    "PNG without end": lambda: png(1, b"teXt"),
    **{f"JPEG after {n} scans": lambda n=n: between_scans(n) for n in (1, 4, 9)},
    "WebP": lambda: half("WEBP"),
    "lossless WebP": lambda: half("WEBP", lossless=True),
    "AVIF": lambda: half("AVIF"),
    "CMYK JPEG": cmyk,
    "JPEG in TIFF": tiff,
}


@pytest.mark.parametrize("name", CUT)
def test_missing_parts_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="does not decode"):
        EncodedImage(CUT[name](), "x").rgb(strict=True)


def test_black_pictures_are_whole() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"):
        data = encode(Image.new("RGB", (300, 200)), kind)
        assert EncodedImage(data, "x").rgb(strict=True).getextrema()[0][1] == 0
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
        EncodedImage(encode(Image.new(mode, (30, 21)), "PNG"), "x").rgb(strict=True)


def test_scans_have_a_budget() -> None:
    data = jpeg(64, 64, progressive=True)
    start = data.rindex(b"\xff\xda")
    many = data[:-2] + data[start:-2] * 200 + b"\xff\xd9"
    with pytest.raises(ImageError, match="more than 100 scans"):
        EncodedImage(many, "x")


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_stay_grey(order: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if order == "<u2":
        handle = io.BytesIO()
        Image.fromarray(ramp).save(handle, "PNG", transparency=5)
        data = handle.getvalue()
    else:
        image = Image.frombytes("I;16B", (256, 256), ramp.astype(order).tobytes())
        data = encode(image, "TIFF")
    assert abs(np.asarray(EncodedImage(data, "x").rgb()).mean() - 127.5) < 0.1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colours", [1, 3])
def test_a_transparent_colour_is_white_and_no_other(bits: int, colours: int) -> None:
    if colours == 3 and bits < 8:
        return
    top, dark = 2**bits - 1, 2**bits // 4
    values = np.full((16, 16, colours), top)
    values[4:12, 4:12], values[12:, :] = dark, 0
    flat = values.reshape(16, -1)
    places = 2 ** np.arange(bits)[::-1]
    rows = np.packbits((flat[..., None] & places > 0).reshape(16, -1), axis=1)
    header = struct.pack(">IIBBBBB", 16, 16, bits, colours - 1, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (b"IHDR", header), (b"tRNS", struct.pack(">H", dark) * colours), (b"IDAT", data)
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in (*parts, (b"IEND", b"")))
    shown = np.asarray(EncodedImage(file, "x").rgb())
    assert (shown[:12] == 255).all() and (shown[12:] == (255 if dark == 0 else 0)).all()


@pytest.mark.parametrize(("bits", "inverted"), [(12, False), (16, True)])
def test_greys_of_a_tiff_keep_their_range(bits: int, inverted: bool) -> None:
    ramp = np.tile(np.linspace(0, 2**bits - 1, 256).astype(np.uint16), (64, 1))
    body = (2**bits - 1 - ramp if inverted else ramp).astype("<u2").tobytes()
    if bits == 12:
        first, second = np.frombuffer(body, "<u2").astype(int).reshape(-1, 2).T
        packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        body = np.stack(packed, 1).astype(np.uint8).tobytes()
    tags = {256: 256, 257: 64, 258: bits, 259: 1, 262: int(not inverted), 273: 8, 277: 1,
            278: 64, 279: len(body)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ends = struct.pack("<I", 8 + len(body)), struct.pack("<H", len(tags)), bytes(4)
    data = b"II*\0" + ends[0] + body + ends[1] + entries + ends[2]
    shown = np.asarray(EncodedImage(data, "x").rgb())[0, :, 0].astype(int)
    assert np.abs(shown - np.arange(256)).max() <= 1


def test_reasons_are_equal_where_the_fault_is() -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            EncodedImage(b"no picture", "x")
        reasons.add(str(caught.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()


def test_links_are_followed_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.jpg").write_bytes(jpeg())
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "disk")
    os.mkfifo(tmp_path / "disk/fifo.jpg")
    with pytest.raises(ImageError, match="follow_links: true"):
        open_image(root, "train/a.jpg")
    assert open_image(root, "train/a.jpg", follow_links=True).size == (96, 64)
    for name in ("train/fifo.jpg", "../disk/a.jpg", "train", str(tmp_path / "disk/a.jpg")):
        with pytest.raises(ImageError):
            open_image(root, name, follow_links=True)
    rows = [{"id": "a", "image": "train/a.jpg", "captions": "a dog"}]
    (root / "a.jsonl").write_text(json.dumps(rows[0]))
    source = ImageTextSource(path=str(root / "a.jsonl"), follow_links=True)
    assert read_image_text(source, BadRecords())[0].open().size == (96, 64)
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, TURNS[1]]
    (root / "a.json").write_text(json.dumps([{"image": "train/a.jpg", "conversations": turns}]))
    for follow, count in ((True, 1), (False, 0)):
        told = InstructionSource(path=str(root / "a.json"), follow_links=follow)
        assert len(list(read_instructions(told, BadRecords(1)))) == count


@pytest.mark.parametrize("kind", ["bytes", "list", "struct", "null"])
def test_a_picture_without_placeholder_is_a_bad_record(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    cell: Any = {"bytes": jpeg(), "list": [{"bytes": jpeg(), "path": None}],
                 "struct": {"bytes": jpeg(), "path": None}, "null": None}[kind]  # fmt: skip
    rows = [{"id": i, "image": cell if i else (jpeg() if kind == "null" else cell),
             "conversations": TURNS} for i in range(3)]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    bad = BadRecords(9)
    read = list(read_instructions(InstructionSource(path=str(tmp_path / "a.parquet")), bad))
    assert (len(read), bad.count) == ((2, 1) if kind == "null" else (0, 3))


@pytest.mark.parametrize(
    "more",
    [
        {"image_path": "images/a.jpg"}, {"img": "a.PNG"}, {"pictures": ["a.webp", "b.webp"]},
        {"video": "x.mp4"}, {"audio": "x.wav"}, {"url": "https://host/a.jpeg"},
    ],
)  # fmt: skip
def test_a_picture_under_another_name_is_not_left_out(tmp_path: Path, more: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": "x", "conversations": TURNS, **more}]))
    bad = BadRecords(1)
    assert not list(read_instructions(InstructionSource(path=str(path)), bad))
    assert f"the column {next(iter(more))!r} holds" in bad.examples[0]
    source = InstructionSource(path=str(path), columns=["id", "conversations"])
    assert len(list(read_instructions(source, BadRecords()))) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"id": "000123.jpg"}, {"source": "sharegpt", "model": ""}, {"image": None}, {"image": ""},
        {"url": "https://host/page.html"}, {"note": "see a.jpg and b.jpg"}, {"score": 0.5},
    ],
)  # fmt: skip
def test_text_alone_stays_text(tmp_path: Path, more: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": TURNS, **more}]))
    source = InstructionSource(path=str(tmp_path / "a.json"))
    assert len(list(read_instructions(source, BadRecords()))) == 1


@pytest.mark.parametrize(
    ("values", "filters", "left"),
    [
        (["True", "False"], {"drop_where": {"x": ["true"]}}, 1),
        (["True", "False"], {"drop_where": {"x": [True]}}, 1),
        ([True, False], {"where": {"x": "False"}}, 1),
        (["2014.0", "2015.0"], {"drop_where": {"x": ["2014"]}}, 1),
        ([2014.0, 2015.0], {"where": {"x": 2014}}, 1),
        (["007", "7"], {"where": {"x": 7}}, 1),
        (["a", "b"], {"drop_where": {"x": ["A"]}}, None),
        (["a", "b"], {"drop_where": {"x": ["a", "c"]}}, None),
        (["a", "b"], {"where": {"x": "c"}}, None),
        ([1, 0], {"drop_where": {"x": ["true"]}}, None),
        (["a", "b"], {"drop_where": {"x": ["c"]}, "limit": 1}, None),
    ],
)
def test_filters_mean_what_people_write(
    tmp_path: Path, values: list[Any], filters: dict[str, Any], left: int | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"x": value, "t": "c"}) + "\n" for value in values))
    records = iter_records(CaptionSource(path=str(path), fields=["t"], **filters), Refused())
    if left is None:
        with pytest.raises(RecordError, match=r"no row's 'x' is .* it has"):
            list(records)
    else:
        assert len(list(records)) == left


def test_one_caption_is_no_list_of_letters(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"image": "0.png", "caption": "a red dog"}]')
    task = RetrievalTask(task="retrieval", benchmark="coco", data=str(tmp_path / "a.json"))
    assert read_retrieval(task)[0][0].captions == {"captions": ["a red dog"]}
    (tmp_path / "a.json").write_text('[{"image": "0.png", "captions": [3]}]')
    with pytest.raises(ValueError, match="expected a name and a caption"):
        read_retrieval(task)


def test_files_of_equal_names_are_counted_apart(tmp_path: Path) -> None:
    bad = BadRecords(9)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [{"id": i, "image": "no.png", "conversations": TURNS} for i in range(3)]
        (tmp_path / folder / "t.json").write_text(json.dumps(rows))
        list(read_instructions(InstructionSource(path=str(tmp_path / folder / "t.json")), bad))
    assert bad.count == 6


def test_splits_and_configurations_of_a_data_set_are_counted_apart(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": i, "image": "no.png", "conversations": TURNS} for i in range(3)]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path)
    bad = BadRecords(9)
    for split in ("train", "test"):
        list(read_instructions(InstructionSource(dataset=str(tmp_path), split=split), bad))
    assert bad.count == 6
    names = [InstructionSource(dataset="org/set", name=name).title for name in ("a", "b")]
    assert names == ["org/set/a", "org/set/b"]


@pytest.mark.parametrize("column", ["id", "image", "value", "key"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_character_costs_one_record(tmp_path: Path, column: str, name: str) -> None:
    row: dict[str, Any] = {"id": "s", "conversations": TURNS}
    if column == "value":
        row["conversations"] = [TURNS[0], {"from": "gpt", "value": "red \ud83d"}]
    elif column == "key":
        row["\ud83d"] = 1
    else:
        row[column] = "\ud83d"
    rows = [{"id": "ok", "conversations": TURNS}, row]
    lines = map(json.dumps, rows)
    (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(lines))
    bad = BadRecords(1)
    read = list(read_instructions(InstructionSource(path=str(tmp_path / name)), bad))
    assert [record.key for record in read] == [f"{name}:ok"] and bad.count == 1


def test_logs_cannot_be_forged_nor_filled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = ["x\n2026 CRITICAL forged\x1b[2J", "long" * 10**5, "long" * 10**5 + "other"]
    rows = [{"id": i, "image": "A" * 10**6, "conversations": TURNS} for i in ids]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    bad = BadRecords(9, ledger=tmp_path / "dropped.jsonl")
    with caplog.at_level(logging.WARNING):
        list(read_instructions(InstructionSource(path=str(tmp_path / "a.json")), bad))
    assert bad.count == 3
    text = (tmp_path / "dropped.jsonl").read_text() + "".join(r.message for r in caplog.records)
    assert len(text) < 10_000 and "\x1b" not in text
    assert all("\n" not in record.message for record in caplog.records)


def test_a_conversation_has_a_length(tmp_path: Path) -> None:
    long = [TURNS[0], {"from": "gpt", "value": "word " * 2 * 10**6}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "conversations": long}))
    bad = BadRecords(1)
    assert not list(read_instructions(InstructionSource(path=str(tmp_path / "a.jsonl")), bad))
    assert "characters, at most" in bad.examples[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("lines", [False, True])
def test_what_unpacks_beyond_measure_is_refused(tmp_path: Path, suffix: str, lines: bool) -> None:
    path = tmp_path / f"a.{suffix}.gz"
    with gzip.open(path, "wb") as handle:
        handle.write(b"[" if suffix == "json" else b"{")
        for _ in range(512):
            handle.write((b" " * 1023 + b"\n" if lines else b'"a' * 512) * 2**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=r"a\.\w+\.gz"):
        for _ in iter_rows(path, BadRecords(10**9)):
            pass
    assert small(before)


@pytest.mark.parametrize("kind", ["chain", "announced"])
def test_tar_headers_are_bounded(tmp_path: Path, kind: str) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 0 if kind == "chain" else 20 * 2**30
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header * (3000 if kind == "chain" else 1) + bytes(10240))
    os.truncate(tmp_path / "a.tar", 4 * 2**30)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=r"a\.tar.*extension header"):
        list(iter_rows(tmp_path / "a.tar"))
    assert small(before)


def test_parquet_is_bounded(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    cell = pa.table({"t": ["a" * 150 * 2**20], "id": [1]})
    parquet.write_table(cell, tmp_path / "cell.parquet", compression="zstd")
    index = pa.array(np.zeros(3 * 10**6, np.int8))
    rows = pa.table({"t": pa.DictionaryArray.from_arrays(index, pa.array(["a"]))})
    parquet.write_table(rows, tmp_path / "rows.parquet", compression="zstd")
    del cell, rows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, reason in (("cell", "unpacks from"), ("rows", "rows in")):
        with pytest.raises(RecordError, match=reason):
            list(iter_rows(tmp_path / f"{name}.parquet"))
    assert small(before)


def test_arrays_are_read_item_by_item(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "x" * 3000} for i in range(1500)]  # longer than what is read at once
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "[]", " [ ] "):
        (tmp_path / "a.json").write_text(text)
        assert list(iter_rows(tmp_path / "a.json")) == json.loads(text)
    for text in ("[{}", "[{},]", "[{} {}]", "[{}] x", "[,{}]", "[" * 10**4, json.dumps(rows)[:-3]):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(RecordError, match="no JSON"):
            list(iter_rows(tmp_path / "a.json"))


def test_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "r.yaml").write_text("output_dir: x\n")
    monkeypatch.setenv("HOME", str(tmp_path))

    def load(value: str) -> str:
        return load_recipe(tmp_path / "r.yaml", RunRecipe, [f"output_dir={value}"]).output_dir

    assert load("runs/exp #3") == "runs/exp #3"
    assert load("~/x") == str(tmp_path / "x")
    for wrong in (
        '""',
        "' '",
        "null",
        str(tmp_path / "file"),
        str(tmp_path / "file/x"),
        "/dev/null",
    ):
        with pytest.raises(RecipeError, match="output_dir"):
            load(wrong)
