"""A torchvision that does not import looks absent, which transformers and timm can do without.

pip brings a torchvision made for CUDA beside a torch without it; it raises as soon as it is
imported, and transformers, which only asks whether it lies there, then has no image processor and
no CLIP.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

_BROKEN = (ImportError, RuntimeError, OSError, AttributeError)
"""What `import torchvision` raises: made for another torch, or a bad shared library."""


def hide_broken_torchvision() -> None:
    """Try torchvision where it is installed; if it does not import, nothing finds it any more."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except _BROKEN:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]


class _BeforeTransformers(MetaPathFinder):
    """Tries torchvision when transformers is about to be imported, and never earlier."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "transformers":
            hide_broken_torchvision()


def watch() -> None:
    """Have torchvision tried before transformers asks for it; costs nothing until then."""
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTransformers())
