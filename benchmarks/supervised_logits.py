"""Memory and time of a VLM's loss at a vocabulary of 128k: logits of trained tokens, in chunks.

The baseline is transformers' own loss: logits of all positions. Both arms run the same LLaVA (one
narrow decoder layer, so that the head is nearly all there is) forward and backward on the same row,
of which 35 % is trained, as in LLaVA-1.5's second stage.

    python benchmarks/supervised_logits.py [--quick]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from arms import finish, ratio, take_turns
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.models.vlm.vlm_loss import install_supervised_loss

VOCABULARY, WIDTH, TRAINED = 128_256, 256, 0.35
GOALS = {"ratio": 0.25, "time_ratio": 1.0}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make(arm: str) -> Any:
    """The model with that arm's loss; the same weights for both."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=7,
        vision_feature_layer=-1,
    )
    model: Any = LlavaForConditionalGeneration(config).train()
    if arm == "ours":
        install_supervised_loss(model)
    return model


def run(model: Any, tokens: int) -> float:
    """Loss forward and backward of one row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (1, tokens), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -int(tokens * TRAINED) :] = ids[:, -int(tokens * TRAINED) :]
    model.zero_grad(set_to_none=False)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def peak_mib(arm: str, tokens: int) -> float:
    """Memory that a step needs on top of weights and gradients, in a process of its own."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--memory-of", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print memory, time and how far loss and gradients are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="512 tokens, 3 repeats")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokens, repeats = (512, 3) if args.quick else (args.tokens, args.repeats)
    if args.memory_of:
        model = make(args.memory_of)
        run(model, 16)  # gradients are there, libraries are loaded
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(model, tokens)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return

    memory = {arm: peak_mib(arm, tokens) for arm in ("ours", "full")}
    models = {arm: make(arm) for arm in ("ours", "full")}
    losses = {arm: run(model, tokens) for arm, model in models.items()}
    pairs = zip(models["ours"].parameters(), models["full"].parameters(), strict=True)
    apart = max(float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None)
    seconds = take_turns(
        {arm: lambda model=model: run(model, tokens) for arm, model in models.items()}, repeats
    )
    times = {kind: ratio(seconds, "ours", "full", kind) for kind in ("cpu", "wall")}
    finish(
        "supervised_logits",
        ours=memory["ours"],
        baseline=memory["full"],
        ratio=round(memory["ours"] / memory["full"], 4),
        spread=times["cpu"][1],
        time_ratio=times["cpu"][0],
        wall_ratio=times["wall"][0],
        cpu_s={arm: round(statistics.median(seconds[arm]["cpu"]), 3) for arm in models},
        loss_difference=abs(losses["ours"] - losses["full"]),
        gradient_difference=apart,
        equal=abs(losses["ours"] - losses["full"]) < 1e-4 and apart < 1e-4,
        goals=GOALS,
        settings={
            "unit": "MiB above weights and gradients",
            "tokens": tokens,
            "trained": TRAINED,
            "vocabulary": VOCABULARY,
            "width": WIDTH,
            "repeats": repeats,
        },
    )


if __name__ == "__main__":
    main()
