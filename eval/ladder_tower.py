"""Makes the two towers that the ladder of validity needs beside the real ones.

Purpose: before an A/B is worth running, the rest of the VLM must be shown to be able to use what a
    tower tells it. `oracle`: pictures whose pixels spell the scene's attributes, and a tower that
    copies them (rung 2). `supervised`: the base tower trained on the attributes themselves, on
    stage 2's pictures (rung 3). Nothing else uses attribute labels.
Needs: the embedded world; for `supervised` the base CLIP.
Writes: `<output_dir>/vision_tower`, for `oracle` also `<output_dir>/data` (pictures, LLaVA JSON,
    test questions); `manifest.json`.
Launch: python eval/ladder_tower.py recipes/demo/ladder/supervised_tower.yaml [key=value ...]
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    set_seed,
)

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_eval import LadderTowerRecipe
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.world import COLOURS, PATTERNS, SHAPES, Scene
from llm2clip_vlm.data.world_files import ensure_world, file_scenes, world_dir
from llm2clip_vlm.handoff import claim_output_dir, fingerprint_dir, is_complete, write_manifest
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.recipe import load_recipe
from llm2clip_vlm.training.arguments import build_training_arguments, last_checkpoint
from llm2clip_vlm.training.callbacks import MetricsJsonl
from llm2clip_vlm.training.export import export_vision_tower
from llm2clip_vlm.training.strict_resume import StrictTrainer

ATTRIBUTES = {"colour": list(COLOURS), "shape": list(SHAPES), "pattern": list(PATTERNS)}
SLOTS = [(kind, value) for kind, values in ATTRIBUTES.items() for value in values]
CELL_PX, BLOCK_PX = 16, 4


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    started = time.monotonic()
    path, *overrides = sys.argv[1:] if argv is None else argv
    recipe = load_recipe(path, LadderTowerRecipe, overrides)
    out = Path(recipe.output_dir)
    if is_complete(out, recipe):
        print(f"ladder_tower: {out} is finished, nothing to do")
        return
    ensure_world(recipe.world)
    if recipe.kind == "oracle":
        claim_output_dir(recipe)
        make_oracle(recipe, out)
    else:
        train_supervised(recipe, out)
    write_manifest(
        out,
        stage=recipe.stage,
        recipe=recipe,
        parents={"vision_tower": recipe.vision_tower},
        fingerprints={"vision_tower": fingerprint_dir(out / "vision_tower")},
        seconds=time.monotonic() - started,
    )
    print(f"ladder_tower: wrote {out / 'vision_tower'}")


def spell(scene: Scene) -> Image.Image:
    """A picture with a lit block for each attribute of the object in each cell."""
    canvas = np.zeros((2 * CELL_PX, 2 * CELL_PX, 3), np.uint8)
    per_row = CELL_PX // BLOCK_PX
    for thing in scene.things:
        top, left = (part * CELL_PX for part in divmod(thing.cell, 2))
        for kind in ATTRIBUTES:
            channel, block = divmod(SLOTS.index((kind, getattr(thing, kind))), per_row * per_row)
            row, column = (part * BLOCK_PX for part in divmod(block, per_row))
            y, x = top + row, left + column
            canvas[y : y + BLOCK_PX, x : x + BLOCK_PX, channel] = 255
    return Image.fromarray(canvas)


def make_oracle(recipe: LadderTowerRecipe, out: Path) -> None:
    """Write the spelled pictures, the files that name them, and the tower that copies them."""
    data = out / "data"
    shutil.rmtree(data, ignore_errors=True)
    source = world_dir(recipe.world)
    for name in ("instruct", "vqa_test"):
        (data / "images" / name).mkdir(parents=True)
        for index, scene in enumerate(file_scenes(recipe.world, name)):
            spell(scene).save(data / "images" / name / f"{index:05d}.png", compress_level=1)
    for file in ("llava_pretrain.json", "llava_instruct.json", "vqa_test.jsonl"):
        shutil.copy(source / file, data / file)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=2 * CELL_PX,
        patch_size=CELL_PX,
    )
    model = CLIPVisionModel(config)
    parts = dict(model.named_parameters())
    patch = next(p for n, p in parts.items() if n.endswith("patch_embedding.weight"))
    position = next(p for n, p in parts.items() if n.endswith("position_embedding.weight"))
    cls = next(p for n, p in parts.items() if n.endswith("class_embedding"))
    with torch.no_grad():
        for parameter in (patch, position, cls):
            parameter.zero_()
        for name, parameter in parts.items():
            if ".out_proj." in name or ".fc2." in name:
                parameter.zero_()  # the block adds nothing: hidden state 1 is the embedding
        per_row = CELL_PX // BLOCK_PX
        for slot in range(len(SLOTS)):
            channel, block = divmod(slot, per_row * per_row)
            row, column = (part * BLOCK_PX for part in divmod(block, per_row))
            patch[slot, channel, row : row + BLOCK_PX, column : column + BLOCK_PX] = BLOCK_PX**-2.0
        for index in range(5):
            position[index, len(SLOTS) + index] = 1.0
    size = {"height": 2 * CELL_PX, "width": 2 * CELL_PX}
    processor = CLIPImageProcessor(
        size={"shortest_edge": 2 * CELL_PX},
        crop_size=size,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    export_vision_tower(model, processor, out / "vision_tower")


class AttributeReader(nn.Module):
    """A tower with a linear read-out of each attribute on the patch of each cell."""

    def __init__(self, tower: Any, feature_layer: int) -> None:
        """Args: a `CLIPVisionModel`, and the hidden state that is read."""
        super().__init__()
        self.vision_tower = tower
        self.feature_layer = feature_layer
        self.heads = nn.ModuleDict(
            {k: nn.Linear(tower.config.hidden_size, len(v)) for k, v in ATTRIBUTES.items()}
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum of cross-entropies; `labels` are `[batch, 4 cells, 3 attributes]`."""
        hidden = self.vision_tower(pixel_values=pixel_values, output_hidden_states=True)
        cells = hidden.hidden_states[self.feature_layer][:, 1:]
        losses = [
            nn.functional.cross_entropy(
                head(cells).flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORE_INDEX
            )
            for i, head in enumerate(self.heads.values())
        ]
        return {"loss": torch.stack(losses).sum()}


def train_supervised(recipe: LadderTowerRecipe, out: Path) -> None:
    """Train the base tower on the attributes of stage 2's pictures."""
    arguments = build_training_arguments(recipe, label_names=["labels"])
    set_seed(recipe.seed)
    tower = load_vision_tower(recipe.vision_tower)
    root = world_dir(recipe.world)
    rows = []
    for index, scene in enumerate(file_scenes(recipe.world, "pairs_train")):
        image = Image.open(root / f"images/pairs_train/{index:05d}.png").convert("RGB")
        labels = torch.full((4, len(ATTRIBUTES)), IGNORE_INDEX)
        for thing in scene.things:
            for column, (kind, values) in enumerate(ATTRIBUTES.items()):
                labels[thing.cell, column] = values.index(getattr(thing, kind))
        pixels = tower.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        rows.append({"pixel_values": pixels, "labels": labels})
    model = AttributeReader(tower.model, recipe.vision_feature_layer)
    trainer = StrictTrainer(
        model,
        arguments,
        train_dataset=rows,
        callbacks=[MetricsJsonl(out / "metrics.jsonl")],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
    export_vision_tower(model, tower.image_processor, out / "vision_tower")


if __name__ == "__main__":
    sys.exit(guard(main))
