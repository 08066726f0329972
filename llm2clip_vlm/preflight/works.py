"""The model of a recipe and one pass through it, from config files alone.

Models are prepared on the meta device by the trainers' own code, and then given fake weights. What
a stage that has not run yet would leave is read off the recipe that writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm2clip_vlm.models.llm2clip import LLM2CLIPConfig, LLM2CLIPModel, register
from llm2clip_vlm.models.loading import read_config
from llm2clip_vlm.models.trainable import (
    apply_trainable,
    frozen_modules,
    set_evaluation_mode,
    set_precision,
    train_last_blocks,
)
from llm2clip_vlm.models.vision.timm_vision import read_timm_layout, timm_config
from llm2clip_vlm.models.vlm.vlm_gradients import install_text_only_guard
from llm2clip_vlm.models.vlm.vlm_loss import install_supervised_loss
from llm2clip_vlm.preflight.lengths import Lengths
from llm2clip_vlm.recipe.encoder import ClipBaselineRecipe, Stage2bRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.text import Stage1Recipe
from llm2clip_vlm.recipe.vlm import Stage3Recipe, VlmRecipe
from llm2clip_vlm.runs.inputs import missing_model, writer_of
from llm2clip_vlm.training.encoder.caption_cache import encoder_path
from llm2clip_vlm.training.export import add_lora
from llm2clip_vlm.training.text.text_trainer import LENGTH_GROUPS, add_adapter
from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable

_PLAIN = "sdpa_without_mask"
"""Attention of packed and of unpadded rows: causal or not, without a mask that is computed."""


@dataclass
class Work:
    """One pass of a process."""

    model: Any
    """On the meta device until :meth:`fake`."""
    run: Callable[[], Tensor]
    """Forward, on fake tensors."""
    samples: float
    """Of the pass: pairs, images or conversations."""
    tokens: float
    """Text and visual tokens of the pass."""
    tower: Any = None
    vocabulary: int = -1
    passes: float = 1
    """For each process in an optimizer step."""
    cached: bool = False
    """GradCache: each pass goes forward once more, without a graph."""
    beside_bytes: int = 0
    """Weights beside the model: a teacher's, averages."""
    trains: bool = True

    def fake(self) -> None:
        """Give the model fake weights. Call it in fake mode."""
        made: dict[int, Any] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, old in table.items():
                    if old is not None and id(old) not in made:
                        empty = torch.empty(old.shape, dtype=old.dtype)
                        own = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(empty, old.requires_grad) if own else empty
                    table[name] = made.get(id(old))


