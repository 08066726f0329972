"""The text logits of a composed VLM are those of its language model, whatever family it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import constant_ratio, difference, fixed_ids, logits_of
from llm2clip_vlm.models.vlm import building as vlm
from llm2clip_vlm.models.vlm import composing
from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from tests.tiny_llms import NAMES, build_family, is_tiny

FACTORS = {"granite": 1 / 8, "cohere": 1 / 16, "minicpm3": 1 / 4, "falcon_h1": 1 / 2}


def own_logits(llm: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(llm).eval(), ids)


@pytest.mark.parametrize("family", FACTORS)
def test_a_factor_of_the_logits_is_kept_in_an_untied_head(
    family: str, tiny_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Granite's multiplier of the embeddings lives in its decoder, and stays there."""
    tied = family != "minicpm3"
    llm = build_family(family, tmp_path / "llm", tie_word_embeddings=tied)
    with caplog.at_level("INFO", "llm2clip_vlm.models.vlm.composing"):
        model, processor = build_vlm(tiny_clip, llm)
    assert f"factor {FACTORS[family]:g} is in lm_head" in caplog.text
    save_vlm(model, processor, tmp_path / "vlm")
    plain: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    assert plain.config.tie_word_embeddings is False
    assert plain.config.text_config.tie_word_embeddings is False
    ids = torch.randint(8, 130, (2, 12))
    words = plain.config.text_config.vocab_size
    want = own_logits(llm, ids)[..., :words]
    for got in (model, plain, load_vlm(tmp_path / "vlm")[0]):
        torch.testing.assert_close(logits_of(got, ids)[..., :words], want, atol=1e-5, rtol=1e-5)
    embedded, head = plain.get_input_embeddings().weight, plain.lm_head.weight
    assert torch.allclose(head, FACTORS[family] * embedded) is tied


@pytest.mark.parametrize("family", [*FACTORS, "cohere2", "granitemoe", "granitemoehybrid"])
def test_a_folded_factor_is_not_in_the_text_config(
    family: str, tiny_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM and SGLang build the language model by it, and would apply the factor twice."""
    llm = build_family(family, tmp_path / "llm")
    save_vlm(*build_vlm(tiny_clip, llm), tmp_path / "vlm")
    assert "twice" not in caplog.text
    vlm: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    text: Any = AutoModelForCausalLM.from_config(vlm.config.text_config).eval()
    text.get_decoder().load_state_dict(vlm.model.language_model.state_dict())
    text.set_output_embeddings(vlm.lm_head)
    ids = torch.randint(8, 130, (2, 12))
    want = own_logits(llm, ids)[..., : vlm.config.text_config.vocab_size]
    torch.testing.assert_close(logits_of(text, ids)[..., : want.shape[-1]], want)


def test_a_factor_that_stays_in_the_text_config_is_said(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(composing, "_FACTORS", set[str]())
    build_vlm(tiny_clip, build_family("granite", tmp_path))
    assert "text_config still names the factor 0.125 of the logits" in caplog.text


def test_a_factor_is_kept_with_anyres_and_in_bf16(tiny_clip: Path, tmp_path: Path) -> None:
    llm = build_family("cohere2", tmp_path / "llm")
    made = build_vlm(tiny_clip, llm, image_aspect_ratio="anyres", dtype="bfloat16")
    save_vlm(*made, tmp_path / "vlm")
    plain: Any = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    ids = fixed_ids(130, 9)
    own: Any = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).eval()
    assert torch.equal(logits_of(plain, ids), logits_of(own, ids))  # a power of two


def test_another_vlm_s_projector_fits_the_same_factor(tiny_clip: Path, tmp_path: Path) -> None:
    """The folded head is the same to the bit, so the lineage of both agrees."""
    llm = build_family("granite", tmp_path / "llm", logits_scaling=6.0)
    save_vlm(*build_vlm(tiny_clip, llm), tmp_path / "vlm")
    build_vlm(tiny_clip, llm, projector=tmp_path / "vlm")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma2", {}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("nanochat", {}),
        ("vaultgemma", {}),
        ("gemma4_text", {"final_logit_softcapping": 30.0}),
    ],
)
def test_what_llava_cannot_hold_is_refused_by_name(
    family: str, config: Any, tiny_clip: Path, tmp_path: Path
) -> None:
    """A cap of 30 does not show in the logits of an untrained model, and is found all the same."""
    build_family(family, tmp_path, **config)
    with pytest.raises(ModelError, match=f"{family} would lose .*differ by") as error:
        build_vlm(tiny_clip, tmp_path)
    assert "final_logit_softcapping: " in str(error.value)
    build_family(family, tmp_path, final_logit_softcapping=None)
    build_vlm(tiny_clip, tmp_path)


@pytest.mark.parametrize(
    "family",
    ["opt", "gpt2", "bloom", "mpt", "mamba", "mamba2", "rwkv", "bart", "recurrent_gemma"],
)
def test_what_llava_cannot_run_is_refused_by_name(
    family: str, tiny_clip: Path, tmp_path: Path
) -> None:
    build_family(family, tmp_path)
    with pytest.raises(ModelError, match=f"LLaVA cannot run a {family} "):
        build_vlm(tiny_clip, tmp_path)


def test_a_decoder_that_looks_words_up_by_their_embeddings_is_refused(
    tiny_clip: Path, tmp_path: Path
) -> None:
    """Gemma 4's small ones: text alone is right, and pictures would crash."""
    per_layer = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 136}
    build_family("gemma4_text", tmp_path, **per_layer)
    with pytest.raises(ModelError, match=r"LLaVA cannot run a gemma4_text \(.*inputs_embeds"):
        build_vlm(tiny_clip, tmp_path)


