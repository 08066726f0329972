"""Every trainable recipe takes two steps through its stage program, on tiny models of its classes.

Only paths, sizes of batches and numbers of steps are overridden; what a recipe chooses (losses,
adapters, optimizers, templates, precision, feature layers) is what runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.runs.manifest import read_manifest
from llm2clip_vlm.training.callbacks import read_metrics
from tests.conftest import REPO_ROOT
from tests.peers import QLORA
from tests.tiny import HIDDEN_SIZE, llama_config, llm_tokenizer, write_image
from tests.tiny_towers import build_tower
from tests.vlm_fixtures import run_here, run_stage, write_llava

FOLDERS = ("paper_v6", "released_code", "small_data", "llava15", "llava_next")
FILES = sorted(path for name in FOLDERS for path in (REPO_ROOT / "recipes" / name).glob("*.yaml"))
QUICK = {
    "paper_v6/stage1_llama32_1b",
    "paper_v6/stage2b_siglip2_so400m",
    "llava15/stage4_lora",
    "llava_next/stage4",
}
"""Those that are run with the quick tests; the rest is `slow`."""

TEXTS = (
    "a red star on the left",
    "two blue circles and a small dog",
    "a picture of a large green square",
    "three yellow objects are in the image",
    "a purple ring next to a black cross",
    "one man with a brown dog is running",
)
SOURCES = 5
"""Files of records: the most that a recipe reads."""
DREAMLIP = [f"{size}{kind}_captions" for kind in ("IB", "SV", "LLA") for size in ("short", "long")]
COLUMNS = ["raw_caption", *DREAMLIP, "long_caption", "query", "positive", "negative"]


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def rows(source: int) -> list[dict[str, Any]]:
    """Eight records of one source, each caption another text."""
    made = []
    for i in range(8):
        texts = [f"{TEXTS[(i + j) % 6]} {j} {i} {source}" for j in range(len(COLUMNS) + 2)]
        record = {"id": f"{source}-{i}", "image": f"images/{i}.png", "captions": texts[-2:]}
        made.append(record | dict(zip(COLUMNS, texts, strict=False)))
    return made


def encode(texts: list[str]) -> Any:
    import torch

    return torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(len(texts)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Callable[[str], str]:
    """Gives the tiny stand-in of each thing that a recipe names."""
    import torch
    from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("parts")
    for source in range(SOURCES):
        lines = "".join(json.dumps(row) + "\n" for row in rows(source))
        (folder / f"{source}.jsonl").write_text(lines)
    for i in range(8):
        write_image(folder / "images" / f"{i}.png", seed=i)
    write_llava(folder)
    found: dict[str, str] = {"data": str(folder), "clip": str(tiny_clip)}

    def language_model(kind: str) -> None:
        tokenizer = llm_tokenizer()
        torch.manual_seed(0)
        config = llama_config(len(tokenizer), hidden_size=64)
        model: Any = LlamaForCausalLM(config)
        if kind == "qwen":
            shape = config.to_dict()
            kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
            heads = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
            model = Qwen2ForCausalLM(Qwen2Config(**{key: shape[key] for key in (*kept, *heads)}))
        for part in (model, tokenizer):
            part.save_pretrained(folder / kind)

    def vlm(kind: str) -> None:
        from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

        tower, llm, shape = kind.removeprefix("vlm:").split("+")
        strategy = "full" if tower == "siglip" else "default"
        template = None if llm == "qwen" else "vicuna_v1"
        options: Any = {"chat_template": template, "image_aspect_ratio": shape}
        made = build_vlm(give(tower), give(llm), vision_feature_select_strategy=strategy, **options)
        save_vlm(*made, folder / kind)

    def give(kind: str) -> str:
        if kind not in found:
            if kind in ("llama", "qwen"):
                language_model(kind)
            elif kind == "cache":
                texts = [
                    v for n in range(SOURCES) for r in rows(n) for k, v in r.items() if k in COLUMNS
                ]
                texts += [
                    text for n in range(SOURCES) for row in rows(n) for text in row["captions"]
                ]
                EmbeddingCache.build(folder / kind, texts, encode, {"model": "random"})
            elif kind.startswith("vlm:"):
                vlm(kind)
            else:
                build_tower(kind, folder / kind)
            found[kind] = str(folder / kind)
        return found[kind]

    return give


def tower_kind(name: str) -> str:
    """The class of a recipe's tower."""
    return next((kind for kind in ("siglip", "eva02") if kind in name), "clip")


def llm_kind(name: str) -> str:
    return "qwen" if "qwen" in name.lower() else "llama"


