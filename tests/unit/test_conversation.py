"""Labels: what is trained is the answer and its end-of-turn token, nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.chat_template import (
    CHAT_TEMPLATES,
    ConversationError,
    accept_image_parts,
    end_of_turn_ids,
    find_chat_template,
    render,
)
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation import (
    build_labels,
    build_plain_labels,
    check_chat_template,
    count_images,
    decoded_preview,
    to_messages,
)
from tests.tiny import CHAT_TEMPLATE, llm_tokenizer

TURNS = [
    {"from": "human", "value": "<image>\nwhat color is it ?"},
    {"from": "gpt", "value": "red and green"},
    {"from": "human", "value": "is it big ?"},
    {"from": "gpt", "value": "yes ."},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' "
    "+ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def byte_tokenizer(template: str) -> Any:
    """A byte-level BPE like those of Qwen and Llama 3: white space belongs to the word after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<image>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "what color is it ? red and green is it big ? yes . user assistant ASSISTANT: USER: "
    backend.train_from_iterator([text * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=specials[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer: Any, ids: list[int], labels: list[int]) -> list[str]:
    """The decoded trained spans."""
    spans: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    return [tokenizer.decode(span) for span in spans if span]


def test_markers_train_answers_and_their_end() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_labels(tokenizer, TURNS)
    assert trained(tokenizer, ids, labels) == ["red and green </s>", "yes . </s>"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_without_markers_the_labels_are_the_same() -> None:
    tokenizer = llm_tokenizer()
    expected = build_labels(tokenizer, TURNS)
    tokenizer.chat_template = re.sub(r"{% (end)?generation %}", "", CHAT_TEMPLATE)
    assert tokenizer.chat_template != CHAT_TEMPLATE
    assert build_labels(tokenizer, TURNS) == expected


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|im_end|>"),
        (CHAT_TEMPLATES["vicuna_v1"], "</s>"),
    ],
)
def test_templates_of_real_families(template: str, ending: str) -> None:
    tokenizer = byte_tokenizer(template)
    ids, labels = build_labels(tokenizer, TURNS, num_visual_tokens=4)
    spans = [span.strip() for span in trained(tokenizer, ids, labels)]
    assert spans == [f"red and green{ending}", f"yes .{ending}"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 4
    check_chat_template(tokenizer)
    # pad is eos here: the end of the turn is trained all the same
    stop = tokenizer.convert_tokens_to_ids(ending)
    assert labels.count(stop) == 2
    assert stop in end_of_turn_ids(accept_image_parts(template, tokenizer), tokenizer)


def test_a_system_turn_is_not_trained() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_labels(tokenizer, [{"from": "system", "value": "look"}, *TURNS[:2]])
    assert trained(tokenizer, ids, labels) == ["red and green </s>"]
    assert "look" in tokenizer.decode(ids)


def test_an_unknown_word_does_not_end_a_turn() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_labels(tokenizer, [TURNS[0], {"from": "gpt", "value": "zzz red qqq"}])
    assert trained(tokenizer, ids, labels) == ["<unk> red <unk> </s>"]


def test_a_prompt_that_is_no_token_prefix_is_refused() -> None:
    template = CHAT_TEMPLATES["vicuna_v1"].replace("' ASSISTANT:'", "' ASSISTANT: '")
    template = template.replace("' ' + message", "message")
    marked = byte_tokenizer(template)
    with pytest.raises(ConversationError, match="no token prefix"):
        check_chat_template(marked)
    plain = byte_tokenizer(re.sub(r"{% (end)?generation %}", "", template))
    with pytest.raises(ConversationError, match="no token prefix"):
        build_labels(plain, TURNS)


def test_a_template_that_rewrites_history_is_refused() -> None:
    template = CHATML.replace("{% for", "{{ messages | length }}{% for", 1)
    with pytest.raises(ConversationError, match="rewrites earlier turns"):
        build_labels(byte_tokenizer(template), TURNS)


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    template = CHATML.replace("<|im_end|>", " .")
    with pytest.raises(ConversationError, match="no end-of-turn token"):
        build_labels(byte_tokenizer(template), TURNS)


def test_a_marker_in_front_of_the_stop_token_still_trains_it() -> None:
    tokenizer = llm_tokenizer()
    expected = build_labels(tokenizer, TURNS)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    )
    assert build_labels(tokenizer, TURNS) == expected


def test_plain_drops_the_question() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_plain_labels(tokenizer, "red star", num_visual_tokens=3)
    assert tokenizer.decode(ids) == "<s> <image> <image> <image> red star </s>"
    assert trained(tokenizer, ids, labels) == ["red star </s>"]
    with pytest.raises(ConversationError, match="expected text"):
        build_plain_labels(tokenizer, " ")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nwhat ?", ["image", "what ?"]),
        ("what ?\n<image>", ["image", "what ?"]),
        ("<image>", ["image"]),
        ("one <image> two <image>", ["one ", "image", " two ", "image"]),
        ("<image>\n<image>\nwhat ?", ["image", "\n", "image", "\nwhat ?"]),
        ("what ?", ["what ?"]),
    ],
)
def test_images_keep_their_place(value: str, parts: list[str]) -> None:
    messages = to_messages([{"from": "human", "value": value}, TURNS[1]])
    found = [part.get("text", part["type"]) for part in messages[0]["content"]]
    assert found == parts
    assert count_images(messages) == value.count("<image>")


def test_joined_parts_read_as_llava_writes_them() -> None:
    tokenizer = byte_tokenizer(CHATML)
    template = accept_image_parts(CHATML, tokenizer)
    assert template != CHATML
    for value in ("<image>\nwhat ?", "a\n<image>\n<image>\nwhat ?", "<image> two <image>\nb"):
        messages = to_messages([{"from": "human", "value": value}, TURNS[1]])
        assert value in render(messages, template, tokenizer)
    native = accept_image_parts(CHAT_TEMPLATE, tokenizer)
    assert native == CHAT_TEMPLATE
    with pytest.raises(Exception, match="video"):
        render([{"role": "user", "content": [{"type": "video"}]}], template, tokenizer)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "does not end with an answer"),
        (TURNS[:1], "does not end with an answer"),
        (TURNS[1:2], "assistant after nothing"),
        ([TURNS[0], TURNS[0]], "user after user"),
        ([{"from": "bot", "value": "a"}], "role 'bot'"),
        ([TURNS[0], {"from": "gpt", "value": "  "}], "answer is empty"),
        ([{"from": "human"}, TURNS[1]], "no text"),
    ],
)
def test_bad_conversations_are_named(turns: list[dict[str, str]], reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        build_labels(llm_tokenizer(), turns)


def test_chat_template_lookup(tmp_path: Path) -> None:
    tokenizer = llm_tokenizer()
    assert find_chat_template(None, tokenizer) == CHAT_TEMPLATE
    assert find_chat_template("vicuna_v1", tokenizer) == CHAT_TEMPLATES["vicuna_v1"]
    (tmp_path / "a.jinja").write_text("x{{ bos_token }}")
    assert find_chat_template(str(tmp_path / "a.jinja"), tokenizer) == "x{{ bos_token }}"
    with pytest.raises(ConversationError, match="did you mean 'vicuna_v1'"):
        find_chat_template("vicuna", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConversationError, match="no chat template"):
        find_chat_template(None, tokenizer)


def test_preview_shows_what_is_trained() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_labels(tokenizer, TURNS[:2], num_visual_tokens=16)
    text = decoded_preview(ids, labels, tokenizer)
    assert "[<image> x16]" in text
    assert text.endswith("«red and green </s>»")
