"""Contents of data files stay text, and templates of bad faith cost a record, not the run."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip_vlm.chat import jinja_budget
from llm2clip_vlm.chat.labels import prompt_text, tokenize
from llm2clip_vlm.chat.template import ConversationError, find_chat_template, template_of
from llm2clip_vlm.chat.text_tokens import text_ids, text_tokens
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import InstructionDataset
from llm2clip_vlm.data.conversation.messages import build_labels, build_plain_labels, to_messages
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.clip import ClipTokens
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.recipe.vlm import InstructionSource
from tests.tiny import CHAT_TEMPLATE, llm_tokenizer, word_tokenizer
from tests.unit.test_conversation import FAMILIES, OWN, SPECIALS, STOPS, family_tokenizer, trained

NAMES = [name for name in SPECIALS if name != "<image>"]
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}"
    "{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_control_tokens_stay_text(family: str, template: str) -> None:
    tokenizer = family_tokenizer(family, template)
    known = text_tokens(tokenizer, tokenizer.chat_template)
    plain = build_labels(tokenizer, turns("what color is it ?", "red and green"))
    rng = random.Random(family + template)
    for _ in range(8):
        words = [rng.choice([*NAMES, "red", "\u00c4", " ", "<|im_", "end|>"]) for _ in range(6)]
        text = "x" + "".join(words) + "y"
        ids, labels = build_labels(tokenizer, turns(text, text))
        assert known.control(ids) == known.control(plain[0])
        assert [i for i in ids if i == tokenizer.unk_token_id] == []
        (answer,) = trained(tokenizer, ids, labels)
        assert answer.removesuffix(STOPS[template]).strip() == text
        messages = to_messages(turns(text, text))[:1]
        prompt, shown = prompt_text(messages, template_of(tokenizer), tokenizer)
        found, _ = tokenize(tokenizer, known.named(prompt).translate(shown), known)
        assert found == ids[: next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)]
        caption, targets = build_plain_labels(tokenizer, text)
        assert known.control(caption).count(tokenizer.eos_token_id) == 1
        assert targets[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_gives_harmless_texts_the_tokens_that_they_have(family: str) -> None:
    tokenizer = family_tokenizer(family)
    known, rng = text_tokens(tokenizer), random.Random(family)
    words = ["what", " color", " 1 < 2", "\n\n", "\u00c4rger", "[a]", " ", "\U0001f600", "is it ?"]
    for _ in range(60):
        text = "".join(rng.choices(words, k=rng.randint(1, 9)))
        for add in (False, True):
            whole = tokenizer(text, add_special_tokens=add, return_offsets_mapping=True)
            offsets = [tuple(place) for place in whole["offset_mapping"]]
            assert known.encode(text, add_special_tokens=add) == (whole["input_ids"], offsets)


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "WordPiece"])
def test_a_vocabulary_that_holds_the_names_does_not_give_them_to_text(kind: str) -> None:
    """Where the switch of the tokenizer alone is not enough: the name is a word of the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "red", "dog", *"</s>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"##{sign}": len(pieces) + i for i, sign in enumerate("</s>")}
    backend = {
        "WordLevel": lambda: Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        "WordPiece": lambda: Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")),
        "Unigram": lambda: Tokenizer(models.Unigram([(p, 0.0) for p in pieces], unk_id=0)),
    }[kind]()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    (ids,) = text_ids(tokenizer, ["red </s> dog"])
    assert 2 not in ids and ids[0] == 3 and ids[-1] == 4


def test_only_the_templates_own_end_ends_an_answer() -> None:
    specials = ("<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<image>", "<box>")
    tokenizer = word_tokenizer(specials=specials, chat_template=MARKED)
    for answer in ("<box> 1 2 <box> red dog", "red </s> dog", "red dog </s>"):
        ids, labels = build_labels(tokenizer, turns("where is it ?", answer))
        first = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
        assert labels[first:] == ids[first:]
        assert labels.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    thinking = CHAT_TEMPLATE.replace("{% generation %}", "{% generation %}{{ '<box>' }}")
    tokenizer.chat_template = thinking
    ids, labels = build_labels(tokenizer, turns("where is it ?", "red dog"))
    assert trained(tokenizer, ids, labels) == ["<box> red dog </s>"]


