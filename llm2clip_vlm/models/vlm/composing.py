"""Composition of a tower and a language model into one LLaVA that keeps the text logits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import constant_ratio, difference, fixed_ids, logits_of
from llm2clip_vlm.models.loading import boundary

logger = logging.getLogger(__name__)

VLM_CLASSES: dict[str, Any] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
}
"""Classes by the config's `model_type`."""

_FACTORS = {"logits_scaling", "logit_scale", "lm_head_multiplier", "dim_model_base"}
"""Keys of factors on the logits: 1 changes nothing; MiniCPM3's is the width over its key."""


def compose(
    model_type: str,
    settings: Mapping[str, Any],
    tower: Any,
    llm: Any,
    *,
    seed: int,
    path: str | Path,
) -> Any:
    """Puts a tower and a language model into a LLaVA with a new projector.

    Args:
        model_type: `llava` or `llava_next`.
        settings: Fields of its config, beside those of the parts.
        tower: The vision model.
        llm: The causal language model.
        seed: Seed of the projector.
        path: Where the language model came from, for messages.

    Returns:
        The model; it shares the weights of both.

    Raises:
        ModelError: LLaVA cannot run the language model, or would lose something of its logits.
    """
    remedy = "; take a decoder with `embed_tokens`, `inputs_embeds` and a key-value cache, such as "
    remedy += "Llama's or Qwen's"
    with boundary(f"{path}: LLaVA cannot run a {llm.config.model_type}", remedy):
        config_class = VLM_CLASSES[model_type].config_class
        config = config_class(vision_config=tower.config, text_config=llm.config, **settings)
        model = _assemble(config, tower, llm, seed)
        _keep_logits(model, llm, path)
    return model


def _assemble(config: Any, tower: Any, llm: Any, seed: int) -> Any:
    """Puts the loaded parts into a LLaVA without weights; only the projector is new."""
    with torch.device("meta"):
        model: Any = VLM_CLASSES[config.model_type](config)
    llava = model.model
    for name, part in (("vision_tower", tower), ("language_model", llm)):
        expected = type(getattr(llava, name))
        found = next((module for module in part.modules() if type(module) is expected), None)
        if found is None:
            raise ModelError(
                f"{name} is a {type(part).__name__} of model_type {part.config.model_type!r}, in "
                f"which there is no {expected.__name__} as LLaVA would build it"
            )
        setattr(llava, name, found)
    model.lm_head = llm.get_output_embeddings()
    projector = llava.multi_modal_projector.to_empty(device="cpu").to(llm.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if hasattr(llava, "image_newline"):  # as in LLaVA-NeXT
            width = projector.linear_2.out_features
            llava.image_newline = nn.Parameter((torch.randn(width) * width**-0.5).to(llm.dtype))
    model.tie_weights()
    return model


def _keep_logits(model: Any, llm: Any, path: str | Path) -> None:
    """Makes the VLM's text logits those of the LLM, or refuses it.

    LLaVA takes a decoder and its head; what an LLM does to its logits besides is lost. A constant
    factor (Granite, Cohere, MiniCPM3, Falcon-H1) goes into the head, which is no longer tied then,
    and out of the text config, by which other programs build the language model.
    """
    head, ids = model.lm_head, fixed_ids(model.config.get_text_config().vocab_size, 11)
    with torch.no_grad():  # visual tokens are no word's embedding; some decoders look words up
        model(inputs_embeds=model.get_input_embeddings()(ids) / 2, use_cache=False)
    got = logits_of(model, ids).double()
    # As large as they may become in training: a cap would hardly show in small ones.
    stretch = 2.0 ** (10 - torch.frexp(got.abs().max()).exponent.item())
    with head.register_forward_hook(lambda module, args, logits: logits * stretch):
        want = logits_of(llm, ids)
    if (factor := constant_ratio(want, got * stretch)) is None:
        said = llm.config.to_dict().items()
        named = [f"{key}: {value}" for key, value in said if "logit" in key and value]
        raise ModelError(
            f"{path}: a {llm.config.model_type} would lose what it does to its logits "
            f"({', '.join(named) or 'or to its inputs'}): of text alone, "
            f"{difference(want, got * stretch)}, and LLaVA has only the decoder and its lm_head. "
            "Take another language model"
        )
    if factor == 1:
        return
    model.lm_head = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(head.weight.detach() * factor)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    logger.info("%s: its logits' factor %g is in lm_head, untied from the embeddings", path, factor)
    if wrong := difference(want, logits_of(model, ids) * stretch):
        raise ModelError(f"{path}: with the factor {factor:g} in lm_head its logits: {wrong}")
    text = model.config.text_config
    for key in text.to_dict().keys() & _FACTORS:
        setattr(text, key, text.hidden_size if key == "dim_model_base" else 1.0)
    if difference(want, logits_of(_as_configured(llm, text, model.lm_head), ids) * stretch):
        logger.warning(
            "%s: text_config still names the factor %g of the logits: a program that builds the "
            "language model by it (vLLM, SGLang) applies it twice",
            path,
            factor,
        )


def _as_configured(llm: Any, config: Any, head: nn.Module) -> Any:
    """Build the language model as a config makes it, with the weights at hand."""
    with torch.device("meta"):
        model: Any = type(llm)(config)
    decoder, weights = model.get_decoder(), llm.get_decoder()
    decoder._modules, decoder._buffers = weights._modules, weights._buffers
    decoder._parameters = weights._parameters
    model.set_output_embeddings(head)
    return model.eval()
