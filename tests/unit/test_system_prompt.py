"""`vlm.system_prompt`: none, another one, or the template's, wherever a conversation is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from llm2clip_vlm.chat.labels import check_chat_template, end_of_turn_ids
from llm2clip_vlm.chat.template import ConversationError, accept_image_parts, find_chat_template
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import InstructionDataset
from llm2clip_vlm.data.conversation.messages import build_labels
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm
from llm2clip_vlm.models.vlm.system_prompt import with_system_prompt
from llm2clip_vlm.runs.manifest import HandoffError
from tests.image_corpus import photo
from tests.tiny import CHAT_TEMPLATE, build_llm
from tests.unit.test_conversation import CHATML, TURNS, family_tokenizer
from tests.unit.test_instruction import source
from tests.vlm_fixtures import run_here, write_llava, write_recipe

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper named Smol<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3_2 = (  # the date of the day, and the system text behind it
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set said = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set said = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' }}"
    "{{- strftime_now('%d %b %Y') + '\n\n' }}"
    "{{- said + '<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) "
    "+ '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEXT = 'Answer "briefly" \\ it\'s {{ red }} %} \U0001f600\nor not .'
OWN = {"from": "system", "value": "mine ."}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def tokenizer_of(template: str) -> tuple[Any, str]:
    """A tokenizer that has the template, able to take images, and the template."""
    tokenizer = family_tokenizer("llama3", None)
    if template == SMOLLM2:
        tokenizer.bos_token = "<|im_start|>"  # as SmolLM2 has it
    template = accept_image_parts(find_chat_template(template, tokenizer), tokenizer)
    return tokenizer, template


def conversation(tokenizer: Any, template: str, turns: list[Any]) -> tuple[str, list[str]]:
    """The text of a conversation, and what of it is trained."""
    tokenizer.chat_template = template
    check_chat_template(tokenizer)
    ids, labels = build_labels(tokenizer, turns, num_visual_tokens=1)
    trained: list[list[int]] = [[]]
    for token in labels:
        trained = (
            [*trained, []] if token == IGNORE_INDEX else [*trained[:-1], [*trained[-1], token]]
        )
    return tokenizer.decode(ids), [tokenizer.decode(span) for span in trained if span]


@pytest.mark.parametrize(
    ("template", "default", "before", "given"),
    [
        (SMOLLM2, "named Smol", "<|im_start|>user\n", f"<|im_start|>system\n{TEXT}<|im_end|>\n"),
        ("qwen", "assistant.", "<|im_start|>user\n", f"<|im_start|>system\n{TEXT}<|im_end|>\n"),
        (CHATML, None, "<|im_start|>user\n", f"<|im_start|>system\n{TEXT}<|im_end|>\n"),
        (LLAMA_3_2, "Today: ", f"<s>{HEADER.format('user')}", f"\n\n{TEXT}<|eot_id|>"),
        ("llama3", None, f"<s>{HEADER.format('user')}", f"<s>{HEADER.format('system')}{TEXT}"),
        ("vicuna_v1", "A chat between", "<s> USER: ", f"<s>{TEXT} USER: "),
        ("gemma", None, "<s><start_of_turn>user\n", f"<s><start_of_turn>user\n{TEXT}\n\n<image>"),
        ("mistral", None, "<s>[INST] ", f"<s>[INST] {TEXT}\n\n<image>"),
    ],
)
def test_every_template_begins_as_the_recipe_says(
    template: str, default: str | None, before: str, given: str
) -> None:
    tokenizer, template = tokenizer_of(template)
    assert with_system_prompt(template, None, tokenizer) is template
    text, answers = conversation(tokenizer, template, TURNS)
    assert (default or before) in text
    dropped = with_system_prompt(template, "", tokenizer)
    less, same = conversation(tokenizer, dropped, TURNS)
    assert less.removeprefix("<s>").startswith(f"{before.removeprefix('<s>')}<image>")
    assert text.endswith(less.removeprefix("<s>"))
    assert same == answers
    changed = with_system_prompt(template, TEXT, tokenizer)
    more, same = conversation(tokenizer, changed, TURNS)
    assert given in more
    assert default is None or default == "Today: " or default not in more
    said = [{"from": "system", "value": TEXT}, *TURNS]
    assert (more, same) == conversation(tokenizer, template, said)
    assert with_system_prompt(dropped, "", tokenizer) == dropped
    # a conversation's own system turn wins
    own = conversation(tokenizer, template, [OWN, *TURNS])
    assert conversation(tokenizer, changed, [OWN, *TURNS]) == own
    assert conversation(tokenizer, dropped, [OWN, *TURNS]) == own
    for new in (dropped, changed):
        assert end_of_turn_ids(new, tokenizer) == end_of_turn_ids(template, tokenizer)


def test_a_template_that_takes_no_system_turn_says_so() -> None:
    tokenizer, template = tokenizer_of(GEMMA)
    assert with_system_prompt(template, "", tokenizer) == template
    deaf = template.replace("raise_exception('System role not supported')", "''")
    silent = deaf.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    for other in (template, silent):
        with pytest.raises(ConversationError, match="takes no system turn, got 'be red"):
            with_system_prompt(other, "be red .", tokenizer)
    with pytest.raises(ConversationError, match=r"names of tokens, got \['<\|im_end\|>'\]"):
        with_system_prompt(CHATML, "be <|im_end|> red .", tokenizer)
    odd = CHATML.replace("'<|im_start|>' + message", "('A' if loop.first else 'B') + message")
    with pytest.raises(ConversationError, match="begins otherwise than later ones"):
        with_system_prompt(accept_image_parts(odd, tokenizer), "", tokenizer)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose template writes `please answer` before a first question."""
    folder = build_llm(tmp_path_factory.mktemp("llm"))
    default = "{% if messages[0]['role'] != 'system' %}<|system|>please answer{% endif %}"
    (folder / "chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" + default)
    )
    return folder


