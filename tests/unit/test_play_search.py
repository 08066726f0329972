"""`llm2clip-vlm search`: a folder of photographs, indexed once, found again by words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm2clip_vlm import cli
from llm2clip_vlm.data.image_text.index import ImageTextRecord
from llm2clip_vlm.data.reading.images import open_image
from llm2clip_vlm.evaluation.encoder.encoders import Encoder, load_encoder
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.play.photo_index import cache_folder, find_photos, index_photos, load_dual_encoder
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.hashes import HandoffError
from tests.tiny import build_clip, write_image
from tests.tiny_towers import build_tower


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed, name in enumerate(["a.png", "b.PNG", "2026/c.png", "2026/d.jpg"]):
        write_image(folder / name, seed, size_px=40)
    write_image(folder / ".hidden" / "e.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "bad.jpg").write_bytes(b"no picture")
    write_image(folder / "f.png", 7, size_px=4)
    return folder


@pytest.fixture(scope="module")
def encoder(tiny_clip: Path) -> Encoder:
    return load_dual_encoder(str(tiny_clip), device="cpu")


def index(photos: Path, encoder: Encoder) -> Any:
    return index_photos(photos, encoder)


def test_vectors_are_those_of_the_evaluation_and_bad_pictures_are_named(
    photos: Path, encoder: Encoder, tiny_clip: Path
) -> None:
    found = index(photos, encoder)
    assert found.names == ["a.png", "b.PNG", "2026/c.png", "2026/d.jpg"]
    assert list(find_photos(photos)) == ["a.png", "b.PNG", "bad.jpg", "f.png", *found.names[2:]]
    assert set(found.bad) == {"bad.jpg", "f.png"} and found.num_new == 6
    assert "does not decode" in found.bad["bad.jpg"] and "at least 8 px" in found.bad["f.png"]
    records = [ImageTextRecord(name, name, {}, photos) for name in found.names]
    want, _ = load_encoder(str(tiny_clip)).embed_images(records)
    torch.testing.assert_close(found.vectors, want, atol=1e-6, rtol=0)
    words = encoder.embed_texts(["a red dog"])[0]
    scores = [score for score, _ in found.best(words, 3)]
    assert scores == sorted((want @ words).tolist(), reverse=True)[:3]
    assert {path for _, path in found.best(words, 9)} == {photos / name for name in found.names}


def test_only_what_is_new_is_embedded(photos: Path, encoder: Encoder) -> None:
    first = index(photos, encoder)
    assert index(photos, encoder).num_new == 0
    write_image(photos / "a.png", 11, size_px=40)
    write_image(photos / "new.png", 12, size_px=40)
    (photos / "2026/d.jpg").unlink()
    second = index(photos, encoder)
    assert second.num_new == 2
    assert second.names == ["a.png", "b.PNG", "new.png", "2026/c.png"]
    assert torch.equal(second.vectors[[1, 3]], first.vectors[[1, 2]])
    assert not torch.equal(second.vectors[0], first.vectors[0])
    write_image(photos / "bad.jpg", 13, size_px=40)
    assert "bad.jpg" in index(photos, encoder).names
    (photos / "a.png").unlink()
    assert index(photos, encoder).names == ["b.PNG", "bad.jpg", "new.png", "2026/c.png"]


def test_an_interrupted_index_goes_on(
    photos: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, calls = Encoder.embed_pixels, []

    def interrupted(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return embed(self, pixels)

    small = Encoder(encoder.tower, encoder.project, encoder.fingerprints, 2, encoder.texts)
    monkeypatch.setattr(Encoder, "embed_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index(photos, small)
    monkeypatch.setattr(Encoder, "embed_pixels", embed)
    assert index(photos, small).num_new == 2


def test_every_encoder_has_an_index_of_its_own(
    photos: Path, encoder: Encoder, tmp_path: Path, cache: Path
) -> None:
    index(photos, encoder)
    other = load_dual_encoder(str(build_clip(tmp_path / "other", seed=1)))
    found = index(photos, other)
    assert found.num_new == 6 and len(list(cache.glob("*"))) == 2
    assert index(photos, encoder).num_new == 0


@pytest.mark.parametrize("harm", ["other vectors", "fewer vectors", "cut off", "no list"])
def test_an_index_that_is_wrong_is_made_again(
    photos: Path, encoder: Encoder, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    want = index(photos, encoder)
    (file,) = cache.glob("*")
    with safe_open(file, "pt") as opened:
        vectors, metadata = opened.get_tensor("vectors"), opened.metadata()
    if harm == "other vectors":  # such as of another version of the encoder
        save_file({"vectors": vectors.roll(1, dims=1)}, file, metadata)
    elif harm == "fewer vectors":
        save_file({"vectors": vectors[:-1]}, file, metadata)
    elif harm == "no list":
        save_file({"vectors": vectors}, file, {"photos": "3"})
    else:
        file.write_bytes(file.read_bytes()[:-9])
    again = index(photos, encoder)
    assert again.num_new == 6 and torch.equal(again.vectors, want.vectors)
    assert "again" in caplog.text
    assert index(photos, encoder).num_new == 0


@pytest.fixture
def stage2b(tiny_clip: Path, tiny_llm: Path, tmp_path: Path) -> Path:
    """A stage's output: a model, and manifests that lead to its text encoder."""
    folder, tower = tmp_path / "stage2b", load_vision_tower(tiny_clip)
    torch.manual_seed(0)
    LLM2CLIPModel.from_vision_tower(
        tower.model, text_embed_dim=32, projection_dim=24
    ).save_pretrained(folder / "model")
    tower.image_processor.save_pretrained(folder / "model")
    shutil.copytree(tiny_llm, tmp_path / "text_encoder")
    for name, recipe in (
        ("stage2b", {"embedding_cache": str(tmp_path / "stage2a")}),
        ("stage2a", {"text_encoder": str(tmp_path / "text_encoder")}),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        stage = {"stage2b": "stage2b_vision_encoder", "stage2a": "stage2a_cache_text"}[name]
        manifest = {"schema": 1, "stage": stage, "recipe": recipe, "fingerprints": {}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_stage_2b_model_finds_its_text_encoder(stage2b: Path, tmp_path: Path) -> None:
    texts = ["a red dog", "two circles"]
    text_encoder = str(tmp_path / "text_encoder")
    want = load_encoder(str(stage2b / "model"), text_encoder).embed_texts(texts)
    for place in (stage2b, stage2b / "model"):
        torch.testing.assert_close(load_dual_encoder(str(place)).embed_texts(texts), want)
    section = {"language_model": text_encoder, "pooling": "last"}
    manifest = json.loads((tmp_path / "stage2a/manifest.json").read_text())
    manifest["recipe"]["text_encoder"] = section
    (tmp_path / "stage2a/manifest.json").write_text(json.dumps(manifest))
    other = load_dual_encoder(str(stage2b)).embed_texts(texts)
    assert (other - want).abs().max() > 1e-3
    given = load_dual_encoder(str(stage2b), text_encoder).embed_texts(texts)
    torch.testing.assert_close(given, want)
    (stage2b / "text_encoder").symlink_to(text_encoder)
    manifest = json.loads((stage2b / "manifest.json").read_text())
    manifest["recipe"]["text_in_loop"] = {"text_encoder": "gone"}
    manifest["fingerprints"] = {"text_encoder.pooling": "last"}
    (stage2b / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HandoffError, match="trained against last"):
        load_dual_encoder(str(stage2b))
    manifest["fingerprints"] = {}
    (stage2b / "manifest.json").write_text(json.dumps(manifest))
    torch.testing.assert_close(load_dual_encoder(str(stage2b)).embed_texts(texts), want)


def test_a_trained_text_encoder_keeps_its_settings(
    stage2b: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """A recipe that gives its dtype alone must not, once it is written out, give defaults too."""
    trained = tmp_path / "trained"
    TextEncoder.from_pretrained(tiny_llm, bidirectional=False).save_pretrained(trained)
    section = TextEncoderSection(language_model=str(trained), dtype="float32")
    assert section.model_dump() == {"language_model": str(trained), "dtype": "float32"}
    file = tmp_path / "stage2a/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["recipe"]["text_encoder"] = section.model_dump()
    file.write_text(json.dumps(manifest))
    want = load_encoder(str(stage2b / "model"), str(trained)).embed_texts(["a red dog"])
    torch.testing.assert_close(load_dual_encoder(str(stage2b)).embed_texts(["a red dog"]), want)


def test_paths_of_a_run_are_found_from_any_folder(
    stage2b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes name what lies below the folder in which they are run."""
    want = load_dual_encoder(str(stage2b)).embed_texts(["a red dog"])
    for name in ("stage2b", "stage2a"):
        file = tmp_path / name / "manifest.json"
        text = file.read_text().replace(f"{tmp_path}/", "")
        manifest = json.loads(text)
        manifest["recipe"]["output_dir"] = name
        file.write_text(json.dumps(manifest))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in (stage2b, Path("../stage2b")):
        got = load_dual_encoder(str(place)).embed_texts(["a red dog"])
        torch.testing.assert_close(got, want)
    shutil.rmtree(tmp_path / "stage2a")
    with pytest.raises(ValueError, match=r"its embedding cache.* was stage2a, which is not there"):
        load_dual_encoder(str(stage2b))


def test_a_text_encoder_that_is_gone_is_named(stage2b: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=r"text encoder was .*give --text-encoder DIR"):
        load_dual_encoder(str(stage2b))
    (stage2b / "manifest.json").unlink()
    with pytest.raises(ValueError, match="a vision tower without text side"):
        load_dual_encoder(str(stage2b))
    with pytest.raises(ValueError, match=r"without text side|expected a CLIP"):
        load_dual_encoder(str(build_tower("dinov2", tmp_path / "dino")))


def test_the_command_prints_the_best_and_opens_nothing_unasked(
    photos: Path,
    tiny_clip: Path,
    encoder: Encoder,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    words = ["search", str(tiny_clip), str(photos), "-n", "2", "a", "red dog"]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    best = index(photos, encoder).best(encoder.embed_texts(["a red dog"])[0], 2)
    assert out == "".join(f"{score:.3f}  {path}\n" for score, path in best)
    assert "4 photographs, 6 pictures new; 2 cannot be used" in err and "bad.jpg" in err
    assert opened == []
    assert cli.main([*words, "--open"]) == 0
    assert "4 photographs, 0 pictures new" in capfd.readouterr().err
    assert opened == [best[0][1].as_uri()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{clip}", "{photos}/none", "x"], "no such folder"),
        (["{clip}", "{photos}/empty", "x"], "no picture that can be used: expected one of .jpg"),
        (["{photos}/none", "{photos}", "x"], "no such folder"),
    ],
)
def test_what_can_be_mended_is_one_error(
    photos: Path, tiny_clip: Path, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    (photos / "empty").mkdir()
    given = [word.format(clip=tiny_clip, photos=photos) for word in words]
    assert cli.main(["search", *given]) == 2
    out, err = capfd.readouterr()
    assert out == "" and told in err and "Traceback" not in err


def test_a_link_out_of_the_folder_is_not_followed(
    photos: Path, encoder: Encoder, tmp_path: Path
) -> None:
    write_image(tmp_path / "secret.png", size_px=40)
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    (photos / "out").symlink_to(tmp_path, target_is_directory=True)
    found = index(photos, encoder)
    assert "leads out of" in found.bad["link.png"] and len(found.names) == 4
    assert open_image(photos, "a.png").size == (40, 40)
