"""The drawn world: what the experiment stands on must hold for every seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from world import files as world_files
from world.files import DESCRIBED_EVERY, WorldConfig, ensure_world, file_scenes, world_dir
from world.pictures import render
from world.questions import TextBatches
from world.recipe import TextPhase
from world.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    COUNTS,
    OBJECT_FORMS,
    OVERVIEW_FORMS,
    PAIR_FORMS,
    PATTERNS,
    SHAPES,
    SPLITS,
    SYNONYMS,
    UNSEEN_IN_PAIRS,
    Scene,
    Thing,
    draw_scene,
    existence,
    long_caption,
    questions,
    scene_list,
    short_caption,
    split_of,
    vocabulary,
)
from world.texts import (
    ASK_CAPTION,
    ASK_SHORT,
    KINDS,
    as_asked,
    build_tokenizer,
    document,
)

from llm2clip_vlm.constants import IGNORE_INDEX

SIZES = dict.fromkeys(world_files.SIZES, 6) | {"text": 12, "pairs_train": 8, "exist_test": 40}
SPECIALS = {
    "pad": "<pad>",
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "<|end|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
}
SCENE = Scene(
    (
        Thing("red", "ring", "striped", 3),
        Thing("blue", "square", "plain", 0),
        Thing("green", "cross", "checked", 1),
    ),
    "grey",
)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of seed 3."""
    folder = tmp_path_factory.mktemp("world")
    return ensure_world(WorldConfig(seed=3, dir=str(folder)), sizes=SIZES)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scenes(split: str, count: int = 100, seed: int = 0) -> Iterator[tuple[Scene, Any]]:
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        yield draw_scene(rng, split), rng


def read_back(text: str) -> tuple[set[tuple[str, str, str, str]], str, str]:
    """Objects (colour, shape, pattern, place), count and background that a long caption tells."""
    back = {other: value for value, other in SYNONYMS.items()}
    things = set()
    count = background = ""
    for sentence in text.split(" ."):
        said = [back.get(word, word) for word in re.findall(r"[a-z]+", sentence)]

        def only(names: Any, said: list[str] = said) -> str:
            return next((word for word in said if word in names), "")

        if only(SHAPES):
            things.add((only(COLOURS), only(SHAPES), only(PATTERNS), only(CELLS)))
        elif said:
            count, background = only(COUNTS.values()), only(BACKGROUNDS)
    return things, count, background


# --- splits -------------------------------------------------------------------------------------


def test_every_part_of_the_hash_belongs_to_one_split() -> None:
    owners = [[n for n, (low, high) in SPLITS.items() if low <= b < high] for b in range(100)]
    assert all(len(names) == 1 for names in owners)


def test_a_scene_has_one_split_whatever_the_order_of_its_objects() -> None:
    turned = Scene(SCENE.things[::-1], SCENE.background)
    assert SCENE.signature() == turned.signature()
    assert split_of(SCENE) == split_of(turned)


@pytest.mark.parametrize("change", ["colour", "shape", "pattern", "cell", "background"])
def test_the_signature_tells_every_attribute(change: str) -> None:
    first, *others = SCENE.things
    new = {"colour": "purple", "shape": "circle", "pattern": "barred", "cell": 2}
    if change == "background":
        changed = Scene(SCENE.things, "white")
    else:
        values = {k: getattr(first, k) for k in new} | {change: new[change]}
        changed = Scene((Thing(**values), *others), SCENE.background)
    assert changed.signature() != SCENE.signature()


def test_splits_share_no_scene_over_many_seeds() -> None:
    drawn = {
        split: {scene.signature() for seed in range(8) for scene, _ in scenes(split, 60, seed)}
        for split in SPLITS
    }
    for split, found in drawn.items():
        assert len(found) > 300, "the draw is not random"
        for other, theirs in drawn.items():
            assert other == split or not found & theirs


