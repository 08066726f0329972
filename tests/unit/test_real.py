"""`recipes/real`: what is prepared, what is left out, and how its comparison is joined."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.evaluation.report.comparison_pages import difference_chart
from llm2clip_vlm.evaluation.report.inputs import ReportError
from llm2clip_vlm.files import find_program, load_program
from tests.tiny import build_clip

SENTENCES = (
    "A dog runs. It is brown. The grass is wet. A ball lies there. Trees stand. The sky is grey."
)


def rows(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in found)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as handle:
            handle.write(text)
    else:
        path.write_text(text)


def photographs(folder: Path, count: int) -> list[str]:
    (folder / "images").mkdir(parents=True)
    names = [f"images/{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (number * 20, 90, 10)).save(folder / name)
    return names


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder in miniature."""
    root = tmp_path / "data"
    names = photographs(root / "flickr8k", 8)
    splits = ["train"] * 4 + ["val"] * 3 + ["none"]
    captions = [f"caption {n} ." for n in range(5)]
    rows(root / "flickr8k/index.jsonl", [
        {"id": f"p{n}", "image": name, "split": split, "captions": [f"{n} {c}" for c in captions]}
        for n, (name, split) in enumerate(zip(names, splits, strict=True))
    ])  # fmt: skip
    (root / "flickr8k/official_test_ids.txt").write_text("elsewhere\n")
    names = photographs(root / "daquar", 2)
    rows(root / "daquar/index.jsonl", [
        {"image": names[n % 2], "split": "train" if n % 2 else "test", "kind": "other",
         "question": f"what is {n} ?", "answer": "a, b c", "answers": ["a", "b_c"]}
        for n in range(10)
    ])  # fmt: skip
    names = photographs(root / "coco_mini", 3)
    kept = ["train", "test", "val"]
    rows(root / "coco_mini/index.jsonl", [
        {"image": name, "split": split, "permissive": split != "val", "captions": ["one"]}
        for name, split in zip(names, kept, strict=True)
    ])  # fmt: skip
    rows(root / "coco_mini/templated_presence_count.jsonl", [
        {"image": name, "split": "train", "type": "count", "question": "How many?", "answer": 2}
        for name in names
    ])  # fmt: skip
    (root / "llava_pretrain_2k").mkdir()
    rows(root / "text/iiw_long_human.jsonl.gz", [
        {"set": "IIW-400", "key": f"k{n}", "human_IIW": SENTENCES} for n in range(3)
    ])  # fmt: skip
    return root


def prepare(data: Path, out: Path, *more: str) -> None:
    program = load_program(find_program("prepare_real"))
    models = [f"{name}=some/hub-id" for name in ("language_model", "vision_tower")]
    program.main([
        "recipes/real/prepare.yaml", f"data={data}", f"output_dir={out}", "train_captions=2",
        "test_captions=2", *models, *more,
    ])  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_is_measured_on_is_not_trained_on(data: Path, tmp_path: Path) -> None:
    prepare(data, out := tmp_path / "out")
    train = [json.loads(line) for line in (out / "flickr8k_train.jsonl").open()]
    assert [row["id"] for row in train] == ["p0", "p1", "p2", "p3"]
    assert all(len(row["captions"]) == 5 for row in train)
    val = [json.loads(line) for line in (out / "flickr8k_val/index.jsonl").open()]
    assert [row["id"] for row in val] == ["p4", "p5", "p6"]
    assert all((out / "flickr8k_val" / row["image"]).is_file() for row in val)
    assert {row["image"] for row in read(out / "captions_train.json")} <= {
        r["image"] for r in train
    }
    assert {row["image"] for row in read(out / "daquar_train.json")} == {"images/1.jpg"}
    tested = [json.loads(line) for line in (out / "daquar/index.jsonl").open()]
    assert {row["image"] for row in tested} == {"images/0.jpg"}
    # The photograph's own split decides, not the question's.
    assert {row["image"] for row in read(out / "coco_train.json")} == {"images/0.jpg"}
    assert [json.loads(line)["image"] for line in (out / "coco/index.jsonl").open()] == [
        "images/1.jpg"
    ]
    shown = [json.loads(line)["image"] for line in (out / "gallery/index.jsonl").open()]
    assert shown == ["images/1.jpg"]  # held out, and free to be shown
    assert read(out / "prepared.json")["counts"]["daquar_train"] == 2
    assert not (tmp_path / "language_model").exists()


