"""open_clip and timm for tests, where neither is anybody's dependency and torchvision is absent."""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            modes = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
            return enum.Enum(name, modes)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> _Stub:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Lets open_clip and timm be imported where torchvision is absent: no ViT needs it.

    transformers has made up its mind by then, and finds no torchvision afterwards either.
    """
    import transformers

    assert transformers.CLIPVisionModel
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


PEERS = Path(sys.prefix) / "peers"
"""Where `make setup` puts them, out of everybody else's sight."""


def library(name: str) -> Any:
    """`open_clip` or `timm`; the calling test is skipped where it is not there."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
        importlib.invalidate_caches()
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name} (pip install --no-deps open_clip_torch timm ftfy wcwidth)")
    with _without_torchvision():
        return importlib.import_module(name)
