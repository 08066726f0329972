"""Recipes of stage 2b and its control: vision towers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm2clip_vlm.recipe.base import (
    AugmentationSection,
    ImageTextSource,
    LoraSection,
    RunRecipe,
    Section,
    TextEncoderSection,
    ZeroShotSource,
)


class TextAdaptorSection(Section):
    """The adaptor on cached text embeddings (paper v6 table 8; released code model.py:217-253)."""

    num_blocks: int = Field(default=4, ge=0)
    """Residual inverted-bottleneck blocks. Paper v6: 4."""
    expansion: int = Field(default=2, ge=1)
    """Width of a block's hidden layer over the width of its input (released code: 2)."""


class LearningRates(Section):
    """Learning rate of each group; the released code gives 1e-5 to all three."""

    vision_tower: float = Field(default=1e-5, ge=0)
    """Rate of the tower; ignored where it is frozen."""
    visual_projection: float = Field(default=1e-5, ge=0)
    """Rate of the image head."""
    text_adaptor: float = Field(default=1e-5, ge=0)
    """Rate of adaptor, text head and `logit_scale`."""


class InheritanceSection(Section):
    """The text adaptor first learns to give CLIP's text embeddings (ProCLIP, 2510.18795)."""

    clip: str | None = None
    """`CLIPModel` with its tokenizer, the one that the tower comes from. None: `vision_tower`.
    Training starts in its joint space (image projection, scale) of width `projection_dim`."""
    steps: int = Field(default=500, ge=1)
    """Optimizer steps on captions alone; those that CLIP's window would cut are left out."""
    batch_size: int = Field(default=512, ge=2)
    """Captions a step, on every process the same."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW, falling to 0 along a cosine."""


class SelfDistillationSection(Section):
    """A penalty on image embeddings far from those of a teacher (ProCLIP, 2510.18795)."""

    teacher: Literal["frozen", "average"] = "frozen"
    """`frozen`: the model before training; `average`: its running average (`weight_average`)."""
    loss: Literal["cosine", "relational"] = "cosine"
    """`cosine` holds each embedding, `relational` the angles between those of a batch."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the penalty beside the contrastive loss."""


class WeightAverageSection(Section):
    """Exponential moving average (EMA) of all weights that train."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Decay of a late step; early ones decay faster."""
    export: bool = True
    """Evaluate and save the averages; false keeps them for `self_distillation`."""


class EncoderRecipe(RunRecipe):
    """Base of the recipes of stage 2b and its controls: training data and evaluation."""

    contrastive: ClassVar[bool] = True
    """See `RunRecipe`."""
    train: list[ImageTextSource]
    """Images with captions; one caption is drawn per image and epoch."""
    caption_weights: dict[str, float] = Field(default_factory=dict)
    """Probability weight of each key of a mapping-valued caption column (`{short: 1, long: 1}`);
    empty = uniform over all captions."""
    augmentation: AugmentationSection = Field(default_factory=AugmentationSection)
    """Random crop; off by default. Pictures are then decoded each time."""
    image_decoding: Literal["fast", "exact"] = "fast"
    """Decoding of training pictures that are not held in memory: `fast` decodes large JPEGs at half
    or a quarter of their size (43 to 52 dB from `exact`), `exact` as the image processor does."""
    feature_cache: str | Literal[False] | None = None
    """Folder of pooled features of a tower that does not train (without random crops), which runs
    may share; each picture is decoded exactly and encoded once, and a step costs the heads
    alone. None: `<output_dir>/features`; false = the tower runs in every step."""
    tower_last_blocks: int | None = Field(default=None, ge=1)
    """Train only this many of the tower's last blocks (stages of a CNN) and what follows them; what
    comes before stays in evaluation mode and costs no backward pass. None: all."""
    evaluation: list[ImageTextSource] = Field(default_factory=list)
    """Held-out images for retrieval, each caption key apart."""
    evaluation_steps: int | None = Field(default=None, ge=1)
    """Measure every this many steps too (`eval_*` in the log). None: after training only."""
    zero_shot: list[ZeroShotSource] = Field(default_factory=list)
    """Labelled images for zero-shot classification, measured whenever retrieval is."""


class TextInLoopSection(Section):
    """An LLM that trains inside stage 2b: what the paper compares the cache with."""

    text_encoder: str | TextEncoderSection
    """Stage 1's `text_encoder/`, or a raw LLM with its pooling."""
    lora: LoraSection = Field(default_factory=LoraSection)
    """Adapter of the LLM; merged at the end into `<output_dir>/text_encoder/`."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Learning rate of the adapter (paper v6 C.1: 2e-4 in stage 1)."""