def test_three_questions_share_a_picture_and_the_blind_twin_has_none(
    data: Path, tmp_path: Path
) -> None:
    prepare(data, out := tmp_path / "out")
    seeing, blind = read(out / "daquar_train.json"), read(out / "daquar_text_train.json")
    assert sorted(len(record["conversations"]) for record in seeing) == [4, 6]
    assert all(r["conversations"][0]["value"].startswith("<image>\n") for r in seeing)
    assert "<image>" not in json.dumps(blind)
    assert not any("image" in record for record in blind)
    assert [r["id"] for r in blind] == [r["id"] for r in seeing]


def test_every_other_sentence_is_the_partner(data: Path, tmp_path: Path) -> None:
    prepare(data, out := tmp_path / "out", "long_texts=2")
    found = [json.loads(line) for line in (out / "long_texts.jsonl").open()]
    assert len(found) == 2
    assert found[0]["captions"] == [
        "A dog runs. The grass is wet. Trees stand.",
        "It is brown. A ball lies there. The sky is grey.",
    ]


def test_a_photograph_of_the_official_test_split_is_refused(data: Path, tmp_path: Path) -> None:
    (data / "flickr8k/official_test_ids.txt").write_text("p2\n")
    with pytest.raises(ValueError, match="1 training photographs are of the official test split"):
        prepare(data, tmp_path / "out")


def test_a_missing_folder_is_named(data: Path, tmp_path: Path) -> None:
    (data / "llava_pretrain_2k").rmdir()
    with pytest.raises(ValueError, match="found no llava_pretrain_2k"):
        prepare(data, tmp_path / "out")