def test_files_of_different_splits_share_no_scene(road: Path) -> None:
    config = WorldConfig(seed=3, dir=str(road.parent))
    drawn = {
        name: {scene.signature() for scene in file_scenes(config, name)}
        for name in world_files.SIZES
    }
    for name, found in drawn.items():
        for other, theirs in drawn.items():
            if world_files._FILES[name][0] != world_files._FILES[other][0]:
                assert not found & theirs, f"{name} and {other}"


def test_a_scene_is_well_formed() -> None:
    for scene, _ in scenes("text", 200):
        things = scene.things
        assert 2 <= len(things) <= 4
        for name in ("colour", "shape", "cell"):
            assert len({getattr(t, name) for t in things}) == len(things)
        assert {t.pattern for t in things} <= set(PATTERNS)


# --- words --------------------------------------------------------------------------------------


def test_short_captions_never_mention_what_is_to_be_learned() -> None:
    hidden = {*PATTERNS, *CELLS, *BACKGROUNDS, *COUNTS.values(), *(SYNONYMS[p] for p in PATTERNS)}
    for scene, rng in scenes("short", 300):
        said = set(short_caption(scene, rng).split())
        assert not said & (hidden | UNSEEN_IN_PAIRS)
        salient, *others = scene.things
        assert said & {salient.colour, SYNONYMS[salient.colour]}
        assert said & {salient.shape, SYNONYMS[salient.shape]}
        assert not said & {word for t in others for word in (t.colour, t.shape)}


def test_wording_of_pairs_leaves_out_the_unseen_words_and_forms() -> None:
    assert all(f.startswith("there are") or " ground " in f for f in OVERVIEW_FORMS[PAIR_FORMS:])
    said: set[str] = set()
    for scene, rng in scenes("pairs_train", 300):
        text = long_caption(scene, rng, "pairs")
        said |= set(text.split())
        assert not re.search(r"there are|on a \w+ ground", text)
        assert " holds " not in text
        assert " : " not in text
    assert not said & UNSEEN_IN_PAIRS
    seen = set(SYNONYMS.values()) - UNSEEN_IN_PAIRS
    assert seen <= said, "the other synonyms do stand beside pictures"


def test_full_wording_uses_every_word_and_form() -> None:
    texts = [long_caption(scene, rng, "full") for scene, rng in scenes("text", 300)]
    said = set(" ".join(texts).split())
    assert said >= UNSEEN_IN_PAIRS
    assert any(" holds " in t for t in texts)
    assert any(" : " in t for t in texts)
    assert len(OBJECT_FORMS) > PAIR_FORMS
    assert set(SYNONYMS.values()) > UNSEEN_IN_PAIRS


@pytest.mark.parametrize("wording", ["pairs", "full"])
def test_a_long_caption_tells_the_whole_scene(wording: Any) -> None:
    for scene, rng in scenes("pairs_train", 100):
        things, count, background = read_back(long_caption(scene, rng, wording))
        assert things == {(t.colour, t.shape, t.pattern, CELLS[t.cell]) for t in scene.things}
        assert count == COUNTS[len(scene.things)]
        assert background == scene.background


def test_the_scene_list_names_each_cell_in_reading_order() -> None:
    assert scene_list(SCENE) == (
        "northwest plain blue square , northeast checked green cross , "
        "southwest none , southeast striped red ring ."
    )


def test_the_vocabulary_holds_every_word_that_is_said() -> None:
    known = set(vocabulary())
    for scene, rng in scenes("test", 100):
        texts = [long_caption(scene, rng, "full"), short_caption(scene, rng), scene_list(scene)]
        for question in questions(scene, rng):
            texts += [question.question, question.answer]
        assert set(" ".join(texts).split()) <= known


# --- questions ----------------------------------------------------------------------------------


