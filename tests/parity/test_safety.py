"""What comes from others is not run, not trusted beyond its hash, and stays in its folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_vlm import cli
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import read_captions
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.interop.weights import read_weights
from llm2clip_vlm.recipe.base import CaptionSource
from llm2clip_vlm.runs.hashes import HandoffError, fingerprint_file
from tests.parity import reference
from tests.tiny_towers import build_tower


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place / "ran"),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_never_run(legacy: bool, tmp_path: Path) -> None:
    content = {"visual.conv1.weight": torch.ones(2), "args": Evil(tmp_path)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="nothing of it was run"):
        convert(tmp_path / "w.pt", tmp_path / "out")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(ModelError, match="nothing of it was run"):
        convert(tmp_path / "bare.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"step": 1}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="expected names and tensors"):
        read_weights(tmp_path / "w.pt")


def shards(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    tower = {f"visual.{name}": tensor for name, tensor in reference.openai().items()}
    names = sorted(tower)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, mine in parts.items():
        save_file({name: tower[name] for name in mine}, folder / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_together(tmp_path: Path) -> None:
    given = {"hidden_act": "quick_gelu"}
    keys = convert(shards(tmp_path / "in"), tmp_path / "out", settings=given)["keys"]
    assert not keys["missing"]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_shard_is_refused_before_a_tensor_is_read(
    kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip_vlm.interop import weights

    folder = shards(tmp_path / "in")
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(whole[: int(kept * len(whole))])
    opened = []
    real = weights.safe_open

    class Watched:
        def __init__(self, *args: object, **more: object) -> None:
            self.file = real(*args, **more)

        def get_tensor(self, name: str) -> None:
            opened.append(name)

    monkeypatch.setattr(weights, "safe_open", Watched)
    with pytest.raises(ModelError, match=r"b\.safetensors: damaged or cut off"):
        read_weights(folder)
    assert not opened


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_pytorch_file_is_refused(legacy: bool, tmp_path: Path) -> None:
    file, content = tmp_path / "w.bin", {"visual.conv1.weight": torch.ones(3)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    for length in range(0, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="damaged"):
            read_weights(file)
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + b"\x99" + whole[place + 1 :])
        with contextlib.suppress(ModelError):  # a changed number is no damage that is seen
            read_weights(file)


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/hostname", "gone.safetensors"])
def test_an_index_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "in")
    (tmp_path / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    text = (folder / "model.safetensors.index.json").read_text()
    text = text.replace('"b.safetensors"', json.dumps(name))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="no file"):
        read_weights(folder)


def test_a_file_with_another_hash_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip_vlm.interop import convert as module

    file = tmp_path / "w.safetensors"
    save_file(reference.siglip(), file)
    right = fingerprint_file(file)
    assert convert(file, tmp_path / "out", sha256=right.upper())["checks"]
    monkeypatch.setattr(module, "read_weights", lambda path: pytest.fail("was read"))
    with pytest.raises(HandoffError, match="sha256: expected 0000"):
        convert(file, tmp_path / "no", sha256="0000")


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    """The certificate vouches for every file beside it."""
    tower = build_tower("clip", tmp_path / "tower")
    export(tower, "transformers", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "fine")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))] += 1
    save_file(weights, file)
    for use in (convert, lambda a, b: export(a, "llava", b)):
        with pytest.raises(HandoffError, match=r"not what parity\.json vouches for"):
            use(tmp_path / "out", tmp_path / "bad")
    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    lists = [({"../tower/config.json": "0"}, "outside of"), ({}, r"not list model\.safetensors")]
    for files, told in lists:
        certificate["files"] = files
        (tmp_path / "out" / "parity.json").write_text(json.dumps(certificate))
        with pytest.raises(HandoffError, match=told):
            convert(tmp_path / "out", tmp_path / "bad")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_writes_nothing_outside(kind: str, tmp_path: Path) -> None:
    """Archives are read in memory: neither a tar of captions nor a `.pt` (a zip) is unpacked."""
    place = tmp_path / "deep" / "down"
    place.mkdir(parents=True)
    if kind == "zip":
        torch.save(reference.siglip(), place / "w.pt")
        with zipfile.ZipFile(place / "w.pt", "a") as archive:
            archive.writestr("../../evil", "x")
            archive.writestr("/tmp/llm2clip-evil", "x")
        before = set(tmp_path.rglob("*"))
        try:
            convert(place / "w.pt", place / "out")
        except ModelError:
            assert not (place / "out").exists()
    else:
        caption = json.dumps({"captions": ["a cat", "a pet"]}).encode()
        with tarfile.open(place / "0.tar", "w") as tar:
            info = tarfile.TarInfo("../../evil.json")
            info.size = len(caption)
            tar.addfile(info, io.BytesIO(caption))
        before = set(tmp_path.rglob("*"))
        with pytest.raises(ModelError, match="a tar holds no weights"):
            convert(place / "0.tar", place / "out")
        found = list(read_captions(CaptionSource(path=str(place / "0.tar")), BadRecords(9)))
        assert [record.texts for record in found] in ([], [["a cat", "a pet"]])
    new = set(tmp_path.rglob("*")) - before
    assert all(f.is_relative_to(place) for f in new)
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/tmp/llm2clip-evil").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = build_tower("clip", tmp_path / "tower")
    assert cli.main(["export", str(tower), "--to", "transformers", str(tmp_path / "out")]) == 0
    assert "image_features: max difference 0" in capsys.readouterr().out
    save_file(reference.openai(), tmp_path / "w.safetensors")
    words = ["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "back")]
    assert cli.main(words) == 2
    assert "--set hidden_act=quick_gelu" in capsys.readouterr().err
    assert cli.main([*words, "--set", "hidden_act=quick_gelu"]) == 0
    out = capsys.readouterr().out
    assert "format openai_clip: {'matched': 39" in out and "parity.json" in out
    assert cli.main([*words, "--set", "hidden_act=quick_gelu"]) == 2  # OUT is there
    save_file(reference.eva02(), tmp_path / "eva.safetensors")
    words = ["convert", str(tmp_path / "eva.safetensors"), str(tmp_path / "eva")]
    assert cli.main([*words, "--set", "rope_theta=1e4", "--set", "rope_grid=16"]) == 0
    config = json.loads((tmp_path / "eva" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_grid"]) == (10000.0, 16)
    with pytest.raises(SystemExit):
        cli.main([*words, "--set", "hidden_act"])


@pytest.mark.parametrize("loader", ["tower", "text encoder", "vlm", "clip", "export", "convert"])
def test_remote_code_is_refused_without_a_question(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal; nobody is asked, and nothing runs."""
    from llm2clip_vlm.models.clip import load_clip
    from llm2clip_vlm.models.text.text_encoder import TextEncoder
    from llm2clip_vlm.models.vision.towers import load_vision_tower
    from llm2clip_vlm.models.vlm.building import load_vlm

    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "evil.py").write_text("import os\nos.mkdir('ran')\nclass Config: pass\n")
    maps = {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": maps}))
    maps = {"AutoTokenizer": ["evil.Config", None]}
    tokenizer = {"tokenizer_class": "Evil", "auto_map": maps}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    load = {
        "tower": load_vision_tower,
        "text encoder": TextEncoder.from_pretrained,
        "vlm": load_vlm,
        "clip": lambda path: load_clip(str(path)),
        "export": lambda path: export(path, "transformers", tmp_path / "out"),
        "convert": lambda path: convert(path, tmp_path / "out"),
    }[loader]
    with pytest.raises(ValueError, match=r"custom code|remote code|no layout"):
        load(folder)
    assert not (tmp_path / "ran").exists()
