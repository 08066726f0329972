"""What leaves opens with the tool it is for, and computes the same there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.certificate import Evidence, certify
from llm2clip_vlm.interop.command import main
from llm2clip_vlm.interop.convert import convert
from llm2clip_vlm.interop.export import FORMATS, export
from llm2clip_vlm.interop.libraries import (
    open_clip_config,
    open_clip_weights,
    timm_arguments,
    timm_weights,
)
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.vision.eva02 import Eva02VisionConfig, Eva02VisionModel
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from llm2clip_vlm.runs.hashes import fingerprint_dir
from tests.tiny_towers import build_tower

KINDS = ("clip", "siglip", "eva02")


def stage_2b(kind: str, folder: Path) -> Path:
    """What stage 2b leaves of a tiny tower."""
    source = load_vision_tower(build_tower(kind, folder / "tower"))
    torch.manual_seed(1)
    model = LLM2CLIPModel.from_vision_tower(source.model, text_embed_dim=8, projection_dim=6)
    model.save_pretrained(folder / "run" / "model")
    if kind == "clip":  # a crop that is a share of the picture, as timm's 0.9
        source.image_processor.size = {"shortest_edge": 36}
    source.image_processor.save_pretrained(folder / "run" / "model")
    return folder / "run"


def test_a_place_that_is_taken_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage_2b("clip", tmp_path)
    monkeypatch.setattr("llm2clip_vlm.interop.export._load", lambda _: pytest.fail("loaded"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ModelError, match="taken exists already"):
        export(run, "transformers", tmp_path / "taken")


def test_a_card_has_the_results_of_its_model_alone(tmp_path: Path) -> None:
    """A `results.json` beside a model is its own where a stage left both."""
    run = stage_2b("clip", tmp_path)
    found = {"retrieval": {"long": {"i2t": {"r1": 98.7}}}}
    (run / "results.json").write_text(json.dumps(found))
    export(run, "transformers", tmp_path / "foreign")
    assert "98.7" not in (tmp_path / "foreign/README.md").read_text()
    values = {"stage": "stage2b_vision_encoder", "schema": 1, "recipe": {}, "parents": {}}
    values["outputs"] = {"model": fingerprint_dir(run / "model")}
    (run / "manifest.json").write_text(json.dumps(values))
    export(run, "transformers", tmp_path / "own")
    assert "98.7" in (tmp_path / "own/README.md").read_text()


def check_certificate(folder: Path, returned: dict[str, Any]) -> None:
    written = json.loads((folder / "parity.json").read_text())
    assert written == returned
    assert written["checks"]
    for check in written["checks"].values():
        assert 0 <= check["max_difference"] <= 1e-5 * max(check["largest_value"], 1)
    assert {"torch", "transformers"} <= set(written["versions"])
    here = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert set(written["files"]) == here - {"parity.json", "README.md"}
    assert "## Parity" in (folder / "README.md").read_text()
    assert written["source"]
    assert str(folder.parent) not in json.dumps(written)


@pytest.mark.parametrize("what", ["model", "tower"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers(kind: str, what: str, tmp_path: Path) -> None:
    run = stage_2b(kind, tmp_path)
    source = run if what == "model" else tmp_path / "tower"
    check_certificate(tmp_path / "out", export(source, "transformers", tmp_path / "out"))
    pixels = torch.randn(2, 3, 32, 32)
    want = AutoModel.from_pretrained(run / "model").eval()
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    if what == "model":
        assert torch.equal(again.get_image_features(pixels), want.get_image_features(pixels))
        again = AutoModel.from_pretrained(tmp_path / "out" / "vision_tower").eval()
    assert torch.equal(again(pixels).pooler_output, want.vision_tower(pixels).pooler_output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["model", "tower"])
@torch.no_grad()
def test_open_clip(kind: str, what: str, tmp_path: Path, open_clip: Any) -> None:
    run = stage_2b(kind, tmp_path)
    source = run if what == "model" else tmp_path / "tower"
    certificate = export(source, "open_clip", tmp_path / "out")
    check_certificate(tmp_path / "out", certificate)
    # Opened and loaded strictly by open_clip; measured: at most 4.8e-7 of values up to 2.5.
    assert certificate["opened_with"] == f"open_clip {open_clip.__version__}"
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    if kind == "clip":
        visual = open_clip.model._build_vision_tower(**config)
        weights = load_file(tmp_path / "out" / "open_clip_model.safetensors")
        visual.load_state_dict({k.removeprefix("visual."): t for k, t in weights.items()})
        model = AutoModel.from_pretrained(source / "model" if what == "model" else source).eval()
        pixels = torch.randn(2, 3, 32, 32)
        want = model.get_image_features(pixels) if what == "model" else model(pixels).pooler_output
        got = visual.eval()(pixels)
        got = torch.nn.functional.normalize(got, dim=-1) if what == "model" else got
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_timm(kind: str, tmp_path: Path, timm: Any) -> None:
    run = stage_2b(kind, tmp_path)
    certificate = export(run, "timm", tmp_path / "out")
    check_certificate(tmp_path / "out", certificate)
    assert certificate["opened_with"] == f"timm {timm.__version__}"
    shown = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    tower = load_vision_tower(run / "model")
    short = tower.image_processor.size.get("shortest_edge")
    assert shown["crop_pct"] == (1.0 if short is None else 32 / short)
    # timm's own loader of a folder, strict, with nothing but what lies in it
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            again(pixels), tower.model(pixels).pooler_output, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("library", ["open_clip", "timm"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_our_own_reader_is_the_proof(
    kind: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open_clip", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    certificate = export(stage_2b(kind, tmp_path), library, tmp_path / "out")
    assert certificate["opened_with"] == f"`convert`: {library} cannot be imported"
    check_certificate(tmp_path / "out", certificate)


@pytest.mark.parametrize("library", ["open_clip", "timm"])
@pytest.mark.parametrize("said", [{"hidden_act": "relu"}, {"layer_norm_eps": 0.01}])
def test_without_the_library_what_its_config_cannot_say_is_noticed(
    said: dict[str, Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof was given the tower's own config: exact GELU for ReLU passed with 0.0."""
    for name in ("open_clip", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    file = build_tower("clip", tmp_path / "tower") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(ModelError, match="image_features opened with `convert`"):
        export(tmp_path / "tower", library, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViT-L-14-336-quickgelu", "clip"),
        ("EVA02-B-16", "eva02-b"),
        pytest.param("EVA02-L-14-336", "eva02", marks=pytest.mark.slow),
        pytest.param("ViT-SO400M-14-SigLIP2", "siglip", marks=pytest.mark.slow),
    ],
)
def test_published_sizes_have_the_names_and_shapes_of_the_libraries(
    name: str, config: str, open_clip: Any, timm: Any
) -> None:
    """On the meta device: every weight, no other, and the same shapes, for both libraries."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig, SiglipVisionModel

    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    base = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    with torch.device("meta"):
        tower: Any = {
            "clip": lambda: CLIPVisionModel(
                CLIPVisionConfig(**large, num_hidden_layers=24, patch_size=14, image_size=336)
            ),
            "siglip": lambda: SiglipVisionModel(
                SiglipVisionConfig(**so400m, num_hidden_layers=27, patch_size=14, hidden_act="gelu")
            ),
            "eva02": lambda: Eva02VisionModel(Eva02VisionConfig()),
            "eva02-b": lambda: Eva02VisionModel(
                Eva02VisionConfig(**base, num_hidden_layers=12, patch_size=16, image_size=224)
            ),
        }[config]()
        published = open_clip.get_model_config(name)
        head = torch.nn.Linear(tower.config.hidden_size, published["embed_dim"], bias=False)
        ours = open_clip_weights(tower, None if config == "siglip" else head)
        made = open_clip_config(tower.config, None if config == "siglip" else head)
        theirs = open_clip.model._build_vision_tower(
            published["embed_dim"], published["vision_cfg"], published.get("quick_gelu", False)
        )
        again = open_clip.model._build_vision_tower(**made)
        architecture, values = timm_arguments(tower.config)
        alone = timm.create_model(architecture, num_classes=0, **values)
        plain = timm.create_model(architecture, num_classes=0)
    shapes = {key: tuple(t.shape) for key, t in theirs.state_dict().items()}
    assert {key: tuple(t.shape) for key, t in ours.items()} == shapes
    assert {key: tuple(t.shape) for key, t in again.state_dict().items()} == shapes
    shapes = {key: tuple(t.shape) for key, t in plain.state_dict().items()}
    assert {key: tuple(t.shape) for key, t in timm_weights(tower).items()} == shapes
    assert {key: tuple(t.shape) for key, t in alone.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("width", "patch", "side"), [(768, 16, 336), (768, 14, 224), (1024, 14, 448)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_without_a_name_of_its_own_gets_one_that_timm_knows(
    kind: str, width: int, patch: int, side: int, timm: Any
) -> None:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    kinds = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "eva02": Eva02VisionConfig}
    config = kinds[kind](
        hidden_size=width,
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=side,
        num_hidden_layers=1,
    )
    name, values = timm_arguments(config)
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **values)
    assert model.patch_embed.img_size == (side, side) and model.embed_dim == width


def test_open_clip_is_not_given_heads_that_it_would_not_build() -> None:
    """A tower of timm's name has 12 heads there: with 8 its features were 9 % off."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "patch_size": 16, "hidden_act": "gelu"}
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, num_attention_heads=8))
        published = SiglipVisionModel(SiglipVisionConfig(**sizes, num_attention_heads=12))
        eva = Eva02VisionModel(Eva02VisionConfig(num_hidden_layers=1, rope_grid=24))
    with pytest.raises(ModelError, match="expected 12 heads and a rope_grid of 16, got 8 and 16"):
        open_clip_config(tower.config, None)
    with pytest.raises(ModelError, match="got 16 and 24"):
        open_clip_config(eva.config, None)
    assert open_clip_config(published.config, None)["embed_dim"] == 768


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_the_config_says_how_images_are_made_ready(kind: str, library: str, tmp_path: Path) -> None:
    folder = build_tower(kind, tmp_path / "tower")
    export(folder, library, tmp_path / "out")
    file = "open_clip_config.json" if library == "open_clip" else "config.json"
    config = json.loads((tmp_path / "out" / file).read_text())
    shown = config["preprocess_cfg"] if library == "open_clip" else config["pretrained_cfg"]
    mode = shown["resize_mode"] if library == "open_clip" else shown["crop_mode"]
    assert (mode == "squash") == (kind == "siglip")
    convert(tmp_path / "out", tmp_path / "back")
    want, got = (load_vision_tower(place) for place in (folder, tmp_path / "back"))
    photo = Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy())
    before, after = (
        tower.image_processor(photo, return_tensors="pt")["pixel_values"] for tower in (want, got)
    )
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_a_crop_is_kept_or_named_as_lost(library: str, tmp_path: Path) -> None:
    folder = build_tower("clip", tmp_path / "tower")
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"size": {"shortest_edge": 37}}
    file.write_text(json.dumps(values))
    certificate = export(folder, library, tmp_path / "out")
    if library == "open_clip":
        assert "cropped from 37 px" in certificate["lost"]
    else:
        convert(tmp_path / "out", tmp_path / "back")
        back = load_vision_tower(tmp_path / "back").image_processor
        assert back.size["shortest_edge"] == 37
    file.write_text(json.dumps(values | {"do_normalize": False}))
    with pytest.raises(ModelError, match=r"divides by 255 and then normalises.*do_normalize False"):
        export(folder, library, tmp_path / "again")


