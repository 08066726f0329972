"""Masks, windows, IoU, and what the last attention is replaced by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn import LayerNorm, Linear

from llm2clip_vlm.evaluation.encoder.encoders import Encoder, load_encoder
from llm2clip_vlm.evaluation.encoder.segmentation import (
    Masks,
    _judge,
    _pool_each,
    linear_segmentation,
    patch_embeds,
    patch_grid,
    slide,
    zero_shot_segmentation,
)
from llm2clip_vlm.metrics.segmentation import class_iou, mean_iou, overlaps, paired_iou
from llm2clip_vlm.metrics.statistics import bootstrap_of_sums
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe
from tests.tiny_towers import build_tower

COLOURS = ((140, 90, 90), (90, 90, 140), (90, 140, 90))


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Encoder:
    return load_encoder(str(tiny_clip), batch_size=4)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose halves have a colour each; mask values 1 to 3, 255 between the halves."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names: dict[str, list[str]] = {"train": [], "val": [], "few": []}
    for number in range(16):
        split, name = ("train" if number < 10 else "val"), f"2007_{number:06d}"
        names[split].append(name)
        names["few"] += [name] * (number < 4)
        classes = np.zeros((32, 48), np.uint8)
        left, right = rng.permutation(3)[:2]
        classes[:, :24], classes[:, 24:] = left + 1, right + 1
        pixels = np.array([(0, 0, 0), *COLOURS])[classes] + rng.normal(0, 25, (32, 48, 3))
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        classes[:, 23:25] = 255
        classes[:2] = 0
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=95)
        mask = Image.fromarray(classes)
        mask.putpalette([v for i in range(256) for v in (i, 255 - i, i)])  # as VOC's are
        mask.save(root / f"SegmentationClass/{name}.png")
    for split, listed in names.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(listed) + "\n")
    (root / "names.txt").write_text("red\nblue\ngreen")
    return root


def run(function: Any, encoder: Encoder, voc: Path, task: str, **more: Any) -> Any:
    seed, bootstrap = more.pop("seed", 0), more.pop("bootstrap", 20)
    values = {"task": task, "data": str(voc), "split": "val", "classes": str(voc / "names.txt")}
    recipe = EncoderEvalRecipe.model_validate(
        {"stage": "run_encoder", "output_dir": "x", "model": "x", "tasks": [values | more]}
        | {"seed": seed, "bootstrap": bootstrap}
    )
    found = function(recipe.tasks[0], encoder, recipe)
    names, counts = found["samples"][""]
    return found | {"samples": (names, np.array(counts).tolist())}


def masks(encoder: Encoder, root: Path, **more: Any) -> Masks:
    values = {"task": "zero_shot_segmentation", "data": str(root), "split": "x"}
    values["classes"] = str(root / "names.txt")
    recipe = EncoderEvalRecipe.model_validate(
        {"stage": "run_encoder", "output_dir": "x", "model": "x", "tasks": [values | more]}
    )
    return Masks(recipe.tasks[0], more.pop("split", "val"), encoder)  # type: ignore[arg-type]


def test_vocs_layout_palette_and_sizes(clip: Encoder, voc: Path, tmp_path: Path) -> None:
    found = masks(clip, voc)
    assert len(found.items) == 6 and found.items[0][0] == "JPEGImages/2007_000010.jpg"
    pixels, labels = found[0]
    assert pixels.shape == (3, 64, 96) and labels.shape == (32, 48)
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255} and (labels[:2] == 255).all()
    (tmp_path / "names.txt").write_text("nothing\nred\nblue\ngreen")
    whole = masks(clip, voc, skip_zero=False, classes=str(tmp_path / "names.txt"))
    assert whole[0][1][0, 0] == 0
    assert masks(clip, voc, short_side_px=40)[0][0].shape == (3, 40, 60)
    assert masks(clip, voc, short_side_px=8)[0][0].shape == (3, 32, 48)  # a window has to fit
    assert (masks(clip, voc).step, masks(clip, voc, stride=1.0).step) == (16, 32)
    with pytest.raises(ValueError, match="no split 'test'"):
        masks(clip, voc, split="test")


def test_ade20ks_layout(clip: Encoder, tmp_path: Path) -> None:
    for folder in ("images/validation", "annotations/validation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (40, 32)).save(tmp_path / "images/validation/ADE_val_00000001.jpg")
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 20:] = 150
    Image.fromarray(mask).save(tmp_path / "annotations/validation/ADE_val_00000001.png")
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(150))))
    found = masks(clip, tmp_path, layout="ade20k", split="validation")
    assert found[0][1].unique().tolist() == [149, 255]
    Image.new("RGB", (40, 32)).save(tmp_path / "annotations/validation/ADE_val_00000001.png")
    with pytest.raises(ValueError, match="one channel"):
        found[0]


def test_windows_cover_the_picture_and_overlaps_are_averaged() -> None:
    seen = []

    def scores(windows: torch.Tensor) -> torch.Tensor:
        seen.append(len(windows))
        return windows.mean(1, keepdim=True)

    pixels = torch.arange(40 * 70.0).reshape(1, 40, 70).expand(3, 40, 70)
    found = slide(pixels, scores, side=32, step=16, batch_size=5)
    torch.testing.assert_close(found, pixels[:1])
    assert seen == [5, 3]  # 2 x 4 windows


def test_iou_counts_judged_pixels_alone() -> None:
    labels = np.array([[0, 0, 1, 1], [1, 1, 255, 255]])
    found = np.array([[0, 1, 1, 1], [1, 0, 0, 1]])
    counts = overlaps(found, labels, 3)
    assert counts.tolist() == [[1, 3, 0], [2, 4, 0], [2, 4, 0]]
    ious = class_iou(counts)
    assert ious[0] == pytest.approx(100 / 3) and ious[1] == pytest.approx(60) and np.isnan(ious[2])
    with pytest.raises(ValueError, match="class 1, but there are 1 names"):
        overlaps(found, labels, 1)


def test_the_difference_of_two_mean_ious_by_hand() -> None:
    # Right, found and there of two classes, in two pictures of ten pixels.
    a = np.array([[[6, 2], [8, 2], [6, 4]], [[1, 8], [1, 9], [2, 8]]])
    b = np.array([[[3, 1], [6, 4], [6, 4]], [[2, 8], [2, 8], [2, 8]]])
    first = 100 * ((6 / 8 + 2 / 4) / 2 - (3 / 9 + 1 / 7) / 2)  # of the first picture alone
    second = 100 * ((1 / 2 + 8 / 9) / 2 - 1)
    both = 100 * ((7 / 10 + 10 / 13) / 2 - (5 / 11 + 9 / 15) / 2)
    found = paired_iou(a, b, 1000)
    assert found["delta"] == pytest.approx(both) and found["images"] == 2
    assert mean_iou(a.sum(0)) - mean_iou(b.sum(0)) == pytest.approx(both), "of sums, not of means"
    # A quarter of the draws has each picture twice, so that these are the percentiles; with two
    # pictures they are widened: t of one degree of freedom over the normal's 1.96, times root 2.
    wider = 12.7062 / 1.95996 * 2**0.5
    ends = [both + wider * (second - both), both + wider * (first - both)]
    difference = lambda sums: mean_iou(sums[:, 0]) - mean_iou(sums[:, 1])  # noqa: E731
    drawn = bootstrap_of_sums(np.stack([a, b], axis=1), difference, 1000, 0)
    assert drawn == pytest.approx(ends, rel=1e-4)
    assert found["ci"] == [-100, 100], "no difference is beyond, and these ends are"
    assert paired_iou(a[:1], b[:1])["ci"] == [-100, 100], "one picture says nothing"
    assert paired_iou(a, a, 50)["ci"] == [0.0, 0.0]
    with pytest.raises(ValueError, match="different data"):
        paired_iou(a, b[:, :, ::-1])


@pytest.mark.parametrize("kind", ["clip", "siglip", "eva02", "timm_eva"])
@torch.no_grad()
def test_a_token_keeps_its_own_value(kind: str, tmp_path: Path) -> None:
    encoder = load_encoder(str(build_tower(kind, tmp_path)))
    model: Any = encoder.tower.model
    pixels = torch.randn(2, 3, 32, 32)
    if kind == "timm_eva":  # as in timm's EVA02-CLIP
        own = model.timm_model.blocks[-1].attn.norm = LayerNorm(32)
        own.weight.uniform_(0.5, 1.5)
    got = patch_grid(encoder, pixels, last_values=True)
    full = patch_grid(encoder, pixels)
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    if kind == "eva02":
        block = model.blocks[-1]
        value = block.attn.proj(
            block.attn.inner_attn_ln(block.attn.v_proj(block.norm1(states[-2])))
        )
        x = states[-2] + value
        want = model.norm(x + block.mlp(block.norm2(x)))
    elif kind == "timm_eva":
        block = model.timm_model.blocks[-1]
        value = block.attn.proj(own(block.attn.v_proj(block.norm1(states[-2]))))
        x = states[-2] + value
        want = model.timm_model.norm(x + block.mlp(block.norm2(x)))
    else:
        layer = model.encoder.layers[-1]
        value = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(states[-2])))
        x = states[-2] + value
        want = x + layer.mlp(layer.layer_norm2(x))
        want = want if kind == "clip" else model.post_layernorm(want)
    want = want[:, encoder.tower.num_prefix_tokens :].unflatten(1, (4, 4))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - full).abs().max() > 1e-3
    torch.testing.assert_close(patch_grid(encoder, pixels), full)  # the hook is gone


@torch.no_grad()
def test_pooling_a_patch_alone_is_the_towers_own_pooling(tmp_path: Path) -> None:
    for kind, wanted in (("siglip", "head"), ("clip", "post_layernorm")):
        model: Any = load_encoder(str(build_tower(kind, tmp_path / kind))).tower.model
        patches = torch.randn(5, 32)
        want = getattr(model, wanted)(patches[:, None])
        torch.testing.assert_close(_pool_each(model, patches), want.reshape(5, 32))
    model = load_encoder(str(build_tower("dinov2", tmp_path / "d"))).tower.model
    assert _pool_each(model, patches) is patches


@pytest.mark.parametrize("kind", ["timm", "timm_eva", "timm_siglip", "timm_cnn", "timm_convnext"])
@torch.no_grad()
def test_pooling_a_patch_of_timm_is_pooling_a_picture_of_it(kind: str, tmp_path: Path) -> None:
    """Attention pooling, the norm behind a mean and that behind a map count for a patch, too."""
    tower = load_encoder(str(build_tower(kind, tmp_path))).tower
    inner: Any = tower.model.timm_model
    patches = torch.randn(5, tower.hidden_size)
    many = patches[:, None].expand(-1, tower.num_prefix_tokens + tower.num_patches, -1)
    if kind in ("timm_cnn", "timm_convnext"):
        many = many.unflatten(1, (tower.grid, tower.grid)).permute(0, 3, 1, 2)
    torch.testing.assert_close(_pool_each(tower.model, patches), inner.forward_head(many))


def test_a_tower_without_v_proj_says_so(clip: Encoder) -> None:
    encoder: Any = SimpleNamespace(tower=replace(clip.tower, model=Linear(1, 1)))
    with pytest.raises(ValueError, match="Linear lacks; use `full`"):
        patch_grid(encoder, torch.zeros(1, 3, 32, 32), last_values=True)


def test_zero_shot_by_texts_that_are_the_patches_own(clip: Encoder, voc: Path) -> None:
    """Class texts made of the tower's own patches of a colour find that colour."""

    def own(texts: Any) -> torch.Tensor:
        names = ("red", "blue", "green")
        colours = [COLOURS[next(i for i, n in enumerate(names) if n in t)] for t in texts]
        plain = torch.tensor(colours).float()[:, :, None, None].expand(-1, 3, 32, 32) / 255
        mean, std = (
            torch.tensor(v).reshape(1, 3, 1, 1) for v in (tower.image_mean, tower.image_std)
        )
        patches = patch_grid(clip, (plain - mean) / std, last_values=True)
        with torch.no_grad():
            pooled = clip.project(_pool_each(tower.model, patches.flatten(1, 2).mean(1)))
        return F.normalize(pooled, dim=-1)

    tower = clip.tower
    encoder = replace(clip, texts=own)
    found = run(zero_shot_segmentation, encoder, voc, "zero_shot_segmentation")
    assert found["miou"] > 80 and set(found["iou"]) == {"red", "blue", "green"}
    low, high = found["ci"]
    assert low <= found["miou"] <= high and found["images"] == 6
    assert "windows of 32 px every 16 px" in found["protocol"] and len(found["list_hash"]) == 64
    full = run(
        zero_shot_segmentation, encoder, voc, "zero_shot_segmentation", last_attention="full"
    )
    assert full["miou"] != found["miou"] and "full" in full["protocol"]
    other = run(zero_shot_segmentation, encoder, voc, "zero_shot_segmentation",
                templates=["the {} thing"], bootstrap=0)  # fmt: skip
    assert other["list_hash"] != found["list_hash"] and other["ci"] is None


