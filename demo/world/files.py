"""The drawn world on disk, in the formats that real data has."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from llm2clip_vlm.files import read_json, written_whole
from world.pictures import render, render_masks
from world.scenes import (
    COLOURS,
    SHAPES,
    SYNONYMS,
    Question,
    Scene,
    Wording,
    draw_scene,
    existence,
    long_caption,
    questions,
    short_caption,
)
from world.texts import ASK_CAPTION, as_asked

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


@dataclass(frozen=True)
class WorldConfig:
    """Which world, and where it is written."""

    seed: int = 0
    """Seed of scenes, wording and rendering. Splits are disjoint in attributes for all seeds."""
    dir: str = "runs/world"
    """Directory below which `seed-<seed>/` is written."""
    part: Literal["road", "base", "dense"] = "road"
    """`road`: what the stages and the evaluation read. `base`: the pictures with short captions
    that the base CLIP is pre-trained on, in `seed-<seed>-base/`. `dense`: pictures with classes,
    masks and boxes for `eval/run_encoder.py`, in `seed-<seed>-dense/`."""


Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""Files, and what is added to them."""


def _scenes(seed: int, name: str, count: int) -> Iterator[tuple[int, Scene, np.random.Generator]]:
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for index in range(count):
        rng = np.random.default_rng([seed, salt, index])
        yield index, draw_scene(rng, _FILES[name][0]), rng


def file_scenes(world: WorldConfig, name: str) -> list[Scene]:
    """The scenes of a file, in its order, as :func:`ensure_world` writes them.

    Args:
        world: The world.
        name: A key of :data:`SIZES` or :data:`SIZES_BASE`.
    """
    marker = read_json(world_dir(world) / "world.json")
    count = marker["sizes"][name]
    return [scene for _, scene, _ in _scenes(world.seed, name, count)]


@dataclass(frozen=True)
class _Draft:
    """A record of a file while it is made; each caption, picture and question draws from `rng`."""

    root: Path
    name: str
    index: int
    scene: Scene
    rng: np.random.Generator

    @property
    def key(self) -> str:
        return f"{self.name}-{self.index:05d}"

    def long(self, wording: Wording) -> str:
        return long_caption(self.scene, self.rng, wording)

    def picture(self) -> str:
        """Draw it; its path."""
        path = f"images/{self.name}/{self.index:05d}.png"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        render(self.scene, self.rng).save(self.root / path, compress_level=1)
        return path


def _texts(draft: _Draft) -> Rows:
    captions = [draft.long("full") for _ in range(3)]
    yield f"captions_{draft.name}.jsonl", {"id": draft.key, "captions": captions}


def _pairs(draft: _Draft) -> Rows:
    shorts = 2 if draft.name == "short" else 1
    captions = {"short": [short_caption(draft.scene, draft.rng) for _ in range(shorts)]}
    if draft.name == "pairs_train":
        captions["long"] = [draft.long("pairs") for _ in range(LONG_CAPTIONS)]
    elif draft.name != "short":
        captions["long"] = [draft.long("full")]
        captions["long_seen"] = [draft.long("pairs")]
    file = "short_pairs.jsonl" if draft.name == "short" else f"{draft.name}.jsonl"
    yield file, {"id": draft.key, "captions": captions, "image": draft.picture()}


def _turn(asked: str, answer: str) -> list[Row]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def _conversations(draft: _Draft) -> Rows:
    image = draft.picture()
    told = _turn(f"<image>\n{ASK_CAPTION}", draft.long("pairs"))
    row = {"id": draft.key, "image": image, "conversations": told}
    yield "llava_pretrain.json", row
    if draft.index % DESCRIBED_EVERY == 0:
        yield "llava_instruct.json", row | {"id": f"{draft.key}-caption"}
    turns = [
        _turn(as_asked(question.question, draft.rng), question.answer)
        for question in questions(draft.scene, draft.rng)
    ]
    turns[0][0]["value"] = "<image>\n" + turns[0][0]["value"]
    yield "llava_instruct.json", row | {"conversations": list(itertools.chain(*turns))}


def _asked(key: str, image: str, question: Question) -> Row:
    row = {"id": key, "image": image, "image_id": "-".join(key.split("-")[:2])}
    return row | {"question": question.question, "answer": question.answer, "type": question.kind}


def _vqa(draft: _Draft) -> Rows:
    image = draft.picture()
    for question in questions(draft.scene, draft.rng):
        row = _asked(f"vqa-{draft.index:05d}-{question.kind}", image, question)
        yield "vqa_test.jsonl", row | {"text": draft.long("full")}


def _existence(draft: _Draft) -> Rows:
    image = draft.picture()
    kinds = itertools.product(("random", "popular", "adversarial"), (True, False))
    for number, (category, present) in enumerate(kinds, start=6 * draft.index):
        question = existence(draft.scene, draft.rng, category, present)
        row = _asked(f"exist-{draft.index:05d}-{number}", image, question)
        yield "exist_test.jsonl", row | {"category": question.category}


