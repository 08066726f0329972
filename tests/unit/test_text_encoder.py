"""A decoder as text encoder: attention, pooling, truncation, saving, for five architectures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from llm2clip_vlm.chat.labels import user_turn
from llm2clip_vlm.chat.template import ConversationError
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.text import caption_tokens, text_encoder
from llm2clip_vlm.models.text.caption_tokens import (
    PASS_TOKENS,
    CaptionTokenizer,
    length_groups,
    pad_tokens,
)
from llm2clip_vlm.models.text.text_encoder import TextEncoder, TextEncoderSettings, pool
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.manifest import HandoffError, refuse_bidirectional
from tests.tiny import llm_tokenizer

TEXTS = [
    "a red star",
    "a very large dog and a small cat on the left of the beach",
    "dog",
    "two blue circles",
]
ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {  # as Llama 3.1 has it
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
}


def build(directory: Path, name: str = "llama", **keys: Any) -> Path:
    tokenizer: Any = llm_tokenizer()
    if name == "qwen2":
        # transformers loads its own byte-level class for this model_type, whatever was saved.
        letters = sorted(ByteLevel.alphabet())
        vocab = {piece: i for i, piece in enumerate(["<|endoftext|>", *letters])}
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    keys = {**EXTRA.get(name, {}), **keys}
    config = ARCHITECTURES[name](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, **keys},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llm"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bidirectional_and_padding_free(tmp_path: Path, name: str) -> None:
    encoder = TextEncoder.from_pretrained(build(tmp_path / "llm", name))
    # Only the first token's hidden state: what it knows of the last one came against causality.
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 5, 6, 7, 9]])
    first = encoder.backbone(input_ids=ids).last_hidden_state[:, 0]
    assert (first[0] - first[1]).abs().max() > 1e-4
    together = encoder.encode(TEXTS)
    mates = encoder.encode([TEXTS[0], "beach " * 40])[:1]  # padded, and beside another text
    torch.testing.assert_close(mates, together[:1], atol=1e-5, rtol=0)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    encoder.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.encode(TEXTS), together, atol=1e-6, rtol=0)
    assert again.fingerprint == encoder.fingerprint


def test_causal_where_asked(llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(llm, bidirectional=False)
    ids = torch.tensor([encoder.tokens(["a red star"])[0], encoder.tokens(["a red ring"])[0]])
    first = encoder.backbone(input_ids=ids).last_hidden_state[:, 0]
    torch.testing.assert_close(first[0], first[1], atol=1e-7, rtol=0)
    both = TextEncoder.from_pretrained(llm)
    assert (encoder.encode(TEXTS) - both.encode(TEXTS)).abs().max() > 1e-3
    assert encoder.fingerprint["bidirectional"] == "False"


def test_an_attention_that_ignores_the_config_is_refused(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = text_encoder.AutoModel.from_pretrained

    def deaf(path: Path, *, config: PreTrainedConfig, **keys: Any) -> Any:
        config.is_causal = not config.is_causal  # what a version does that does not know the key
        return load(path, config=config, **keys)

    monkeypatch.setattr(text_encoder.AutoModel, "from_pretrained", deaf)
    with pytest.raises(ModelError, match=r"bidirectional is True.*is causal whatever"):
        TextEncoder.from_pretrained(llm)
    with pytest.raises(ModelError, match=r"bidirectional is False.*is bidirectional whatever"):
        TextEncoder.from_pretrained(llm, bidirectional=False)


def test_loading_does_not_touch_a_shared_config(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = LlamaConfig.from_pretrained(llm)
    monkeypatch.setattr(text_encoder, "read_config", lambda *given: shared)
    TextEncoder.from_pretrained(llm)
    assert getattr(shared, "is_causal", True) is True


def test_results_are_in_order_whatever_the_batches(llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(llm)
    expected = encoder.encode(TEXTS)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(TEXTS)))
    for batch_tokens in (1, 20, 30):
        found = encoder.encode(TEXTS[::-1], batch_tokens=batch_tokens)
        torch.testing.assert_close(found.flip(0), expected, atol=1e-5, rtol=0)
    raw = encoder.encode(TEXTS, normalize=False)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-2
    torch.testing.assert_close(nn.functional.normalize(raw, dim=-1), expected)
    assert encoder.encode([]).shape == (0, 32)


def test_batches_hold_the_token_budget(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder.from_pretrained(llm)
    shapes: list[tuple[int, ...]] = []
    forward = encoder.forward
    monkeypatch.setattr(
        encoder,
        "forward",
        lambda **batch: (shapes.append(batch["input_ids"].shape), forward(**batch))[1],
    )
    encoder.encode(["dog"] * 8 + [TEXTS[1]] * 2, batch_tokens=40)
    assert all(rows * width <= 40 for rows, width in shapes)
    assert shapes == [(2, 16), (8, 3)]  # long and short texts apart


def test_length_groups_are_the_cheapest() -> None:
    lengths = [300, 12, 290, 7, 120, 110, 10, 300]

    def cost(groups: Iterable[Sequence[int]]) -> int:
        return sum(len(rows) * max(lengths[row] for row in rows) + PASS_TOKENS for rows in groups)

    def all_plans(rows: list[int]) -> Iterator[list[list[int]]]:
        for end in range(1, len(rows)):
            yield from ([rows[:end], *rest] for rest in all_plans(rows[end:]))
        yield [rows]

    order = sorted(range(8), key=lambda row: -lengths[row])
    for budget in (math.inf, 700, 240, 1):
        groups = [rows.tolist() for rows in length_groups(lengths, budget)]
        assert [row for rows in groups for row in rows] == order
        allowed = [
            plan
            for plan in all_plans(order)
            if all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= budget for rows in plan)
        ]
        assert groups in allowed
        assert cost(groups) == min(map(cost, allowed))
    assert length_groups([]) == []


def test_mean_leaves_out_bos_and_instruction_and_keeps_eos(llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(llm, instruction="describe the picture")
    (ids,) = encoder.tokens(["a red star"])
    words = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "describe", "the", "picture", "a", "red", "star", "</s>"]
    hidden = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state
    found = encoder.encode(["a red star"], normalize=False)
    torch.testing.assert_close(found, hidden[:, 4:].mean(1), atol=1e-5, rtol=0)
    plain = TextEncoder.from_pretrained(llm).encode(["a red star"], normalize=False)
    assert (found - plain).abs().max() > 1e-3  # not pooled, but attended to

    last = TextEncoder.from_pretrained(llm, pooling="last").encode(TEXTS[:2], normalize=False)
    one = TextEncoder.from_pretrained(llm)
    ids = one.tokens(TEXTS[:1])[0]
    hidden = one.backbone(input_ids=torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(last[:1], hidden[:, -1], atol=1e-5, rtol=0)


def test_eos_pooling_appends_what_the_tokenizer_does_not() -> None:
    tokenizer = llm_tokenizer()
    eos = tokenizer.eos_token_id
    (with_eos,) = CaptionTokenizer(tokenizer, 16, pooling="eos")(["a dog"])
    assert with_eos.count(eos) == 1
    tokenizer.backend_tokenizer.post_processor = None
    (appended,) = CaptionTokenizer(tokenizer, 16, pooling="eos")(["a dog"])
    assert appended == [*CaptionTokenizer(tokenizer, 16, pooling="last")(["a dog"])[0], eos]
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        CaptionTokenizer(tokenizer, 16, pooling="eos")


# What the templates of these families do, shortened: system prompts with dates and defaults, and
# answers that are written otherwise once they are no longer the last.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}<|system|>Today Date: {{ strftime_now('%d %b %Y') }}</s>"
        "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}</s>{% endfor %}",
        ("<|user|>\n\n", "</s>"),
    ),
    "qwen3": (
        "<|system|>You are helpful</s>\n{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}</s>\n{% endfor %}",
        ("<|user|>\n", "</s>"),
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        ("[INST] ", " [/INST]"),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_turns_come_from_the_template(name: str, llm: Path, tmp_path: Path) -> None:
    template, expected = TEMPLATES[name]
    encoder = TextEncoder.from_pretrained(llm)
    encoder.tokenizer.chat_template = template
    assert user_turn(encoder.tokenizer) == expected
    chat = TextEncoder(encoder.backbone, encoder.tokenizer, replace(encoder.settings, chat=True))
    (ids,) = chat.tokens(["a dog"])
    front, text, behind = (chat.tokens.ids(part) for part in (expected[0], "a dog", expected[1]))
    assert ids == [2, *front, *text, *behind, 3]
    assert chat.tokens.num_front_tokens == 1 + len(front)
    changed = {k for k in chat.fingerprint if chat.fingerprint[k] != encoder.fingerprint.get(k)}
    assert changed == {"chat"}
    chat.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(TEXTS), chat.encode(TEXTS), atol=1e-6, rtol=0)


def test_chat_needs_a_template_that_keeps_answers(llm: Path) -> None:
    tokenizer = llm_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ConversationError, match="leave `chat` out"):
        CaptionTokenizer(tokenizer, 16, chat=True)
    tokenizer.chat_template = None
    with pytest.raises(ConversationError, match="has no chat template"):
        CaptionTokenizer(tokenizer, 16, chat=True)


def test_prompts_stand_behind_the_front_and_are_not_pooled(llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(llm, instruction="the")
    tokens = encoder.tokens
    (ids,) = tokens(["a red star"])
    prompted = tokens.add_prompt(ids, tokens.ids("describe the picture"))
    words = encoder.tokenizer.convert_ids_to_tokens(prompted)
    assert words == "<s> the describe the picture a red star </s>".split()
    batch = pad_tokens([prompted, ids], 0, [2 + 3, 2])
    assert batch["pool_mask"].sum(1).tolist() == [4, 4]
    assert batch["pool_mask"][0].tolist() == [False] * 5 + [True] * 4
    short = CaptionTokenizer(encoder.tokenizer, 6)
    assert short.add_prompt(short(["a red star"])[0], [9, 9])[1:] == [9, 9, *ids[2:4], 3]
    with pytest.raises(ModelError, match="a prompt takes 4 of the 4 tokens"):
        short.add_prompt(ids, [9] * 4)
    with pytest.raises(ModelError, match="an embedder pools all tokens"):
        CaptionTokenizer(encoder.tokenizer, 16, joined=True).add_prompt(ids, [9])


def test_encoding_leaves_the_training_mode_alone(llm: Path) -> None:
    encoder = TextEncoder.from_pretrained(llm)
    for mode in (True, False):
        encoder.backbone.train(mode)
        encoder.encode(TEXTS)
        assert encoder.backbone.training is mode


def test_pool() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2).bfloat16()
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert pool(hidden, mask, "mean").tolist() == [[3.0, 4.0], [6.0, 7.0]]
    assert pool(hidden, mask, "last").tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert pool(hidden, mask, "eos").tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert pool(hidden, mask, "cls").tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert pool(hidden, mask, "mean").dtype == torch.float32


def test_long_texts_are_cut_and_counted(llm: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = TextEncoder.from_pretrained(llm, max_length_tokens=5)
    embeds = encoder.encode(["a red star", "a red star on the beach", "a red star and more"])
    assert encoder.tokens.num_truncated == 2
    assert "2 of 3 texts cut at max_length_tokens=5" in caplog.text
    torch.testing.assert_close(embeds[1], embeds[0])
    assert encoder.tokens(["a red star on the beach"])[0][-1] == encoder.tokenizer.eos_token_id


def test_texts_without_tokens_are_refused(llm: Path) -> None:
    with pytest.raises(ModelError, match=r"the text '  ' has no token"):
        TextEncoder.from_pretrained(llm).encode(["dog", "  "])


def test_lengths_that_cannot_be_are_refused(llm: Path) -> None:
    with pytest.raises(ModelError, match=r"max_length_tokens is 65.*64 positions"):
        TextEncoder.from_pretrained(llm, max_length_tokens=65)
    with pytest.raises(ModelError, match="alone take 5; raise it"):
        TextEncoder.from_pretrained(llm, max_length_tokens=5, instruction="describe the picture")
    assert TextEncoder.from_pretrained(llm).settings.max_length_tokens == 64
    with pytest.raises(ModelError, match="pooling is 'max'"):
        TextEncoder.from_pretrained(llm, pooling="max")  # type: ignore[arg-type]


def test_a_saved_encoder_keeps_its_own_settings(llm: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(
        llm, pooling="last", max_length_tokens=9, instruction="the", bidirectional=False
    )
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    assert again.settings == encoder.settings
    TextEncoder.from_pretrained(tmp_path, pooling="last")
    for name, value in {
        "pooling": "mean",
        "max_length_tokens": 8,
        "instruction": "a",
        "bidirectional": True,
    }.items():
        with pytest.raises(ModelError, match=f"{name} is .* was asked for.*leave {name} out"):
            TextEncoder.from_pretrained(tmp_path, **{name: value})  # type: ignore[arg-type]
    section = TextEncoderSection(language_model=str(tmp_path))
    assert TextEncoder.from_section(section).settings == encoder.settings


def test_section_settings_arrive(llm: Path) -> None:
    section = TextEncoderSection(
        language_model=str(llm),
        pooling="last",
        max_length_tokens=10,
        instruction="a",
        bidirectional=False,
        dtype="bfloat16",
        attn_implementation="eager",
    )
    encoder = TextEncoder.from_section(section)
    assert encoder.settings == TextEncoderSettings("last", 10, "a", False)
    assert encoder.backbone.dtype == torch.bfloat16
    assert encoder.backbone.config._attn_implementation == "eager"
    assert encoder.encode(["dog"]).dtype == torch.float32


def test_saved_config_is_marked_and_refused_as_a_decoder(llm: Path, tmp_path: Path) -> None:
    TextEncoder.from_pretrained(llm).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    with pytest.raises(HandoffError, match="is_causal"):
        refuse_bidirectional(LlamaConfig.from_pretrained(tmp_path), tmp_path)


def test_fingerprint_names_what_differs(llm: Path, tmp_path: Path) -> None:
    base = TextEncoder.from_pretrained(llm)
    assert base.fingerprint == TextEncoder.from_pretrained(llm).fingerprint

    def differing(other: TextEncoder) -> set[str]:
        return {
            name for name, value in base.fingerprint.items() if other.fingerprint[name] != value
        }

    assert differing(TextEncoder.from_pretrained(llm, pooling="last")) == {"pooling"}
    assert differing(TextEncoder.from_pretrained(llm, instruction="a")) == {"instruction"}
    changed = TextEncoder.from_pretrained(llm)
    with torch.no_grad():
        next(changed.backbone.parameters())[0, 0] += 1
    assert differing(changed) == {"text_weights"}
    eager = TextEncoder.from_pretrained(llm, attn_implementation="eager")
    assert differing(eager) == set()
    folder = shutil.copytree(llm, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    other = TextEncoder.from_pretrained(folder)
    assert ((base.encode(TEXTS) * other.encode(TEXTS)).sum(1) < 0.99).all()
    assert differing(other) == {"text_config"}
    one = TextEncoder.from_pretrained(llm, pooling="eos")
    before = one.tokens.behind, one.fingerprint["text_config"]
    one.tokenizer.eos_token = "<pad>"  # another one in tokenizer_config.json, say
    end = TextEncoder(one.backbone, one.tokenizer, one.settings)
    assert (before[0], end.tokens.behind) == ([3], [3, 0])
    assert before[1] != end.fingerprint["text_config"]
    used = TextEncoder.from_pretrained(llm)
    used.tokenizer(["a", "a dog"], padding=True, truncation=True, max_length=3)
    assert differing(used) == set()


def test_a_tokenizer_that_loads_otherwise_is_refused(llm: Path, tmp_path: Path) -> None:
    TextEncoder.from_pretrained(llm).save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace('"Lowercase"', '"NFC"'))
    with pytest.raises(ModelError, match=r"text_tokenizer is .* as transformers .* loads it"):
        TextEncoder.from_pretrained(tmp_path)


def test_incomplete_weights_are_refused(llm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of LlamaModel are missing.*norm\.weight"):
        TextEncoder.from_pretrained(tmp_path)


def test_a_model_that_is_no_decoder_is_refused(tiny_clip: Path) -> None:
    with pytest.raises(ModelError, match="'clip' is no plain decoder"):
        TextEncoder.from_pretrained(tiny_clip)


def test_tokenizer_without_special_tokens() -> None:
    tokenizer = llm_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokens = CaptionTokenizer(tokenizer, 8)
    assert tokens.num_front_tokens == 0
    assert tokens(["a dog"]) == [tokenizer.convert_tokens_to_ids(["a", "dog"])]


def test_a_real_pretrained_llm(shared_data: Path) -> None:
    encoder = TextEncoder.from_pretrained(shared_data / "stories260k")
    near, same, far = encoder.encode(
        ["The little girl had a red ball.", "The girl had a small red ball.", "It rained all day."]
    )
    assert near @ same > near @ far


def test_dropout_and_gradients_stay_out_of_vectors(tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(build(tmp_path, attention_dropout=0.5))
    want = encoder.encode(TEXTS)
    encoder.backbone.train()
    got = encoder.encode(TEXTS)
    assert torch.equal(got, want) and not got.requires_grad
    batch = pad_tokens(encoder.tokens(TEXTS), 0, 1)
    encoder.backbone.train()
    assert not torch.equal(encoder(**batch), encoder(**batch))  # dropout is there
    raw = encoder.encode(TEXTS, normalize=False)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), want)
    encoder.eval()
    torch.testing.assert_close(encoder.by_length(**batch), encoder(**batch), atol=1e-5, rtol=0)


def test_a_text_of_exactly_the_limit_is_whole(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "_BLOCK", 2)
    tokens = CaptionTokenizer(llm_tokenizer(), 6)  # bos, four words, eos
    texts = ["a red star on", "dog", "a red star on the", "cat", "a dog"]
    found = [tokens.tokenizer.convert_ids_to_tokens(ids) for ids in tokens(texts)]
    want = [f"<s> {text} </s>".split() for text in texts]
    want[2].remove("the")
    assert found == want and tokens.num_truncated == 1
    (ids,) = tokens(["a red star on"])
    prompted = tokens.tokenizer.convert_ids_to_tokens(tokens.add_prompt(ids, tokens.ids("the")))
    assert prompted == "<s> the a red star </s>".split()


def test_every_setting_is_in_the_fingerprint(llm: Path) -> None:
    base = TextEncoder.from_pretrained(llm, max_length_tokens=32)
    others: dict[str, Any] = {
        "pooling": "last",
        "max_length_tokens": 31,
        "instruction": "a",
        "bidirectional": False,
        "chat": True,
        "embedder": True,
    }
    assert set(others) == {field.name for field in fields(TextEncoderSettings)}
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} yes{% endfor %}"
    )
    prints = {repr(base.fingerprint)}
    for name, value in others.items():
        own = TextEncoder(base.backbone, base.tokenizer, replace(base.settings, **{name: value}))
        if name != "chat":
            assert own.fingerprint[name] == str(value)
        prints.add(repr(own.fingerprint))
        if name == "chat":
            base.tokenizer.chat_template = base.tokenizer.chat_template.replace("yes", "no")
            again = TextEncoder(base.backbone, base.tokenizer, own.settings)
            assert again.fingerprint["chat"] != "True" and again.fingerprint != own.fingerprint
    assert len(prints) == 1 + len(others)
    words = llm_tokenizer()
    words.backend_tokenizer.normalizer = None
    other = TextEncoder(base.backbone, words, base.settings).fingerprint
    assert {k for k in other if other[k] != base.fingerprint[k]} == {"text_tokenizer"}
    assert TextEncoderSettings() == TextEncoderSettings("mean", 512, "", True, False, False)


def test_equal_vectors_in_32_bits_are_closer_than_in_16() -> None:
    one = torch.tensor([[1.0, 0.0]])
    near = torch.tensor([[0.999, 0.0447]])  # a cosine of 0.999
    text_encoder.require_equal("x", one, near, "y", torch.bfloat16)
    with pytest.raises(ModelError, match=r"differ by 0\.045"):
        text_encoder.require_equal("x", one, near, "y", torch.float32)
    with pytest.raises(ModelError, match="not all of them are finite"):
        text_encoder.require_equal("x", one, near * torch.nan, "y")