def build(recipe: Any, source: str | Path, lengths: Lengths, world: int, zero: int) -> Work:
    """The work of a recipe.

    Args:
        recipe: Of a stage.
        source: Its file.
        lengths: Of its data.
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
    AttentionInterface.register(_PLAIN, sdpa_attention_forward)
    AttentionMaskInterface.register(_PLAIN, lambda *_, **__: None)
    with torch.device("meta"):
        if isinstance(recipe, VlmRecipe):
            work = _vlm(recipe, source, lengths, batch)
        elif isinstance(recipe, Stage2bRecipe | ClipBaselineRecipe):
            work = _encoder(recipe, source, lengths, batch)
        else:
            work = _text(recipe, source, lengths, batch)
        work.passes *= max(1.0, recipe.global_batch_size / world / batch)
        set_precision(work.model, args)
        if zero and (args.bf16 or args.fp16):
            work.model.to(torch.bfloat16)
        work.model.train(work.trains)
        if trainer.get("gradient_checkpointing") and work.trains:
            saving = {"use_reentrant": False, "preserve_rng_state": False}
            work.model.gradient_checkpointing_enable(saving)
            if getattr(recipe, "lora", None):
                work.model.enable_input_require_grads()
        set_evaluation_mode(frozen_modules(work.model))
    return work


def origin(path: str, source: str | Path) -> str:
    """The checkpoint whose config describes a path: itself, or what the run that writes it starts from.

    Raises:
        ValueError: Its config.json is nowhere here.
    """
    if (Path(path) / "config.json").is_file() or isinstance(
        try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None, str
    ):
        return path
    if (writer := writer_of(path, source)) is None:
        if problem := missing_model(path):
            raise ValueError(f"{problem} config.json" if "hf download" in problem else problem)
        return path
    recipe: Any = load_recipe(writer[1], RECIPES[writer[0]])
    text = getattr(recipe, "text_encoder", None)
    found = [encoder_path(text)] if text else []
    found += [getattr(recipe, key, None) for key in ("vision_tower", "clip", "language_model")]
    return origin(next(value for value in found if isinstance(value, str)), writer[1])


def vlm_section(recipe: VlmRecipe, source: str | Path) -> Any:
    """What a VLM is composed of, where its checkpoint is not there yet; none where it is."""
    if isinstance(recipe, Stage3Recipe):
        return recipe.vlm, source
    checkpoint: str = recipe.checkpoint  # type: ignore[attr-defined]
    if not (Path(checkpoint) / "config.json").is_file() and (
        writer := writer_of(checkpoint, source)
    ):
        return vlm_section(load_recipe(writer[1], RECIPES[writer[0]]), writer[1])  # type: ignore[arg-type]
    return None, origin(checkpoint, source)


def text_model(recipe: Any, source: str | Path) -> str:
    """The checkpoint whose tokenizer a recipe's texts go through."""
    if isinstance(recipe, VlmRecipe):
        vlm, near = vlm_section(recipe, source)
        return near if vlm is None else origin(vlm.language_model, near)
    section = getattr(recipe, "text_encoder", None)
    path = encoder_path(section) if section else getattr(recipe, "language_model", None)
    return origin(path or recipe.tokenizer, source)


def _tower_config(path: str, source: str | Path, side: int | None) -> Any:
    register()
    found = origin(path, source)
    timm = read_timm_layout(found)
    whole: Any = timm_config(timm, found) if timm else read_config(found)
    config = getattr(whole, "vision_config", None) or whole
    if config.model_type == "siglip2_vision_model":  # at its own square grid it is a SigLIP
        known = SiglipVisionConfig.__annotations__
        values = {name: value for name, value in config.to_dict().items() if name in known}
        size = math.isqrt(config.num_patches) * config.patch_size
        config = SiglipVisionConfig(**{**values, "image_size": size})
    if side is not None:
        config.image_size = side
    return config


