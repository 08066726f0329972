"""Token ids and labels of conversations.

A conversation is rendered once and tokenised once. The answers' characters come from the template's
`{% generation %}` markers or, where it has none, from rendering the turns before each answer; the
tokenizer's offsets turn characters into tokens. Only the template writes control tokens: where
contents hold their names, they are rendered with other signs in their place and tokenised as text
(:mod:`llm2clip_vlm.chat.text_tokens`).
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat import template as templates
from llm2clip_vlm.chat.jinja_budget import RENDER_LIMIT_S, has_generation
from llm2clip_vlm.chat.template import ConversationError, Message
from llm2clip_vlm.chat.text_tokens import Span, TextTokens, text_tokens
from llm2clip_vlm.constants import IGNORE_INDEX, IMAGE_TOKEN


def user_turn(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> tuple[str, str]:
    """Find what a template (None: the tokenizer has one) writes before and after a user's text.

    Taken from a later turn of a conversation, so that no system prompt and no date is in it.

    Returns:
        Both texts, such as `<|im_start|>user` with its line break, and `<|im_end|>` alone.

    Raises:
        ConversationError: The tokenizer has no template, or it rewrites earlier turns.

    Paper: LLM2CLIP released code, which knows Llama 3's header by the model's name.
    """
    template = template or templates.find_chat_template(None, tokenizer)
    template = templates.accept_image_parts(template, tokenizer)
    turns = _probe("first")
    end = templates.render(turns, template, tokenizer).rpartition(_ANSWER)[2]
    more = templates.render([*turns, _probe("third")[0]], template, tokenizer)
    rest = more.rpartition(_ANSWER)[2]
    before, found, behind = rest.removeprefix(end).partition("third")
    if not found or not rest.startswith(end) or _ANSWER not in more:
        raise ConversationError(
            f"the chat template writes {rest!r} after an answer, expected {end!r} and a user's "
            "turn; leave `chat` out"
        )
    return before, behind.rstrip()


def label(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels on each answer and the token that ends it.

    Args:
        messages: Turns with roles `system`, `user` and `assistant`.
        template: Jinja source that takes image parts.
        tokenizer: A fast one.

    Returns:
        `(input_ids, labels)`; `IGNORE_INDEX` where nothing is trained, each `<image>` one token.

    Raises:
        ConversationError: The template leaves out a turn, marks another number of answers, rewrites
            earlier turns, or writes no end-of-turn token; or a token joins a prompt and its answer.
    """
    # One tokenisation of the whole text, whose offsets say which tokens an answer has: pieces that
    # are tokenised apart and added up disagree with it where a token would cross their border.
    # Example: "A: red</s>" is tokenised as [A, :, _red, </s>]; "A:" and " red" apart may be
    # [A, :] and [_, red]. The answer's characters 3 to 6 pick the token `_red` (its blank belongs
    # to the prompt) and the end of the turn: labels [-100, -100, _red, </s>].
    text, spans, ids, offsets = _encoded(messages, template, tokenizer)
    stops = _ends_of_turns(template, tokenizer, len(tokenizer))
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    labels = [IGNORE_INDEX] * len(ids)
    for begin, end in spans:
        first, last = bisect_right(ends, begin), bisect_left(begins, end)
        if first >= last:
            raise ConversationError(f"the answer {text[begin:end]!r} has no token")
        if text[begins[first] : begin].strip():
            raise ConversationError(
                f"the token {text[begins[first] : ends[first]]!r} joins prompt and answer; the "
                "template needs a separator before the answer"
            )
        ended = [i for i in range(first, last) if ids[i] in stops]
        while not ended and last < len(ids):
            ended = [last] if ids[last] in stops else []
            if text[begins[last] : ends[last]].strip():
                break
            last += 1
        if not ended:
            raise ConversationError(
                f"the chat template writes no end-of-turn token after {text[begin:end][-40:]!r}, "
                "so the model would not learn to stop; add eos_token to the template"
            )
        labels[first : ended[-1] + 1] = ids[first : ended[-1] + 1]
    return ids, labels


