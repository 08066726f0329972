"""The swap is one line: CLIP, SigLIP and EVA02 towers through stages 3 and 4, opened by others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_towers import build_tower
from tests.vlm_fixtures import environment, losses, run_here, write_llava, write_recipe

KINDS = ("clip", "siglip", "eva02")
READER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
if sys.argv[1] == "register":
    import llm2clip_vlm
    llm2clip_vlm.register()
for path in sys.argv[2:]:
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert AutoProcessor.from_pretrained(path).chat_template
print("opened", len(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> dict[str, Path]:
    """The same two recipes for each tower; what differs is `vlm.vision_tower`."""
    work = tmp_path_factory.mktemp("swap")
    shared = {
        "data": [{"path": str(write_llava(work, 8, text_only=(3,)))}],
        "trainer": {"max_steps": 2},
    }
    stage3 = write_recipe(
        work / "stage3.yaml",
        output_dir=str(work / "x"),
        vlm={"vision_tower": "x", "language_model": str(tiny_llm)},
        trainable={"multi_modal_projector": 1e-2},
        **shared,
    )
    stage4 = write_recipe(
        work / "stage4.yaml",
        output_dir=str(work / "x"),
        checkpoint="x",
        image_aspect_ratio="pad",
        trainable={"vision_tower": 1e-3, "multi_modal_projector": 1e-2, "language_model": 1e-2},
        **shared,
    )
    found = {}
    for kind in KINDS:
        three, four = work / kind / "three", work / kind / "four"
        tower = build_tower(kind, work / kind / "xyz")
        run_here("stage3_projector", stage3, f"vlm.vision_tower={tower}", f"output_dir={three}")
        run_here("stage4_instruction", stage4, f"checkpoint={three}/model", f"output_dir={four}")
        found[kind] = four
    return found


def test_every_tower_trains(swapped: dict[str, Path]) -> None:
    first = [losses(out)[0] for out in swapped.values()]
    assert all(0 < loss < 20 for loss in first)
    assert len(set(first)) == len(KINDS)


def read(how: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", READER, how, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def test_each_opens_in_transformers(swapped: dict[str, Path]) -> None:
    """T80, T82: EVA02 is no model of transformers; with `register()` it opens, too."""
    models = {kind: out / "model" for kind, out in swapped.items()}
    assert "opened 2" in read("plain", models["clip"], models["siglip"]).stdout
    assert "opened 3" in read("register", *models.values()).stdout
    alone = read("plain", models["eva02"])
    assert alone.returncode != 0
    assert "eva02_clip_vision_model" in alone.stderr