def test_training_generation_and_transformers_alone_see_one_conversation(
    llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Stage 3 in chat form, stage 4, what a user loads, what lmms-eval asks; three tokens less."""
    file = write_llava(tmp_path, 8)
    parts = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]
    asked = [{"role": "user", "content": parts}]
    shown = [{"role": "user", "content": [{"type": "image", "url": photo()}, parts[1]]}]
    text: dict[str, str] = {}
    lengths: dict[str, Any] = {}

    def look(name: str, model: Any, processor: Any) -> None:
        bad = BadRecords()
        samples = InstructionDataset([source(file)], processor, max_length_tokens=128, bad=bad)
        lengths[name] = samples.lengths
        ids = samples[0]["input_ids"].tolist()
        processor.save_pretrained(tmp_path / "alone")
        alone = AutoProcessor.from_pretrained(tmp_path / "alone")
        text[name] = alone.apply_chat_template(asked, add_generation_prompt=True)
        assert Generator(model, processor).render(shown).text == text[name]
        prompt = alone(text=[text[name]], images=[photo()], add_special_tokens=False)
        assert ids[: len(prompt["input_ids"][0])] == prompt["input_ids"][0]

    look("as_is", *build_vlm(tiny_clip, llm))
    look("other", *build_vlm(tiny_clip, llm, system_prompt="only yes"))
    values = {
        "data": [{"path": str(file)}],
        "trainable": {"multi_modal_projector": 1e-3},
        "trainer": {"max_steps": 1},
        "packing": True,
    }
    vlm = {"vision_tower": str(tiny_clip), "language_model": str(llm), "system_prompt": ""}
    three, four = tmp_path / "three", tmp_path / "four"
    recipe = write_recipe(
        tmp_path / "3.yaml", output_dir=str(three), vlm=vlm, plain=False, **values
    )
    run_here("stage3_projector", recipe)
    values |= {"output_dir": str(four), "checkpoint": str(three / "model")}
    run_here("stage4_instruction", write_recipe(tmp_path / "4.yaml", **values))
    look("none", *load_vlm(four / "model"))
    tail = "<|user|><image>what color is it ?<|assistant|>"
    assert text == {
        "as_is": f"<s><|system|>please answer{tail}",
        "none": f"<s>{tail}",
        "other": f"<s><|system|>only yes{tail}",
    }
    assert [a - b for a, b in zip(lengths["as_is"], lengths["none"], strict=True)] == [3] * 8
    with pytest.raises(HandoffError, match=r"chat_template: it was made with \w+, here is"):
        build_vlm(tiny_clip, llm, projector=three / "model")
    build_vlm(tiny_clip, llm, system_prompt="", projector=three / "model")