class Stage2bRecipe(EncoderRecipe):
    """Stage 2b: the tower against the frozen LLM's cached embeddings (paper v6 section 3.2)."""

    stage: Literal["stage2b_vision_encoder"] = "stage2b_vision_encoder"
    """Which program reads this file."""
    vision_tower: str
    """Path or hub id of a CLIP model or a vision tower."""
    tower_training: Literal["full", "frozen", "lora"] = "full"
    """How the tower trains. Paper v6: full."""
    tower_lora: LoraSection | None = None
    """Adapter of the tower, required with `tower_training: lora`; merged at the end."""
    image_size_px: int | None = Field(default=None, ge=1)
    """Another resolution than that of the tower: its positions are interpolated."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the patches that the tower does not see while it trains (FLIP, 2212.00794)."""
    patch_dropout_tail: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps, at the end, that see all patches again."""
    heads_from: str | None = None
    """`model/` of an earlier stage 2b against the same text encoder: its adaptor, projections and
    scale are the start. With one whose tower was frozen, new heads do not pull at a tower that they
    cannot read yet (linear probing, then fine-tuning: arXiv 2202.10054)."""
    inherit_text: InheritanceSection | None = None
    """Representation inheritance, before the images come. None: a new joint space."""
    self_distillation: SelfDistillationSection | None = None
    """Keeps the tower near a teacher. None: only the contrastive loss."""
    weight_average: WeightAverageSection | None = None
    """Averages of the weights. None: the last weights are saved."""
    embedding_cache: str | None = None
    """Stage 2a's directory; with `write_through` it may lack captions, or not be there yet."""
    caption_prompts: list[str] = Field(default_factory=list)
    """Prompts of stage 2a whose embeddings of a caption are its further positives."""
    text_in_loop: TextInLoopSection | None = None
    """An LLM instead of a cache: it trains, too, and encodes captions in every step."""
    write_through: str | TextEncoderSection | None = None
    """Stage 1's `text_encoder/`, or a raw LLM: a caption that the cache lacks is encoded when it is
    first drawn, and kept there. None: the cache is complete before training starts."""
    text_adaptor: TextAdaptorSection = Field(default_factory=TextAdaptorSection)
    """Shape of the adaptor."""
    projection_dim: int = Field(default=1280, ge=1)
    """Width of the joint space. Paper v6: 1280."""
    logit_scale_init: float = 2.6592
    """Stored logarithm: ln(1/0.07), or ln(100) = 4.6052 where the pretrained one is kept."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Symmetric InfoNCE (paper v6), or SigLIP's loss with a bias (the authors' SigLIP2 towers)."""
    logit_bias_init: float = -10.0
    """Bias of the sigmoid loss at the start (SigLIP: -10, with `logit_scale_init` ln 10)."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass on each process; more go through GradCache, which bounds the memory
    and keeps the gradient of the whole batch. None: all at once."""
    learning_rates: LearningRates = Field(default_factory=LearningRates)
    """Learning rate of each group."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the tower's learning rate per layer from the top (released code: 0.85)."""
    captions_per_image: int = Field(default=1, ge=1)
    """Captions of an image in a batch, all of them its positives (DreamLIP's multi-positive loss);
    with cached text each costs one pass of the adaptor. Paper v6: 1."""

    def rates(self) -> dict[str, float]:
        """Learning rate of each part that trains, by its name in the model."""
        frozen = {"vision_tower"} if self.tower_training == "frozen" else None
        found: dict[str, float] = self.learning_rates.model_dump(exclude=frozen)
        found["logit_scale"] = found["text_adaptor"]
        if self.loss == "sigmoid":
            found["logit_bias"] = found["text_adaptor"]
        return found

    def heads(self, text_embed_dim: int) -> dict[str, Any]:
        """Fields of the model's config beside its tower; takes the width of the text embeddings."""
        return {
            "text_embed_dim": text_embed_dim,
            "projection_dim": self.projection_dim,
            "adaptor_num_blocks": self.text_adaptor.num_blocks,
            "adaptor_expansion": self.text_adaptor.expansion,
            "logit_scale_init_value": self.logit_scale_init,
            "logit_bias_init_value": self.logit_bias_init if self.loss == "sigmoid" else None,
        }

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if (self.embedding_cache is None) == (self.text_in_loop is None):
            raise ValueError("expected either embedding_cache or text_in_loop, got both or neither")
        if "" in self.caption_prompts:
            raise ValueError("caption_prompts: an empty one is always there; leave it out")
        if (self.write_through or self.text_in_loop) and self.caption_prompts:
            raise ValueError("caption_prompts need stage 2a's complete cache")
        if self.heads_from is not None and self.inherit_text is not None:
            raise ValueError(
                "heads_from and inherit_text: expected one start of the heads, got two"
            )
        if (self.tower_training == "lora") != (self.tower_lora is not None):
            raise ValueError(
                f"tower_training is {self.tower_training!r} and tower_lora is "
                f"{'absent' if self.tower_lora is None else 'present'}; `lora` needs the section, "
                "`full` and `frozen` take none"
            )
        if self.tower_training == "frozen" and self.patch_dropout:
            raise ValueError("patch_dropout acts in a tower that trains; tower_training is frozen")
        if self.tower_training != "full" and self.tower_last_blocks is not None:
            raise ValueError(
                "tower_last_blocks: expected with tower_training: full, got "
                f"{self.tower_training!r}; remove one of the two"
            )
        taught = self.self_distillation is not None and self.self_distillation.teacher == "average"
        if taught and self.weight_average is None:
            raise ValueError("self_distillation.teacher is 'average': add `weight_average`")
        if self.weight_average is not None and not (self.weight_average.export or taught):
            raise ValueError(
                "weight_average.export is false and no self_distillation uses the averages"
            )
        exported = self.weight_average is not None and self.weight_average.export
        if exported and self.trainer.get("load_best_model_at_end"):
            raise ValueError("trainer.load_best_model_at_end: expected without `weight_average`")
        return self


