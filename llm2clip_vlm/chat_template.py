"""Chat templates: finding one, letting it take images, and where it puts the answers.

A template is rendered once; the answers' character spans come from its `{% generation %}` markers
or, where it has none, from rendering it turn by turn. What a model is prompted with at inference
is checked to be a token prefix of what it is trained on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llm2clip_vlm.constants import IMAGE_TOKEN

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

VICUNA_V1_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' USER: ' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""Vicuna's `vicuna_v1`, LLaVA-1.5's stage 2 (LLaVA `llava/conversation.py`)."""

CHAT_TEMPLATES = {"vicuna_v1": VICUNA_V1_TEMPLATE}
"""Templates that a recipe may name instead of a file, for LLMs whose tokenizer has none."""

# Joins a message's parts into the text that text-only templates expect. An image is followed by a
# line break, as in LLaVA, unless the text after it brings its own white space.
_JOIN_PARTS = r"""
{%- set joined = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- set joined.text = '' -%}
  {%- if message['content'] is string -%}
    {%- set joined.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set joined.text = joined.text + '<image>' -%}
        {%- if not loop.last and (loop.nextitem['text'] | default('x'))[:1] not in ['\n', ' '] -%}
          {%- set joined.text = joined.text + '\n' -%}
        {%- endif -%}
      {%- elif part['type'] == 'text' -%}
        {%- set joined.text = joined.text + part['text'] -%}
      {%- else -%}
        {{- raise_exception('content of type ' + part['type'] + '; known are text and image') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


class ConversationError(ValueError):
    """A conversation or a chat template from which no labels can be made."""


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja source that a recipe's `chat_template` means.

    Args:
        name: A name in `CHAT_TEMPLATES`, a Jinja file, Jinja source, or None for the tokenizer's.
        tokenizer: The LLM's tokenizer.

    Raises:
        ConversationError: None is given and the tokenizer has none, or no such name or file.
    """
    if name is None:
        if isinstance(tokenizer.chat_template, str):
            return tokenizer.chat_template
        raise ConversationError(
            "the language model's tokenizer has no chat template; set `vlm.chat_template` to one "
            f"of {', '.join(CHAT_TEMPLATES)} or to a Jinja file"
        )
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if "{{" in name or "{%" in name:
        return name
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, CHAT_TEMPLATES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConversationError(
        f"chat_template {name!r} is neither a file nor one of {', '.join(CHAT_TEMPLATES)}{hint}"
    )


def accept_image_parts(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template, able to take content as a list of `{"type": "image"}` and `text` parts.

    A template that already does is returned as it is; before any other, the parts are joined to
    text with `<image>` for each image. Generation markers stay.
    """
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
    try:
        text = render(probe, template, tokenizer)
    except (jinja2.TemplateError, TypeError):
        text = ""
    native = text.count(IMAGE_TOKEN) == 1 and text.count("probe") == 1 and "'type'" not in text
    return template if native else _JOIN_PARTS.strip() + template


def template_of(processor_or_tokenizer: Any) -> str:
    """The template of a processor or tokenizer, able to take image parts.

    Raises:
        ConversationError: It has none.
    """
    template = processor_or_tokenizer.chat_template
    if not isinstance(template, str):
        raise ConversationError("no chat template; set one when the model is composed")
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    key = (template, id(tokenizer))
    if key not in _ACCEPTING:
        _ACCEPTING.clear()  # one model at a time; an id may come back for another tokenizer
        _ACCEPTING[key] = accept_image_parts(template, tokenizer)
    return _ACCEPTING[key]


_ACCEPTING: dict[tuple[str, int], str] = {}


def render(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> str:
    """Text of a conversation; with `prompt`, up to where the model begins to answer."""
    return _render_jinja(messages, template, tokenizer, add_generation_prompt=prompt)[0]


def _render_jinja(
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


def answer_spans(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """Renders a conversation and finds its answers.

    Args:
        messages: Normalised messages.
        template: Jinja source that takes image parts.
        tokenizer: Gives the special tokens' texts, and the tokens for the prefix check.

    Returns:
        The text, and `(begin, end)` characters of each answer.

    Raises:
        ConversationError: The template marks another number of answers, or (without markers)
            rewrites earlier turns or prompts with other tokens than it trains on.
    """
    if not _GENERATION.search(template):
        return _spans_from_prefixes(messages, template, tokenizer)
    text, spans = _render_jinja(messages, template, tokenizer, return_assistant_tokens_mask=True)
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != answers:
        raise ConversationError(
            f"the chat template marks {len(spans)} generation spans, expected {answers}"
        )
    return text, spans


def _spans_from_prefixes(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    text = render(messages, template, tokenizer)
    full_ids, _ = tokenize(tokenizer, text)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], template, tokenizer, prompt=True)
        answered = render(messages[: index + 1], template, tokenizer)
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise ConversationError(
                f"turn {index + 1}: the chat template rewrites earlier turns, so an answer's "
                "place cannot be found; put {% generation %} around the answer in the template"
            )
        check_prompt_prefix(tokenizer, prompt, full_ids, f"turn {index + 1}")
        spans.append((len(prompt), len(answered)))
    return text, spans


def check_prompt_prefix(
    tokenizer: PreTrainedTokenizerBase, prompt: str, full_ids: Sequence[int], where: str
) -> None:
    """Refuses a template whose inference prompt is no token prefix of the training sample.

    Raises:
        ConversationError: The tokens differ, with the first place where they do.
    """
    prompt_ids, _ = tokenize(tokenizer, prompt)
    if list(full_ids[: len(prompt_ids)]) == prompt_ids:
        return
    pairs = enumerate(zip(prompt_ids, full_ids, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), len(full_ids))
    raise ConversationError(
        f"{where}: the prompt {prompt[-40:]!r} is no token prefix of the training sample (token "
        f"{place} differs); a template whose prompt ends in a space does this: move the space to "
        "the answer"
    )


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
    encoded = tokenizer(text, add_special_tokens=add, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    offsets = [(int(begin), int(end)) for begin, end in encoded["offset_mapping"]]
    while add and ids and offsets[-1] == (0, 0) and len(ids) > 1:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that can end a turn: every special token but bos, unk and `<image>`; always eos."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    special -= {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.bos_token_id}
    special -= {tokenizer.unk_token_id}
    return special | ({tokenizer.eos_token_id} - {None})


def end_of_turn_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What `generation_config.eos_token_id` must hold: eos and the template's end-of-turn token."""
    probe: list[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    text = render(probe, template, tokenizer)
    prompt = render(probe[:1], template, tokenizer, prompt=True)
    answer, _ = tokenize(tokenizer, text)
    rest = answer[len(tokenize(tokenizer, prompt)[0]) :]
    written = [token for token in rest if token in stop_token_ids(tokenizer)][:1]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(eos + written))
