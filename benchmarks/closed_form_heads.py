"""Retrieval by heads in closed form: what a frozen tower and cached captions give without training.

The fairest baseline for the heads of stage 2b on little data: canonical correlation of the tower's
pooled features and the captions' embeddings, both with a ridge, each direction weighted by its
correlation; linear on both sides, no gradient step. Features are read as they are or by their
square roots. Strengths are chosen on training photographs that are held out for it, never on those
that are measured; then all training photographs are used.

    python benchmarks/closed_form_heads.py recipes/real/stage2b_frozen.yaml [KEY=VALUE ...]

Reads what the recipe of stage 2b names, features from its `feature_cache` where a run has left them
there. Prints one JSON line: R@1, 5 and 10 with their intervals, and the strengths.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.data.image_text.dataset import caption_galleries
from llm2clip_vlm.data.image_text.index import read_sources
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.metrics.retrieval import recall_at_k
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.encoder import Stage2bRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.training.encoder.frozen_tower import FOLDER, FrozenTower

RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Strengths that are tried on each side, in mean variances of a feature."""
HELD_OUT = 1000
"""Training photographs on which strengths are chosen."""


@dataclass
class Pairs:
    """Photographs and their captions."""

    images: Tensor
    """Features `[n, hidden]`, float32."""
    texts: Tensor
    """Embeddings `[m, dim]`, float32."""
    owner: Tensor
    """Row of `images` that each text belongs to."""

    def part(self, start: int, end: int | None = None) -> Pairs:
        """Photographs from `start` to `end`, with their captions."""
        rows = torch.arange(len(self.images))[start:end]
        kept = torch.isin(self.owner, rows)
        return Pairs(self.images[rows], self.texts[kept], self.owner[kept] - start)


Heads = tuple[Tensor, Tensor, Tensor, Tensor]
"""Means and projections: `[hidden]`, `[hidden, d]` of images, `[dim]`, `[dim, d]` of texts."""


class Moments:
    """Means and covariances of pairs, float64."""

    def __init__(self, pairs: Pairs) -> None:
        x, y = pairs.images[pairs.owner].double(), pairs.texts.double()
        self.means = x.mean(0), y.mean(0)
        x, y = x - self.means[0], y - self.means[1]
        self.of_images, self.of_texts, self.between = (
            a.T @ b / len(x) for a, b in ((x, x), (y, y), (x, y))
        )

    def heads(self, ridge: tuple[float, float], dim: int) -> Heads:
        """The `dim` directions of the largest correlations, each weighted by its own."""
        roots = []
        for covariance, strength in zip((self.of_images, self.of_texts), ridge, strict=True):
            more = strength * covariance.diagonal().mean() * torch.eye(len(covariance))
            values, vectors = torch.linalg.eigh(covariance + more)
            roots.append(vectors / values.sqrt() @ vectors.T)
        left, found, right = torch.linalg.svd(roots[0] @ self.between @ roots[1])
        images = roots[0] @ left[:, :dim] * found[:dim]
        texts = roots[1] @ right[:dim].T * found[:dim]
        return self.means[0].float(), images.float(), self.means[1].float(), texts.float()


def recalls(pairs: Pairs, heads: Heads, bootstrap: int = 0) -> dict[str, Any]:
    """R@1, 5 and 10 both ways; with `bootstrap` resamples, intervals."""
    images = F.normalize((pairs.images - heads[0]) @ heads[1], dim=-1)
    texts = F.normalize((pairs.texts - heads[2]) @ heads[3], dim=-1)
    of_image: list[list[int]] = [[] for _ in images]
    for text, image in enumerate(pairs.owner.tolist()):
        of_image[image].append(text)
    i2t = recall_at_k(images, texts, of_image, bootstrap=bootstrap)
    t2i = recall_at_k(texts, images, pairs.owner.tolist(), bootstrap=bootstrap)
    return {"i2t": i2t.recall, "t2i": t2i.recall} | (
        {"i2t_ci": i2t.ci, "t2i_ci": t2i.ci} if bootstrap else {}
    )


def main(argv: Sequence[str]) -> None:
    """Run the program."""
    recipe = load_recipe(argv[0], Stage2bRecipe, argv[1:])
    started = time.process_time()
    tower = load_vision_tower(
        recipe.vision_tower, torch.float32, image_size_px=recipe.image_size_px
    )
    folder = recipe.feature_cache or Path(recipe.output_dir) / FOLDER
    frozen = FrozenTower(tower.model, tower.image_processor, folder)
    lookup = EmbeddingCache.open(str(recipe.embedding_cache)).lookup
    sets = []
    for sources in (recipe.train, recipe.evaluation):
        records, bad = read_sources(sources, BadRecords(0)), BadRecords(recipe.max_bad_records)
        rows, features = frozen(records, bad)
        fields = caption_galleries([records[row] for row in rows]).values()
        texts = [text for found, _ in fields for text in found]
        owner = torch.tensor([image for _, images in fields for image in images])
        sets.append(Pairs(features, lookup(texts).float(), owner))
    train, held_out = sets
    best: tuple[float, str, tuple[float, ...]] = (-1.0, "", ())
    measured: dict[str, Any] = {}
    for form in ("plain", "square root"):
        if form != "plain":
            for pairs in sets:
                pairs.images = pairs.images.sign() * pairs.images.abs().sqrt()
        rest, whole, chosen_on = (
            Moments(train.part(HELD_OUT)),
            Moments(train),
            train.part(0, HELD_OUT),
        )
        for ridge in itertools.product(RIDGES, RIDGES):
            found = recalls(chosen_on, rest.heads(ridge, recipe.projection_dim))
            score = found["i2t"][1] + found["t2i"][1]
            if score > best[0]:
                best = (score, form, ridge)
                measured = recalls(held_out, whole.heads(ridge, recipe.projection_dim), 1000)
    line = {"name": "closed_form_heads", **measured, "features": best[1], "ridge": best[2]}
    line["settings"] = {
        "photographs": len(train.images),
        "captions": len(train.texts),
        "dim": recipe.projection_dim,
        "cpu_seconds": round(time.process_time() - started),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
