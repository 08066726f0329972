"""Labels: what is trained is the answer and its end-of-turn token, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.chat.labels import check_chat_template, end_of_turn_ids, tokenize
from llm2clip_vlm.chat.labels import label as labelled
from llm2clip_vlm.chat.template import (
    ConversationError,
    accept_image_parts,
    find_chat_template,
    render,
)
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.messages import (
    MAX_CONVERSATION_CHARS,
    build_labels,
    build_plain_labels,
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
OWN = ("vicuna_v1", "llama3", "qwen", "mistral", "gemma")
STOPS = {"vicuna_v1": "</s>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>"} | {
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
}
SPECIALS = (
    "<s> </s> <unk> <image> <|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> "
    "<|end_header_id|> [INST] [/INST] <start_of_turn> <end_of_turn>"
).split()


def family_tokenizer(family: str, template: str | None = None) -> Any:
    """A small tokenizer with a family's normaliser, pre-tokeniser and decoder, trained here."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    byte_level = family in ("llama3", "qwen")
    backend = Tokenizer(models.BPE())
    if byte_level:
        words = (
            r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(words), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:  # pieces end where words do, however the family splits afterwards
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    text = "what color is it ? red and green is it big ? yes . user assistant ASSISTANT: USER: "
    backend.train_from_iterator([text * 20, "A chat between a curious user \n " * 5], trainer)
    if byte_level:
        backend.normalizer = normalizers.NFC() if family == "qwen" else None
        backend.decoder = decoders.ByteLevel()
    else:
        learned = json.loads(backend.to_str())["model"]
        vocab = learned["vocab"] | {f"<0x{b:02X}>": len(learned["vocab"]) + b for b in range(256)}
        merges = [tuple(pair) for pair in learned["merges"]]
        backend.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        blank = normalizers.Replace(" ", "\u2581")
        if family == "llama2_legacy":  # Vicuna's: a blank before each piece of text
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank])
            backend.pre_tokenizer = None
        elif family == "mistral":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            backend.normalizer = blank
            backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if family != "qwen":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )
    tokenizer.chat_template = template and find_chat_template(template, tokenizer)
    return tokenizer


FAMILIES = ("llama2_legacy", "mistral", "llama3", "qwen", "gemma")


@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_t01_t02_t03_t05_trained_text_is_the_answers_byte_for_byte(
    family: str, template: str
) -> None:
    """Every template with every family, and words no tokenizer has seen."""
    tokenizer = family_tokenizer(family, template)
    answers = ["red and green", "yes .\n\nÄrger: 1 < 2 \U0001f600"]
    turns = [
        TURNS[0],
        {**TURNS[1], "value": answers[0]},
        TURNS[2],
        {**TURNS[3], "value": answers[1]},
    ]
    ids, labels = build_labels(tokenizer, turns, num_visual_tokens=4)
    stop = STOPS[template]
    found = [span.lstrip(" ") for span in trained(tokenizer, ids, labels)]
    assert [span.removesuffix(stop).rstrip(" ") for span in found] == answers
    assert all(span.endswith(stop) for span in found)
    assert ids.count(tokenizer.bos_token_id) <= 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 4
    # pad is eos here: the end of the turn is trained all the same
    assert labels.count(tokenizer.convert_tokens_to_ids(stop)) == 2
    assert tokenizer.convert_tokens_to_ids(stop) in end_of_turn_ids(
        accept_image_parts(tokenizer.chat_template, tokenizer), tokenizer
    )
    check_chat_template(tokenizer)
    unmarked = tokenizer.chat_template.replace("generation %}", "if true %}")
    tokenizer.chat_template = unmarked.replace("{% endif true %}", "{% endif %}")
    assert build_labels(tokenizer, turns, num_visual_tokens=4) == (ids, labels)


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


def test_a_token_after_the_last_turn_alone_is_no_rewriting() -> None:
    """As Phi 3 writes it."""
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    found = trained(tokenizer, *build_labels(tokenizer, [TURNS[2], TURNS[3]] * 2))
    assert found == ["yes .<|im_end|>", "yes .<|im_end|>\n</s>"]
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    template = accept_image_parts(tokenizer.chat_template, tokenizer)
    assert end_of_turn_ids(template, tokenizer) == ends


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
    tokenizer = family_tokenizer("qwen", "vicuna_v1")
    template = tokenizer.chat_template.replace("' ASSISTANT:'", "' ASSISTANT: '")
    tokenizer.chat_template = template.replace("' ' + message", "message")
    with pytest.raises(ConversationError, match="does the prompt end in a space"):
        check_chat_template(tokenizer)


def test_a_template_that_rewrites_history_is_refused() -> None:
    template = CHATML.replace("{% for", "{{ messages | length }}{% for", 1)
    with pytest.raises(ConversationError, match="rewrites earlier turns"):
        build_labels(family_tokenizer("qwen", template), TURNS)