def test_captions_are_what_lmms_evals_flickr30k_reads(data: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    prepare(data, out := tmp_path / "out")
    found = datasets.Dataset.from_parquet(str(out / "captions_val.parquet"))
    assert found.num_rows == 2
    assert found[0]["image"].size == (40, 30)
    assert len(found[0]["caption"]) == 5 and int(found[1]["img_id"]) == 1


# --- DAQUAR -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "right", "exact"),
    [
        ("a, b c", 1.0, 1.0),
        ("b c, a", 1.0, 0.0),
        ("B C,  A.", 1.0, 0.0),
        ("a", 0.0, 0.0),
        ("a, b c, d", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_daquar_counts_sets_of_answers(said: str, right: float, exact: float) -> None:
    task = load_program(Path("eval/tasks/l2c_daquar/utils.py"))
    doc = {"answer": "a, b c", "answers": ["a", "b_c"], "kind": "other"}
    assert task.process_results(doc, [said]) == {
        "accuracy": right, "exact_match": exact, "type": "other",
    }  # fmt: skip


def test_daquar_takes_one_answer_as_a_text_and_refuses_none() -> None:
    """The letters of a text are no answers, and who says nothing is not right."""
    task = load_program(Path("eval/tasks/l2c_daquar/utils.py"))
    doc = {"question": "what ?", "answer": "red, blue", "answers": "red, blue"}
    assert task.process_results(doc, ["blue, red"])["accuracy"] == 1
    for none in ([], "", [" "]):
        with pytest.raises(ValueError, match=r"question 'what \?': expected answers"):
            task.process_results(doc | {"answers": none}, [""])


# --- the comparison -----------------------------------------------------------------------------


def test_the_comparison_names_what_is_missing(data: Path, tmp_path: Path) -> None:
    prepare(data, out := tmp_path / "out")
    run, output = tmp_path / "run", tmp_path / "real.json"
    program = load_program(find_program("real_ab"))
    val = [json.loads(line) for line in (out / "flickr8k_val/index.jsonl").open()]
    long = [json.loads(line) for line in (out / "long_texts.jsonl").open()]
    texts = {text: n for n, row in enumerate(val + long) for text in row["captions"]}

    def encode(part: list[str]) -> torch.Tensor:
        return torch.eye(8)[[texts[text] for text in part]]  # one place an image

    for folder in (run / "cache/raw_causal", run / "long/raw_causal", tmp_path / "stage2a"):
        EmbeddingCache.build(folder, list(texts), {"": encode}, {"weights": folder.name})
        (folder / "manifest.json").write_text("{}")
    for seed in range(2):
        for arm, r1 in (("stage1_bidirectional", 30.0), ("control_long", 10.0)):
            folder = run / "towers" / f"{arm}-s{seed}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text('{"schema": 1}')
            way = {"r1": r1 + seed, "r5": 50.0, "r10": 60.0, "gallery": 1000}
            found = {"retrieval": {"captions": {"i2t": way, "t2i": way}}}
            (folder / "results.json").write_text(json.dumps(found))
        for tower, cider in (("llm2clip", 20.0), ("base", 15.0)):
            file = run / "eval" / f"{tower}-s{seed}" / "captions.json"
            file.parent.mkdir(parents=True)
            result = {"score": cider + seed, "n": 200, "other_pictures": {"score": 5.0}}
            file.write_text(json.dumps(result))
    program.main([
        "--run", str(run), "--data", str(out), "--main", "stage1_bidirectional",
        "--seeds", "0", "1", "2", "--output", str(output), "--other", str(run / "cache"),
    ])  # fmt: skip
    found = read(output)
    assert found["separability_other"]["cache"]["long"].keys() == {"raw_causal"}
    assert found["separability_other"]["cache"]["photos"] == {
        "raw_causal": found["separability"]["photos"]["raw_causal"]
    }
    assert found["separability"]["photos"]["raw_causal"]["r1"] == 100.0
    assert found["separability"]["photos"]["raw_causal"]["n"] == 3
    assert found["separability"]["long"].keys() == {"raw_causal"}
    assert found["separability"]["photos"].keys() == {"raw_causal", "stage1_causal"}
    assert found["retrieval"]["control_long"]["i2t"]["r1"] == [10.0, 11.0]
    assert found["tests"]["i2t_r1_llm2clip_minus_control_long"]["delta"] == 20.0
    assert "raw_causal" not in found["retrieval"]
    captions = found["vlm"]["captions"]
    assert captions["llm2clip"] == [20.0, 21.0] and captions["base_other_pictures"] == [5.0, 5.0]
    assert captions["questions"]["llm2clip"] == [200, 200]
    assert found["tests"]["captions_llm2clip_minus_base"]["delta"] == 5.0
    assert found["tests"]["captions_llm2clip_minus_llm2clip_other_pictures"]["delta"] == 15.5
    assert "earlier" not in found
    file.write_text(json.dumps(result | {"n": 40}))  # as of `--limit 40`
    with pytest.raises(ValueError, match="captions: expected one number of questions"):
        program.vlm(run, [0, 1], [])
    file.write_text(json.dumps(result | {"data": {"sha256": "of other questions"}}))
    with pytest.raises(ValueError, match="captions: expected one number of questions, data"):
        program.vlm(run, [0, 1], [])
    file.write_text(json.dumps(result | {"overrides": {"doc_to_visual": "none"}}))
    program.vlm(run, [0, 1], [])  # as text alone is asked
    file.write_text(json.dumps(result | {"overrides": {"lmms_eval_specific_kwargs": "shorter"}}))
    with pytest.raises(ValueError, match="captions: expected one number of questions, data"):
        program.vlm(run, [0, 1], [])
    tower = run / "towers/control_long-s1/results.json"
    whole = tower.read_text()
    tower.write_text(whole.replace('"gallery": 1000', '"gallery": 40'))  # as of a `limit`
    with pytest.raises(ReportError, match="control_long-s1: captions: expected as for"):
        program.retrieval(run, [0, 1], [])
    tower.write_text(whole)
    for folder in ("eval", "cache"):
        shutil.rmtree(run / folder)
    again = tmp_path / "again.json"
    program.main([
        "--run", str(run), "--data", str(out), "--main", "stage1_bidirectional",
        "--seeds", "0", "1", "2", "--output", str(again), "--earlier", str(output),
    ])  # fmt: skip
    later = read(again)
    assert later["separability"] == found["separability"]
    assert later["vlm"] == found["vlm"] and later["earlier"] == found["commit"]
    assert later["tests"]["captions_llm2clip_minus_base"]["delta"] == 5.0
    assert later["missing"] and later["separability_other"] == found["separability_other"]
    for scores in (found["separability"], *found["separability_other"].values()):
        scores["protocol"] = "any caption as query"  # 40 points away
    output.write_text(json.dumps(found))
    program.main([
        "--run", str(run), "--data", str(out), "--main", "stage1_bidirectional",
        "--seeds", "0", "1", "2", "--output", str(again), "--earlier", str(output),
    ])  # fmt: skip
    later = read(again)
    assert later["separability"]["photos"].keys() == {"stage1_causal"}
    assert later["vlm"] == found["vlm"] and "separability_other" not in later
    chart = difference_chart(found, ["llm2clip", "control_long"])
    (heading,) = chart.groups
    assert heading == "Retrieval R@1, points, 2 training seeds"
    drawn = {mark.label: mark.value for mark in chart.groups[heading]}
    assert drawn["tower trained on, image → text"] == 20.0
    few = found["ab"]["retrieval_i2t"]["llm2clip-control_long"] | {"n_seeds": 5}
    found["ab"] |= {
        "captions": {"llm2clip-control_long": few},
        "retrieval_x": {"llm2clip-control_long": few},
    }
    chart = difference_chart(found, ["llm2clip", "control_long"])
    heads = ["Benchmarks, points, 5 training seeds", "Retrieval R@1, points, 2 to 5 training seeds"]
    assert list(chart.groups) == heads
    assert chart.title == "llm2clip minus control_long, 2 to 5 training seeds"
    missing = " ".join(found["missing"])
    assert str(tmp_path) not in missing  # no path of the machine is written
    assert "cache/raw_bidirectional" in missing and "control_long-s2" in missing
    assert "text_only-s0/l2c_daquar.json" in missing
    assert "text_only-s0/captions.json" not in missing


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_shows_photographs_under_cc_by_alone(tmp_path: Path) -> None:
    build_clip(tmp_path / "tower/model")
    names = photographs(tmp_path / "shown", 3)
    licences = ["Attribution-ShareAlike License", "Attribution License", "Attribution License"]
    rows(tmp_path / "shown/index.jsonl", [
        {"id": name, "image": name, "license": licence, "flickr_url": f"http://example.org/{name}",
         "captions": [f"a {colour} circle"]}
        for name, licence, colour in zip(names, licences, ["red", "blue", "green"], strict=True)
    ])  # fmt: skip
    program = load_program(find_program("gallery"))
    words = ["--tower", f"one={tmp_path / 'tower'}", "--data", str(tmp_path / "shown")]
    output = tmp_path / "docs/real.jpg"
    program.main([*words, "--output", str(output), "--photographs", "2"])
    assert Image.open(output).format == "JPEG"
    told = output.with_suffix(".md").read_text()
    assert "0.jpg" not in told and "1.jpg" in told and "http://example.org/images/2.jpg" in told
    with pytest.raises(ValueError, match="2 photographs are under CC BY, expected at least 4"):
        program.main([*words, "--output", str(output)])
