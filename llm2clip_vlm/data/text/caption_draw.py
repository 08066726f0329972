"""Choice of an image's captions in an epoch: chance that depends on its arguments alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

_MASK = 2**64 - 1


def caption_id(text: str) -> int:
    """A 63-bit number that captions of the same words share: they are no negatives of each other.

    Case and blanks make no other caption: CLIP's tokens do not have them.
    """
    return text_number(" ".join(text.casefold().split()))


def text_number(text: str) -> int:
    """A 63-bit number that equal texts share."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw(seed: int, epoch: int, index: int) -> float:
    """A uniform number in [0, 1) that depends on its three arguments alone (splitmix64)."""
    state = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / 2**53


def weighted_captions(
    captions: Mapping[str, Sequence[str]], weights: Mapping[str, float]
) -> tuple[list[str], list[float]]:
    """A record's captions that can be drawn, and their weights.

    Args:
        captions: Kind to captions.
        weights: Kind to the weight that its captions share; empty = 1 for each caption.
    """
    texts: list[str] = []
    shares: list[float] = []
    for kind, own in captions.items():
        share = weights.get(kind, 0.0) / len(own) if weights else 1.0
        if share > 0:
            texts.extend(own)
            shares.extend([share] * len(own))
    return texts, shares


def draw_one(texts: Sequence[str], shares: Sequence[float], chance: float) -> str:
    """The text that a uniform number in [0, 1) falls on."""
    cumulative = np.cumsum(shares)
    position = int(np.searchsorted(cumulative / cumulative[-1], chance, side="right"))
    return texts[min(position, len(texts) - 1)]


def draw_several(
    texts: Sequence[str], shares: Sequence[float], count: int, seed: int, epoch: int
) -> list[str]:
    """Different texts, one after the other by their weights; from the first again where too few.

    Paper: Efraimidis and Spirakis 2006 (weighted sampling without replacement).
    """
    chances = (draw(seed, epoch, i) for i in range(len(texts)))
    waits = [-math.log(1 - chance) / share for chance, share in zip(chances, shares, strict=True)]
    order = sorted(range(len(texts)), key=waits.__getitem__)
    different = list(dict.fromkeys(texts[i] for i in order))
    return [different[i % len(different)] for i in range(count)]
