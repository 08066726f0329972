"""Token ids of captions: special tokens, instruction, truncation, padding."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat.labels import user_turn
from llm2clip_vlm.chat.text_tokens import control_notice, text_ids, text_tokens
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.runs.hashes import hash_json

PASS_TOKENS = 128
"""Tokens that take as long as the fixed cost of one more forward pass, about."""
_BLOCK = 4096


class CaptionTokenizer:
    """Token ids of captions, and which of them are pooled.

    Tokens of a text: what the tokenizer puts in front (bos), the chat template's header, the
    instruction, the text, the template's footer, what the tokenizer puts after (eos). The text
    and what follows it are pooled: what stands in front is the same everywhere and says nothing of
    the text, while what follows has seen all of it. Each is tokenized apart, so that the border
    is exact.

    Args:
        tokenizer: Adds special tokens as its own configuration says.
        max_length_tokens: Special tokens and instruction included.
        instruction: Text before every caption.
        chat: Wrap texts in a user turn of the tokenizer's chat template.
        pooling: `eos` puts an eos after texts where the tokenizer puts none.
        joined: The instruction is a part of the text and all tokens are pooled, as in
            sentence-transformers.

    Raises:
        ModelError: `max_length_tokens` leaves no room for a text, what the tokenizer adds
            cannot be separated from the text, or it has no eos to append.

    Paper: LLM2CLIP released code (instruction and header left out of the mean, eot kept in it).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length_tokens: int,
        instruction: str = "",
        *,
        chat: bool = False,
        pooling: str = "mean",
        joined: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        """The tokenizer itself."""
        self.num_truncated = 0
        """Texts cut so far."""
        self.longest = 0
        """Tokens of the longest text so far, before it was cut."""
        self.max_length_tokens = max_length_tokens
        """Special tokens and instruction included."""
        self.control: Counter[str] = Counter()
        """Names of control tokens that stood in texts so far; they were read as text."""
        self.turn = user_turn(tokenizer) if chat else ("", "")
        """Texts that the chat template puts before and after a text."""
        front, behind = _special_tokens(tokenizer)
        self._prefix = instruction if joined else ""
        self.joined = joined
        """The instruction is part of the text."""
        for text in (self.turn[0], "" if joined else instruction):
            front = front + self.ids(text)
        behind = self.ids(self.turn[1]) + behind
        if pooling == "eos":
            if tokenizer.eos_token_id is None:
                raise ModelError("pooling is 'eos', but the tokenizer has no eos token")
            behind = behind + [tokenizer.eos_token_id] * (behind[-1:] != [tokenizer.eos_token_id])
        self.front: list[int] = front
        """Tokens before every text."""
        self.behind: list[int] = behind
        """Tokens after every text."""
        self.leaves_out_front = pooling == "mean" and bool(front) and not joined
        """Tokens before a text are no part of its vector."""
        self._room = max_length_tokens - len(front) - len(behind)
        if self._room < 1:
            raise ModelError(
                f"max_length_tokens is {max_length_tokens}, but instruction and special tokens "
                f"alone take {len(front) + len(behind)}; raise it"
            )

    @property
    def num_front_tokens(self) -> int:
        """Tokens at the start of every text that are not pooled."""
        return 0 if self.joined else len(self.front)

    @property
    def pad_token_id(self) -> int:
        """Id of padding; never attended to, so any serves where the tokenizer has none."""
        return self.tokenizer.pad_token_id or 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, instruction and special tokens included, not padded.

        Texts that are too long are cut at the end (the tokens that follow a text are kept) and
        counted in :attr:`num_truncated`.

        Raises:
            ModelError: A text has no token.
        """
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _BLOCK):
            block = list(texts[start : start + _BLOCK])
            encoded = text_ids(self.tokenizer, block, prefix=self._prefix)
            self.control.update(text_tokens(self.tokenizer).count(block))
            for text, ids in zip(block, encoded, strict=True):
                if not ids:
                    raise ModelError(f"the text {text!r} has no token; leave it out")
                self.num_truncated += len(ids) > self._room
                self.longest = max(self.longest, len(self.front) + len(ids) + len(self.behind))
                tokens.append([*self.front, *ids[: self._room], *self.behind])
        return tokens

    def identity(self) -> list[Any]:
        """What the ids of a text depend on."""
        names = self.tokenizer.special_tokens_map
        return [self.fingerprint(), names, self._prefix, self.front, self.behind, self._room]

    def told(self) -> str:
        """What there is to say of the texts so far: their lengths, and names of control tokens."""
        return (
            f"text encoder: max_length_tokens {self.max_length_tokens}; the longest text has "
            f"{self.longest} tokens, {self.num_truncated} texts were cut\n"
            f"{control_notice(self.control)}"
        ).rstrip()

    def ids(self, text: str) -> list[int]:
        """Tokens of a piece of text alone, without special tokens."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found if text else []

    def add_prompt(self, tokens: Sequence[int], prompt: Sequence[int]) -> list[int]:
        """Puts a prompt between what stands in front of every text and the text.

        Args:
            tokens: Result of calling this object.
            prompt: :meth:`ids` of the prompt; the number of tokens that are not pooled grows by
                its length. A text that no longer fits is cut.

        Raises:
            ModelError: The prompt leaves no room for a text, or all tokens are pooled.
        """
        if self.joined:
            raise ModelError("an embedder pools all tokens: leave the source's prompts out")
        if len(prompt) >= self._room:
            raise ModelError(
                f"a prompt takes {len(prompt)} of the {self._room} tokens that max_length_tokens "
                "leaves for prompt and text; raise it"
            )
        front, end = len(self.front), len(tokens) - len(self.behind)
        body = tokens[front:end][: self._room - len(prompt)]
        return [*tokens[:front], *prompt, *body, *tokens[end:]]

    def fingerprint(self) -> str:
        """Hash of what turns text into ids; padding and truncation are left out."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content: Any = {"vocab": sorted(self.tokenizer.get_vocab().items())}
        if backend is not None:
            content = json.loads(backend.to_str())
            content["padding"] = content["truncation"] = None
        return hash_json(content)

    def require(self, fingerprint: str, where: str | Path) -> None:
        """Refuses a tokenizer that came back from disk as another one.

        AutoTokenizer picks a class by `model_type` for some models and rebuilds the tokenizer in
        that class's way, whatever `tokenizer.json` says; vectors would then differ unnoticed.

        Args:
            fingerprint: Fingerprint of the tokenizer that was saved.
            where: Directory of the tokenizer.

        Raises:
            ModelError: This tokenizer has another fingerprint.
        """
        if (got := self.fingerprint()) != fingerprint:
            raise ModelError(
                f"{where}: text_tokenizer is {got} as transformers {transformers.__version__} "
                f"loads it, expected {fingerprint}; use the version that saved it, or a model with "
                "its own architecture's tokenizer"
            )


def length_groups(
    lengths: npt.ArrayLike, budget_tokens: float = math.inf
) -> list[npt.NDArray[np.int64]]:
    """The cheapest groups of texts to pad together: rows of each, from long to short.

    The cost of a group is its tokens, padding counted, and :data:`PASS_TOKENS`.

    Args:
        lengths: Tokens of each text.
        budget_tokens: Tokens of a group at most, but for a single longer text.
    """
    # The best groups of the first n texts (the longest first) are a last group and the best ones of
    # those before it, so each n needs one look at the possible starts of its last group.
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    sizes = np.asarray(lengths, dtype=np.int64)[order]
    cost, start = np.zeros((2, len(order) + 1), dtype=np.int64)
    first = 0
    for end in range(1, len(order) + 1):
        while first < end - 1 and (end - first) * sizes[first] > budget_tokens:
            first += 1
        total = cost[first:end] + np.arange(end - first, 0, -1) * sizes[first:end]
        best = int(total.argmin())
        cost[end], start[end] = total[best] + PASS_TOKENS, first + best
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = int(start[end])
    return groups[::-1]


def pad_tokens(
    tokens: Sequence[npt.ArrayLike], pad_token_id: int, num_front_tokens: int | Sequence[int]
) -> dict[str, Tensor]:
    """Pads on the right and marks what is attended to and what is pooled.

    Args:
        tokens: Token ids of each text, at least one text.
        pad_token_id: Id of padding; never attended to.
        num_front_tokens: Tokens at the start of each text that are not pooled, for all or each.

    Returns:
        `input_ids` and `attention_mask` (int64 `[b, t]`), `pool_mask` (bool `[b, t]`).
    """
    rows = [np.asarray(ids, dtype=np.int64) for ids in tokens]
    lengths = torch.tensor([len(row) for row in rows])
    front = rearrange(torch.as_tensor(num_front_tokens), "... -> (...) 1")
    positions = torch.arange(int(lengths.max()))
    inside = positions < lengths[:, None]
    input_ids = torch.full(inside.shape, pad_token_id)
    input_ids[inside] = torch.from_numpy(np.concatenate(rows))
    return {
        "input_ids": input_ids,
        "attention_mask": inside.long(),
        "pool_mask": inside & (positions >= front),
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ModelError(
        f"the tokenizer turns 'a' into {bare}, but into {full} with special tokens; expected the "
        "former inside the latter"
    )