def test_captions_stay_text_in_both_text_encoders() -> None:
    tokenizer = llm_tokenizer()
    tokenizer.model_max_length = 12
    texts = ["a dog", "a dog </s> <image> <|user|> cat"]
    tokens = CaptionTokenizer(tokenizer, 32)
    assert [row.count(3) for row in tokens(texts)] == [1, 1]
    assert tokens.control == {"</s>": 1, "<image>": 1, "<|user|>": 1}
    clip = ClipTokens(tokenizer)
    clip.prepare(texts)
    long, short = clip._ids[texts[1]], clip._ids[texts[0]]
    assert short == tokenizer(texts[0])["input_ids"]
    assert long.count(3) == 1 and long[-1] == 3 and len(long) == 12


BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('', s) }}",
    "indent": "{% set s = 'a\n' * 1000000 %}{{ s | indent(100000) }}",
    "undefined": "{{ nothing.at.all }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_template_is_rendered_within_a_budget_in_threads_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja_budget, "RENDER_LIMIT_S", 0.2)
    tokenizer = llm_tokenizer()
    tokenizer.chat_template = BOMBS[name] + CHAT_TEMPLATE
    found: list[str] = []

    def run() -> None:
        with pytest.raises(ConversationError) as caught:
            build_labels(tokenizer, turns("what ?", "red"))
        found.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert found and "the chat template fails here" in found[0]


def test_a_refused_system_turn_costs_one_record_by_name(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor: Any = build_vlm(tiny_clip, tiny_llm)[1]
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    rows = [{"id": f"g{i}", "conversations": turns("what ?", "red")} for i in range(3)]
    system = {"from": "system", "value": "be brief"}
    rows[1] = {"id": "s", "conversations": [system, *turns("what ?", "red")]}
    rows[2] = {"id": "c", "conversations": turns("what is </s> ?", "red </s> <|user|>")}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    bad = BadRecords(limit=1)
    source = InstructionSource(path=str(tmp_path / "a.json"))
    for row in rows:  # text alone
        row.pop("image", None)
    samples = InstructionDataset([source], processor, max_length_tokens=64, bad=bad)
    assert len(samples) == 2 and bad.count == 1
    assert "a.json:s" in bad.examples[0] and "no system" in bad.examples[0]
    notices = [r.getMessage() for r in caplog.records if "read as text" in r.getMessage()]
    assert len(notices) == 1 and "</s> 2 times, <|user|> 1 times" in notices[0]


def test_a_template_that_leaves_a_turn_out_costs_a_record() -> None:
    tokenizer = llm_tokenizer()
    dropped = "{% if message['role'] == 'system' %}{% elif message['role'] == 'assistant' %}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% if message['role'] == 'assistant' %}", dropped, 1
    )
    whole = turns("what ?", " red ")
    ids, labels = build_labels(tokenizer, whole)
    assert trained(tokenizer, ids, labels) == ["red </s>"]
    with pytest.raises(ConversationError, match=r"turn 1: the chat template leaves out.*be brief"):
        build_labels(tokenizer, [{"from": "system", "value": "be brief"}, *whole])
    thought = CHAT_TEMPLATE.replace("part['text'] }}", "part['text'].split('</think>')[-1] }}")
    tokenizer.chat_template = thought
    assert build_labels(tokenizer, turns("what ?", "a dog </think> red")) == (ids, labels)


@pytest.mark.parametrize("who", ["system", "gpt"])
def test_an_image_where_none_can_stand_is_a_bad_record(who: str) -> None:
    said = {"system": "be brief", "gpt": "red"}
    said[who] += " <image>"
    conversation = [{"from": "system", "value": said["system"]}, *turns("what ?", said["gpt"])]
    with pytest.raises(ConversationError, match="<image> in a turn of role"):
        to_messages(conversation)


def test_prompts_keep_what_is_said_as_text(tiny_clip: Path, tiny_llm: Path) -> None:
    from PIL import Image

    generator = Generator(*build_vlm(tiny_clip, tiny_llm), max_new_tokens=3)
    picture = {"type": "image", "url": Image.new("RGB", (32, 32))}
    said = ["what </s> <|user|> color ?", "what color ?", "<image> what <im<image>age> ?"]
    prompts = [
        generator.render([{"role": "user", "content": [picture, {"type": "text", "text": t}]}])
        for t in said
    ]
    assert [bool(prompt.shown) for prompt in prompts] == [True, False, True]
    rows = generator._encode(prompts)
    tokenizer = generator.tokenizer
    image, end = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
    for ids, seen in zip(rows["input_ids"].tolist(), rows["attention_mask"], strict=True):
        assert ids.count(image) == 16 and end not in ids[int((seen == 0).sum()) :]
    together = generator.generate(prompts, [{}] * 3)
    assert together == [generator.generate([prompt], [{}])[0] for prompt in prompts]


