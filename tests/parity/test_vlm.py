"""VLMs: the same logits before and after every export, LLaVA's format both ways, vLLM's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    pipeline,
)

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.interop.weights import read_weights
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from tests.tiny import llama_config, llm_tokenizer, write_image
from tests.tiny_towers import build_tower

QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]}
]


@pytest.fixture
def vlm(tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> Path:
    """What stage 4 leaves: tower, projector and decoder all unlike their beginnings."""
    return make(tiny_clip, tiny_llm, tmp_path / "run" / "model")


def make(tower: Path, llm: Path, folder: Path, **more: Any) -> Path:
    model, processor = build_vlm(tower, llm, image_aspect_ratio="pad", **more)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_vlm(model, processor, folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """On a real prompt and picture, by plain transformers."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    image = Image.open(write_image(folder.parent / "image.png", size_px=40))
    inputs = processor(images=image, text=text, return_tensors="pt")
    return model(**inputs).logits


@pytest.mark.parametrize("to", ["transformers", "vllm"])
def test_logits_are_the_same_after_an_export(to: str, vlm: Path, tmp_path: Path) -> None:
    certificate = export(vlm.parent, to, tmp_path / "out")
    assert certificate["checks"]["logits"]["max_difference"] == 0
    assert certificate["needs"] == "transformers alone"
    assert torch.equal(logits(tmp_path / "out"), logits(vlm))
    names = read_weights(tmp_path / "out")
    known = ("vision_tower.vision_model.", "multi_modal_projector.linear_", "language_model.")
    assert all(name.startswith(known) for name in names)


def test_the_pipeline_answers(vlm: Path, tmp_path: Path) -> None:
    export(vlm, "transformers", tmp_path / "out")
    image = Image.open(write_image(tmp_path / "image.png"))
    chat = [dict(QUESTION[0])]
    chat[0]["content"] = [{"type": "image", "image": image}, QUESTION[0]["content"][1]]
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"), device="cpu")
    answer = ask(text=chat, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


@torch.no_grad()
def test_llava_format_both_ways(vlm: Path, tmp_path: Path) -> None:
    certificate = export(vlm, "llava", tmp_path / "llava")
    assert certificate["checks"]["logits"]["max_difference"] == 0
    folder = tmp_path / "llava"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["mm_vision_select_layer"]) == ("llava_llama", -2)
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["image_aspect_ratio"] == "pad"
    # The projector as LLaVA reads it: everything behind `mm_projector.`, into its Sequential.
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    sequential = torch.nn.Sequential(
        torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)
    )
    sequential.load_state_dict({k.split("mm_projector.")[1]: t for k, t in projector.items()})
    # LLaVA's forward by hand: patches of layer -2, projector, in the place of the image token.
    tower = CLIPVisionModel.from_pretrained(folder / "vision_tower").eval()
    weights = read_weights(folder)
    llm = LlamaForCausalLM(load_vlm(vlm)[0].config.text_config).eval()
    llm.load_state_dict({k: t for k, t in weights.items() if "mm_projector" not in k})
    model, processor = load_vlm(vlm)
    pixels = torch.randn(1, 3, 32, 32)
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    before, after = torch.tensor([[2, 5]]), torch.tensor([[9, 10, 11]])
    embed = llm.get_input_embeddings()
    joined = torch.cat([embed(before), sequential(features), embed(after)], 1)
    image = torch.full((1, 16), model.config.image_token_id)
    ids = torch.cat([before, image, after], 1)
    want = llm(inputs_embeds=joined).logits
    got = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # measured: 0
    # And back.
    back = convert(folder, tmp_path / "back")
    assert not back["keys"]["missing"] and not back["keys"]["unexpected"]
    assert torch.equal(logits(tmp_path / "back"), logits(vlm))
    assert AutoTokenizer.from_pretrained(folder).chat_template == processor.chat_template


