"""An ordinary CLIP with its own text tower: loading, a longer text window, tokens.

Stage 2's control: the same images, captions and steps, without the LLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from llm2clip_vlm.chat.text_tokens import text_ids, text_tokens
from llm2clip_vlm.models.llm2clip import register
from llm2clip_vlm.models.loading import (
    load_complete,
    read_config,
    read_image_processor,
    read_tokenizer,
    to_dtype,
)
from llm2clip_vlm.models.text.caption_tokens import pad_tokens

Clip = CLIPModel | VisionTextDualEncoderModel
"""A vision tower with its own text tower: OpenAI's pair, or any tower with CLIP's text tower."""
END_TOKEN = "<|end_of_caption|>"
"""Name of the end token of a text tower whose tokenizer puts none after a text."""

_SPECIAL = ("pad", "bos", "eos")


def load_clip(
    clip: str | Mapping[str, Any],
    tokenizer: str | Path | None = None,
    text_window_tokens: int | None = None,
) -> tuple[Clip, Any, Any]:
    """Load a CLIP to train, in fp32, with its tokenizer and image processor.

    Args:
        clip: Directory or hub id of a `CLIPModel` or of what :func:`clip_around_tower` made, or
            `CLIPConfig` arguments to start from nothing; the tokenizer gives the vocabulary's size
            and special tokens where they are not given, the config the towers' `projection_dim`.
        tokenizer: Directory of tokenizer and image processor; needed with a config, and else taken
            from `clip` where not given.
        text_window_tokens: See :func:`lengthen_text_window`. None: the window stays.

    Returns:
        Model, tokenizer (cutting at the window) and image processor.

    Raises:
        ValueError: No tokenizer directory, a tokenizer that does not fit the text tower, or a
            shorter window than in the checkpoint.
    """
    if isinstance(clip, Mapping) and tokenizer is None:
        raise ValueError(
            "`clip` is a config, so `tokenizer` must name a directory with the tokenizer and the "
            "image processor"
        )
    folder = str(tokenizer if tokenizer is not None else clip)
    text_tokenizer = read_tokenizer(folder)
    image_processor = read_image_processor(folder)
    if isinstance(clip, Mapping):
        model = CLIPModel(_config_for(clip, text_tokenizer))
    else:
        register()  # only this package, or another one, may know a tower's `model_type`
        dual = read_config(clip).model_type == VisionTextDualEncoderConfig.model_type
        model_class = VisionTextDualEncoderModel if dual else CLIPModel
        model = load_complete(model_class, clip, dtype=torch.float32)
    if text_window_tokens is not None:
        lengthen_text_window(model, text_window_tokens)
    text_config: Any = model.config.text_config
    text_tokenizer.model_max_length = text_config.max_position_embeddings
    check_tokenizer(model, text_tokenizer)
    return model, text_tokenizer, image_processor


def clip_around_tower(
    tower: PreTrainedModel,
    text_model: Mapping[str, Any],
    tokenizer: str | Path,
    *,
    projection_dim: int,
    logit_scale_init: float,
) -> tuple[VisionTextDualEncoderModel, PreTrainedTokenizerBase]:
    """Put a CLIP text transformer from nothing beside any vision tower.

    Its pooled output is projected as in `LLM2CLIPModel`, so that the two differ in the text alone.

    Args:
        tower: Copied, not shared; the model has its dtype.
        text_model: `CLIPTextConfig` arguments; the tokenizer gives vocabulary and special tokens.
        tokenizer: Directory; where it puts no end token after a text, it gets one more.
        projection_dim: Width of the joint space.
        logit_scale_init: Stored logarithm at the start.

    Returns:
        Model and tokenizer (cutting at the window).
    """
    text_tokenizer = _with_end_token(read_tokenizer(tokenizer))
    known = {"bos_token_id": None} | _special_of(text_tokenizer)
    text = CLIPTextConfig(**known | dict(text_model))
    text_tokenizer.model_max_length = text.max_position_embeddings
    config = VisionTextDualEncoderConfig(
        vision_config=tower.config.to_dict() | {"_name_or_path": ""},
        text_config=text.to_dict(),
        projection_dim=projection_dim,
        logit_scale_init_value=logit_scale_init,
    )
    model: Any = VisionTextDualEncoderModel(config)
    model.vision_model.load_state_dict(tower.state_dict())
    for head in (model.visual_projection, model.text_projection):
        nn.init.normal_(head.weight, std=head.in_features**-0.5)
    check_tokenizer(model, text_tokenizer)
    return to_dtype(model, tower.dtype), text_tokenizer


def _with_end_token(tokenizer: Any) -> Any:
    """The tokenizer, or one that closes texts with an end token, where CLIP pools.

    Id 2 cannot be that token: CLIP's config takes it for "the highest id".
    """
    ids = tokenizer("a")["input_ids"]
    if ids[-1] == tokenizer.eos_token_id != 2 and ids.count(ids[-1]) == 1:
        return tokenizer
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token=tokenizer.unk_token,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, made.eos_token_id)]
    )
    return made


def _special_of(tokenizer: Any) -> dict[str, int]:
    """Fields that a text tower's config takes from the tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    return {"vocab_size": len(tokenizer)} | {k: v for k, v in special.items() if v is not None}


