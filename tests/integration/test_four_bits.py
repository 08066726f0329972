"""QLoRA: stages 1, 3 and 4 train on four-bit weights, and what they write has none."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llm2clip_vlm.models.loading import ModelError, four_bits
from tests.integration.test_stage1 import write_recipe as write_text_recipe
from tests.peers import QLORA
from tests.tiny import llama_config, llm_tokenizer
from tests.vlm_fixtures import environment, losses, run_here, run_stage, write_llava, write_recipe

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}

GRADIENTS = """
import sys
import torch
from bitsandbytes.functional import dequantize_4bit
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.recipe.base import LoraSection
from llm2clip_vlm.training.adapters import add_adapter

four, whole = (TextEncoder.from_pretrained(sys.argv[1], load_in_4bit=b) for b in (True, False))
four.encode(["a red star"])
with torch.no_grad():
    for name, module in four.backbone.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.backbone.get_submodule(name).weight.copy_(weight)
found = []
for encoder in (four, whole):
    torch.manual_seed(0)
    model = add_adapter(encoder.backbone, LoraSection(r=4, alpha=8, dropout=0.0)).train()
    model(input_ids=torch.tensor([[5, 6, 7]]))[0].cumsum(-1).square().sum().backward()
    found.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
assert len(found[0]) == 14
for name, gradient in found[0].items():
    alike = torch.cosine_similarity(gradient.flatten(), found[1][name].flatten(), dim=0)
    assert alike > 0.999, (name, alike)
"""

needs_bitsandbytes = pytest.mark.skipif(
    not QLORA.is_dir(), reason=f"needs bitsandbytes in {QLORA} (make setup puts it there)"
)


def test_it_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="bitsandbytes is not installed; pip install"):
        four_bits()


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose layers are wide enough for a CPU's four-bit products."""
    folder, tokenizer = tmp_path_factory.mktemp("llm"), llm_tokenizer()
    config = llama_config(len(tokenizer), hidden_size=64)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)
    return folder


@needs_bitsandbytes
def test_an_evaluation_leaves_the_gradients_alone(llm: Path) -> None:
    """On a CPU bitsandbytes repacks weights that are evaluated, and passes wrong gradients then."""
    done = subprocess.run(
        [sys.executable, "-c", GRADIENTS, str(llm)],
        env=environment(QLORA),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_bitsandbytes
def test_stage1_merges_into_the_whole_weights(tmp_path: Path, llm: Path) -> None:
    recipe = write_text_recipe(tmp_path, llm, load_in_4bit=True, lora=LORA)
    run_stage("stage1_text_encoder", recipe, packages=QLORA)
    out = tmp_path / "stage1"
    first, *_, last = losses(out)
    assert last < first
    before = load_file(llm / "model.safetensors")
    after = load_file(out / "text_encoder" / "model.safetensors")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    scale = LORA["alpha"] / LORA["r"]
    names = {name.removeprefix("model.") for name in before if "lm_head" not in name}
    assert names == {name.removeprefix("model.") for name in after}
    moved = 0
    for name, tensor in after.items():
        wanted = before[f"model.{name.removeprefix('model.')}"]
        stem = f"base_model.model.{name.removeprefix('model.').removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            moved += 1
            assert adapter[f"{stem}.lora_B.weight"].any(), f"{stem} has not learned"
            down, up = (adapter[f"{stem}.lora_{end}.weight"] for end in "AB")
            wanted = wanted + scale * up @ down
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    assert moved == 14, "seven linear layers in each of two blocks"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path) -> Path:
    """LLaVA's data, and a stage 3 run with whole weights in `three`."""
    folder = tmp_path_factory.mktemp("four_bits")
    write_llava(folder)
    run_here("stage3_projector", stage3_recipe(folder, "three", tiny_clip, tiny_llm))
    return folder


def stage3_recipe(work: Path, name: str, tower: Path, llm: Path, **values: object) -> Path:
    return write_recipe(
        work / f"{name}.yaml",
        output_dir=str(work / name),
        vlm={"vision_tower": str(tower), "language_model": str(llm)},
        data=[{"path": str(work / "llava.json")}],
        trainable={"multi_modal_projector": 1e-2},
        **values,
    )


@needs_bitsandbytes
def test_a_projector_trains_and_goes_on(work: Path, tiny_clip: Path, tiny_llm: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    recipe = stage3_recipe(work, "bits", tiny_clip, tiny_llm, load_in_4bit=True, trainer=saves)
    out = work / "bits"
    run_stage("stage3_projector", recipe, packages=QLORA)
    before, whole = (load_file(f / "model" / "model.safetensors") for f in (work / "three", out))
    for name, tensor in before.items():
        assert torch.equal(whole[name], tensor) == ("projector" not in name), name
    for stale in ("manifest.json", "model", "checkpoints/checkpoint-4"):
        place = out / stale
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    done = run_stage("stage3_projector", recipe, packages=QLORA)
    assert "from step 2" in done.stdout
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@needs_bitsandbytes
def test_an_adapter_is_merged_into_the_whole_weights(work: Path) -> None:
    out = work / "four"
    recipe = write_recipe(
        work / "four.yaml",
        output_dir=str(out),
        checkpoint=str(work / "three" / "model"),
        data=[{"path": str(work / "llava.json")}],
        trainable={"multi_modal_projector": 1e-2, "language_model": 1e-2},
        language_model_lora=LORA,
        load_in_4bit=True,
    )
    run_stage("stage4_instruction", recipe, packages=QLORA)
    before, after = (load_file(f / "model" / "model.safetensors") for f in (work / "three", out))
    for name, tensor in before.items():
        same = torch.equal(after[name], tensor)
        assert same == (not re.search(r"projector|_proj\.", name) or "vision" in name), name
        assert after[name].dtype == tensor.dtype
    assert "quantization_config" not in json.loads((out / "model" / "config.json").read_text())
