"""Every number of the recipes that reproduce something, against what was published.

The table was written from the sources named, not from the recipes: C.1 and the sections and
tables of LLM2CLIP v6 (2411.04997v6), files of its repository, table 9 and section 3.3 of
LLaVA-1.5 (2310.03744), scripts of LLaVA (v1_5) and Open-LLaVA-NeXT (v1_6), README, models/config.py
and train.py of nanoVLM's first release. HF = a default of Hugging Face's TrainingArguments that the
script leaves as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = ("paper_v6", "released_code", "llava15", "llava_next", "nano")
_NANO: dict[str, tuple[Any, str]] = {
    "global_batch_size": (256, "config.py: batch_size"),
    "max_length_tokens": (128 - 49 + 14 * 14, "config.py: lm_max_length; every patch a token"),
    "trainable.multi_modal_projector": (2e-3, "config.py: lr_mp"),
    "trainer.lr_scheduler_type": ("cosine_with_min_lr", "train.py: get_lr"),
    "trainer.lr_scheduler_kwargs.min_lr_rate": (0.1, "train.py: get_lr"),
    "trainer.warmup_steps": (0.03, "train.py: get_lr"),
    "trainer.weight_decay": (0.01, "torch.optim.AdamW's, which train.py leaves as it is"),
    "trainer.max_grad_norm": (0.0, "train.py: none"),
    "trainer.bf16": (True, "train.py: autocast"),
    "trainer.per_device_train_batch_size": (64, "memory, same updates"),
}

PUBLISHED: dict[str, dict[str, tuple[Any, str]]] = {
    "paper_v6/stage1.yaml": {
        "global_batch_size": (2048, "C.1"),
        "text_encoder.language_model": ("meta-llama/Llama-3.1-8B", "section 4.1"),
        "text_encoder.pooling": ("mean", "section 3.1"),
        "text_encoder.max_length_tokens": (512, "C.1"),
        "text_encoder.instruction": (
            "Given a caption, retrieve a similar relevant caption. ",
            "C.1",
        ),
        "text_encoder.bidirectional": (True, "section 3.1"),
        "lora.r": (16, "C.1"),
        "lora.alpha": (32, "C.1"),
        "lora.dropout": (0.05, "run_supervised.py:97-116"),
        "train.3.directed": (True, "section 4.1: question and answer"),
        "scale": (50.0, "HardNegativeNLLLoss.py"),
        "symmetric": (False, "HardNegativeNLLLoss.py"),
        "trainer.per_device_train_batch_size": (2048 // 32, "C.1: 32 GPUs"),
        "trainer.num_train_epochs": (1, "C.1"),
        "trainer.learning_rate": (2e-4, "C.1"),
        "trainer.lr_scheduler_type": ("linear", "HF"),
        "trainer.warmup_steps": (300, "C.1"),
        "trainer.weight_decay": (0.0, "HF"),
        "trainer.bf16": (True, "C.1"),
        "trainer.gradient_checkpointing": (True, "C.1"),
    },
    "paper_v6/stage1_llama32_1b.yaml": {
        "text_encoder.language_model": ("meta-llama/Llama-3.2-1B", "table 7"),
    },
    "paper_v6/stage2a.yaml": {},
    "paper_v6/stage2b.yaml": {
        "global_batch_size": (4096, "C.1"),
        "vision_tower": ("openai/clip-vit-large-patch14-336", "section 4.1"),
        "tower_training": ("full", "section 3.2"),
        "text_adaptor.num_blocks": (4, "section 3.2"),
        "text_adaptor.expansion": (2, "eva_clip/model.py:217-253"),
        "projection_dim": (1280, "section 3.2"),
        "logit_scale_init": (4.6052, "factory.py:113-131: ln 100 of the pretrained CLIP"),
        "learning_rates.vision_tower": (1e-5, "C.1"),
        "learning_rates.visual_projection": (1e-5, "C.1"),
        "learning_rates.text_adaptor": (1e-5, "C.1"),
        "layer_decay": (1.0, "the paper names none"),
        "caption_weights.raw_caption": (3, "table A3: half real, half dense captions"),
        "caption_weights.longIB_captions": (1, "table A3"),
        "caption_weights.longSV_captions": (1, "table A3"),
        "caption_weights.longLLA_captions": (1, "table A3"),
        "trainer.per_device_train_batch_size": (4096 // 8, "run.sh: 8 GPUs"),
        "trainer.num_train_epochs": (4, "C.1"),
        "trainer.lr_scheduler_type": ("cosine", "C.1"),
        "trainer.warmup_steps": (0, "C.1 names none"),
        "trainer.weight_decay": (0.05, "C.1, run.sh"),
        "trainer.adam_beta2": (0.999, "params.py:10"),
        "trainer.max_grad_norm": (5.0, "run.sh"),
        "trainer.bf16": (True, "declared"),
        "trainer.gradient_checkpointing": (True, "run.sh"),
    },
    "paper_v6/stage2b_60m.yaml": {"caption_weights.long_caption": (3, "table A3")},
    "paper_v6/stage2b_clip_b16.yaml": {"vision_tower": ("openai/clip-vit-base-patch16", "table 1")},
    "paper_v6/stage2b_clip_l14.yaml": {
        "vision_tower": ("openai/clip-vit-large-patch14", "table 1")
    },
    "paper_v6/stage2b_lora_in_loop.yaml": {
        "text_in_loop.lora.r": (16, "C.1"),
        "text_in_loop.lora.alpha": (32, "C.1"),
        "text_in_loop.lora.dropout": (0.05, "run_supervised.py:97-116"),
        "text_in_loop.learning_rate": (2e-4, "C.1"),
        "trainer.gradient_checkpointing": (False, "declared: GradCache instead"),
    },
    "paper_v6/stage2b_siglip2_so400m.yaml": {
        "vision_tower": ("google/siglip2-so400m-patch14-224", "table 1"),
        "projection_dim": (1152, "eva_clip/model_configs"),
        "loss": ("sigmoid", "issue 51"),
        "logit_scale_init": (2.3026, "SigLIP (2303.15343): ln 10"),
        "logit_bias_init": (-10.0, "SigLIP (2303.15343)"),
    },
    "released_code/stage0.yaml": {
        "seed": (42, "HF"),
        "global_batch_size": (32 * 8, "json config"),
        "max_length_tokens": (512, "json config"),
        "mask_probability": (0.2, "json config"),
        "mask_token": ("_", "json config: blank"),
        "trainer.per_device_train_batch_size": (32, "json config"),
        "trainer.num_train_epochs": (1, "json config"),
        "trainer.learning_rate": (5e-5, "HF"),
        "trainer.lr_scheduler_type": ("linear", "HF"),
        "trainer.weight_decay": (0.0, "HF"),
        "trainer.bf16": (True, "json config"),
        "trainer.gradient_checkpointing": (True, "json config"),
        "trainer.save_steps": (200, "json config"),
    },
    "released_code/stage1.yaml": {
        "seed": (42, "HF"),
        "global_batch_size": (64 * 8, "json config"),
        "text_encoder.pooling": ("mean", "json config"),
        "text_encoder.max_length_tokens": (512, "json config"),
        "text_encoder.instruction": ("", "extract_embedding.py"),
        "text_encoder.chat": (True, "run_supervised.py:51"),
        "text_encoder.bidirectional": (True, "LLM2Vec's LlamaBiModel"),
        "lora.r": (16, "run_supervised.py:97-116"),
        "lora.alpha": (32, "run_supervised.py:97-116"),
        "lora.dropout": (0.05, "run_supervised.py:97-116"),
        "train.0.prompts.shortSV_captions->longSV_captions": (
            "Given a sentence, retrieve a detailed relevant sentence; ",
            "E5_cc3m.py:31-34",
        ),
        "train.0.prompts.longSV_captions->shortSV_captions": (
            "Given a detailed sentence, retrieve a short relevant sentence; ",
            "E5_cc3m.py:31-34",
        ),
        "train.1.directed": (True, "E5_cc3m.py"),
        "scale": (50.0, "HardNegativeNLLLoss.py"),
        "symmetric": (False, "HardNegativeNLLLoss.py"),
        "trainer.per_device_train_batch_size": (64, "json config"),
        "trainer.num_train_epochs": (1, "json config"),
        "trainer.learning_rate": (2e-4, "json config"),
        "trainer.lr_scheduler_type": ("linear", "HF"),
        "trainer.warmup_steps": (300, "json config"),
        "trainer.weight_decay": (0.0, "HF"),
        "trainer.bf16": (True, "json config"),
        "trainer.gradient_checkpointing": (True, "json config"),
    },
    "released_code/stage2a.yaml": {},
    "released_code/stage2b.yaml": {
        "seed": (4096, "run.sh"),
        "global_batch_size": (512 * 8, "run.sh"),
        "tower_training": ("full", "run.sh"),
        "text_adaptor.num_blocks": (4, "eva_clip/model.py:217-253"),
        "text_adaptor.expansion": (2, "eva_clip/model.py:217-253"),
        "projection_dim": (1280, "eva_clip/model.py:459"),
        "logit_scale_init": (4.6052, "factory.py:113-131"),
        "learning_rates.vision_tower": (1e-5, "run.sh"),
        "learning_rates.visual_projection": (1e-5, "run.sh"),
        "learning_rates.text_adaptor": (1e-5, "run.sh"),
        "layer_decay": (0.85, "run.sh"),
        "augmentation.crop_scale_min": (0.9, "run.sh"),
        "caption_weights.shortSV_captions": (1, "data.py:617"),
        "caption_weights.longSV_captions": (1, "data.py:617"),
        "trainer.per_device_train_batch_size": (512, "run.sh"),
        "trainer.num_train_epochs": (20, "run.sh"),
        "trainer.lr_scheduler_type": ("cosine", "run.sh"),
        "trainer.warmup_steps": (0, "run.sh"),
        "trainer.weight_decay": (0.05, "run.sh"),
        "trainer.adam_beta1": (0.9, "params.py:10"),
        "trainer.adam_beta2": (0.999, "params.py:10"),
        "trainer.adam_epsilon": (1e-8, "params.py:10"),
        "trainer.max_grad_norm": (5.0, "run.sh"),
        "trainer.bf16": (True, "declared"),
        "trainer.gradient_checkpointing": (True, "run.sh"),
    },
    "released_code/stage2b_siglip2_so400m.yaml": {
        "projection_dim": (1152, "eva_clip/model_configs"),
        "logit_scale_init": (2.6592, "model.py:328: ln(1 / 0.07)"),
    },
    "llava15/stage3.yaml": {
        "global_batch_size": (256, "table 9"),
        "vlm.vision_tower": ("openai/clip-vit-large-patch14-336", "section 3.3"),
        "vlm.language_model": ("lmsys/vicuna-7b-v1.5", "section 3.3"),
        "vlm.vision_feature_layer": (-2, "pretrain.sh"),
        "vlm.vision_feature_select_strategy": ("default", "pretrain.sh"),
        "vlm.image_aspect_ratio": ("square", "pretrain.sh"),
        "max_length_tokens": (2048, "pretrain.sh"),
        "plain": (True, "pretrain.sh"),
        "trainable.multi_modal_projector": (1e-3, "table 9"),
        "trainer.per_device_train_batch_size": (32, "pretrain.sh"),
        "trainer.num_train_epochs": (1, "table 9"),
        "trainer.lr_scheduler_type": ("cosine", "table 9"),
        "trainer.warmup_steps": (0.03, "table 9"),
        "trainer.weight_decay": (0.0, "table 9"),
        "trainer.max_grad_norm": (0.0, "zero2.json: no gradient_clipping"),
        "trainer.bf16": (True, "pretrain.sh"),
        "trainer.gradient_checkpointing": (True, "pretrain.sh"),
        "trainer.dataloader_num_workers": (4, "pretrain.sh"),
    },
    "llava15/stage3_qwen25_0_5b.yaml": {
        "vlm.vision_feature_select_strategy": ("full", "TinyLLaVA: SigLIP has no CLS token"),
    },
    "llava15/stage3_siglip2.yaml": {
        "vlm.vision_feature_select_strategy": ("full", "SigLIP2 has no CLS token"),
    },
    "llava15/stage4.yaml": {
        "global_batch_size": (128, "table 9"),
        "image_aspect_ratio": ("pad", "finetune.sh"),
        "max_length_tokens": (2048, "finetune.sh"),
        "trainable.multi_modal_projector": (2e-5, "table 9"),
        "trainable.language_model": (2e-5, "table 9"),
        "trainer.per_device_train_batch_size": (16, "finetune.sh"),
        "trainer.num_train_epochs": (1, "table 9"),
        "trainer.lr_scheduler_type": ("cosine", "table 9"),
        "trainer.warmup_steps": (0.03, "table 9"),
        "trainer.weight_decay": (0.0, "table 9"),
        "trainer.max_grad_norm": (0.0, "zero3.json: no gradient_clipping"),
        "trainer.bf16": (True, "finetune.sh"),
        "trainer.gradient_checkpointing": (True, "finetune.sh"),
        "trainer.dataloader_num_workers": (4, "finetune.sh"),
    },
    "llava15/stage4_lora.yaml": {
        "language_model_lora.r": (128, "finetune_lora.sh"),
        "language_model_lora.alpha": (256, "finetune_lora.sh"),
        "language_model_lora.dropout": (0.05, "train.py: lora_dropout"),
        "trainable.multi_modal_projector": (2e-5, "finetune_lora.sh: mm_projector_lr"),
        "trainable.language_model": (2e-4, "finetune_lora.sh"),
    },
    "llava15/stage4_qwen25_0_5b.yaml": {
        "image_aspect_ratio": ("square", "TinyLLaVA"),
        "trainer.per_device_train_batch_size": (8, "one GPU"),
    },
    "llava_next/stage3.yaml": {
        "vlm.image_aspect_ratio": ("anyres", "7b/pretrain.sh"),
        "max_length_tokens": (4096, "7b/pretrain.sh"),
        "trainer.per_device_train_batch_size": (8, "7b/pretrain.sh"),
    },
    "llava_next/stage3_llama3_8b.yaml": {"max_length_tokens": (6144, "8b/finetune.sh")},
    "llava_next/stage4.yaml": {
        "max_length_tokens": (4096, "7b/finetune.sh"),
        "trainable.vision_tower": (2e-6, "7b/finetune.sh"),
        "trainable.multi_modal_projector": (2e-5, "7b/finetune.sh"),
        "trainable.language_model": (2e-5, "7b/finetune.sh"),
        "trainer.per_device_train_batch_size": (4, "7b/finetune.sh"),
    },
    "llava_next/stage4_llama3_8b.yaml": {"max_length_tokens": (6144, "8b/finetune.sh")},
    "nano/stage3.yaml": _NANO
    | {
        "vlm.vision_tower": ("google/siglip-base-patch16-224", "README"),
        "vlm.vision_feature_layer": (-1, "vision_transformer.py: after the last block"),
        "plain": (True, "declared: nanoVLM has no such stage"),
        "trainer.num_train_epochs": (1, "declared: nanoVLM has no such stage"),
    },
    "nano/stage3_clip.yaml": {"vlm.vision_feature_layer": (-2, "pretrain.sh")},
    "nano/stage4.yaml": _NANO
    | {
        "trainable.vision_tower": (1e-4, "config.py: lr_backbones"),
        "trainable.language_model": (1e-4, "config.py: lr_backbones"),
        "trainer.num_train_epochs": (2, "declared: 5 in config.py"),
    },
}

OURS = {
    "batch_tokens": "speed",
    "evaluation_steps": "how often we look",
    "max_bad_records": "a guess, and says so",
    "micro_batch_size": "memory, same gradient",
    "packing_max_images": "memory, declared",
    "trainer.dataloader_num_workers": "speed",
    "trainer.logging_steps": "how often we look",
    "trainer.save_steps": "declared",
}
"""Numbers that nobody published and that no result depends on."""


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is no mapping and no list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{key}.{i}")
    else:
        yield key, value


def written(name: str) -> dict[str, Any]:
    """What stands in the file itself, without its base, by dotted key."""
    return dict(leaves(yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name: str) -> None:
    given = written(name)
    for key, (value, source) in PUBLISHED[name].items():
        assert given.get(key) == value, f"{name}: {key}: {source} says {value}, got {given[key]!r}"
        assert type(given[key]) is type(value), f"{name}: {key}: {given[key]!r}"


def test_every_number_has_its_source() -> None:
    """A number that is neither published nor declared as ours cannot slip into a claim."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.yaml")):
            name = f"{folder}/{path.name}"
            if path.stem.endswith("_24gb"):  # a smaller GPU's own, as its deviations say
                assert yaml.safe_load(path.read_text())["deviations"]["batch"], name
                continue
            for key, value in written(name).items():
                if isinstance(value, (bool, int, float)):
                    known = key in PUBLISHED.get(name, {}) or key in OURS
                    assert known, f"{name}: {key}: {value} has no source in PUBLISHED"


