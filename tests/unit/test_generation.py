"""The generator that stands behind the lmms-eval adapter, without lmms-eval."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from llm2clip_vlm.chat.text_tokens import TextTokens
from llm2clip_vlm.data.reading.images import open_image
from llm2clip_vlm.evaluation.vlm.generation import Generator, Prompt
from llm2clip_vlm.evaluation.vlm.task_helpers import strip_control
from llm2clip_vlm.models.vlm.building import build_vlm
from tests.tiny import llm_tokenizer

QUESTIONS = [
    "what color is it ?",
    "is there a dog in the image or a small striped ball on the left ?",
    "how many ?",
    "is there a circle ?",
    "what shape is the big object ?",
]


@pytest.fixture(scope="module")
def vlm(tiny_clip: Path, tiny_llm: Path) -> tuple[Any, Any]:
    return build_vlm(tiny_clip, tiny_llm)


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def messages(text: str, images: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": picture(seed + i)} for i in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def make(vlm: tuple[Any, Any], **options: Any) -> Generator:
    return Generator(*vlm, **{"batch_size": 4, "max_new_tokens": 6, **options})


def mixed_prompts(generator: Generator) -> list[Prompt]:
    return [generator.render(messages(q, n % 3, n)) for n, q in enumerate(QUESTIONS)]


def test_batches_give_the_answers_of_single_prompts_in_order(vlm: tuple[Any, Any]) -> None:
    single, batched = make(vlm, batch_size=1), make(vlm, batch_size=4)
    prompts = mixed_prompts(single)
    assert [len(p.images) for p in prompts] == [0, 1, 2, 0, 1]
    alone = [single.generate([prompt], [{}])[0] for prompt in prompts]
    seen: list[int] = []
    together = batched.generate(prompts, [{}] * 5, seen.append)
    assert together == alone
    assert len({answer.text for answer in alone}) > 1
    assert seen == [2, 3]  # text-only and with images apart


def test_the_picture_reaches_the_model(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm)
    prompts = [generator.render(messages("what ?", 1, seed)) for seed in (0, 7)]
    with torch.no_grad():
        first, second = (generator.model(**generator._encode([p])).logits for p in prompts)
    assert not torch.equal(first, second)


def test_a_literal_image_token_stays_text_and_control_characters_leave_the_prompt(
    vlm: tuple[Any, Any],
) -> None:
    generator = make(vlm)
    prompt = generator.render(messages("what <image> color\x00 ?"))
    assert prompt.text.count("<image>") == 1 and "\x00" not in prompt.text
    assert "image> color" in prompt.text and "<" in prompt.shown.values()
    image = generator.tokenizer.convert_tokens_to_ids("<image>")
    (ids,) = generator._encode([prompt])["input_ids"].tolist()
    (plain,) = generator._encode([generator.render(messages("what color ?"))])["input_ids"].tolist()
    assert ids.count(image) == plain.count(image) and len(ids) > len(plain)


def test_where_it_cannot_stay_text_a_literal_image_token_is_removed_and_said(
    vlm: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    generator = make(vlm)
    generator._known = TextTokens(generator.tokenizer)
    del generator._known.tokens["<image>"]
    assert generator._said("what <image> color ?") == "what  color ?"
    assert "<image> in a question would be taken for a picture; removed" in caplog.text
    assert strip_control("a\x07b\x1fc\td\ne") == "abc\td\ne"


def test_options_each_change_the_answer(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm, max_new_tokens=12)
    prompt = generator.render(messages(QUESTIONS[0]))

    def ask(**options: Any) -> Any:
        return generator.generate([prompt], [options])[0]

    plain = ask()
    assert plain.num_tokens == 12 and ask(max_new_tokens=999).num_tokens == 12
    assert ask(max_new_tokens=3).num_tokens == 3
    words = plain.text.split()
    assert ask(until=[words[4]]).text == plain.text.split(words[4], 1)[0].strip()
    assert ask(until=words[4]) == ask(until=[words[4]])
    torch.manual_seed(0)
    sampled = {ask(do_sample=True, temperature=5.0).text for _ in range(3)}
    assert len(sampled) > 1
    assert ask(do_sample=True, temperature=0).text == plain.text
    assert ask(temperature=0.0, top_p=1.0, num_beams=1) == plain
    assert ask(repetition_penalty=5.0).text != plain.text
    assert ask(image_aspect_ratio="original") == plain
    with pytest.raises(ValueError, match="logit_bias"):
        ask(logit_bias=1)


def test_what_is_streamed_is_what_is_generated(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm, max_new_tokens=8)
    prompt = generator.render(messages(QUESTIONS[0]))
    for options in ({}, {"max_new_tokens": 3}, {"repetition_penalty": 5.0}):
        *before, last = list(generator.stream(prompt, options))
        assert [last] == generator.generate([prompt], [options])
        assert len(before) == last.num_tokens - 1 and last.text.startswith(before[0].text)
    word = last.text.split()[2]
    (whole,) = generator.generate([prompt], [{"until": word}])
    assert list(generator.stream(prompt, {"until": word}))[-1].text == whole.text


def test_a_stream_ends_when_it_is_closed_or_fails(vlm: tuple[Any, Any]) -> None:
    generator, seen = make(vlm, max_new_tokens=100), []
    generator.eos_ids = []
    hook = generator.model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    stream = generator.stream(generator.render(messages("what ?")), {})
    next(stream)
    stream.close()
    hook.remove()
    assert 1 <= len(seen) < 50
    with pytest.raises(ValueError, match="num_beams"):
        list(generator.stream(generator.render(messages("what ?")), {"num_beams": 2}))
    generator.window = (
        generator._encode([generator.render(messages("?"))])["input_ids"].shape[1] + 2
    )
    assert len(list(generator.stream(generator.render(messages("?")), {}))) == 2


def test_a_sampling_generation_config_of_the_checkpoint_does_not_make_it_random(
    vlm: tuple[Any, Any],
) -> None:
    generator = make(vlm)
    prompt = generator.render(messages(QUESTIONS[0]))
    plain = generator.generate([prompt], [{}])
    config = generator.model.generation_config
    config.do_sample, config.temperature = True, 9.0
    try:
        assert all(generator.generate([prompt], [{}]) == plain for _ in range(3))
    finally:
        config.do_sample, config.temperature = None, None


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size"])
def test_a_penalty_in_the_checkpoints_generation_config_changes_no_answer(
    vlm: tuple[Any, Any], name: str
) -> None:
    """Qwen2.5-0.5B-Instruct has a `repetition_penalty` of 1.1, and a VLM around it inherits it."""
    generator = make(vlm, max_new_tokens=12)
    prompt = generator.render(messages(QUESTIONS[0]))
    plain = generator.generate([prompt], [{}])
    config = generator.model.generation_config
    setattr(config, name, 5)
    try:
        assert generator.generate([prompt], [{}]) == plain
        assert list(generator.stream(prompt, {}))[-1:] == plain
        assert generator.model.generation_config is config  # it is there again
    finally:
        setattr(config, name, None)


def test_an_answer_ends_at_the_end_token_whatever_its_batch_does(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm)
    prompts = [generator.render(messages(q, 1, n)) for n, q in enumerate(QUESTIONS)]
    plain = generator.generate(prompts, [{}] * 5)
    ids = [generator.tokenizer.convert_tokens_to_ids(a.text.split()) for a in plain]
    end = next(i for i in ids[0] if any(i not in other for other in ids[1:]))
    generator.eos_ids = [end]
    stopped = generator.generate(prompts, [{}] * 5)
    assert stopped[0].num_tokens <= ids[0].index(end) + 2 < 6
    assert plain[0].text.startswith(stopped[0].text)
    for before, after, words in zip(plain, stopped, ids, strict=True):
        assert end in words or before == after


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt(vlm: tuple[Any, Any]) -> None:
    processor = copy.copy(vlm[1])
    processor.tokenizer = llm_tokenizer()  # writes bos and eos, as foreign checkpoints' may
    generator = make((vlm[0], processor))
    prompt = generator.render(messages(QUESTIONS[0]))
    bare = Prompt(prompt.text.removeprefix(generator.tokenizer.bos_token), prompt.images)
    with_bos, without = (generator._encode([p])["input_ids"].tolist() for p in (prompt, bare))
    assert with_bos == without  # bos once, eos never


def test_errors_rise_and_training_mode_returns(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm)
    model, prompt = generator.model, generator.render(messages("what ?"))
    model.train()
    generator.generate([prompt], [{}])
    assert model.training
    broken = Prompt(prompt.text + "<image>", prompt.images)
    with pytest.raises(ValueError, match="image"):
        generator.generate([broken], [{}])
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="PIL image, got str"):
        generator.render([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])
    with pytest.raises(ValueError, match="at least 1"):
        make(vlm, batch_size=0)


def test_the_window_is_respected(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm, max_new_tokens=50)
    prompt = generator.render(messages("what ?"))
    length = generator._encode([prompt])["input_ids"].shape[1]
    generator.window = length + 5
    assert generator.generate([prompt], [{}])[0].num_tokens == 5
    shorter = generator.render(messages("?"))
    generator.eos_ids = []
    counts = [a.num_tokens for a in generator.generate([prompt, shorter], [{}] * 2)]
    assert counts == [5, 6]  # its own room each, whatever lies beside it in the batch
    generator.window = length
    with pytest.raises(ValueError, match="window"):
        generator.generate([prompt], [{}])


def test_a_processor_without_a_template_is_refused(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    bare = SimpleNamespace(tokenizer=processor.tokenizer, chat_template=None)
    with pytest.raises(ValueError, match="chat template"):
        Generator(model, bare)  # type: ignore[arg-type]


def test_every_document_keeps_its_own_options_in_every_batch(vlm: tuple[Any, Any]) -> None:
    """Beyond the first batch and the first group, in any order of the documents."""
    generator = make(vlm, batch_size=2, max_new_tokens=12)
    sizes: list[int] = []
    asked = [3, 5, 3, 4, 3, 5, 3, 5]
    prompts = [generator.render(messages(QUESTIONS[n % 5], 0)) for n in range(len(asked))]
    given = [{"max_new_tokens": n, "until": ["never said"] * (n == 4)} for n in asked]
    answers = generator.generate(prompts, given, sizes.append)
    assert [answer.num_tokens for answer in answers] == asked
    assert sorted(sizes, reverse=True) == [2, 2, 2, 1, 1]


def test_a_stop_string_counts_after_the_newline_that_a_template_leaves(
    vlm: tuple[Any, Any],
) -> None:
    generator = make(vlm)
    generator.tokenizer = SimpleNamespace(decode=lambda ids, **_: "\n\n red\nand blue")
    ids = [1, 2, 3]
    assert generator._answer(ids, ("\n",)).text == "red"
    assert generator._answer(ids, ("and", "\n")).text == "red"
    assert generator._answer(ids, ()).text == "red\nand blue"


def test_blanks_of_an_answer_stay_where_a_tokenizer_would_clean_them_up(
    vlm: tuple[Any, Any],
) -> None:
    """Llama 3's has `clean_up_tokenization_spaces`: what was trained came back changed."""
    generator = make(vlm)
    generator.tokenizer = copy.deepcopy(generator.tokenizer)
    generator.tokenizer.clean_up_tokenization_spaces = True
    ids = generator.tokenizer("red , blue .", add_special_tokens=False)["input_ids"]
    assert generator._answer(ids, ()).text == "red , blue ."


