"""Conversations: every format read unchanged, checked, tokenised, images in order."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import re
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm2clip_vlm.chat.template import ConversationError
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation import instruction, token_table
from llm2clip_vlm.data.conversation.instruction import (
    InstructionCollator,
    InstructionDataset,
    chosen_rows,
    expand_mixtures,
)
from llm2clip_vlm.data.conversation.token_table import read_instructions
from llm2clip_vlm.data.reading import table as arrow
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.recipe.vlm import InstructionSource
from tests.tiny import write_image
from tests.vlm_fixtures import write_llava

ANSWER = {"from": "gpt", "value": "red"}


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_llm: Path) -> Any:
    from llm2clip_vlm.models.vlm.building import build_vlm

    return build_vlm(tiny_clip, tiny_llm)[1]


def source(path: Path, **values: Any) -> InstructionSource:
    return InstructionSource(path=str(path), **values)


def records(path: Path, **values: Any) -> list[Any]:
    return list(read_instructions(source(path, **values), BadRecords()))


def dataset(path: Path, processor: Any, allowed: int = 0, **values: Any) -> InstructionDataset:
    options = {"max_length_tokens": 128, "bad": BadRecords(allowed)}
    options |= {k: values.pop(k) for k in list(values) if k not in InstructionSource.model_fields}
    return InstructionDataset([source(path, **values)], processor, **options)


def same(one: InstructionDataset, other: InstructionDataset) -> bool:
    """Whether two sets hold the same samples in the same order, names apart."""
    pairs = [(one[i], other[i]) for i in range(len(one))]
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if k != "sample_id")
        for a, b in pairs
    )


def test_limits_and_roots(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "elsewhere", 6, text_only=[2])
    assert [len(r.images) for r in records(path)] == [1, 1, 0, 1, 1, 1]
    assert len(records(path, limit=2)) == 2
    moved = path.rename(tmp_path / "llava.json")
    assert len(records(moved, image_root=str(tmp_path / "elsewhere"))) == 6
    with pytest.raises(ValueError, match="no such file"):
        records(moved)


def write_formats(folder: Path, count: int = 6) -> dict[str, Path]:
    """The same samples (one of text alone, one of two images) in every format."""
    import pyarrow as pa
    from pyarrow import parquet

    path = write_llava(folder, count, text_only=[2])
    rows = json.loads(path.read_text())
    rows[3]["image"] = ["images/3.png", "images/0.png"]
    rows[3]["conversations"][0]["value"] = "<image> and <image>"
    path.write_text(json.dumps(rows))
    found = {"json": path, "jsonl.gz": folder / "llava.jsonl.gz"}
    with gzip.open(found["jsonl.gz"], "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)

    def names(row: dict[str, Any]) -> list[str]:
        image = row.get("image", [])
        return list(image) if isinstance(image, list) else [image]

    def messages(row: dict[str, Any], named: bool) -> list[dict[str, Any]]:
        left, turns = names(row), []
        for turn in row["conversations"]:
            parts: list[dict[str, Any]] = []
            for n, text in enumerate(turn["value"].split("<image>")):
                image = {"image": left.pop(0)} if n and named else {}
                parts += [{"type": "image", **image}] if n else []
                words = {"type": "text", "text": text.strip("\n")}
                parts += [words] if words["text"] else []
            role = "user" if turn["from"] == "human" else "assistant"
            turns.append({"role": role, "content": parts})
        return turns

    for name, named in (("messages", False), ("inline", True)):
        found[name] = folder / f"{name}.jsonl"
        listed = [
            {"messages": messages(r, named)} | ({} if named else {"images": names(r)}) for r in rows
        ]
        found[name].write_text("\n".join(json.dumps(row) for row in listed))

    def png(name: str) -> bytes:
        return (folder / name).read_bytes()

    turns = [[{k: t[k] for k in ("from", "value")} for t in r["conversations"]] for r in rows]
    lists = [[{"bytes": png(n), "path": n} for n in names(r)] for r in rows]
    found["parquet"] = folder / "llava.parquet"
    table = pa.table({"id": list(map(str, range(count))), "conversations": turns, "images": lists})
    parquet.write_table(table, found["parquet"], row_group_size=2)
    found["paths"] = folder / "paths.parquet"
    parquet.write_table(
        pa.table({"conversations": turns, "image": [names(r) for r in rows]}), found["paths"]
    )
    found["cauldron"] = folder / "cauldron.parquet"
    said = [[turn["value"].removeprefix("<image>\n") for turn in row] for row in turns]
    pairs = [
        [{"user": q, "assistant": a, "source": "x"} for q, a in zip(t[::2], t[1::2], strict=True)]
        for t in said
    ]
    parquet.write_table(pa.table({"images": lists, "texts": pairs}), found["cauldron"])
    found["tar"] = folder / "shard-0.tar"
    with tarfile.open(found["tar"], "w") as shard:
        for n, row in enumerate(rows):
            members = {f"{n}.json": json.dumps({"conversations": row["conversations"]}).encode()}
            members |= {f"{n}.png": png(name) for name in names(row)[:1]}
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return found


def test_every_format_gives_the_same_samples(tmp_path: Path, processor: Any) -> None:
    found = write_formats(tmp_path)
    wanted = dataset(found["json"], processor)
    assert wanted.image_counts == [1, 1, 0, 2, 1, 1]
    for name in ("jsonl.gz", "messages", "inline", "parquet", "paths", "cauldron"):
        assert same(wanted, dataset(found[name], processor)), name
    shard = dataset(tmp_path / "shard-*.tar", processor, allowed=1)  # one image a sample there
    assert len(shard) == 5
    assert "2 <image> in the conversation, 1 image" in shard._bad.examples[0]
    assert torch.equal(shard[1]["pixel_values"], wanted[1]["pixel_values"])


def test_pictures_in_a_column_of_another_name_are_not_left_out(
    tmp_path: Path, processor: Any
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    row = json.loads(write_llava(tmp_path, 2, text_only=[1]).read_text())[1]
    turns, picture = [row["conversations"]] * 2, (tmp_path / "images/0.png").read_bytes()
    photos = pa.array([picture, None])
    kinds = [photos, photos.cast(pa.binary(len(picture))), photos.dictionary_encode()]
    kinds += [
        pa.array([[picture], None], pa.list_(pa.binary(), 1)),
        pa.array([{"data": picture}, None]),
    ]
    for column in kinds:
        table = pa.table({"conversations": turns, "photo": column})
        parquet.write_table(table, tmp_path / "a.parquet")
        data = dataset(tmp_path / "a.parquet", processor, allowed=1)
        assert len(data) == 1 and "column 'photo' holds bytes" in data._bad.examples[0]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("a.jpg", True),
        ("Screenshot at 10.00.png", True),
        ({"bytes": None, "path": "a.jpg"}, True),
        ([{"path": "a.jpg"}], True),
        ("about a.jpg and b", False),
    ],
)
def test_names_of_pictures_in_another_column_are_not_left_out(cell: Any, told: bool) -> None:
    row = {"conversations": [{"from": "human", "value": "what is in a.jpg"}, ANSWER], "photo": cell}
    if not told:
        assert token_table.to_record(row, "x").images == ()
        return
    with pytest.raises(ConversationError, match="the column 'photo' holds"):
        token_table.to_record(row, "x")


ASKED = {"from": "human", "value": "what colour ?"}


@pytest.mark.parametrize("row", [{"system": "be brief ."}, {"system_prompt": "be brief ."}])
def test_a_system_prompt_beside_the_turns_is_a_system_turn(row: dict[str, Any]) -> None:
    turn = {"from": "system", "value": "be brief ."}
    wanted = token_table.to_record({"conversations": [turn, ASKED, ANSWER]}, "x")
    assert wanted.messages[0] == {"role": "system", "content": "be brief ."}
    for turns in ([ASKED, ANSWER], [turn, ASKED, ANSWER]):
        assert token_table.to_record({"conversations": turns, **row}, "x") == wanted
    pair = {"texts": [{"user": "what colour ?", "assistant": "red"}], "images": ["a.jpg"], **row}
    first, second, _ = token_table.to_record(pair, "x").messages
    assert first == wanted.messages[0] and second["content"][0] == {"type": "image"}
    for empty in ("", None):
        turns = [ASKED, ANSWER]
        assert (
            len(token_table.to_record({"conversations": turns, "system": empty}, "x").messages) == 2
        )


def user(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts], **more}


WORDS = {"type": "text", "text": "which ?"}
PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("turn", "answer", "row", "why"),
    [
        ({"from": "system", "value": "a"}, {}, {"system": "b"}, "different system prompts"),
        (ASKED, {}, {"system": "a", "system_prompt": "b"}, "different system prompts"),
        (ASKED, {}, {"tools": "[{}]"}, "'tools' describes tools"),
        (ASKED, {"reasoning_content": "hm"}, {}, "has its reasoning apart"),
        (ASKED, {"function_call": {"name": "f"}}, {}, "calls a tool"),
        ({**ASKED, "image": "a.jpg"}, {}, {}, "'conversations' holds 'a.jpg'"),
        (user(WORDS, images=["a.jpg"]), {}, {}, "'conversations' holds 'a.jpg'"),
        (user({**WORDS, "image": "a.jpg"}), {}, {}, "'conversations' holds 'a.jpg'"),
        ({**ASKED, "value": "Picture 1: <img>a/1</img> ?"}, {}, {}, "holds <img>a/1</img>"),
        (ASKED, {}, {"meta": {"image": {"path": "a.jpg"}}}, "'meta' holds 'a.jpg'"),
        (
            user({**PICTURE, "index": 1}, {**PICTURE, "index": 0}, WORDS),
            {},
            {"images": ["a.jpg", "b.jpg"]},
            r"images of index \[1, 0\]",
        ),
        (
            user({**PICTURE, "image": "b.jpg"}, WORDS),
            {},
            {"images": ["a.jpg"]},
            "different images in one record",
        ),
        (user(PICTURE, WORDS), {}, {"image": "a.jpg", "images": ["b.jpg"]}, "different images"),
    ],
)
def test_what_a_record_says_elsewhere_is_not_left_out(
    turn: dict[str, Any], answer: dict[str, Any], row: dict[str, Any], why: str
) -> None:
    asked = [ASKED] if turn.get("from") == "system" else []
    with pytest.raises(ConversationError, match=why):
        token_table.to_record({"conversations": [turn, *asked, ANSWER | answer], **row}, "x")


def test_what_says_the_same_twice_is_taken() -> None:
    parts = [{**PICTURE, "index": n, "image": name} for n, name in enumerate("ab")]
    record = token_table.to_record(
        {"messages": [user(*parts, WORDS), ANSWER], "images": ["a", "b"]}, "x"
    )
    assert record.images == ("a", "b")


def test_a_llava_next_mixture_takes_what_it_lists(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 8)
    mixture = tmp_path / "mix.yaml"
    listed = [{"json_path": str(path), "sampling_strategy": s} for s in ("first:2", "end:25%")]
    mixture.write_text(yaml.safe_dump({"datasets": [*listed, {"json_path": str(path)}]}))
    data = dataset(mixture, processor, image_root=str(tmp_path))
    ids = [data[i]["sample_id"] for i in range(len(data))]
    assert [i.split(":r")[1] for i in ids] == [*"01", *"67", *"01234567"]
    with pytest.raises(ValueError, match="its entries have their own"):
        expand_mixtures([InstructionSource(path=str(mixture), sampling_strategy="first:10%")])
    mixture.write_text("datasets: [{json_path: a.json, sampling_stategy: first:1}]")
    with pytest.raises(ValueError, match="unknown key 'sampling_stategy'"):
        dataset(mixture, processor)
    mixture.write_text("datasets: [{json_path: a.json, sampling_strategy: most}]")
    with pytest.raises(ValueError, match="sampling_strategy"):
        dataset(mixture, processor)
    mixture.write_text("[]")
    with pytest.raises(ValueError, match=r"expected \{datasets"):
        dataset(mixture, processor)
    mixture.write_text("datasets: []")
    with pytest.raises(ValueError, match="no usable record"):
        dataset(mixture, processor)


def test_samplings_and_weights() -> None:
    def rows(strategy: str = "all", weight: float = 1.0, seed: int = 0) -> list[int]:
        chosen = InstructionSource(path="x", sampling_strategy=strategy, weight=weight)
        return [int(row) for row in chosen_rows(chosen, 10, seed)]

    assert rows() == list(range(10))
    assert rows("first:3") == [0, 1, 2]
    assert rows("end:15%") == [8, 9]
    assert rows("end:0") == rows("first:0") == []
    assert rows("end:99") == list(range(10))
    assert len(set(rows("random:4"))) == 4
    assert rows("random:4") == rows("random:4") != rows("random:4", seed=1)
    assert sorted(rows(weight=2)) == sorted([*range(10), *range(10)])
    half = rows(weight=1.5)
    assert half[:10] == list(range(10))
    assert len(set(half[10:])) == 5
    assert len(rows("first:4", weight=0.5)) == 2


def test_t65_a_large_source_is_tokenised_once(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = write_formats(tmp_path)
    small = {name: dataset(found[name], processor) for name in ("json", "parquet")}
    monkeypatch.setattr(arrow, "TABLE_FILE_FROM_BYTES", 0)
    runs: list[str] = []
    original = token_table.tokenise
    monkeypatch.setattr(token_table, "tokenise", lambda *a: runs.append(a[0].path) or original(*a))
    for name, wanted in small.items():
        for _ in range(2):  # the second maps the first one's table into memory
            assert same(dataset(found[name], processor, index_dir=str(tmp_path / "i")), wanted)
    assert runs == [str(found["json"]), str(found["parquet"])]
    kept = dataset(found["json"], processor)  # beside the data where no folder is named
    folder = tmp_path / ".llm2clip-index"
    assert str(folder) in Path("/proc/self/maps").read_text()
    for table, most in ((kept._tables[0], 500), (small["json"]._tables[0], 10_000)):
        sent = bytes(ForkingPickler.dumps(table))  # as workers that are spawned get it
        assert len(sent) < most  # and no tensor: torch would move it from under numpy's hands
        again = pickle.loads(sent)
        assert again.lengths.tolist() == table.lengths.tolist() == small["json"].lengths
        assert torch.equal(again.tokens(1)[0], table.tokens(1)[0])
    dataset(found["json"], processor, sampling_strategy="first:2")
    assert (len(runs), len(list(folder.iterdir()))) == (3, 1)
    dataset(found["json"], processor, max_length_tokens=127)
    dataset(found["json"], processor, allowed=1, plain=True)
    assert (len(runs), len(list(folder.iterdir()))) == (5, 3)
    found["json"].write_text(found["json"].read_text() + " ")
    dataset(found["json"], processor)
    assert (len(runs), len(list(folder.iterdir()))) == (6, 3)
    for table in folder.iterdir():
        table.write_bytes(table.read_bytes()[:100])
    assert same(dataset(found["json"], processor), small["json"])
    assert len(runs) == 7
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="set `index_dir`"):
        dataset(found["json"], processor, index_dir=str(tmp_path / "file" / "below"))


def test_no_flipped_bit_of_a_table_is_served(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged table is named, and made again where it is asked for."""
    found = write_formats(tmp_path)["json"]
    wanted = dataset(found, processor)
    monkeypatch.setattr(arrow, "TABLE_FILE_FROM_BYTES", 0)
    dataset(found, processor)
    (table,) = (tmp_path / ".llm2clip-index").iterdir()
    whole, chance = table.read_bytes(), random.Random(0)
    for number in range(150):
        flipped = bytearray(whole)
        bit = chance.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        table.write_bytes(flipped)
        os.utime(table, ns=(number, number))  # a clock's tick may be longer than this loop's
        with pytest.raises(ValueError, match=re.escape(str(table))):
            arrow.Table(table)
        if number % 50 == 0:
            assert same(dataset(found, processor), wanted)