def test_what_no_result_depends_on_stays_within_reason() -> None:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.yaml")):
            given = written(f"{folder}/{path.name}")
            assert 0 < given.get("trainer.logging_steps", 1) <= 50
            assert 0 < given.get("trainer.save_steps", 1) <= 500
            assert 0 <= given.get("trainer.dataloader_num_workers", 0) <= 8
            assert given.get("max_bad_records", 8000) in (8000, 100_000)
            assert given.get("batch_tokens", 65_536) == 65_536
            assert given.get("packing_max_images", 40) in (8, 16, 40, 60)
            assert given.get("evaluation_steps", 1000) == 1000
            assert given.get("micro_batch_size", 32) == 32


EXPECTED_ROWS = {
    "llava15_7b": "VQAv2 78.5, GQA 62.0, VizWiz 50.0, SQA-I 66.8, TextVQA 58.2, POPE random 87.3, "
    "POPE popular 86.1, POPE adversarial 84.2, MME 1510.7, MMBench 64.3, MMBench-CN 58.3, "
    "LLaVA-W 65.4, MM-Vet 31.1, SEED all 58.6, SEED image 66.1",
    "llm2clip_paper_clip": "VQAv2 79.04, GQA 62.86, VizWiz 50.57, SQA-I 67.97, TextVQA 57.48, "
    "POPE random 87.7, POPE adversarial 84.85, POPE popular 86.3, MME 1476.69, MMBench 66.66, "
    "MMBench-CN 60.39, LLaVA-W 58.0, MM-Vet 34.3, SEED all 59.86, SEED image 66.95",
    "llm2clip_paper_llm2clip": "VQAv2 79.80, GQA 63.15, VizWiz 52.37, SQA-I 69.92, TextVQA 58.35, "
    "POPE random 88.55, POPE adversarial 82.76, POPE popular 87.75, MME 1505.82, MMBench 68.29, "
    "MMBench-CN 60.40, LLaVA-W 62.7, MM-Vet 34.8, SEED all 60.96, SEED image 68.80",
    "nanovlm_222m": "MMStar 35.3",
}
"""LLaVA-1.5, tables 3 and 4 (POPE by its three splits); LLM2CLIP v6, table 5; nanoVLM's README."""


@pytest.mark.parametrize("row", EXPECTED_ROWS)
def test_expected_rows_are_the_papers(row: str) -> None:
    path = ROOT.parent / "eval" / "expected" / ("nano.yaml" if "nano" in row else "llava15.yaml")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))["rows"][row]
    for part in EXPECTED_ROWS[row].split(", "):
        column, _, value = part.rpartition(" ")
        assert given[column] == float(value), column
