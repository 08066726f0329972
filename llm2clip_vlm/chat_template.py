"""Chat templates: finding one, letting it take images, and the labels that it makes.

A conversation is rendered once and tokenised once. The answers' characters come from the template's
`{% generation %}` markers or, where it has none, from rendering the turns before each answer; the
tokenizer's offsets turn characters into tokens.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llm2clip_vlm.constants import IGNORE_INDEX, IMAGE_TOKEN

Message = dict[str, Any]
Span = tuple[int, int]

_FOLDER = Path(__file__).with_name("templates")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationError(ValueError):
    """A conversation or a chat template from which no labels can be made."""


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja source that a recipe's `chat_template` means.

    Args:
        name: A template of ours (`vicuna_v1`, `llama3`, `qwen`, `mistral`, `gemma`), a Jinja file,
            Jinja source, or None for the tokenizer's.
        tokenizer: The LLM's tokenizer.

    Raises:
        ConversationError: None is given and the tokenizer has none, or no such name or file.
    """
    known = sorted(path.stem for path in _FOLDER.glob("[!_]*.jinja"))
    if name is None:
        if isinstance(tokenizer.chat_template, str):
            return tokenizer.chat_template
        raise ConversationError(
            "the language model's tokenizer has no chat template; set `vlm.chat_template` to one "
            f"of {', '.join(known)} or to a Jinja file"
        )
    if "{{" in name or "{%" in name:
        return name
    path = _FOLDER / f"{name}.jinja" if name in known else Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConversationError(
        f"chat_template {name!r} is neither a file nor one of {', '.join(known)}{hint}"
    )


@lru_cache(maxsize=2)
def accept_image_parts(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    r"""The template, able to take content as a list of `{"type": "image"}` and `text` parts.

    A template that already does is returned as it is; before any other, the parts are joined to
    text, each image as `<image>` and, unless white space follows, a line break, as in LLaVA.
    """
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
    try:
        text = render(probe, template, tokenizer)
    except (jinja2.TemplateError, TypeError):
        text = ""
    native = text.count(IMAGE_TOKEN) == 1 and text.count("probe") == 1 and "'type'" not in text
    return template if native else (_FOLDER / "_join_parts.jinja").read_text() + template


def template_of(processor_or_tokenizer: Any) -> str:
    """The template of a processor or tokenizer, able to take image parts.

    Raises:
        ConversationError: It has none.
    """
    template = processor_or_tokenizer.chat_template
    if not isinstance(template, str):
        raise ConversationError("no chat template; set one when the model is composed")
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    return accept_image_parts(template, tokenizer)


def render(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> str:
    """Text of a conversation; with `prompt`, up to where the model begins to answer."""
    return _render(messages, template, tokenizer, add_generation_prompt=prompt)[0]


def _render(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, **options: bool
) -> tuple[str, list[Span]]:
    """Text, and the spans of its `{% generation %}` blocks if asked for."""
    arguments: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
    result: Any = render_jinja_template(
        conversations=[list(messages)], chat_template=template, **arguments
    )
    texts, spans = result
    return texts[0], [(begin, end) for begin, end in spans[0]] if spans else []


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's own template writes before and behind a user's text.

    Taken from a later turn of a conversation, so that no system prompt and no date is in it.

    Returns:
        Such as `<|im_start|>user` with its line break, and `<|im_end|>` without what follows it.

    Raises:
        ConversationError: The tokenizer has no template, or it rewrites earlier turns.

    Paper: LLM2CLIP released code, which knows Llama 3's header by the model's name.
    """
    template = find_chat_template(None, tokenizer)
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}]
    end = render(turns, template, tokenizer).rpartition("second")[2]
    more = render([*turns, {"role": "user", "content": "third"}], template, tokenizer)
    rest = more.rpartition("second")[2]
    before, found, behind = rest.removeprefix(end).partition("third")
    if not found or not rest.startswith(end) or "second" not in more:
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
        ConversationError: The template marks another number of answers, rewrites earlier turns, or
            writes no end-of-turn token; or a token joins a prompt and its answer.
    """
    text, spans = _answers(messages, template, tokenizer)
    ids, offsets = tokenize(tokenizer, text)
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    stops = _stop_tokens(tokenizer)
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
        inside = [i for i in range(first, last) if ids[i] in stops]
        ended = inside or [i for i in range(last, min(last + 1, len(ids))) if ids[i] in stops]
        if not ended:
            raise ConversationError(
                f"the chat template writes no end-of-turn token after {text[begin:end][-40:]!r}, "
                "so the model would not learn to stop; add eos_token to the template"
            )
        labels[first : ended[-1] + 1] = ids[first : ended[-1] + 1]
    return ids, labels


def _answers(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The rendered conversation, and `(begin, end)` characters of each answer."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if _GENERATION.search(template):
        text, spans = _render(messages, template, tokenizer, return_assistant_tokens_mask=True)
        if len(spans) != len(answers):
            raise ConversationError(
                f"the chat template marks {len(spans)} generation spans, expected {len(answers)}"
            )
        return text, spans
    text, spans = render(messages, template, tokenizer), []
    for index in answers:
        prompt = render(messages[:index], template, tokenizer, prompt=True)
        answered = render(messages[: index + 1], template, tokenizer)
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise ConversationError(
                f"turn {index + 1}: the chat template rewrites earlier turns, so an answer's "
                "place cannot be found; put {% generation %} around the answer in the template"
            )
        spans.append((len(prompt), len(answered)))
    return text, spans


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Ids and character offsets; special tokens as `ProcessorMixin.apply_chat_template` adds them.

    That is: bos is added where the tokenizer does so and the template has not written it. An eos
    that the tokenizer would add at the end is dropped: a prompt must not end with one.
    """
    if not tokenizer.is_fast:
        raise ConversationError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
        )
    bos = tokenizer.bos_token
    add = not (bos and text.startswith(bos))
    encoded = tokenizer(text, add_special_tokens=add, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    offsets = [(int(begin), int(end)) for begin, end in encoded["offset_mapping"]]
    while add and ids and offsets[-1] == (0, 0) and len(ids) > 1:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


@lru_cache(maxsize=2)
def _stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that can end a turn: every special token but bos, unk and `<image>`; always eos."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    special -= {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.bos_token_id}
    special -= {tokenizer.unk_token_id}
    return frozenset(special | ({tokenizer.eos_token_id} - {None}))


def _probe(text: str) -> list[Message]:
    content = [{"type": "text", "text": text}]
    answer = [{"type": "text", "text": "it is red"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def end_of_turn_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What `generation_config.eos_token_id` must hold: eos and the template's end-of-turn token."""
    labels = label(_probe("what is it ?"), template, tokenizer)[1]
    last = [token for token in labels if token != IGNORE_INDEX][-1]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*eos, last]))


def check_chat_template(processor_or_tokenizer: Any) -> None:
    """Checks once that what a model is prompted with is what stands before a trained answer.

    Raises:
        ConversationError: As :func:`label`, or the prompt's tokens differ.
    """
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    template = template_of(processor_or_tokenizer)
    messages = _probe("What is it?")
    ids, labels = label(messages, template, tokenizer)
    prompt = render(messages[:1], template, tokenizer, prompt=True)
    before = ids[: next(i for i, token in enumerate(labels) if token != IGNORE_INDEX)]
    if tokenize(tokenizer, prompt)[0] != before:
        raise ConversationError(
            f"the chat template prompts with {prompt[-40:]!r} but trains answers after "
            f"{tokenizer.decode(before)[-40:]!r}; is {{% generation %}} around all of the answer, "
            "and does the prompt end in a space? Move the space to the answer"
        )
