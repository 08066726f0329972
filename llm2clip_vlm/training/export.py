"""Export of stage 2: the plain vision tower in a directory that others can read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LEGACY_PREFIX = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model."}
"""Name under which published checkpoints of a `model_type` keep the tower's weights.

transformers has read both forms since 5.8; older versions, and so unmodified LLaVA, read this one
only (and would leave the tower random with a warning otherwise)."""


def vision_tower_of(model: nn.Module) -> PreTrainedModel:
    """The plain tower inside a model.

    Args:
        model: `LLM2CLIPModel`, `CLIPModel`, a Llava, or a tower itself.

    Returns:
        The tower.

    Raises:
        ValueError: There is no tower.
    """
    inner: Any = model
    for path in ("vision_tower", "vision_model", "model.vision_tower"):
        try:
            found = inner.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, PreTrainedModel):
            return found
    if isinstance(model, PreTrainedModel) and hasattr(model.config, "patch_size"):
        return model
    raise ValueError(f"{type(model).__name__} has no vision tower to export")


def export_vision_tower(model: nn.Module, image_processor: Any, directory: str | Path) -> Path:
    """Write the vision tower with its own config and image processor.

    For CLIP the result is an ordinary `CLIPVisionModel` directory, weights named as in published
    checkpoints, which `CLIPVisionModel.from_pretrained` of any version and unmodified LLaVA read.

    Args:
        model: See :func:`vision_tower_of`; a LoRA adapter must be merged before.
        image_processor: The transformers image processor that the tower was trained with.
        directory: Where to write; made if absent.

    Returns:
        `directory` as a path.

    Raises:
        ValueError: No tower, or an adapter that is not merged.
    """
    from safetensors.torch import save_file

    tower = vision_tower_of(model)
    weights = {name: tensor.detach().cpu() for name, tensor in tower.state_dict().items()}
    if adapted := [name for name in weights if "lora_" in name]:
        raise ValueError(f"merge the LoRA adapter before the export (found {adapted[0]!r})")
    prefix = LEGACY_PREFIX.get(tower.config.model_type, "")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = tower.config.to_dict() | {"architectures": [type(tower).__name__]}
    config.pop("_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    image_processor.save_pretrained(str(target))
    logger.info("vision tower (%s) written: %s", tower.config.model_type, target.name)
    return target
