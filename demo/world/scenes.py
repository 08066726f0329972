"""The drawn world: procedural scenes, their captions and questions.

Pictures: `world_render`; files: `world_files`; text for the base language model: `world_text`.

It exists so that the whole road can be run, and its claims tested, on a machine without data, hub
or GPU. A scene holds two to four objects on a 2x2 grid; each has a colour, a shape and a pattern,
no two share a colour or a shape. The largest object is the salient one.

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
from dataclasses import dataclass
from typing import Literal

import numpy as np

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

SYNONYMS = dict(
    zip(
        (*COLOURS, *SHAPES, *PATTERNS),
        "crimson emerald azure golden violet amber box disc wedge plus hoop rhombus solid banded "
        "ribbed chequered".split(),
        strict=True,
    )
)
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
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    while True:
        count = int(rng.integers(2, 5))
        sizes = len(colours), len(SHAPES), 4
        c, s, cells = (rng.permutation(size)[:count].tolist() for size in sizes)
        p = rng.integers(len(PATTERNS), size=count).tolist()
        things = tuple(
            Thing(colours[c[i]], SHAPES[s[i]], PATTERNS[p[i]], cells[i]) for i in range(count)
        )
        scene = Scene(things, backgrounds[int(rng.integers(len(backgrounds)))])
        if split_of(scene) == split:
            return scene


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
    told = {t.cell: f"{t.pattern} {t.colour} {t.shape}" for t in scene.things}
    return " , ".join(f"{name} {told.get(i, 'none')}" for i, name in enumerate(CELLS)) + " ."


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
        wrong = [(p, s) for p in {p for p, _ in pairs} for s in shapes if (p, s) not in pairs]
        if asked := sorted(pairs if present else wrong):
            pattern, shape = asked[rng.integers(len(asked))]
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
