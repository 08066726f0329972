"""Detection: the tower as the backbone of transformers' Deformable DETR, judged by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoBackbone,
    AutoConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import BackboneOutput

from llm2clip_vlm.data.reading.images import EncodedImage, read_image, shown
from llm2clip_vlm.evaluation.encoder.encoders import (
    Encoder,
    keep_apart,
    require_finite,
    tower_pixels,
)
from llm2clip_vlm.files import require_regular
from llm2clip_vlm.metrics.statistics import percentile_interval
from llm2clip_vlm.models.trainable import frozen_modules, set_evaluation_mode
from llm2clip_vlm.models.vision.towers import VisionTower, load_vision_tower
from llm2clip_vlm.recipe.evaluation import BoxSource, DetectionTask, EncoderEvalRecipe

MAX_BOXES = 100
"""Boxes of an image that are judged, as COCO does."""

MAX_DRAWS = 100
"""Resamples for the interval of AP; each takes seconds on all of COCO."""


class TowerBackboneConfig(PreTrainedConfig):
    """Config of :class:`TowerBackbone`."""

    model_type = "llm2clip_vision_backbone"

    hidden_size: int = 1
    grid: int = 1
    num_prefix_tokens: int = 0


class TowerBackbone(PreTrainedModel):
    """A vision tower as Deformable DETR takes a backbone: one map at the patches' stride.

    Paper: ViTDet (2203.16527): a plain ViT needs no hierarchy.
    """

    config_class = TowerBackboneConfig
    vision_tower: nn.Module

    def __init__(self, config: TowerBackboneConfig) -> None:
        super().__init__(config)
        self.channels = [config.hidden_size]
        self.post_init()

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> BackboneOutput:
        """Args: `[b, 3, s, s]`. Returns: one feature map `[b, d, g, g]`."""
        out = self.vision_tower(pixel_values=pixel_values)
        patches = out.last_hidden_state[:, self.config.num_prefix_tokens :]
        maps = rearrange(patches, "b (y x) d -> b d y x", y=self.config.grid)
        return BackboneOutput(feature_maps=(maps,))


def build_detector(
    tower: VisionTower, classes: Sequence[str], detector: dict[str, Any]
) -> DeformableDetrForObjectDetection:
    """Build Deformable DETR around a copy of a tower.

    Args:
        tower: The tower, whose patches are the only map; further levels are convolutions of it.
        classes: Names of the classes.
        detector: Fields of `DeformableDetrConfig`.
    """
    AutoConfig.register(TowerBackboneConfig.model_type, TowerBackboneConfig, exist_ok=True)
    AutoBackbone.register(TowerBackboneConfig, TowerBackbone, exist_ok=True)
    backbone = TowerBackboneConfig(
        hidden_size=tower.hidden_size, grid=tower.grid, num_prefix_tokens=tower.num_prefix_tokens
    )
    values = {"with_box_refine": True, "auxiliary_loss": True} | detector
    config = DeformableDetrConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        **values,
    )
    model = DeformableDetrForObjectDetection(config)
    inner: Any = model.model.backbone.model
    # Afterwards: Deformable DETR puts a BatchNorm of its own, with another epsilon and without the
    # activation that timm's includes, in the place of every BatchNorm that it is built around.
    inner.vision_tower = copy.deepcopy(tower.model)
    return model


class CocoBoxes(Dataset[dict[str, Any]]):
    """Pictures of a COCO file, squeezed into the tower's square, with their boxes."""

    def __init__(self, source: BoxSource, tower: VisionTower) -> None:
        from pycocotools.coco import COCO

        file = require_regular(source.annotations)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
                self.coco: Any = COCO(str(file))
                found = {"images": "imgs", "annotations": "anns", "categories": "cats"}
                for key, index in found.items():
                    if len(getattr(self.coco, index)) < len(self.coco.dataset[key]):
                        raise ValueError(f"{key}: an id occurs twice; give each its own")
                for number, box in enumerate(self.coco.dataset["annotations"], start=1):
                    box["id"] = number  # 0 means no match to COCOeval
                self.coco.createIndex()
            self.images: list[dict[str, Any]] = self.coco.loadImgs(sorted(self.coco.getImgIds()))
            self.categories: list[int] = sorted(self.coco.getCatIds())
            self.names = [kind["name"] for kind in self.coco.loadCats(self.categories)]
            for key, known in (("image_id", self.coco.imgs), ("category_id", self.coco.cats)):
                if unknown := {box[key] for box in self.coco.anns.values()} - known.keys():
                    raise ValueError(f"boxes of the {key} {min(unknown)}, which is not listed")
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source.annotations}: expected COCO's {{images, annotations, categories}}, got "
                f"{type(error).__name__}: {error}"
            ) from error
        self.root, self.tower, self.follow = Path(source.images), tower, source.follow_links

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` and `labels` as Deformable DETR takes them."""
        image, side = self.images[index], self.tower.image_size_px
        found = self.coco.loadAnns(self.coco.getAnnIds(imgIds=[image["id"]], iscrowd=False))
        corners = torch.tensor([x for box in found for x in box["bbox"]], dtype=torch.float32)
        boxes = rearrange(corners, "(n xywh) -> n xywh", xywh=4)
        boxes[:, :2] += boxes[:, 2:] / 2
        kinds = [self.categories.index(box["category_id"]) for box in found]
        labels = {
            "class_labels": torch.tensor(kinds, dtype=torch.int64),
            "boxes": boxes / torch.tensor([image["width"], image["height"]] * 2),
        }
        pixels = tower_pixels(self.tower, self.read(image).rgb(), (side, side))
        return {"pixel_values": pixels, "labels": labels}

    def read(self, image: dict[str, Any]) -> EncodedImage:
        """Read a picture, which may be a smaller or larger copy of the one that was annotated.

        Raises:
            ImageError: It cannot be read.
            ValueError: Its sides are not in the annotated proportion: boxes would be elsewhere.
        """
        name, wide, high = image["file_name"], image["width"], image["height"]
        data = read_image(self.root, name, follow_links=self.follow)
        found = EncodedImage(data, f"{shown(name)} below {self.root}")
        width, height = found.size
        if abs(width * high - height * wide) > max(wide, high):  # more than rounding
            raise ValueError(f"image {found.name}: {width}x{height} px, annotated as {wide}x{high}")
        return found


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}


class _Trainer(Trainer):
    def compute_loss_context_manager(self) -> Any:
        """Put a frozen tower back into evaluation mode; called after `model.train()`."""
        model: Any = self.model
        set_evaluation_mode(frozen_modules(model))
        return super().compute_loss_context_manager()


def detection(task: DetectionTask, encoder: Encoder, recipe: EncoderEvalRecipe) -> Any:
    """Train the detector and judge it; it is not kept.

    Raises:
        ValueError: Train and test name other categories, or a picture does not fit its boxes.
    """
    tower = load_vision_tower(recipe.model, torch.float32, image_size_px=task.image_size_px)
    train, test = CocoBoxes(task.train, tower), CocoBoxes(task.test, tower)
    if (train.categories, train.names) != (test.categories, test.names):
        raise ValueError("detection: train and test annotations have different categories")
    keep_apart("detection", *([(d.root, i["file_name"]) for i in d.images] for d in (train, test)))
    digest = hashlib.sha256()
    for data, source in ((train, task.train), (test, task.test)):
        digest.update(Path(source.annotations).read_bytes())
        for image in data.images:
            digest.update(data.read(image).data)
    set_seed(recipe.seed)
    model = build_detector(tower, train.names, task.detector)
    if task.freeze_tower:
        model.model.freeze_backbone()
    options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "seed": recipe.seed}
    options |= {"use_cpu": recipe.device == "cpu", "remove_unused_columns": False} | task.trainer
    trainer = _Trainer(model, TrainingArguments(recipe.output_dir, **options), collate, train)
    trainer.train()
    return {
        "protocol": f"Deformable DETR, single map of the tower at {tower.image_size_px} px "
        f"(squeezed), {trainer.state.global_step} steps, tower "
        f"{'frozen' if task.freeze_tower else 'trained'}; COCO box AP (pycocotools)",
        "data_hash": digest.hexdigest(),
        **coco_ap(test.coco, predict(model, test, encoder.batch_size), recipe),
        "images": {"train": len(train), "test": len(test)},
    }


@torch.no_grad()
def predict(
    model: DeformableDetrForObjectDetection, data: CocoBoxes, batch_size: int
) -> list[dict[str, Any]]:
    """Boxes in COCO's format for results, the `MAX_BOXES` of the highest scores an image."""
    model.eval()
    results = []
    for images in torch.arange(len(data)).split(batch_size):
        pixels = torch.stack([data[int(row)]["pixel_values"] for row in images])
        out = model(pixel_values=pixels.to(model.device))
        require_finite(out.logits, "scores of the boxes")
        scores = rearrange(out.logits.sigmoid(), "b n c -> b (n c)").float().cpu()
        scores, places = scores.topk(min(MAX_BOXES, scores.shape[1]), dim=1)
        for row, score, place, boxes in zip(
            images, scores.tolist(), places, out.pred_boxes.float().cpu(), strict=True
        ):
            image = data.images[int(row)]
            chosen = boxes[place // len(data.names)]
            chosen = chosen * torch.tensor([image["width"], image["height"]] * 2)
            chosen[:, :2] -= chosen[:, 2:] / 2
            kinds = [data.categories[kind] for kind in (place % len(data.names)).tolist()]
            results += [
                {"image_id": image["id"], "category_id": kind, "bbox": box, "score": value}
                for kind, box, value in zip(kinds, chosen.tolist(), score, strict=True)
            ]
    return results


def coco_ap(truth: Any, found: list[dict[str, Any]], recipe: EncoderEvalRecipe) -> dict[str, Any]:
    """Box AP in per cent, as COCO defines it, with an interval over images.

    None: it is not defined, for want of true boxes (of that size). Without a found box it is 0.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    with contextlib.redirect_stdout(io.StringIO()):
        boxes = COCO()
        boxes.dataset = truth.dataset | {"annotations": []}
        boxes.createIndex()
        judge = COCOeval(truth, truth.loadRes(found) if found else boxes, "bbox")
        judge.evaluate()

        def figures(matches: np.ndarray) -> list[float]:
            judge.evalImgs = matches.ravel().tolist()
            judge.accumulate()
            judge.summarize()
            return [100.0 * float(value) for value in judge.stats]

        images = len(judge.params.imgIds)
        matches = np.array(judge.evalImgs, dtype=object).reshape(-1, images)
        values = dict(zip(names, figures(matches), strict=False))
        rng = np.random.default_rng(recipe.seed)
        draws = [
            figures(matches[:, rng.integers(images, size=images)])[0]
            for _ in range(min(recipe.bootstrap, MAX_DRAWS))
        ]
        draws = [draw for draw in draws if draw >= 0]  # -100: no true box among the images
    ci = percentile_interval(np.array(draws), values["ap"], images) if draws else None
    return {
        **{name: None if value < 0 else value for name, value in values.items()},
        "ci": None if ci is None else ci.clip(0, 100).tolist(),
    }
