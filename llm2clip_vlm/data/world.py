"""The embedded world: procedural scenes, their pictures, captions and questions.

It exists so that the whole road can be run, and its claims tested, on a machine without data, hub
or GPU. A scene holds two to four objects on a 2x2 grid; each has a colour, a shape and a pattern, no
two share a colour or a shape. The largest object is the salient one.

* A *short* caption names the salient object's colour and shape, as alt text does. Patterns, the
  other objects, positions, count and background are never mentioned: that is the headroom.
* A *long* caption tells everything, in free order, with synonyms. Captions beside pictures
  (`wording="pairs"`) use one half of the sentence forms and one word for some values; text-only
  captions and the test set use all of them (`wording="full"`).
* Questions have one-word answers in canonical words.

Splits are disjoint in scene attributes for every seed: the hash of a scene's attributes chooses
the one split that may hold it. Nothing downstream knows that this is not a real data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from llm2clip_vlm.config import WorldConfig

logger = logging.getLogger(__name__)

WORLD_VERSION = 1
"""Raised when the same seed no longer gives the same bytes; part of the finished-marker."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 215, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("square", "circle", "triangle", "cross", "ring", "diamond")
PATTERNS = ("plain", "striped", "barred", "checked")
CELLS = ("northwest", "northeast", "southwest", "southeast")
BACKGROUNDS = {"black": 25, "grey": 95, "silver": 165, "white": 235}
COUNTS = {2: "two", 3: "three", 4: "four"}

SYNONYMS = {
    "red": "crimson",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "purple": "violet",
    "orange": "amber",
    "square": "box",
    "circle": "disc",
    "triangle": "wedge",
    "cross": "plus",
    "ring": "hoop",
    "diamond": "rhombus",
    "plain": "solid",
    "striped": "banded",
    "barred": "ribbed",
    "checked": "chequered",
}
"""Second word of each value; :data:`UNSEEN_IN_PAIRS` never stand beside a training picture."""

UNSEEN_IN_PAIRS = frozenset(
    {"crimson", "azure", "violet", "box", "wedge", "hoop", "banded", "ribbed", "chequered"}
)

SHORT_FORMS = ("a {c} {s}", "photo of a {c} {s}", "the {c} {s}", "picture of a {c} {s}", "{c} {s}")
OVERVIEW_FORMS = (
    "{n} objects on a {b} background .",
    "a {b} scene with {n} objects .",
    "there are {n} things on {b} .",
    "on a {b} ground lie {n} shapes .",
)
OBJECT_FORMS = (
    "a {p} {c} {s} in the {l} .",
    "in the {l} a {p} {c} {s} .",
    "the {l} holds a {c} {s} , {p} .",
    "{l} : {p} and {c} , a {s} .",
)
PAIR_FORMS = 2
"""The first forms of each list are those that stand beside pictures."""

SPLITS = {
    "text": (0, 35),
    "short": (35, 50),
    "pairs_train": (50, 65),
    "instruct": (65, 80),
    "val": (80, 86),
    "test": (86, 100),
}
"""Per-cent range of the attribute hash that each split owns."""