def true_answer(scene: Scene, question: str) -> str:
    """The answer, worked out from the words of the question alone."""
    words = question.split()

    def named(names: Any) -> str:
        return next((w for w in words if w in names), "")

    shape, colour, place, pattern = (named(n) for n in (SHAPES, COLOURS, CELLS, PATTERNS))
    found = [
        t
        for t in scene.things
        if shape in ("", t.shape)
        and colour in ("", t.colour)
        and pattern in ("", t.pattern)
        and (not place or CELLS[t.cell] == place)
    ]
    if words[0] == "is":
        return "yes" if found else "no"
    if words[0] == "how":
        return COUNTS[len(scene.things)]
    (thing,) = found
    if words[0] == "where":
        return CELLS[thing.cell]
    wanted = {"color": "colour", "shape": "shape", "pattern": "pattern"}[words[1]]
    return str(getattr(thing, wanted))


def test_answers_are_right() -> None:
    kinds = set()
    for scene, rng in scenes("instruct", 300):
        asked = questions(scene, rng)
        kinds |= {q.kind for q in asked}
        assert len({q.kind for q in asked}) == len(asked) == 10
        for q in asked:
            assert q.answer == true_answer(scene, q.question), (scene, q)
    assert len(kinds) == 10


def test_order_of_questions_is_free() -> None:
    firsts = {questions(scene, rng)[0].kind for scene, rng in scenes("instruct", 100)}
    assert len(firsts) == 10


def test_existence_follows_what_is_asked() -> None:
    for scene, rng in scenes("test", 200):
        for category in ("random", "popular", "adversarial"):
            for present in (True, False):
                q = existence(scene, rng, category, present)
                assert q.answer == ("yes" if present else "no")
                assert q.answer == true_answer(scene, q.question)


def test_existence_is_balanced_when_nothing_is_asked() -> None:
    answers = [existence(scene, rng).answer for scene, rng in scenes("instruct", 600)]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_adversarial_negatives_join_a_pattern_and_a_shape_that_are_there() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = existence(SCENE, rng, "adversarial", present=False)
        pattern, shape = q.question.split()[3:5]
        assert pattern in {t.pattern for t in SCENE.things}
        assert shape in {t.shape for t in SCENE.things}


def test_popular_negatives_name_the_first_shapes() -> None:
    rng = np.random.default_rng(0)
    asked = {existence(SCENE, rng, "popular", present=False).question for _ in range(30)}
    assert asked == {"is there a circle ?", "is there a triangle ?"}


def test_an_adversarial_negative_that_cannot_be_is_a_random_one() -> None:
    same = Scene((Thing("red", "ring", "plain", 0), Thing("blue", "cross", "plain", 1)), "grey")
    q = existence(same, np.random.default_rng(0), "adversarial", present=False)
    assert (q.category, q.answer) == ("random", "no")


# --- pictures -----------------------------------------------------------------------------------


def test_a_picture_shows_its_objects_where_they_are() -> None:
    pixels = np.asarray(render(SCENE, np.random.default_rng(0)), float)
    assert pixels.shape == (32, 32, 3)
    empty = pixels[18:30, 2:14].reshape(-1, 3)
    assert np.abs(empty.mean(0) - BACKGROUNDS["grey"]).max() < 20
    blue = pixels[4:12, 4:12].mean((0, 1))
    assert blue[2] > blue[0] + 80, "the plain blue square lies in the first cell"


def test_patterns_differ_by_direction() -> None:
    def changes(pattern: str) -> tuple[float, float]:
        things = (Thing("yellow", "square", pattern, 0), Thing("red", "ring", "plain", 3))
        pixels = np.asarray(render(Scene(things, "black"), np.random.default_rng(0)), float)
        inner = pixels[4:12, 4:12, 0]
        return np.abs(np.diff(inner, axis=0)).mean(), np.abs(np.diff(inner, axis=1)).mean()

    down, across = changes("striped")
    assert down > 2 * across
    down, across = changes("barred")
    assert across > 2 * down
    assert min(changes("checked")) > 2 * max(changes("plain"))


def test_the_same_scene_is_never_drawn_twice_alike() -> None:
    rng = np.random.default_rng(0)
    assert render(SCENE, rng).tobytes() != render(SCENE, rng).tobytes()