def test_a_template_that_writes_a_list_as_python_does_is_refused() -> None:
    tokenizer = llm_tokenizer()
    parts = "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    template = CHAT_TEMPLATE.replace(parts, "{{ message['content'] }}", 1)
    tokenizer.chat_template = template
    with pytest.raises(ConversationError, match=r"writes Python.s .* parts of a turn of role assi"):
        check_chat_template(tokenizer)


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    template = CHATML.replace("<|im_end|>", " .")
    with pytest.raises(ConversationError, match="no end-of-turn token"):
        build_labels(family_tokenizer("qwen", template), TURNS)


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
    ("template", "front"),
    [
        (CHATML, []),
        ("{{ bos_token }}" + CHATML, ["<s>"]),
        ("<s>" + CHATML, ["<s>"]),  # as Hunyuan's, which the tokenizer then leaves to it
        (CHATML.replace("<|im_start|>", "<s>"), []),  # as SmolLM2's, where each turn begins so
    ],
)
def test_plain_begins_as_conversations_do(template: str, front: list[str]) -> None:
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = template
    ids, _ = build_plain_labels(tokenizer, "red", num_visual_tokens=1)
    assert tokenizer.convert_ids_to_tokens(ids)[: len(front) + 1] == [*front, "<image>"]


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
    halves = re.split("(<image>)", value)  # the same said as a list, as the hub has it
    listed = [{"type": "image"} if h == "<image>" else {"type": "text", "text": h} for h in halves]
    user = {"role": "user", "content": [part for part in listed if part.get("text", "x")]}
    assert to_messages([user, TURNS[1]])[0] == messages[0]


def test_joined_parts_read_as_llava_writes_them() -> None:
    tokenizer = family_tokenizer("qwen", CHATML)
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
    assert "ASSISTANT:" in find_chat_template("vicuna_v1", tokenizer)
    (tmp_path / "a.jinja").write_text("x{{ bos_token }}")
    assert find_chat_template(str(tmp_path / "a.jinja"), tokenizer) == "x{{ bos_token }}"
    (tmp_path / "a.jinja").write_text("{{ bos_token }}\r\n", encoding="utf-8-sig", newline="")
    windows = find_chat_template(str(tmp_path / "a.jinja"), tokenizer)
    assert windows == "{{ bos_token }}\n"  # with the mark in front bos would come twice
    with pytest.raises(ConversationError, match="did you mean 'vicuna_v1'"):
        find_chat_template("vicuna", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConversationError, match="no chat template"):
        find_chat_template(None, tokenizer)


def test_a_template_that_asks_for_the_date_says_the_same_tomorrow() -> None:
    tokenizer = llm_tokenizer()
    for asks in ("strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'):
        given = f"{{% if strftime_now is defined %}}{{{{ {asks} }}}}{{% endif %}}{CHAT_TEMPLATE}"
        template = accept_image_parts(given, tokenizer)
        text = render(to_messages(TURNS[:2])[:1], template, tokenizer)
        assert text.startswith("26 Jul 2024<s><|user|>")


def test_preview_shows_what_is_trained() -> None:
    tokenizer = llm_tokenizer()
    ids, labels = build_labels(tokenizer, TURNS[:2], num_visual_tokens=16)
    text = decoded_preview(ids, labels, tokenizer)
    assert "[<image> x16]" in text
    assert text.endswith("«red and green </s>»")


def test_a_conversation_of_exactly_the_limit_is_taken() -> None:
    def turns(length: int) -> list[dict[str, str]]:
        return [{"from": "human", "value": "x" * (length - 3)}, {"from": "gpt", "value": "red"}]

    assert len(to_messages(turns(MAX_CONVERSATION_CHARS))) == 2
    with pytest.raises(ConversationError, match=f"{MAX_CONVERSATION_CHARS + 1} characters"):
        to_messages(turns(MAX_CONVERSATION_CHARS + 1))


def test_plain_has_an_image_token_for_each_image() -> None:
    tokenizer = llm_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    red = tokenizer.convert_tokens_to_ids("red")
    ids, labels = build_plain_labels(tokenizer, " red\n", num_images=2, num_visual_tokens=3)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids == [bos, *[image] * 6, red, eos]
    assert labels == [*[IGNORE_INDEX] * 7, red, eos]


def test_bos_behind_an_answer_does_not_end_it() -> None:
    """A template that separates turns by bos teaches nobody to stop."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ bos_token }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
    with pytest.raises(ConversationError, match="no end-of-turn token"):
        labelled([*turns, *turns], template, llm_tokenizer())


def test_all_end_tokens_of_an_answers_block_are_trained() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{{ eos_token }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = llm_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_end|>"]})
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
    ids, labels = labelled(turns, template, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[-3:]) == ["red", "<|im_end|>", "</s>"]
    assert labels == [IGNORE_INDEX] * (len(ids) - 3) + ids[-3:]


def test_a_bare_text_begins_with_bos_and_never_ends_with_eos() -> None:
    tokenizer = llm_tokenizer()  # adds both
    bos, eos, red = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "red"])
    assert tokenize(tokenizer, "red") == ([bos, red], [(0, 0), (0, 3)])
    assert tokenize(tokenizer, "<s>red")[0] == [bos, red]
    assert tokenize(tokenizer, "red</s>")[0] == [bos, red, eos]  # the template's own stays


def test_a_prompt_of_as_many_other_tokens_is_refused() -> None:
    tokenizer = llm_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    check_chat_template(tokenizer)
    head, tail = CHAT_TEMPLATE.rsplit("<|assistant|>", 1)
    tokenizer.chat_template = f"{head}<|user|>{tail}"
    with pytest.raises(ConversationError, match="the chat template prompts with"):
        check_chat_template(tokenizer)
