"""Models that lie nowhere, and a hub that cannot be reached: one answer, at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llm2clip_vlm import hub
from llm2clip_vlm.models.loading import read_config, read_processor, read_tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Which places were connected to; each attempt fails."""
    places: list[Any] = []

    def connect(place: Any, patience: float) -> Any:
        places.append(place)
        raise OSError("no route")

    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.is_offline.cache_clear()
    yield places
    hub.is_offline.cache_clear()


@pytest.mark.parametrize("read", [read_config, read_tokenizer, read_processor])
@pytest.mark.parametrize("place", ["/nowhere/model", "runs/a/b/vision_tower", "./clip"])
def test_a_path_is_no_name_of_the_hub(read: Any, place: str, asked: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"^{place}: no such file or folder"):
        read(place)
    assert not asked


def test_a_hub_that_cannot_be_reached_is_asked_once(asked: list[Any]) -> None:
    for name in ("org/model", "org/other"):
        with pytest.raises(ValueError, match=f"`hf download {name} --local-dir DIR`"):
            read_config(name)
    assert asked == [("hub.example", 443)]
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_what_is_in_the_hubs_cache_is_left_to_it(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cache" / "models--org--model" / "snapshots").mkdir(parents=True)
    hub.require_place("org/model")
    hub.require_place(tmp_path)
    assert not asked


def test_a_proxy_may_lead_there(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:1")
    assert not hub.is_offline()
    assert not asked


class Hub:
    """What `fetched` asks of huggingface_hub, answered from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.patterns = folder, []

    def list_repo_files(self, repo: str) -> list[str]:
        return [file.name for file in self.folder.iterdir()]

    def download(self, repo: str, allow_patterns: list[str] | None) -> str:
        assert repo == "org/model"
        self.patterns = allow_patterns
        return str(self.folder)


def test_a_hub_id_is_fetched_without_code_and_pickles(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    served = Hub(tmp_path / "served")
    served.folder.mkdir()
    for name in ("model.safetensors", "old.bin", "config.json", "modeling.py"):
        (served.folder / name).write_text("")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: served)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", served.download)
    monkeypatch.setattr(socket, "create_connection", lambda *a: socket.socket())
    assert hub.fetched("org/model") == served.folder
    assert "*.safetensors" in served.patterns and "*.json" in served.patterns
    assert not {"*.bin", "*.pt", "*.py"} & set(served.patterns)
    hub.fetched("org/model", code=True)
    assert "*.py" in served.patterns
    assert hub.fetched("org/model/old.bin") == served.folder / "old.bin"
    assert "old.bin" in served.patterns and "*.safetensors" not in served.patterns
    with pytest.raises(ValueError, match=r"org/model has no file none\.pt"):
        hub.fetched("org/model/none.pt")
    (served.folder / "model.safetensors").unlink()
    hub.fetched("org/model")
    assert "*.bin" in served.patterns


@pytest.mark.parametrize(
    "name", ["weights.pt", "/nowhere/weights.pt", "./a/b", "~/x/y", "runs/mine/towers/bass"]
)
def test_what_looks_like_a_path_is_not_fetched(
    name: str, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip_vlm.interop.convert import convert

    (tmp_path / "runs" / "mine").mkdir(parents=True)  # so the last is below a folder that is here
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}: no such file or folder"):
        convert(name, tmp_path / "out")
    assert not asked


def test_convert_says_what_to_download_where_there_is_no_network(
    asked: list[Any], tmp_path: Path
) -> None:
    from llm2clip_vlm.interop.convert import convert

    with pytest.raises(ValueError, match="`hf download org/model --local-dir DIR`"):
        convert("org/model", tmp_path / "out")
    assert asked == [("hub.example", 443)] and not (tmp_path / "out").exists()
