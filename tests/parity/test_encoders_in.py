"""LLM2CLIP's, open_clip's and timm's encoders come in and compute what they did."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.interop.layouts.tables import LAYOUTS, tower_config
from llm2clip_vlm.models.vision.towers import load_vision_tower
from tests.parity import reference

Weights = dict[str, Tensor]


def upstream(weights: Weights) -> Weights:
    """EVA-CLIP's bare biases."""
    names = {".q_proj.bias": ".q_bias", ".v_proj.bias": ".v_bias"}
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        renamed[name] = tensor
    return renamed


def fused(weights: Weights) -> Weights:
    """One `qkv` and bare biases."""
    found = upstream(weights)
    for n in range(reference.DEPTH):
        at = f"blocks.{n}.attn."
        rows = [found.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        found[at + "qkv.weight"] = torch.cat(rows)
    return found


TOWERS: dict[str, tuple[Callable[[], Weights], Callable[[Weights, Tensor], Tensor], str]] = {
    "openai_clip": (reference.openai, reference.openai_features, "visual."),
    "eva02": (reference.eva02, reference.eva02_features, "visual."),
    "eva02 upstream": (lambda: upstream(reference.eva02()), reference.eva02_features, "visual."),
    "eva02 fused": (lambda: fused(reference.eva02()), reference.eva02_features, "visual."),
    "siglip_timm": (reference.siglip, reference.siglip_features, "visual.trunk."),
}


def official(kind: str) -> tuple[Weights, Tensor]:
    """A training checkpoint of LLM2CLIP, and its image features on `pixels()`."""
    make, features, prefix = TOWERS[kind]
    tower = make()
    plain = reference.eva02() if kind.startswith("eva02") else tower
    weights = {prefix + name: tensor for name, tensor in tower.items()}
    out = 48 if kind != "siglip_timm" else reference.WIDTH
    weights |= reference.adaptor("text.text_adaptor.", out=out)
    weights |= {"logit_scale": torch.tensor(4.2)}
    return weights, features(plain, reference.pixels())


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Against float64; measured on the development machine, all calls: at most 2.7e-6 of 3.3."""
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("wrapper", ["module", "state_dict", "safetensors"])
@torch.no_grad()
def test_official_training_checkpoint(kind: str, wrapper: str, tmp_path: Path) -> None:
    weights, want = official(kind)
    file = tmp_path / "any name"
    if wrapper == "safetensors":
        save_file(weights, file)
    else:
        torch.save({wrapper: {f"module.{k}": t for k, t in weights.items()}, "step": 3}, file)
    certificate = convert(file, tmp_path / "out")
    assert certificate["format"] == kind.split(maxsplit=1)[0]
    assert not certificate["keys"]["missing"] and not certificate["keys"]["unexpected"]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    features = model.visual_projection(model.vision_tower(reference.pixels()).pooler_output)
    close(features, want, 1e-5)
    close(
        model.get_image_features(reference.pixels()), want / want.norm(dim=-1, keepdim=True), 1e-5
    )
    vectors = torch.randn(5, 24, generator=torch.Generator().manual_seed(6))
    text = reference.adaptor_features(weights, "text.text_adaptor.", vectors)
    close(model.get_text_features(vectors), text, 1e-5)
    assert model.logit_scale.item() == pytest.approx(4.2)
    tower = load_vision_tower(tmp_path / "out" / "vision_tower")
    assert torch.equal(
        tower.model(reference.pixels()).pooler_output,
        model.vision_tower(reference.pixels()).pooler_output,
    )
    assert tower.image_mean[0] == (0.5 if kind == "siglip_timm" else pytest.approx(0.48145466))


REMOTE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
"""


def hf_release(folder: Path, code: str = REMOTE) -> Weights:
    """A release in Hugging Face layout, with remote code that leaves a trace where it runs."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    tower = CLIPVisionModel(
        CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=28, patch_size=14)
    )
    weights = {f"vision_model.{name}": t for name, t in tower.state_dict().items()}
    weights |= {"visual_projection.weight": 0.05 * torch.randn(48, 128)}
    weights |= reference.adaptor("text_adapter.adaptor.")
    weights |= {"logit_scale": torch.tensor(4.6)}
    weights |= {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "modeling_clip.py").write_text(code)
    config = {
        "model_type": "clip",
        "architectures": ["LLM2CLIPModel"],
        "auto_map": {
            "AutoModel": "modeling_clip.LLM2CLIPModel",
            "AutoConfig": "modeling_clip.CLIPConfig",
        },
        "projection_dim": 48,
        "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@torch.no_grad()
def test_release_in_hugging_face_layout_without_its_code(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    weights = hf_release(tmp_path / "release")
    certificate = convert(tmp_path / "release", tmp_path / "out")
    assert not (tmp_path / "release" / "ran").exists()
    assert certificate["keys"]["left_out"] == {"vision_tower.embeddings": 1}
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    plain = CLIPVisionModel(model.vision_tower.config).eval()
    plain.load_state_dict(
        {k[13:]: t for k, t in weights.items() if "vision_model" in k and "_ids" not in k}
    )
    want = plain(reference.pixels()).pooler_output @ weights["visual_projection.weight"].T
    close(
        model.get_image_features(reference.pixels()),
        (want / want.norm(dim=-1, keepdim=True)).double(),
        1e-6,
    )
    vectors = torch.randn(5, 24)
    text = reference.adaptor_features(weights, "text_adapter.adaptor.", vectors)
    close(model.get_text_features(vectors), text, 1e-5)


@torch.no_grad()
def test_remote_code_runs_only_when_asked_and_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    code = """
import torch
from transformers import CLIPConfig as Base, CLIPVisionModel, PreTrainedModel

class CLIPConfig(Base):
    pass

class LLM2CLIPModel(PreTrainedModel):
    config_class = CLIPConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()
    def get_image_features(self, pixels):
        return pixels.flatten(1)[:, :48]
"""
    hf_release(tmp_path / "release", code)
    with pytest.raises(ValueError, match=r"image_embeds opened with modeling_clip\.py"):
        convert(tmp_path / "release", tmp_path / "out", trust_remote_code=True)
    assert "runs remote code" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "release", tmp_path / "out")
    assert "remote" not in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["visual.", "", "visual.trunk."])
@torch.no_grad()
def test_open_clip_and_timm_towers(stored: str, tmp_path: Path) -> None:
    """A tower alone, of a CLIP whose text tower is left out, and timm's file without prefix."""
    folder = tmp_path / "in"
    folder.mkdir()
    if stored == "visual.":
        tower = reference.openai()
        weights = {stored + k: t for k, t in tower.items()}
        weights |= {"transformer.resblocks.0.ln_1.weight": torch.ones(4)}
        weights |= {"positional_embedding": torch.ones(4, 4), "logit_scale": torch.tensor(1.0)}
        config = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 128, "head_width": 64}}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        last = reference.openai_states(tower, reference.pixels())[-1][:, 0]
        double = {k: t.double() for k, t in tower.items()}
        want = reference.norm(last, double, "ln_post", 1e-5)
    else:
        tower = reference.siglip()
        weights = {stored + k: t for k, t in tower.items()}
        want = reference.siglip_features(tower, reference.pixels())
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    certificate = convert(folder, tmp_path / "out")
    model = load_vision_tower(tmp_path / "out").model
    assert certificate["keys"]["matched"] == len(model.state_dict())
    close(model(reference.pixels()).pooler_output, want, 1e-5)


