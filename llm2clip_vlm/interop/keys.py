"""Key tables: what another project calls a weight, and what we call it.

A table is a tuple of rows, read in order; the first row that knows a name takes it. The same table
is read both ways.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm2clip_vlm.hub import ModelError

Change = Literal["same", "transpose", "batch", "batch2"]

_FIELDS = {"n": r"\d+", "n2": r"\d+", "p": "weight|bias", "any": ".+"}
_CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "same": (lambda tensor: tensor, lambda tensor: tensor),
    "transpose": (lambda tensor: tensor.T.contiguous(), lambda tensor: tensor.T.contiguous()),
    "batch": (lambda tensor: tensor[0], lambda tensor: tensor[None]),
    "batch2": (lambda tensor: tensor[0, 0], lambda tensor: tensor[None, None]),
}
"""How a weight becomes ours, and how it goes back."""


@dataclass(frozen=True)
class Row:
    """One weight under both names; several names on a side share it along the first axis.

    In a name `{n}` and `{n2}` stand for numbers, `{p}` for `weight` or `bias`, `{any}` for all.
    """

    theirs: tuple[str, ...]
    """Their names."""
    ours: tuple[str, ...]
    """Our names."""
    change: Change = "same"
    """What makes ours of theirs: transposed, or without one or two leading axes of length 1."""
    parts: tuple[int, ...] = ()
    """Shares of several names on their side. Empty: equal ones."""


def row(theirs: str, ours: str, change: Change = "same", parts: tuple[int, ...] = ()) -> Row:
    """A row from names: theirs blank-separated, and `{qkv}` in ours stands for three."""
    three = tuple(ours.replace("{qkv}", part) for part in "qkv")
    return Row(tuple(theirs.split()), three if "{qkv}" in ours else (ours,), change, parts)


@dataclass
class KeyReport:
    """What became of the weights of a file."""

    matched: int = 0
    """Weights that found their place."""
    missing: list[str] = field(default_factory=list)
    """Ours that nothing was found for, or something of another shape."""
    unexpected: list[str] = field(default_factory=list)
    """Theirs that the table does not know."""
    left_out: list[str] = field(default_factory=list)
    """Theirs that have no place here by design, such as CLIP's own text tower."""

    def to_dict(self) -> dict[str, Any]:
        """Counts as a certificate keeps them; what was left out is counted by its first part."""
        left = Counter(".".join(name.split(".")[:2]) for name in self.left_out)
        return vars(self) | {"left_out": dict(left)}


def translate(
    weights: Mapping[str, Tensor], table: Sequence[Row], *, back: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the other side's names.

    Args:
        weights: Names to tensors.
        table: The rows.
        back: Go from our names to theirs.

    Returns:
        The weights, and the names that no row knows.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for entry in table:
        sources, targets = (entry.ours, entry.theirs) if back else (entry.theirs, entry.ours)
        parts = (entry.parts if back else ()) or (1,) * len(targets)
        pattern = _pattern(sources[0])
        for name in weights:
            match = None if name in used else pattern.fullmatch(name)
            names = [source.format(**match.groupdict()) for source in sources] if match else []
            if match is None or any(source not in weights for source in names):
                continue
            used.update(names)
            tensors = [weights[source] for source in names]
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            tensor = _CHANGES[entry.change][back](tensor)
            unit = len(tensor) // sum(parts) if len(targets) > 1 else 0
            pieces = tensor.split([unit * part for part in parts]) if unit else (tensor,)
            for target, piece in zip(targets, pieces, strict=True):
                found[target.format(**match.groupdict())] = piece
    return found, sorted(set(weights) - used)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    texts = [re.escape(part) for part in parts[::2]]
    groups = [f"(?P<{name}>{_FIELDS[name]})" for name in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(texts, [*groups, ""], strict=True)))


def load_translated(
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    unexpected: Iterable[str],
    *,
    left_out: str,
    where: str | Path,
    partial: bool = False,
) -> KeyReport:
    """Put translated weights into a model.

    Args:
        model: Takes the weights, in its own dtype.
        weights: Weights under the model's names.
        unexpected: Names in the file that the table does not know.
        left_out: Pattern of names, on either side, that have no place here by design.
        where: The file, for messages.
        partial: Let missing and unexpected weights pass; they are in the report.

    Raises:
        ModelError: Weights are missing, unexpected or of another shape.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in weights.items()}
    fits = {name: weights[name] for name in wanted if wanted[name] == got.get(name)}
    missing = [
        f"{name} (got {got[name]}, expected {wanted[name]})" if name in got else name
        for name in sorted(wanted.keys() - fits.keys())
    ]
    foreign = sorted({*unexpected, *weights} - wanted.keys())
    left = [name for name in foreign if re.fullmatch(left_out, name)]
    foreign = [name for name in foreign if name not in left]
    report = KeyReport(len(fits), missing, foreign, left)
    if (missing or foreign) and not partial:
        raise ModelError(
            f"{where}: {report.matched} weights fit {type(model).__name__}; missing "
            f"{_few(report.missing)}; unexpected {_few(report.unexpected)}. Is it complete, and of "
            "this architecture? `--partial` loads what fits and leaves the rest as initialised"
        )
    model.load_state_dict(fits, strict=False)
    return report


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} (first: {', '.join(names[:3])})" if names else "none"
