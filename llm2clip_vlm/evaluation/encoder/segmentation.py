"""Segmentation by patches: against the texts of the classes, or with a linear head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from llm2clip_vlm.data.reading.images import open_image, resolve_image
from llm2clip_vlm.evaluation.encoder.benchmarks import plain_image, read_classes
from llm2clip_vlm.evaluation.encoder.encoders import (
    Encoder,
    keep_apart,
    require_finite,
    tower_pixels,
)
from llm2clip_vlm.files import read_text
from llm2clip_vlm.metrics.segmentation import UNJUDGED, class_iou, mean_iou, overlaps
from llm2clip_vlm.metrics.statistics import bootstrap_of_sums
from llm2clip_vlm.metrics.zero_shot import class_embeds
from llm2clip_vlm.recipe.evaluation import (
    EncoderEvalRecipe,
    SegmentationTask,
    ZeroShotSegmentationTask,
)
from llm2clip_vlm.runs.hashes import hash_json

Scores = Callable[[Float[Tensor, "b 3 s s"]], Float[Tensor, "b c g g"]]
"""Turns windows into scores of each patch."""


def zero_shot_segmentation(
    task: ZeroShotSegmentationTask, encoder: Encoder, recipe: EncoderEvalRecipe
) -> Any:
    """Compare each patch, projected like an image's pooled output, with the classes' texts.

    Paper: MaskCLIP (2112.01071) section 3.2; LLM2CLIP v6 table 4.
    """
    masks = Masks(task, task.split, encoder)
    texts = class_embeds(encoder.embed_texts, masks.names, task.templates)

    def scores(windows: Tensor) -> Tensor:
        embeds = patch_embeds(encoder, windows, last_values=task.last_attention == "value")
        return rearrange(embeds @ texts.T.to(embeds.device), "b y x c -> b c y x")

    judged = _judge(masks, scores, recipe)
    kind = f"patches against {len(masks.names)} texts, last attention: {task.last_attention}; "
    return judged | {
        "protocol": kind + judged["protocol"],
        "list_hash": hash_json([masks.names, task.templates]),
    }


def linear_segmentation(task: SegmentationTask, encoder: Encoder, recipe: EncoderEvalRecipe) -> Any:
    """Train a batch norm and a linear head on frozen patches of random windows.

    Paper: DINOv2 (2304.07193) section 7.4 (linear head).

    Raises:
        ValueError: A picture of `train_split` is one of `split`.
    """
    device, width = encoder.tower.model.device, encoder.tower.hidden_size
    masks, test = (Masks(task, split, encoder) for split in (task.train_split, task.split))
    keep_apart("segmentation", masks.items, test.items)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, len(masks.names), 1)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=task.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)

    def scores(windows: Tensor) -> Tensor:
        patches = patch_grid(encoder, windows).float()
        return head(rearrange(patches, "b y x d -> b d y x"))

    for _ in range(task.steps):
        rows = rng.integers(len(masks.items), size=task.batch_size)
        drawn = [masks.random_window(row, rng) for row in rows]
        windows, labels = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
        logits = F.interpolate(scores(windows), size=labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, labels, ignore_index=UNJUDGED, reduction="sum")
        optimizer.zero_grad()
        (loss / (labels != UNJUDGED).sum().clamp(min=1)).backward()
        optimizer.step()
        schedule.step()
    head.eval()
    judged = _judge(test, scores, recipe)
    kind = f"batch norm and linear head on frozen patches, {task.steps} steps of {task.batch_size} "
    return judged | {
        "protocol": f"{kind}windows of {task.train_split}; {judged['protocol']}",
        "data_hash": hash_json([judged["data_hash"], masks.fingerprint()]),
    }


@torch.no_grad()
def patch_grid(
    encoder: Encoder, windows: Float[Tensor, "b 3 s s"], *, last_values: bool = False
) -> Float[Tensor, "b g g d"]:
    """The tower's last patch features.

    With `last_values` the last self-attention gives each token its own value, through the output
    projection.

    Raises:
        ValueError: `last_values`, and the tower has no attention with `v_proj`; or NaN or inf.
    """
    tower = encoder.tower
    model: Any = tower.model
    layers = value_layers(model) if last_values else []
    if last_values and not layers:
        raise ValueError(
            f"last_attention: `value` needs attention with a v_proj, which {type(model).__name__} "
            "lacks; use `full`"
        )
    hook: Any = nullcontext()
    if layers:
        hook = layers[-1].register_forward_hook(_own_value, with_kwargs=True)
    with hook:
        out = model(pixel_values=windows.to(model.device, model.dtype))
    patches = require_finite(out.last_hidden_state[:, tower.num_prefix_tokens :], "patches")
    return rearrange(patches, "b (y x) d -> b y x d", y=tower.grid)


@torch.no_grad()
def patch_embeds(
    encoder: Encoder, windows: Float[Tensor, "b 3 s s"], *, last_values: bool = False
) -> Float[Tensor, "b g g d"]:
    """Project each patch like an image's pooled output: into the joint space, with unit norm.

    `last_values` as for :func:`patch_grid`.
    """
    patches = patch_grid(encoder, windows, last_values=last_values)
    pooled = _pool_each(encoder.tower.model, rearrange(patches, "b y x d -> (b y x) d"))
    embeds = F.normalize(require_finite(encoder.project(pooled).float(), "patches"), dim=-1)
    side = encoder.tower.grid
    return rearrange(embeds, "(b y x) d -> b y x d", y=side, x=side)


def value_layers(model: nn.Module) -> list[Any]:
    """Find the attention layers of a tower that have values apart from queries and keys."""
    return [m for m in model.modules() if getattr(m, "v_proj", None) is not None]


def _own_value(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    value = layer.v_proj(args[0] if args else kwargs["hidden_states"])
    for name in ("norm", "inner_attn_ln", "out_proj", "o_proj", "proj"):
        value = getattr(layer, name, nn.Identity())(value)
    return (value, *output[1:]) if isinstance(output, tuple) else value


@torch.no_grad()
def _pool_each(model: Any, patches: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Pool each patch alone as the tower pools; other towers' last state is normed already."""
    match model.config.model_type:
        case "siglip_vision_model":
            return model.head(patches[:, None])
        case "clip_vision_model":
            return model.post_layernorm(patches)
        case "timm_vision_model" if model.config.feature_map:
            return model.timm_model.forward_head(patches[..., None, None])
        case "timm_vision_model":  # whichever token its head reads, or their mean, is the patch
            count = model.timm_model.num_prefix_tokens + 1
            return model.timm_model.forward_head(repeat(patches, "n d -> n t d", t=count))
    return patches


