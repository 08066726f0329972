"""The tower as a detector's backbone, and COCO's judgement of its boxes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip_vlm.evaluation.encoder.detection import (
    MAX_BOXES,
    CocoBoxes,
    TowerBackbone,
    build_detector,
    coco_ap,
    detection,
    predict,
)
from llm2clip_vlm.evaluation.encoder.encoders import load_encoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.evaluation import BoxSource, EncoderEvalRecipe
from tests.tiny import write_image
from tests.tiny_towers import build_tower

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_feature_levels": 1,
}
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> BoxSource:
    """Three pictures whose annotations are of originals twice as large; the last has no box."""
    root = tmp_path_factory.mktemp("coco")
    document: dict[str, Any] = {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "width": 80, "height": 80} for i in range(3)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [],
    }
    for number, (image, kind, box) in enumerate(
        ((0, 5, [8, 16, 40, 20]), (0, 2, [40, 40, 40, 40]), (10, 2, [0, 0, 80, 40])), start=1
    ):
        area = {"area": box[2] * box[3], "iscrowd": 0}
        document["annotations"].append(
            {"id": number, "image_id": image, "category_id": kind, "bbox": box} | area
        )
    crowd = {"id": 9, "image_id": 10, "category_id": 5, "bbox": [0, 0, 9, 9], "area": 81}
    document["annotations"].append(crowd | {"iscrowd": 1})
    for i in range(3):
        write_image(root / f"{i}.png", seed=i, size_px=40)
    (root / "instances.json").write_text(json.dumps(document))
    return BoxSource(annotations=str(root / "instances.json"), images=str(root))


def recipe(model: Path, out: Path, boxes: BoxSource, **more: Any) -> EncoderEvalRecipe:
    seed, bootstrap = more.pop("seed", 0), more.pop("bootstrap", 3)
    copied = shutil.copytree(boxes.images, out / "held_out", dirs_exist_ok=True)
    test = boxes.model_dump() | {"images": str(copied)}
    task = {"task": "detection", "train": boxes.model_dump(), "test": test}
    task |= {"detector": SMALL, "trainer": TRAINER}
    values = {"stage": "run_encoder", "output_dir": str(out), "model": str(model)}
    return EncoderEvalRecipe.model_validate(
        values | {"tasks": [task | more], "seed": seed, "bootstrap": bootstrap}
    )


def test_boxes_are_relative_to_the_annotated_size(tiny_clip: Path, boxes: BoxSource) -> None:
    data = CocoBoxes(boxes, load_vision_tower(tiny_clip))
    assert (data.categories, data.names, len(data)) == ([2, 5], ["dog", "cat"], 3)
    first = data[0]
    assert first["pixel_values"].shape == (3, 32, 32)
    assert first["labels"]["class_labels"].tolist() == [1, 0]
    want = torch.tensor([[0.35, 0.325, 0.5, 0.25], [0.75, 0.75, 0.5, 0.5]])
    torch.testing.assert_close(first["labels"]["boxes"], want)
    assert len(data[1]["labels"]["boxes"]) == 1 and data[2]["labels"]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("kind", ["clip", "siglip", "eva02", "dinov2", "timm_cnn"])
@torch.no_grad()
def test_the_backbone_is_the_tower(kind: str, tmp_path: Path) -> None:
    tower = load_vision_tower(build_tower(kind, tmp_path / "tower"))
    model = build_detector(tower, ["a", "b"], SMALL).eval()
    pixels = torch.randn(2, 3, 32, 32)
    (patches,) = model.model.backbone.model(pixels).feature_maps
    want = tower.model(pixel_values=pixels).last_hidden_state[:, tower.num_prefix_tokens :]
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), want)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model(pixels).pred_boxes.shape == (2, 5, 4)


def test_right_boxes_have_an_ap_of_100(tmp_path: Path, tiny_clip: Path, boxes: BoxSource) -> None:
    data = CocoBoxes(boxes, load_vision_tower(tiny_clip))
    made = recipe(tiny_clip, tmp_path, boxes)
    found = [
        {k: box[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for box in data.coco.loadAnns(data.coco.getAnnIds(iscrowd=False))
    ]
    perfect = coco_ap(data.coco, found, made)
    assert perfect["ap"] == perfect["ap50"] == pytest.approx(100) and perfect["ap_large"] is None
    assert perfect["ci"] == pytest.approx([100, 100])
    worse = coco_ap(data.coco, found[1:], made.model_copy(update={"bootstrap": 0}))
    assert worse["ap"] < 100 and worse["ci"] is None


def test_predictions_are_in_the_annotated_size(tiny_clip: Path, boxes: BoxSource) -> None:
    tower = load_vision_tower(tiny_clip)
    data = CocoBoxes(boxes, tower)
    torch.manual_seed(0)
    model = build_detector(tower, data.names, SMALL)
    found = predict(model, data, batch_size=2)
    assert len(found) == 3 * 5 * 2 and {row["category_id"] for row in found} == {2, 5}
    with torch.no_grad():
        out = model(data[1]["pixel_values"][None])
    best = int(out.logits[0].flatten().argmax())
    x, y, w, h = (80 * out.pred_boxes[0, best // 2]).tolist()
    (first, *_) = [row for row in found if row["image_id"] == 10]
    assert first["bbox"] == pytest.approx([x - w / 2, y - h / 2, w, h], abs=1e-3)
    assert first["score"] == pytest.approx(float(out.logits[0].sigmoid().max()), abs=1e-5)


def test_training_and_its_flags(
    tmp_path: Path, tiny_clip: Path, boxes: BoxSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(str(tiny_clip))
    before = encoder.tower.model.state_dict()
    weights: dict[str, torch.Tensor] = {}

    def keep(model: Any, *rest: Any) -> Any:
        weights.update({n: w.clone() for n, w in model.state_dict().items()})
        return predict(model, *rest)

    monkeypatch.setattr("llm2clip_vlm.evaluation.encoder.detection.predict", keep)
    modes: list[bool] = []
    forward = TowerBackbone.forward

    def seen(self: Any, pixel_values: torch.Tensor, *rest: Any) -> Any:
        modes.append(self.vision_tower.training)
        return forward(self, pixel_values, *rest)

    monkeypatch.setattr(TowerBackbone, "forward", seen)

    def run(**more: Any) -> Any:
        made = recipe(tiny_clip, tmp_path, boxes, **more)
        return detection(made.tasks[0], encoder, made)  # type: ignore[arg-type]

    def tower_is_the_same() -> bool:
        start = "model.backbone.model.vision_tower."
        own = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        assert set(own) == set(before)
        return all(torch.equal(before[name], weight) for name, weight in own.items())

    found = run()
    assert found["images"] == {"train": 3, "test": 3} and len(found["ci"]) == 2
    assert "32 px" in found["protocol"] and "2 steps, tower trained" in found["protocol"]
    assert not tower_is_the_same() and modes[0]
    modes.clear()
    first = weights["class_embed.0.weight"]
    frozen = run(freeze_tower=True, seed=1)
    assert "tower frozen" in frozen["protocol"] and tower_is_the_same() and not any(modes)
    assert not torch.equal(first, weights["class_embed.0.weight"])
    document = json.loads(Path(boxes.annotations).read_text())
    document["annotations"].pop()
    (tmp_path / "less.json").write_text(json.dumps(document))
    less = {"annotations": str(tmp_path / "less.json"), "images": boxes.images}
    larger = run(image_size_px=48, trainer=TRAINER | {"max_steps": 1}, bootstrap=0, train=less)
    assert found["data_hash"] == frozen["data_hash"] != larger["data_hash"]
    assert "48 px" in larger["protocol"] and "1 steps" in larger["protocol"]
    assert larger["ci"] is None
    with pytest.raises(ValueError, match=r"3 of 3 test images .* 0\.png among them"):
        run(test=boxes.model_dump())


def test_other_categories_in_test_are_refused(
    tmp_path: Path, tiny_clip: Path, boxes: BoxSource
) -> None:
    document = json.loads(Path(boxes.annotations).read_text())
    document["categories"][0]["name"] = "lion"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    made = recipe(tiny_clip, tmp_path, boxes, test={"annotations": str(other), "images": "x"})
    with pytest.raises(ValueError, match="different categories"):
        detection(made.tasks[0], load_encoder(str(tiny_clip)), made)  # type: ignore[arg-type]


def test_without_a_box_there_is_no_figure(
    tmp_path: Path, tiny_clip: Path, boxes: BoxSource
) -> None:
    data = CocoBoxes(boxes, load_vision_tower(tiny_clip))
    right = {"image_id": 0, "category_id": 5, "bbox": [8, 16, 40, 20], "score": 0.9}
    made = recipe(tiny_clip, tmp_path, boxes, bootstrap=50)
    nothing = coco_ap(data.coco, [], made)
    assert (nothing["ap"], nothing["ci"]) == (0, [0, 0])
    found = coco_ap(data.coco, [right], made)
    assert found["ap"] > 0
    low, high = found["ci"]  # some draws have the picture without a box alone
    assert 0 <= low <= found["ap"] <= high <= 100
    whole = json.loads(Path(boxes.annotations).read_text())
    one = {"images": whole["images"][:1], "annotations": whole["annotations"][:2]}
    (tmp_path / "one.json").write_text(json.dumps(whole | one))
    lone = BoxSource(annotations=str(tmp_path / "one.json"), images=boxes.images)
    found = coco_ap(CocoBoxes(lone, load_vision_tower(tiny_clip)).coco, [right], made)
    assert found["ap"] == pytest.approx(50) and found["ci"] == [0, 100], "one picture says nothing"
    document = whole | {"annotations": []}
    (tmp_path / "none.json").write_text(json.dumps(document))
    empty = BoxSource(annotations=str(tmp_path / "none.json"), images=boxes.images)
    data = CocoBoxes(empty, load_vision_tower(tiny_clip))
    for answers in ([], [right]):
        found = coco_ap(data.coco, answers, made)
        assert found["ap"] is None and found["ci"] is None


def test_figures_keep_their_thresholds(tmp_path: Path, tiny_clip: Path, boxes: BoxSource) -> None:
    """Every box moved by a fifth of its width: an overlap of 0.8 / 1.2 = 0.67."""
    data = CocoBoxes(boxes, load_vision_tower(tiny_clip))
    made = recipe(tiny_clip, tmp_path, boxes, bootstrap=0)
    found = []
    for box in data.coco.loadAnns(data.coco.getAnnIds(iscrowd=False)):
        x, y, w, h = box["bbox"]
        kept = {k: box[k] for k in ("image_id", "category_id")}
        found.append(kept | {"bbox": [x + w / 5, y, w, h], "score": 0.9})
    figures = coco_ap(data.coco, found, made)
    assert figures["ap50"] == pytest.approx(100) and figures["ap75"] == pytest.approx(0)
    assert figures["ap"] == pytest.approx(40)  # 0.50, 0.55, 0.60 and 0.65 of ten thresholds
    from pycocotools.cocoeval import COCOeval

    assert COCOeval(data.coco, data.coco, "bbox").params.maxDets[-1] == MAX_BOXES


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_an_id_may_stand_in_a_list_once(
    key: str, tmp_path: Path, tiny_clip: Path, boxes: BoxSource
) -> None:
    document = json.loads(Path(boxes.annotations).read_text())
    document[key].append(document[key][0])
    (tmp_path / "again.json").write_text(json.dumps(document))
    again = BoxSource(annotations=str(tmp_path / "again.json"), images=boxes.images)
    with pytest.raises(ValueError, match=rf"again\.json: .*{key}: an id occurs twice"):
        CocoBoxes(again, load_vision_tower(tiny_clip))


def test_ids_that_start_at_zero_cost_no_box(
    tmp_path: Path, tiny_clip: Path, boxes: BoxSource
) -> None:
    document = json.loads(Path(boxes.annotations).read_text())
    for number, box in enumerate(document["annotations"]):
        box["id"] = number
    (tmp_path / "zero.json").write_text(json.dumps(document))
    zero = BoxSource(annotations=str(tmp_path / "zero.json"), images=boxes.images)
    data = CocoBoxes(zero, load_vision_tower(tiny_clip))
    found = [
        {k: box[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for box in data.coco.loadAnns(data.coco.getAnnIds(iscrowd=False))
    ]
    assert coco_ap(data.coco, found, recipe(tiny_clip, tmp_path, boxes))["ap"] == pytest.approx(100)


def test_a_picture_that_lies_otherwise_than_its_boxes_stops_before_training(
    tmp_path: Path, tiny_clip: Path
) -> None:
    """EXIF turns it, and the boxes are of the picture as it is stored; a scaled copy is right."""
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}
    document = {"images": [image], "annotations": [box | {"iscrowd": 0}]}
    document["categories"] = [{"id": 1, "name": "cat"}]
    (tmp_path / "a.json").write_text(json.dumps(document))
    source = BoxSource(annotations=str(tmp_path / "a.json"), images=str(tmp_path))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    said = r"'a\.jpg' below .*: 20x40 px, annotated as 40x20"
    with pytest.raises(ValueError, match=said):
        CocoBoxes(source, load_vision_tower(tiny_clip))[0]
    made = recipe(tiny_clip, tmp_path, source)
    encoder: Any = None
    with pytest.raises(ValueError, match=said):
        detection(made.tasks[0], encoder, made)  # type: ignore[arg-type]
    Image.new("RGB", (33, 17)).save(tmp_path / "a.jpg")
    assert len(CocoBoxes(source, load_vision_tower(tiny_clip))[0]["labels"]["boxes"]) == 1


def test_scores_that_are_nan_are_refused(tiny_clip: Path, boxes: BoxSource) -> None:
    tower = load_vision_tower(tiny_clip)
    data = CocoBoxes(boxes, tower)
    model = build_detector(tower, data.names, SMALL)
    torch.nn.init.constant_(model.class_embed[-1].bias, float("nan"))
    with pytest.raises(ValueError, match="scores of the boxes: NaN"):
        predict(model, data, batch_size=2)
