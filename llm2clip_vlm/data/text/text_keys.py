"""Keys of texts: equal texts have equal ones, wherever they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 32
"""Bytes of a key."""
Digests = npt.NDArray[np.uint8]
"""Keys of rows, `[rows, 32]`."""


def text_digests(texts: Sequence[str], prompt: str = "") -> bytes:
    """SHA-256 of each text's UTF-8 bytes, after the prompt's own where there is one: rows' keys."""
    start, sha256 = hashlib.sha256(prompt.encode()).digest() if prompt else b"", hashlib.sha256
    return b"".join([sha256(start + text.encode()).digest() for text in texts])


def digests_of(texts: Sequence[str], prompt: str = "") -> Digests:
    """Keys of several texts, `[n, 32]`."""
    return np.frombuffer(text_digests(texts, prompt), np.uint8).reshape(-1, DIGEST_BYTES)


def key_words(digests: Digests) -> npt.NDArray[np.uint64]:
    """The first and the second 8 bytes of each key as numbers, `[n, 2]`."""
    return np.ascontiguousarray(digests[:, :16]).view(">u8").astype(np.uint64)