@pytest.mark.parametrize("kept_bytes", [2**20, 0])
def test_t63_images_stand_in_the_order_of_their_placeholders(
    tmp_path: Path, processor: Any, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruction, "PRELOAD_LIMIT_BYTES", kept_bytes)
    for seed in range(2):
        write_image(tmp_path / f"{seed}.png", seed=seed)
    turns = [{"from": "human", "value": "<image> and <image>"}, ANSWER]
    rows = [
        {"id": i, "image": [f"{order[0]}.png", f"{order[1]}.png"], "conversations": turns}
        for i, order in enumerate([(0, 1), (1, 0)])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = dataset(tmp_path / "a.json", processor)
    one, two = data[0]["pixel_values"], data[1]["pixel_values"]
    assert one.shape == (2, 3, 32, 32)
    torch.testing.assert_close(one, two.flip(0))
    assert not torch.equal(one, two)
    assert (data[0]["input_ids"] == processor.image_token_id).sum() == 32
    assert bool(data._kept) == bool(kept_bytes)


def test_a_shared_image_is_decoded_once(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, ANSWER]
    rows = [{"id": i, "image": "a.png", "conversations": turns} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    opened: list[Any] = []
    original = instruction.open_image
    monkeypatch.setattr(
        instruction, "open_image", lambda *key, **_: opened.append(key) or original(*key)
    )
    data = dataset(tmp_path / "a.json", processor)
    assert [data[i]["pixel_values"].shape[0] for i in (0, 1, 2, 0)] == [1] * 4
    assert len(opened) == 1


def test_plain_is_image_and_caption(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 2)
    chat, plain = (dataset(path, processor, plain=flag) for flag in (False, True))
    assert "what color" in chat.preview(processor.tokenizer)
    assert plain.preview(processor.tokenizer) == "<s> [<image> x16] «red </s>»"


def test_plain_has_the_images_before_its_caption_alone(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 3, text_only=[2])
    rows = json.loads(path.read_text())
    rows[0]["image"] = ["images/0.png", "images/1.png"]
    rows[0]["conversations"] += [{"from": "human", "value": "<image> and this ?"}, ANSWER]
    path.write_text(json.dumps(rows))
    plain = dataset(path, processor, allowed=1, plain=True)
    assert "expected an image before the first answer" in plain._bad.examples[0]
    assert plain.image_counts == [1, 1]
    assert plain.preview(processor.tokenizer) == "<s> [<image> x16] «red </s>»"
    assert not torch.equal(plain[0]["pixel_values"], plain[1]["pixel_values"])


def test_t61_a_long_conversation_ends_after_a_whole_turn(tmp_path: Path, processor: Any) -> None:
    """Images are never cut into; without an answer that fits, the reason is counted."""
    write_image(tmp_path / "a.png")
    first = {"from": "human", "value": "<image>\nwhat color is it ?"}
    second = {"from": "human", "value": "<image>\nand this ?"}
    turns = [first, ANSWER, second, {"from": "gpt", "value": "green"}]
    rows = [{"id": "x", "image": ["a.png", "a.png"], "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    whole = dataset(tmp_path / "a.json", processor)
    length = whole.lengths[0]
    assert whole.image_counts == [2]
    for room in (length - 1, length - 20):
        cut = dataset(tmp_path / "a.json", processor, max_length_tokens=room)
        assert cut.preview(processor.tokenizer).endswith("«red </s>»")
        assert cut.image_counts == [1]
        assert cut[0]["pixel_values"].shape[0] == 1
        assert len(cut[0]["input_ids"]) == cut.lengths[0] <= room
        assert torch.equal(cut[0]["labels"], whole[0]["labels"][: cut.lengths[0]])
    with pytest.raises(ValueError, match="the first answer ends beyond max_length_tokens"):
        dataset(tmp_path / "a.json", processor, max_length_tokens=20)
    with pytest.raises(ValueError, match=r"no usable record.*first answer ends beyond"):
        dataset(tmp_path / "a.json", processor, allowed=1, max_length_tokens=20)


def test_shuffled_images_leave_no_record_its_own(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 9, text_only=[4])

    def images(**values: Any) -> list[Any]:
        data = dataset(path, processor, **values)
        return [data._place(i)[1] for i in range(len(data))]

    plain, shuffled = images(), images(shuffle_images=True)
    assert all(a != b for a, b in zip(plain, shuffled, strict=True) if a)
    assert shuffled[4] == []
    assert sorted(map(str, plain)) == sorted(map(str, shuffled))
    assert shuffled == images(shuffle_images=True) != images(shuffle_images=True, seed=1)
    with pytest.raises(ValueError, match="two distinct images"):
        images(shuffle_images=True, limit=1)


def test_no_sample_makes_a_row_that_trains_nothing() -> None:
    batch = InstructionCollator(3)([])
    assert (batch["labels"] == IGNORE_INDEX).all() and batch["attention_mask"].all()
    assert batch["input_ids"].shape == (1, 2) and batch["sample_ids"] == []


def test_collator_pads_right_and_masks(tmp_path: Path, processor: Any) -> None:
    data = dataset(write_llava(tmp_path, 4, text_only=[1]), processor)
    items = [data[i] for i in range(4)]
    batch = InstructionCollator(pad_token_id=3)(items)
    assert batch["attention_mask"].sum(1).tolist() == data.lengths
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["sample_ids"] == [f"llava.json:r{i}" for i in range(4)]
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        assert torch.equal(batch["labels"][row, :size], item["labels"])
        assert (batch["labels"][row, size:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, size:] == 3).all()
    assert "pixel_values" not in InstructionCollator(0)([items[1]])


@pytest.mark.parametrize("name", ["json", "parquet", "tar"])
def test_t60_an_image_that_breaks_later_teaches_nothing_and_counts_once(
    tmp_path: Path, processor: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruction, "PRELOAD_LIMIT_BYTES", 0)
    path = write_formats(tmp_path)[name]
    bad = BadRecords(2, ledger=tmp_path / "run" / "dropped.jsonl")
    data = dataset(path, processor, bad=bad)
    before = bad.count
    if name == "json":
        (tmp_path / "images" / "1.png").write_bytes(b"gone bad")
    else:
        path.write_bytes(path.read_bytes()[: 1024 if name == "tar" else 1])
    for _ in range(3):
        item = data[1]
        assert (item["labels"] == IGNORE_INDEX).all()
        assert item["pixel_values"].abs().sum() == 0
    assert bad.count == before + 1
    listed = (tmp_path / "run" / "dropped.jsonl").read_text()
    assert item["sample_id"] in listed
    assert ("has changed since it was looked up" in listed) == (name != "json")
    if name == "json":
        (tmp_path / "images" / "4.png").unlink()
        (tmp_path / "images" / "5.png").unlink()
        assert "pixel_values" in data[4]
        with pytest.raises(ValueError, match="no such file"):
            data[5]


def test_where_a_conversation_is_cut_by_hand() -> None:
    """Two answers, `<image>` (9) of 4 and 3 tokens; lengths 7 and 7 + 6 with their images."""
    ids = [1, 9, 5, 6, 9, 2, 7, 8]
    labels = [-100, -100, -100, 6, -100, -100, 7, 8]
    total = 6 + 4 + 3

    def kept(room: int) -> int:
        return token_table._fitting(ids, labels, 9, [4, 3], room)

    assert kept(total) == kept(total + 1) == 8
    assert kept(total - 1) == kept(7) == 4  # exactly full
    with pytest.raises(ValueError, match="has 13 tokens, 7 of them visual"):
        kept(6)


def test_a_conversation_at_the_limit_is_whole(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 3)
    whole = dataset(path, processor)
    room = max(whole.lengths)
    assert same(whole, dataset(path, processor, max_length_tokens=room))
    assert whole._tables[0].cut == 0
    turns = [{"from": "human", "value": "what ?"}, ANSWER] * 2
    (tmp_path / "two.json").write_text(json.dumps([{"id": 0, "conversations": turns}]))
    two = dataset(tmp_path / "two.json", processor)
    cut = dataset(tmp_path / "two.json", processor, max_length_tokens=two.lengths[0] - 1)
    assert (two._tables[0].cut, cut._tables[0].cut) == (0, 1)


def test_samplings_beyond_the_number_and_fractions_round() -> None:
    def count(**values: Any) -> int:
        return len(chosen_rows(InstructionSource(path="x", **values), 10, 0))

    assert count(sampling_strategy="end:15") == count(sampling_strategy="first:15") == 10
    assert count(sampling_strategy="random:15%") == count(sampling_strategy="first:11%") == 2
    assert (count(weight=0.77), count(weight=0.32), count(weight=2.27)) == (8, 3, 23)
    random_rows = {
        tuple(chosen_rows(InstructionSource(path="x", weight=0.5), 10, seed)) for seed in range(9)
    }
    assert len(random_rows) > 5


def test_all_that_a_table_depends_on_gives_it_another_name(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llava(tmp_path, 4)
    monkeypatch.setattr(arrow, "TABLE_FILE_FROM_BYTES", 0)

    def tables() -> int:
        return len(list((tmp_path / ".llm2clip-index").iterdir()))

    def read(changed: Any = None, **values: Any) -> InstructionDataset:
        return dataset(path, changed or processor, **values)

    read()
    for values in ({"weight": 2.0}, {"shuffle_images": True}, {"sampling_strategy": "end:1"}):
        read(**values)
    assert tables() == 1
    assert len(read(limit=2)) == 2 and tables() == 2
    other = copy.deepcopy(processor)
    other.chat_template = other.chat_template.replace("<|assistant|>", " red ")
    assert not same(read(other), read()) and tables() == 3
    other = copy.deepcopy(processor)
    other.num_additional_image_tokens += 4
    assert read(other).lengths == [length + 4 for length in read().lengths] and tables() == 4
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["and green"])
    read(other)
    assert tables() == 5
    # The same size and another content.
    stat = path.stat()
    path.write_text(path.read_text().replace("red", "big"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert path.stat().st_size == stat.st_size
    assert "«big" in read().preview(processor.tokenizer) and tables() == 5


def test_a_source_of_exactly_the_limit_keeps_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("a", 30), ("b", 20)):
        (tmp_path / name).write_bytes(bytes(size))
    files = [tmp_path / "a", tmp_path / "b"]
    for limit, large in ((50, True), (51, False)):
        monkeypatch.setattr(arrow, "TABLE_FILE_FROM_BYTES", limit)
        assert arrow.is_large(files) == large


def test_images_are_kept_up_to_the_limit(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llava(tmp_path, 3)
    whole = 3 * (3 * 32 * 32) * 4  # three pictures of float32
    for limit, kept in ((whole, 3), (whole - 1, 0)):
        monkeypatch.setattr(instruction, "PRELOAD_LIMIT_BYTES", limit)
        assert len(dataset(path, processor)._kept) == kept


def test_a_resume_looks_at_pictures_from_all_over(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(write_llava(tmp_path, 5, text_only=[2]), processor)
    assert [file.name for file in data.some_pictures()] == ["0.png", "1.png", "3.png", "4.png"]
    assert all(file.is_file() for file in data.some_pictures())
    monkeypatch.setattr(instruction, "LOOKED_AT", 3)
    assert [file.name for file in data.some_pictures()] == ["0.png", "4.png"]
    write_formats(tmp_path)
    assert not dataset(tmp_path / "shard-*.tar", processor, allowed=1).some_pictures()


def test_a_sample_with_a_bad_image_leaves_its_neighbours(tmp_path: Path, processor: Any) -> None:
    path = write_llava(tmp_path, 4)
    wanted = dataset(path, processor)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    data = dataset(path, processor, allowed=1)
    assert [data[i]["sample_id"] for i in range(len(data))] == [
        f"llava.json:r{i}" for i in (0, 2, 3)
    ]
    assert data.lengths == [wanted.lengths[i] for i in (0, 2, 3)] and data._bad.count == 1
    assert all(
        torch.equal(data[i]["pixel_values"], wanted[(0, 2, 3)[i]]["pixel_values"]) for i in range(3)
    )


def test_an_image_that_comes_later_is_found(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table remembers which files were not there, not that they never will be."""
    path = write_llava(tmp_path, 4)
    monkeypatch.setattr(arrow, "TABLE_FILE_FROM_BYTES", 0)
    image, aside = tmp_path / "images" / "2.png", tmp_path / "2.png"
    image.rename(aside)
    runs: list[str] = []
    original = token_table.tokenise
    monkeypatch.setattr(token_table, "tokenise", lambda *a: runs.append("") or original(*a))
    with pytest.raises(ValueError, match=r"2\.png.*no such file"):
        dataset(path, processor)
    assert len(dataset(path, processor, allowed=1)) == 3 and len(runs) == 1
    aside.rename(image)
    assert len(dataset(path, processor)) == 4 == len(dataset(path, processor)) and len(runs) == 2
