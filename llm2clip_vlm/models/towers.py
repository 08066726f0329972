"""Vision towers: one contract for whatever checkpoint the images go through.

Dispatch is on `config.model_type`, never on a path or a name.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel, register

logger = logging.getLogger(__name__)


class TowerError(ValueError):
    """A checkpoint that cannot be used as a vision tower; the message says which and why."""


@dataclass(frozen=True)
class VisionTower:
    """What every vision tower tells."""

    model: PreTrainedModel
    """The plain tower; gives `last_hidden_state`, `hidden_states` and, pooled, `pooler_output`."""
    image_processor: Any
    """The transformers image processor saved with it."""
    hidden_size: int
    """Width of the patch features."""
    num_patches: int
    """Patches of one image, without the CLS token."""
    patch_size_px: int
    """Side of a patch."""
    image_size_px: int
    """Side of an image."""
    num_hidden_layers: int
    """Transformer blocks; `hidden_states` has one more entry."""
    has_cls_token: bool
    """Whether position 0 of the patch features is a CLS token."""


def _clip(path: str, dtype: Any) -> PreTrainedModel:
    return _complete(CLIPVisionModel, path, dtype)


def _siglip(path: str, dtype: Any) -> PreTrainedModel:
    return _complete(SiglipVisionModel, path, dtype)


def _llm2clip(path: str, dtype: Any) -> PreTrainedModel:
    model: Any = _complete(LLM2CLIPModel, path, dtype)
    tower: PreTrainedModel = model.vision_tower
    return tower


def _plain(path: str, dtype: Any) -> PreTrainedModel:
    return _complete(AutoModel, path, dtype)


LOADERS: dict[str, Callable[[str, Any], PreTrainedModel]] = {
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "dinov2": _plain,
    "llm2clip": _llm2clip,
}
"""`config.model_type` to loader."""

HAS_CLS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}
"""Tower's own `model_type` to whether position 0 is a CLS token."""


def load_vision_tower(path_or_id: str | Path, dtype: Any = None) -> VisionTower:
    """Load the vision tower of a checkpoint with its image processor.

    Args:
        path_or_id: Directory or hub id of a `CLIPModel`, `CLIPVisionModel`, `SiglipModel`,
            `SiglipVisionModel`, `Dinov2Model` or `LLM2CLIPModel`.
        dtype: Weights' dtype (`torch.float32`, `"bfloat16"`); none keeps the checkpoint's.

    Returns:
        The tower in evaluation mode and what it tells of itself.

    Raises:
        TowerError: Unknown `model_type`, missing weights, no image processor, or a processor whose
            images do not have the tower's size.
    """
    path = str(path_or_id)
    register()
    model_type = _read_config(path).model_type
    if model_type not in LOADERS:
        near = difflib.get_close_matches(model_type, LOADERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TowerError(
            f"{path}: model_type {model_type!r} is not a known vision tower; known are "
            f"{sorted(LOADERS)}.{hint}"
        )
    model = LOADERS[model_type](path, "auto" if dtype is None else dtype).eval()
    config: Any = model.config
    tower = VisionTower(
        model=model,
        image_processor=_load_processor(path),
        hidden_size=config.hidden_size,
        num_patches=(config.image_size // config.patch_size) ** 2,
        patch_size_px=config.patch_size,
        image_size_px=config.image_size,
        num_hidden_layers=config.num_hidden_layers,
        has_cls_token=HAS_CLS_TOKEN[config.model_type],
    )
    got = processed_size_px(tower.image_processor)
    if got is not None and got != tower.image_size_px and config.model_type != "dinov2":
        raise TowerError(
            f"{path}: its image processor makes {got} px images, the tower expects "
            f"{tower.image_size_px} px. Correct `size`/`crop_size` in preprocessor_config.json."
        )
    return tower


def processed_size_px(image_processor: Any) -> int | None:
    """Side of the square images that a processor makes, or None where it cannot be told."""
    for name, applies in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size: Any = getattr(image_processor, name, None)
        if not getattr(image_processor, applies, False) or size is None:
            continue
        height, width = size.get("height"), size.get("width")
        if height is not None and height == width:
            return int(height)
    return None


def _read_config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise TowerError(
            f"{path}: no readable config.json, so it is no vision tower ({error}). Expected a "
            "model directory or a hub id."
        ) from error


def _load_processor(path: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TowerError(
            f"{path}: no image processor ({error}). Copy the preprocessor_config.json of the "
            "checkpoint that the tower comes from into it."
        ) from error


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Silence the list of unused weights: a CLIP checkpoint's text tower is not wanted here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _complete(model_class: Any, path: str, dtype: Any) -> PreTrainedModel:
    """`from_pretrained` that refuses missing weights (transformers only warns)."""
    try:
        with _no_load_report():
            loaded = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except OSError as error:
        raise TowerError(f"{path}: its weights cannot be read ({error})") from error
    except RuntimeError as error:
        raise TowerError(f"{path}: its weights do not fit its config ({error})") from error
    model, info = loaded
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))
        raise TowerError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are missing or of another "
            f"shape (first: {missing[:3]}); they would have stayed random. Is the checkpoint "
            "complete, and of this architecture?"
        )
    result: PreTrainedModel = model
    return result
