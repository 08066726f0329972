"""A decoder in GGUF, written here as llama.cpp lays it out, becomes the model that it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm2clip_vlm.cli import main
from llm2clip_vlm.evaluation.vlm.jobs import check_checkpoints
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.models.loading import load_complete, read_config
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm

gguf = pytest.importorskip("gguf", reason="needs gguf (pip install gguf)")

HEADS, KV_HEADS, WIDTH, VOCAB = 4, 2, 64, 262
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp rotates them: pairs of neighbours instead of two halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    extra: bool = False,
    pre: str | None = None,
    rope_factor: float | None = None,
    space_prefix: bool | None = None,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    if rope_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_factor)
    if pre:
        writer.add_tokenizer_pre(pre)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "<|im_start|>", "<|im_end|>"]
    types = [3, 3, 3, *[1] * 257, 3, 3]
    if space_prefix is not None:  # SentencePiece's
        tokens = [
            *tokens[:3],
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            "a",
            "\u2581a",
        ]
        types = [3, 3, 3, *[6] * 256, 1, 1, 1]
        writer.add_token_scores([0.0] * VOCAB)
        writer.add_add_space_prefix(space_prefix)
    assert len(tokens) == len(types) == VOCAB
    writer.add_tokenizer_model("gpt2" if space_prefix is None else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"] if space_prefix is None else ["\u2581 a"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            _, number, inner = part.split(".", 2)
            target = f"blk.{number}.{NAMES[inner]}.weight"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[
                part
            ]
            target += ".weight"
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(target.split(".")[-2])
        values = (halves(tensor, heads) if heads else tensor).numpy()
        quantised = kind if values.ndim > 1 else "F32"
        made = gguf.GGMLQuantizationType[quantised]
        writer.add_tensor(target, gguf.quants.quantize(values, made), raw_dtype=made)
    if extra:
        writer.add_tensor("rope_freqs.weight", np.ones(WIDTH // HEADS // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_comes_back(tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    out = tmp_path / "out"
    certificate = convert(write(tmp_path / "m.gguf", model), out)
    again: Any = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert again.config.tie_word_embeddings is tied and again.config.model_type == "llama"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("ab a dog")["input_ids"]) == "ab a dog"
    assert tokenizer.chat_template and certificate["chat_template"]
    generation = again.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert certificate["tensors"] == {"F32": 20 + (not tied)}
    assert str(tmp_path) not in "".join(p.read_text() for p in out.glob("*.json"))


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_quantised_weights_are_what_the_file_says(kind: str, tmp_path: Path) -> None:
    model = llama(True)
    certificate = convert(write(tmp_path / "m.gguf", model, kind), tmp_path / "out")
    assert certificate["tensors"] == {kind: 15, "F32": 5} and certificate["dtype"] == "float32"
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    type_ = gguf.GGMLQuantizationType[kind]
    want = gguf.quants.dequantize(gguf.quants.quantize(weight, type_), type_)
    got = again.model.layers[1].mlp.up_proj.weight.detach()
    torch.testing.assert_close(got, torch.from_numpy(want.astype(np.float32)), atol=0, rtol=0)
    half = convert(tmp_path / "m.gguf", tmp_path / "half", settings={"dtype": "bfloat16"})
    assert half["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_what_would_be_lost_or_is_damaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "scaled.gguf", llama(True), extra=True)
    with pytest.raises(ModelError, match=r"no place there \(rope_freqs\.weight\)"):
        convert(path, tmp_path / "out")
    with pytest.raises(ModelError, match="expected dtype="):
        convert(path, tmp_path / "out", settings={"hidden_act": "gelu"})
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    assert main(["convert", str(tmp_path / "cut.gguf"), str(tmp_path / "out")]) != 0
    assert "damaged or cut short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_file_says_beside_its_weights_is_not_left_out(tmp_path: Path) -> None:
    """A rope that is scaled (DeepSeek-Coder's by 4) was read as one that is not."""
    scaled = write(tmp_path / "scaled.gguf", llama(True), rope_factor=4.0)
    with pytest.raises(ModelError, match=r"says llama\.rope\.scaling\.factor 4\.0, which"):
        convert(scaled, tmp_path / "out")
    convert(write(tmp_path / "same.gguf", llama(True), rope_factor=1.0), tmp_path / "same")
    bare = write(tmp_path / "bare.gguf", llama(True), space_prefix=False)
    with pytest.raises(ModelError, match="puts a blank before each text all the same"):
        convert(bare, tmp_path / "bare")
    convert(write(tmp_path / "usual.gguf", llama(True), space_prefix=True), tmp_path / "usual")


def test_texts_are_split_as_the_file_says(tmp_path: Path) -> None:
    """Transformers splits as GPT-2 where it does not know the way, such as SmolLM2's."""
    strange = write(tmp_path / "strange.gguf", llama(True), pre="deepseek-llm")
    with pytest.raises(ModelError, match="'deepseek-llm', a way to split texts that is not known"):
        convert(strange, tmp_path / "out")
    guessed = convert(write(tmp_path / "old.gguf", llama(True)), tmp_path / "old")
    assert "no tokenizer.ggml.pre" in guessed["guessed"]
    pieces = {}
    for pre in ("gpt-2", "smollm", "qwen2"):
        made = convert(write(tmp_path / f"{pre}.gguf", llama(True), pre=pre), tmp_path / pre)
        backend: Any = AutoTokenizer.from_pretrained(tmp_path / pre).backend_tokenizer
        split = backend.pre_tokenizer.pre_tokenize_str("two  12")
        pieces[pre] = [piece.replace("\u0120", " ") for piece, _ in split]
        assert "guessed" not in made
    assert pieces["gpt-2"] == ["two", " ", " 12"] and pieces["smollm"] == ["two", "  ", "1", "2"]
    assert pieces["qwen2"][-2:] == ["1", "2"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_gguf_elsewhere_is_refused_with_the_command(
    whole: bool, tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    (path := tmp_path / "m.gguf").write_bytes(b"GGUF")
    given = path if whole else tmp_path
    doors: list[Callable[[], Any]] = [
        lambda: read_config(given),
        lambda: TextEncoder.from_pretrained(given),
        lambda: load_vision_tower(given),
        lambda: build_vlm(tiny_clip, given),
        lambda: build_vlm(given, tiny_llm),
        lambda: load_vlm(given),
        lambda: check_checkpoints({"one": given}),
        lambda: export(given, "transformers", tmp_path / "out"),
    ]
    if not whole:
        doors.append(lambda: convert(given, tmp_path / "out"))
    for door in doors:
        with pytest.raises(ValueError, match=r"llm2clip-vlm convert \S*m\.gguf NEW"):
            door()


def test_pickled_weights_of_a_language_model_are_written_anew(
    tiny_llm: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(tiny_llm, tmp_path / "old")
    want: Any = AutoModelForCausalLM.from_pretrained(old)
    torch.save(want.state_dict(), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is a pickle .*llm2clip-vlm convert \S*old NEW"):
        load_complete(AutoModelForCausalLM, old)
    convert(old, tmp_path / "new")
    again = load_complete(AutoModelForCausalLM, tmp_path / "new")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want(ids).logits)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= files


def test_a_language_model_needs_no_conversion(tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs no conversion: name it as it is"):
        convert(tiny_llm, tmp_path / "out")
