"""Fixtures that all tests share. Nothing here imports torch until a test asks for a model."""

from __future__ import annotations

import os
import signal

# Two cores are enough for every test, and threads fight each other in two-process tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Iterator
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def sigterm_as_before() -> Iterator[None]:
    """A stage that fails in a test leaves its handler in the process, and forks inherit it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """The folder with real photographs and texts; a test that needs it skips where it is absent."""
    given = os.environ.get("LLM2CLIP_SHARED_DATA")
    folder = Path(given) if given else repo_root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"needs real data: no folder {folder} (set LLM2CLIP_SHARED_DATA to where it lies)"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny `CLIPModel` (32 px, patch 8, hidden 32, 3 layers), processor and tokenizer."""
    from tests.tiny import build_clip

    return build_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny `LlamaForCausalLM` (hidden 32, 2 layers), tokenizer and chat template."""
    from tests.tiny import build_llm

    return build_llm(tmp_path_factory.mktemp("tiny") / "llm")
