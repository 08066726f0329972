"""Keeping what CLIP knew: a teacher for the tower, and CLIP's text tower taught to the adaptor.

LLM2CLIP as published loses zero-shot classification (ProCLIP's re-run: ImageNet 74.5 to 52.8 for
ViT-L/14); both parts here are options of stage 2b.

Paper: ProCLIP (2510.18795).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from llm2clip_vlm.losses.contrastive import cosine_loss, relational_distillation
from llm2clip_vlm.models.clip import Clip, ClipTokens, clip_encoders, load_clip
from llm2clip_vlm.models.equal import fixed_pixels
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel, warn_of_other_tower
from llm2clip_vlm.models.loading import read_config
from llm2clip_vlm.models.text.text_encoder import require_equal
from llm2clip_vlm.models.vision.patch_dropout import PatchDropout
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.recipe.encoder import InheritanceSection, Stage2bRecipe
from llm2clip_vlm.training.callbacks import PatchDropoutTail, WeightAverage
from llm2clip_vlm.training.encoder.frozen_tower import FrozenTower
from llm2clip_vlm.training.export import vision_tower_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerTeacher:
    """A model to whose image embeddings the tower stays close."""

    model: LLM2CLIPModel
    """A copy of the model before training, or its running average; not trained, not saved."""
    loss: Literal["cosine", "relational"]
    """`cosine` holds each embedding, `relational` the angles between them."""
    weight: float
    """Weight of the penalty beside the contrastive loss."""

    @torch.no_grad()
    def __call__(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """The teacher's image embeddings, on the device of the pixels."""
        model: Any = self.model
        return model.to(pixel_values.device).get_image_features(pixel_values)

    def penalty(
        self, image_embeds: Float[Tensor, "b d"], targets: Float[Tensor, "b d"], *, gather: bool
    ) -> Float[Tensor, ""]:
        """The weighted distance to the teacher.

        Args:
            image_embeds: Embeddings of the student.
            targets: Embeddings of the same images by the teacher.
            gather: Whether other processes have further images of the batch.
        """
        if self.loss == "cosine":
            return self.weight * cosine_loss(image_embeds, targets)
        return self.weight * relational_distillation(image_embeds, targets, gather=gather)


@dataclass(frozen=True)
class Keeping:
    """Teacher, average and callbacks that stage 2b's options add to its trainer."""

    teacher: TowerTeacher | None
    """Teacher for `EncoderTrainer`."""
    average: WeightAverage | None
    """Average whose weights are saved in the end. None: the last weights are saved."""
    callbacks: list[TrainerCallback]
    """Callbacks for the trainer."""

    def kept(self, model: LLM2CLIPModel) -> Any:
        """The model with the weights that would be saved now, in evaluation mode."""
        return (model if self.average is None else self.average.model).eval()

    def finish(self, model: LLM2CLIPModel, lora: Any = None) -> Tensor:
        """Prepare the model for saving: averaged weights, no adapter.

        Args:
            model: Model after training.
            lora: Result of `add_lora`. None: there is no adapter.

        Returns:
            What :func:`probe_embeds` must give for the saved model.
        """
        if self.average is not None:
            self.average.copy_to(model)
        expected = probe_embeds(self.kept(model))
        if lora is not None:
            lora.merge_and_unload()
        return expected


@torch.no_grad()
def probe_embeds(model: Any) -> Float[Tensor, "2 d"]:
    """Embeddings of two fixed images of noise, by which a model is compared before and after.

    Args:
        model: An `LLM2CLIPModel`, a CLIP, or a plain tower (pooled output), in evaluation mode.
    """
    pixels = fixed_pixels(vision_tower_of(model).config.image_size)
    embed = getattr(model, "get_image_features", model)
    found = embed(pixel_values=pixels.to(model.device, model.dtype))
    return found if torch.is_tensor(found) else found.pooler_output


def require_as_trained(
    trained: Tensor, saved: Any, directory: Path, frozen: FrozenTower | None = None
) -> None:
    """Refuse a saved model that gives other embeddings than the one that was trained.

    Args:
        trained: Result of :func:`probe_embeds`, before saving.
        saved: The model, loaded again.
        directory: Where it was loaded from.
        frozen: Tower whose features it was trained on, and takes for pictures from here on.

    Raises:
        ValueError: Names what differs.
    """
    remedy = "it was not written as it was trained; go on from the last checkpoint"
    require_equal(str(directory), trained, probe_embeds(saved), remedy, saved.dtype)
    if frozen is not None:
        frozen.require(vision_tower_of(saved))
        frozen.attach(vision_tower_of(saved))


def require_as_exported(model: Any, directory: Path) -> None:
    """Refuse an exported tower that gives other outputs than the model's tower.

    Args:
        model: What it was exported from.
        directory: Where :func:`export_vision_tower` wrote it.
    """
    tower: Any = load_vision_tower(directory, model.dtype).model
    require_as_trained(probe_embeds(vision_tower_of(model)), tower.to(model.device), directory)


