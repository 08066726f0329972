"""LLaVA's JSON: read unchanged, checked, tokenised, images in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.config_vlm import InstructionSource
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.instruction import (
    InstructionCollator,
    InstructionDataset,
    read_instructions,
    shuffle_images,
)
from llm2clip_vlm.data.records import BadRecords
from tests.tiny import write_image
from tests.vlm_fixtures import write_llava

ANSWER = {"from": "gpt", "value": "red"}


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_llm: Path) -> Any:
    from llm2clip_vlm.models.vlm import build_vlm

    return build_vlm(tiny_clip, tiny_llm)[1]


def read(path: Path, limit: int = 0, **values: Any) -> tuple[list[Any], BadRecords]:
    bad = BadRecords(limit)
    return read_instructions(InstructionSource(path=str(path), **values), bad), bad


def dataset(records: Any, processor: Any, bad: BadRecords, **values: Any) -> InstructionDataset:
    return InstructionDataset(
        records, processor, **{"max_length_tokens": 128, "bad": bad, **values}
    )


def test_array_and_lines_read_the_same(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 6, text_only=[2])
    records, bad = read(path)
    assert [len(r.images) for r in records] == [1, 1, 0, 1, 1, 1]
    assert bad.count == 0
    lines = tmp_path / "llava.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in json.loads(path.read_text())))
    again, _ = read(lines)
    assert [(r.images, r.messages) for r in again] == [(r.images, r.messages) for r in records]
    assert len(read(path, limit=0)[0]) == 6
    assert len(read_instructions(InstructionSource(path=str(path), limit=2), bad)) == 2


def test_image_root_is_where_names_are_looked_up(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "elsewhere", 2)
    moved = path.rename(tmp_path / "llava.json")
    assert len(read(moved, image_root=str(tmp_path / "elsewhere"))[0]) == 2
    with pytest.raises(ValueError, match="no such file"):
        read(moved)


def test_user_and_assistant_roles_are_known(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    assert read(tmp_path / "a.json")[0][0].messages[1]["role"] == "assistant"


@pytest.mark.parametrize("preload_limit_bytes", [2**20, 0])
def test_images_stand_in_the_order_of_their_placeholders(
    tmp_path: Path, processor: Any, preload_limit_bytes: int
) -> None:
    for seed in range(2):
        write_image(tmp_path / f"{seed}.png", seed=seed)
    turns = [{"from": "human", "value": "<image> and <image>"}, ANSWER]
    rows = [
        {"id": i, "image": [f"{order[0]}.png", f"{order[1]}.png"], "conversations": turns}
        for i, order in enumerate([(0, 1), (1, 0)])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records, bad = read(tmp_path / "a.json")
    data = dataset(records, processor, bad, preload_limit_bytes=preload_limit_bytes)
    one, two = data[0]["pixel_values"], data[1]["pixel_values"]
    assert one.shape == (2, 3, 32, 32)
    torch.testing.assert_close(one, two.flip(0))
    assert not torch.equal(one, two)
    assert (data[0]["input_ids"] == processor.image_token_id).sum() == 32
    assert (data._pixels is None) == (preload_limit_bytes == 0)


def test_a_shared_image_is_decoded_once(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip_vlm.data import instruction

    write_image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, ANSWER]
    rows = [{"id": i, "image": "a.png", "conversations": turns} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    opened: list[Any] = []
    original = instruction.open_image
    monkeypatch.setattr(
        instruction, "open_image", lambda *key: opened.append(key) or original(*key)
    )
    records, bad = read(tmp_path / "a.json")
    data = dataset(records, processor, bad)
    assert [data[i]["pixel_values"].shape[0] for i in (0, 1, 2, 0)] == [1] * 4
    assert len(opened) == 1


def test_plain_is_image_and_caption(tmp_path: Path, processor: Any) -> None:
    records, bad = read(write_llava(tmp_path, 2))
    chat, plain = (dataset(records, processor, bad, plain=flag) for flag in (False, True))
    assert "what color" in chat.preview(processor.tokenizer)
    assert plain.preview(processor.tokenizer) == "<s> [<image> x16] «red </s>»"


def test_too_long_is_counted_never_cut(tmp_path: Path, processor: Any) -> None:
    records, _ = read(write_llava(tmp_path, 4))
    lengths = dataset(records, processor, BadRecords()).lengths
    bad = BadRecords(4)
    kept = dataset(records, processor, bad, max_length_tokens=min(lengths))
    assert kept.lengths == [n for n in lengths if n == min(lengths)]
    assert bad.count == len(lengths) - len(kept)
    assert "max_length_tokens" in bad.examples[0]
    with pytest.raises(ValueError, match="max_length_tokens"):
        dataset(records, processor, BadRecords(), max_length_tokens=min(lengths))
    with pytest.raises(ValueError, match="no usable record"):
        dataset(records, processor, BadRecords(9), max_length_tokens=3)


def test_shuffled_images_leave_no_record_its_own(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 9, text_only=[4])
    plain, _ = read(path)
    shuffled, _ = read(path, shuffle_images=True)
    pairs = [(a.images, b.images) for a, b in zip(plain, shuffled, strict=True)]
    assert all(a != b for a, b in pairs if a)
    assert pairs[4] == ((), ())
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs)
    assert [r.messages for r in plain] == [r.messages for r in shuffled]
    assert shuffle_images(plain, 1) == shuffle_images(plain, 1)
    assert shuffle_images(plain, 1) != shuffle_images(plain, 2)
    with pytest.raises(ValueError, match="two distinct images"):
        shuffle_images(plain[:1], 0)


def test_collator_pads_right_and_masks(tmp_path: Path, processor: Any) -> None:
    records, bad = read(write_llava(tmp_path, 4, text_only=[1]))
    data = dataset(records, processor, bad)
    items = [data[i] for i in range(4)]
    batch = InstructionCollator(pad_token_id=3)(items)
    assert batch["attention_mask"].sum(1).tolist() == data.lengths
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        assert torch.equal(batch["labels"][row, :size], item["labels"])
        assert (batch["labels"][row, size:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, size:] == 3).all()
    assert "pixel_values" not in InstructionCollator(0)([items[1]])


def test_an_image_that_breaks_later_teaches_nothing(tmp_path: Path, processor: Any) -> None:
    records, bad = read(write_llava(tmp_path, 2), limit=1)
    data = dataset(records, processor, bad, preload_limit_bytes=0)
    (tmp_path / "images" / "0.png").write_bytes(b"gone bad")
    item = data[0]
    assert (item["labels"] == IGNORE_INDEX).all()
    assert item["pixel_values"].abs().sum() == 0
    assert bad.count == 1
    with pytest.raises(ValueError, match="does not decode"):
        data[0]
