"""Untrained tasks on embeddings that are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.evaluation.encoder.zero_shot import (
    caption_accuracy,
    classification,
    compositional,
    retrieval,
)
from llm2clip_vlm.metrics.statistics import accuracy
from llm2clip_vlm.metrics.zero_shot import class_embeds, mean_per_class
from llm2clip_vlm.recipe.evaluation import (
    CompositionalTask,
    CraTask,
    EncoderEvalRecipe,
    RetrievalTask,
    ZeroShotTask,
)
from tests.tiny import write_image


def encoder(**vectors: Sequence[float]) -> Any:
    """Images and texts by name; unit norm."""

    def embed(names: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([vectors[n.replace(" ", "_")] for n in names]), dim=-1)

    def images(records: Sequence[Any]) -> tuple[Tensor, str]:
        return embed([Path(record.image).stem for record in records]), "hash of images"

    return SimpleNamespace(embed_images=images, embed_texts=embed, captions=None)


def recipe(task: dict[str, Any], **more: Any) -> EncoderEvalRecipe:
    values = {"stage": "run_encoder", "output_dir": "x", "model": "x", "tasks": [task]} | more
    return EncoderEvalRecipe.model_validate(values)


def run(function: Any, model: Any, task: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = recipe(task, **more)
    result: dict[str, Any] = function(made.tasks[0], model, made)
    return result


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def test_retrieval_tells_protocol_hash_ties_and_intervals(tmp_path: Path) -> None:
    rows = [
        {"id": n, "image": f"{n}.png", "captions": [f"{n} one", f"{n} two"], "zh": [f"{n} zh"]}
        for n in ("x", "y")
    ]
    model = encoder(x=X, y=Y, x_one=X, x_two=Y, y_one=Y, y_two=Y, x_zh=X, y_zh=Y)
    task = {"task": "retrieval", "benchmark": "records", "fields": ["captions", "zh"]}
    task["data"] = lines(tmp_path / "a.jsonl", rows)
    found = run(retrieval, model, task)
    assert set(found["kinds"]) == {"captions", "zh"}
    captions = found["kinds"]["captions"]
    assert (captions["i2t"]["r1"], captions["t2i"]["r1"]) == (50.0, 75.0)
    assert captions["i2t"]["tie_rate"] == 0.5 and captions["t2i"]["ci"] is not None
    assert found["mean"]["t2i"]["r1"] == 87.5 and not found["standard_set"]
    assert "hit@k" in found["protocol"]
    again = run(retrieval, model, task, bootstrap=0)
    assert again["data_hash"] == found["data_hash"] and again["kinds"]["zh"]["i2t"]["ci"] is None
    rows[0]["zh"] = ["y zh"]
    lines(tmp_path / "a.jsonl", rows)
    assert run(retrieval, model, task)["data_hash"] != found["data_hash"]


def test_cra_asks_the_text_encoder_alone_and_needs_no_image(tmp_path: Path) -> None:
    rows = [{"captions": ["a", "b"]}, {"captions": ["c", "d"]}, {"captions": ["e"]}]
    data = lines(tmp_path / "a.jsonl", rows)
    model = encoder(a=X, b=X, c=Y, d=Z)
    task = {"task": "cra", "benchmark": "records", "data": data}
    found = run(caption_accuracy, model, task)
    assert found["cra"] == 50.0 and found["queries"] == found["gallery"] == 2
    assert "first caption" in found["protocol"] and found["ci"] is not None
    model.captions = encoder(a=X, b=X, c=Y, d=Y).embed_texts
    assert run(caption_accuracy, model, task, bootstrap=0)["cra"] == 100.0
    published = tmp_path / "coco.json"
    published.write_text(json.dumps([{"image": "1.jpg", "caption": ["a", "b"]}]))
    found = run(caption_accuracy, model, task | {"benchmark": "coco", "data": str(published)})
    assert found["queries"] == 1 and "Karpathy" in found["protocol"]
    published.write_text(json.dumps([{"image": "1.jpg", "caption": ["a"]}]))
    with pytest.raises(ValueError, match="two different captions"):
        run(caption_accuracy, model, task | {"benchmark": "coco", "data": str(published)})


def test_hard_negatives_and_ties(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_image(tmp_path / f"{name}.png")
    rows = [
        {"task": kind, "image": f"{image}.png", "caption": right, "negative_caption": wrong}
        for kind, image, right, wrong in (
            ("add", "x", "good", "bad"),
            ("add", "y", "good", "bad"),
            ("swap", "x", "good", "same"),
        )
    ]
    model = encoder(x=X, y=Y, good=X, bad=Y, same=X)
    task = {"task": "compositional", "benchmark": "sugarcrepe", "images": str(tmp_path)}
    task["data"] = lines(tmp_path / "c.jsonl", rows)
    found = run(compositional, model, task)
    assert found["categories"] == {"add": {"text": 50.0}, "swap": {"text": 0.0}}
    assert found["mean"] == {"text": 25.0} and found["chance"] == {"text": 50.0}
    assert found["all"]["text"]["score"] == pytest.approx(100 / 3) and found["all"]["text"]["ci"]
    assert found["tie_rate"] == pytest.approx(1 / 3) and found["items"] == 3


def test_winogrounds_three_scores(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_image(tmp_path / f"{name}.png")
    row = {"image_0": "x", "image_1": "y", "caption_0": "one", "caption_1": "two"}
    task = {"task": "compositional", "benchmark": "winoground", "images": str(tmp_path)}
    task["data"] = lines(tmp_path / "examples.jsonl", [row])

    def scores(**vectors: Any) -> dict[str, float]:
        found = run(compositional, encoder(x=X, y=Y, **vectors), task, bootstrap=0)
        assert found["all"]["text"]["ci"] is None
        return {way: value["score"] for way, value in found["all"].items()}

    assert scores(one=X, two=Y) == {"text": 100.0, "image": 100.0, "group": 100.0}
    # Caption two is nearer to its image than to the other, but so near that image one prefers it.
    text_only = {"one": (0.3, 0.1, 0.9), "two": (0.2, 0.25, 0.9)}
    assert scores(**text_only) == {"text": 100.0, "image": 100.0, "group": 100.0}
    assert scores(one=(0.5, 0.4, 0.7), two=(0.6, 0.7, 0.2)) == {
        "text": 0.0,
        "image": 100.0,
        "group": 0.0,
    }


def test_classification_by_names(tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        write_image(tmp_path / f"{name}.png")
    rows = [
        {"image": f"{n}.png", "label": label, "split": s}
        for n, label, s in (("x", "dog", "test"), ("y", "dog", "test"), ("z", "cat", "train"))
    ]
    (tmp_path / "names.txt").write_text("dog\ncat")
    model = encoder(x=X, y=Y, z=Y, the_dog=X, the_cat=Y, a_dog=X, a_cat=X)
    task = {"task": "zero_shot", "classes": str(tmp_path / "names.txt"), "templates": ["the {}"]}
    task["data"] = lines(tmp_path / "l.jsonl", rows)
    found = run(classification, model, task)
    assert found["top1"] == pytest.approx(200 / 3) and found["chance_top1"] == pytest.approx(50)
    assert found["mean_per_class"] == 75.0 and found["ci_top1"] is not None and "top5" not in found
    assert run(classification, model, task | {"where": {"split": "test"}})["top1"] == 50.0
    other = run(classification, model, task | {"templates": ["the {}", "a {}"]})
    assert other["list_hash"] != found["list_hash"] and other["data_hash"] == found["data_hash"]
    collapsed = run(classification, model, task | {"templates": ["a {}"]})
    assert collapsed["top1"] == 0.0 and collapsed["tie_rate"] == 1.0
    (tmp_path / "names.txt").write_text("dog")
    with pytest.raises(ValueError, match="no class 'cat'"):
        run(classification, model, task)


def test_a_class_is_the_mean_of_its_templates() -> None:
    model = encoder(a_dog=X, the_dog=Y)
    got = class_embeds(model.embed_texts, ["dog"], ["a {}", "the {}"])
    torch.testing.assert_close(got, F.normalize(torch.tensor([[1.0, 1.0, 0.0]]), dim=-1))
    with pytest.raises(ValueError, match="'a dog': expected one"):
        class_embeds(model.embed_texts, ["dog"], ["a dog"])


def test_scores_and_their_intervals() -> None:
    right = [True] * 30 + [False] * 10
    alone = accuracy(right, range(40), 1000, seed=1)
    low, high = alone["ci"]
    assert alone["score"] == 75.0 and low < 75 < high
    assert accuracy(right, range(40), 1000, seed=2)["ci"] != alone["ci"]
    low, high = accuracy(right, [i // 10 for i in range(40)], 1000, seed=1)["ci"]
    assert high - low > 2 * (alone["ci"][1] - alone["ci"][0]) / 1.5
    rows = torch.tensor([0, 0, 0, 1]).numpy()
    assert mean_per_class(torch.tensor([True, True, True, False]).numpy(), rows) == 50.0


def test_the_recipe_keeps_its_types() -> None:
    kinds = {"retrieval": RetrievalTask, "cra": CraTask}
    for name, kind in kinds.items():
        made = recipe({"task": name, "benchmark": "coco", "data": "x"})
        assert type(made.tasks[0]) is kind
    with pytest.raises(ValueError, match="benchmark"):
        recipe({"task": "compositional", "benchmark": "coco", "data": "x", "images": "y"})
    assert CompositionalTask.model_fields["benchmark"].is_required()
    assert ZeroShotTask.model_fields["classes"].is_required()


def test_every_name_keeps_its_own_templates() -> None:
    """Two names in three templates: a mix-up of rows and columns gives other classes."""
    model = encoder(a_dog=X, the_dog=X, no_dog=Y, a_cat=Z, the_cat=Z, no_cat=Y)
    got = class_embeds(model.embed_texts, ["dog", "cat"], ["a {}", "the {}", "no {}"])
    want = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    torch.testing.assert_close(got, F.normalize(want, dim=-1))


def test_chance_of_winoground_and_five_classes(tmp_path: Path) -> None:
    for name in "xy":
        write_image(tmp_path / f"{name}.png")
    row = {"image_0": "x", "image_1": "y", "caption_0": "one", "caption_1": "two"}
    task = {"task": "compositional", "benchmark": "winoground", "images": str(tmp_path)}
    task["data"] = lines(tmp_path / "examples.jsonl", [row])
    found = run(compositional, encoder(x=X, y=Y, one=X, two=Y), task, bootstrap=0)
    assert found["chance"] == {"text": 25.0, "image": 25.0, "group": pytest.approx(100 / 6)}
    rows = [{"image": f"{n}.png", "label": label} for n, label in (("x", "a"), ("y", "b"))]
    names = {"a": X, "b": Z, "c": (0.0, 1.0, 1.0), "d": (0.0, 1.0, 2.0), "e": (0.0, 1.0, 3.0)}
    (tmp_path / "names.txt").write_text("\n".join(names))
    model = encoder(x=X, y=Y, **names)
    task = {"task": "zero_shot", "classes": str(tmp_path / "names.txt"), "templates": ["{}"]}
    task["data"] = lines(tmp_path / "l.jsonl", rows)
    found = run(classification, model, task)
    figures = [found[name] for name in ("top1", "top5", "chance_top1")]
    assert figures == pytest.approx([50.0, 100.0, 20.0])
    task["data"] = lines(tmp_path / "l.jsonl", [rows[0], rows[1] | {"label": "c"}])
    assert run(classification, model, task)["data_hash"] != found["data_hash"]


def test_the_seed_resamples_every_task(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    vectors: dict[str, Any] = {
        f"i{i}": torch.randn(3, generator=rng).tolist() for i in range(60)
    } | {"a": X, "b": Y}
    for i in range(60):
        write_image(tmp_path / f"i{i}.png")
    rows = [{"image": f"i{i}.png", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "names.txt").write_text("a\nb")
    task = {"task": "zero_shot", "classes": str(tmp_path / "names.txt"), "templates": ["{}"]}
    task["data"] = lines(tmp_path / "l.jsonl", rows)
    found = [
        run(classification, encoder(**vectors), task, seed=seed, bootstrap=31) for seed in (0, 0, 7)
    ]
    assert found[0]["ci_top1"] == found[1]["ci_top1"] != found[2]["ci_top1"]
