"""What GradCache costs: a stage-2 step in 2 and in 8 chunks against the whole batch in one graph.

The step is the trainer's: `LLM2CLIPModel` around a CLIP tower, cached text embeddings, contrastive
loss, backward pass, AdamW. By FLOPs alone n chunks cost `1 + (n - 1) / 3n` times the tower's step
(the last chunk's graph is kept): 1.17 for 2 and 1.29 for 8; smaller chunks suit the caches better.

    python benchmarks/gradcache.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from arms import finish, ratio, take_turns
from torch import Tensor
from transformers import CLIPVisionConfig

from llm2clip_vlm.losses.contrastive import contrastive_loss
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_vlm.training.encoder.encoder_trainer import split_batch
from llm2clip_vlm.training.grad_cache import Embeds, cached_loss

TEXT_DIM, CHUNKS = 256, (1, 2, 8)
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
GOALS = {"ratio": 1.10, "ratio_8": 1.25}


def make_step(model: Any, batch: dict[str, Tensor], chunks: int) -> Callable[[], None]:
    """One optimizer step of a copy of the model, which keeps its gradients."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    accelerator = Accelerator(cpu=True)
    parts = split_batch(batch, len(batch["pixel_values"]) // chunks)

    def embed(part: dict[str, Tensor]) -> Embeds:
        out = model(**part)
        return Embeds((out.image_embeds, out.text_embeds), (out.logit_scale,))

    def step() -> None:
        optimizer.zero_grad()
        loss = cached_loss(
            accelerator, model, parts, embed, lambda e: contrastive_loss(*e.rows, *e.shared)
        )
        accelerator.backward(loss)
        optimizer.step()

    step.gradients = lambda: {n: p.grad for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    return step


def main() -> None:
    """Print step times, their ratios and how far the gradients are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="batch 16, 3 repeats")
    args = parser.parse_args()
    size, repeats = (16, 3) if args.quick else (args.batch, args.repeats)
    torch.manual_seed(0)
    config = LLM2CLIPConfig(
        vision_config=CLIPVisionConfig(**VISION), text_embed_dim=TEXT_DIM, projection_dim=256
    )
    model = LLM2CLIPModel(config)
    batch = {
        "pixel_values": torch.randn(size, 3, VISION["image_size"], VISION["image_size"]),
        "text_features": torch.randn(size, TEXT_DIM),
    }
    arms = {str(chunks): make_step(model, batch, chunks) for chunks in CHUNKS}
    for step in arms.values():
        step()
    grads = {name: step.gradients() for name, step in arms.items()}  # type: ignore[attr-defined]
    want = torch.cat([grad.flatten() for grad in grads["1"].values() if grad is not None])
    error = max(
        (torch.cat([g.flatten() for g in got.values() if g is not None]) - want).norm().item()
        / want.norm().item()
        for got in grads.values()
    )
    seconds = take_turns(arms, repeats)
    for name, values in seconds.items():
        cpu, wall = (statistics.median(values[kind]) for kind in ("cpu", "wall"))
        print(f"{name} chunk(s): {cpu:.3f} s of CPU, {wall:.3f} s of wall a step")
    (two, two_spread), (eight, eight_spread) = (ratio(seconds, n, "1") for n in ("2", "8"))
    finish(
        "gradcache",
        ours=round(statistics.median(seconds["2"]["cpu"]), 4),
        baseline=round(statistics.median(seconds["1"]["cpu"]), 4),
        ratio=two,
        spread=two_spread,
        ratio_8=eight,
        spread_8=eight_spread,
        gradient_error=float(f"{error:.2e}"),
        equal=error < 1e-5,
        goals=GOALS,
        settings={
            "batch": size,
            "vision": VISION,
            "dtype": "float32",
            "repeats": repeats,
            "unit": "s of CPU a step, in 2 chunks and in one",
        },
    )


if __name__ == "__main__":
    main()