def stage3_of(checkpoint: str) -> Path:
    """The recipe whose output stage 4 reads."""
    for path in FILES:
        if path.stem.startswith("stage3"):
            recipe: Any = load_recipe(path, RECIPES["stage3_projector"])
            if checkpoint == f"{recipe.output_dir}/model":
                return path
    raise AssertionError(f"no recipe writes {checkpoint}")


def overrides(recipe: Any, give: Callable[[str], str], out: Path) -> list[str]:
    """Everything outside the recipe replaced: models, data, sizes."""
    data = give("data")
    words = [f"output_dir={out}", "global_batch_size=4", "max_bad_records=0"]
    per_device = 2 if recipe.stage[:6] in ("stage3", "stage4") else 4  # else no accumulation
    trainer = {"per_device_train_batch_size": per_device, "max_steps": 2, "logging_steps": 1}
    trainer |= {"save_steps": 2, "dataloader_num_workers": 0}
    words += [f"trainer.{key}={value}" for key, value in trainer.items()]
    words += ["trainer.disable_tqdm=true"]
    for key in ("train", "sources", "evaluation"):
        for index, source in enumerate(getattr(recipe, key, [])):
            words += [f"{key}.{index}.path={data}/{index}.jsonl"]
            words += [f"{key}.{index}.image_root={data}"] * hasattr(source, "image_root")
    raw = f"{{language_model: {give('llama')}}}"
    stage = recipe.stage
    if stage == "stage0_mntp":
        words += [f"language_model={give('llama')}", "max_length_tokens=32", "mask_token=':'"]
    elif stage == "stage1_text_encoder":
        words += [f"text_encoder.language_model={give('llama')}"]
    elif stage == "stage2a_cache_text":
        words += [f"text_encoder={raw}"]
    elif stage == "stage2b_vision_encoder":
        words += [f"vision_tower={give(tower_kind(recipe.vision_tower))}"]
        if recipe.text_in_loop is not None:
            words += [f"text_in_loop.text_encoder={raw}", "micro_batch_size=1"]
        elif recipe.write_through is not None:
            words += [f"write_through={raw}", f"embedding_cache={out}/cache"]
        else:
            words += [f"embedding_cache={give('cache')}"]
        if recipe.inherit_text is not None:
            words += ["inherit_text.steps=2", "inherit_text.batch_size=4"]
            words += [f"projection_dim={HIDDEN_SIZE}"]
        if recipe.micro_batch_size:
            words += ["micro_batch_size=1"]
        if recipe.evaluation_steps:
            words += ["evaluation_steps=1"]
    else:
        words += [f"data.{i}.path={data}/llava.json" for i in range(len(recipe.data))]
        words += [f"data.{i}.image_root={data}" for i in range(len(recipe.data))]
        if stage == "stage3_projector":
            words += [f"vlm.vision_tower={give(tower_kind(recipe.vlm.vision_tower))}"]
            words += [f"vlm.language_model={give(llm_kind(recipe.vlm.language_model))}"]
        else:
            first: Any = load_recipe(stage3_of(recipe.checkpoint), RECIPES["stage3_projector"])
            kinds = [tower_kind(first.vlm.vision_tower), llm_kind(first.vlm.language_model)]
            kinds += [first.vlm.image_aspect_ratio]
            words += [f"checkpoint={give('vlm:' + '+'.join(kinds))}"]
    return words


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if label(path) in QUICK else [pytest.mark.slow], id=label(path))
        for path in FILES
    ],
)
def test_a_recipe_trains_two_steps(path: Path, parts: Callable[[str], str], tmp_path: Path) -> None:
    stage = next(name for name in RECIPES if name.startswith(path.stem.partition("_")[0]))
    recipe: Any = load_recipe(path, RECIPES[stage])
    assert recipe.stage == stage
    out = tmp_path / "out"
    words = overrides(recipe, parts, out)
    if getattr(recipe, "load_in_4bit", False) or "8bit" in str(recipe.trainer.get("optim")):
        if not QLORA.is_dir():
            pytest.skip(f"needs bitsandbytes in {QLORA} (make setup puts it there)")
        run_stage(stage, path, *words, packages=QLORA)
    else:
        run_here(stage, path, *words)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["stage"] == stage
    if stage == "stage2a_cache_text":
        assert len(EmbeddingCache.open(out)) > 0
        return
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert manifest["extra"]["bad_records"] == 0


def test_the_quick_ones_are_there() -> None:
    assert {label(path) for path in FILES} > QUICK