def prompt_text(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, dict[int, str]]:
    """A conversation up to where the model begins to answer, and characters that stand for others.

    The first character of a text that would become a control token is replaced by another one;
    `str.translate` with the table, after `TextTokens.named`, gives the text back.
    """
    text = templates.render(messages, template, tokenizer, prompt=True)
    hide, show = _to_hide(messages, template, tokenizer, tokenize(tokenizer, text)[0], prompt=True)
    if hide:
        messages = _with_texts(messages, lambda content: content.translate(hide))
        text = templates.render(messages, template, tokenizer, prompt=True)
    return text, show


def _encoded(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span], list[int], list[Span]]:
    """Text, answers' spans in it, ids and offsets of a conversation whose contents stay text."""
    text, spans = _answers(messages, template, tokenizer)
    for number, message in enumerate(messages, start=1):
        if isinstance(content := message["content"], list) and str(content) in text:
            raise ConversationError(
                f"turn {number}: the chat template writes Python's {str(content)[:80]!r}, expected "
                f"its text; let it go through the parts of a turn of role {message['role']}, too"
            )
        for said in texts_of([message]):  # what a model has thought, a template may leave out
            if (words := said.rpartition("</think>")[2].strip()) not in text:
                raise ConversationError(
                    f"turn {number}: the chat template leaves out or changes what is said, "
                    f"{words[:80]!r}"
                )
    ids, offsets = tokenize(tokenizer, text)
    known = text_tokens(tokenizer, template)
    hide, show = _to_hide(messages, template, tokenizer, ids)
    if not hide:
        return text, spans, ids, offsets
    messages = _with_texts(messages, lambda content: content.translate(hide))
    text, spans = _answers(messages, template, tokenizer)
    borders = sorted({0, len(text), *(place for span in spans for place in span)})
    pieces = [known.named(text[begin:end]).translate(show) for begin, end in pairwise(borders)]
    moved, length = {0: 0}, 0
    for border, piece in zip(borders[1:], pieces, strict=True):
        moved[border] = length = length + len(piece)
    text = "".join(pieces)
    ids, offsets = tokenize(tokenizer, text, known)
    return text, [(moved[begin], moved[end]) for begin, end in spans], ids, offsets


def texts_of(messages: Sequence[Message]) -> Iterator[str]:
    """The texts of normalised messages."""
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if "text" in part)


