"""A tiny checkpoint of every kind of vision tower, from the same classes as the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers import library

SIZE_PX = 32
PATCH_PX = 8
WIDTH = 32
DEPTH = 3

PREFIX_TOKENS = {
    "clip": 1,
    "siglip": 0,
    "siglip2": 0,
    "eva02": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3": 5,
    "timm": 1,
    "timm_eva": 1,
    "timm_siglip": 0,
}
"""Kind to tokens before the patches (CLS and registers)."""

CNNS = {
    "timm_cnn": "test_efficientnet",
    "timm_convnext": "test_convnext",
    "timm_resnet": "test_resnet",
}
"""Kinds that are no ViTs, with timm's architectures: 32 px, 8 px a place, one hidden state."""

KINDS = pytest.mark.parametrize("kind", list(PREFIX_TOKENS))
"""Runs a test once for every kind."""


def build_tower(kind: str, directory: str | Path, seed: int = 0) -> Path:
    """Save a tiny tower (32 px, patch 8, width 32, 3 blocks, 2 heads) with its image processor.

    The calling test is skipped where `kind` needs timm and timm is not there.
    """
    import torch
    import transformers
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig, Eva02VisionModel

    torch.manual_seed(seed)
    folder = Path(directory)
    if kind.startswith("timm"):
        return _build_timm(kind, folder)
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "patch_size": PATCH_PX,
    }
    mlp = {"intermediate_size": 48}
    size = {"image_size": SIZE_PX}
    registers = {"num_register_tokens": 4}
    clip_name, dino = "CLIPVision", {"dinov2": "Dinov2", "dinov3": "DINOv3ViT"}
    square = {"height": SIZE_PX, "width": SIZE_PX}
    crop = {"size": {"shortest_edge": SIZE_PX}, "crop_size": square}
    if kind == "eva02":
        model: Any = Eva02VisionModel(Eva02VisionConfig(**shape, **mlp, **size, rope_grid=3))
        processor: Any = CLIPImageProcessorPil(**crop)
    elif kind == "siglip2":
        config = transformers.Siglip2VisionConfig(**shape, **mlp, num_patches=16)
        model = transformers.Siglip2VisionModel(config)
        processor = Siglip2ImageProcessorPil(patch_size=PATCH_PX, max_num_patches=16)
    else:
        name, extra, processor = {
            "clip": (clip_name, mlp, CLIPImageProcessorPil(**crop)),
            "siglip": ("SiglipVision", mlp, SiglipImageProcessorPil(size=square)),
            "dinov2": (dino["dinov2"], {}, BitImageProcessorPil(**crop)),
            "dinov2_with_registers": (
                "Dinov2WithRegisters",
                registers,
                BitImageProcessorPil(**crop),
            ),
            "dinov3": (dino["dinov3"], mlp | registers, BitImageProcessorPil(**crop)),
        }[kind]
        config = getattr(transformers, f"{name}Config")(**shape, **size, **extra)
        model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _build_timm(kind: str, folder: Path) -> Path:
    timm = library("timm")
    from safetensors.torch import save_file

    architecture = (
        CNNS.get(kind)
        or {
            "timm": "vit_base_patch16_224",
            "timm_eva": "eva02_base_patch14_224",
            "timm_siglip": "vit_base_patch16_siglip_224",
        }[kind]
    )
    arguments = {
        "img_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
    }
    if kind in CNNS:
        arguments = {"output_stride": PATCH_PX}
    model = timm.create_model(architecture, num_classes=0, **arguments)
    for buffer in model.buffers():  # BatchNorm's statistics: nobody's default
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, SIZE_PX, SIZE_PX],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
