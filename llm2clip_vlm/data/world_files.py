"""The embedded world on disk, in the formats that real data has."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from llm2clip_vlm.config import WorldConfig
from llm2clip_vlm.data.world import (
    COLOURS,
    SHAPES,
    SYNONYMS,
    Scene,
    draw_scene,
    existence,
    long_caption,
    questions,
    short_caption,
)
from llm2clip_vlm.data.world_render import render, render_masks
from llm2clip_vlm.data.world_text import ASK_CAPTION, as_asked

WORLD_VERSION = 2
"""Raised when the same seed no longer gives the same bytes; part of the finished-marker."""

SIZES_BASE = {"short": 12_000}
"""Records of the `base` part."""

SIZES = {
    "text": 12_000,
    "text_val": 1_000,
    "pairs_train": 3_000,
    "pairs_val": 500,
    "pairs_test": 1_000,
    "instruct": 4_000,
    "vqa_test": 400,
    "exist_test": 300,
    "caption_test": 200,
}
"""Records of each file of the `road` part."""

SIZES_DENSE = {"dense_train": 600, "dense_test": 300}
"""Records of the `dense` part."""

LONG_CAPTIONS = 4
"""Long captions of each training picture."""


DESCRIBED_EVERY = 4
"""Every how many pictures of `instruct` stage 4 also asks for a description."""


def _scenes(seed: int, name: str, split: str, count: int) -> Iterator[tuple[int, Scene, Any]]:
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for index in range(count):
        rng = np.random.default_rng([seed, salt, index])
        yield index, draw_scene(rng, split), rng


_SPLIT_OF_FILE = {
    "text": "text",
    "text_val": "val",
    "short": "short",
    "pairs_train": "pairs_train",
    "pairs_val": "val",
    "pairs_test": "test",
    "instruct": "instruct",
    "vqa_test": "test",
    "exist_test": "test",
    "caption_test": "test",
    "dense_train": "pairs_train",
    "dense_test": "test",
}


def file_scenes(world: WorldConfig, name: str) -> list[Scene]:
    """The scenes of a file, in its order, as :func:`ensure_world` writes them.

    Args:
        world: The world.
        name: A key of :data:`SIZES` or :data:`SIZES_BASE`.
    """
    marker = json.loads((world_dir(world) / "world.json").read_text(encoding="utf-8"))
    count = marker["sizes"][name]
    return [scene for _, scene, _ in _scenes(world.seed, name, _SPLIT_OF_FILE[name], count)]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class _Writer:
    """Writes the files of one seed into a folder."""

    def __init__(self, root: Path, seed: int, sizes: Mapping[str, int]) -> None:
        self.root, self.seed, self.sizes = root, seed, sizes
        self.bar = tqdm(total=sum(sizes.values()), desc="writing the world", unit="scene")

    def scenes(self, name: str) -> Iterator[tuple[int, Scene, Any]]:
        for item in _scenes(self.seed, name, _SPLIT_OF_FILE[name], self.sizes[name]):
            yield item
            self.bar.update()

    def picture(self, name: str, index: int, scene: Scene, rng: np.random.Generator) -> str:
        path = f"images/{name}/{index:05d}.png"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        render(scene, rng).save(self.root / path, compress_level=1)
        return path

    def texts(self) -> None:
        for name, file in (("text", "captions_text"), ("text_val", "captions_text_val")):
            rows = []
            for index, scene, rng in self.scenes(name):
                captions = [long_caption(scene, rng, "full") for _ in range(3)]
                rows.append({"id": f"{name}-{index:05d}", "captions": captions})
            _write_lines(self.root / f"{file}.jsonl", rows)

    def pairs(self, name: str, file: str) -> None:
        rows = []
        for index, scene, rng in self.scenes(name):
            test = name in ("pairs_val", "pairs_test")
            captions = {"short": [short_caption(scene, rng)]}
            if name == "short":
                captions["short"] += [short_caption(scene, rng)]
            elif test:
                captions["long"] = [long_caption(scene, rng, "full")]
                captions["long_seen"] = [long_caption(scene, rng, "pairs")]
            else:
                captions["long"] = [long_caption(scene, rng, "pairs") for _ in range(LONG_CAPTIONS)]
            row = {"id": f"{name}-{index:05d}", "captions": captions}
            row["image"] = self.picture(name, index, scene, rng)
            rows.append(row)
        _write_lines(self.root / f"{file}.jsonl", rows)

    def conversations(self) -> None:
        pretrain, instruct = [], []
        for index, scene, rng in self.scenes("instruct"):
            image = self.picture("instruct", index, scene, rng)
            key = f"instruct-{index:05d}"
            caption = long_caption(scene, rng, "pairs")
            told = [
                {"from": "human", "value": f"<image>\n{ASK_CAPTION}"},
                {"from": "gpt", "value": caption},
            ]
            pretrain.append({"id": key, "image": image, "conversations": told})
            if index % DESCRIBED_EVERY == 0:
                described = {"id": f"{key}-caption", "image": image, "conversations": told}
                instruct.append(described)
            turns = []
            for position, question in enumerate(questions(scene, rng)):
                text = ("<image>\n" if position == 0 else "") + as_asked(question.question, rng)
                turns += [
                    {"from": "human", "value": text},
                    {"from": "gpt", "value": question.answer},
                ]
            instruct.append({"id": key, "image": image, "conversations": turns})
        (self.root / "llava_pretrain.json").write_text(json.dumps(pretrain), encoding="utf-8")
        (self.root / "llava_instruct.json").write_text(json.dumps(instruct), encoding="utf-8")

    def tests(self) -> None:
        rows: list[dict[str, Any]] = []
        for index, scene, rng in self.scenes("vqa_test"):
            image = self.picture("vqa_test", index, scene, rng)
            for q in questions(scene, rng):
                rows.append(
                    {
                        "id": f"vqa-{index:05d}-{q.kind}",
                        "image": image,
                        "image_id": f"vqa-{index:05d}",
                        "question": q.question,
                        "answer": q.answer,
                        "type": q.kind,
                        "text": long_caption(scene, rng, "full"),
                    }
                )
        _write_lines(self.root / "vqa_test.jsonl", rows)
        rows = []
        for index, scene, rng in self.scenes("exist_test"):
            image = self.picture("exist_test", index, scene, rng)
            for category in ("random", "popular", "adversarial"):
                for present in (True, False):
                    q = existence(scene, rng, category, present)
                    rows.append(
                        {
                            "id": f"exist-{index:05d}-{len(rows)}",
                            "image": image,
                            "image_id": f"exist-{index:05d}",
                            "question": q.question,
                            "answer": q.answer,
                            "type": "exist",
                            "category": q.category,
                        }
                    )
        _write_lines(self.root / "exist_test.jsonl", rows)
        rows = []
        back = {other: value for value, other in SYNONYMS.items()}
        for index, scene, rng in self.scenes("caption_test"):
            rows.append(
                {
                    "id": f"caption-{index:05d}",
                    "image": self.picture("caption_test", index, scene, rng),
                    "attributes": [[t.colour, t.shape, t.pattern] for t in scene.things],
                    "synonyms": back,
                }
            )
        _write_lines(self.root / "caption_test.jsonl", rows)

    def dense(self) -> None:
        """Pictures with classes, masks (VOC's layout) and boxes (COCO's)."""
        objects, labels = [f"{c} {s}" for c in COLOURS for s in SHAPES], []
        for part in ("train", "test"):
            images: list[dict[str, Any]] = []
            boxes: list[dict[str, Any]] = []
            for index, scene, rng in self.scenes(f"dense_{part}"):
                stem = f"{part}-{index:05d}"
                picture, masks = render_masks(scene, rng)
                classes = np.zeros(masks.shape[1:], np.uint8)
                for thing, mask in zip(scene.things, masks, strict=True):
                    number = SHAPES.index(thing.shape) + 1
                    classes[mask] = number
                    y, x = np.nonzero(mask)
                    sides = [int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
                    box = {"id": len(boxes) + 1, "image_id": index, "category_id": number}
                    box |= {"bbox": [int(x.min()), int(y.min()), *sides]}
                    boxes.append(box | {"area": int(mask.sum()), "iscrowd": 0})
                for folder, image in (
                    ("JPEGImages", picture),
                    ("SegmentationClass", Image.fromarray(classes)),
                ):
                    (self.root / folder).mkdir(exist_ok=True)
                    image.save(self.root / folder / f"{stem}.png")
                size = {"width": picture.width, "height": picture.height}
                images.append({"id": index, "file_name": f"{stem}.png"} | size)
                first = scene.things[0]
                row = {"image": f"JPEGImages/{stem}.png", "split": part}
                labels.append({"id": stem, "label": f"{first.colour} {first.shape}"} | row)
            listing = self.root / "ImageSets" / "Segmentation" / f"{part}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("\n".join(Path(i["file_name"]).stem for i in images))
            kinds = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
            document = {"images": images, "annotations": boxes, "categories": kinds}
            (self.root / f"instances_{part}.json").write_text(json.dumps(document))
        _write_lines(self.root / "labels.jsonl", labels)
        (self.root / "shapes.txt").write_text("\n".join(SHAPES))
        (self.root / "objects.txt").write_text("\n".join(objects))


def world_dir(world: WorldConfig) -> Path:
    """Folder of a world: `<dir>/seed-<seed>`, with `-<part>` behind it unless that is `road`."""
    return Path(world.dir) / f"seed-{world.seed}{'' if world.part == 'road' else f'-{world.part}'}"


def ensure_world(world: WorldConfig, *, sizes: Mapping[str, int] | None = None) -> Path:
    """Write the world of a seed unless it is already there.

    Args:
        world: Seed and place.
        sizes: Fewer records (tests); default :data:`SIZES`.

    Returns:
        The folder. Writing is all or nothing: a folder that exists is complete.

    Raises:
        ValueError: The folder holds a world of another version or size.
    """
    root = world_dir(world)
    default = {"base": SIZES_BASE, "dense": SIZES_DENSE, "road": SIZES}[world.part]
    wanted = {"version": WORLD_VERSION, "seed": world.seed, "sizes": {**default, **(sizes or {})}}
    marker = root / "world.json"
    if marker.exists():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"{root}: holds another world (found {found}, expected {wanted}); "
                "delete the folder or choose another `world.dir`"
            )
        return root
    part = root.with_name(f"{root.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    sizes_all: dict[str, int] = wanted["sizes"]  # type: ignore[assignment]
    writer = _Writer(part, world.seed, sizes_all)
    if world.part == "base":
        writer.pairs("short", "short_pairs")
    elif world.part == "dense":
        writer.dense()
    else:
        writer.texts()
        writer.pairs("pairs_train", "pairs_train")
        writer.pairs("pairs_val", "pairs_val")
        writer.pairs("pairs_test", "pairs_test")
        writer.conversations()
        writer.tests()
    writer.bar.close()
    (part / "world.json").write_text(json.dumps(wanted), encoding="utf-8")
    try:
        part.rename(root)
    except OSError:  # another process was faster; its world is the same
        shutil.rmtree(part)
    return root