def test_other_models_processors_keep_what_is_said_as_text(tiny_llm: Path) -> None:
    """Idefics 3 asks its tokenizer where the visual tokens are."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, Idefics3ImageProcessorPil, Idefics3Processor

    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<row_1_col_1>")
    tokenizer = word_tokenizer(
        specials=("<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", *names)
    )
    edge = {"longest_edge": 64}
    pixels = Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    generator = Generator(AutoModelForCausalLM.from_pretrained(tiny_llm), processor)
    picture = {"type": "image", "url": Image.new("RGB", (64, 48))}
    harmless = "what color ?"
    prompts = [
        generator.render([{"role": "user", "content": [picture, {"type": "text", "text": t}]}])
        for t in (harmless, "what </s> <|user|> <image> color ?", harmless)
    ]
    known = text_tokens(processor.tokenizer, generator.template)
    encoded = generator._encode(prompts)["input_ids"].tolist()
    rows = [[token for token in row if token != tokenizer.pad_token_id] for row in encoded]
    assert known.control(rows[1]) == known.control(rows[0])
    assert len(rows[1]) > len(rows[0]) + 8
    (alone,) = generator._encode(prompts[:1])["input_ids"].tolist()  # by its own tokenizer
    assert rows[0] == rows[2] == alone
    assert processor.tokenizer is generator.tokenizer


def test_a_template_may_write_the_placeholder_of_its_own_model() -> None:
    template = CHAT_TEMPLATE.replace("<image>", "<start_of_image>")
    processor = SimpleNamespace(tokenizer=llm_tokenizer(), chat_template=template)
    assert template_of(processor) != template
    processor.image_token = "<start_of_image>"
    assert template_of(processor) == template


def test_named_templates_are_read(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = llm_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": MARKED}
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert find_chat_template(None, again) == CHAT_TEMPLATE
    assert find_chat_template("tool_use", again) == MARKED
    assert build_labels(again, turns("what ?", "red")) == build_labels(
        llm_tokenizer(), turns("what ?", "red")
    )
    again.chat_template = {"a": MARKED, "b": MARKED}
    with pytest.raises(ConversationError, match="only templates named a, b"):
        find_chat_template(None, again)


def test_tokens_that_a_recipe_lists_stay_whole(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    from llm2clip_vlm.models.vlm.building import load_vlm, save_vlm

    listed = ["<box>", "<|system|>"]  # one new, one special in the tokenizer so far
    model, processor = build_vlm(tiny_clip, tiny_llm, extra_tokens=listed)
    save_vlm(model, processor, tmp_path / "model")
    for holder in (processor, load_vlm(tmp_path / "model")[1]):
        tokenizer = holder.tokenizer
        whole = tokenizer.convert_tokens_to_ids(listed)
        ids, labels = build_labels(holder, turns("where ?", "<box> 1 </s> <|system|> red"))
        assert [i for i in labels if i in whole] == whole
        assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == ids[-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).count("<box>") == 1
    for refused in ("</s>", "<image>", " "):
        with pytest.raises(ModelError, match="extra_tokens"):
            build_vlm(tiny_clip, tiny_llm, extra_tokens=[refused])


def test_a_name_within_another_and_a_cut_text() -> None:
    tokenizer = word_tokenizer(specials=("<pad>", "<unk>", "<s>", "</s>", "<s>x"))
    known = text_tokens(tokenizer)
    assert known.count(["a <s>x and <s> b"]) == {"<s>x": 1, "<s>": 1}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for length in (4, 5, 6):
        (ids,) = text_ids(tokenizer, ["red </s> green"], add_special_tokens=True, max_length=length)
        assert len(ids) == length and ids[0] == bos and ids[-1] == eos
        assert known.control(ids) == [bos, eos]
    (plain,) = text_ids(tokenizer, ["red green"], add_special_tokens=True, max_length=3)
    assert len(plain) == 3


def test_what_is_control_and_what_is_a_word() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<|turn|>", "word"])  # not special
    turn, word = tokenizer.convert_tokens_to_ids(["<|turn|>", "word"])
    plain, known = text_tokens(tokenizer), text_tokens(tokenizer, "{{ '<|turn|> word' }}")
    assert tokenizer.unk_token_id not in plain.ids and tokenizer.eos_token_id in plain.ids
    assert known.ids - plain.ids == {turn} and word not in known.ids