def _with_texts(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    """The messages with each of their texts changed."""

    def changed(content: Any) -> Any:
        if isinstance(content, str):
            return change(content)
        return [p | {"text": change(p["text"])} if "text" in p else p for p in content]

    return [message | {"content": changed(message["content"])} for message in messages]


def _to_hide(
    messages: list[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    *,
    prompt: bool = False,
) -> tuple[dict[int, str], dict[int, str]]:
    """Tables of `TextTokens.hidden`; empty where the contents of these ids are text."""
    known, contents = text_tokens(tokenizer, template), list(texts_of(messages))
    form = json.dumps(_with_texts(messages, lambda _: "a"))
    written = _written(form, template, tokenizer, len(tokenizer), prompt)
    if known.control(ids) == written and not known.holds_unknown(contents):
        return {}, {}
    return known.hidden(contents)


@lru_cache(maxsize=4096)
def _written(
    form: str, template: str, tokenizer: PreTrainedTokenizerBase, size: int, prompt: bool
) -> list[int] | None:
    """The control tokens that the template writes around the texts of messages, given as JSON."""
    try:
        text = templates.render(json.loads(form), template, tokenizer, prompt=prompt)
    except ConversationError:
        return None
    return text_tokens(tokenizer, template).control(tokenize(tokenizer, text)[0])


def _answers(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The rendered conversation, and `(begin, end)` characters of each answer."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if has_generation(template):
        text, spans = templates.render_with_spans(messages, template, tokenizer)
        if len(spans) != len(answers):
            raise ConversationError(
                f"the chat template marks {len(spans)} generation spans, expected {len(answers)}"
            )
        return text, spans
    text, spans = templates.render(messages, template, tokenizer), []
    until = time.thread_time() + 2 * RENDER_LIMIT_S
    for index in answers:
        if time.thread_time() > until:
            raise ConversationError(
                f"to find {len(answers)} answers without {{% generation %}} takes too long"
            )
        prompt = templates.render(messages[:index], template, tokenizer, prompt=True)
        answered = templates.render(messages[: index + 1], template, tokenizer)
        if not text.startswith(answered):  # Phi 3 writes one token more after the last turn
            answered = commonprefix([text, answered])  # noqa: RUF071
        said = [words.strip() for words in texts_of([messages[index]])]
        shown = answered[len(prompt) :]
        if not answered.startswith(prompt) or not all(words in shown for words in said):
            raise ConversationError(
                f"turn {index + 1}: the chat template rewrites earlier turns, so an answer's "
                "place cannot be found; put {% generation %} around the answer in the template"
            )
        spans.append((len(prompt), len(answered)))
    return text, spans


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, known: TextTokens | None = None
) -> tuple[list[int], list[Span]]:
    """Ids and character offsets; special tokens as `ProcessorMixin.apply_chat_template` adds them.

    That is: bos is added where the tokenizer does so and the template has not written it. An eos
    that the tokenizer would add at the end is dropped: a prompt must not end with one.

    Args:
        tokenizer: A fast tokenizer.
        text: A rendered conversation.
        known: Names of the control tokens; all else is text.
    """
    if not tokenizer.is_fast:
        raise ConversationError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
        )
    bos = tokenizer.bos_token
    if known is not None:
        add = not (bos and text.startswith(known.named(bos)))
        ids, offsets = known.encode(text, add_special_tokens=add)
    else:
        add = not (bos and text.startswith(bos))
        encoded = tokenizer(
            text, add_special_tokens=add, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded["input_ids"])
        offsets = [(int(begin), int(end)) for begin, end in encoded["offset_mapping"]]
    while add and ids and offsets[-1] == (0, 0) and len(ids) > 1:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


@lru_cache(maxsize=2)
def _ends_of_turns(template: str, tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Ids that the template ends answers with: the first control token after an answer's text.

    Bos, unk and `<image>` never are, eos always is.
    """
    control = set(text_tokens(tokenizer, template).ids)
    control -= {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.bos_token_id}
    control |= {tokenizer.eos_token_id} - {None}
    try:
        text, spans = _answers([*_probe("what is it ?")] * 2, template, tokenizer)
    except ConversationError:  # it may take one question alone
        text, spans = _answers(_probe("what is it ?"), template, tokenizer)
    ids, offsets = tokenize(tokenizer, text)
    found = {tokenizer.eos_token_id} - {None}
    for begin, end in spans:
        place = text.find(_ANSWER, begin, end)
        behind = begin if place < 0 else place + len(_ANSWER)
        rest = (i for i, (at, to) in zip(ids, offsets, strict=True) if at >= behind and to > at)
        found |= {next((index for index in rest if index in control), tokenizer.eos_token_id)}
    return frozenset(found)


_ANSWER = "it is red"


def _probe(text: str) -> list[Message]:
    content = [{"type": "text", "text": text}]
    answer = [{"type": "text", "text": _ANSWER}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def end_of_turn_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids for `generation_config.eos_token_id`: eos and the template's end-of-turn tokens."""
    label(_probe("what is it ?"), template, tokenizer)
    ends = _ends_of_turns(template, tokenizer, len(tokenizer))
    return sorted(ends, key=lambda index: (index != tokenizer.eos_token_id, index))


def check_chat_template(processor_or_tokenizer: Any) -> None:
    """Check that a prompt ends with the tokens that stand before a trained answer.

    Raises:
        ConversationError: See :func:`label`; or the prompt's tokens differ.
    """
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    template = templates.template_of(processor_or_tokenizer)
    messages = _probe("What is it?")
    ids, labels = label(messages, template, tokenizer)
    prompt = templates.render(messages[:1], template, tokenizer, prompt=True)
    before = ids[: next(i for i, token in enumerate(labels) if token != IGNORE_INDEX)]
    if tokenize(tokenizer, prompt)[0] != before:
        raise ConversationError(
            f"the chat template prompts with {prompt[-40:]!r} but trains answers after "
            f"{tokenizer.decode(before)[-40:]!r}; is {{% generation %}} around all of the answer, "
            "and does the prompt end in a space? Move the space to the answer"
        )
