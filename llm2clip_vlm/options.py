"""What the commands' parsers have in common: errors that name the nearest word, checked numbers."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from llm2clip_vlm.recipe.reading import did_you_mean

_CHOICE = re.compile(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)")
_OPTION = re.compile(r"unrecognized arguments: (?:.* )??(-[^ =]+)")


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors name the nearest command, option or choice."""

    def error(self, message: str) -> NoReturn:
        """End the program with a message."""
        if chosen := _CHOICE.search(message):
            message += did_you_mean(chosen[1], re.findall(r"[\w.-]+", chosen[2]))
        elif option := _OPTION.search(message):
            message += did_you_mean(option[1], self._option_string_actions)
        super().error(message)


def number(least: float, most: float = math.inf, kind: Callable[[str], float] = int) -> Any:
    """Make what argparse reads a number with: one out of bounds is refused by its option's name.

    Args:
        least: The smallest.
        most: The largest.
        kind: `int` or `float`.
    """

    def read(word: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(word)) <= most:
                return value
        named, end = "whole " * (kind is int), "on" if most == math.inf else f"to {most}"
        raise argparse.ArgumentTypeError(f"expected a {named}number from {least} {end}, got {word}")

    return read
