"""Chat templates: finding one, letting it take images, rendering."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat.jinja_budget import RenderError, render_within_budget
from llm2clip_vlm.chat.text_tokens import Span
from llm2clip_vlm.constants import IMAGE_TOKEN

Message = dict[str, Any]

_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = date(2024, 7, 26)  # which Llama 3's template has where it cannot ask for today's

_FOLDER = Path(__file__).with_name("templates")


class ConversationError(ValueError):
    """A conversation or a chat template from which no labels can be made."""


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the Jinja source that a recipe's `chat_template` names.

    Args:
        name: A template of this package (`vicuna_v1`, `llama3`, `qwen`, `mistral`, `gemma`) or of
            the tokenizer, a Jinja file, or Jinja source. None: the template of the tokenizer.
        tokenizer: The LLM's tokenizer.

    Raises:
        ConversationError: There is no such name or file, or the tokenizer has no template.
    """
    known = sorted(path.stem for path in _FOLDER.glob("[!_]*.jinja"))
    own = _own_templates(tokenizer)
    if name is None:
        if "default" in own or len(own) == 1:
            return own.get("default") or next(iter(own.values()))
        has = f"only templates named {', '.join(own)}" if own else "no chat template"
        raise ConversationError(
            f"the language model's tokenizer has {has}; set `vlm.chat_template` to one "
            f"of {', '.join([*own, *known])} or to a Jinja file"
        )
    if "{{" in name or "{%" in name:
        return name
    if name in own and name not in known:
        return own[name]
    known += own
    path = _FOLDER / f"{name}.jinja" if name in known else Path(name)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")  # Windows writes a mark
    except (OSError, ValueError) as error:
        raise ConversationError(f"chat_template {name!r} cannot be read ({error})") from error
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConversationError(
        f"chat_template {name!r} is neither a file nor one of {', '.join(known)}{hint}"
    )


def _own_templates(holder: Any) -> dict[str, str]:
    """The templates of a processor or tokenizer by their names."""
    template = holder.chat_template
    named = template if isinstance(template, Mapping) else {"default": template}
    return {name: source for name, source in named.items() if isinstance(source, str)}


@lru_cache(maxsize=2)
def accept_image_parts(
    template: str, tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN
) -> str:
    r"""Make a template take content as a list of `{"type": "image"}` and `text` parts.

    A template that already does is returned as it is; before any other, the parts are joined to
    text, each image as `<image>` and, unless white space follows, a line break, as in LLaVA. A
    template that asks for the date (Llama 3.2, SmolLM3, Granite) gets one that stays: by today's,
    a run that goes on tomorrow has other tokens, and a model is asked what it was not trained on.
    """
    template = _TODAY.sub(lambda found: repr(_DAY.strftime(found[2])), template)
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
    try:
        text = render(probe, template, tokenizer)
    except ConversationError:
        text = ""
    native = text.count(image_token) == 1 and text.count("probe") == 1 and "'type'" not in text
    return template if native else (_FOLDER / "_join_parts.jinja").read_text() + template


def template_of(processor_or_tokenizer: Any) -> str:
    """The template of a processor or tokenizer, able to take image parts.

    Raises:
        ConversationError: It has no template.
    """
    own = _own_templates(processor_or_tokenizer)
    if "default" not in own:
        raise ConversationError("no chat template; set one when the model is composed")
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    image_token = getattr(processor_or_tokenizer, "image_token", None) or IMAGE_TOKEN
    return accept_image_parts(own["default"], tokenizer, image_token)


def render(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> str:
    """Text of a conversation; with `prompt`, up to where the model begins to answer."""
    return render_with_spans(messages, template, tokenizer, add_generation_prompt=prompt)[0]


def render_with_spans(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, **options: bool
) -> tuple[str, list[Span]]:
    """Text, and the spans of its `{% generation %}` blocks if asked for."""
    arguments: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
    try:
        return render_within_budget(template, messages, arguments)
    except RenderError as error:
        where = tokenizer.name_or_path
        of = f" of {where}" if where else ""
        raise ConversationError(f"the chat template{of} fails here: {error}") from error