# --- files --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes(road: Path, tmp_path: Path) -> None:
    again = ensure_world(WorldConfig(seed=3, dir=str(tmp_path)), sizes=SIZES)
    other = ensure_world(WorldConfig(seed=4, dir=str(tmp_path)), sizes=SIZES)
    first = contents(road)
    assert contents(again) == first
    assert contents(other).keys() == first.keys()
    assert contents(other)["captions_text.jsonl"] != first["captions_text.jsonl"]
    assert contents(other)["images/pairs_train/00000.png"] != first["images/pairs_train/00000.png"]


def test_all_files_are_there_and_consistent(road: Path) -> None:
    text, train, test = (
        rows(road / f"{name}.jsonl") for name in ("captions_text", "pairs_train", "pairs_test")
    )
    assert [len(text), len(train), len(test)] == [12, 8, 6]
    assert all(len(row["captions"]) == 3 for row in text)
    assert {len(row["captions"]["long"]) for row in train} == {world_files.LONG_CAPTIONS}
    assert {kind for row in test for kind in row["captions"]} == {"short", "long", "long_seen"}
    said = {
        w for row in train for texts in row["captions"].values() for w in " ".join(texts).split()
    }
    assert not said & UNSEEN_IN_PAIRS
    for row in train + test:
        assert Image.open(road / row["image"]).size == (32, 32)
    for name in ("llava_pretrain.json", "llava_instruct.json"):
        for record in json.loads((road / name).read_text()):
            asked = "".join(turn["value"] for turn in record["conversations"][::2])
            assert asked.count("<image>") == 1
            assert (road / record["image"]).is_file()