Wording = Literal["pairs", "full"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    colour: str
    shape: str
    pattern: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """Objects (the salient one first) on a background."""

    things: tuple[Thing, ...]
    background: str

    def signature(self) -> str:
        """Attributes without order or rendering: what splits are disjoint in."""
        parts = sorted(f"{t.cell}{t.colour}{t.shape}{t.pattern}" for t in self.things)
        return f"{self.background}|" + "|".join(parts)


def split_of(scene: Scene) -> str:
    """The one split that may hold this scene."""
    digest = hashlib.sha256(scene.signature().encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random scene that belongs to `split` (rejection sampling on the attribute hash)."""
    while True:
        count = int(rng.integers(2, 5))
        colours = rng.permutation(list(COLOURS))[:count]
        shapes = rng.permutation(SHAPES)[:count]
        cells = rng.permutation(4)[:count]
        patterns = rng.choice(PATTERNS, count)
        things = tuple(
            Thing(str(c), str(s), str(p), int(cell))
            for c, s, p, cell in zip(colours, shapes, patterns, cells, strict=True)
        )
        scene = Scene(things, str(rng.choice(list(BACKGROUNDS))))
        if split_of(scene) == split:
            return scene


def twin_scene(scene: Scene, rng: np.random.Generator, split: str) -> Scene:
    """A scene of `split` that differs from `scene` in one attribute of one object."""
    while True:
        which = int(rng.integers(len(scene.things)))
        thing = scene.things[which]
        kind = str(rng.choice(["colour", "shape", "pattern", "cell"]))
        if kind == "pattern":
            values: list[str | int] = [p for p in PATTERNS if p != thing.pattern]
        else:
            every: dict[str, list[str | int]] = {
                "colour": [*COLOURS],
                "shape": [*SHAPES],
                "cell": [0, 1, 2, 3],
            }
            taken = {getattr(t, kind) for t in scene.things}
            values = [v for v in every[kind] if v not in taken]
        if not values:
            continue
        changed = replace(thing, **{kind: values[rng.integers(len(values))]})
        things = (*scene.things[:which], changed, *scene.things[which + 1 :])
        twin = Scene(things, scene.background)
        if split_of(twin) == split:
            return twin


# --- pictures -----------------------------------------------------------------------------------


def _mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels belong to a shape; `u`, `v` are offsets in radii."""
    radius = np.hypot(u, v)
    return {
        "square": np.maximum(abs(u), abs(v)) < 0.86,
        "circle": radius < 1.0,
        "triangle": (abs(u) < (v + 1.0) * 0.55) & (v < 0.85),
        "cross": (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 1.0),
        "ring": (radius < 1.05) & (radius > 0.55),
        "diamond": abs(u) + abs(v) < 1.1,
    }[shape]


def render(scene: Scene, rng: np.random.Generator, size_px: int = 32) -> Image.Image:
    """Draw a scene with jitter in place, size, colour and pixel noise.

    Returns:
        An RGB image of `size_px` x `size_px`.
    """
    grey = BACKGROUNDS[scene.background] + rng.normal(0, 5)
    canvas = np.full((size_px, size_px, 3), grey, np.float64)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float64)
    half = size_px // 2
    for rank, thing in enumerate(scene.things):
        row, column = divmod(thing.cell, 2)
        centre_x = column * half + half / 2 - 0.5 + rng.uniform(-1, 1)
        centre_y = row * half + half / 2 - 0.5 + rng.uniform(-1, 1)
        radius = (7.2 if rank == 0 else 5.8) + rng.uniform(-0.3, 0.3)
        dx, dy = x - centre_x, y - centre_y
        mask = _mask(thing.shape, dx / radius, dy / radius)
        stripe_y = np.floor((dy + 64) / 2).astype(int) % 2
        stripe_x = np.floor((dx + 64) / 2).astype(int) % 2
        dark = {
            "plain": np.zeros_like(stripe_x),
            "striped": stripe_y,
            "barred": stripe_x,
            "checked": stripe_x ^ stripe_y,
        }[thing.pattern]
        colour = np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3)
        paint = colour * np.where(dark, 0.5, 1.0)[..., None]
        canvas[mask] = paint[mask]
    canvas += rng.normal(0, 8, canvas.shape)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


# --- words --------------------------------------------------------------------------------------


def say(value: str, rng: np.random.Generator, wording: Wording) -> str:
    """One of the words for a value."""
    other = SYNONYMS.get(value)
    if other is None or (wording == "pairs" and other in UNSEEN_IN_PAIRS):
        return value
    return other if rng.random() < 0.5 else value


