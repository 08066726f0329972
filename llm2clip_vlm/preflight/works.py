"""The model of a recipe and one pass through it, from config files alone.

Models are prepared on the meta device by the trainers' own code, and then given fake weights. What
a stage that has not run yet would leave is read off the recipe that writes it.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from einops import rearrange
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm2clip_vlm.data.cache.shards import read_header
from llm2clip_vlm.models import trainable
from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel, register
from llm2clip_vlm.models.loading import read_config
from llm2clip_vlm.models.text.caption_tokens import length_groups
from llm2clip_vlm.models.vision.patch_dropout import PatchDropout
from llm2clip_vlm.models.vision.timm_vision import read_timm_layout, timm_config
from llm2clip_vlm.models.vlm.vlm_gradients import install_text_only_guard
from llm2clip_vlm.models.vlm.vlm_loss import SMALL_VOCABULARY, install_supervised_loss
from llm2clip_vlm.preflight.footprint import Work
from llm2clip_vlm.preflight.lengths import Lengths
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.recipe.encoder import ClipBaselineRecipe, Stage2bRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.vlm import Stage3Recipe, VlmRecipe
from llm2clip_vlm.runs.inputs import missing_model, writer_of
from llm2clip_vlm.training.adapters import add_adapter, add_lora
from llm2clip_vlm.training.encoder.caption_embeddings import encoder_path
from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable

_PLAIN = "sdpa_without_mask"
"""Attention of packed and of unpadded rows: causal or not, without a mask that is computed."""


def build(recipe: Any, source: str | Path, lengths: Lengths, world: int, zero: int) -> Work:
    """The work of a recipe.

    Args:
        recipe: A stage's recipe.
        source: Its file.
        lengths: Lengths of its data.
        world: Processes.
        zero: Stage of ZeRO; 0 = plain data parallelism.

    Raises:
        ValueError: A model's config is not here, or names no model that can be built.
    """
    trainer = recipe.trainer
    share = max(1, recipe.global_batch_size // world)
    batch = trainer.get("per_device_train_batch_size", share if recipe.contrastive else 8)
    args = SimpleNamespace(bf16=trainer.get("bf16", False), fp16=trainer.get("fp16", False))
    args.deepspeed_plugin = zero or None
    transformers.AttentionInterface.register(_PLAIN, sdpa_attention_forward)
    transformers.AttentionMaskInterface.register(_PLAIN, lambda *_, **__: None)
    with torch.device("meta"):
        if isinstance(recipe, VlmRecipe):
            work = _vlm(recipe, source, lengths, batch, share)
        elif isinstance(recipe, Stage2bRecipe | ClipBaselineRecipe):
            work = _encoder(recipe, source, lengths, batch, share)
        else:
            work = _text(recipe, source, lengths, batch, share)
        if work.trains:
            trainable.set_precision(work.model, args)
        else:
            work.model.requires_grad_(False)
        if zero and (args.bf16 or args.fp16):
            work.model.to(torch.bfloat16)
        work.model.train(work.trains)
        saves = trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing")
        if work.trains and saves:
            saving = {"use_reentrant": False, "preserve_rng_state": False}
            work.model.gradient_checkpointing_enable(saving)
            if getattr(recipe, "lora", None):
                work.model.enable_input_require_grads()
        trainable.set_evaluation_mode(trainable.frozen_modules(work.model))
    return work


def origin(path: str, source: str | Path) -> str:
    """The checkpoint whose config describes a path, which may be a run's that is yet to come.

    Raises:
        ValueError: Its config.json is nowhere here.
    """
    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str) or (Path(path) / "config.json").is_file():
        return path
    if (writer := writer_of(path, source)) is None:
        if problem := missing_model(path):
            config = f"the config of {path} is enough for it: hf download {path} config.json"
            raise ValueError(config if "hf download" in problem else problem)
        return path
    recipe: Any = load_recipe(writer[1], RECIPES[writer[0]])
    text = getattr(recipe, "text_encoder", None)
    found: list[Any] = [encoder_path(text)] if text else []
    found += [getattr(recipe, key, None) for key in ("vision_tower", "clip", "language_model")]
    return origin(next(value for value in found if isinstance(value, str)), writer[1])


def vlm_section(recipe: VlmRecipe, source: str | Path) -> Any:
    """What a VLM is composed of, where its checkpoint is not there yet. None: it is."""
    if isinstance(recipe, Stage3Recipe):
        return recipe.vlm, source
    checkpoint: str = recipe.checkpoint  # type: ignore[attr-defined]
    there = (Path(checkpoint) / "config.json").is_file()
    if not there and (writer := writer_of(checkpoint, source)):
        return vlm_section(load_recipe(writer[1], RECIPES[writer[0]]), writer[1])  # type: ignore[arg-type]
    return None, origin(checkpoint, source)


def text_model(recipe: Any, source: str | Path) -> str:
    """The checkpoint whose tokenizer a recipe's texts go through."""
    if isinstance(recipe, VlmRecipe):
        vlm, near = vlm_section(recipe, source)
        return near if vlm is None else origin(vlm.language_model, near)
    loop = getattr(recipe, "text_in_loop", None)
    keys = "text_encoder write_through language_model tokenizer clip embedding_cache".split()
    given = [loop and loop.text_encoder, *(getattr(recipe, key, None) for key in keys)]
    chosen = next(value for value in given if isinstance(value, str | TextEncoderSection))
    return origin(encoder_path(chosen), source)


