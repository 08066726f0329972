"""Tokens on their way from the thread that generates to the one that shows them."""

from __future__ import annotations

from queue import SimpleQueue

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Closed(Exception):
    """Nobody waits for more tokens."""


class TokenQueue(BaseStreamer):
    """A streamer for `generate` of one prompt."""

    def __init__(self) -> None:
        self.found: SimpleQueue[int | None] = SimpleQueue()
        """Tokens of the answer; None is the end."""
        self.closed = False
        """Set it and the generation ends with its next token."""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt first, which is left out, then one token a call.

        Raises:
            Closed: The reader has gone.
        """
        if self.closed:
            raise Closed
        if self._prompt_seen:
            self.found.put(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        """Say that nothing follows."""
        self.found.put(None)
