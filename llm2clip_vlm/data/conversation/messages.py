"""Conversations to token ids and labels, pictures to the visual tokens that stand for them.

LLaVA re-tokenises split strings and adds up their lengths; where the sums disagree it masks the
whole sample and warns. Here a conversation is tokenised once (:mod:`llm2clip_vlm.chat.labels`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llm2clip_vlm.chat.labels import label, texts_of
from llm2clip_vlm.chat.template import ConversationError, Message, render, template_of
from llm2clip_vlm.chat.text_tokens import text_ids
from llm2clip_vlm.constants import IGNORE_INDEX, IMAGE_TOKEN
from llm2clip_vlm.data.reading.bad_records import printable

MAX_CONVERSATION_CHARS = 2**20
"""A longer conversation is refused: megabytes of text are no conversation, and hold up training."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_APART = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("user", "assistant", "system")}


class VisualTokens:
    """Counts what takes the place of one `<image>`.

    Args:
        processor: A `LlavaProcessor` or, for AnyRes, a `LlavaNextProcessor`; with a bare tokenizer
            an image stays one token.

    Paper: AnyRes: LLaVA-NeXT, `spatial_unpad`; the counts are those of transformers.
    """

    def __init__(self, processor: Any) -> None:
        images = getattr(processor, "image_processor", None)
        self.grids: list[list[int]] | None = getattr(images, "image_grid_pinpoints", None)
        """AnyRes: `[height, width]` in pixels, to which a picture is scaled. None: one crop."""
        self.size_px = (0, 0)
        """Height and width of what the tower sees."""
        self.fixed = 1
        """Tokens of an image where its size does not matter."""
        self.settings: list[Any] = []
        """All that the counts depend on, beside a picture's size."""
        self._processor = processor
        if images is None:
            return
        # By a picture: of `size` and `crop_size` a processor may heed one alone.
        made = images(images=Image.new("RGB", (64, 48)), return_tensors="np")["pixel_values"]
        self.size_px = made.shape[-2:]
        patch, more = processor.patch_size, processor.num_additional_image_tokens
        self._dropped = int(processor.vision_feature_select_strategy == "default")
        if self.grids is None:
            height, width = self.size_px
            self.fixed = (height // patch) * (width // patch) + more - self._dropped
        self.settings = [self.fixed, self.grids, self.size_px, patch, more, self._dropped]

    def of(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Visual tokens and crops of a picture of this size."""
        if self.grids is None:
            return self.fixed, 1
        tokens = self._processor._get_number_of_features(height_px, width_px, *self.size_px)
        crops = image_size_to_num_patches((height_px, width_px), self.grids, self.size_px[0])
        return tokens - self._dropped, crops


def with_system(row: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """Turns with the system prompt that stands beside them, as LLaMA-Factory writes it.

    Args:
        row: Gives `system` or `system_prompt`, if any.
        turns: Its turns.

    Raises:
        ConversationError: There are different ones, or descriptions of tools.
    """
    if tools := next((name for name in _TOOLS if row.get(name)), None):
        raise ConversationError(
            f"the column {tools!r} describes tools, which would be left out; take the record out, "
            "or name the columns without it"
        )
    own = [turn for turn in turns[:1] if turn.get("role", turn.get("from")) == "system"]
    said = [turn.get("content", turn.get("value")) for turn in own]
    said += [text for name in _SYSTEM if (text := row.get(name))]
    if any(text != said[0] for text in said):
        raise ConversationError(f"different system prompts: {printable(repr(said))}")
    return turns if own else [*({"role": "system", "content": t} for t in said[:1]), *turns]


def to_messages(conversation: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Normalises LLaVA turns (`from`, `value`) or chat messages (`role`, `content`).

    Text with `<image>` is split into parts. As LLaVA does (`preprocess_multimodal`), the single
    image of a turn goes to its front; several images stay where they are, in order (LLaVA would
    drop all but one).

    Args:
        conversation: Turns with roles human/gpt or user/assistant, and optionally system first.

    Returns:
        Messages `{"role", "content": [parts]}` (system: text).

    Raises:
        ConversationError: An unknown role or field, an empty answer or one that is marked as not
            to be trained, roles out of turn, `<image>` in a system turn or an answer, or a text
            that is damaged or too long.
    """
    messages: list[Message] = []
    for number, turn in enumerate(conversation, start=1):
        who = turn.get("role", turn.get("from"))
        value = turn.get("content", turn.get("value"))
        if not isinstance(who, str) or who not in _ROLES:
            raise ConversationError(
                f"turn {number}: role {who!r}, expected one of {', '.join(_ROLES)}"
            )
        role = _ROLES[who]
        before = messages[-1]["role"] if messages else None
        expected = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if role not in expected:
            raise ConversationError(
                f"turn {number}: {role} after {before or 'nothing'}, expected {expected[-1]}"
            )
        parts = _to_parts(value, number)
        if role != "user" and any(
            part["type"] == "image" or IMAGE_TOKEN in part["text"] for part in parts
        ):
            raise ConversationError(f"turn {number}: {IMAGE_TOKEN} in a turn of role {role}")
        if role == "assistant" and not any(part["text"].strip() for part in parts):
            raise ConversationError(f"turn {number}: the answer is empty")
        left_out = any(turn.get(name) == 0 for name in ("weight", "loss", "train"))
        if role == "assistant" and (left_out or any(map(turn.get, _APART))):
            raise ConversationError(
                f"turn {number}: an answer that is marked as not to be trained, calls a tool, or "
                "has its reasoning apart; each answer is trained as it is: take the record out, "
                "or the mark"
            )
        content = "".join(part["text"] for part in parts) if role == "system" else parts
        messages.append({"role": role, "content": content})
    if (length := sum(map(len, texts_of(messages)))) > MAX_CONVERSATION_CHARS:
        raise ConversationError(
            f"{length} characters, at most {MAX_CONVERSATION_CHARS} are taken; no model here "
            "reads that far"
        )
    if not messages or messages[-1]["role"] != "assistant":
        raise ConversationError("the conversation does not end with an answer")
    return messages


def count_images(messages: Sequence[Message]) -> int:
    """Number of image parts in normalised messages."""
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def build_labels(
    processor_or_tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    num_visual_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels on the assistant's tokens alone.

    Trained are each answer and the end-of-turn token that the template writes after it; system,
    user and role tokens, and the visual tokens, are `IGNORE_INDEX`.

    Args:
        processor_or_tokenizer: A `LlavaProcessor`, or a fast tokenizer with a chat template.
        messages: LLaVA turns or chat messages, see :func:`to_messages`.
        num_visual_tokens: Tokens in place of one `<image>`. None: the processor's number, which
            with AnyRes depends on the picture.

    Returns:
        `(input_ids, labels)`, lists of the same length; labels are not shifted.

    Raises:
        ConversationError: See :func:`to_messages` and :func:`~llm2clip_vlm.chat.labels.label`.

    Example:
        >>> ids, labels = build_labels(processor, [
        ...     {"from": "human", "value": "<image> Which colour?"},
        ...     {"from": "gpt", "value": "red"}])  # doctest: +SKIP
    """
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    turns = to_messages(messages)
    images = count_images(turns)
    if literal := sum(text.count(IMAGE_TOKEN) for text in texts_of(turns)):
        raise ConversationError(
            f"{images + literal} {IMAGE_TOKEN} tokens after tokenisation, expected {images}; a "
            f"text says {IMAGE_TOKEN}"
        )
    ids, labels = label(turns, template_of(processor_or_tokenizer), tokenizer)
    return _expand_images(ids, labels, processor_or_tokenizer, images, num_visual_tokens)


def build_plain_labels(
    processor: Any, caption: str, *, num_images: int = 1, num_visual_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """LLaVA's `plain` style: image and caption, no question, labels on caption and eos.

    LLaVA ends the caption with a line break; here it is the tokenizer's eos, which an LLM with any
    vocabulary can emit. Bos comes first where the chat template or the tokenizer writes one.

    Args:
        processor: A `LlavaProcessor` or a fast tokenizer.
        caption: The answer's text.
        num_images: Images before the caption.
        num_visual_tokens: See :func:`build_labels`.

    Returns:
        `(input_ids, labels)`.

    Raises:
        ConversationError: The caption is empty or holds `<image>`, or the tokenizer has no eos.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not caption.strip() or IMAGE_TOKEN in caption:
        raise ConversationError(f"caption {caption!r}: expected text without {IMAGE_TOKEN}")
    if tokenizer.eos_token_id is None:
        raise ConversationError("the tokenizer has no eos token; stage 3's plain style needs one")
    ids = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * num_images
    bos = tokenizer.bos_token_id
    own = getattr(processor, "chat_template", None) or tokenizer.chat_template
    written = own and bos is not None and _writes_bos(template_of(processor), tokenizer)
    if written or (bos is not None and tokenizer("a")["input_ids"][0] == bos):
        ids = [bos, *ids]
    words = text_ids(tokenizer, [caption.strip()])[0]
    labels = [IGNORE_INDEX] * len(ids) + [*words, tokenizer.eos_token_id]
    ids = [*ids, *words, tokenizer.eos_token_id]
    return _expand_images(ids, labels, processor, num_images, num_visual_tokens)


@lru_cache(maxsize=2)
def _writes_bos(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template begins with bos, by its name or as a text that no turn begins with."""
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    text, bos = render([turn], template, tokenizer, prompt=True), str(tokenizer.bos_token)
    return "bos_token" in template or (text.startswith(bos) and text.count(bos) == 1)


def decoded_preview(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """One sample as text: trained spans between `«` and `»`, runs of visual tokens as a count."""
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pieces = []
    pairs = zip(input_ids, labels, strict=True)
    for (trained, image), run in groupby(pairs, lambda p: (p[1] != IGNORE_INDEX, p[0] == image_id)):
        ids = [index for index, _ in run]
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        text = f"[{IMAGE_TOKEN} x{len(ids)}]" if image else text
        pieces.append(f"«{text}»" if trained else text)
    return " ".join(pieces)


def _to_parts(value: Any, number: int) -> list[Message]:
    parts: list[Message] = []
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
                raise ConversationError(
                    f"turn {number}: a part {str(part)[:200]}, expected text or image"
                )
            parts.append({"type": kind} | ({"text": part["text"]} if kind == "text" else {}))
    elif isinstance(value, str):
        for index, text in enumerate(value.split(IMAGE_TOKEN)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
    else:
        raise ConversationError(f"turn {number}: no text (`value` or `content`)")
    texts = [part["text"] for part in parts if part["type"] == "text"]
    words = "".join(texts).strip()
    if _HALF_CHARACTER.search(words):
        raise ConversationError(f"turn {number}: damaged text (half a character)")
    if len(parts) != len(texts) + 1:
        return parts
    # a single image goes to the front, however it was written
    return [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]


def _expand_images(
    ids: list[int], labels: list[int], processor: Any, expected: int, count: int | None
) -> tuple[list[int], list[int]]:
    """Repeats each `<image>` token `count` times; visual tokens are never trained."""
    tokenizer = getattr(processor, "tokenizer", processor)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    image_id = -1 if image_id in (None, tokenizer.unk_token_id) else image_id
    if (found := ids.count(image_id)) != expected:
        raise ConversationError(
            f"{found} {IMAGE_TOKEN} tokens after tokenisation, expected {expected}; is "
            f"{IMAGE_TOKEN} a special token of this tokenizer?"
        )
    if count is None:
        visual = VisualTokens(processor)
        if visual.grids is not None:
            raise ConversationError(
                "num_visual_tokens: expected a number, as AnyRes gives each picture its own, got "
                "none"
            )
        count = visual.fixed
    places = np.asarray(ids) == image_id
    repeats = np.where(places, count, 1)
    targets = np.where(places, IGNORE_INDEX, labels)
    return np.repeat(ids, repeats).tolist(), np.repeat(targets, repeats).tolist()
