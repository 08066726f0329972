"""Lines of JSONL that differ from others in plain values alone, read by one expression.

Large files are written by programs: the same keys in the same order, and nearly everywhere values
with which nothing can be wrong. An expression made from one line takes such lines as a whole. It
is stricter than JSON and all checks of a record together, so what it takes needs none of them;
every other line goes the long way, which alone says what is refused, and why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import numpy as np

_LONGEST = 2**14  # characters of a line, so that no caption in it is too long
_AT_ONCE = 64  # few enough for Python's garbage collector to overlook
_BETWEEN = '", "'

# Values in a line without a backslash or anything unprintable, where a quote ends each string. A
# caption has a blank, but not at its ends, and may be no list or mapping written as text; a name is
# a path without `..`, scheme or drive that begins below its folder; a whole number is written as
# Python writes it.
_CAPTION = r'[^ "\[{(][^ "]*+ [^"]*+(?<! )'
_NAME = r'"(?P<image>[^":./ ][^":.]*+(?:\.[^":.]++)*+)"'
_WHOLE = r"(?:0|-?[1-9][0-9]{0,17}+)"
_OTHER = rf'(?:"[^"]*+"|{_WHOLE}(?:\.[0-9]{{1,20}}+)?+(?:e-?[0-9]{{1,2}})?+|null|true|false)'


class _Expression(NamedTuple):
    match: Callable[[str], re.Match[str] | None]
    groups: list[int]
    """Those of the id, the image, and the captions of each kind."""
    kinds: list[str]
    between: str
    """What stands between the texts of a list."""
    form: str
    """JSON of the captions, `%s` for all of a kind."""


class AlikeRows(dict[str, Any]):
    """An empty row that stands for the records of several lines.

    Args:
        lines: What the expression found, number and line of each.
        expression: Gives the meaning of what it found.
    """

    def __init__(self, lines: Iterable[tuple[Any, int, str]], expression: _Expression) -> None:
        super().__init__()
        _, groups, self.kinds, between, form = expression
        found, numbers, _ = zip(*lines, strict=True)
        self.places = [*map(str, numbers)]
        """Line of each record."""
        columns = zip(*(match.group(*groups) for match in found), strict=True)
        self.names, self.images, *joined = columns
        """Id and image of each."""
        self.texts = [[text.split(between) for text in column] for column in joined]
        """Captions of each kind, a list for each record."""
        if between != _BETWEEN:
            joined = [tuple(map(_BETWEEN.join, column)) for column in self.texts]
        self.captions = [form % texts for texts in zip(*joined, strict=True)]
        """Those of each record as JSON; like all other strings here they need no escape in it."""


class AlikeLines:
    """Finds lines that are alike.

    Args:
        id_field: Column of the record's key.
        image_field: Column of the image's name.
        fields: Columns with captions.
    """

    def __init__(self, id_field: str, image_field: str, fields: Sequence[str]) -> None:
        self._names = [id_field, image_field, *fields]
        self._expression: _Expression | None = None
        self._misses = 0  # lines that it did not take, where it takes few

    def sift(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str | AlikeRows]]:
        """Numbered lines in their order, some of them as rows."""
        while part := list(islice(lines, _AT_ONCE)):
            if (expression := self._expression) is None:
                yield from part
                continue
            printable = _is_printable("".join([line for _, line in part]))
            found = [
                (
                    expression.match(line)
                    if "\\" not in line
                    and len(line) <= _LONGEST
                    and (printable or line.rstrip("\r\n").isprintable())
                    else None,
                    number,
                    line,
                )
                for number, line in part
            ]
            if 2 * sum(match is not None for match, _, _ in found) > len(part):
                self._misses = -_AT_ONCE  # it is good
            for taken, run in groupby(found, lambda line: line[0] is not None):
                if taken:
                    yield 0, AlikeRows(run, expression)
                else:
                    yield from ((number, line) for _, number, line in run)

    def learn(self, row: dict[str, Any], line: str) -> None:
        """Make an expression from a line that was left, where most are; of many lines from a few.

        Args:
            row: What it holds.
            line: All of it.
        """
        self._misses += 1
        if self._misses > 0 and self._misses.bit_count() == 1:
            self._expression = self._like(row, line)

    def _like(self, row: dict[str, Any], line: str) -> _Expression | None:
        key, image, *fields = self._names
        own = [row[name] if isinstance(row.get(name), dict) else [name] for name in fields]
        kinds = list(chain.from_iterable(own))
        twice = any(len({*names}) < len(names) for names in (self._names, kinds))
        if twice or not kinds or not {*self._names} <= row.keys():
            return None
        comma, colon = ", " if '", ' in line else ",", ": " if '": ' in line else ":"

        def column(name: str, value: Any) -> str:
            if name in fields:
                return joined(value, caption) if isinstance(value, dict) else caption(name, value)
            if name == key:
                return '"(?P<id>[^"]++)"' if isinstance(value, str) else f"(?P<id>{_WHOLE})"
            return _NAME if name == image else _OTHER

        def caption(kind: str, value: Any) -> str:
            one = f"(?P<of{kinds.index(kind)}>{_CAPTION}"
            return (
                rf'\["{one}(?:"{comma}"{_CAPTION})*+)"\]'
                if isinstance(value, list)
                else f'"{one})"'
            )

        def joined(columns: dict[str, Any], of: Callable[[str, Any], str]) -> str:
            pairs = [f"{re.escape(_json(n))}{colon}{of(n, columns[n])}" for n in columns]
            return rf"\{{{comma.join(pairs)}\}}"

        found = re.compile(rf"{joined(row, column)}\r?\n")
        names = ("id", "image", *(f"of{number}" for number in range(len(kinds))))
        groups = [found.groupindex[name] for name in names]
        form = _json({kind.replace("%", "%%"): ["%s"] for kind in kinds})
        return _Expression(found.fullmatch, groups, kinds, f'"{comma}"', form)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_printable(text: str) -> bool:
    """Whether `str.isprintable` is true of each line, in a third of its time."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    unusual = np.unique(codes[codes - ord(" ") > ord("~") - ord(" ")])  # unsigned: below 0 is large
    return all(chr(code).isprintable() or chr(code) in "\r\n" for code in unusual.tolist())