@torch.no_grad()
def test_a_projector_alone_beside_its_tower_and_llm(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    model, _ = build_vlm(tiny_clip, tiny_llm, seed=7)
    state = model.model.multi_modal_projector.state_dict()
    numbers = {"linear_1": "0", "linear_2": "2"}
    weights = {
        f"model.mm_projector.{numbers[name.split('.')[0]]}.{name.split('.')[1]}": tensor
        for name, tensor in state.items()
    }
    folder = tmp_path / "pretrain"
    folder.mkdir()
    torch.save(weights, folder / "mm_projector.bin")
    for given, lacking in (
        ({}, "--vision-tower"),
        ({"vision_tower": str(tiny_clip)}, "--language"),
    ):
        with pytest.raises(ModelError, match=f"give {lacking}"):
            convert(folder / "mm_projector.bin", tmp_path / "out", **given)
    parts = {"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)}
    certificate = convert(folder / "mm_projector.bin", tmp_path / "out", **parts)
    assert certificate["keys"]["matched"] == 4
    got = load_vlm(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())
    (folder / "config.json").write_text('{"image_aspect_ratio": "anyres_max_9"}')
    with pytest.raises(ModelError, match="'anyres_max_9' in config"):
        convert(folder / "mm_projector.bin", tmp_path / "bad", **parts)
    (folder / "config.json").unlink()
    del weights["model.mm_projector.2.bias"]
    torch.save(weights, folder / "mm_projector.bin")
    with pytest.raises(ModelError, match="missing 1"):
        convert(folder / "mm_projector.bin", tmp_path / "bad", **parts)


def test_a_tuned_tower_inside_a_llava_checkpoint_is_used(
    tiny_clip: Path, vlm: Path, tmp_path: Path
) -> None:
    """Old LLaVA files: the tower within, rotary buffers, and a tower named by a hub id."""
    from safetensors.torch import save_file

    export(vlm, "llava", tmp_path / "llava")
    folder = tmp_path / "llava"
    weights = read_weights(folder)
    tower = CLIPVisionModel.from_pretrained(folder / "vision_tower").state_dict()
    at = "model.vision_tower.vision_tower.vision_model."
    weights |= {at + name: tensor for name, tensor in tower.items()}
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights |= {at + "embeddings.position_ids": torch.arange(17)[None]}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "parity.json").unlink()
    with pytest.raises(ModelError, match=r"give --vision-tower.*openai/clip-vit-large"):
        convert(folder, tmp_path / "back")
    (folder / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": True}))
    with pytest.raises(ModelError, match="mm_use_im_start_end: expected false, got true"):
        convert(folder, tmp_path / "back", vision_tower=str(tiny_clip))
    (folder / "config.json").write_text(json.dumps(config))
    certificate = convert(folder, tmp_path / "back", vision_tower=str(tiny_clip))
    assert certificate["keys"]["left_out"] == {"model.language_model": 1, "model.vision_tower": 1}
    assert torch.equal(logits(tmp_path / "back"), logits(vlm))


def test_tied_embeddings_go_out_and_come_back(tiny_clip: Path, tmp_path: Path) -> None:
    tokenizer = llm_tokenizer()
    config = llama_config(len(tokenizer))
    config.tie_word_embeddings = True
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "llm")
    folder = make(tiny_clip, tmp_path / "llm", tmp_path / "vlm")
    export(folder, "llava", tmp_path / "llava")
    assert "lm_head.weight" not in read_weights(tmp_path / "llava")
    convert(tmp_path / "llava", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(folder))


def test_llava_hf_comes_in_as_it_lies(vlm: Path, tmp_path: Path) -> None:
    certificate = convert(vlm, tmp_path / "out")
    assert certificate["format"] == "llava"
    assert torch.equal(logits(tmp_path / "out"), logits(vlm))


def test_serving_an_eva02_is_refused_and_says_what_is_lost(tiny_llm: Path, tmp_path: Path) -> None:
    tower = build_tower("eva02", tmp_path / "tower")
    folder = make(tower, tiny_llm, tmp_path / "vlm")
    with pytest.raises(ModelError, match=r"with eva02_clip_vision_model serving is lost"):
        export(folder, "vllm", tmp_path / "out")
    with pytest.raises(ModelError, match="makes every tower a CLIPVisionModel"):
        export(folder, "llava", tmp_path / "out")
    certificate = export(folder, "transformers", tmp_path / "out")
    assert certificate["needs"] == "llm2clip_vlm.register() first"


def test_a_siglip_can_be_served(tiny_llm: Path, tmp_path: Path) -> None:
    tower = build_tower("siglip", tmp_path / "tower")
    folder = make(tower, tiny_llm, tmp_path / "vlm", vision_feature_select_strategy="full")
    export(folder, "vllm", tmp_path / "out")
    names = read_weights(tmp_path / "out")
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names


def test_llava_takes_one_layer_and_its_own_decoders(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    folder = make(tiny_clip, tiny_llm, tmp_path / "vlm", vision_feature_layer=[-2, -1])
    with pytest.raises(ModelError, match="and one layer"):
        export(folder, "llava", tmp_path / "out")


@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_rotary_base_goes_both_ways_under_the_names_that_llava_reads(
    scaled: bool, tiny_clip: Path, tmp_path: Path
) -> None:
    tokenizer = llm_tokenizer()
    config = llama_config(len(tokenizer))
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    if scaled:
        config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "llm")
    folder = make(tiny_clip, tmp_path / "llm", tmp_path / "vlm")
    export(folder, "llava", tmp_path / "llava")
    file = tmp_path / "llava" / "config.json"
    written = json.loads(file.read_text())
    assert written["rope_theta"] == 500.0
    assert written.get("rope_scaling") == ({"type": "linear", "factor": 2.0} if scaled else None)
    del written["rope_parameters"]  # as LLaVA's transformers writes it
    file.write_text(json.dumps(written))
    (tmp_path / "llava" / "parity.json").unlink()
    convert(tmp_path / "llava", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(folder))


def test_an_anyres_vlm_comes_in_as_it_lies(tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> None:
    save_vlm(*build_vlm(tiny_clip, tiny_llm, image_aspect_ratio="anyres"), tmp_path / "vlm")
    certificate = convert(tmp_path / "vlm", tmp_path / "out")
    assert certificate["opened_with"] == "LlavaNextForConditionalGeneration of transformers"
    assert certificate["checks"]["logits"]["max_difference"] == 0
