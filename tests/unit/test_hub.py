"""Data sets by name, as `datasets` loads them, in every source: local ones, written here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from llm2clip_vlm.data.conversation.token_table import read_instructions
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading import hub
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError, Refused
from llm2clip_vlm.data.reading.records import source_files
from llm2clip_vlm.data.text.captions import read_captions
from llm2clip_vlm.recipe.base import CaptionSource, DataSource, ImageTextSource
from llm2clip_vlm.recipe.vlm import InstructionSource
from llm2clip_vlm.training.stage_run import StageRun
from tests.image_corpus import jpeg

KINDS = ["saved", "saved_dict", "parquet"]
ASKED = [("what ?", "a dog"), ("where ?", "a beach")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares goes into the test's folder; nothing is asked of the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub._files.cache_clear()


def write(folder: Path, kind: str, columns: dict[str, Any], features: Any = None) -> str:
    """A data set of two splits: `train`, and `test` with the same rows in reverse."""
    train = datasets.Dataset.from_dict(columns, features)
    test = train.select(range(len(train) - 1, -1, -1))
    if kind == "saved":
        train.save_to_disk(folder, num_shards=min(2, len(train)))
    elif kind == "saved_dict":
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        half = len(train) // 2
        for number, rows in enumerate((range(half), range(half, len(train)))):
            name = f"train-0000{number}-of-00002.parquet"
            train.select(rows).to_parquet(folder / "data" / name)
        test.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return str(folder)


def pictures(count: int) -> tuple[list[dict[str, Any]], list[bytes]]:
    data = [jpeg(40 + n, 40) for n in range(count)]
    return [{"bytes": each, "path": f"{n}.jpg"} for n, each in enumerate(data)], data


@pytest.mark.parametrize("kind", KINDS)
def test_captions(tmp_path: Path, kind: str) -> None:
    columns = {"id": ["000000033471", "1", "2"], "text": ["a dog", "a cat", ""], "n": [1, 2, 3]}
    name = write(tmp_path / "set", kind, columns)
    bad = BadRecords(limit=1)
    records = read_captions(CaptionSource(dataset=name, fields=["text"]), bad)
    assert [(r.key, r.texts) for r in records] == [("000000033471", ["a dog"]), ("1", ["a cat"])]
    assert bad.count == 1 and "an empty caption" in bad.examples[0]
    assert len(read_captions(CaptionSource(dataset=name, fields=["text"], limit=1), bad)) == 1
    renamed = CaptionSource(dataset=name, columns={"captions": "text", "id": "n"})
    assert [r.key for r in read_captions(renamed, BadRecords(limit=1))] == ["1", "2"]
    few = CaptionSource(dataset=name, fields=["text"], columns=["text"])
    assert read_captions(few, BadRecords(limit=1))[0].key.endswith(".arrow:1")
    with pytest.raises(RecordError, match=r"no column 'x'; the columns are id, text, n"):
        read_captions(CaptionSource(dataset=name, columns=["x"]), bad)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_splits(tmp_path: Path, kind: str) -> None:
    name = write(tmp_path / "set", kind, {"id": ["a", "b"], "captions": ["a dog", "a cat"]})

    def keys(split: str) -> list[str]:
        source = CaptionSource(dataset=name, split=split)
        return [record.key for record in read_captions(source, BadRecords())]

    assert [keys(split) for split in ("train", "test")] == [["a", "b"], ["b", "a"]]
    assert sorted(keys("train+test")) == ["a", "a", "b", "b"]
    with pytest.raises(RecordError, match=r"dataset '.*' \(name None, split 'val'\) cannot be"):
        keys("val")
    with pytest.raises(ValidationError, match="split"):
        keys("train[:1]")


@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_as_they_were_encoded(tmp_path: Path, kind: str) -> None:
    cells, data = pictures(4)
    columns = {"key": list("abcd"), "photo": cells, "captions": [["a dog", "a cat"]] * 4}
    features = datasets.Features(
        key=datasets.Value("string"),
        photo=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
    )
    name = write(tmp_path / "set", kind, columns, features)
    source = ImageTextSource(dataset=name, image_field="photo", id_field="key")
    records = read_image_text(source, BadRecords())
    assert [record.key for record in records] == list("abcd")
    assert [record.encoded().data for record in records] == data
    called = {"image": "photo", "captions": "captions"}
    records = read_image_text(ImageTextSource(dataset=name, columns=called), BadRecords())
    assert [record.encoded().data for record in records] == data


def turns(style: str) -> list[Any]:
    if style == "texts":
        return [{"user": q, "assistant": a, "source": "x"} for q, a in ASKED]
    who = {"conversations": ("human", "gpt"), "messages": ("user", "assistant")}[style]
    names = ("from", "value") if style == "conversations" else ("role", "content")
    said = [(role, text) for pair in ASKED for role, text in zip(who, pair, strict=True)]
    said[0] = (said[0][0], f"<image>\n{said[0][1]}")
    return [dict(zip(names, each, strict=True)) for each in said]


@pytest.mark.parametrize("style", ["conversations", "texts", "messages"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversations(tmp_path: Path, kind: str, style: str) -> None:
    cells, data = pictures(2)
    one = style == "conversations"  # LLaVA's `image`, the others' `images`
    columns = {"image" if one else "images": cells if one else [[cell] for cell in cells]}
    columns |= {style: [turns(style)] * 2, "rating": [1, 5]}
    image = datasets.Image() if one else datasets.List(datasets.Image())
    first = datasets.Dataset.from_dict({style: columns[style], "rating": columns["rating"]})
    features = datasets.Features({**dict.fromkeys([next(iter(columns))], image), **first.features})
    name = write(tmp_path / "set", kind, columns, features)
    bad = Refused()
    records = list(read_instructions(InstructionSource(dataset=name), bad))
    assert not bad.rows
    assert [record.images[0].read() for record in records] == data  # type: ignore[union-attr]
    spoken = [
        "".join(part.get("text", "") for part in message["content"])
        for message in records[0].messages
    ]
    assert spoken == [text for pair in ASKED for text in pair]
    assert records[0].messages[0]["content"][0] == {"type": "image"}


def test_turns_in_columns_are_turns(tmp_path: Path) -> None:
    """`Sequence` of a mapping is stored as a mapping of lists."""
    said = {"from": ["human", "gpt"], "value": ["hello", "good day"]}
    name = write(tmp_path / "set", "saved", {"id": ["7"], "conversations": [said]})
    (record,) = read_instructions(InstructionSource(dataset=name), Refused())
    assert record.key == "set:7"
    assert [m["content"][0]["text"] for m in record.messages] == said["value"]


def test_columns_of_files_are_renamed_too(tmp_path: Path) -> None:
    row = {"id": 1, "dialogue": [{"user": "hello", "assistant": "good day"}], "image": "x.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    source = InstructionSource(path=str(tmp_path / "a.jsonl"), columns={"texts": "dialogue"})
    (record,) = read_instructions(source, Refused())
    assert record.images == () and record.messages[1]["content"][0]["text"] == "good day"


def test_a_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    head = ["---", "configs:"]
    for name in ("ai2d", "vqa"):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows = datasets.Dataset.from_dict({"captions": [f"of {name}"]})
        rows.to_parquet(tmp_path / "set" / name / "train.parquet")
        head += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*head, "---"]))
    source = CaptionSource(dataset=str(tmp_path / "set"), name="vqa")
    assert read_captions(source, BadRecords())[0].texts == ["of vqa"]
    with pytest.raises(RecordError, match="cannot be loaded"):
        read_captions(source.model_copy(update={"name": "other"}), BadRecords())


def test_one_place_and_no_key_without_effect() -> None:
    for values in ({}, {"path": "a", "dataset": "b"}):
        with pytest.raises(ValidationError, match="expected one of them"):
            DataSource(**values)
    for key in ("name", "revision"):
        with pytest.raises(ValidationError, match="belong to a `dataset`"):
            DataSource(path="a", **{key: "x"})
    assert (DataSource(path="a").title, DataSource(dataset="b").title) == ("a", "b")


def test_the_prepared_files_are_a_runs_parents(tmp_path: Path) -> None:
    name = write(tmp_path / "set", "saved", {"captions": ["a dog", "a cat"]})
    run = SimpleNamespace(recipe=[("train", [CaptionSource(dataset=name)])], parents={})
    StageRun.note_data(run)  # type: ignore[arg-type]
    assert run.parents == {f"train.0.{n}": f"{name}/data-0000{n}-of-00002.arrow" for n in range(2)}


def test_keys_without_meaning_for_a_saved_folder_are_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "set", "saved", {"captions": ["a dog"]})
    for values, why in (({"split": "test"}, "without splits"), ({"name": "x"}, "no name")):
        with pytest.raises(RecordError, match=why):
            source_files(DataSource(dataset=name, **values))


def test_the_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*of: Any, **values: Any) -> Any:
        asked.append((*of, values["split"], values["revision"]))
        return datasets.Dataset.from_dict({})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source_files(DataSource(dataset="a/b", name="c", split="test", revision="0f1"))
    assert asked == [("a/b", "c", "test", "0f1")]


@pytest.mark.slow
def test_offline_a_data_set_of_the_hub_is_named_and_not_asked_for(tmp_path: Path) -> None:
    program = (
        "import sys; from llm2clip_vlm.recipe.base import DataSource\n"
        "from llm2clip_vlm.data.reading.records import source_files\n"
        "assert 'datasets' not in sys.modules\n"
        "source_files(DataSource(dataset='lmms-lab/LLaVA-NeXT-Data'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "RecordError: dataset 'lmms-lab/LLaVA-NeXT-Data'" in found.stderr
    assert "HF_HUB_OFFLINE" in found.stderr