def test_what_a_model_thinks_is_no_part_of_its_answer(vlm: tuple[Any, Any]) -> None:
    """Qwen3's template writes an empty block before each answer that is trained."""
    generator = make(vlm)

    def answer(text: str, *until: str) -> Any:
        generator.tokenizer = SimpleNamespace(decode=lambda ids, **_: text)
        return generator._answer([5, 6], until)

    for text in ("<think>\n\n</think>\n\nred", "red is </think> red", "\n</think>red\n\nand"):
        assert answer(text, "\n\n").text == "red"
    cut = answer("<think>\nit is red", "\n\n")
    assert (cut.text, cut.cut) == ("", True)  # counted as an empty one


def test_an_answer_is_cut_behind_its_first_end_token_and_at_the_first_stop_string(
    vlm: tuple[Any, Any],
) -> None:
    generator, decoded = make(vlm), list[list[int]]()

    def decode(ids: list[int], **_: Any) -> str:
        decoded.append(ids)
        return " red , blue , green"

    generator.tokenizer, generator.eos_ids = SimpleNamespace(decode=decode), [7, 9]
    answer = generator._answer([1, 2, 9, 3, 7], (",",))
    assert decoded == [[1, 2]]  # an end token that is no special one would be text
    assert (answer.text, answer.num_tokens) == ("red", 3)  # the end token counts
    assert generator._answer([1, 2, 3], ()).num_tokens == 3
    # Cut by the limit: neither an end token nor a stop string.
    cut = [
        generator._answer(*given).cut for given in (([1, 9], ()), ([1], (",",)), ([1], ("", "x")))
    ]
    assert cut == [False, False, True]


