"""`llm2clip-vlm chat`: one conversation about one picture, in a terminal or a pipe."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm import cli
from llm2clip_vlm.chat.labels import label
from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.evaluation.vlm.generation import Answer
from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from llm2clip_vlm.play.vlm_chat import Chat, model_folder, open_picture, print_answer, talk
from tests.tiny import write_image

QUESTION = "what color is it ?"


@pytest.fixture(scope="module")
def stage4(tiny_clip: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's output with a VLM in `model/`."""
    folder = tmp_path_factory.mktemp("stage4")
    save_vlm(*build_vlm(tiny_clip, tiny_llm), folder / "model")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("my pictures")
    return [str(write_image(folder / f"{seed}.png", seed)) for seed in range(2)]


@pytest.fixture
def chat(stage4: Path, pictures: list[str]) -> Chat:
    chat = Chat.load(str(stage4), max_new_tokens=6)
    chat.show(open_picture(pictures[0]))
    return chat


def ask(chat: Chat, question: str, **options: Any) -> str:
    return list(chat.ask(question, options))[-1]


def test_a_later_question_stands_behind_the_earlier_turns(chat: Chat) -> None:
    """The prompt is the one that a training sample with these turns has."""
    first = ask(chat, QUESTION)
    prompt = chat.generator.render(list(chat._messages("is it big ?")))
    assert len(prompt.images) == 1
    turn: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    talk = [turn, {"role": "assistant", "content": first}]
    talk += [{"role": "user", "content": "is it big ?"}, {"role": "assistant", "content": "yes"}]
    ids, labels = label(talk, chat.generator.template, chat.generator.tokenizer)
    trained = ids[: [n for n, one in enumerate(labels) if one != -100][-2]]
    tokenizer = chat.generator.tokenizer
    assert tokenizer(prompt.text, add_special_tokens=False)["input_ids"] == trained
    assert ask(chat, "is it big ?") and [q for q, _ in chat.turns] == [QUESTION, "is it big ?"]


def test_another_picture_begins_a_new_conversation(chat: Chat, pictures: list[str]) -> None:
    ask(chat, QUESTION)
    chat.show(open_picture(pictures[1]))
    assert chat.turns == []
    ask(chat, QUESTION)
    chat.show(chat.picture)
    assert chat.turns == [] and chat.picture is not None


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_said(chat: Chat) -> None:
    answers = chat.ask(QUESTION)
    said = next(answers)
    answers.close()
    assert chat.turns == [(QUESTION, said)]


def test_a_question_without_an_answer_was_asked_all_the_same(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.generator, "stream", lambda *_: iter([Answer("", 1)]))
    assert ask(chat, QUESTION) == "" and chat.turns == [(QUESTION, "")]


def test_a_pipe_gets_the_answer_alone(
    stage4: Path, pictures: list[str], capfd: pytest.CaptureFixture[str], chat: Chat
) -> None:
    words = ["chat", str(stage4 / "model"), pictures[0], "-p", QUESTION, "--max-new-tokens", "6"]
    assert cli.main(words) == 0
    out, _ = capfd.readouterr()
    assert out == ask(chat, QUESTION) + "\n"
    chat.show(chat.picture)
    print_answer(chat, QUESTION, {"repetition_penalty": 0.1})
    other, _ = capfd.readouterr()
    assert cli.main([*words, "--repetition-penalty", "0.1"]) == 0
    assert capfd.readouterr().out == other != out
    hot = [*words, "--temperature", "9", "--top-p", "0.99"]
    assert cli.main(hot) == 0 and (first := capfd.readouterr().out) != out
    assert cli.main(hot) == 0 and capfd.readouterr().out == first
    assert cli.main([*hot, "--seed", "1"]) == 0 and capfd.readouterr().out != first
    assert cli.main([*words[:-1], "2"]) == 0
    assert out.startswith((short := capfd.readouterr().out).strip()) and len(short) < len(out)


def test_lines_of_a_pipe_are_questions(
    stage4: Path,
    pictures: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = f"{QUESTION}\n\n/image '{pictures[1]}'\n{QUESTION}\n/reset\n{QUESTION}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["chat", str(stage4), "--max-new-tokens", "6", pictures[0]]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    first, second, again = out.splitlines()
    assert second == again and first and "error" not in err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image /no/such.png\n{QUESTION}\n"))
    assert cli.main(words) == 2  # a script must notice
    out, err = capfd.readouterr()
    assert out == f"{first}\n" and "error: /no/such.png: cannot read this file" in err


def test_a_talk_ends_with_quit_and_explains_its_commands(
    chat: Chat, capfd: pytest.CaptureFixture[str]
) -> None:
    assert talk(chat, ["/what", "/quit", QUESTION], {}) == 0
    out, err = capfd.readouterr()
    assert out == "" and "/image PATH" in err and chat.turns == []


def test_a_bad_picture_or_model_is_one_error(
    stage4: Path,
    pictures: list[str],
    tmp_path: Path,
    tiny_clip: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a.png").write_bytes(b"no picture")
    for words, told in (
        ([str(stage4), str(tmp_path / "a.png")], "does not decode"),
        ([str(stage4), str(tmp_path)], "expected a plain file, got a folder"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tiny_clip)], "'clip', expected one that AutoModelForImageTextToText opens"),
        ([str(stage4.parent), pictures[0]], "no such folder with a model"),
        ([str(stage4), "--device", "cuda"], "torch sees no CUDA GPU here"),
    ):
        assert cli.main(["chat", *words, "-p", "?"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("error: ") == 1 and told in err and "Traceback" not in err


def test_what_a_model_may_be_called(stage4: Path, tmp_path: Path) -> None:
    assert model_folder(str(stage4)) == model_folder(str(stage4 / "model")) == str(stage4 / "model")
    assert model_folder("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(ValueError, match="no such folder"):
        model_folder("runs/not/there")
    with pytest.raises(ImageError, match="expected a plain file"):
        open_picture(tmp_path)


def test_the_lines_of_the_readme(
    stage4: Path, tiny_clip: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Embed, compare, generate: what a newcomer copies runs, and answers as `chat` does."""
    lines = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    for printed, here in (
        ("runs/demo/towers/llm2clip/model", tiny_clip),
        ("runs/demo/vlm/llm2clip/stage4/model", stage4 / "model"),
        ("runs/world/seed-0/images/vqa_test/00000.png", pictures[0]),
    ):
        assert printed in lines
        lines = lines.replace(printed, str(here))
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["texts"].shape == (2, names["encoder"].embed_texts(["x"]).shape[1])
    cosines, answer = capsys.readouterr().out.strip().splitlines()
    assert cosines.startswith("tensor([[")
    chat = Chat.load(str(stage4), max_new_tokens=20)
    chat.show(open_picture(pictures[0]))
    assert ast.literal_eval(answer)[0]["generated_text"].strip() == ask(
        chat, "how many objects are there ?"
    )
