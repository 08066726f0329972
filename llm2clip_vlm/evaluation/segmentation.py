"""Segmentation by patches: against the texts of the classes, or with a linear head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from llm2clip_vlm.config_encoder import (
    EncoderEvalRecipe,
    SegmentationSource,
    SegmentationTask,
    ZeroShotSegmentationTask,
)
from llm2clip_vlm.data.images import open_image, resolve_image
from llm2clip_vlm.evaluation.encoder_benchmarks import plain_image, read_classes
from llm2clip_vlm.evaluation.encoders import Encoder, data_hash
from llm2clip_vlm.evaluation.zero_shot import class_embeds

UNJUDGED = 255
"""Mask value of pixels without a class."""

Scores = Callable[[Float[Tensor, "b 3 s s"]], Float[Tensor, "b c g g"]]
"""Windows to scores of each patch."""


def zero_shot_segmentation(
    task: ZeroShotSegmentationTask, encoder: Encoder, recipe: EncoderEvalRecipe
) -> Any:
    """Each patch, projected as if it were an image's pooled output, against the classes' texts.

    Paper: MaskCLIP (2112.01071) section 3.2; LLM2CLIP v6 table 4.
    """
    classes = read_classes(task.classes)
    names = list(classes.values())
    texts = class_embeds(encoder, names, task.templates).to(encoder.tower.model.device)
    values = task.last_attention == "value"

    def scores(windows: Tensor) -> Tensor:
        patches = patch_grid(encoder, windows, last_values=values)
        pooled = _pool_each(encoder.tower.model, patches.flatten(0, 2))
        embeds = F.normalize(encoder.project(pooled).float(), dim=-1)
        return (embeds @ texts.T).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)

    return {
        "protocol": f"patches against {len(names)} class texts, last attention: "
        f"{task.last_attention}; {_protocol(task, encoder)}",
        "list_hash": data_hash(names, task.templates),
        **_judge(task, task.split, scores, classes, encoder, recipe),
    }


def linear_segmentation(task: SegmentationTask, encoder: Encoder, recipe: EncoderEvalRecipe) -> Any:
    """A batch norm and a linear head on frozen patches, trained on random windows.

    Paper: DINOv2 (2304.07193) section 7.4 (linear head).
    """
    classes = read_classes(task.classes)
    device, width = encoder.tower.model.device, encoder.tower.hidden_size
    pairs = read_masks(task, task.train_split)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, len(classes), 1)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=task.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    head.train()

    def scores(windows: Tensor) -> Tensor:
        patches = patch_grid(encoder, windows).float()
        found: Tensor = head(patches.permute(0, 3, 1, 2))
        return found

    for _ in range(task.steps):
        chosen = [pairs[row] for row in rng.integers(len(pairs), size=task.batch_size)]
        windows, masks = zip(*(_random_window(p, task, encoder, rng) for p in chosen), strict=True)
        logits = F.interpolate(
            scores(torch.stack(windows).to(device)), size=masks[0].shape, mode="bilinear"
        )
        target = torch.stack(masks).to(device)
        if (target != UNJUDGED).any():
            optimizer.zero_grad()
            F.cross_entropy(logits, target, ignore_index=UNJUDGED).backward()
            optimizer.step()
        schedule.step()
    head.eval()
    return {
        "protocol": f"batch norm and linear head on frozen patches, {task.steps} steps of "
        f"{task.batch_size} windows of {task.train_split}; {_protocol(task, encoder)}",
        **_judge(task, task.split, scores, classes, encoder, recipe),
    }


@torch.no_grad()
def patch_grid(
    encoder: Encoder, windows: Float[Tensor, "b 3 s s"], *, last_values: bool = False
) -> Float[Tensor, "b g g d"]:
    """The tower's last patch features; with `last_values` its last attention is left out.

    Raises:
        ValueError: `last_values`, and the tower has no attention with `v_proj`.
    """
    tower = encoder.tower
    with _last_values(tower.model) if last_values else nullcontext():
        out: Any = tower.model(pixel_values=windows.to(tower.model.device, tower.model.dtype))
    patches = out.last_hidden_state[:, tower.num_prefix_tokens :]
    found: Tensor = patches.unflatten(1, (tower.grid, tower.grid))
    return found


@contextmanager
def _last_values(model: nn.Module) -> Iterator[None]:
    """The last self-attention gives each token its own value, through the output projection."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "v_proj")]
    if not layers:
        raise ValueError(
            f"last_attention: `value` needs attention with a v_proj, which {type(model).__name__} "
            "has not; use `full`"
        )

    def own_value(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        value = layer.v_proj(args[0] if args else kwargs["hidden_states"])
        for name in ("inner_attn_ln", "out_proj", "proj"):
            value = getattr(layer, name, nn.Identity())(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    hook = layers[-1].register_forward_hook(own_value, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _pool_each(model: Any, patches: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """What the tower's pooling makes of each patch alone; others' last state is normed already."""
    if model.config.model_type == "siglip_vision_model":
        pooled: Tensor = model.head(patches[:, None])
        return pooled
    norm = getattr(model, "post_layernorm", nn.Identity())
    return norm(patches) if model.config.model_type == "clip_vision_model" else patches


def read_masks(source: SegmentationSource, split: str) -> list[tuple[Path, str, str]]:
    """Root, picture and mask of each item of a split.

    Raises:
        ValueError: There is no such split.
    """
    root = Path(source.data)
    if source.layout == "voc":
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        stems = listing.read_text(encoding="utf-8").split() if listing.is_file() else []
        pictures, masks = "JPEGImages", "SegmentationClass"
    else:
        pictures, masks = f"images/{split}", f"annotations/{split}"
        stems = sorted(file.stem for file in (root / masks).glob("*.png"))
    if not stems:
        raise ValueError(f"{root}: no split {split!r} in the layout `{source.layout}`")
    return [
        (root, plain_image(root, f"{pictures}/{stem}").key, f"{masks}/{stem}.png") for stem in stems
    ]


def _load(
    item: tuple[Path, str, str], source: SegmentationSource, encoder: Encoder
) -> tuple[Float[Tensor, "3 h w"], Tensor]:
    """Normalised picture, resized, and mask in its own size with 0 as the first class."""
    root, picture, mask = item
    image = open_image(root, picture)
    side = encoder.tower.image_size_px
    scale = max(source.short_side_px or 2 * side, side) / min(image.size)
    size = [max(side, round(length * scale)) for length in image.size]
    pixels = np.asarray(image.resize((size[0], size[1]), Image.Resampling.BICUBIC), np.float32)
    mean, std = np.array(encoder.tower.image_mean), np.array(encoder.tower.image_std)
    normal = torch.from_numpy(((pixels / 255.0 - mean) / std).astype(np.float32))
    labels = np.asarray(Image.open(resolve_image(root, mask)), dtype=np.int64)
    if labels.ndim != 2:
        raise ValueError(f"{mask}: expected one channel of class numbers, got {labels.shape}")
    if source.skip_zero:
        labels = np.where(labels == 0, UNJUDGED, np.where(labels == UNJUDGED, labels, labels - 1))
    return normal.permute(2, 0, 1), torch.from_numpy(labels)


def _random_window(
    item: tuple[Path, str, str],
    task: SegmentationTask,
    encoder: Encoder,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    pixels, labels = _load(item, task, encoder)
    side = encoder.tower.image_size_px
    near = F.interpolate(labels[None, None].float(), size=pixels.shape[1:], mode="nearest")
    top, left = (int(rng.integers(length - side + 1)) for length in pixels.shape[1:])
    window = (..., slice(top, top + side), slice(left, left + side))
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
    found = torch.cat([scores(part).float().cpu() for part in windows])
    total = torch.zeros(found.shape[1], *pixels.shape[1:])
    counts = torch.zeros(pixels.shape[1:])
    for place, window in zip(places, found, strict=True):
        total[place] += F.interpolate(window[None], size=(side, side), mode="bilinear")[0]
        counts[place] += 1
    return total / counts


def overlaps(found: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each class that are right, found and there: `int[3, classes]`.

    Raises:
        ValueError: A mask value that is no class.
    """
    judged = labels != UNJUDGED
    there, found = labels[judged], found[judged]
    if len(there) and there.max() >= num_classes:
        raise ValueError(f"a mask has class {there.max()}, but there are {num_classes} names")
    parts = (there[found == there], found, there)
    return np.stack([np.bincount(part, minlength=num_classes) for part in parts])


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union in per cent of `[..., 3, classes]`; NaN where a class is nowhere."""
    right, found, there = np.moveaxis(counts.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = 100.0 * right / (found + there - right)
    return share


def _judge(
    source: SegmentationSource,
    split: str,
    scores: Scores,
    classes: dict[str, str],
    encoder: Encoder,
    recipe: EncoderEvalRecipe,
) -> dict[str, Any]:
    side = encoder.tower.image_size_px
    digest, counts = hashlib.sha256(), []
    items = read_masks(source, split)
    for item in items:
        for name in item[1:]:
            digest.update(resolve_image(item[0], name).read_bytes())
        pixels, labels = _load(item, source, encoder)
        found = slide(pixels, scores, side, _step(source, side), encoder.batch_size)
        best = F.interpolate(found[None], size=labels.shape, mode="bilinear")[0].argmax(0)
        counts.append(overlaps(best.numpy(), labels.numpy(), len(classes)))
    total = np.sum(counts, axis=0)
    ious, ci = class_iou(total), None
    if recipe.bootstrap:
        rng = np.random.default_rng(recipe.seed)
        draws = rng.multinomial(len(items), [1 / len(items)] * len(items), recipe.bootstrap)
        drawn = np.tensordot(draws, np.stack(counts), axes=1)
        ci = np.percentile(np.nanmean(class_iou(drawn), axis=1), [2.5, 97.5]).tolist()
    return {
        "data_hash": data_hash([item[1:] for item in items], digest.hexdigest()),
        "miou": float(np.nanmean(ious)),
        "ci": ci,
        "pixel_accuracy": 100.0 * float(total[0].sum() / max(1, total[2].sum())),
        "iou": {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(classes, ious, strict=True)
        },
        "images": len(items),
    }


def _step(source: SegmentationSource, side: int) -> int:
    return max(1, round(source.stride * side))


def _protocol(source: SegmentationSource, encoder: Encoder) -> str:
    side = encoder.tower.image_size_px
    return (
        f"short side {source.short_side_px or 2 * side} px, windows of {side} px every "
        f"{_step(source, side)} px, judged in the mask's own size"
    )