def prepare_keeping(
    recipe: Stage2bRecipe,
    model: LLM2CLIPModel,
    num_prefix_tokens: int,
    captions: Callable[[], Sequence[str]],
    lookup: Callable[[list[str]], Tensor],
    device: Any,
    *,
    resumes: bool,
) -> Keeping:
    """Inherit from CLIP what the recipe asks for, and make teacher, average and callbacks.

    Args:
        recipe: Gives `inherit_text`, `self_distillation`, `weight_average` and `patch_dropout`.
        model: Model before training; it inherits in place.
        num_prefix_tokens: Number of its tower's prefix tokens.
        captions: All training captions, asked for where they are needed.
        lookup: Captions to the text encoder's embeddings.
        device: Where to compute.
        resumes: Whether the run goes on from a checkpoint, which has inherited already.

    Returns:
        Teacher, average and callbacks.

    Raises:
        ValueError: The model to inherit from is no CLIP, or has another width.
    """
    if recipe.inherit_text is not None:
        path = recipe.inherit_text.clip or recipe.vision_tower
        if (kind := read_config(path).model_type) != "clip":
            raise ValueError(
                f"inherit_text: {path} is a {kind!r} model, expected a CLIPModel; set `clip`"
            )
        clip, tokenizer, _ = load_clip(path)
        inherit_space(model, clip)
        if not resumes:
            texts = ClipTokens(tokenizer), captions(), lookup
            settings, seed = recipe.inherit_text, recipe.seed
            inherit_text_tower(model, clip, *texts, settings, seed=seed, device=device)
    callbacks: list[TrainerCallback] = []
    average = None
    if recipe.weight_average is not None:
        average = WeightAverage(model, recipe.weight_average.decay)
        callbacks.append(average)
    teacher = None
    if (chosen := recipe.self_distillation) is not None:
        if chosen.teacher == "average" and average is not None:
            teacher_model: Any = average.model
        else:
            teacher_model = copy.deepcopy(model)
            del teacher_model.text_adaptor
        teacher = TowerTeacher(teacher_model.eval(), chosen.loss, chosen.weight)
    if recipe.patch_dropout:
        dropout = PatchDropout(model.vision_tower, recipe.patch_dropout, num_prefix_tokens)
        callbacks.append(PatchDropoutTail(dropout, recipe.patch_dropout_tail))
    exported = recipe.weight_average is not None and recipe.weight_average.export
    return Keeping(teacher, average if exported else None, callbacks)


@torch.no_grad()
def inherit_space(model: LLM2CLIPModel, clip: Clip) -> None:
    """Start in CLIP's own joint space: its image projection and, for softmax, its scale, in place.

    Args:
        model: Around the same CLIP's vision tower; with other weights of it, a warning says so.
        clip: Its `visual_projection` and `logit_scale` are copied.

    Raises:
        ValueError: The spaces have different widths.
    """
    given, own = clip.visual_projection.weight, model.visual_projection.weight
    if given.shape != own.shape:
        raise ValueError(
            f"inherit_text: the CLIP projects {given.shape[1]} to {given.shape[0]} dimensions, "
            f"the model {own.shape[1]} to {own.shape[0]}; set projection_dim and `clip` to fit"
        )
    warn_of_other_tower(
        model.vision_tower, vision_tower_of(clip).state_dict(), "inherit_text: the CLIP"
    )
    own.copy_(given)
    if model.logit_bias is None:
        model.logit_scale.copy_(clip.logit_scale)


def inherit_text_tower(
    model: LLM2CLIPModel,
    clip: Clip,
    tokens: ClipTokens,
    captions: Sequence[str],
    lookup: Callable[[list[str]], Tensor],
    settings: InheritanceSection,
    *,
    seed: int,
    device: Any,
) -> float:
    """Teach the adaptor to turn the LLM's embedding of a caption into CLIP's text embedding.

    Only captions that fit CLIP's window take part: the embedding of a beginning is not that of the
    caption. Every process computes the same, so nothing is communicated.

    Args:
        model: Its adaptor is trained, in place.
        clip: The text tower.
        tokens: CLIP's tokenizer.
        captions: Captions to draw from.
        lookup: Captions to the text encoder's embeddings (stage 2a's cache).
        settings: Steps, batch, learning rate.
        seed: Seed of the draws.
        device: Where to compute.

    Returns:
        Mean cosine to CLIP's text embeddings in the last tenth of the steps.

    Raises:
        ValueError: No caption fits the window.
    """
    fitting = [text for text in captions if tokens.fits(text)]
    if not fitting:
        raise ValueError(
            f"inherit_text: none of {len(captions)} captions fits CLIP's window of "
            f"{tokens.window_tokens} tokens; add short captions to `train`, or leave it out"
        )
    _, encode_texts = clip_encoders(clip.to(device).eval(), tokens)
    adaptor = model.to(device).text_adaptor.train()
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=settings.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, settings.steps)
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(settings.steps):
        drawn = torch.randint(len(fitting), (settings.batch_size,), generator=generator)
        texts = list(dict.fromkeys(fitting[index] for index in drawn.tolist()))
        with torch.no_grad():
            targets = encode_texts(texts)
        embeds = model.get_text_features(lookup(texts).to(device))
        distance = cosine_loss(embeds, targets)
        angles = relational_distillation(embeds, targets) if len(texts) > 1 else 0.0
        optimizer.zero_grad(set_to_none=True)
        (distance + angles).backward()
        optimizer.step()
        schedule.step()
        cosines.append(1 - distance.item())
    cosine = fmean(cosines[-max(settings.steps // 10, 1) :])
    logger.info(
        "inherited at a mean cosine of %.3f; %d of %d captions fit CLIP's window",
        *(cosine, len(fitting), len(captions)),
    )
    return cosine