def _described(draft: _Draft) -> Rows:
    row: Row = {"id": f"caption-{draft.index:05d}", "image": draft.picture()}
    row["attributes"] = [[t.colour, t.shape, t.pattern] for t in draft.scene.things]
    row["synonyms"] = {other: value for value, other in SYNONYMS.items()}
    yield "caption_test.jsonl", row


_FILES: dict[str, tuple[str, Callable[[_Draft], Rows] | None]] = {
    "text": ("text", _texts),
    "text_val": ("val", _texts),
    "short": ("short", _pairs),
    "pairs_train": ("pairs_train", _pairs),
    "pairs_val": ("val", _pairs),
    "pairs_test": ("test", _pairs),
    "instruct": ("instruct", _conversations),
    "vqa_test": ("test", _vqa),
    "exist_test": ("test", _existence),
    "caption_test": ("test", _described),
    "dense_train": ("pairs_train", None),
    "dense_test": ("test", None),
}
"""Split of each file's scenes, and what makes a scene's rows (`dense` writes other formats)."""


def _write(root: Path, seed: int, sizes: Mapping[str, int]) -> None:
    files: dict[str, list[Row]] = defaultdict(list)
    with tqdm(total=sum(sizes.values()), desc="writing the world", unit="scene") as bar:
        for name, count in sizes.items():
            maker = _FILES[name][1]
            if maker is None:
                continue
            for index, scene, rng in _scenes(seed, name, count):
                for file, row in maker(_Draft(root, name, index, scene, rng)):
                    files[file].append(row)
                bar.update()
    for file, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows) if file.endswith(".json") else lines
        (root / file).write_text(text, encoding="utf-8")
    if "dense_train" in sizes:
        _write_dense(root, seed, sizes)


def _write_dense(root: Path, seed: int, sizes: Mapping[str, int]) -> None:
    """Pictures with classes, masks (VOC's layout) and boxes (COCO's)."""
    objects, labels = [f"{c} {s}" for c in COLOURS for s in SHAPES], []
    for part in ("train", "test"):
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for index, scene, rng in _scenes(seed, f"dense_{part}", sizes[f"dense_{part}"]):
            stem = f"{part}-{index:05d}"
            picture, masks = render_masks(scene, rng)
            classes = np.zeros(masks.shape[1:], np.uint8)
            for thing, mask in zip(scene.things, masks, strict=True):
                number = SHAPES.index(thing.shape) + 1
                classes[mask] = number
                y, x = np.nonzero(mask)
                sides = [int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
                box: Row = {"id": len(boxes) + 1, "image_id": index, "category_id": number}
                box |= {"bbox": [int(x.min()), int(y.min()), *sides]}
                boxes.append(box | {"area": int(mask.sum()), "iscrowd": 0})
            for folder, image in (
                ("JPEGImages", picture),
                ("SegmentationClass", Image.fromarray(classes)),
            ):
                (root / folder).mkdir(exist_ok=True)
                image.save(root / folder / f"{stem}.png")
            size = {"width": picture.width, "height": picture.height}
            images.append({"id": index, "file_name": f"{stem}.png"} | size)
            first = scene.things[0]
            row = {"image": f"JPEGImages/{stem}.png", "split": part}
            labels.append({"id": stem, "label": f"{first.colour} {first.shape}"} | row)
        listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(Path(i["file_name"]).stem for i in images))
        kinds = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
        document = {"images": images, "annotations": boxes, "categories": kinds}
        (root / f"instances_{part}.json").write_text(json.dumps(document))
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (root / "shapes.txt").write_text("\n".join(SHAPES))
    (root / "objects.txt").write_text("\n".join(objects))


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
        ValueError: The folder holds a world of another version or size, or something else.
    """
    root = world_dir(world)
    default = {"base": SIZES_BASE, "dense": SIZES_DENSE, "road": SIZES}[world.part]
    wanted: dict[str, Any] = {
        "version": WORLD_VERSION,
        "seed": world.seed,
        "sizes": {**default, **(sizes or {})},
    }
    marker = root / "world.json"
    if marker.exists():
        found = read_json(marker)
        if found != wanted:
            raise ValueError(
                f"{root}: holds another world (found {found}, expected {wanted}); "
                "delete the folder or choose another `dir`"
            )
        return root
    try:
        with written_whole(root) as part:
            part.mkdir()
            _write(part, world.seed, wanted["sizes"])
            (part / "world.json").write_text(json.dumps(wanted), encoding="utf-8")
    except OSError as error:
        if not marker.exists():  # else another process was faster; its world is the same
            raise ValueError(
                f"{root}: expected to write the world there ({error}); delete what lies there, or "
                "choose another `dir`"
            ) from None
    return root
