"""Precision: what trains has fp32 weights, whatever dtype the checkpoint has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip_vlm.models.trainable import set_precision
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable
from tests.vlm_fixtures import run_here, write_llava, write_recipe

ALL = ("vision_tower", "multi_modal_projector", "language_model")
TRAINED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "projector": (ALL[1:2], ()),
    "all": (ALL, ()),
    "tower": (ALL[:2], ()),
    "language_model": (ALL[2:], ()),
    "adapters": (ALL, ("vision_tower", "language_model")),
    "one_adapter": (ALL[1:], ("language_model",)),
}
"""What trains, and which of it by adapters."""


def arguments(**given: Any) -> Any:
    return SimpleNamespace(**{"deepspeed_plugin": None, "bf16": False, "fp16": False, **given})


def mixed(folder: Path, trained: str, dtype: torch.dtype, **args: Any) -> tuple[Any, torch.dtype]:
    """A checkpoint of `dtype`, prepared as stage 4 does."""
    parts, adapters = TRAINED[trained]
    model, _ = load_vlm(folder, dtype=dtype)
    lora = LoraSection(r=2, alpha=4, dropout=0.0)
    recipe = Stage4Recipe(
        output_dir="x",
        checkpoint="x",
        data=[],
        trainable=dict.fromkeys(parts, 1e-3),
        **{f"{part}_lora": lora for part in adapters},
    )
    prepare_trainable(model, recipe)
    return model, set_precision(model, arguments(**args))


@pytest.fixture(scope="module", params=["square", "anyres"])
def checkpoint(
    request: pytest.FixtureRequest,
    tiny_clip: Path,
    tiny_llm: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder: Path = tmp_path_factory.mktemp("vlm") / str(request.param)
    save_vlm(*build_vlm(tiny_clip, tiny_llm, image_aspect_ratio=request.param), folder)
    return folder


@pytest.mark.parametrize("trained", list(TRAINED))
def test_a_mixed_model_trains_with_and_without_autocast(checkpoint: Path, trained: str) -> None:
    """Pictures and text alone, with and without gradient checkpointing."""
    model, saved = mixed(checkpoint, trained, torch.bfloat16)
    assert saved == torch.bfloat16
    parameters = dict(model.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert all(parameters[name].dtype == torch.float32 for name in names)
    frozen = {p.dtype for n, p in parameters.items() if not p.requires_grad}
    assert trained == "all" or torch.bfloat16 in frozen
    grid = getattr(model.config, "image_grid_pinpoints", None)
    text = torch.tensor([[9, 10, 11, 12, 13]])
    visual, more = [model.config.image_token_index] * 16, {}
    pixels = torch.randn(1, 3, 32, 32)
    if grid is not None:  # the whole picture, and one row of two crops with their newlines
        visual, more = visual * 3 + visual[:4], {"image_sizes": torch.tensor([[32, 64]])}
        pixels = torch.randn(1, 3, 3, 32, 32)
    ids = torch.cat([torch.tensor([visual]), text], dim=1)
    batches = [
        {"input_ids": ids, "labels": ids, "pixel_values": pixels, **more},
        {"input_ids": text, "labels": text},
    ]
    model.train()
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for autocast in (False, True):
            for batch in batches:
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                seen = [n for n in names if parameters[n].grad is not None]
                assert seen == names if "pixel_values" in batch else seen
                losses.append(loss.item())
    for part in (losses[::2], losses[1::2]):
        assert max(part) - min(part) < 0.05 * max(part)


@pytest.mark.parametrize("trained", ["all", "one_adapter"])
def test_float16_becomes_float32(
    checkpoint: Path, trained: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, saved = mixed(checkpoint, trained, torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert saved == torch.float32
    assert caplog.text.count("float16 weights, in which nothing trains safely") == 1


def test_deepspeed_keeps_masters_in_its_sections_alone(checkpoint: Path) -> None:
    model, saved = mixed(checkpoint, "all", torch.bfloat16, deepspeed_plugin=1, bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert saved == torch.bfloat16
    model, saved = mixed(checkpoint, "projector", torch.bfloat16, deepspeed_plugin=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert saved == torch.bfloat16


def test_named_float16_needs_a_loss_scaler() -> None:
    model = torch.nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match=r"dtype: float16 .* expected trainer.fp16: true"):
        set_precision(model, arguments(), named_fp16=True)
    assert set_precision(model, arguments(fp16=True), named_fp16=True) == torch.float16
    assert model.weight.dtype == torch.float32
    frozen = torch.nn.Linear(2, 2).half().requires_grad_(False)
    set_precision(frozen, arguments(fp16=True), named_fp16=True)
    assert frozen.weight.dtype == torch.float16


def test_bf16_files_train_as_fp32_ones(tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """Without masters, 24 % of the weights moved where 87 % should."""
    write_llava(tmp_path / "data", 8)
    moved = {}
    for dtype in ("bfloat16", "float32"):
        folder = tmp_path / dtype
        save_vlm(*build_vlm(tiny_clip, tiny_llm, dtype=dtype), folder)
        recipe = write_recipe(
            tmp_path / f"{dtype}.yaml",
            stage="stage4_instruction",
            output_dir=str(tmp_path / f"run-{dtype}"),
            checkpoint=str(folder),
            data=[{"path": str(tmp_path / "data" / "llava.json")}],
            trainable={"multi_modal_projector": 2e-5, "language_model": 2e-5},
            trainer={"max_steps": 30, "weight_decay": 0.0, "save_steps": 15, "bf16": True},
        )
        run_here("stage4_instruction", recipe)
        after = load_file(tmp_path / f"run-{dtype}" / "model" / "model.safetensors")
        before = load_file(folder / "model.safetensors")
        assert {str(t.dtype) for t in after.values()} == {f"torch.{dtype}"}
        changed = [(before[n] != after[n]).float() for n in before if "layers" in n]
        moved[dtype] = torch.cat([c.flatten() for c in changed if c.any()]).mean().item()
    assert moved["float32"] > 0.9
    assert moved["bfloat16"] > 0.85 * moved["float32"]


def test_float16_files_do_not_explode(tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """Stage 3 composed it in fp16 and trained so: the projector went from 0.18 to 80.9."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float16)
    half.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "llm")
    write_llava(tmp_path / "data", 8)
    recipe = write_recipe(
        tmp_path / "s3.yaml",
        stage="stage3_projector",
        output_dir=str(tmp_path / "run"),
        vlm={"vision_tower": str(tiny_clip), "language_model": str(tmp_path / "llm")},
        data=[{"path": str(tmp_path / "data" / "llava.json")}],
        trainable={"multi_modal_projector": 1e-3},
    )
    run_here("stage3_projector", recipe)
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert max(t.abs().max() for n, t in state.items() if "projector" in n) < 0.3
    assert load_vlm(tmp_path / "run" / "model")[0].config.text_config.dtype == torch.float32
