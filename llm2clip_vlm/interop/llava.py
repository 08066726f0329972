"""LLaVA's own checkpoints (haotian-liu/LLaVA), whole or the projector alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llm2clip_vlm.files import read_json
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.keys import KeyReport, load_translated, row, translate
from llm2clip_vlm.models.loading import load_complete, read_tokenizer
from llm2clip_vlm.models.text.tokenizer_files import save_tokenizer
from llm2clip_vlm.models.vlm.building import build_vlm

LLAVA = (
    row("model.mm_projector.0.{p}", "model.multi_modal_projector.linear_1.{p}"),
    row("model.mm_projector.2.{p}", "model.multi_modal_projector.linear_2.{p}"),
    row("model.vision_tower.vision_tower.vision_model.{any}", "model.vision_tower.{any}"),
    row("lm_head.weight", "lm_head.weight"),
    row("model.{any}", "model.language_model.{any}"),
)
"""LLaVA's names to those that `LlavaForConditionalGeneration` has in memory."""

PROJECTOR = "mm_projector.bin"
_DECODERS = ("llama", "mistral")
"""Decoders that LLaVA has a class around, `llava_llama` and `llava_mistral`."""
_NOT_THE_DECODER = ("model.multi_modal_projector.", "model.vision_tower.")
_SELECT = {"patch": "default", "cls_patch": "full"}


def convert_llava(
    path: Path,
    weights: Mapping[str, Tensor],
    vision_tower: str | None,
    language_model: str | None,
    partial: bool,
) -> tuple[Any, Any, KeyReport]:
    """A LLaVA checkpoint, or its projector alone, as a `LlavaForConditionalGeneration`.

    Args:
        path: The checkpoint's folder, or the projector's file with its config.json beside.
        weights: Weights of the checkpoint.
        vision_tower: The tower, as `load_vision_tower` takes it. None: the checkpoint's
            `mm_vision_tower` where that is a folder inside of it.
        language_model: The LLM, where the file holds the projector alone.
        partial: See :func:`~llm2clip_vlm.interop.keys.load_translated`.

    Returns:
        Model, processor and key report.

    Raises:
        ModelError: The tower or the LLM is not given, or weights do not fit.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config = read_json(file, dict, ModelError) if file.is_file() else {}
    named = config.get("mm_vision_tower") or "not in a config.json"
    inside = (folder / named).resolve()
    if vision_tower is None and inside.is_dir() and inside.is_relative_to(folder.resolve()):
        vision_tower = str(inside)
    whole = "model.embed_tokens.weight" in weights
    if vision_tower is None or not (whole or language_model):
        lacking = "--vision-tower" if vision_tower is None else "--language-model"
        raise ModelError(
            f"{path}: give {lacking}: it is no part of this checkpoint (mm_vision_tower {named!r})"
        )
    if (aspect := str(config.get("image_aspect_ratio"))).startswith("anyres"):
        raise ModelError(
            f"{path}: image_aspect_ratio {aspect!r} in config.json; expected LLaVA-1.5, no anyres"
        )
    if config.get("mm_use_im_start_end"):
        raise ModelError(
            f"{path}: mm_use_im_start_end: expected false, got true; Hugging Face's "
            "LLaVA writes no tokens around a picture"
        )
    tokenizer = read_tokenizer(folder if whole else str(language_model))
    with tempfile.TemporaryDirectory() as place:
        model, processor = build_vlm(
            vision_tower,
            str(_decoder(folder, config, weights, place) if whole else language_model),
            vision_feature_layer=config.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=_SELECT[config.get("mm_vision_select_feature", "patch")],  # type: ignore[arg-type]
            image_aspect_ratio="pad" if config.get("image_aspect_ratio") == "pad" else "square",
            chat_template="vicuna_v1" if tokenizer.chat_template is None else None,
        )
    found, unexpected = translate(weights, LLAVA)
    state = model.state_dict()
    # The decoder has its weights, and rows for new tokens besides; the tower's may come with it.
    own = {name: t for name, t in state.items() if ".multi_modal_projector." not in name}
    own |= {name: t for name, t in found.items() if name.startswith(_NOT_THE_DECODER)}
    unexpected += [name for name in found if name not in state]
    left_out = r".*(rotary_emb\.inv_freq|\.position_ids)"
    report = load_translated(model, own, unexpected, left_out=left_out, where=path, partial=partial)
    report.matched = len(set(found) & set(state))
    return model, processor, report


def _decoder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], place: str
) -> str:
    """The language model alone, with its tokenizer, in a folder of its own."""
    named = str(config.get("model_type"))
    kind = "llama" if named == "llava" else named.removeprefix("llava_")
    if kind not in _DECODERS:
        raise ModelError(
            f"{folder}: model_type {named!r} in config.json; expected llava_llama or llava_mistral"
        )
    known = AutoConfig.for_model(kind)
    plain = {name: value for name, value in config.items() if hasattr(known, name)}
    if "rope_theta" in config:  # no attribute of its own since transformers 5
        plain["rope_theta"] = config["rope_theta"]
    text_config = AutoConfig.for_model(**plain | {"model_type": kind})
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    with torch.device("meta"):
        own = model_class(text_config).state_dict().keys()
    state = {name: tensor for name, tensor in weights.items() if name in own}
    dtype = weights["model.embed_tokens.weight"].dtype
    llm = load_complete(model_class, folder, config=text_config, state_dict=state, dtype=dtype)
    llm.save_pretrained(place)
    save_tokenizer(read_tokenizer(folder), place)
    return place


def llava_config(model: Any, processor: Any, tower: str) -> dict[str, Any]:
    """LLaVA's config.json for a VLM.

    Args:
        model: A `LlavaForConditionalGeneration` around a Llama or a Mistral.
        processor: Its processor.
        tower: Where LLaVA shall look for the vision tower.

    Raises:
        ModelError: LLaVA has no class for this decoder or this choice of features.
    """
    config = model.config
    text = config.text_config.to_dict()
    kind = text["model_type"]
    layer = config.vision_feature_layer
    if kind not in _DECODERS or not isinstance(layer, int):
        raise ModelError(
            f"LLaVA has no class for a {kind} decoder with vision_feature_layer "
            f"{layer}; expected one of {', '.join(_DECODERS)}, and one layer"
        )
    select = {ours: theirs for theirs, ours in _SELECT.items()}
    pads = getattr(processor.image_processor, "do_pad", False)
    # The transformers of LLaVA reads these two, not `rope_parameters`.
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    if (rope_type := rope.pop("rope_type")) != "default":
        text["rope_scaling"] = {"type": rope_type} | rope
    return text | {
        "model_type": f"llava_{kind}",
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": select[config.vision_feature_select_strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if pads else "square",
    }


def llava_weights(model: Any) -> dict[str, Tensor]:
    """A VLM's decoder and projector under LLaVA's names; the tower lies in a folder of its own.

    Args:
        model: A `LlavaForConditionalGeneration`.
    """
    state = model.state_dict().items()
    ours = {name: t.detach() for name, t in state if not name.startswith("model.vision_tower.")}
    if model.config.text_config.tie_word_embeddings:
        del ours["lm_head.weight"]  # it is the embeddings', as the config says
    found, unknown = translate(ours, LLAVA, back=True)
    assert not unknown, f"the table has no {unknown[0]}"
    return found
