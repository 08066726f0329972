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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Trainer

from llm2clip_vlm.cli import guard
from llm2clip_vlm.config_eval import LadderTowerRecipe
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.world import COLOURS, PATTERNS, SHAPES, Scene
from llm2clip_vlm.data.world_files import file_scenes, world_dir
from llm2clip_vlm.handoff import fingerprint_dir
from llm2clip_vlm.models.towers import load_vision_tower
from llm2clip_vlm.training.export import export_vision_tower
from llm2clip_vlm.training.stage_run import StageRun

ATTRIBUTES = {"colour": list(COLOURS), "shape": list(SHAPES), "pattern": list(PATTERNS)}
SLOTS = [(kind, value) for kind, values in ATTRIBUTES.items() for value in values]
CELL_PX, BLOCK_PX = 16, 4


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: RECIPE [key=value ...]."""
    run = StageRun(argv, LadderTowerRecipe, __doc__)
    if run.finished():
        return
    run.parent("vision_tower", run.recipe.vision_tower)
    run.arguments(label_names=["labels"])
    if run.recipe.kind == "oracle":
        run.claim_outputs()
        make_oracle(run.recipe, run.out)
    else:
        train_supervised(run)
    run.finish({"vision_tower": fingerprint_dir(run.out / "vision_tower")})


def block_of(slot: int) -> tuple[int, int, int]:
    """Channel, row and column (in pixels of the cell) that spell an attribute."""
    per_row = CELL_PX // BLOCK_PX
    channel, block = divmod(slot, per_row * per_row)
    return channel, block // per_row * BLOCK_PX, block % per_row * BLOCK_PX


def spell(scene: Scene) -> Image.Image:
    """A picture with a lit block for each attribute of the object in each cell."""
    canvas = np.zeros((2 * CELL_PX, 2 * CELL_PX, 3), np.uint8)
    for thing in scene.things:
        top, left = (part * CELL_PX for part in divmod(thing.cell, 2))
        for kind in ATTRIBUTES:
            channel, row, column = block_of(SLOTS.index((kind, getattr(thing, kind))))
            y, x = top + row, left + column
            canvas[y : y + BLOCK_PX, x : x + BLOCK_PX, channel] = 255
    return Image.fromarray(canvas)


def make_oracle(recipe: LadderTowerRecipe, out: Path) -> None:
    """Write the spelled pictures, the files that name them, and the tower that copies them."""
    data = out / "data"
    shutil.rmtree(data, ignore_errors=True)
    for name in ("instruct", "vqa_test"):
        (data / "images" / name).mkdir(parents=True)
        for index, scene in enumerate(file_scenes(recipe.world, name)):
            spell(scene).save(data / "images" / name / f"{index:05d}.png", compress_level=1)
    for file in ("llava_pretrain.json", "llava_instruct.json", "vqa_test.jsonl"):
        shutil.copy(world_dir(recipe.world) / file, data / file)
    sizes: dict[str, Any] = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    sizes |= dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    sizes |= {"image_size": 2 * CELL_PX, "patch_size": CELL_PX}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    parts = dict(model.named_parameters())
    patch, position = (
        next(p for n, p in parts.items() if n.endswith(f"{kind}_embedding.weight"))
        for kind in ("patch", "position")
    )
    with torch.no_grad():
        for name, parameter in parts.items():
            # The block adds nothing: hidden state 1 is the embedding.
            if "embeddings." in name or ".out_proj." in name or ".fc2." in name:
                parameter.zero_()
        for slot in range(len(SLOTS)):
            channel, row, column = block_of(slot)
            patch[slot, channel, row : row + BLOCK_PX, column : column + BLOCK_PX] = BLOCK_PX**-2.0
        for index in range(5):
            position[index, len(SLOTS) + index] = 1.0
    side = 2 * CELL_PX
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
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


def train_supervised(run: StageRun[LadderTowerRecipe]) -> None:
    """Train the base tower on the attributes of stage 2's pictures."""
    recipe = run.recipe
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
    trainer = Trainer(model, run.args, train_dataset=rows, callbacks=[run.metrics])
    trainer.train(resume_from_checkpoint=run.checkpoint)
    export_vision_tower(model, tower.image_processor, run.out / "vision_tower")


if __name__ == "__main__":
    sys.exit(guard(main))