@torch.no_grad()
def test_clip_tower_hidden_states_are_the_definitions(tmp_path: Path) -> None:
    """Every state, not only the pooled one."""
    tower = reference.openai()
    save_file(tower, tmp_path / "tower.safetensors")
    convert(tmp_path / "tower.safetensors", tmp_path / "out", settings={"hidden_act": "quick_gelu"})
    model = load_vision_tower(tmp_path / "out").model
    states = model(reference.pixels(), output_hidden_states=True).hidden_states
    for got, want in zip(states, reference.openai_states(tower, reference.pixels()), strict=True):
        close(got, want, 1e-5)


def test_an_activation_without_a_name_is_asked_for(tmp_path: Path) -> None:
    save_file(reference.openai(), tmp_path / "tower.safetensors")
    with pytest.raises(ModelError, match="--set hidden_act=quick_gelu"):
        convert(tmp_path / "tower.safetensors", tmp_path / "out")
    with pytest.raises(ModelError, match="has no field 'hidden_atc'"):
        convert(tmp_path / "tower.safetensors", tmp_path / "out", settings={"hidden_atc": "gelu"})
    gelu = {"hidden_act": "gelu"}
    bare = convert(tmp_path / "tower.safetensors", tmp_path / "bare", settings=gelu)
    assert bare["guessed"].startswith("num_attention_heads=2, from the width")
    gelu["num_attention_heads"] = 4
    named = convert(tmp_path / "tower.safetensors", tmp_path / "named", settings=gelu)
    assert "guessed" not in named
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    with pytest.raises((ModelError, OSError)):
        convert(tmp_path / "tower.safetensors", tmp_path / "here", settings={"hidden_act": "gelu"})


