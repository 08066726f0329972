"""Texts packed into rows of equal length, with tokens to guess: input of the MNTP pre-step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm2clip_vlm.chat.text_tokens import text_ids
from llm2clip_vlm.constants import IGNORE_INDEX


class MaskedRows(Dataset[dict[str, Tensor]]):
    """Rows of tokens of which some are replaced by the mask token and asked for.

    Which ones depends on the seed and the row alone.

    Args:
        texts: Joined in this order, each with the tokenizer's special tokens.
        tokenizer: Tokenizer of the language model.
        length_tokens: Tokens of a row; the last, incomplete one is dropped.
        mask_token: Text of one token (a decoder has no mask token).
        mask_probability: Share of the tokens that are asked for.
        seed: Seed of the choice.

    Raises:
        ValueError: `mask_token` is not one token, or the texts do not fill a row.

    Paper: LLM2Vec (arXiv 2404.05961) section 2.2; LLM2CLIP released code `run_mntp.py` (rows of
    512, mask "_", 20 %).
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        length_tokens: int,
        mask_token: str,
        mask_probability: float,
        seed: int,
    ) -> None:
        mask = tokenizer(mask_token, add_special_tokens=False)["input_ids"]
        if len(mask) != 1 or mask[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"mask_token {mask_token!r} is {mask} to the tokenizer, expected one known token; "
                "name another"
            )
        self.mask_id = int(mask[0])
        encoded = text_ids(tokenizer, texts, add_special_tokens=True)
        flat = np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)
        if not (count := len(flat) // length_tokens):
            raise ValueError(f"{len(flat)} tokens do not fill a row of {length_tokens}")
        self.rows = flat[: count * length_tokens].reshape(count, length_tokens)
        self.mask_probability = mask_probability
        self.seed = seed

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """`input_ids` with masks and `labels` of what they hide, int64 `[t]`."""
        ids = torch.from_numpy(self.rows[row].astype(np.int64))
        drawn = np.random.default_rng([self.seed, row]).random(len(ids))
        hidden = torch.from_numpy(drawn < self.mask_probability)
        return {
            "input_ids": torch.where(hidden, self.mask_id, ids),
            "labels": torch.where(hidden, ids, IGNORE_INDEX),
        }