def test_a_linear_head_learns_and_its_flags_do_something(clip: Encoder, voc: Path) -> None:
    options = {"train_split": "train", "steps": 8, "batch_size": 4, "learning_rate": 0.01}
    found = run(linear_segmentation, clip, voc, "segmentation", **options)
    assert found["miou"] > 60 and found["pixel_accuracy"] > 70
    assert run(linear_segmentation, clip, voc, "segmentation", **options) == found
    for change in ({"steps": 1}, {"learning_rate": 1e-6}, {"batch_size": 1}, {"seed": 1},
                   {"train_split": "few"}):  # fmt: skip
        other = run(linear_segmentation, clip, voc, "segmentation", **options | change)
        assert other["miou"] != found["miou"], change
        assert (other["data_hash"] == found["data_hash"]) == ("train_split" not in change)
    with pytest.raises(ValueError, match="segmentation: 6 of 6 test images are images of train"):
        run(linear_segmentation, clip, voc, "segmentation", **options | {"train_split": "val"})


def test_a_class_that_is_nowhere_does_not_count(clip: Encoder, voc: Path, tmp_path: Path) -> None:
    """The mean is over classes that are there or found, not over all names."""

    recipe: Any = SimpleNamespace(bootstrap=0, seed=0)
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\ngreen\nnowhere")

    def everywhere(number: int) -> dict[str, Any]:
        def scores(windows: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(len(windows), 4, *windows.shape[2:])
            out[:, number] = 1.0
            return out

        return _judge(masks(clip, voc, classes=str(names)), scores, recipe)

    found = everywhere(0)
    shares = [value for value in found["iou"].values() if value is not None]
    assert found["iou"]["nowhere"] is None and len(shares) == 3 and found["iou"]["blue"] == 0.0
    assert found["miou"] == pytest.approx(sum(shares) / 3) and found["miou"] > 0
    best = max(everywhere(number)["miou"] for number in range(3))
    assert found["chance_miou"] == pytest.approx(best)


def test_a_trained_head_judges_each_window_alone(
    clip: Encoder, voc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch norm is that of training: how many windows are judged together changes nothing."""
    seeds, steps = [], []
    manual_seed, schedule = torch.manual_seed, torch.optim.lr_scheduler.CosineAnnealingLR.step
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    monkeypatch.setattr(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        "step",
        lambda self, *rest: steps.append(self.last_epoch) or schedule(self, *rest),
    )
    options = {
        "train_split": "train",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.01,
        "seed": 5,
    }
    several, alone = (
        run(linear_segmentation, replace(clip, batch_size=size), voc, "segmentation", **options)
        for size in (4, 1)
    )
    assert several["iou"] == pytest.approx(alone["iou"], abs=0.5)
    assert seeds == [5, 5] and len(steps) == 2 * (3 + 1)  # the first is the schedule's own


def test_windows_have_whole_classes_and_defaults_are_stated(clip: Encoder, voc: Path) -> None:
    found, rng = masks(clip, voc, stride=0.25), np.random.default_rng(0)
    assert (found.step, found.short_side) == (8, 64)
    for row in range(6):
        pixels, labels = found.random_window(row, rng)
        assert pixels.shape == (3, 32, 32) and labels.shape == (32, 32)
        assert set(labels.unique().tolist()) <= {0, 1, 2, 255}


@torch.no_grad()
def test_nan_is_no_class(tiny_clip: Path, voc: Path) -> None:
    """Its argmax would be the first class, everywhere."""
    encoder = load_encoder(str(tiny_clip), dtype=torch.float16)
    model: Any = encoder.tower.model
    pixels = torch.zeros(1, 3, 32, 32)
    weight: Any = encoder.project.weight
    weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"NaN or inf.*bfloat16 or float32"):
        patch_embeds(encoder, pixels)
    patch_grid(encoder, pixels)
    for layer in model.encoder.layers:
        layer.mlp.fc2.bias.fill_(6e4)  # twice that is beyond float16
    with pytest.raises(ValueError, match=r"patches: NaN or inf.*bfloat16 or float32"):
        patch_grid(encoder, pixels)
    recipe: Any = SimpleNamespace(bootstrap=0, seed=0)
    with pytest.raises(ValueError, match="scores of the classes: NaN"):
        _judge(masks(encoder, voc), lambda x: torch.full((len(x), 3, 4, 4), float("nan")), recipe)


def test_a_mask_of_another_size_than_its_picture_is_refused(clip: Encoder, tmp_path: Path) -> None:
    """For example where EXIF turns the picture alone."""
    for folder in ("images/val", "annotations/val"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("a")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (48, 32)).save(tmp_path / "images/val/1.jpg", exif=exif)
    Image.new("L", (48, 32), 1).save(tmp_path / "annotations/val/1.png")
    with pytest.raises(ValueError, match=r"val/1\.png: expected \(32, 48\) px .* got \(48, 32\)"):
        masks(clip, tmp_path, layout="ade20k")[0]


@pytest.mark.parametrize(("skip_zero", "most"), [(True, 254), (False, 255)])
def test_a_class_that_no_mask_could_hold_is_refused(
    clip: Encoder, voc: Path, tmp_path: Path, skip_zero: bool, most: int
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(most))))
    masks(clip, voc, classes=str(names), skip_zero=skip_zero)
    names.write_text("\n".join(map(str, range(most + 1))))
    with pytest.raises(ValueError, match=f"{most + 1} names, at most {most}"):
        masks(clip, voc, classes=str(names), skip_zero=skip_zero)


@pytest.mark.parametrize(("value", "skip_zero"), [(4, True), (3, False), (256, True)])
def test_a_mask_value_without_a_name_is_refused_in_training_too(
    clip: Encoder, tmp_path: Path, value: int, skip_zero: bool
) -> None:
    """256 less one would be 255, which is never judged."""
    for folder in ("images/train", "annotations/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("a\nb\nc")
    Image.new("RGB", (32, 32)).save(tmp_path / "images/train/1.jpg")
    mask = np.full((32, 32), value, np.uint16)
    Image.fromarray(mask).save(tmp_path / "annotations/train/1.png")
    found = masks(clip, tmp_path, layout="ade20k", split="train", skip_zero=skip_zero)
    with pytest.raises(ValueError, match=rf"1\.png: value {value}: no name in .*names\.txt"):
        found.random_window(0, np.random.default_rng(0))
