"""lmms-eval's own `llava_hf` reads a stage's checkpoint as it lies, and answers as our adapter."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")

from lmms_eval.api.instance import Instance

from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat
from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from tests.tiny import write_image

WORDS = ["dog", "cat", "blue circle", "red star on the left"]


def answers(adapter: Any, docs: list[dict[str, Any]]) -> list[str]:
    adapter.task_dict = {"t": {"test": docs}}

    def visual(doc: dict[str, Any]) -> list[Image.Image]:
        return [Image.open(doc["image"]).convert("RGB")]

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": image} for image in visual(doc)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

    asked = []
    for n, doc in enumerate(docs):
        options = {"max_new_tokens": 5, "until": ["\n\n"]}
        first = (doc["question"], messages, options)
        meta = {"task": "t", "doc_id": n, "repeats": 1}
        arguments = (*copy.copy(first), n, "t", "test")
        asked.append(Instance("generate_until", arguments=arguments, idx=0, metadata=meta))
    found = adapter.generate_until(asked)
    return [getattr(answer, "text", answer) for answer in found]


def test_builtin_llava_hf_gives_the_same_answers(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It imports decord for videos, which nobody asks for here.
    monkeypatch.setitem(sys.modules, "decord", types.ModuleType("decord"))
    sys.modules["decord"].VideoReader = sys.modules["decord"].cpu = None  # type: ignore[attr-defined]
    from lmms_eval.models.chat.llava_hf import LlavaHf

    model, processor = build_vlm(tiny_clip, tiny_llm, image_aspect_ratio="pad")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_vlm(model, processor, tmp_path / "model")
    docs = [
        {"question": f"is there a {word} ?", "image": write_image(tmp_path / f"{n}.png", n, 40)}
        for n, word in enumerate(WORDS)
    ]
    theirs = LlavaHf(
        pretrained=str(tmp_path / "model"), device="cpu", device_map="cpu", batch_size=1
    )
    want = answers(Llm2ClipVlmChat(pretrained=str(tmp_path / "model"), device="cpu"), docs)
    got = answers(theirs, docs)
    assert len(set(want)) > 1 and all(want)
    assert [text.strip() for text in got] == [text.strip() for text in want]