def test_pictures_lose_depth_and_transparency_as_in_training(vlm: tuple[Any, Any]) -> None:
    grey = Image.fromarray(np.full((4, 4), 0x4000, np.uint16))
    for image, level in ((grey, 0x40), (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 255)):
        parts = [{"type": "image", "url": image}, {"type": "text", "text": "what ?"}]
        (seen,) = make(vlm).render([{"role": "user", "content": parts}]).images
        assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (level,) * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_pictures_that_a_task_opened_stand_upright_as_in_training(
    vlm: tuple[Any, Any], tmp_path: Path, kind: str
) -> None:
    lying = Image.new("RGB", (20, 40), "red")
    lying.paste("blue", (0, 0, 20, 20))
    exif = lying.getexif()
    exif[ExifTags.Base.Orientation] = 6
    lying.save(tmp_path / "a", kind, exif=exif)
    own = open_image(tmp_path, "a")
    for given in (Image.open(tmp_path / "a"), Image.open(tmp_path / "a").convert("RGB"), own):
        parts = [{"type": "image", "url": given}, {"type": "text", "text": "what ?"}]
        (seen,) = make(vlm).render([{"role": "user", "content": parts}]).images
        assert seen.size == (40, 20) and np.array_equal(seen, own)


def test_each_option_reaches_the_configuration(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm, max_new_tokens=20)

    def config(**options: Any) -> dict[str, Any]:
        names = "do_sample max_new_tokens num_beams temperature top_p top_k repetition_penalty"
        found = generator._settings(options)[1]
        return {name: getattr(found, name) for name in names.split()}

    plain = config()
    assert (plain["do_sample"], plain["max_new_tokens"], plain["num_beams"]) == (False, 20, 1)
    assert config(num_beams=3) == plain | {"num_beams": 3}
    assert config(max_new_tokens=19) == plain | {"max_new_tokens": 19}
    assert config(max_new_tokens=21) == config(temperature=0, do_sample=True, top_p=0.5) == plain
    assert config(repetition_penalty=1.5) == plain | {"repetition_penalty": 1.5}
    sampling = {"temperature": 0.5, "top_p": 0.25, "top_k": 3}
    assert config(**sampling) == plain | sampling | {"do_sample": True}
    # Prompts with other options are never answered in one batch.
    given = [{}, {"num_beams": 3}, {"max_new_tokens": 3}, sampling, {"until": ["a"]}]
    given += [{"repetition_penalty": 1.5}, {"temperature": 0.5}]
    assert len({generator._settings(options)[0] for options in given}) == len(given)


def test_answers_are_made_in_evaluation_mode_without_gradients(vlm: tuple[Any, Any]) -> None:
    generator, seen = make(vlm), list[tuple[bool, bool]]()
    prompt = generator.render(messages("what ?"))
    hook = generator.model.lm_head.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    generator.model.train()
    try:
        generator.generate([prompt], [{}])
    finally:
        hook.remove()
        generator.model.eval()
    assert set(seen) == {(False, False)}


def test_a_prompt_with_room_for_one_token_is_answered(vlm: tuple[Any, Any]) -> None:
    generator = make(vlm)
    prompt = generator.render(messages("what ?"))
    generator.window = generator._encode([prompt])["input_ids"].shape[1] + 1
    assert generator.generate([prompt], [{}])[0].num_tokens == 1