class Masks:
    """Pictures with masks, resized and normalised for a tower.

    Raises:
        ValueError: There is no such split, or more classes than an 8-bit mask has values for.
    """

    def __init__(
        self, source: SegmentationTask | ZeroShotSegmentationTask, split: str, encoder: Encoder
    ) -> None:
        self.encoder, self.skip_zero, self.root = encoder, source.skip_zero, Path(source.data)
        self.follow = source.follow_links
        self.classes, self.names = source.classes, [*read_classes(source.classes).values()]
        if (count := len(self.names)) > (most := UNJUDGED - self.skip_zero):
            raise ValueError(f"{source.classes}: {count} names, at most {most} can be told apart")
        self.side = encoder.tower.image_size_px
        self.step = max(1, round(source.stride * self.side))
        self.short_side = max(source.short_side_px or 2 * self.side, self.side)
        folders = ("JPEGImages", "SegmentationClass")
        if source.layout == "voc":
            listing = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
            stems = read_text(listing).split() if listing.is_file() else []
        else:
            folders = (f"images/{split}", f"annotations/{split}")
            stems = sorted(file.stem for file in (self.root / folders[1]).glob("*.png"))
        if not stems:
            raise ValueError(f"{self.root}: no split {split!r} in the layout `{source.layout}`")
        names = [f"{folders[0]}/{stem}" for stem in stems]
        images = [plain_image(self.root, name, follow_links=self.follow) for name in names]
        masks = [f"{folders[1]}/{stem}.png" for stem in stems]
        self.items = list(zip((image.key for image in images), masks, strict=True))

    def _path(self, name: str) -> Path:
        return resolve_image(self.root, name, follow_links=self.follow)

    def __getitem__(self, row: int) -> tuple[Float[Tensor, "3 h w"], Int[Tensor, "y x"]]:
        """A picture, and its mask in its own size with 0 as the first class.

        Raises:
            ValueError: The mask has another size, several channels, or a value without a name.
        """
        picture, mask = self.items[row]
        image = open_image(self.root, picture, follow_links=self.follow)
        scale = self.short_side / min(image.size)
        width, height = (max(self.side, round(length * scale)) for length in image.size)
        labels = np.asarray(Image.open(self._path(mask)), dtype=np.int64)
        if labels.ndim != 2:
            raise ValueError(f"{mask}: expected one channel of class numbers, got {labels.shape}")
        if (size := labels.shape[::-1]) != image.size:
            raise ValueError(f"{mask}: expected {image.size} px as {picture} upright, got {size}")
        judged = (labels != UNJUDGED) & (labels >= self.skip_zero)
        labels = np.where(judged, labels - self.skip_zero, UNJUDGED)
        if len(odd := labels[judged & (labels >= len(self.names))]):
            raise ValueError(f"{mask}: value {odd[0] + self.skip_zero}: no name in {self.classes}")
        pixels = tower_pixels(self.encoder.tower, image, (width, height))
        return pixels, torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """Hash of all pictures and masks."""
        digest = hashlib.sha256()
        for name in chain.from_iterable(self.items):
            digest.update(self._path(name).read_bytes())
        return hash_json([self.items, digest.hexdigest()])

    def random_window(self, row: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A window of the tower's size anywhere in a picture, and its mask."""
        pixels, labels = self[row]
        near = F.interpolate(labels[None, None].float(), pixels.shape[1:], mode="nearest-exact")
        top, left = (int(rng.integers(length - self.side + 1)) for length in pixels.shape[1:])
        window = (..., slice(top, top + self.side), slice(left, left + self.side))
        return pixels[window], near[0, 0][window].long()


@torch.no_grad()
def slide(
    pixels: Float[Tensor, "3 h w"], scores: Scores, side: int, step: int, batch_size: int
) -> Float[Tensor, "c h w"]:
    """Scores, averaged where windows overlap; a row's last window ends at the edge."""
    tops, lefts = (
        sorted({*range(0, length - side, step), length - side}) for length in pixels.shape[1:]
    )
    places = [
        (..., slice(top, top + side), slice(left, left + side))
        for top, left in product(tops, lefts)
    ]
    windows = torch.stack([pixels[place] for place in places]).split(batch_size)
    scored = torch.cat([scores(part).float().cpu() for part in windows])
    total = torch.zeros(scored.shape[1], *pixels.shape[1:])
    counts = torch.zeros(pixels.shape[1:])
    for place, window in zip(places, scored, strict=True):
        total[place] += F.interpolate(window[None], size=(side, side), mode="bilinear")[0]
        counts[place] += 1
    return total / counts


def _judge(masks: Masks, scores: Scores, recipe: EncoderEvalRecipe) -> dict[str, Any]:
    counts = []
    for row in range(len(masks.items)):
        pixels, labels = masks[row]
        scored = slide(pixels, scores, masks.side, masks.step, masks.encoder.batch_size)
        require_finite(scored, "scores of the classes")
        best = F.interpolate(scored[None], size=labels.shape, mode="bilinear")[0].argmax(0)
        counts.append(overlaps(best.numpy(), labels.numpy(), len(masks.names)))
    total, ci = np.sum(counts, axis=0), None
    names, ious, there = masks.names, class_iou(total).tolist(), total[2]
    if recipe.bootstrap:
        ends = bootstrap_of_sums(np.stack(counts), mean_iou, recipe.bootstrap, recipe.seed)
        ci = np.clip(ends, 0.0, 100.0).tolist()
    return {
        "protocol": f"short side {masks.short_side} px, windows of {masks.side} px every "
        f"{masks.step} px, judged in the mask's own size",
        "data_hash": masks.fingerprint(),
        "miou": float(mean_iou(total)),
        "ci": ci,
        # What the most frequent class gets if every pixel is called so.
        "chance_miou": 100.0 * float(there.max() / max(1, there.sum()) / max(1, (there > 0).sum())),
        "pixel_accuracy": 100.0 * float(total[0].sum() / max(1, total[2].sum())),
        "iou": {n: None if np.isnan(iou) else iou for n, iou in zip(names, ious, strict=True)},
        "samples": {"": ([picture for picture, _ in masks.items], counts)},
        "images": len(counts),
    }
