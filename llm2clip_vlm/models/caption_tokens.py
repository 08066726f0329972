"""Captions to token ids: special tokens, instruction, truncation, padding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BLOCK = 4096


class TextEncoderError(ValueError):
    """A language model cannot serve as the text encoder that was asked for."""


class CaptionTokenizer:
    """Token ids of captions, and which of them are pooled.

    Tokens of a text: what the tokenizer puts in front (bos), the instruction, the text, what the
    tokenizer puts behind (eos). The text and what follows it are pooled: bos and the instruction
    are the same everywhere and say nothing of the text, while an eos that the tokenizer itself
    adds has seen all of it. Instruction and text are tokenized apart, so that the border is exact.

    Args:
        tokenizer: Adds special tokens as its own configuration says.
        max_length_tokens: Special tokens and instruction included.
        instruction: Text before every caption.

    Raises:
        TextEncoderError: `max_length_tokens` leaves no room for a text, or what the tokenizer
            adds cannot be told from the text.

    Paper: LLM2CLIP released code (instruction and header left out of the mean, eot kept in it).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, instruction: str = ""
    ) -> None:
        self.tokenizer = tokenizer
        """The tokenizer itself."""
        self.num_truncated = 0
        """Texts cut so far."""
        front, self._behind = _special_tokens(tokenizer)
        if instruction:
            front = front + tokenizer(instruction, add_special_tokens=False)["input_ids"]
        self._front = front
        self._room = max_length_tokens - len(self._front) - len(self._behind)
        if self._room < 1:
            raise TextEncoderError(
                f"max_length_tokens is {max_length_tokens}, but instruction and special tokens "
                f"alone take {len(self._front) + len(self._behind)}; raise it"
            )

    @property
    def num_front_tokens(self) -> int:
        """Tokens at the start of every text that are not pooled."""
        return len(self._front)

    @property
    def pad_token_id(self) -> int:
        """Id that fills up; never attended to, so any serves where the tokenizer has none."""
        return self.tokenizer.pad_token_id or 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, instruction and special tokens included, not padded.

        Texts that are too long are cut behind (the tokens that follow a text are kept) and
        counted in :attr:`num_truncated`.

        Raises:
            TextEncoderError: A text has no token.
        """
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _BLOCK):
            block = list(texts[start : start + _BLOCK])
            ids_of_block = self.tokenizer(block, add_special_tokens=False, verbose=False)
            for text, ids in zip(block, ids_of_block["input_ids"], strict=True):
                if not ids:
                    raise TextEncoderError(f"the text {text!r} has no token; leave it out")
                self.num_truncated += len(ids) > self._room
                tokens.append([*self._front, *ids[: self._room], *self._behind])
        return tokens

    def fingerprint(self) -> str:
        """Hash of what turns text into ids; padding and truncation are not part of it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content: Any = {"vocab": sorted(self.tokenizer.get_vocab().items())}
        if backend is not None:
            content = json.loads(backend.to_str())
            content["padding"] = content["truncation"] = None
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def require(self, fingerprint: str, where: str | Path) -> None:
        """Refuses a tokenizer that came back from disk as another one.

        AutoTokenizer picks a class by `model_type` for some models and rebuilds the tokenizer in
        that class's way, whatever `tokenizer.json` says; vectors would then differ unnoticed.

        Args:
            fingerprint: Of the tokenizer that was saved.
            where: Its directory.

        Raises:
            TextEncoderError: This tokenizer has another fingerprint.
        """
        if (got := self.fingerprint()) != fingerprint:
            raise TextEncoderError(
                f"{where}: text_tokenizer is {got} as transformers {transformers.__version__} "
                f"loads it, expected {fingerprint}; use the version that saved it, or a model with "
                "its own architecture's tokenizer"
            )


def pad_tokens(
    tokens: Sequence[npt.ArrayLike], pad_token_id: int, num_front_tokens: int
) -> dict[str, Tensor]:
    """Pads on the right and marks what is attended to and what is pooled.

    Args:
        tokens: Token ids of each text, at least one text.
        pad_token_id: Fills up; never attended to.
        num_front_tokens: Tokens at the start of each text that are not pooled.

    Returns:
        `input_ids` and `attention_mask` (int64 `[b, t]`), `pool_mask` (bool `[b, t]`).
    """
    rows = [np.asarray(ids, dtype=np.int64) for ids in tokens]
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(int(lengths.max()))
    inside = positions < lengths[:, None]
    input_ids = torch.full(inside.shape, pad_token_id)
    input_ids[inside] = torch.from_numpy(np.concatenate(rows))
    return {
        "input_ids": input_ids,
        "attention_mask": inside.long(),
        "pool_mask": inside & (positions >= num_front_tokens),
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise TextEncoderError(
        f"the tokenizer turns 'a' into {bare}, but into {full} with special tokens; expected the "
        "former inside the latter"
    )
