"""Reading other people's weights: safetensors or tensors alone, all of them, and nothing runs."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm2clip_vlm.files import read_json, require_regular
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models import checkpoint_files
from llm2clip_vlm.runs.hashes import HandoffError, fingerprint_file
from llm2clip_vlm.runs.manifest import verify_parent

CERTIFICATE_NAME = "parity.json"
"""The certificate in a folder that this package exported or converted."""

_NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "mm_projector.bin",
)
_WRAPPERS = ("state_dict", "model", "module")
_DAMAGED = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError),
    *(AssertionError, AttributeError, TypeError, struct.error),
)
"""What `torch.load` raises of a file with bytes changed or cut off."""


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Args:
        path: A file, or a folder with one under its usual name, whole or in shards.

    Raises:
        ModelError: There is none, an index names something outside of the folder, or a shard is
            not there.
    """
    if path.is_file():
        return [path]
    for name in _NAMES:
        if files := checkpoint_files.weight_files(path, name):
            return files
    others = sorted(f for f in path.glob("*.*") if f.suffix in (".safetensors", ".pt", ".bin"))
    if len(others) != 1:
        raise ModelError(
            f"{path}: expected a file of weights, or a folder with one of {', '.join(_NAMES)}, "
            f"got {[file.name for file in others] or 'none'}; name the file itself"
        )
    return others


def verify_hashes(path: Path, sha256: str | None = None) -> None:
    """Refuse files that are not those that were written, before anything of them is read.

    Args:
        path: A file, or a folder with a certificate, a stage's manifest, or neither.
        sha256: What the file's hash must be.

    Raises:
        HandoffError: A hash differs.
    """
    if sha256 is not None:
        file, *more = weight_files(path)
        if more:
            raise ModelError(f"--sha256 is of one file; {path} has {1 + len(more)}")
        if (found := fingerprint_file(file)) != sha256.lower():
            raise HandoffError(f"{file}: sha256: expected {sha256}, got {found}; fetch it again")
    folder = path if path.is_dir() else path.parent
    certificate = folder / CERTIFICATE_NAME
    if certificate.is_file():
        recorded = read_json(certificate, dict, HandoffError).get("files")
        if not isinstance(recorded, dict):
            raise HandoffError(f"{certificate}: files: expected names and hashes, got {recorded!r}")
        for name, expected in recorded.items():
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                raise HandoffError(f"{certificate}: {name!r} is outside of the folder")
            found = fingerprint_file(file) if file.is_file() else "no file"
            if found != expected:
                raise HandoffError(
                    f"{file}: sha256: expected {expected}, got {found}: it is not what "
                    f"{CERTIFICATE_NAME} vouches for; export or convert it again"
                )
        if extra := sorted({file.name for file in folder.glob("*.safetensors")} - recorded.keys()):
            raise HandoffError(
                f"{certificate}: does not list {extra[0]}; export or convert it again"
            )
    if path.is_dir():
        verify_parent(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU.

    Every shard is opened, and so checked to be whole, before a tensor of any is read.

    Args:
        path: See :func:`weight_files`.

    Raises:
        ModelError: A file is damaged, or holds anything but tensors.
    """
    weights: dict[str, Tensor] = {}
    parts = [_open(file) for file in weight_files(path)]
    for file, part in parts:
        names = part.keys()
        tensors = part if isinstance(part, Mapping) else {n: part.get_tensor(n) for n in names}
        if twice := weights.keys() & tensors.keys():
            raise ModelError(f"{file}: {sorted(twice)[0]!r} is in two shards")
        weights |= tensors
    return weights


def _open(file: Path) -> tuple[Path, Any]:
    with require_regular(file, ModelError).open("rb") as handle:
        start = handle.read(9)
    try:
        if start[8:] == b"{":
            return file, safe_open(file, framework="pt")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged or cut off ({error}); fetch it again") from error
    except _DAMAGED as error:
        raise ModelError(
            f"{file}: damaged, or more than tensors ({' '.join(str(error).split())[:80]}); nothing "
            "of it was run. Save its state dict as safetensors where you trust it"
        ) from error
    for _ in _WRAPPERS:
        if isinstance(found, Mapping):
            inner = (found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping))
            found = next(inner, found)
    named = found.items() if isinstance(found, Mapping) else ()
    tensors = {str(n).removeprefix("module."): t for n, t in named if isinstance(t, Tensor)}
    if not tensors:
        raise ModelError(f"{file}: expected names and tensors, got {type(found).__name__}")
    return file, tensors
