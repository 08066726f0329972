"""`push` against a stand-in of the hub's HTTP calls on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.push import push
from llm2clip_vlm.runs.card import CARD_NAME, write_card
from llm2clip_vlm.runs.hashes import HandoffError
from llm2clip_vlm.runs.manifest import fingerprint_file


class Hub(ThreadingHTTPServer):
    """Takes what `huggingface_hub` uploads: small files in the commit, weights as LFS objects."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Calls)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.large: dict[str, str] = {}
        self.made: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.garbles = ""


class _Calls(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def _answer(self, found: Any, code: int = 200) -> None:
        body = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        hub = self.server
        if "/tree/" not in self.path:
            return self._answer({"error": "no such call"}, 404)
        entries = []
        for name, kept in hub.files.items():
            content = b"?" * len(kept) if name == hub.garbles else kept
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": blob,
            }
            if name in hub.large:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return self._answer(entries)

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self._answer({"error": "no write access"}, 403)
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self._answer({"url": f"{hub.address}/us/tower"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            rows = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in asked
            ]
            return self._answer({"files": rows})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{hub.address}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                value = row["value"]
                if row["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if row["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
                    hub.large[value["path"]] = value["oid"]
            commit = f"{hub.address}/us/tower/commit/{'0' * 40}"
            return self._answer({"commitUrl": commit, "commitOid": "0" * 40, "success": True})
        return self._answer({"error": f"no such call: {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", found.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-the-test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A directory as an export leaves it."""
    folder = tmp_path / "tower"
    folder.mkdir()
    save_file({"w": torch.arange(4.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "clip_vision_model", "image_size": 32}')
    write_card(folder, "export --to transformers", parents={"checkpoint": "us/clip"}, versions={})
    files = {f.name: fingerprint_file(f) for f in folder.iterdir() if f.name != CARD_NAME}
    (folder / "parity.json").write_text(json.dumps({"files": files, "checks": {}}))
    return folder


def test_a_model_arrives_whole(hub: Hub, tower: Path) -> None:
    address = push(tower, "us/tower")
    assert address.startswith(f"{hub.address}/us/tower/commit/")
    assert hub.files == {file.name: file.read_bytes() for file in tower.iterdir()}
    assert set(hub.large) == {"model.safetensors"}
    assert (hub.made["organization"], hub.made["name"]) == ("us", "tower")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.tokens == {"Bearer a-token-of-the-test"}


def test_what_arrives_changed_is_noticed(hub: Hub, tower: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        hub.garbles = name
        with pytest.raises(ModelError, match=rf"{name} arrived changed"):
            push(tower, "us/tower")


def test_the_hubs_refusal_is_one_message(hub: Hub, tower: Path) -> None:
    hub.refuses = True
    with pytest.raises(ModelError, match=r"us/tower: the hub says: .*403"):
        push(tower, "us/tower")


def test_what_is_not_fit_is_refused_before_anything_is_sent(
    hub: Hub, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, error: type[ValueError] = ModelError) -> None:
        with pytest.raises(error, match=match):
            push(tower, "us/tower")
        assert not hub.made

    (tower / "optimizer.pt").write_bytes(b"pickle")
    refused(r"optimizer\.pt.*no safetensors are never uploaded")
    (tower / "optimizer.pt").unlink()
    (tower / "notes.txt").write_text("login with hf_" + "a" * 34)
    refused(r"notes\.txt: looks as if it held a token")
    (tower / "notes.txt").unlink()
    (tower / "link.json").symlink_to("/etc/hostname")
    refused(r"link\.json.*no links")
    (tower / "link.json").unlink()
    card = (tower / CARD_NAME).read_text()
    (tower / CARD_NAME).unlink()
    refused(r"no model card")
    (tower / CARD_NAME).write_text(card)
    with pytest.raises(ModelError, match="name one of its models: tower"):
        push(tower.parent, "us/tower")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("hf auth login")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tower / "config.json").write_text("{}")
    refused(r"config\.json: sha256", HandoffError)
