"""Each reader on small files in the exact published format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.evaluation.encoder.benchmarks import (
    RETRIEVAL,
    plain_image,
    read_classes,
    read_classified,
    read_compositional,
    read_retrieval,
)
from llm2clip_vlm.evaluation.encoder.zero_shot import retrieval
from llm2clip_vlm.recipe.evaluation import ClassSource, CompositionalTask, RetrievalTask
from tests.tiny import write_image


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(value, list) and path.suffix != ".json"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value) if lines else value
    path.write_text(text if isinstance(text, str) else json.dumps(value), encoding="utf-8")
    return path


def read(benchmark: str, data: Path, **more: Any) -> dict[str, dict[str, list[str]]]:
    task = RetrievalTask(task="retrieval", benchmark=benchmark, data=str(data), **more)
    return {record.key: record.captions for record in read_retrieval(task)[0]}


def test_karpathy_json_keeps_the_test_split_and_every_caption(tmp_path: Path) -> None:
    def image(number: int, split: str, captions: int) -> dict[str, Any]:
        sentences = [{"raw": f"caption {number} {i}", "tokens": []} for i in range(captions)]
        return {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "split": split,
            "cocoid": number,
            "sentences": sentences,
        }

    document = {"images": [image(1, "test", 5), image(2, "train", 5), image(3, "test", 6)]}
    found = read("coco", write(tmp_path / "dataset_coco.json", document))
    assert {name: len(kinds["captions"]) for name, kinds in found.items()} == {
        "val2014/COCO_val2014_000000000001.jpg": 5,
        "val2014/COCO_val2014_000000000003.jpg": 6,
    }


def test_rows_of_image_and_captions(tmp_path: Path) -> None:
    rows = [{"image": "flickr30k-images/1.jpg", "caption": ["a", "b", "c", "d", "e"]}]
    found = read("flickr30k", write(tmp_path / "flickr30k_test.json", rows))
    assert found == {"flickr30k-images/1.jpg": {"captions": ["a", "b", "c", "d", "e"]}}


@pytest.mark.parametrize("cell", ['["a dog", "a cat"]', "['a dog', 'a cat']", "['it\\'s']"])
def test_captions_that_are_a_list_written_as_text_are_refused(tmp_path: Path, cell: str) -> None:
    rows = [{"image": "1.jpg", "caption": cell}]
    with pytest.raises(ValueError, match="a list written as text"):
        read("flickr30k", write(tmp_path / "flickr30k_test.json", rows))


def test_coco_annotations(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}],
        "annotations": [{"image_id": 7, "id": i, "caption": f"c{i}"} for i in range(3)],
    }
    found = read("coco", write(tmp_path / "captions_val2017.json", document))
    assert found == {"000000000007.jpg": {"captions": ["c0", "c1", "c2"]}}


def test_sharegpt4v_takes_the_first_thousand_and_reads_no_further(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        said = ["<image>\nDescribe it.", f'A "[{number}]" {{picture}},\nlong. \u2028é']
        turns = [{"from": who, "value": t} for who, t in zip(("human", "gpt"), said, strict=True)]
        return {"id": str(number), "image": f"sam/images/sa_{number}.jpg", "conversations": turns}

    filler = " " * 3000  # more than one of the blocks that are read at a time
    text = "[" + f",{filler}".join(json.dumps(row(i), ensure_ascii=False) for i in range(1100))
    found = read("sharegpt4v", write(tmp_path / "share-captioner.json", text + ", {broken"))
    assert len(found) == 1000 and "sam/images/sa_1000.jpg" not in found
    assert found["sam/images/sa_3.jpg"] == {"captions": ['A "[3]" {picture}, long. \u2028é']}


def test_urban1k_pairs_by_name_and_takes_the_first_line(tmp_path: Path) -> None:
    for name in ("10", "9"):
        write(tmp_path / "caption" / f"{name}.txt", f"scene {name}\x0bmore\nsecond line")
    found = read("urban1k", tmp_path)
    assert found == {
        f"image/{name}.jpg": {"captions": [f"scene {name}\x0bmore"]} for name in ("10", "9")
    }


def test_docci_takes_the_test_split(tmp_path: Path) -> None:
    rows = [
        {
            "example_id": f"{s}_0",
            "split": s,
            "image_file": f"{s}_0.jpg",
            "description": "long \u2028",
        }
        for s in ("train", "test", "qual_dev")
    ]
    found = read("docci", write(tmp_path / "docci_descriptions.jsonlines", rows))
    assert found == {"test_0.jpg": {"captions": ["long \u2028"]}}


def test_xm3600_keeps_all_captions_of_every_language(tmp_path: Path) -> None:
    row = {"image/key": "000411001ff7dd4f", "image/locale": "cs"}
    row |= {"cs": {"caption": ["jedna", "dvě"], "caption/tokenized": ["x"]}}
    row |= {"th": {"caption": ["หนึ่ง"], "caption/tokenized": ["x"]}}
    found = read("xm3600", write(tmp_path / "captions.jsonl", [row]))
    assert found == {"000411001ff7dd4f.jpg": {"cs": ["jedna", "dvě"], "th": ["หนึ่ง"]}}


def test_chinese_clips_texts_name_images_by_number(tmp_path: Path) -> None:
    for name in ("COCO_val2014_000000000042.jpg", "COCO_train2014_000000000007.jpg"):
        write_image(tmp_path / "images" / name)
    rows = [
        {"text_id": 1, "text": "一只狗", "image_ids": [42]},
        {"text_id": 2, "text": "两只猫", "image_ids": [7]},
        {"text_id": 3, "text": "狗", "image_ids": [42]},
    ]
    data, images = write(tmp_path / "test_texts.jsonl", rows), str(tmp_path / "images")
    assert read("coco_cn", data, images=images) == {
        "COCO_val2014_000000000042.jpg": {"captions": ["一只狗", "狗"]},
        "COCO_train2014_000000000007.jpg": {"captions": ["两只猫"]},
    }
    write(data, [{"text_id": 1, "text": "x", "image_ids": [5]}])
    with pytest.raises(ValueError, match="no image of number 5"):
        read("flickr30k_cn", data, images=images)


def test_numbered_lines(tmp_path: Path) -> None:
    text = "COCO_val2014_000000000042#zhm#0 一只 狗\nCOCO_val2014_000000000042#zhm#1 狗\n"
    found = read("coco_cn_translated", write(tmp_path / "a.txt", text))
    assert found == {"COCO_val2014_000000000042.jpg": {"captions": ["一只 狗", "狗"]}}
    found = read("flickr30k_cna", write(tmp_path / "b.txt", "1007129816.jpg#0\t男人\n"))
    assert found == {"1007129816.jpg": {"captions": ["男人"]}}
    with pytest.raises(ValueError, match="expected `image#i caption`"):
        read("flickr30k_cna", write(tmp_path / "c.txt", "no number\n"))


def test_records_of_any_kind_with_filters(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "image": f"{i}.png", "captions": ["en"], "zh": ["中"], "split": s}
        for i, s in enumerate(("train", "test"))
    ]
    data = write(tmp_path / "index.jsonl", rows)
    assert read("records", data, where={"split": "test"}) == {"1": {"captions": ["en"]}}
    assert read("records", data, fields=["zh"])["0"] == {"zh": ["中"]}
    task = RetrievalTask(task="retrieval", benchmark="records", data=str(data), images="/elsewhere")
    records, protocol, standard = read_retrieval(task)
    assert records[0].root == Path("/elsewhere") and not standard and "index.jsonl" in protocol


def test_a_file_with_a_caption_a_row_has_each_picture_once(tmp_path: Path) -> None:
    """Beside copies of the picture, a perfect encoder had an R@1 of 0."""
    rows = [{"image": f"{n // 2}.png", "caption": f"{n // 2} {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"task": "retrieval", "benchmark": "records", "fields": ["caption"]}
    task = RetrievalTask.model_validate(values | {"data": str(tmp_path / "rows.jsonl")})
    place = torch.eye(3)
    encoder: Any = SimpleNamespace(
        embed_images=lambda records: (place[[int(Path(r.image).stem) for r in records]], "bytes"),
        embed_texts=lambda texts: place[[int(text.split()[0]) for text in texts]],
    )
    recipe: Any = SimpleNamespace(bootstrap=9, seed=0)
    found = retrieval(task, encoder, recipe)
    both = found["kinds"]["caption"]
    assert [both[way]["r1"] for way in ("i2t", "t2i")] == [100, 100]
    assert (both["i2t"]["queries"], both["i2t"]["gallery"], both["t2i"]["gallery"]) == (3, 6, 3)
    first, second = (found["samples"][f".caption.{way}"][0] for way in ("i2t", "t2i"))
    assert len(first) == 3 and second == [key for key in first for _ in range(2)]


def test_what_is_not_the_standard_set_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"{i}.jpg", "caption": ["a", "b"]} for i in range(3)]
    task = RetrievalTask(
        task="retrieval", benchmark="coco", data=str(write(tmp_path / "x.json", rows))
    )
    assert read_retrieval(task)[1:] == (RETRIEVAL["coco"].protocol, False)
    small = RETRIEVAL["coco"].__class__(RETRIEVAL["coco"].read, 3, 6, "the same")
    monkeypatch.setitem(RETRIEVAL, "coco", small)
    assert read_retrieval(task)[2]


def test_errors_name_the_file_and_the_nearest_benchmark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no benchmark `flickr30`.*flickr30k"):
        read("flickr30", tmp_path)
    with pytest.raises(ValueError, match=r"x\.json: not in the format of coco: KeyError"):
        read("coco", write(tmp_path / "x.json", [{"picture": "a"}]))
    with pytest.raises(ValueError, match="holds no caption"):
        read("coco", write(tmp_path / "y.json", []))


def test_sugarcrepe_and_winoground(tmp_path: Path) -> None:
    item = {"filename": "1.jpg", "caption": "right", "negative_caption": "wrong"}
    for kind in ("swap_att", "add_obj"):
        write(tmp_path / "crepe" / f"{kind}.json", {"0": item, "1": item})

    def task(benchmark: str, data: Path) -> Any:
        return read_compositional(
            CompositionalTask(task="compositional", benchmark=benchmark, data=str(data), images="x")
        )

    found = task("sugarcrepe", tmp_path / "crepe")
    assert found[0] == ("add_obj", ["1.jpg"], ["right", "wrong"]) and len(found) == 4
    rows = [{"task": "add_att", "image": "images/1.jpg"} | item]
    assert task("sugarcrepe", write(tmp_path / "crepe.jsonl", rows)) == [
        ("add_att", ["images/1.jpg"], ["right", "wrong"])
    ]
    example = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "num_main_preds": 1}
    example |= {"caption_0": "a b", "caption_1": "b a", "collapsed_tag": "Object", "tag": "Noun"}
    assert task("winoground", write(tmp_path / "examples.jsonl", [example])) == [
        ("Object", ["ex_0_img_0.png", "ex_0_img_1.png"], ["a b", "b a"])
    ]


def test_classes_from_folders_and_from_rows(tmp_path: Path) -> None:
    for name in ("n02/b.JPEG", "n01/a.jpg", "n01/c.png"):
        write_image(tmp_path / "val" / name)
    (tmp_path / "val" / "n01" / ".DS_Store").write_text("")
    write_image(tmp_path / "val" / ".trash" / "d.png")
    records, labels = read_classified(ClassSource(data=str(tmp_path / "val")))
    assert [r.key for r in records] == ["n01/a.jpg", "n01/c.png", "n02/b.JPEG"]
    assert labels == ["n01", "n01", "n02"]
    rows = [{"image": f"{i}.png", "kind": k, "s": k} for i, k in enumerate(("x", "y"))]
    source = ClassSource(
        data=str(write(tmp_path / "rows.jsonl", rows)),
        label_field="kind",
        where={"s": "y"},
        images="/far",
    )
    records, labels = read_classified(source)
    assert labels == ["y"] and records[0].root == Path("/far")
    with pytest.raises(ValueError, match="folder of images for each class"):
        read_classified(ClassSource(data=str(tmp_path / "val" / "n01")))


def test_names_of_classes(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.txt", "dog\ngreat white shark\n")
    listed = write(tmp_path / "a.json", ["dog", "great white shark"])
    mapped = write(tmp_path / "b.json", {"n01": "dog"})
    both = {"dog": "dog", "great white shark": "great white shark"}
    assert read_classes(str(lines)) == read_classes(str(listed)) == both
    assert read_classes(str(mapped)) == {"n01": "dog"}
    with pytest.raises(ValueError, match="expected names"):
        read_classes(str(write(tmp_path / "c.json", [1, 2])))


def test_a_name_may_not_leave_the_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "out.png")
    write_image(tmp_path / "in" / "a.png")
    assert plain_image(tmp_path / "in", "a").key == "a.png"
    for name in ("../out.png", "../out", "nothing"):
        with pytest.raises(ImageError):
            plain_image(tmp_path / "in", name)


def test_standard_sets_have_their_published_sizes(tmp_path: Path) -> None:
    """Images and captions as the benchmarks' papers (and Karpathy's split) count them."""
    sizes = {name: (b.images, b.captions) for name, b in RETRIEVAL.items()}
    assert sizes == {
        "flickr30k": (1000, 5000),
        "coco": (5000, 25010),
        "sharegpt4v": (1000, 1000),
        "urban1k": (1000, 1000),
        "docci": (5000, 5000),
        "xm3600": (3600, 261375),
        "flickr30k_cn": (1000, 5000),
        "flickr30k_cna": (1000, 5000),
        "coco_cn": (1000, None),
        "coco_cn_translated": (1000, 5000),
    }
    for name in ("dog/a.JPG", "cat/b.png"):
        write_image(tmp_path / "classes" / f"{name}.png")
        (tmp_path / "classes" / f"{name}.png").rename(tmp_path / "classes" / name)
    _, labels = read_classified(ClassSource(data=str(tmp_path / "classes")))
    assert labels == ["cat", "dog"]


def test_a_class_that_is_listed_twice_would_move_those_behind_it(tmp_path: Path) -> None:
    for name, value in (("a.txt", "crane\ndog\ncrane\n"), ("a.json", ["crane", "dog", "crane"])):
        with pytest.raises(ValueError, match="'crane' is listed twice"):
            read_classes(str(write(tmp_path / name, value)))
    for value in (["dog", None, "cat"], {"0": "dog", "1": 3}, [], "dog", 7):
        path = tmp_path / "odd.json"
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match="expected names of classes"):
            read_classes(str(path))


@pytest.mark.parametrize("benchmark", [*RETRIEVAL])
def test_a_fifo_or_a_damaged_file_is_named(benchmark: str, tmp_path: Path) -> None:
    import os

    if benchmark == "urban1k":
        (tmp_path / "caption").mkdir()
        os.mkfifo(tmp_path / "caption" / "1.txt")
        with pytest.raises(ValueError, match=r"1\.txt: .*FIFO"):
            read(benchmark, tmp_path)
        return
    suffix = ".txt" if benchmark in ("flickr30k_cna", "coco_cn_translated") else ".jsonl"
    suffix = ".json" if benchmark in ("coco", "flickr30k", "sharegpt4v") else suffix
    os.mkfifo(tmp_path / f"fifo{suffix}")
    with pytest.raises(ValueError, match=f"fifo{suffix}"):
        read(benchmark, tmp_path / f"fifo{suffix}")
    for number, text in enumerate(('{"a": [1', '["a"]', "\0\0\0", '[{"image": 3}]', "7", "\ud83d")):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=path.name):
            read(benchmark, path)


@pytest.mark.parametrize("benchmark", ["sugarcrepe", "winoground"])
def test_compositional_files_of_another_form_are_named(benchmark: Any, tmp_path: Path) -> None:
    for number, text in enumerate(('{"a": [1', '{"filename": "1"}', "[1]", '{"0": 3}', "\0")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        (folder / f"{number}.json").write_text(text)
        for data in (path, folder) if benchmark == "sugarcrepe" else (path,):
            task = CompositionalTask(
                task="compositional", benchmark=benchmark, data=str(data), images="x"
            )
            with pytest.raises(ValueError, match=f"{number}"):
                read_compositional(task)


def test_links_are_followed_where_a_task_says_so(tmp_path: Path) -> None:
    write_image(tmp_path / "disk" / "n01" / "a.jpg")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "n01").symlink_to(tmp_path / "disk" / "n01")
    with pytest.raises(ImageError, match="follow_links: true"):
        read_classified(ClassSource(data=str(tmp_path / "val")))
    records, _ = read_classified(ClassSource(data=str(tmp_path / "val"), follow_links=True))
    records[0].open()
    data = write(tmp_path / "rows.json", [{"image": "n01/a.jpg", "caption": "a"}])
    for follow in (True, False):
        task = RetrievalTask(
            task="retrieval",
            benchmark="coco",
            data=str(data),
            images=str(tmp_path / "val"),
            follow_links=follow,
        )
        (record,) = read_retrieval(task)[0]
        if follow:
            record.open()
        else:
            with pytest.raises(ImageError, match="follow_links: true"):
                record.open()


def test_every_picture_of_a_class_counts_and_other_files_are_named(tmp_path: Path) -> None:
    names = ["cat/a.png", "dog/b.tif", "dog/c.gif", "dog/d.ppm"]
    for name in names:
        write_image(tmp_path / f"{name}.png")
        Image.open(tmp_path / f"{name}.png").save(tmp_path / name)
        (tmp_path / f"{name}.png").unlink()
    records, labels = read_classified(ClassSource(data=str(tmp_path)))
    assert [record.key for record in records] == names
    assert labels == ["cat", "dog", "dog", "dog"]
    (tmp_path / "dog" / "more").mkdir()
    with pytest.raises(ValueError, match=r"dog/more: expected pictures alone"):
        read_classified(ClassSource(data=str(tmp_path)))
    (tmp_path / "dog" / "more").rmdir()
    (tmp_path / "dog" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"dog/notes\.txt: expected pictures alone"):
        read_classified(ClassSource(data=str(tmp_path)))


@pytest.mark.parametrize("label", [["cat", "dog"], {"en": "cat", "de": "Katze"}])
def test_an_image_of_two_classes_is_refused(tmp_path: Path, label: Any) -> None:
    rows = [{"image": "0.png", "label": ["dog"]}, {"image": "1.png", "label": label}]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected one label an image, got 2"):
        read_classified(ClassSource(data=str(data)))


def test_a_stem_may_have_a_dot(tmp_path: Path) -> None:
    write_image(tmp_path / "frame_1.left.png")
    assert plain_image(tmp_path, "frame_1.left").key == "frame_1.left.png"
    (tmp_path / "frame_1.left.png").rename(tmp_path / "frame_1.left")
    assert plain_image(tmp_path, "frame_1.left").key == "frame_1.left"
    with pytest.raises(ImageError, match="no such file"):
        plain_image(tmp_path, "frame_1.png")
