"""Prints README's table of what recipes need: GPUs, memory and hours, by `plan`.

`plan` reads configs alone, and so the models' shapes, written here as their authors published them,
stand in for the hub: nothing is downloaded. Each row takes a process of 20 to 60 s.

    python tools/hardware_table.py [NAME ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
WIDE = {"max_position_embeddings": 32768, "vocab_size": 151936, "tie_word_embeddings": True}


def sizes(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    """A decoder's shape."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def tower(kind: str, hidden: int, inner: int, layers: int, size: int, patch: int) -> dict[str, Any]:
    """The config of a CLIP or SigLIP; the text tower is CLIP L's or SigLIP's default."""
    vision: dict[str, Any] = {**sizes(hidden, inner, layers, 16 if hidden >= 1024 else 12, 0)}
    vision |= {"image_size": size, "patch_size": patch, "model_type": f"{kind}_vision_model"}
    del vision["num_key_value_heads"]
    return {"model_type": kind, "vision_config": vision, "text_config": {"num_hidden_layers": 12}}


CONFIGS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": {**LLAMA, **sizes(4096, 11008, 32, 32, 32), "vocab_size": 32000},
    "meta-llama/Llama-3.1-8B": {**LLAMA, **sizes(4096, 14336, 32, 32, 8), "vocab_size": 128256},
    "meta-llama/Llama-3.2-1B": {
        **LLAMA,
        **sizes(2048, 8192, 16, 32, 8),
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **LLAMA,
        **sizes(576, 1536, 30, 9, 3),
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {**QWEN, **sizes(896, 4864, 24, 14, 2), **WIDE},
    "Qwen/Qwen2.5-1.5B-Instruct": {**QWEN, **sizes(1536, 8960, 28, 12, 2), **WIDE},
    "openai/clip-vit-large-patch14-336": tower("clip", 1024, 4096, 24, 336, 14),
    "google/siglip-so400m-patch14-384": tower("siglip", 1152, 4304, 27, 384, 14),
    "google/siglip-base-patch16-224": tower("siglip", 768, 3072, 12, 224, 16),
}

PRETRAIN, INSTRUCT = "558128", "665298"  # LLaVA-1.5's two sets
ROWS = [
    ("paper_v6/stage1", 8, "h100-80gb", ()),
    ("paper_v6/stage2b", 8, "h100-80gb", ("--samples", "15000000")),
    ("llava15/stage3", 8, "a100-80gb", ("--samples", PRETRAIN)),
    ("llava15/stage4", 8, "a100-80gb", ("--samples", INSTRUCT)),
    ("llava15/stage3_7b_24gb", 1, "rtx4090-24gb", ("--samples", PRETRAIN)),
    ("llava15/stage4_7b_24gb", 1, "rtx4090-24gb", ("--samples", INSTRUCT)),
    ("llava15/stage3_qwen25_0_5b_24gb", 1, "rtx4090-24gb", ("--samples", PRETRAIN)),
    ("llava15/stage4_qwen25_0_5b_24gb", 1, "rtx4090-24gb", ("--samples", INSTRUCT)),
    ("llava15/stage3_qwen25_1_5b_24gb", 1, "rtx4090-24gb", ("--samples", PRETRAIN)),
    ("llava15/stage4_qwen25_1_5b_24gb", 1, "rtx4090-24gb", ("--samples", INSTRUCT)),
    ("webdataset_8gpu/stage1", 8, "h100-80gb", ("--samples", "3000000")),
    ("webdataset_8gpu/stage2a", 8, "h100-80gb", ("--samples", "100000000")),
    ("webdataset_8gpu/stage2b", 8, "h100-80gb", ("--samples", "100000000")),
    ("nano/stage4", 1, "h100-80gb", ("--samples", "1700000")),
]


def write_hub(folder: Path) -> None:
    """A hub cache that holds nothing but configs."""
    for name, config in CONFIGS.items():
        model = folder / f"models--{name.replace('/', '--')}"
        (model / "snapshots" / "published").mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("published")
        (model / "snapshots" / "published" / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Print a row for each recipe, or for those that are named."""
    chosen = sys.argv[1:]
    print("| recipe | GPUs | of memory | hours |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        write_hub(Path(name))
        environment = {**os.environ, "HF_HUB_CACHE": name, "HF_HUB_OFFLINE": "1"}
        for recipe, gpus, gpu, more in ROWS:
            if chosen and recipe not in chosen:
                continue
            words = [f"recipes/{recipe}.yaml", "--gpus", str(gpus), "--gpu", gpu, *more, "--json"]
            command = [sys.executable, "-m", "llm2clip_vlm.cli", "plan", *words]
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if not ended.stdout.startswith("{"):
                sys.exit(f"{recipe}: {ended.stderr[-2000:]}")
            found = json.loads(ended.stdout)
            kind, _, size = gpu.rpartition("-")
            change = "" if found["fits"] else f"; fits with {found['changes'][:1]}"
            print(
                f"| `{recipe}` | {gpus} x {kind.upper()} | {found['total'] / 1e9:.0f} of "
                f"{size[:-2]} GB{change} | {found['hours']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