def _config_for(arguments: Mapping[str, Any], tokenizer: Any) -> CLIPConfig:
    text, values = _special_of(tokenizer), dict(arguments)
    shared = {k: v for k, v in values.items() if k == "projection_dim"}
    values["text_config"] = text | shared | dict(values.get("text_config") or {})
    values["vision_config"] = shared | dict(values.get("vision_config") or {})
    return CLIPConfig(**values)


@torch.no_grad()
def lengthen_text_window(model: Clip, window_tokens: int) -> None:
    """Give the text tower more positions, in place.

    Args:
        model: Its pretrained positions are kept; each new one starts as a copy of the last.
        window_tokens: New number of positions, special tokens counted.

    Raises:
        ValueError: Fewer than the model has.
    """
    embeddings: Any = model.text_model.embeddings
    old = embeddings.position_embedding.weight
    if window_tokens < old.shape[0]:
        raise ValueError(
            f"text_window_tokens is {window_tokens}, but the text tower has {old.shape[0]} "
            "positions already; the window can only be lengthened"
        )
    weight = torch.cat([old, repeat(old[-1], "d -> n d", n=window_tokens - len(old))]).clone()
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    positions = torch.arange(window_tokens, device=weight.device)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    text_config: Any = model.config.text_config
    text_config.max_position_embeddings = window_tokens


def check_tokenizer(model: Clip, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end token is not where the text tower pools.

    The tower takes the first `eos_token_id`, or with the legacy value 2 the highest id. Where
    neither finds the end token, it pools some other token without a word.

    Args:
        model: The CLIP; its text config is read.
        tokenizer: The tokenizer.

    Raises:
        ValueError: Says which ids disagree.
    """
    config: Any = model.config.text_config
    ids = tokenizer(["a", "a a a"], padding=True, truncation=True)["input_ids"][0]
    end = tokenizer.eos_token_id
    pooled = max(ids) if config.eos_token_id == 2 else config.eos_token_id
    if pooled != end or end not in ids:
        raise ValueError(
            f"the text tower pools at eos_token_id {config.eos_token_id} (2 means the highest id), "
            f"but the tokenizer's end token is {end} and 'a' becomes {ids}; set "
            "text_config.eos_token_id, or use the checkpoint's own tokenizer"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the text tower only {config.vocab_size} "
            "embeddings; set text_config.vocab_size"
        )


class ClipTokens:
    """Turns captions into the text tower's arguments; each caption is tokenised once.

    Captions longer than the window are cut, the end token stays last.

    Args:
        tokenizer: Tokenizer with `model_max_length` set to the window.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.window_tokens = int(tokenizer.model_max_length)
        self._ids: dict[str, list[int]] = {}
        self.control: Counter[str] = Counter()
        """Names of control tokens that stood in captions; they were read as text."""

    @property
    def num_cut(self) -> int:
        """Captions tokenised so far that fill the window (cut, or just long enough)."""
        return sum(len(ids) >= self.window_tokens for ids in self._ids.values())

    def fits(self, text: str) -> bool:
        """Whether the window holds a caption without cutting it.

        Args:
            text: The caption, which is tokenised if it is not yet.
        """
        self.prepare([text])
        return len(self._ids[text]) < self.window_tokens

    def caption_id(self, text: str) -> int:
        """A number that captions of equal tokens share, such as two that differ behind the cut."""
        self.prepare([text])
        return hash(tuple(self._ids[text]))

    def prepare(self, texts: Iterable[str]) -> None:
        """Tokenise captions in one go, ahead of the batches that ask for them.

        Args:
            texts: Captions; those that are known already cost nothing.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if new:
            window = self.window_tokens
            ids = text_ids(self.tokenizer, new, add_special_tokens=True, max_length=window)
            self.control.update(text_tokens(self.tokenizer).count(new))
            self._ids.update(zip(new, ids, strict=True))

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokens of a batch.

        Args:
            texts: Captions.

        Returns:
            `input_ids` and `attention_mask`, `[n, longest]` int64, padded on the right.
        """
        self.prepare(texts)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        padded = pad_tokens([self._ids[text] for text in texts], pad, 0)
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


def clip_encoders(
    model: Clip, tokens: ClipTokens
) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]]:
    """Functions by which an ordinary CLIP embeds images and captions, unit norm.

    Args:
        model: Model on its device.
        tokens: Turns captions into its text tower's arguments.

    Returns:
        One of `pixel_values`, and one of captions.
    """

    def encode_images(pixels: Tensor) -> Tensor:
        features = model.get_image_features(pixel_values=pixels.to(model.device))
        return F.normalize(features.pooler_output, dim=-1)

    def encode_texts(texts: list[str]) -> Tensor:
        inputs = {name: values.to(model.device) for name, values in tokens(texts).items()}
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    return encode_images, encode_texts