def _tower_config(path: str, source: str | Path, side: int | None) -> Any:
    register()
    found = origin(path, source)
    timm = read_timm_layout(found)
    whole: Any = timm_config(timm, found) if timm else read_config(found)
    config = getattr(whole, "vision_config", None) or whole
    if config.model_type == "siglip2_vision_model":  # at its own square grid it is a SigLIP
        known = transformers.SiglipVisionConfig.__annotations__
        values = {name: value for name, value in config.to_dict().items() if name in known}
        size = math.isqrt(config.num_patches) * config.patch_size
        config = transformers.SiglipVisionConfig(**{**values, "image_size": size})
    if side is not None:
        config.image_size = side
    return config


def _vlm_model(recipe: VlmRecipe, source: str | Path) -> tuple[Any, float]:
    """A LLaVA on the meta device, and the crops of a picture (of AnyRes LLaVA-NeXT's most)."""
    vlm, near = vlm_section(recipe, source)
    if vlm is None:
        register()  # only this package may know the tower of a checkpoint
        chosen: Any = read_config(near)
        tower, text = chosen.vision_config, chosen.text_config
        dtype, anyres = chosen.dtype, chosen.model_type == "llava_next"
    else:
        chosen, tower = vlm, _tower_config(vlm.vision_tower, near, vlm.image_size_px)
        text = read_config(origin(vlm.language_model, near))
        dtype = text.dtype if vlm.dtype == "auto" else getattr(torch, vlm.dtype)
        anyres = vlm.image_aspect_ratio == "anyres"
    features = ("vision_feature_layer", "vision_feature_select_strategy")
    values = {name: getattr(chosen, name) for name in features}
    config: Any = transformers.LlavaConfig(vision_config=tower, text_config=text, **values)
    config.text_config._attn_implementation = _PLAIN
    dtype = torch.float32 if dtype in (torch.float16, None) else dtype
    model: Any = transformers.LlavaForConditionalGeneration(config)
    return model.to(dtype), 5.0 if anyres else 1.0


