"""Checkpoints of bad faith or bad luck: one error with the file's name, soon, and nothing runs."""

from __future__ import annotations

import ast
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPModel, CLIPVisionModel

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.models.loading import load_complete, read_image_processor, read_tokenizer
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from tests.conftest import REPO_ROOT

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Damage = Callable[[Path], object]


def write(folder: Path, name: str, content: bytes | str) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changes: Any) -> Damage:
    """A config with other values (`part__key` goes into a part)."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        for key, value in changes.items():
            part, _, name = key.rpartition("__")
            (found[part] if part else found)[name] = value
        write(folder, CONFIG, json.dumps(found))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A safetensors header with other places of its tensors."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8 : 8 + size])
        change({k: v for k, v in found.items() if k != "__metadata__"})
        text = json.dumps(found).encode()
        write(folder, WEIGHTS, len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return damage


def overlap(tensors: dict[str, Any]) -> None:
    first, second, *_ = tensors.values()
    second["data_offsets"] = first["data_offsets"]


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def link(name: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return damage


def index(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder.parent / f"{folder.name}.outside")
        write(folder, f"{WEIGHTS}.index.json", json.dumps(content))

    return damage


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


LAYER = "vision_model.encoder.layers.{}.layer_norm1.weight"
LORA = "base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight"

CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "fewer layers than weights": (
        config(vision_config__num_hidden_layers=2), r"16 weights are unknown.*layers\.2\."),
    "fewer text layers": (config(text_config__num_hidden_layers=1), "weights are unknown"),
    "a layer 99": (
        weights(lambda w: w.update({LAYER.format(99): torch.ones(32)})), r"1 weights.*layers\.99"),
    "LoRA leftovers": (weights(lambda w: w.update({LORA: torch.ones(2, 32)})), r"lora_A"),
    "a NaN": (
        weights(lambda w: w["vision_model.post_layernorm.bias"][:1].fill_(float("nan"))),
        r"post_layernorm\.bias holds NaN"),
    "infinity": (
        weights(lambda w: w["vision_model.pre_layrnorm.weight"][:1].fill_(float("inf"))),
        "infinity"),
    "an extra weight": (weights(lambda w: w.update(extra=torch.ones(3))), r"'extra'"),
    "int8 weights": (
        weights(lambda w: w.update({k: v.to(torch.int8) for k, v in w.items() if v.ndim == 2})),
        r"torch\.int8.*quantization_config"),
    "fp8 weights": (
        weights(lambda w: w.update(
            {k: v.to(torch.float8_e4m3fn) for k, v in w.items() if v.ndim == 2})), "float8"),
    "a number of classes": (config(architectures=5), r"config\.json: architectures: expected"),
    "1e9 layers": (config(vision_config__num_hidden_layers=10**9), r"config\.json: .*layers"),
    "1e6 layers": (config(vision_config__num_hidden_layers=10**6), r"config\.json: .*layers"),
    "1e9 wide": (config(vision_config__hidden_size=10**9), r"config\.json: .*hidden_size"),
    "1e9 labels": (config(num_labels=10**9), r"config\.json: num_labels"),
    "1e9 px": (config(vision_config__image_size=10**9), r"config\.json: .*image_size"),
    "no heads": (config(vision_config__num_attention_heads=0), r"config\.json: .*heads"),
    "negative heads": (config(vision_config__num_attention_heads=-4), r"config\.json: .*heads"),
    "heads that do not divide": (config(vision_config__num_attention_heads=5), "not a multiple"),
    "NaN": (config(vision_config__layer_norm_eps=float("nan")), r"config\.json: .*eps.*nan"),
    "text for a number": (config(vision_config__num_hidden_layers="3"), "clip"),
    "list": (lambda d: write(d, CONFIG, "[1]"), r"config\.json: expected an object"),
    "NUL": (lambda d: write(d, CONFIG, b"\0" * 50), r"config\.json: .*NUL"),
    "cut": (lambda d: write(d, CONFIG, '{"model_type": "clip"'), r"config\.json: no JSON"),
    "nested": (lambda d: write(d, CONFIG, "[" * 100_000), r"config\.json"),
    "twice": (
        lambda d: write(d, CONFIG, '{"model_type": "clip", "model_type": "llama"}'), "given twice"),
    "config a FIFO": (fifo(CONFIG), r"config\.json: .*FIFO"),
    "weights a FIFO": (fifo(WEIGHTS), r"model\.safetensors: .*FIFO"),
    "weights a device": (link(WEIGHTS, "/dev/zero"), r"model\.safetensors: .*device"),
    "weights linked to nothing": (link(WEIGHTS, "nothing"), r"model\.safetensors: cannot read"),
    "weights linked to a folder": (link(WEIGHTS, "/"), r"model\.safetensors: .*folder"),
    "weights cut": (
        lambda d: write(d, WEIGHTS, (d / WEIGHTS).read_bytes()[:-9]), r"safetensors: damaged"),
    "weights overlap": (header(overlap), r"safetensors: damaged"),
    "weights gone": (lambda d: (d / WEIGHTS).unlink(), "there is no model.safetensors"),
    "index a list": (index([]), r"index\.json: expected an object"),
    "index without a map": (index({}), r"index\.json: weight_map"),
    "index of lists": (index({"weight_map": [1]}), r"index\.json: weight_map"),
    "shard missing": (index({"weight_map": {"a": "b.safetensors"}}), r"index\.json: .*b\.safet"),
    "shard outside": (index({"weight_map": {"a": "../clip.outside"}}), r"index\.json: .*outside"),
    "pickled": (pickled, r"pytorch_model\.bin is a pickle"),
    "an adapter's config": (
        lambda d: write(d, "adapter_config.json", '{"base_model_name_or_path": "x"}'),
        r"adapter_config\.json"),
    "weights under another name": (config(transformers_weights="x.bin"), "transformers_weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_one_error_that_names_it(
    name: str, tiny_clip: Path, tmp_path: Path
) -> None:
    damage, told = CHECKPOINTS[name]
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    damage(folder)
    began = time.process_time()
    for load in (load_vision_tower, lambda path: load_complete(CLIPModel, path)):
        with pytest.raises(ValueError, match=told):
            load(folder)
    assert time.process_time() - began < 6  # of two loads, imports included


@pytest.mark.parametrize(
    "changes",
    [{"architectures": 5}, {"architectures": {"a": 1}}, {"vision_config__num_attention_heads": 0}],
)
def test_convert_reads_a_config_with_the_same_care(
    changes: dict[str, Any], tiny_clip: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config(**changes)(folder)
    with pytest.raises(ModelError, match=r"config\.json: "):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_leaves_out_is_no_error(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """Parts of a whole, heads, tied heads and tables that older versions saved."""
    old = {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    weights(lambda w: w.update(old))(folder)
    load_complete(CLIPVisionModel, folder)
    load_complete(CLIPModel, folder)
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    rotary = "model.layers.1.self_attn.rotary_emb.inv_freq"
    weights(lambda w: w.update({rotary: torch.ones(4)}))(llm)
    TextEncoder.from_pretrained(llm)  # which has no head
    load_complete(AutoModelForCausalLM, llm)
    model = load_complete(AutoModelForCausalLM, llm)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    load_complete(AutoModelForCausalLM, tmp_path / "tied")


def test_leftovers_of_a_language_model_are_refused(tiny_llm: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    weights(lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3, 3)}))(llm)
    with pytest.raises(ValueError, match=r"model\.layers\.7"):
        load_complete(AutoModelForCausalLM, llm)
    with pytest.raises(ValueError, match=r"layers\.7"):
        TextEncoder.from_pretrained(llm)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_std": [0.0, 0.3, 0.3]},
        {"image_std": [-0.3, -0.3, -0.3]},
        {"image_std": [1e-30, 1e-30, 1e-30]},
        {"image_std": [float("nan")] * 3},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": [float("inf")] * 3},
        {"image_mean": [0.5]},
        {"image_mean": 1.5},
        {"image_mean": 0},
        {"image_std": True},
        {"resample": "bicubic"},
        {"resample": True},
        {"resample": 1.5},
        {"resample": 6},
        {"resample": []},
        {"do_rescale": False},
        {"rescale_factor": 0.0},
        {"rescale_factor": -1.0},
        {"rescale_factor": float("nan")},
        {"rescale_factor": 1e9},
        {"size": {"shortest_edge": 10**9}},
        {"size": {"shortest_edge": 0}, "do_center_crop": False},
        {"crop_size": {"height": 10**6, "width": 10**6}},
        {"size": [1, 2, 3]},
    ],
)
def test_an_image_processor_is_tried(
    changes: dict[str, Any], tiny_clip: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match="image processor"):
        read_image_processor(folder)
    with pytest.raises(ValueError, match="image processor"):
        load_vision_tower(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0" * 20, '{"model": 3}', "[" * 50_000])
def test_a_damaged_tokenizer_is_named(content: str, tiny_llm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    write(folder, "tokenizer.json", content)
    with pytest.raises(ValueError, match=r"llm: no tokenizer"):
        read_tokenizer(folder)


@pytest.mark.parametrize("value", [-1, 0, 1.5, "x"])
def test_a_tokenizer_needs_a_window(value: Any, tiny_llm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text())
    for allowed in (16, 1e30):
        file.write_text(json.dumps(written | {"model_max_length": allowed}))
        assert read_tokenizer(folder).model_max_length == allowed
    file.write_text(json.dumps(written | {"model_max_length": value}))
    with pytest.raises(ValueError, match=r"llm: (its|no) tokenizer"):
        read_tokenizer(folder)


def test_every_load_says_that_no_code_runs() -> None:
    """`from_pretrained` of transformers' classes stands in one module, always with `SAFE`."""
    strange = []
    ours = {"TextEncoder", "cls", "PeftModel", "nn.Embedding"}
    for folder in ("llm2clip_vlm", "stages", "eval"):
        for file in sorted((REPO_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr not in ("from_pretrained", "from_config"):
                    continue
                safe = any("SAFE" in ast.unparse(k.value) for k in node.keywords)
                refused = any(
                    k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"
                    for k in node.keywords
                )
                owner = ast.unparse(node.func.value)
                alone = node.func.attr == "from_config" and len(node.args) == 1
                if not (safe or refused or owner in ours or (alone and owner == "AutoModel")):
                    strange.append(f"{file.name}:{node.lineno}: {ast.unparse(node)[:80]}")
    known = ("loading.py", "convert.py")  # arguments in a mapping; `--trust-remote-code`
    assert [line for line in strange if not line.startswith(known)] == []
    assert len(strange) == 3, strange


CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass C: pass\n"


def test_no_file_of_a_checkpoint_runs_and_no_one_is_asked(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """`auto_map` in every file and `custom_generate`, on a terminal."""
    ran = tmp_path / "ran"
    names = ("config", "tokenizer_config", "preprocessor_config", "processor_config")
    autos = {
        "config": {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoModelForCausalLM": "evil.C"},
        "tokenizer_config": {"AutoTokenizer": ["evil.C", "evil.C"]},
        "preprocessor_config": {"AutoImageProcessor": "evil.C"},
        "processor_config": {"AutoProcessor": "evil.C"},
    }
    for source in (tiny_llm, tiny_clip):
        for name in names:
            folder = shutil.copytree(source, tmp_path / f"{source.name}-{name}")
            file = folder / f"{name}.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(found | {"auto_map": autos[name]}))
            write(folder, "evil.py", CODE.format(str(ran)))
            (folder / "custom_generate").mkdir()
            write(folder, "custom_generate/generate.py", CODE.format(str(ran)))
    program = """if True:
        import sys
        from pathlib import Path
        from transformers import AutoModel, AutoModelForCausalLM, CLIPModel
        from llm2clip_vlm.models.loading import *
        from llm2clip_vlm.models.vlm.building import load_checkpoint, load_vlm
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            for load in (
                read_config, read_tokenizer, read_processor, read_image_processor, load_vlm,
                load_checkpoint, *(
                    lambda path, kind=kind: load_complete(kind, path)
                    for kind in (AutoModel, AutoModelForCausalLM, CLIPModel)
                ),
            ):
                try:
                    load(str(folder))
                except ValueError as error:
                    assert "trust_remote_code=True" in str(error) or "[y/N]" not in str(error)
        print("DONE")
    """
    main, side = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=side, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False,
        cwd=REPO_ROOT, text=True,
    )  # fmt: skip
    os.close(main), os.close(side)
    assert done.stdout.rstrip().endswith("DONE"), done.stdout[-2000:]
    assert "[y/N]" not in done.stdout
    assert not ran.exists()


def test_local_files_open_no_socket(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Without the switches that forbid the hub: nothing asks for it."""
    program = """if True:
        import socket, sys
        def refuse(*given, **named): raise AssertionError(f"a socket: {given}")
        socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
        from llm2clip_vlm.evaluation.encoder.encoders import load_encoder
        from llm2clip_vlm.models.clip import load_clip
        from llm2clip_vlm.models.text.text_encoder import TextEncoder
        from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint, load_vlm, save_vlm
        clip, llm, out = sys.argv[1:]
        model, processor = build_vlm(clip, llm)
        save_vlm(model, processor, out)
        load_vlm(out), load_checkpoint(out), load_clip(clip), load_encoder(clip)
        TextEncoder.from_pretrained(llm).encode(["a red star"])
        print("DONE")
    """
    named = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_clip), str(tiny_llm), str(tmp_path / "vlm")],
        capture_output=True, text=True, cwd=REPO_ROOT, env=named, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.rstrip().endswith("DONE"), done.stderr[-3000:]
