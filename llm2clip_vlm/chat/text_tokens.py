"""Text is not protocol: no text of a data file becomes a control token.

A tokenizer finds `</s>` or `<|im_end|>` in any text. Here text is tokenised as always, and only
where a control token comes out is it tokenised again, by a copy of the tokenizer in which each
control token has a secret name: the text's `</s>` is then seven letters and signs like any others,
in the context of their neighbours.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class TextTokens:
    """A tokenizer's control tokens, and tokens of texts that hold their names.

    Control are all special tokens, and the added tokens that the chat template writes. Other added
    tokens (such as a recipe's `vlm.extra_tokens`) are words: they stay whole.

    Args:
        tokenizer: A tokenizer; a slow one gives no offsets.
        template: Jinja source of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        self._tokenizer = tokenizer
        found = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in template and _is_sign(token.content))
        }
        found |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.tokens: dict[str, int] = {name: found[name] for name in sorted(found, key=len)[::-1]}
        """Name to id, longer names first."""
        self.ids = frozenset(found.values()) - {tokenizer.unk_token_id}
        """Ids that only a template or the tokenizer itself may write; unk is what text can give."""
        self._unknown = tokenizer.unk_token
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        self._starts = sorted({ord(name.strip()[0]) for name in self.tokens if name.strip()})
        key = secrets.token_hex(8)  # no data file can contain it
        self._names = {name: f"x{key}q{number}z" for number, name in enumerate(self.tokens)}
        self._copy: tuple[Tokenizer, dict[int, int]] | None = None

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """Count how often each control token's name stands in texts."""
        return Counter(name for text in texts for name in self._pattern.findall(text))

    def are_in(self, ids: Sequence[int], text: str) -> bool:
        """Whether the tokens of a text, without those that the tokenizer adds, hold control."""
        return self.holds_unknown([text]) or not self.ids.isdisjoint(ids)

    def holds_unknown(self, texts: Iterable[str]) -> bool:
        """Whether a text holds the name of unk, whose id any text can have."""
        return self._unknown is not None and any(self._unknown in text for text in texts)

    def control(self, ids: Sequence[int]) -> list[int]:
        """The control tokens among ids, in order."""
        return [index for index in ids if index in self.ids]

    def hidden(self, texts: Iterable[str]) -> tuple[dict[int, str], dict[int, str]]:
        """Tables for `str.translate`, forth and back: the first leaves no control token's name.

        Args:
            texts: Texts, which do not contain the characters that stand for others.
        """
        used = set[str]().union(*texts)
        free = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in used)
        hide = dict(zip(self._starts, free, strict=False))
        return hide, {ord(sign): chr(code) for code, sign in hide.items()}

    def named(self, text: str) -> str:
        """A text with each control token under its secret name."""
        return self._pattern.sub(lambda found: self._names[found[0]], text)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None
    ) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of a text in which names of control tokens are text.

        Args:
            text: Result of :meth:`named`, whose names are control tokens.
            add_special_tokens: Let the tokenizer put its special tokens around it.
            max_length: Cut to this many tokens.
        """
        if not self._tokenizer.is_fast:
            options: dict[str, Any] = {"truncation": max_length is not None}
            ids = self._tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                max_length=max_length,
                split_special_tokens=True,
                **options,
            )["input_ids"]
            return list(ids), [(0, 0)] * len(ids)
        if self._copy is None:
            self._copy = self._copied()
        copy, ids_of = self._copy
        encoding = copy.encode(text, add_special_tokens=add_special_tokens)
        if max_length is not None and len(encoding.ids) > max_length:
            body = copy.encode(text, add_special_tokens=False)
            body.truncate(max_length - copy.num_special_tokens_to_add(False))
            encoding = copy.post_process(body)
        return [ids_of.get(index, index) for index in encoding.ids], list(encoding.offsets)

    def _copied(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with renamed control tokens, and what its ids are in the original."""
        whole = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names, model = self._names, whole["model"]
        whole["truncation"] = whole["padding"] = None
        added: dict[str, int] = {}
        for token in whole["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
            added[token["content"]] = token["id"]
        vocabulary = model["vocab"]  # of Unigram a list of (piece, score)
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if merges := model.get("merges"):
            pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
            model["merges"] = [
                pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))
            ]
        copy = Tokenizer.from_str(json.dumps(whole))
        ids = copy.get_vocab(with_added_tokens=True)
        return copy, {ids[content]: index for content, index in added.items()}


def _is_sign(token: str) -> bool:
    return not (token.isspace() or token.isalnum())


def control_notice(found: Counter[str]) -> str:
    """One line on control tokens' names that were found in texts; empty where there are no such.

    Args:
        found: Result of :meth:`TextTokens.count`.
    """
    names = ", ".join(f"{name} {count} times" for name, count in found.most_common(8))
    return f"names of control tokens in texts, read as text: {names}" if found else ""


@lru_cache(maxsize=8)
def _text_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, size: int, special: tuple[str, ...]
) -> TextTokens:
    return TextTokens(tokenizer, template)


def text_tokens(tokenizer: PreTrainedTokenizerBase, template: str = "") -> TextTokens:
    """The control tokens of a tokenizer as it is now, kept for the next call."""
    special = tuple(tokenizer.special_tokens_map.values())
    return _text_tokens(tokenizer, template, len(tokenizer), tuple(map(str, special)))


def text_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prefix: str = "",
    add_special_tokens: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    """Token ids of texts, without control tokens but those that the tokenizer adds itself.

    Args:
        tokenizer: The tokenizer.
        texts: Texts of a data file.
        prefix: Stands before each; it is no data, and may hold control tokens.
        add_special_tokens: Let the tokenizer put its special tokens around each.
        max_length: Cut each to this many tokens.
    """
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
    encoded = tokenizer(
        [prefix + text for text in texts],
        add_special_tokens=add_special_tokens,
        return_special_tokens_mask=add_special_tokens,
        verbose=False,
        **options,
    )
    rows: list[list[int]] = encoded["input_ids"]
    known = text_tokens(tokenizer)
    written = bool(prefix and known.count([prefix]))
    for number, (text, ids) in enumerate(zip(texts, rows, strict=True)):
        own = ids
        if add_special_tokens:
            mask = encoded["special_tokens_mask"][number]
            own = [index for index, put in zip(ids, mask, strict=True) if not put]
        if written or known.are_in(own, text):
            rows[number], _ = known.encode(
                known.named(prefix) + text,
                add_special_tokens=add_special_tokens,
                max_length=max_length,
            )
    return rows
