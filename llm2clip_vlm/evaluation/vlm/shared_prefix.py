"""Several questions about one picture: what stands before them is computed once.

A benchmark asks up to dozens of questions about a picture, and a picture's tokens are most of a
prompt. Keys and values of the picture and of what precedes it do not depend on the question.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from llm2clip_vlm.models.equal import HALF_TOLERANCE, TOLERANCE, difference

logger = logging.getLogger(__name__)


def places(pictures: Sequence[str]) -> dict[str, int]:
    """Place of each picture in an order that keeps its questions together.

    Args:
        pictures: What tells pictures apart, one for each prompt.

    Returns:
        All 0 where a picture has fewer than two questions in the mean: then length matters more.
    """
    first = {picture: place for place, picture in reversed(list(enumerate(pictures)))}
    return first if 2 * len(first) <= len(pictures) else dict.fromkeys(first, 0)


class PrefixSharing:
    """Gives `generate` a cache of what the prompts of a batch share.

    Before the first time it is seen whether the model's logits stay the same; if not, a warning
    says so, and each prompt is computed by itself.

    Args:
        model: Nothing is shared but in a `LlavaForConditionalGeneration` whose language model
            keeps keys and values of all tokens, and nothing else.
        pad_id: Id that fills.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model, self._pad_id = model, pad_id
        self._right = None if model.config.model_type == "llava" else False

    def __call__(self, inputs: dict[str, Tensor], pictures: Sequence[str]) -> dict[str, Any]:
        """Compute the prefix of each picture; call it in evaluation mode without gradients.

        Args:
            inputs: `input_ids`, `attention_mask` [b, t], padded on the left, and `pixel_values`
                [b, 3, h, w], one picture for each prompt.
            pictures: What tells pictures apart, one for each prompt.

        Returns:
            Arguments of `generate` for the same answers, `input_ids` of the same shape.
        """
        if self._right is False or len(set(pictures)) == len(pictures):
            return inputs
        if self._right is None:
            wrong = self._difference(inputs)
            if wrong:
                logger.warning("the picture is computed anew for each question: %s", wrong)
            self._right = wrong is None
        return self._share(inputs, pictures) if self._right else inputs

    def _difference(self, inputs: dict[str, Tensor]) -> str | None:
        """Why not, in words where it is a surprise. None: the next token's logits stay the same."""
        layers = DynamicCache(config=self._model.config.get_text_config()).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            return ""  # windows and recurrent states depend on where the padding is
        row = int(inputs["attention_mask"].sum(-1).argmin())  # the most padded prompt
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        keep = GenerationConfig(max_new_tokens=1, pad_token_id=self._pad_id)
        keep.update(output_logits=True, return_dict_in_generate=True)
        both = (one, self._share(one, [""]))
        want, got = (self._model.generate(**g, generation_config=keep).logits[0] for g in both)
        return difference(want, got, TOLERANCE.get(self._model.dtype, HALF_TOLERANCE))

    def _share(self, inputs: dict[str, Tensor], pictures: Sequence[str]) -> dict[str, Any]:
        """The shared form; `inputs` where prompts differ before a picture ends."""
        # Padding moves from the left to where the questions begin. Example: of `. . I I a` and
        # `I I b c d` (`.` fills, `I` is the picture) the first becomes `I I . . a`.
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pads = (ids.shape[1] - mask.sum(-1))[:, None]
        at = torch.arange(ids.shape[1], device=ids.device)
        begun = ids.gather(1, (at + pads).clamp(max=ids.shape[1] - 1))  # `I I a a a`
        end = int((begun == self._model.config.image_token_id).nonzero()[:, 1].max()) + 1
        if bool((begun[:, :end] != begun[:1, :end]).any()):
            return inputs
        order = list(dict.fromkeys(pictures))
        pixels = inputs["pixel_values"][[pictures.index(picture) for picture in order]]
        first = begun[: len(order), :end]
        cache = self._model(first, pixels, use_cache=True, logits_to_keep=1).past_key_values
        rows = torch.tensor([order.index(picture) for picture in pictures], device=ids.device)
        cache.batch_select_indices(rows)
        gap = (at >= end) & (at < end + pads)
        moved = torch.where(at < end, begun, ids).masked_fill(gap, self._pad_id)
        return {"input_ids": moved, "attention_mask": (~gap).to(mask), "past_key_values": cache}