def test_a_partial_load_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    weights, _ = official("eva02")
    del weights["visual.blocks.1.mlp.w1.weight"]
    weights["visual.blocks.0.gamma_1"] = torch.ones(2)
    weights["visual.norm.weight"] = torch.ones(3)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"missing 2 \(first: vision_tower.blocks.1.mlp.w1"):
        convert(tmp_path / "w.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    keys = convert(tmp_path / "w.pt", tmp_path / "out", partial=True)["keys"]
    assert keys["missing"][1] == "vision_tower.norm.weight (got [3], expected [128])"
    assert keys["unexpected"] == ["vision_tower.blocks.0.gamma_1"]
    assert keys["left_out"] == {"vision_tower.rope": 1}


def test_what_is_nothing_known_is_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "openai_clip.pt")
    with pytest.raises(ModelError, match="no layout of a vision tower"):
        convert(tmp_path / "openai_clip.pt", tmp_path / "out")
    with pytest.raises(ModelError, match="no such file"):
        convert(tmp_path / "openai/clip", tmp_path / "out")
    with tarfile.open(tmp_path / "embeddings", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.longSV_captions"))
    with pytest.raises(ModelError, match="embed build"):
        convert(tmp_path / "embeddings", tmp_path / "out")


@torch.no_grad()
def test_caption_contrastive_llama_becomes_a_text_encoder(tmp_path: Path) -> None:
    """The releases name remote code; the weights are a Llama's without head."""
    from transformers import LlamaModel

    from llm2clip_vlm.models.text.text_encoder import TextEncoder
    from tests.tiny import llama_config, llm_tokenizer

    tokenizer = llm_tokenizer()
    torch.manual_seed(0)
    llama = LlamaModel(llama_config(len(tokenizer))).eval()
    folder = tmp_path / "cc"
    for part in (llama, tokenizer):
        part.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LlamaEncoderModel"],
        "auto_map": {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llama_encoder.py").write_text(REMOTE)
    convert(folder, tmp_path / "out")
    assert not (folder / "ran").exists()
    encoder = TextEncoder.from_pretrained(tmp_path / "out")
    assert encoder.settings.bidirectional and encoder.settings.chat
    assert (encoder.settings.pooling, encoder.settings.max_length_tokens) == ("mean", 512)
    text = "a red dog ."
    ids = tokenizer(
        "<s><|user|>" + text + "</s>", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    llama.config.is_causal = False
    for layer in llama.layers:
        layer.self_attn.is_causal = False
    hidden = llama(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 2:]
    want = hidden.mean(0)
    close(encoder.encode([text])[0], (want / want.norm()).double(), 1e-5)


@pytest.mark.parametrize("kind", ["openai_clip", "eva02", "siglip_timm"])
def test_half_precision_stays(kind: str, tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in official(kind)[0].items()}
    if kind == "eva02":
        weights["visual.rope.freqs_cos"] = weights["visual.rope.freqs_cos"].float()
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert load_vision_tower(tmp_path / "out" / "vision_tower").model.dtype == torch.float16


@pytest.mark.parametrize(
    ("width", "heads"), [(64, 1), (768, 12), (1024, 16), (1152, 16), (1280, 16), (1664, 16)]
)
def test_heads_of_published_widths(width: int, heads: int) -> None:
    """ViT-B, L, So400m, H and bigG; a file without config does not say them."""
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, width),
        "encoder.layers.0.mlp.fc1.weight": (4 * width, width),
    }
    weights = {
        f"vision_tower.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()
    }
    config = tower_config(LAYOUTS["openai_clip"], weights, {"hidden_act": "gelu"}, "file")
    assert config.num_attention_heads == heads and config.image_size == 224


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}}, "gelu"),
        (
            {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_so400m_patch16_siglip_256"}}},
            "gelu_pytorch_tanh",
        ),
        ({"architecture": "vit_large_patch16_siglip_512"}, "gelu_pytorch_tanh"),
        (
            {"architecture": "vit_large_patch16_siglip_512", "model_args": {"act_layer": "gelu"}},
            "gelu",
        ),
    ],
)
def test_timms_siglips_have_the_gelu_of_their_name(
    config: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    save_file(reference.siglip(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    assert load_vision_tower(tmp_path / "out").model.config.hidden_act == activation


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_images_are_made_ready_as_the_config_beside_the_weights_says(
    library: str, squash: bool, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    save_file(reference.siglip(), tmp_path / "in" / "model.safetensors")
    given: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "interpolation": "bilinear"}
    if library == "open_clip":
        given |= {"resize_mode": "squash" if squash else "shortest"}
        config = {"preprocess_cfg": given, "model_cfg": {"vision_cfg": {}}}
    else:
        given |= {"crop_mode": "squash" if squash else "center", "input_size": [3, 28, 28]}
        given |= {"crop_pct": 1.0}
        config = {"pretrained_cfg": given, "architecture": "vit_base_patch16_siglip_224"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    tower = load_vision_tower(tmp_path / "out")
    assert (tower.image_mean, tower.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert tower.image_processor.resample == 2
    assert bool(tower.image_processor.do_center_crop) != squash


@pytest.mark.parametrize(
    "name", ["text.text_adaptor.5.weight", "visual.conv1.weight", "visual.proj"]
)
def test_an_incomplete_file_is_named(name: str, tmp_path: Path) -> None:
    weights = {f"visual.{key}": tensor for key, tensor in reference.openai(out=128).items()}
    weights |= reference.adaptor("text.text_adaptor.", out=128)
    weights |= {"logit_scale": torch.tensor(4.2)}
    del weights[name]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w\.safetensors.* missing"):
        convert(tmp_path / "w.safetensors", tmp_path / "out")


def test_remote_code_that_cannot_be_shown_or_compared_is_refused(tmp_path: Path) -> None:
    hf_release(tmp_path / "release")
    file = tmp_path / "release" / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"]["AutoModel"] = "somebody/else--modeling_clip.LLM2CLIPModel"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"another repository, 'somebody/else--modeling"):
        convert(tmp_path / "release", tmp_path / "out", trust_remote_code=True)
    assert not (tmp_path / "release" / "ran").exists()
    save_file(reference.siglip(), tmp_path / "tower.safetensors")
    with pytest.raises(ModelError, match="compares an adaptor"):
        convert(tmp_path / "tower.safetensors", tmp_path / "out", trust_remote_code=True)