class ClipBaselineRecipe(EncoderRecipe):
    """Ordinary CLIP training: pre-trains the demo's base and trains the control towers."""

    stage: Literal["clip_baseline"] = "clip_baseline"
    """Which program reads this file."""
    clip: str | dict[str, Any] | None = None
    """A `CLIPModel` directory to continue from, or `CLIPConfig` arguments to start from nothing.
    None: `vision_tower` with a new text tower."""
    vision_tower: str | None = None
    """Path or hub id of any vision tower that stage 2b takes, instead of `clip`. The result is
    transformers' `VisionTextDualEncoderModel`."""
    image_size_px: int | None = Field(default=None, ge=1)
    """Another resolution of `vision_tower`, as in stage 2b."""
    text_model: dict[str, Any] | None = None
    """`CLIPTextConfig` arguments of the text tower that starts from nothing beside `vision_tower`
    (causal, pooled at the end token); the tokenizer gives vocabulary and special tokens."""
    projection_dim: int = Field(default=512, ge=1)
    """Width of the joint space, with `vision_tower`."""
    logit_scale_init: float = 2.6592
    """Stored logarithm at the start, as in stage 2b, with `vision_tower`."""
    tokenizer: str | None = None
    """Directory of the tokenizer when `clip` is a config (its image processor too) or beside
    `vision_tower`; a tokenizer that puts no end token after a text gets one."""
    text_window_tokens: int | None = Field(default=None, ge=4)
    """Lengthen the text tower to this many positions (pretrained ones kept, new ones repeat the
    last); captions beyond the window are cut, as CLIP does."""
    learning_rates: dict[
        Literal["vision_model", "text_model", "projections"], Annotated[float, Field(ge=0)]
    ] = {"vision_model": 1e-5, "text_model": 1e-5, "projections": 1e-5}
    """Learning rate of each group; `projections` includes `logit_scale`. A part without a rate, or
    with 0, is frozen."""
    evaluate_only: bool = False
    """Measure `clip` as it is: nothing is trained."""

    def rates(self) -> dict[str, float]:
        """Learning rate of each part that trains, by its name in the model."""
        found = {str(part): lr for part, lr in self.learning_rates.items() if lr}
        if projections := found.pop("projections", None):
            names = ("visual_projection", "text_projection", "logit_scale")
            found |= dict.fromkeys(names, projections)
        return found

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if (self.clip is None) == (self.vision_tower is None):
            raise ValueError("expected either `clip` or `vision_tower`, got both or neither")
        needed = (self.text_model, self.tokenizer)
        if self.vision_tower is not None and (None in needed or self.text_window_tokens):
            raise ValueError(
                "`vision_tower` needs `text_model` and `tokenizer`; the text window is "
                "text_model.max_position_embeddings, not text_window_tokens"
            )
        for key in ("text_model", "image_size_px", "projection_dim", "logit_scale_init"):
            if self.clip is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` belongs to `vision_tower`; `clip` has its own")
        if self.tower_last_blocks is not None and not self.learning_rates.get("vision_model"):
            raise ValueError(
                "tower_last_blocks: expected with a learning rate of `vision_model`, which is "
                "frozen; remove one of the two"
            )
        return self
