"""Towers of timm where torchvision is absent or broken, each in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import PEERS
from tests.tiny_towers import build_tower

PROGRAM = """
import sys
from llm2clip_vlm.models.vision.towers import load_vision_tower
print(load_vision_tower(sys.argv[1]).num_patches, sys.modules.get("torchvision"))
"""


@pytest.mark.parametrize("torchvision", ["absent", pytest.param("broken", marks=pytest.mark.slow)])
def test_a_tower_of_timm_loads(torchvision: str, tmp_path: Path) -> None:
    tower = build_tower("timm_cnn", tmp_path / "tower")
    if torchvision == "broken":
        package = tmp_path / "site" / "torchvision"
        package.mkdir(parents=True)
        error = 'RuntimeError("operator torchvision::nms does not exist")'
        (package / "__init__.py").write_text(f"raise {error}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tower)],
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{PEERS}:{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["16", "None"], done.stderr[-2000:]
