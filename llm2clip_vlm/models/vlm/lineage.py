"""What belongs to what in a VLM: fingerprints saved with it, and its processor."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm2clip_vlm.constants import IMAGE_TOKEN
from llm2clip_vlm.files import read_json, write_atomically
from llm2clip_vlm.models.loading import boundary
from llm2clip_vlm.models.trainable import part_name
from llm2clip_vlm.runs.manifest import HandoffError

LINEAGE_NAME = "lineage.json"
PROJECTOR = "multi_modal_projector"
_MOST_MORE = 64  # tokens of a picture beside its patches: CLS, registers


def require_processor(model: Any, processor: Any, where: str) -> None:
    """Refuse a processor or a setting by which pictures reach the LLM otherwise than in training.

    Args:
        model: A LLaVA; under ZeRO-3 its features are not counted.
        processor: What makes its inputs.
        where: Directory or hub id that both are from.

    Raises:
        HandoffError: `lineage.json` there has another template, feature layer or image mode.
        ModelError: The processor leaves another number of places for a picture than the model
            fills, has another `<image>`, or makes no input at all.
    """
    refuse_other(where, read_lineage(where) or {}, settings_of(model, processor))
    if is_deepspeed_zero3_enabled():
        return
    remedy = "; take processor and tokenizer from the checkpoint that the weights are from"
    with boundary(f"{where}: its processor makes no input of its model", remedy):
        more, patch = processor.num_additional_image_tokens, processor.patch_size
        if not (0 <= more <= _MOST_MORE and patch >= 1):  # else they would fill the memory
            raise ValueError(f"num_additional_image_tokens is {more}, patch_size {patch}")
        given = processor(text=IMAGE_TOKEN, images=Image.new("RGB", (64, 64)), return_tensors="pt")
        places = int((given["input_ids"] == model.config.image_token_id).sum())
        sizes = {"image_sizes": given["image_sizes"]} if "image_sizes" in given else {}
        pixels = given["pixel_values"].to(next(model.model.vision_tower.parameters()))
        with torch.no_grad():
            made = sum(map(len, model.model.get_image_features(pixels, **sizes).pooler_output))
        if places != made:
            raise ValueError(
                f"of one picture {places} tokens of id {model.config.image_token_id}, expected "
                f"{made}: patch_size, num_additional_image_tokens or image_token_index is wrong"
            )
        words = model.get_input_embeddings().weight.shape[0]
        if len(processor.tokenizer) > words:
            raise ValueError(
                f"{len(processor.tokenizer)} tokens in the tokenizer, {words} in the embeddings"
            )


def settings_of(model: Any, processor: Any) -> dict[str, str]:
    """Settings by which tower, projector and LLM meet.

    Args:
        model: A LLaVA.
        processor: Its processor.

    Returns:
        Hash of the template; feature layer and strategy; image mode (`pad`, `square` or `anyres`
        with its grids, size, mean and standard deviation).
    """
    images = processor.image_processor
    cropped = getattr(images, "do_center_crop", False) and getattr(images, "crop_size", None)
    size = cropped or images.size
    sides = [size[name] for name in ("height", "width", "shortest_edge") if size.get(name)]
    mode = "pad" if getattr(images, "do_pad", False) else "square"
    if grids := getattr(images, "image_grid_pinpoints", None):
        mode = f"anyres {[list(grid) for grid in grids]}"
    template = str(processor.chat_template or "").encode()
    return {
        "chat_template": hashlib.sha256(template).hexdigest(),
        "vision_feature_layer": str(model.config.vision_feature_layer),
        "vision_feature_select_strategy": str(model.config.vision_feature_select_strategy),
        "image_mode": f"{mode} {sides} {list(images.image_mean)} {list(images.image_std)}",
    }


def weights_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Fingerprint of each part's weights, the same in fp32 and bf16.

    Args:
        state: A LLaVA's weights by their names in memory, whole.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in sorted(state, key=part_name):
        parts[part_name(name).split(".")[0]].append(name)
    with ThreadPoolExecutor(8) as pool:
        return {
            part: hashlib.sha256(
                b"".join(pool.map(lambda name: _digest(name, state[name]), names))
            ).hexdigest()
            for part, names in parts.items()
        }


def _digest(name: str, tensor: Tensor) -> bytes:
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    raw = values.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{part_name(name)}{list(tensor.shape)}".encode() + raw.data).digest()


def write_lineage(
    directory: str | Path, model: Any, processor: Any, state: Mapping[str, Tensor]
) -> None:
    """Put `lineage.json` beside a checkpoint's weights.

    Args:
        directory: The checkpoint.
        model: A LLaVA.
        processor: Its processor.
        state: Its weights by their names in memory, adapters merged.
    """
    lineage = weights_of(state) | settings_of(model, processor)
    write_atomically(Path(directory) / LINEAGE_NAME, json.dumps(lineage, indent=2) + "\n")


def read_lineage(directory: str | Path) -> dict[str, str] | None:
    """Read what :func:`write_lineage` wrote. None: the checkpoint has no lineage."""
    path = Path(directory) / LINEAGE_NAME
    return read_json(path) if path.is_file() else None


def refuse_other(where: str | Path, recorded: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse a part that was trained beside other parts than those here.

    Args:
        where: Checkpoint with the recorded lineage, for the message.
        recorded: The recorded lineage.
        here: The fields to compare, as they are now.

    Raises:
        HandoffError: A field differs; the message names the first.
    """
    for field, value in here.items():
        if field in recorded and recorded[field] != value:
            raise HandoffError(
                f"{where}: {field}: it was made with {recorded[field]}, here is {value}. Use it "
                f"with what it was made with, or train it anew ({LINEAGE_NAME} lists the rest)"
            )
