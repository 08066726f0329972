"""The swap is one line: every tower goes through stages 2b, 3 and 4, export, eval and compare."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm2clip_vlm import cli, load_vision_tower
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm
from tests.integration.test_stage2b import Recipe, data, recipe, run
from tests.peers import PEERS
from tests.tiny_towers import CNNS, build_tower
from tests.vlm_fixtures import (
    environment,
    files_with_paths,
    losses,
    run_here,
    write_llava,
    write_recipe,
)

__all__ = ["data", "recipe"]  # fixtures

PLUGIN = """
from transformers import AutoConfig, AutoModel
from tests.unit.test_foreign_tower import PlainConfig, PlainTower
AutoConfig.register("plain_tower", PlainConfig, exist_ok=True)
AutoModel.register(PlainConfig, PlainTower, exist_ok=True)
def load(path, dtype):
    return PlainTower.from_pretrained(path, dtype=dtype)
"""
READER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
for path in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert AutoProcessor.from_pretrained(path).chat_template
print("opened", len(sys.argv[1:]))
"""
OURS = {"eva02", "timm", "timm_cnn", "timm_convnext", "timm_resnet", "plugin"}
"""What transformers alone does not know."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tower of its own, installed for this process and for others."""
    folder = tmp_path / "site"
    (folder / "plain_plugin-1.dist-info").mkdir(parents=True)
    (folder / "plain_plugin.py").write_text(PLUGIN)
    (folder / "plain_plugin-1.dist-info" / "METADATA").write_text("Name: plain\nVersion: 1\n")
    (folder / "plain_plugin-1.dist-info" / "entry_points.txt").write_text(
        "[llm2clip_vlm.vision_towers]\nplain_tower = plain_plugin:load\n"
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def original(kind: str, clip: Path, folder: Path) -> Path:
    if kind != "plugin":
        return build_tower(kind, folder)
    made = importlib.import_module("plain_plugin")
    made.PlainTower(made.PlainConfig()).save_pretrained(folder)
    shutil.copy(clip / "preprocessor_config.json", folder)
    return folder


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(("timm_cnn", "eva02"), marks=pytest.mark.slow, id="cnn and eva02"),
        pytest.param(
            ("clip", "siglip", "siglip2", "dinov2", "timm", "timm_convnext", "plugin"),
            marks=pytest.mark.slow,
            id="all others",
        ),
    ],
)
def test_every_tower_goes_through_all_stages(
    kinds: Sequence[str],
    recipe: Recipe,
    plugin: Path,
    tiny_clip: Path,
    tiny_llm: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")
    shared = {
        "data": [{"path": str(write_llava(tmp_path, 8, text_only=(3,)))}],
        "trainer": {"max_steps": 2},
    }
    models = {}
    for kind in kinds:
        out = tmp_path / kind
        tower = original(kind, tiny_clip, out / "xyz")
        steps = {"max_steps": 1, "save_strategy": "no"}
        layers = {} if kind == "plugin" else {"layer_decay": 0.9}
        two = run(
            recipe(
                f"{kind}/two", vision_tower=str(tower), trainer=steps, projection_dim=8, **layers
            )
        )
        stage3 = write_recipe(
            tmp_path / "stage3.yaml",
            output_dir=str(out / "three"),
            vlm={
                "vision_tower": str(two / "vision_tower"),
                "language_model": str(tiny_llm),
                "vision_feature_layer": -1 if kind in CNNS else -2,
            },
            trainable={"multi_modal_projector": 1e-2},
            **shared | {"data": [{"path": str(write_llava(tmp_path / "pictures", 8))}]},
        )
        stage4 = write_recipe(
            tmp_path / "stage4.yaml",
            output_dir=str(out / "four"),
            checkpoint=str(out / "three" / "model"),
            image_aspect_ratio="pad",
            trainable=dict.fromkeys(
                ("vision_tower", "multi_modal_projector", "language_model"), 1e-2
            ),
            **shared,
        )
        run_here("stage3_projector", stage3)
        # As loaded: a file has a tower's published names, or those of transformers' own modules.
        frozen = load_vision_tower(two / "vision_tower").model.state_dict()
        kept = load_vlm(out / "three" / "model")[0].model.vision_tower.state_dict()
        for name, value in frozen.items():  # statistics of BatchNorm, too
            (found,) = (
                k for k in kept if f".{name}".endswith(f".{k}") or f".{k}".endswith(f".{name}")
            )
            assert kept[found].equal(value), name
        run_here("stage4_instruction", stage4)
        assert all(0 < loss < 20 for loss in losses(out / "four"))
        export(out / "four", "transformers", out / "export")
        models[kind] = out / "export"
        assert not files_with_paths(out / "two", out / "three", out / "four", models[kind])

    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(
                {"image": f"images/{i}.png", "type": "any", "question": "?", "answer": "red"}
            )
            + "\n"
            for i in (0, 1)
        )
    )
    rows = f"data_files: {tmp_path}/rows.jsonl, overrides: {{}}"
    (tmp_path / "suite.yaml").write_text(f"tasks:\n- {{task: l2c_photo_vqa, {rows}}}\n")
    paths = [environment()["PYTHONPATH"], str(plugin), str(PEERS)]
    outside = environment() | {"PYTHONPATH": ":".join(paths)}
    evaluation = ["eval/run_lmms.py", f"--suite={tmp_path}/suite.yaml", "max_empty=1.0"]
    evaluation += [f"--output={tmp_path}/eval"]
    evaluation += [f"--checkpoint={kind}={path}" for kind, path in models.items()]
    done = subprocess.run(
        [sys.executable, *evaluation],
        env=outside,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [str(tmp_path / "eval" / kind) for kind in kinds]
    assert cli.main(["compare", *scores, "--out", str(tmp_path / "compared")]) == 0

    for plain in (True, False):  # what transformers opens alone, and what it does not
        chosen = [str(path) for kind, path in models.items() if (kind not in OURS) is plain]
        if plain and not chosen:
            continue
        command = [sys.executable, "-c", READER, *(chosen if plain else chosen[:1])]
        alone = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
        assert (f"opened {len(chosen)}" in alone.stdout) is plain, alone.stderr[-2000:]


@pytest.mark.parametrize("layers", [-2, 0, [-1]])
def test_a_cnn_has_one_layer_and_the_error_says_which(
    layers: int | list[int], tmp_path: Path
) -> None:
    """Before the language model is read, which here is not even there."""
    tower = build_tower("timm_cnn", tmp_path / "tower")
    with pytest.raises(ModelError, match=r"put `vlm.vision_feature_layer: -1`"):
        build_vlm(tower, tmp_path / "absent", vision_feature_layer=layers)