def _vlm(recipe: VlmRecipe, source: str | Path, lengths: Lengths, batch: int) -> Work:
    vlm, near = vlm_section(recipe, source)
    crops = 1.0
    if vlm is None:
        config = read_config(near)
        dtype = config.dtype or torch.float32
        if config.model_type == "llava_next":
            crops, grids = 5.0, {}
    else:
        text = read_config(origin(vlm.language_model, near))
        tower = _tower_config(vlm.vision_tower, near, vlm.image_size_px)
        dtype = text.dtype if vlm.dtype == "auto" else getattr(torch, vlm.dtype)
        crops = 5.0 if vlm.image_aspect_ratio == "anyres" else 1.0  # LLaVA-NeXT's most
        config = LlavaConfig(vision_config=tower, text_config=text)
        config.vision_feature_layer = vlm.vision_feature_layer
        config.vision_feature_select_strategy = vlm.vision_feature_select_strategy
    config.text_config._attn_implementation = _PLAIN
    dtype = torch.float32 if dtype in (torch.float16, None) else dtype
    model: Any = LlavaForConditionalGeneration(config).to(dtype)
    prepare_trainable(model, recipe)
    install_text_only_guard(model)
    install_supervised_loss(model)
    llava, side = model.model, config.vision_config.image_size
    with torch.no_grad():
        seen = llava.vision_tower(torch.zeros(1, 3, side, side, dtype=dtype))
    total = seen.last_hidden_state.shape[1]
    has_cls = total != (side // config.vision_config.patch_size) ** 2
    if not has_cls:
        config.vision_feature_select_strategy = "full"
    visual = total - (has_cls and config.vision_feature_select_strategy == "default")
    pictures = lengths.images * crops
    mean = min(recipe.max_length_tokens, lengths.mean + pictures * visual)
    padded = mean
    if not recipe.packing and lengths.texts:
        longest = lengths.quantile(batch / (batch + 1)) + pictures * visual
        padded = min(recipe.max_length_tokens, longest)
    rows = recipe.max_length_tokens * batch / mean if recipe.packing else batch
    rows = min(rows, recipe.global_batch_size)
    trained = round(rows * (mean - pictures * visual) * lengths.trained)
    words, width = config.get_text_config().vocab_size, config.get_text_config().hidden_size
    images = max(1, round(rows * pictures))
    if recipe.packing and recipe.packing_max_images:
        images = min(images, recipe.packing_max_images)

    def run() -> Tensor:
        ids = torch.zeros(max(1, round(rows)), max(1, round(padded)), dtype=torch.long)
        pixels = torch.zeros(images, 3, side, side)
        mask = torch.zeros(*ids.shape, width, dtype=torch.bool)
        llava.get_placeholder_mask = lambda *_, **__: mask
        hidden = model.model(
            input_ids=ids, pixel_values=pixels, use_cache=False, position_ids=None
        ).last_hidden_state
        if words <= 1024:  # as `install_supervised_loss`
            return model.lm_head(hidden).float().logsumexp(-1).sum()
        flat = hidden.reshape(-1, width)[: max(1, trained)]
        targets = torch.zeros(len(flat), dtype=torch.long)
        loss: Tensor = model.lm_head(flat, targets)
        return loss

    work = Work(model, run, rows, rows * mean, llava.vision_tower, words)
    work.passes = batch / rows
    return work


def _encoder(recipe: Any, source: str | Path, lengths: Lengths, batch: int) -> Work:
    frozen = getattr(recipe, "tower_training", "full") == "frozen"
    size = min(batch, getattr(recipe, "micro_batch_size", None) or batch)
    if isinstance(recipe, Stage2bRecipe):
        tower = _tower_config(recipe.vision_tower, source, recipe.image_size_px)
        loop = recipe.text_in_loop
        text = (loop and loop.text_encoder) or recipe.write_through or recipe.embedding_cache
        llm = read_config(origin(encoder_path(text), source))  # type: ignore[arg-type]
        dim = llm.hidden_size
        bias = recipe.logit_bias_init if recipe.loss == "sigmoid" else None
        config = LLM2CLIPConfig(
            vision_config=tower,
            text_embed_dim=dim,
            projection_dim=recipe.projection_dim,
            adaptor_num_blocks=recipe.text_adaptor.num_blocks,
            adaptor_expansion=recipe.text_adaptor.expansion,
            logit_bias_init_value=bias,
        )
        model: Any = LLM2CLIPModel(config)
        if recipe.tower_lora:
            add_lora(model.vision_tower, recipe.tower_lora, "tower_lora")
        part, eyes = "vision_tower", model.vision_tower
        trained = ["visual_projection", "text_adaptor", "logit_scale"]
        trained += ["logit_bias"] if bias is not None else []
        apply_trainable(model, trained if frozen else [*trained, part])
        texts = size * recipe.captions_per_image * (1 + len(recipe.caption_prompts))
    else:
        if recipe.vision_tower is not None:
            tower = _tower_config(recipe.vision_tower, source, recipe.image_size_px)
            config = VisionTextDualEncoderConfig(
                vision_config=tower.to_dict(),
                text_config=CLIPTextConfig(**(recipe.text_model or {})).to_dict(),
                projection_dim=recipe.projection_dim,
            )
            model = VisionTextDualEncoderModel(config)
        else:
            given = recipe.clip
            config = read_config(origin(given, source)) if isinstance(given, str) else None
            config = config or CLIPConfig(**given)
            model = (VisionTextDualEncoderModel if "dual" in config.model_type else CLIPModel)(
                config
            )
        part, eyes = "vision_model", model.vision_model
        lrs = {name for name, lr in recipe.learning_rates.items() if lr}
        heads = {"visual_projection", "text_projection", "logit_scale"}
        apply_trainable(model, lrs - {"projections"} | (heads if "projections" in lrs else set()))
        frozen, texts, dim = part not in lrs, size, 0
    train_last_blocks(model, part, recipe.tower_last_blocks)
    side, width = tower_side(eyes), eyes.config.hidden_size
    window = (
        0
        if dim
        else min(
            lengths.quantile(size / (size + 1)), model.config.text_config.max_position_embeddings
        )
    )
    kept = frozen and recipe.feature_cache is not False and recipe.augmentation.crop_scale_min == 1
    if kept:  # its features are there before the first step
        eyes.forward = lambda *_, **__: SimpleNamespace(pooler_output=torch.zeros(size, width))

    def run() -> Tensor:
        pixels = torch.zeros(size, 3, side, side)
        captions = {"input_ids": torch.zeros(texts, window, dtype=torch.long)}
        if dim:
            captions = {"text_features": torch.zeros(texts, dim)}
        out = model(pixel_values=pixels, **captions)
        return out.image_embeds.float().sum() + out.text_embeds.float().sum()

    work = Work(model, run, size, texts * lengths.mean, None if kept else eyes, passes=batch / size)
    work.cached = size < batch
    keeps = getattr(recipe, "self_distillation", None)
    weights = sum(p.numel() for p in eyes.parameters())
    work.beside_bytes = (
        4 * weights * ((keeps is not None) + bool(getattr(recipe, "weight_average", 0)))
    )
    return work


def tower_side(tower: Any) -> int:
    """Pixels along a side of a tower's images."""
    return int(tower.config.image_size)


def _text(recipe: Any, source: str | Path, lengths: Lengths, batch: int) -> Work:
    section = getattr(recipe, "text_encoder", None)
    path = encoder_path(section) if section else recipe.language_model
    config: Any = read_config(origin(path, source))
    chosen = getattr(section, "dtype", None) or getattr(recipe, "dtype", "auto")
    dtype = config.dtype if chosen == "auto" else getattr(torch, chosen)
    bidirectional = getattr(section, "bidirectional", True)
    config.is_causal = not bidirectional
    heads = section is None  # stage 0 guesses words
    model: Any = (AutoModelForCausalLM if heads else AutoModel).from_config(config).to(dtype)
    longest = recipe.max_length_tokens if heads else getattr(section, "max_length_tokens", 512)
    trains = heads or isinstance(recipe, Stage1Recipe)
    vocabulary = config.vocab_size if heads else -1
    if lora := getattr(recipe, "lora", None):
        model = add_adapter(model, lora)
    # captions are sorted by length and padded in groups; rows of stage 0 are full
    if heads:
        shapes = [(batch, longest)]
    elif trains and recipe.micro_batch_tokens is None:
        number = max(1, min(LENGTH_GROUPS, 2 * batch // 16))
        ends = [1 - 1 / (2 * batch + 1), *(1 - n / number for n in range(1, number))]
        shapes = [(-(-2 * batch // number), min(longest, lengths.quantile(end))) for end in ends]
    else:
        budget = recipe.micro_batch_tokens if trains else recipe.batch_tokens
        width = max(1, min(longest, math.ceil(lengths.mean)))
        shapes = [(max(1, budget // width), width)]
    padded = not heads

    def run() -> Tensor:
        total: Any = 0.0
        hidden = []
        for rows, width in shapes:
            ids = torch.zeros(rows, width, dtype=torch.long)
            mask = torch.ones_like(ids) if padded else None
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            if heads:
                return out.logits.float().logsumexp(-1).sum()
            weights = torch.ones(rows, width, 1)
            hidden.append((out.last_hidden_state.float() * weights).sum(1))
        total = sum(part.sum() for part in hidden)
        return total

    tokens = sum(rows * width for rows, width in shapes)
    texts = sum(rows for rows, _ in shapes)
    samples = texts / 2 if trains and not heads else texts
    work = Work(model, run, samples, tokens, vocabulary=vocabulary, trains=trains)
    work.passes = batch / samples
    work.cached = trains and not heads and recipe.micro_batch_tokens is not None
    return work