def short_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Alt text: colour and shape of the salient object, in words that stand beside pictures."""
    thing = scene.things[0]
    form = SHORT_FORMS[rng.integers(len(SHORT_FORMS))]
    return form.format(c=say(thing.colour, rng, "pairs"), s=say(thing.shape, rng, "pairs"))


def long_caption(scene: Scene, rng: np.random.Generator, wording: Wording) -> str:
    """Everything there is to see, in free order."""
    forms = PAIR_FORMS if wording == "pairs" else len(OBJECT_FORMS)
    sentences = [
        OBJECT_FORMS[rng.integers(forms)].format(
            c=say(t.colour, rng, wording),
            s=say(t.shape, rng, wording),
            p=say(t.pattern, rng, wording),
            l=CELLS[t.cell],
        )
        for t in (scene.things[i] for i in rng.permutation(len(scene.things)))
    ]
    overview = OVERVIEW_FORMS[rng.integers(forms)].format(
        n=COUNTS[len(scene.things)], b=scene.background
    )
    sentences.insert(0 if rng.random() < 0.5 else len(sentences), overview)
    return " ".join(sentences)


def scene_list(scene: Scene) -> str:
    """The scene as a bare list in reading order, a cell at a time (the LM's first text)."""
    by_cell = {t.cell: t for t in scene.things}
    cells = []
    for index, name in enumerate(CELLS):
        thing = by_cell.get(index)
        cells.append(
            f"{name} {thing.pattern} {thing.colour} {thing.shape}" if thing else f"{name} none"
        )
    return " , ".join(cells) + " ."


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer."""

    kind: str
    question: str
    answer: str
    category: str = ""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each kind about random objects of the scene, in random order."""

    def pick() -> Thing:
        return scene.things[rng.integers(len(scene.things))]

    a, b, c, d, e, f, g, h = (pick() for _ in range(8))
    found = [
        Question("colour_of_shape", f"what color is the {a.shape} ?", a.colour),
        Question("shape_of_colour", f"what shape is the {b.colour} one ?", b.shape),
        Question("pattern_of_shape", f"what pattern has the {c.shape} ?", c.pattern),
        Question("pattern_of_colour", f"what pattern has the {d.colour} one ?", d.pattern),
        Question("place_of_shape", f"where is the {e.shape} ?", CELLS[e.cell]),
        Question("shape_at_place", f"what shape is at the {CELLS[f.cell]} ?", f.shape),
        Question("colour_at_place", f"what color is at the {CELLS[g.cell]} ?", g.colour),
        Question("pattern_at_place", f"what pattern is at the {CELLS[h.cell]} ?", h.pattern),
        Question("count", "how many objects are there ?", COUNTS[len(scene.things)]),
        existence(scene, rng),
    ]
    return [found[i] for i in rng.permutation(len(found))]


def existence(
    scene: Scene, rng: np.random.Generator, category: str | None = None, present: bool | None = None
) -> Question:
    """A yes/no question about an object; half the answers are yes.

    Categories of negatives follow POPE: `random` (a shape that is not there), `popular` (a shape
    that is often salient, here the first half of the list) and `adversarial` (a pattern and a shape
    that are both there, on different objects).
    """
    category = category or str(rng.choice(["random", "popular", "adversarial"]))
    present = bool(rng.random() < 0.5) if present is None else present
    shapes = [t.shape for t in scene.things]
    if category == "adversarial":
        pairs = [(t.pattern, t.shape) for t in scene.things]
        wrong = [
            (p, s) for p in {p for p, _ in pairs} for s in shapes if (p, s) not in pairs
        ]
        if wrong or present:
            pattern, shape = sorted(pairs if present else wrong)[
                rng.integers(len(pairs if present else wrong))
            ]
            text = f"is there a {pattern} {shape} ?"
            return Question("exist", text, "yes" if present else "no", category)
        category = "random"
    absent = [s for s in SHAPES if s not in shapes]
    if category == "popular":
        absent = [s for s in absent if s in SHAPES[:3]] or absent
    shape = str(rng.choice(shapes if present else absent))
    return Question("exist", f"is there a {shape} ?", "yes" if present else "no", category)


def vocabulary() -> list[str]:
    """Every word that the world can say, sorted."""
    words: set[str] = set("none yes no describe the image picture a .".split())
    for forms in (SHORT_FORMS, OVERVIEW_FORMS, OBJECT_FORMS):
        for form in forms:
            words.update(w for w in form.split() if "{" not in w)
    words.update([*COLOURS, *SHAPES, *PATTERNS, *CELLS, *BACKGROUNDS, *COUNTS.values(), ","])
    words.update(SYNONYMS.values())
    rng = np.random.default_rng(0)
    for _ in range(200):
        for question in questions(draw_scene(rng, "text"), rng):
            words.update(question.question.split())
    return sorted(words)


# --- files --------------------------------------------------------------------------------------

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

TWINS = 8
"""Text-only scenes that stand together: the first, and others that differ from it in one attribute
of one object, as near-duplicates do in any large corpus."""

LONG_CAPTIONS = 4
"""Long captions of each training picture."""


def _scenes(seed: int, name: str, split: str, count: int) -> Iterator[tuple[int, Scene, Any]]:
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for index in range(count):
        rng = np.random.default_rng([seed, salt, index])
        yield index, draw_scene(rng, split), rng


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class _Writer:
    """Writes the files of one seed into a folder."""

    def __init__(self, root: Path, seed: int, sizes: Mapping[str, int]) -> None:
        self.root, self.seed, self.sizes = root, seed, sizes
        self.bar = tqdm(total=sum(sizes.values()), desc="writing the world", unit="scene")

    def scenes(self, name: str, split: str) -> Iterator[tuple[int, Scene, Any]]:
        for item in _scenes(self.seed, name, split, self.sizes[name]):
            yield item
            self.bar.update()

    def picture(self, name: str, index: int, scene: Scene, rng: np.random.Generator) -> str:
        path = f"images/{name}/{index:05d}.png"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        render(scene, rng).save(self.root / path, compress_level=1)
        return path

    def texts(self) -> None:
        for name, file in (("text", "captions_text"), ("text_val", "captions_text_val")):
            split = "text" if name == "text" else "val"
            rows = []
            first = None
            for index, drawn, rng in self.scenes(name, split):
                near = name == "text" and index % TWINS and first is not None
                scene = twin_scene(first, rng, split) if near and first else drawn
                first = scene if index % TWINS == 0 else first
                captions = [long_caption(scene, rng, "full") for _ in range(3)]
                rows.append({"id": f"{name}-{index:05d}", "captions": captions})
            _write_lines(self.root / f"{file}.jsonl", rows)

    def pairs(self, name: str, split: str, file: str) -> None:
        rows = []
        for index, scene, rng in self.scenes(name, split):
            test = name in ("pairs_val", "pairs_test")
            captions = {"short": [short_caption(scene, rng)]}
            if name == "short":
                captions["short"] += [short_caption(scene, rng)]
            elif test:
                captions["long"] = [long_caption(scene, rng, "full")]
                captions["long_seen"] = [long_caption(scene, rng, "pairs")]
            else:
                captions["long"] = [
                    long_caption(scene, rng, "pairs") for _ in range(LONG_CAPTIONS)
                ]
            row = {"id": f"{name}-{index:05d}", "captions": captions}
            row["image"] = self.picture(name, index, scene, rng)
            rows.append(row)
        _write_lines(self.root / f"{file}.jsonl", rows)

    def conversations(self) -> None:
        pretrain, instruct = [], []
        for index, scene, rng in self.scenes("instruct", "instruct"):
            image = self.picture("instruct", index, scene, rng)
            key = f"instruct-{index:05d}"
            caption = long_caption(scene, rng, "pairs")
            ask = "<image>\ndescribe the image ."
            turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": caption}]
            pretrain.append({"id": key, "image": image, "conversations": turns})
            turns = []
            for position, question in enumerate(questions(scene, rng)):
                text = ("<image>\n" if position == 0 else "") + question.question
                turns += [
                    {"from": "human", "value": text},
                    {"from": "gpt", "value": question.answer},
                ]
            instruct.append({"id": key, "image": image, "conversations": turns})
        (self.root / "llava_pretrain.json").write_text(json.dumps(pretrain), encoding="utf-8")
        (self.root / "llava_instruct.json").write_text(json.dumps(instruct), encoding="utf-8")

    def tests(self) -> None:
        rows: list[dict[str, Any]] = []
        for index, scene, rng in self.scenes("vqa_test", "test"):
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
        for index, scene, rng in self.scenes("exist_test", "test"):
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
        for index, scene, rng in self.scenes("caption_test", "test"):
            rows.append(
                {
                    "id": f"caption-{index:05d}",
                    "image": self.picture("caption_test", index, scene, rng),
                    "attributes": [[t.colour, t.shape, t.pattern] for t in scene.things],
                    "synonyms": back,
                }
            )
        _write_lines(self.root / "caption_test.jsonl", rows)


def world_dir(world: WorldConfig) -> Path:
    """Folder of a world: `<dir>/seed-<seed>`, with `-base` behind it for the base part."""
    return Path(world.dir) / f"seed-{world.seed}{'-base' if world.part == 'base' else ''}"


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
    default = SIZES_BASE if world.part == "base" else SIZES
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
        writer.pairs("short", "short", "short_pairs")
    else:
        writer.texts()
        writer.pairs("pairs_train", "pairs_train", "pairs_train")
        writer.pairs("pairs_val", "val", "pairs_val")
        writer.pairs("pairs_test", "test", "pairs_test")
        writer.conversations()
        writer.tests()
    writer.bar.close()
    (part / "world.json").write_text(json.dumps(wanted), encoding="utf-8")
    try:
        part.rename(root)
    except OSError:  # another process was faster; its world is the same
        shutil.rmtree(part)
    return root
