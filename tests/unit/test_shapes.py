"""The axes in annotations are executed: tests of shapes run again under jaxtyping and beartype."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "llm2clip_vlm.losses.contrastive",
    "llm2clip_vlm.models.llm2clip",
    "llm2clip_vlm.models.text.text_adaptor",
)
TESTS = ("test_losses.py", "test_llm2clip.py", "test_text_adaptor.py")
# What must raise our own error would raise jaxtyping's first; transformers builds its config
# classes anew, which the hook does not survive.
LEFT_OUT = "refused or round_trip or config_keeps"


@pytest.mark.slow
def test_annotated_axes_hold() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"--jaxtyping-packages={','.join(MODULES)},beartype.beartype",
            "-k",
            f"not ({LEFT_OUT})",
            *(f"tests/unit/{name}" for name in TESTS),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_hook_sees_a_wrong_axis() -> None:
    code = (
        "import jaxtyping, torch\n"
        "with jaxtyping.install_import_hook('llm2clip_vlm.losses', 'beartype.beartype'):\n"
        "    from llm2clip_vlm.losses.contrastive import contrastive_loss\n"
        "contrastive_loss(torch.ones(2, 3), torch.ones(2, 4), torch.tensor(1.0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "TypeCheckError" in done.stderr