def test_the_decoder_may_lie_deeper(tiny_clip: Path, tmp_path: Path) -> None:
    """Llama 4's is no `base_model` of its language model."""
    llm = build_family("llama4_text", tmp_path)
    ids = fixed_ids(130, 9)
    assert torch.equal(logits_of(build_vlm(tiny_clip, llm)[0], ids), own_logits(llm, ids))


def test_a_head_that_the_config_calls_tied_is_kept(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    said = json.loads((llm / "config.json").read_text()) | {"tie_word_embeddings": True}
    (llm / "config.json").write_text(json.dumps(said))
    ids = torch.randint(8, 130, (2, 12))
    model, processor = build_vlm(tiny_clip, llm)
    save_vlm(model, processor, tmp_path / "vlm")
    want = own_logits(tiny_llm, ids)
    for got in (model, load_vlm(tmp_path / "vlm")[0]):
        torch.testing.assert_close(logits_of(got, ids)[..., : want.shape[-1]], want)


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("processor_config.json", {"patch_size": 4}, "64 tokens of id 7, expected 16"),
        ("processor_config.json", {"patch_size": None}, "makes no input"),
        ("processor_config.json", {"patch_size": -8}, "patch_size -8"),
        ("processor_config.json", {"num_additional_image_tokens": 0}, "15 tokens"),
        ("processor_config.json", {"num_additional_image_tokens": 10**9}, "tokens is 1000000000"),
        ("processor_config.json", {"num_additional_image_tokens": "x"}, "makes no input"),
        ("config.json", {"vision_feature_layer": 10**9}, "it was made with -2"),
        ("processor_config.json", {"processor_class": "Unknown"}, "no image processor"),
        ("config.json", {"image_token_index": 9}, "0 tokens of id 9"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    file: str, values: dict[str, Any], told: str, tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    save_vlm(*build_vlm(tiny_clip, tiny_llm), tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | values))
    for load in (load_vlm, load_checkpoint):
        with pytest.raises(ValueError, match=told):
            load(str(tmp_path))


def test_a_tokenizer_of_more_words_than_embeddings_is_refused(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    model, processor = build_vlm(tiny_clip, tiny_llm)
    processor.tokenizer.add_tokens([f"zz{i}" for i in range(9)])
    save_vlm(model, processor, tmp_path, state_dict=model.state_dict())
    with pytest.raises(ModelError, match="in the embeddings"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("part", ["lm_head", "model.vision_tower", "model.multi_modal_projector"])
def test_what_was_saved_must_compute_the_same(
    part: str, tiny_clip: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build_vlm(tiny_clip, tiny_llm)
    load = load_vlm

    def load_changed(path: Any) -> Any:
        again, other = load(path)
        with torch.no_grad():
            for parameter in again.get_submodule(part).parameters():
                parameter.mul_(1.1)
        return again, other

    monkeypatch.setattr(vlm, "load_vlm", load_changed)
    with pytest.raises(ModelError, match="loaded again it computes something else: they differ by"):
        save_vlm(model, processor, tmp_path)


def test_differences_are_named() -> None:
    want = torch.randn(1, 3, 50)
    assert difference(want, want.clone()) is None
    assert difference(want, want + 1e-5) is None
    assert difference(want.bfloat16(), want) is None
    assert "differ by 0.1 of their length" in str(difference(want, 1.1 * want))
    one = want.clone()
    one[0, 2, 7] += 5
    assert "differ by" in str(difference(want, one))
    assert "shape" in str(difference(want, want[:, :2]))
    assert "finite" in str(difference(want, want * torch.inf))
    assert difference(want * torch.nan, want) is not None
    assert constant_ratio(want, want) == 1
    assert constant_ratio(want / 6, want) == pytest.approx(1 / 6)
    assert constant_ratio((want / 7).bfloat16(), want.bfloat16()) == pytest.approx(1 / 7, rel=1e-3)
    assert constant_ratio(want.tanh(), want) is None
    assert constant_ratio(-want, want) is None
    assert constant_ratio(want, 0 * want) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_family_keeps_its_logits_or_is_refused(
    family: str, tiny_clip: Path, tmp_path: Path
) -> None:
    if not is_tiny(family):
        pytest.skip("no tiny one is known")
    llm = build_family(family, tmp_path / "llm")
    try:
        model, processor = build_vlm(tiny_clip, llm)
    except ModelError:
        return
    save_vlm(model, processor, tmp_path / "vlm")
    plain: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    ids = torch.randint(8, 130, (1, 12))
    words = plain.config.get_text_config().vocab_size
    for got in (model, plain):
        assert (
            difference(own_logits(llm, ids)[..., :words], logits_of(got, ids)[..., :words]) is None
        )


def test_differences_are_the_worst_vectors_in_parts_of_its_length() -> None:
    want = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    got = want + torch.tensor([[0.0, 0.005], [0.0, 0.004]])  # 0.001 and 0.002 of their lengths
    assert difference(want, got, 0.0021) is None
    assert difference(want, got, 0.0019) == (
        "they differ by 0.002 of their length (rounding explains 0.0019)"
    )
    assert difference(want, got) is not None
    assert difference(want, got.bfloat16()) is None  # the coarser dtype's tolerance
    assert difference(want.bfloat16(), got) is None
    assert "0.12 of" in str(difference(want, (want * 1.125).bfloat16()))
    assert constant_ratio(want, want * 3) == pytest.approx(1 / 3)
    assert constant_ratio(want, -want) is None
    assert constant_ratio(want, got + 1) is None


def test_logits_are_those_of_evaluation_and_the_mode_comes_back(tiny_llm: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm, attention_dropout=0.9)
    ids = fixed_ids(40, 9)
    for training in (True, False):
        llm.train(training)
        assert torch.equal(logits_of(llm, ids), logits_of(llm, ids))
        assert llm.training is training
    assert fixed_ids(40, 9).tolist() == [[4, 8, 12, 16, 20, 24, 28, 32, 36]]


def test_a_new_projector_and_newline_follow_their_seed_alone(
    tiny_clip: Path, tiny_llm: Path
) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        before = torch.random.get_rng_state()
        state = build_vlm(tiny_clip, tiny_llm, image_aspect_ratio="anyres", seed=seed)[0]
        assert torch.equal(torch.random.get_rng_state(), before)
        new = ("multi_modal_projector", "image_newline")
        return {n: p for n, p in state.named_parameters() if any(part in n for part in new)}

    one, again, other = made(3), made(3), made(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    newline = next(p for n, p in one.items() if "image_newline" in n)
    assert 0.5 < newline.norm().item() < 2  # of length 1, as a word's embedding
    bound = one["model.multi_modal_projector.linear_1.weight"].shape[1] ** -0.5
    assert one["model.multi_modal_projector.linear_1.weight"].abs().max() <= bound


def test_new_words_are_the_mean_of_the_old_and_layers_end_where_the_tower_does(
    tiny_clip: Path, tiny_llm: Path
) -> None:
    old = AutoModelForCausalLM.from_pretrained(tiny_llm).get_input_embeddings().weight
    model, _ = build_vlm(tiny_clip, tiny_llm, extra_tokens=["<one>", "<two>"])
    new = model.get_input_embeddings().weight[len(old) :]
    assert len(new) >= 1 and model.config.vision_feature_layer == -2
    torch.testing.assert_close(new, old.mean(0).expand_as(new))
    for layer in (-4, 3):  # three blocks: four hidden states
        built = build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layer)[0]
        assert built.config.vision_feature_layer == layer
    for layer in (-5, 4):
        with pytest.raises(ModelError, match="has 4 hidden states"):
            build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layer)


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3, [0, 1], [1, -2]], ids=str)
def test_frozen_is_what_no_gradient_reaches(layer: Any, tiny_clip: Path, tiny_llm: Path) -> None:
    model, _ = build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layer)
    tower = dict(model.model.vision_tower.named_parameters())
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.model.get_image_features(pixels).pooler_output[0].sum().backward()
    unused = {f"vision_tower.{name}" for name, p in tower.items() if p.grad is None}
    assert set(freeze_unused_vision(model)) == unused and unused
    assert {f"vision_tower.{n}" for n, p in tower.items() if not p.requires_grad} == unused