def test_stage_4_also_describes_pictures(road: Path) -> None:
    records = json.loads((road / "llava_instruct.json").read_text())
    told = [r for r in records if r["conversations"][0]["value"] == f"<image>\n{ASK_CAPTION}"]
    assert len(told) == -(-SIZES["instruct"] // DESCRIBED_EVERY)
    assert len({record["id"] for record in records}) == len(records)


def test_some_questions_ask_for_a_short_answer() -> None:
    rng = np.random.default_rng(0)
    asked = [as_asked("where is the ring ?", rng) for _ in range(2000)]
    assert set(asked) == {"where is the ring ?", f"where is the ring ? {ASK_SHORT}"}
    assert 0.12 < np.mean([text.endswith(ASK_SHORT) for text in asked]) < 0.18


def test_questions_on_disk_fit_the_scenes(road: Path) -> None:
    drawn = file_scenes(WorldConfig(seed=3, dir=str(road.parent)), "vqa_test")
    asked = rows(road / "vqa_test.jsonl")
    assert len(asked) == 10 * len(drawn)
    for row in asked:
        scene = drawn[int(row["image_id"].split("-")[1])]
        assert row["answer"] == true_answer(scene, row["question"])
        things, _, _ = read_back(row["text"])
        assert things == {(t.colour, t.shape, t.pattern, CELLS[t.cell]) for t in scene.things}


def test_the_existence_test_is_balanced(road: Path) -> None:
    asked = rows(road / "exist_test.jsonl")
    answers = [row["answer"] for row in asked]
    assert answers.count("yes") == answers.count("no") == 120
    assert len({row["id"] for row in asked}) == len(asked)
    for category in ("random", "popular", "adversarial"):
        assert sum(row["category"] == category for row in asked) > 50


def test_a_finished_folder_is_left_alone_and_another_size_refused(road: Path) -> None:
    config = WorldConfig(seed=3, dir=str(road.parent))
    before = (road / "world.json").stat().st_mtime_ns
    assert ensure_world(config, sizes=SIZES) == road
    assert (road / "world.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another world.*delete the folder"):
        ensure_world(config, sizes=SIZES | {"text": 13})


def test_what_another_process_wrote_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WorldConfig(seed=0, dir=str(tmp_path))
    target = world_dir(config)

    def write(root: Path, *_: Any) -> None:
        target.mkdir(parents=True)
        (target / "world.json").touch()

    monkeypatch.setattr(world_files, "_write", write)
    assert ensure_world(config) == target
    assert [p.name for p in tmp_path.iterdir()] == ["seed-0"]
    assert [p.name for p in target.iterdir()] == ["world.json"]


def test_what_is_no_world_is_not_taken_for_one(tmp_path: Path) -> None:
    config = WorldConfig(seed=0, dir=str(tmp_path))
    world_dir(config).mkdir(parents=True)
    (world_dir(config) / "thesis.tex").touch()
    with pytest.raises(ValueError, match="delete what lies there"):
        ensure_world(config, sizes=dict.fromkeys(world_files.SIZES, 1))
    assert [p.name for p in tmp_path.rglob("*")] == ["seed-0", "thesis.tex"]


def test_the_base_part_holds_short_captions_alone(tmp_path: Path) -> None:
    config = WorldConfig(seed=0, dir=str(tmp_path), part="base")
    folder = ensure_world(config, sizes={"short": 5})
    assert folder.name == "seed-0-base"
    found = rows(folder / "short_pairs.jsonl")
    assert len(found) == 5
    assert {tuple(row["captions"]) for row in found} == {("short",)}
    assert {len(row["captions"]["short"]) for row in found} == {2}


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_of_known_words_and_train_the_answers(kind: str) -> None:
    known = {*vocabulary(), *ASK_SHORT.split(), *SPECIALS.values()}
    known |= {"?", "pattern", "color", "shape", "where"}
    for index in range(20):
        segments = document(kind, np.random.default_rng([1, index]))
        assert set(" ".join(text for text, _ in segments).split()) <= known
        assert not segments[0][1], "what is given is not trained"
        assert any(trained for _, trained in segments)


def test_key_value_documents_are_right() -> None:
    for index in range(50):
        (facts, _), *rest = document("pairs", np.random.default_rng([2, index]))
        words = facts.split()[1:]
        table = dict(zip(words[::2], words[1::2], strict=True))
        for (ask, _), (answer, trained) in zip(rest[::2], rest[1::2], strict=True):
            assert trained
            assert table[ask.split()[1]] == answer


def test_an_unknown_kind_of_document_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of pairs"):
        document("poem", np.random.default_rng(0))


def test_text_scenes_are_never_drawn_as_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = draw_scene

    def spy(rng: np.random.Generator, split: str) -> Scene:
        asked.append(split)
        return original(rng, split)

    monkeypatch.setattr("world.texts.draw_scene", spy)
    for kind in KINDS:
        document(kind, np.random.default_rng(0))
    assert set(asked) == {"text"}


def test_text_batches_repeat_and_change_with_step_and_seed() -> None:
    tokenizer = build_tokenizer(SPECIALS, 256, more=ASK_SHORT)
    phases = [
        TextPhase(steps=2, documents=3, mixture={"pairs": 1.0}),
        TextPhase(steps=1, documents=2, mixture={"long": 1.0, "retell": 1.0}),
    ]
    batches = TextBatches(phases, tokenizer, seed=5)
    assert len(batches) == 3
    one, again, other = batches[0], batches[0], batches[1]
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert one["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        one["input_ids"], other["input_ids"]
    )
    fresh = TextBatches(phases, tokenizer, seed=6)[0]
    assert fresh["input_ids"].shape != one["input_ids"].shape or not torch.equal(
        fresh["input_ids"], one["input_ids"]
    )
    assert [len(batches[i]["input_ids"]) for i in range(3)] == [3, 3, 2]
    for batch in (one, batches[2]):
        trained = batch["labels"] != IGNORE_INDEX
        assert trained.any(1).all()
        assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
        assert not trained[batch["attention_mask"] == 0].any()
        assert (batch["input_ids"] != tokenizer.unk_token_id).all()


def test_the_tokenizer_puts_bos_and_eos_around_a_text() -> None:
    tokenizer = build_tokenizer(SPECIALS, 64)
    ids = tokenizer("A red ring")["input_ids"]  # it reads in lower case
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "red", "ring", "<|end|>"]
    assert tokenizer.model_max_length == 64
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIALS.values()] == [0, 1, 2, 3, 4, 5]
