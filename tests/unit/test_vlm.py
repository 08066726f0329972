"""The composed VLM: exact round trips, embeddings, aspect ratio, guard, frozen parts, LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip_vlm.constants import IMAGE_TOKEN
from llm2clip_vlm.models.loading import read_processor
from llm2clip_vlm.models.vision.image_mode import set_image_aspect_ratio
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision, install_text_only_guard
from llm2clip_vlm.recipe.vlm import Stage4Recipe
from llm2clip_vlm.training.vlm.vlm_run import prepare_processor
from tests.tiny import CHAT_TEMPLATE, build_clip, llama_config, word_tokenizer
from tests.vlm_fixtures import lora_recipe


def photo(width: int = 40, height: int = 24) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def example(processor: Any) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    return dict(processor(images=photo(), text=text, add_special_tokens=False, return_tensors="pt"))


def build_other_llm(directory: Path, kind: str, tied: bool) -> Path:
    """A language model without `<image>` in its vocabulary and without a pad token."""
    from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    tokenizer.pad_token = None
    values = llama_config(len(tokenizer)).to_dict() | {"tie_word_embeddings": tied}
    values = {k: v for k, v in values.items() if k not in {"model_type", "architectures"}}
    torch.manual_seed(3)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**values))
        if kind == "qwen2"
        else LlamaForCausalLM(llama_config(len(tokenizer)).__class__(**values))
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_siglip(directory: Path) -> Path:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def build_dinov2(directory: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(directory)
    size = {"height": 32, "width": 32}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layer", "strategy"), [(-2, "default"), (-1, "full")])
def test_round_trip_is_exact(
    tmp_path: Path, tiny_clip: Path, kind: str, tied: bool, layer: int, strategy: Any
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    llm = build_other_llm(tmp_path / "llm", kind, tied)
    model, processor = build_vlm(
        tiny_clip, llm, vision_feature_layer=layer, vision_feature_select_strategy=strategy
    )
    inputs = example(processor)
    visual = (inputs["input_ids"] == processor.image_token_id).sum()
    assert visual == model.config.image_seq_length == (16 if strategy == "default" else 17)
    with torch.no_grad():
        expected = model(**inputs).logits
        save_vlm(model, processor, tmp_path / "vlm")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
        reread = example(AutoProcessor.from_pretrained(tmp_path / "vlm"))
        assert all(torch.equal(reread[name], inputs[name]) for name in inputs)
        assert torch.equal(again(**reread).logits, expected)
    tied_now = again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert tied_now == tied
    assert again.generation_config.eos_token_id == 3


def test_saved_names_are_those_that_older_readers_know(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from safetensors import safe_open

    save_vlm(*build_vlm(tiny_clip, tiny_llm), tmp_path / "one")
    save_vlm(*load_vlm(tmp_path / "one"), tmp_path / "two")
    for folder in ("one", "two"):
        with safe_open(str(tmp_path / folder / "model.safetensors"), "pt") as file:
            names = set(file.keys())
        towers = {n.split(".")[1] for n in names if n.startswith("vision_tower.")}
        assert towers == {"vision_model"}
        assert "language_model.lm_head.weight" in names


def test_parts_keep_their_weights_and_the_seed_makes_the_projector(
    tiny_clip: Path, tiny_llm: Path
) -> None:
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    model, _ = build_vlm(tiny_clip, tiny_llm, seed=1)
    tower = CLIPVisionModel.from_pretrained(tiny_clip).state_dict()
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm).state_dict()
    ours = model.state_dict()
    assert all(torch.equal(ours[f"model.vision_tower.{name}"], t) for name, t in tower.items())
    assert torch.equal(ours["lm_head.weight"], llm["lm_head.weight"])
    name = "model.multi_modal_projector.linear_1.weight"
    same, other = (build_vlm(tiny_clip, tiny_llm, seed=s)[0].state_dict()[name] for s in (1, 2))
    assert torch.equal(ours[name], same)
    assert not torch.equal(ours[name], other)


def test_image_token_is_added_with_mean_rows(tmp_path: Path, tiny_clip: Path) -> None:
    llm = build_other_llm(tmp_path / "llm", "llama", tied=False)
    model, processor = build_vlm(tiny_clip, llm)
    index = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert index == model.config.image_token_id == processor.image_token_id
    assert processor.tokenizer.encode(f"red{IMAGE_TOKEN}red", add_special_tokens=False)[1] == index
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape[0] == len(processor.tokenizer) == index + 1
        torch.testing.assert_close(table.weight[index], table.weight[:index].mean(0))
    assert model.config.text_config.vocab_size == index + 1
    assert processor.tokenizer.pad_token == "<unk>"
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_a_row_in_reserve_that_becomes_a_tokens_is_the_mean(
    tmp_path: Path, tiny_clip: Path
) -> None:
    """Qwen2.5 has 151,936 rows for 151,665 tokens; the others were never trained."""
    from transformers import AutoModelForCausalLM

    llm = build_other_llm(tmp_path / "llm", "qwen2", tied=False)
    model = AutoModelForCausalLM.from_pretrained(llm)
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(before + 8)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight.data[before:] = 77
    model.save_pretrained(llm)
    composed, processor = build_vlm(tiny_clip, llm, extra_tokens=["<box>"])
    new = processor.tokenizer.convert_tokens_to_ids(["<box>", IMAGE_TOKEN])
    assert new == [before, before + 1]
    for table in (composed.get_input_embeddings(), composed.get_output_embeddings()):
        torch.testing.assert_close(table.weight[new], table.weight[:before].mean(0).expand(2, -1))
        assert table.weight.shape[0] == before + 8 and bool(
            (table.weight[before + 2 :] == 77).all()
        )


def test_dtype_is_one_for_all(tiny_clip: Path, tiny_llm: Path) -> None:
    model, processor = build_vlm(tiny_clip, tiny_llm, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(**example(processor)).logits.isfinite().all()


def test_chat_template_argument_is_used(tiny_clip: Path, tiny_llm: Path) -> None:
    _, processor = build_vlm(tiny_clip, tiny_llm, chat_template="vicuna_v1")
    parts = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text.endswith(" USER: <image>\nwhat ?")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_padding_is_saved_and_changes_what_is_seen(
    tmp_path: Path, tiny_llm: Path, kind: str
) -> None:
    tower = build_clip(tmp_path / "t") if kind == "clip" else build_siglip(tmp_path / "t")
    strategy: Any = "default" if kind == "clip" else "full"
    arguments: dict[str, Any] = {"vision_feature_select_strategy": strategy}
    model, square = build_vlm(tower, tiny_llm, **arguments)
    _, padded = build_vlm(tower, tiny_llm, image_aspect_ratio="pad", **arguments)
    pixels = [p.image_processor(photo(), return_tensors="pt") for p in (square, padded)]
    one, two = (p["pixel_values"] for p in pixels)
    assert one.shape == two.shape == (1, 3, 32, 32)
    assert not torch.equal(one, two)
    # the top row is filled with the mean colour, which is 0 once normalised
    assert two[0, :, 0].abs().max() < 0.02 < one[0, :, 0].abs().max()
    save_vlm(model, padded, tmp_path / "vlm")
    _, again = load_vlm(tmp_path / "vlm")
    assert again.image_processor.do_pad is True
    assert torch.equal(again.image_processor(photo(), return_tensors="pt")["pixel_values"], two)
    set_image_aspect_ratio(again, "square")
    torch.testing.assert_close(
        again.image_processor(photo(), return_tensors="pt")["pixel_values"], one
    )


def test_a_foreign_template_that_asks_for_the_date_is_kept_as_it_is_trained(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    _, processor = build_vlm(tiny_clip, tiny_llm)
    processor.chat_template = "{{ strftime_now('%d %b %Y') }}" + processor.chat_template
    values = {"output_dir": "x", "checkpoint": "x", "trainable": {"language_model": 1e-3}}
    prepare_processor(Stage4Recipe(data=[], **values), processor)
    processor.save_pretrained(tmp_path)
    text = read_processor(tmp_path).apply_chat_template([{"role": "user", "content": "a"}])
    assert "26 Jul 2024" in text


def test_a_padded_picture_is_seen_whole_by_a_tower_that_crops_a_margin(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    """DINOv2 scales to 256 px and crops 224: of a wide picture an eighth would be out of sight."""
    shutil.copytree(tiny_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"size": {"shortest_edge": 40}}))
    _, processor = build_vlm(tmp_path / "clip", tiny_llm, image_aspect_ratio="pad")
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste("white", (0, 0, 4, 32))  # its left border
    (pixels,) = processor.image_processor(wide, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, 16, 0].min() > 1 and pixels[:, 16, 4:].max() < -1
    # and without padding it crops its margin again, as one that never padded
    processor.save_pretrained(tmp_path / "padded")
    again = read_processor(tmp_path / "padded")
    _, square = build_vlm(tmp_path / "clip", tiny_llm)
    set_image_aspect_ratio(again, "square")
    one, two = (p.image_processor(photo(), return_tensors="pt") for p in (again, square))
    torch.testing.assert_close(one["pixel_values"], two["pixel_values"])


def test_only_what_is_used_stays_trainable(tmp_path: Path, tiny_clip: Path, tiny_llm: Path) -> None:
    for tower, layer, strategy in (
        (tiny_clip, -2, "default"),
        (tiny_clip, -1, "default"),
        (tiny_clip, 1, "full"),
        (build_siglip(tmp_path / "siglip"), -2, "full"),
        (build_dinov2(tmp_path / "dinov2"), -2, "default"),
    ):
        model, processor = build_vlm(
            tower, tiny_llm, vision_feature_layer=layer, vision_feature_select_strategy=strategy
        )
        frozen = freeze_unused_vision(model)
        inputs = example(processor)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        without = {n for n, p in model.named_parameters() if p.grad is None}
        assert without == {f"model.{name}" for name in frozen}
        assert frozen
        assert any(p.grad is not None for p in model.model.vision_tower.parameters())


def text_only(model: Any) -> Any:
    ids = torch.tensor([[2, 9, 10, 11, 3]])
    return model(input_ids=ids, labels=ids, use_cache=False)


def test_text_only_batches_keep_the_projector_in_the_graph(tiny_clip: Path, tiny_llm: Path) -> None:
    model, _ = build_vlm(tiny_clip, tiny_llm)
    install_text_only_guard(model)
    assert len(model.model.language_model._forward_pre_hooks) == 1
    freeze_unused_vision(model)
    loss = text_only(model.eval()).loss
    guarded = text_only(model.train()).loss
    assert torch.equal(loss, guarded)
    guarded.backward()
    vision = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]
    used = [p for p in vision if p.requires_grad]
    assert used
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in used)


@pytest.mark.parametrize(
    ("trainable", "tower_runs", "projector_runs"),
    [("vision_tower", 1, 1), ("multi_modal_projector", 0, 1), ("language_model", 0, 0)],
)
def test_the_guard_runs_no_more_than_it_must(
    tiny_clip: Path, tiny_llm: Path, trainable: str, tower_runs: int, projector_runs: int
) -> None:
    from llm2clip_vlm.models.trainable import apply_trainable

    model, _ = build_vlm(tiny_clip, tiny_llm)
    apply_trainable(model, [trainable])
    calls = {"tower": 0, "projector": 0}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls[name] + 1})

    model.model.vision_tower.register_forward_pre_hook(count("tower"))
    model.model.multi_modal_projector.register_forward_pre_hook(count("projector"))
    text_only(model.eval())
    assert calls == {"tower": 0, "projector": 0}
    text_only(model.train())
    assert calls == {"tower": tower_runs, "projector": projector_runs}


def test_no_patch_is_dropped_where_there_is_no_cls_token(tmp_path: Path, tiny_llm: Path) -> None:
    """T26: `default` drops token 0, which is a patch in SigLIP."""
    tower = build_siglip(tmp_path / "siglip")
    model, processor = build_vlm(tower, tiny_llm)
    assert model.config.vision_feature_select_strategy == "full"
    assert model.config.image_seq_length == 16
    with torch.no_grad():
        assert model(**example(processor)).logits.isfinite().all()
    assert processor.num_additional_image_tokens == 0


def test_lora_trains_the_adapter_alone_and_merges_exactly(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from llm2clip_vlm.recipe.base import LoraSection
    from llm2clip_vlm.training.adapters import merged_state
    from llm2clip_vlm.training.vlm.vlm_run import prepare_trainable

    model, processor = build_vlm(tiny_clip, tiny_llm)
    recipe = lora_recipe(4)
    before = model.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"].clone()
    prepare_trainable(model, recipe)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "multi_modal_projector" in n for n in trained)
    assert any("lora_B" in n for n in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        inputs = example(processor)
        expected = model(**inputs).logits
        state = merged_state(model, model.state_dict())
        save_vlm(model, processor, tmp_path / "vlm", state_dict=state)
        again, _ = load_vlm(tmp_path / "vlm")
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(
        again.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"], before
    )
    with pytest.raises(ValueError, match="use_dora"):
        prepare_trainable(
            model, recipe.model_copy(update={"language_model_lora": LoraSection(use_dora=True)})
        )
    with pytest.raises(ValueError, match="no learning rate for language_model"):
        prepare_trainable(
            model, recipe.model_copy(update={"trainable": {"multi_modal_projector": 1.0}})
        )


@pytest.mark.parametrize("kind", ["words", "llama", "bytes"])
def test_the_tokenizer_adds_no_bos_that_the_template_has_written(kind: str, tmp_path: Path) -> None:
    """As other programs ask for tokens, here and read back; what it does else stays."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    from llm2clip_vlm.models.vlm.building import _as_trained
    from tests.tiny import CHAT_TEMPLATE, llm_tokenizer

    if kind == "words":
        tokenizer: Any = llm_tokenizer()
    elif kind == "llama":
        letters = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *"▁aredog"])}
        tokenizer = LlamaTokenizer(vocab=letters, merges=[], add_bos_token=True)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"])
        backend.train_from_iterator(["a red dog"], trainer)
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
    asked = {"text": "<s>a red dog", "return_offsets_mapping": True}
    want = dict(tokenizer(**asked, add_special_tokens=False))
    assert tokenizer(**asked)["input_ids"] != want["input_ids"]
    _as_trained(tokenizer, CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    assert tokenizer(**asked)["input_ids"] != want["input_ids"]
    _as_trained(tokenizer, CHAT_TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert dict(found(**asked)) == want
