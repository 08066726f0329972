"""open_clip and timm for the parity tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.peers import library


@pytest.fixture(scope="session")
def timm() -> Any:
    """The library timm."""
    return library("timm")


@pytest.fixture(scope="session")
def open_clip(timm: Any) -> Any:
    """The library open_clip."""
    return library("open_clip")