def _vlm(recipe: VlmRecipe, source: str | Path, lengths: Lengths, batch: int, share: int) -> Work:
    model, crops = _vlm_model(recipe, source)
    prepare_trainable(model, recipe)
    install_text_only_guard(model)
    install_supervised_loss(model)
    llava, config = model.model, model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    blank = torch.zeros(1, 3, side, side, dtype=model.dtype)
    places = llava.vision_tower(blank).last_hidden_state.shape[1]
    if places == (side // patch) ** 2:  # no CLS token that `default` could drop
        config.vision_feature_select_strategy = "full"
    visual = places - (config.vision_feature_select_strategy == "default")
    seen = lengths.images * crops * visual
    if recipe.packing:
        most = recipe.packing_max_images and max(1, int(recipe.packing_max_images / crops))
        longest, picture = recipe.max_length_tokens, round(crops * visual)
        passes, mean = lengths.packed(share, picture, longest, longest * batch, most)
        rows, width = share / passes, mean
    else:
        mean = min(recipe.max_length_tokens, lengths.mean + seen)
        longest = lengths.quantile(batch / (batch + 1)) + seen
        rows, width = float(min(batch, share)), min(recipe.max_length_tokens, longest)
    count, trained = max(1, round(rows)), max(1, round(rows * lengths.mean * lengths.trained))
    images = max(1, round(rows * lengths.images * crops))
    images = min(images, recipe.packing_max_images or images)
    text = config.get_text_config()

    def run() -> Tensor:
        ids = torch.zeros(count, round(width), dtype=torch.long)
        mask = torch.zeros(*ids.shape, text.hidden_size, dtype=torch.bool)
        llava.get_placeholder_mask = lambda *_, **__: mask  # by ids, which are fake
        pixels = torch.zeros(images, 3, side, side)
        hidden = llava(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
        if text.vocab_size <= SMALL_VOCABULARY:
            return model.lm_head(hidden).float().logsumexp(-1).sum()
        targets = torch.zeros(min(trained, count * round(width)), dtype=torch.long)
        return model.lm_head(rearrange(hidden, "b t d -> (b t) d")[: len(targets)], targets)

    tower = llava.vision_tower
    return Work(model, run, rows, rows * mean, tower, text.vocab_size, passes=share / rows)


def _encoder(recipe: Any, source: str | Path, lengths: Lengths, batch: int, share: int) -> Work:
    own = isinstance(recipe, Stage2bRecipe)
    size = min(batch, getattr(recipe, "micro_batch_size", None) or batch)
    model: Any = (_llm2clip if own else _clip)(recipe, source)
    trainable.apply_trainable(model, recipe.rates())
    part = "vision_tower" if own else "vision_model"
    eyes = getattr(model, part)
    trainable.train_last_blocks(model, part, recipe.tower_last_blocks)
    side, width = eyes.config.image_size, eyes.config.hidden_size
    trains = any(p.requires_grad for p in eyes.parameters())
    kept = not trains and recipe.feature_cache is not False
    if kept := kept and recipe.augmentation.crop_scale_min == 1:  # before the first step
        eyes.forward = lambda *_, **__: SimpleNamespace(pooler_output=torch.zeros(size, width))
    texts = size * getattr(recipe, "captions_per_image", 1)
    texts *= 1 + len(getattr(recipe, "caption_prompts", ()))
    loop, filling = (getattr(recipe, key, None) for key in ("text_in_loop", "write_through"))
    section = loop.text_encoder if loop else filling
    llm: Any = section and _language_model(text_model(recipe, source), section, loop and loop.lora)
    longest = 1
    if loop:
        model.text_encoder, longest = llm, getattr(section, "max_length_tokens", 512)
    elif not own:
        longest = model.config.text_config.max_position_embeddings
    window = min(longest, lengths.quantile(size / (size + 1)))

    taught = getattr(recipe, "self_distillation", None)

    def run() -> Tensor:
        if taught:  # the teacher sees whole pictures
            with torch.no_grad():
                eyes.eval()(pixel_values=torch.zeros(size, 3, side, side))
            eyes.train()
        captions = {"input_ids": torch.zeros(texts, window, dtype=torch.long)}
        if loop:
            captions["attention_mask"] = torch.ones(texts, window, dtype=torch.long)
            read = model.text_encoder(**captions, use_cache=False).last_hidden_state
            captions = {"text_features": read.float().mean(1)}
        elif own:
            captions = {"text_features": torch.zeros(texts, model.config.text_embed_dim)}
        out = model(pixel_values=torch.zeros(size, 3, side, side), **captions)
        return out.image_embeds.float().sum() + out.text_embeds.float().sum()

    copied = [model] * (getattr(recipe, "weight_average", None) is not None)
    copied += [eyes] * (taught is not None and taught.teacher == "frozen")
    beside = 4 * sum(p.numel() for each in copied for p in each.parameters())
    beside += sum(p.nbytes for p in llm.parameters()) if filling else 0  # it only reads
    work = Work(model, run, size, texts * lengths.mean, None if kept else eyes)
    work.passes, work.cached, work.beside_bytes = share / size, size < batch, beside
    return work


def _llm2clip(recipe: Stage2bRecipe, source: str | Path) -> Any:
    header = read_header(Path(recipe.embedding_cache or ""))
    width = header.dim if header else read_config(text_model(recipe, source)).hidden_size
    tower = _tower_config(recipe.vision_tower, source, recipe.image_size_px)
    model = LLM2CLIPModel(LLM2CLIPConfig(vision_config=tower, **recipe.heads(width)))
    if recipe.tower_lora:
        add_lora(model.vision_tower, recipe.tower_lora, "tower_lora")
    if recipe.patch_dropout:
        PatchDropout(model.vision_tower, recipe.patch_dropout, num_prefix_tokens=1)
    return model


def _clip(recipe: ClipBaselineRecipe, source: str | Path) -> Any:
    if recipe.vision_tower is not None:
        tower = _tower_config(recipe.vision_tower, source, recipe.image_size_px)
        text = transformers.CLIPTextConfig(**(recipe.text_model or {}))
        both: Any = transformers.VisionTextDualEncoderConfig
        config = both.from_vision_text_configs(tower, text, projection_dim=recipe.projection_dim)
    elif isinstance(recipe.clip, str):
        config = read_config(origin(recipe.clip, source))
    else:
        config = transformers.CLIPConfig(**(recipe.clip or {}))
    dual = config.model_type == "vision-text-dual-encoder"
    return (transformers.VisionTextDualEncoderModel if dual else transformers.CLIPModel)(config)


def _language_model(path: str, section: Any, lora: Any = None, *, words: bool = False) -> Any:
    """An LLM with its adapter, as a text encoder or with its head for words."""
    config: Any = read_config(path)
    chosen = getattr(section, "dtype", "auto")
    dtype = config.dtype if chosen == "auto" else getattr(torch, chosen)
    config.is_causal = not getattr(section, "bidirectional", True)
    kind: Any = transformers.AutoModelForCausalLM if words else transformers.AutoModel
    model = kind.from_config(config, trust_remote_code=False).to(dtype or torch.float32)
    return add_adapter(model, lora) if lora else model


def _text(recipe: Any, source: str | Path, lengths: Lengths, batch: int, share: int) -> Work:
    section = getattr(recipe, "text_encoder", None)
    words = section is None  # stage 0 guesses them
    path, lora = text_model(recipe, source), getattr(recipe, "lora", None)
    model = _language_model(path, recipe if words else section, lora, words=words)
    longest = getattr(recipe if words else section, "max_length_tokens", 512)
    trains = hasattr(recipe, "lora")
    budget = getattr(recipe, "micro_batch_tokens" if trains else "batch_tokens", None)
    fields = [each.fields for each in getattr(recipe, "train", ()) if each.directed]
    pair = 2 + any(len(each) == 3 for each in fields)  # with a hard negative
    if words:
        shapes = [(batch, longest)]
    elif budget is not None:
        width = max(1, min(longest, math.ceil(lengths.mean)))
        shapes = [(max(1, budget // width), width)]
    else:  # sorted by length and padded in groups
        ends = ((row + 1) / (pair * batch + 1) for row in range(pair * batch))
        widths = [min(longest, lengths.quantile(end)) for end in ends]
        shapes = [(len(rows), widths[rows[0]]) for rows in length_groups(widths)]

    def run() -> Tensor:
        vectors = []
        for shape in shapes:
            ids = torch.zeros(*shape, dtype=torch.long)
            mask = None if words else torch.ones_like(ids)
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            if words:
                return out.logits.float().logsumexp(-1).sum()
            vectors.append((out.last_hidden_state.float() * torch.ones(*shape, 1)).sum(1))
        return torch.cat(vectors).sum()

    texts = sum(rows for rows, _ in shapes)
    samples = texts / pair if trains and not words else texts
    work = Work(model, run, samples, sum(rows * width for rows, width in shapes), trains=trains)
    work.vocabulary = model.config.vocab_size if words else -1
    work.passes, work.cached = share / samples, trains and budget is not None
    return work
