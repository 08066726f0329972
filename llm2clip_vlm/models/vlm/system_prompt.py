"""Another default system prompt, or no prompt, for any chat template.

The template itself is rewritten, so that training, generation and users of the exported processor
see the same conversation. A conversation that brings a system turn is not touched.
"""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat.labels import user_turn
from llm2clip_vlm.chat.template import ConversationError, Message, render

_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
_NO_OWN = "messages[0]['role'] != 'system'"


def with_system_prompt(template: str, text: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Rewrite a chat template so that conversations without a system turn begin otherwise.

    Args:
        template: Jinja source that takes image parts.
        text: The system turn that the template writes by default. Empty: nothing but bos stands
            before the first user's turn. None: the template stays.
        tokenizer: Tokenizer of the language model, all tokens added.

    Raises:
        ConversationError: The template takes no system turn or leaves its text out, the text names
            a token, or it is not clear where the first user's turn begins.

    Example:
        >>> with_system_prompt(smollm2_template, "", tokenizer)  # doctest: +SKIP
    """
    if text is None:
        return template
    user = _turn("user", [{"type": "text", "text": "what is it ?"}])
    own = [_turn("system", "be brief ."), user]
    try:
        had = render(own, template, tokenizer)
    except ConversationError:
        had = None  # it takes no system turn
    if text.strip():
        found = _given(template, text, tokenizer)
        want = render([_turn("system", text), user], template, tokenizer) if had else ""
        if text.strip() not in want:
            raise ConversationError(
                f"vlm.system_prompt: the chat template takes no system turn, got {text[:80]!r}; "
                "leave it out, or set vlm.chat_template to one that does"
            )
    else:
        found, want = _dropped(template, user, tokenizer)
    if render([user], found, tokenizer) != want or (had and render(own, found, tokenizer) != had):
        raise ConversationError(
            "vlm.system_prompt: rewritten, the chat template writes something else, got "
            f"{render([user], found, tokenizer)!r}, expected {want!r}; leave vlm.system_prompt out "
            "and set vlm.chat_template to a Jinja file without that prompt"
        )
    return found


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _given(template: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if named := sorted(t for t in tokens if t in text and not (t.isspace() or t.isalnum())):
        raise ConversationError(
            f"vlm.system_prompt: expected text without names of tokens, got {named}"
        )
    turn = f"[{{'role': 'system', 'content': {json.dumps(text, ensure_ascii=False)}}}]"
    return f"{{% if {_NO_OWN} %}}{{% set messages = {turn} + messages %}}{{% endif %}}{template}"


def _dropped(template: str, user: Message, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The new template, and what it writes for one question; both unchanged if nothing is dropped.

    What stands before the first user's turn may hold today's date, so it is cut where that turn
    begins. Blocks are rendered out of order then: answers are found without their marks.
    """
    before, _ = user_turn(tokenizer, template)
    bos = tokenizer.bos_token or ""
    text = render([user], template, tokenizer)
    head, found, tail = text.partition(before) if before else ("", "", "")
    if not tail.startswith("what is it ?"):
        raise ConversationError(
            f"vlm.system_prompt: the first user's turn {text[:200]!r} begins otherwise than later "
            f"ones ({before!r}), so the system prompt cannot be cut off; set vlm.chat_template to "
            "a Jinja file without it"
        )
    if head in ("", bos):  # SmolLM2's bos is the <|im_start|> of each turn
        return template, text
    kept = bos if head.startswith(bos) and not before.startswith(bos) else ""
    unmarked = _GENERATION.sub(_no_mark, template.removesuffix("\n"))
    mark, start = (json.dumps(value, ensure_ascii=False) for value in (before, kept))
    cut = (
        f"{{% set whole %}}{unmarked}{{% endset %}}{{% set cut = whole.partition({mark}) %}}"
        f"{{{{ {start} + cut[1] + cut[2] if {_NO_OWN} and cut[1] else whole }}}}"
    )
    return cut, kept + found + tail


def _no_mark(found: re.Match[str]) -> str:
    return f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}"
