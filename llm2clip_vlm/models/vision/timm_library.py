"""timm and open_clip where torchvision is absent or broken: none of their models needs it."""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers.utils import is_torchvision_available

from llm2clip_vlm.torchvision_guard import hide_broken_torchvision


class _Stub(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":  # members are the keys of tables made at import
            return enum.Enum(name, "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        stubbed = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if stubbed else None

    def create_module(self, spec: ModuleSpec) -> _Stub:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """Let timm and open_clip be imported without torchvision.

    timm imports its data pipeline and a class of frozen BatchNorm from it, open_clip its
    transforms; no model runs any of it. A torchvision that works is left alone; an absent one is
    absent afterwards, too.
    """
    hide_broken_torchvision()
    is_torchvision_available()  # cached: open_clip imports transformers, which would ask below
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    hidden = {n: sys.modules.pop(n) for n in ("torchvision",) if n in sys.modules}
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(hidden)


def import_timm() -> Any:
    """Import the library timm.

    Raises:
        ImportError: It is not installed.
    """
    with torchvision_stub():
        try:
            import timm
        except ModuleNotFoundError as failure:
            if failure.name != "timm":
                raise
            raise ImportError(
                "this vision tower is built by timm, which is not installed: "
                "pip install --no-deps timm (it needs no torchvision here)"
            ) from None
    return timm
