"""The ladder's oracle: pictures that spell attributes, and a tower that copies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2clip_vlm.config import WorldConfig
from llm2clip_vlm.config_eval import LadderTowerRecipe
from llm2clip_vlm.data.world import draw_scene
from llm2clip_vlm.data.world_files import ensure_world, file_scenes
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.programs import find_program, load_program

SIZES = dict.fromkeys(
    (
        "text",
        "text_val",
        "pairs_train",
        "pairs_val",
        "pairs_test",
        "instruct",
        "vqa_test",
        "exist_test",
        "caption_test",
    ),
    3,
)


@pytest.fixture(scope="module")
def ladder_tower():
    """The program as a module."""
    return load_program(find_program("ladder_tower"))


def test_the_oracle_tower_reads_what_the_picture_spells(ladder_tower, tmp_path):
    world = WorldConfig(seed=3, dir=str(tmp_path / "world"))
    ensure_world(world, sizes=SIZES)
    recipe = LadderTowerRecipe(
        kind="oracle", output_dir=str(tmp_path / "out"), world=world, vision_tower="base"
    )
    ladder_tower.make_oracle(recipe, tmp_path / "out")
    tower = load_vision_tower(tmp_path / "out" / "vision_tower")
    for index, scene in enumerate(file_scenes(world, "vqa_test")):
        image = ladder_tower.Image.open(tmp_path / f"out/data/images/vqa_test/{index:05d}.png")
        pixels = tower.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = tower.model(pixel_values=pixels, output_hidden_states=True).hidden_states[1]
        for cell in range(4):
            lit = {slot for slot, value in enumerate(hidden[0, 1 + cell, :16]) if value > 0.5}
            wanted = {
                ladder_tower.SLOTS.index((kind, getattr(thing, kind)))
                for thing in scene.things
                if thing.cell == cell
                for kind in ladder_tower.ATTRIBUTES
            }
            assert lit == wanted


def test_two_scenes_never_spell_the_same(ladder_tower):
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(200):
        scene = draw_scene(rng, "test")
        cells = tuple(sorted((t.cell, t.colour, t.shape, t.pattern) for t in scene.things))
        pixels = np.asarray(ladder_tower.spell(scene)).tobytes()
        assert seen.setdefault(pixels, cells) == cells
