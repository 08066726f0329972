"""Questions about one picture, for which it is computed once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from llm2clip_vlm.evaluation.vlm.generation import Answer, Generator, Prompt
from llm2clip_vlm.evaluation.vlm.shared_prefix import PrefixSharing, places
from llm2clip_vlm.models.vlm.building import build_vlm
from tests.tiny import llm_tokenizer
from tests.unit.test_generation import QUESTIONS, messages


@pytest.fixture(scope="module")
def vlm(tiny_clip: Path, tiny_llm: Path) -> tuple[Any, Any]:
    model, processor = build_vlm(tiny_clip, tiny_llm)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, processor


def pictures_seen(generator: Generator) -> list[int]:
    """Pictures of each call of the tower from now on."""
    seen: list[int] = []
    tower = generator.model.model.vision_tower
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[:1][0]))),
        with_kwargs=True,
    )
    return seen


def ask(vlm: tuple[Any, Any], prompts: list[Prompt], **options: Any) -> list[Answer]:
    generator = Generator(*vlm, batch_size=8, max_new_tokens=6)
    return generator.generate(prompts, [options] * len(prompts))


def asked(vlm: tuple[Any, Any], pictures: int = 2) -> list[Prompt]:
    """Five questions of unlike lengths about each picture, mixed."""
    generator = Generator(*vlm)
    return [generator.render(messages(q, 1, n)) for q in QUESTIONS for n in range(pictures)]


def test_a_picture_is_computed_once_a_batch_and_the_answers_stay(vlm: tuple[Any, Any]) -> None:
    prompts = asked(vlm)
    alone = [ask(vlm, [prompt])[0] for prompt in prompts]
    generator = Generator(*vlm, batch_size=8, max_new_tokens=6)
    seen = pictures_seen(generator)
    assert generator.generate(prompts, [{}] * 10) == alone
    assert len({answer.text for answer in alone}) > 2
    assert seen == [1, 1, 2, 1]  # one prompt compared both ways, two pictures, the last two prompts
    assert generator._sharing._right is True
    seen.clear()
    assert generator.generate(prompts, [{"num_beams": 2}] * 10) == ask(vlm, prompts, num_beams=2)
    assert max(seen) > 2  # beams: as ever


def test_questions_of_a_picture_stand_together_if_there_are_many() -> None:
    assert places(["b", "a", "b", "a"]) == {"b": 0, "a": 1}
    assert places(["b", "a", "c"]) == {"a": 0, "b": 0, "c": 0}


def test_a_model_that_answers_otherwise_computes_each_prompt(
    vlm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = asked(vlm)
    alone = [ask(vlm, [prompt])[0] for prompt in prompts]
    real = PrefixSharing._share

    def wrong(self: PrefixSharing, *given: Any) -> Any:
        found = real(self, *given)
        assert found is not None
        return found | {"attention_mask": torch.ones_like(found["attention_mask"])}  # sees padding

    monkeypatch.setattr(PrefixSharing, "_share", wrong)
    with caplog.at_level(logging.WARNING):
        assert ask(vlm, prompts) == alone
    assert "the picture is computed anew for each question: they differ by" in caplog.text


def test_what_differs_before_the_picture_is_not_shared(vlm: tuple[Any, Any]) -> None:
    generator = Generator(*vlm, max_new_tokens=6)
    prompts = []
    for question in QUESTIONS:
        (said,) = messages(question)
        said["content"].reverse()  # the question, then the picture
        prompts.append(generator.render([said]))
    alone = [ask(vlm, [prompt])[0] for prompt in prompts]
    seen = pictures_seen(generator)
    assert generator.generate(prompts, [{}] * 5) == alone
    assert seen[-1] == 5


def test_a_model_with_other_states_shares_nothing(tiny_clip: Path, tmp_path: Path) -> None:
    tokenizer = llm_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vlm = build_vlm(tiny_clip, tmp_path)
    prompts = asked(vlm, 1)
    alone = [ask(vlm, [prompt])[0] for prompt in prompts]
    generator = Generator(*vlm, max_new_tokens=6)
    seen = pictures_seen(generator)
    assert generator.generate(prompts, [{}] * 5) == alone
    assert seen[-1] == 5 and generator._sharing._right is False