def test_llava_takes_a_clip_tower_as_a_folder(tmp_path: Path) -> None:
    run = stage_2b("clip", tmp_path)
    check_certificate(tmp_path / "out", export(run, "llava", tmp_path / "out"))
    _, info = CLIPVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in names)  # as older transformers read


@pytest.mark.parametrize("kind", ["siglip", "eva02"])
def test_llava_would_make_another_tower_random(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="makes every tower a CLIPVisionModel"):
        export(stage_2b(kind, tmp_path), "llava", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_without_names_there_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    folder = build_tower("dinov2", tmp_path / "dino")
    with pytest.raises(ModelError, match="'dinov2' has no names in open_clip and timm"):
        export(folder, "timm", tmp_path / "out")
    export(folder, "transformers", tmp_path / "hf")
    with pytest.raises(ModelError, match="expected one of transformers, llava"):
        export(folder, "gguf", tmp_path / "out")
    with pytest.raises(ModelError, match=r"no config\.json"):
        export(tmp_path, "timm", tmp_path / "out")


def test_an_export_takes_the_place_of_an_earlier_one_that_nobody_has_changed(
    tmp_path: Path,
) -> None:
    """As a pipeline asks that is run again with other weights."""
    out, before = tmp_path / "out", build_tower("dinov2", tmp_path / "before", seed=0)
    after = build_tower("dinov2", tmp_path / "after", seed=1)
    export(before, "transformers", out)
    with pytest.raises(ModelError, match="exists already; name a new folder, or give `--replace`"):
        export(after, "transformers", out)
    again = export(after, "transformers", out, renew=True)
    check_certificate(out, again)
    mine = out / "mine.txt"
    for write in (
        lambda: mine.write_text("m"),
        lambda: (mine.unlink(), (out / "README.md").open("a").write("mine")),
    ):
        write()
        with pytest.raises(ModelError, match="with other files than an export has left"):
            export(before, "transformers", out, renew=True)
    assert (out / "README.md").read_text().endswith("mine")


def test_an_export_that_computes_something_else_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip_vlm.interop import libraries

    monkeypatch.setattr(
        libraries, "timm_weights", lambda t: {k: v * 1.001 for k, v in timm_weights(t).items()}
    )
    with pytest.raises(ValueError, match="differ by"):
        export(stage_2b("clip", tmp_path), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("expected", "got"), [(math.inf, 0.0), (0.0, math.inf), (math.nan, 0.0)])
def test_a_value_that_is_not_finite_is_no_parity(
    expected: float, got: float, tmp_path: Path
) -> None:
    values = [{"logits": torch.tensor([1.0, value])} for value in (expected, got)]
    with pytest.raises(ModelError, match="logits opened with a test differ by"):
        certify(tmp_path, "export", tmp_path, Evidence("a test", *values))


@pytest.mark.slow
@torch.no_grad()
def test_round_trip_through_every_layout_is_bit_equal(tmp_path: Path) -> None:
    for kind in KINDS:
        run = stage_2b(kind, tmp_path / kind)
        want = load_vision_tower(run / "model").model.state_dict()
        for to in ("open_clip", "timm", "transformers"):
            source = run if to == "timm" else run / "model"
            source = tmp_path / kind / "tower" if to == "transformers" else source
            export(source, to, tmp_path / kind / to)
            convert(tmp_path / kind / to, tmp_path / kind / f"{to} back")
            place = tmp_path / kind / f"{to} back"
            got = load_vision_tower(place).model.state_dict()
            assert set(got) == set(want)
            assert all(torch.equal(got[name], want[name]) for name in want), (kind, to)


SAME = """
import sys, torch
from sentence_transformers import SentenceTransformer
texts = ["a red dog .", "two blue circles on the left"]
model = SentenceTransformer(sys.argv[1], device="cpu")
assert "llm2clip_vlm" not in sys.modules
torch.save(model.encode(texts, convert_to_tensor=True), sys.argv[2])
"""


@pytest.mark.slow
def test_sentence_transformers_in_a_fresh_process(tmp_path: Path, tiny_llm: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from llm2clip_vlm.models.text.text_encoder import TextEncoder

    encoder = TextEncoder.from_pretrained(tiny_llm, pooling="mean", chat=True)
    encoder.save_pretrained(tmp_path / "run" / "text_encoder")
    certificate = export(tmp_path / "run", "sentence-transformers", tmp_path / "out")
    check_certificate(tmp_path / "out", certificate)
    command = [sys.executable, "-c", SAME, str(tmp_path / "out"), str(tmp_path / "e.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    want = encoder.encode(["a red dog .", "two blue circles on the left"])
    got = torch.load(tmp_path / "e.pt", weights_only=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # measured: 0
    with pytest.raises(ModelError, match="this is a text encoder"):
        export(tmp_path / "run", "timm", tmp_path / "no")


def test_a_vlm_is_rounded_and_the_certificate_says_by_how_much(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm, processor = build_vlm(str(tiny_clip), str(tiny_llm), vision_feature_layer=-2)
    save_vlm(vlm, processor, tmp_path / "vlm")
    out = tmp_path / "out"
    words = [str(tmp_path / "vlm"), "--to", "transformers", "--dtype", "bfloat16", str(out)]
    assert main("export", words) == 0
    assert "rounded to bfloat16: logits move by up to" in capsys.readouterr().out
    found = json.loads((out / "parity.json").read_text())
    check_certificate(out, found)
    assert 0 < found["rounding"]["max_difference"] < 0.1 * found["rounding"]["largest_value"]
    kinds = {
        t.dtype for t in load_file(out / "model.safetensors").values() if t.is_floating_point()
    }
    assert kinds == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ModelError, match="only a VLM is rounded, this is a tower"):
        export(tiny_clip, "transformers", tmp_path / "other", "bfloat16")


def test_the_command_knows_every_format() -> None:
    from llm2clip_vlm.interop.command import FORMATS as NAMES

    assert tuple(FORMATS) == NAMES
