"""docs/serve.md: `transformers serve` with a checkpoint of ours, asked by OpenAI's client."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from llm2clip_vlm.play.vlm_chat import Chat, open_picture
from tests.tiny import write_image

openai = pytest.importorskip("openai", reason="needs `pip install openai`")
pytest.importorskip("uvicorn", reason="needs `pip install 'transformers[serving]'`")
pytestmark = pytest.mark.slow

QUESTION = "what color is it ?"


@pytest.fixture(scope="module")
def model(tiny_clip: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    save_vlm(*build_vlm(tiny_clip, tiny_llm), folder)
    return folder


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = model.parent / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ))
    asking = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(240):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, log.read_text()[-3000:]
        yield asking
    finally:
        server.terminate()
        server.wait(timeout=30)


def data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize("seen", [True, False])
def test_the_server_answers_as_the_chat_does(
    client: Any, model: Path, tmp_path: Path, seen: bool
) -> None:
    picture = open_picture(write_image(tmp_path / "a.png", 3)) if seen else None
    chat = Chat.load(str(model), device="cpu", max_new_tokens=8)
    chat.show(picture)
    want = list(chat.ask(QUESTION))[-1]
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_uri(picture)}})
    asked: Any = {
        "model": str(model),
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content.strip() == want
    pieces = client.chat.completions.create(**asked, stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said.strip() == want
