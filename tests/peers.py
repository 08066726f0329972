"""open_clip, timm and bitsandbytes for tests: nobody's dependencies, and torchvision is absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.models.vision.timm_library import torchvision_stub

PEERS = Path(sys.prefix) / "peers"
"""Where `make setup` puts them, out of everybody else's sight."""
QLORA = Path(sys.prefix) / "qlora"
"""Where it puts bitsandbytes, which peft would import in every process that finds it."""


def library(name: str) -> Any:
    """`open_clip` or `timm`; the calling test is skipped where it is not there."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
        importlib.invalidate_caches()
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name} (pip install --no-deps open_clip_torch timm ftfy wcwidth)")
    with torchvision_stub():
        return importlib.import_module(name)
