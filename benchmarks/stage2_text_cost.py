"""What text costs in stage 2: cached against images alone, and LoRA in the loop against cached.

Three arms take the same optimizer steps on the same images:

- images alone: vision tower, image head, loss against fixed embeddings;
- cached (ours): captions drawn, looked up in a memory-mapped cache, text adaptor, loss;
- LoRA in the loop: the language model, with a LoRA on all linear layers, encodes the captions in
  every step (what the paper compares with).

The models are small, their FLOPs in the proportions of three real pairs at 92 tokens a caption.
Beside the measured ratio stands that of the FLOP model `(3V + A + 4PT) / (3V + A)`, and what is
left of it when the cache's own cost is paid off over the epochs: two captions an image, one drawn a
step, the cache built ahead or filled as captions are drawn (write-through).

    python benchmarks/stage2_text_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import finish, ratio, take_turns
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.losses.contrastive import contrastive_loss
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import pool
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.training.adapters import add_adapter

WIDTH = 384
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6}
VISION |= {"num_attention_heads": 3, "image_size": 192, "patch_size": 16}
PROPORTIONS = {  # real tower and LLM: LLM layers here, (3V in GFLOP an image, P in parameters)
    "L/14-336 + 8B": (8, 1146, 6.98e9),
    "So400m-224 + 8B": (13, 657, 6.98e9),
    "L/14-336 + 1B": (1, 1146, 0.973e9),
}
REAL_TOKENS, CAPTIONS = 92, 2
HEADLINE = "L/14-336 + 8B"
GOALS = {"ours": 1.05, "ratio": 3.0, "model_error": 0.10}


def linear_flops(module: nn.Module) -> int:
    """Two a multiply-add of all linear weights, for one token (LoRA's own left out)."""
    return sum(
        2 * p.numel()
        for name, p in module.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lora_" not in name
    )


def vision_flops() -> float:
    """One image, forward: linear layers, patch embedding and attention."""
    d, layers = VISION["hidden_size"], VISION["num_hidden_layers"]
    tokens = (VISION["image_size"] // VISION["patch_size"]) ** 2 + 1
    block = 2 * (4 * d * d + 2 * d * VISION["intermediate_size"]) + 4 * tokens * d
    return tokens * (layers * block + 2 * 3 * VISION["patch_size"] ** 2 * d)


def text_tokens(layers: int, three_v: float, parameters: float) -> int:
    """Tokens a caption that give the real proportion of text to image FLOPs."""
    wanted = 4 * parameters * REAL_TOKENS / (three_v * 1e9) * 3 * vision_flops()
    return max(8, round(wanted / (2 * linear_flops(language_model(layers, "meta")))))


def language_model(layers: int, device: str = "cpu") -> nn.Module:
    """A bidirectional Llama."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=6,
    )
    config.is_causal, config.use_cache = False, False
    with torch.device(device):
        return LlamaModel(config)


def make_arms(layers: int, tokens: int, batch: int, folder: Path) -> dict[str, Callable[[], None]]:
    """One optimizer step of each arm."""
    torch.manual_seed(0)
    config = LLM2CLIPConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_embed_dim=WIDTH,
        projection_dim=WIDTH // 2,
        adaptor_num_blocks=1,
    )
    pixels = torch.randn(batch, 3, VISION["image_size"], VISION["image_size"])
    fixed = nn.functional.normalize(torch.randn(batch, WIDTH // 2), dim=-1)
    captions = [f"caption {i}" for i in range(CAPTIONS * batch)]
    EmbeddingCache.build(
        folder, captions, lambda texts: torch.randn(len(texts), WIDTH), {"model": "random"}
    )
    cache = EmbeddingCache.open(folder)
    encoder: Any = add_adapter(language_model(layers), LoraSection(r=2, alpha=4, dropout=0.0))  # type: ignore[arg-type]
    ids = torch.randint(1, 1000, (batch, tokens))
    whole = torch.ones_like(ids)

    def arm(text: Callable[[], torch.Tensor] | None, more: nn.Module | None) -> Callable[[], None]:
        model: Any = LLM2CLIPModel(config).train()
        weights = [p for part in (model, more) if part for p in part.parameters()]
        optimizer = torch.optim.AdamW([p for p in weights if p.requires_grad], lr=0.0)

        def step() -> None:
            optimizer.zero_grad()
            image = model.get_image_features(pixels)
            embeds = fixed if text is None else model.get_text_features(text())
            contrastive_loss(image, embeds, model.logit_scale.exp()).backward()
            optimizer.step()

        return step

    def cached() -> torch.Tensor:
        return cache.lookup([captions[i] for i in torch.randint(len(captions), (batch,)).tolist()])

    def encoded() -> torch.Tensor:
        return pool(encoder(input_ids=ids).last_hidden_state, whole.bool(), "mean")

    return {
        "images": arm(None, None),
        "cached": arm(cached, None),
        "lora": arm(encoded, encoder),
    }


def amortised(text_share: float) -> dict[str, Any]:
    """Ratio of LoRA's cost to ours when the cache's own is added, after some epochs.

    Args:
        text_share: LoRA's text FLOPs (4PT) over those of a cached step (3V + A).
    """

    def after(epochs: int, encoded: float) -> float:
        return round(epochs * (1 + text_share) / (epochs + encoded * text_share / 2), 2)

    epochs = (1, 2, 4, 10, 20)
    filled = {e: CAPTIONS * (1 - (1 - 1 / CAPTIONS) ** e) for e in epochs}
    return {
        "built_ahead": {e: after(e, CAPTIONS) for e in epochs},
        "write_through": {e: after(e, filled[e]) for e in epochs},
        "break_even_epochs": {"built_ahead": CAPTIONS / 2, "write_through": 0},
    }


def main() -> None:
    """Print the three ratios of each proportion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--quick", action="store_true", help="batch 4, 3 repeats, the headline only"
    )
    args = parser.parse_args()
    batch, repeats = (4, 3) if args.quick else (args.batch, args.repeats)
    chosen = {HEADLINE: PROPORTIONS[HEADLINE]} if args.quick else PROPORTIONS
    adaptor = 3 * 2 * (4 * WIDTH * WIDTH + WIDTH * WIDTH // 2)
    table: dict[str, Any] = {}
    for name, (layers, three_v, parameters) in chosen.items():
        tokens = text_tokens(layers, three_v, parameters)
        with tempfile.TemporaryDirectory() as folder:
            arms = make_arms(layers, tokens, batch, Path(folder) / "cache")
            for step in arms.values():
                step()
            seconds = take_turns(arms, repeats)
        (ours, ours_spread), (lora, spread) = (
            ratio(seconds, *pair) for pair in (("cached", "images"), ("lora", "cached"))
        )
        # backward once more for linear layers (no gradient of the weights), twice for attention
        text = 2 * linear_flops(language_model(layers, "meta")) * tokens
        text += 3 * 4 * tokens**2 * WIDTH * layers
        share = text / (3 * vision_flops() + adaptor)
        table[name] = {
            "cached_over_images": ours,
            "cached_spread": ours_spread,
            "lora_over_cached": lora,
            "spread": spread,
            "flop_model": round(1 + share, 3),
            "model_error": round(lora / (1 + share) - 1, 3),
            "seconds": {arm: statistics.median(v["cpu"]) for arm, v in seconds.items()},
            "llm_layers": layers,
            "tokens": tokens,
            **amortised(share),
        }
        print(f"{name}: {table[name]}")
    head = table[HEADLINE]
    finish(
        "stage2_text_cost",
        ours=head["cached_over_images"],
        baseline=1.0,
        ratio=head["lora_over_cached"],
        spread=head["spread"],
        model_error=max(abs(row["model_error"]) for row in table.values()),
        equal=None,
        proportions=table,
        goals=GOALS,
        settings={
            "batch": batch,
            "vision": VISION,
            "llm_width": WIDTH,
            "real_tokens_a_caption": REAL_TOKENS,
            "captions_an_image": CAPTIONS,
            "lora": "r=2 on all linear layers, no checkpointing",
            "dtype": "float32",
            "repeats": repeats,
            "unit": "ratio of CPU seconds a step",
        },
    )


if __name__ == "__main__":
    main()
