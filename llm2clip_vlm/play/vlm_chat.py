"""A conversation with a VLM about one picture, as its training data have them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip_vlm.data.reading.images import ImageError, open_image
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.files import require_regular
from llm2clip_vlm.models.vlm.building import load_checkpoint

HELP = "/image PATH asks about another picture, /reset begins again, /quit ends"


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture file that the user names, upright and in RGB.

    Raises:
        ImageError: It is no file, too large, or does not decode.
    """
    file = require_regular(Path(path).expanduser(), ImageError).absolute()
    return open_image(file.parent, file.name, follow_links=True)


def model_folder(path: str) -> str:
    """Find the model directory of a stage's output; anything else (a hub id, too) stays as it is.

    Raises:
        ValueError: A local path, and no model is there.
    """
    for folder in (path, str(Path(path, "model"))):
        if Path(folder, "config.json").is_file():
            return folder
    if Path(path).exists() or path[:1] in "/.~" or path.count("/") != 1:
        raise ValueError(
            f"{path}: no such folder with a model; expected a model directory, a stage's output or "
            "a hub id"
        )
    return path


class Chat:
    """A conversation; a new picture begins a new one.

    Args:
        generator: The model, its processor and the template that it was trained with.
        picture: RGB. None: text alone.
    """

    def __init__(self, generator: Generator, picture: Image.Image | None = None) -> None:
        self.generator = generator
        self.picture = picture
        self.turns: list[tuple[str, str]] = []
        """Questions and answers so far."""

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "auto", device: str | None = None, max_new_tokens: int = 512
    ) -> Chat:
        """Load any checkpoint that transformers opens as image-text-to-text.

        Args:
            path: Model directory, a stage's output, or hub id.
            dtype: `auto`, `float32` or `bfloat16`.
            device: None: `cuda` if there is one, else `cpu`.
            max_new_tokens: Upper limit of an answer.

        Raises:
            ValueError: It cannot be loaded, or has no chat template.
        """
        model, processor = load_checkpoint(model_folder(path), dtype=dtype, device=device)
        return cls(Generator(model, processor, batch_size=1, max_new_tokens=max_new_tokens))

    def show(self, picture: Image.Image | None) -> None:
        """Begin again with another picture."""
        self.picture, self.turns = picture, []

    def ask(self, question: str, options: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Put the next question.

        Args:
            question: Text; names of control tokens in it stay text.
            options: Those of :meth:`Generator.stream`. None: greedy.

        Yields:
            The answer so far; the conversation goes on from where the iterator is closed.

        Raises:
            ValueError: The conversation does not fit the model's window, or an unknown option.
        """
        answer: str | None = None
        prompt = self.generator.render(list(self._messages(question)))
        try:
            for found in self.generator.stream(prompt, options or {}):
                answer = found.text
                yield answer
        finally:
            if answer is not None:  # it may have said nothing
                self.turns.append((question, answer))

    def _messages(self, question: str) -> Iterator[dict[str, Any]]:
        picture = [] if self.picture is None else [{"type": "image", "url": self.picture}]
        for asked, answer in self.turns:
            yield {"role": "user", "content": [*picture, {"type": "text", "text": asked}]}
            yield {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            picture = []
        yield {"role": "user", "content": [*picture, {"type": "text", "text": question}]}


def print_answer(chat: Chat, question: str, options: Mapping[str, Any]) -> None:
    """Print an answer while it is generated; Ctrl-C ends it."""
    printed = ""
    for text in chat.ask(question, options):
        if text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()


def talk(chat: Chat, lines: Iterable[str], options: Mapping[str, Any]) -> int:
    """Answer what is typed, until its end or `/quit`; an error is told and the talk goes on.

    Args:
        chat: The conversation.
        lines: Questions, and commands that begin with a slash.
        options: Settings of generation.

    Returns:
        How many lines failed.
    """
    failed = 0
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/image":
                chat.show(open_picture(rest.strip().strip("'\"")))
            elif command == "/reset":
                chat.show(chat.picture)
            elif command.startswith("/"):
                print(HELP, file=sys.stderr)
            elif command:
                print_answer(chat, line.strip(), options)
        except ValueError as error:  # the boundary around a line
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        except KeyboardInterrupt:
            print(" (stopped)", file=sys.stderr)
    return failed


def typed() -> Iterator[str]:
    """Lines from the keyboard, with a prompt and editing, or from a pipe, without."""
    with contextlib.suppress(ImportError, EOFError):
        import readline  # noqa: F401  (gives `input` its editing)

        while True:
            yield input("> " if sys.stdin.isatty() else "")
