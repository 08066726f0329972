"""Model cards: what they say, and that the lines of use in them run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import TextEncoder
from llm2clip_vlm.models.vision.towers import load_vision_tower
from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.card import CARD_NAME, add_scores, is_unchanged, kind_of, write_card
from llm2clip_vlm.training.export import export_vision_tower
from tests.tiny import write_image


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llm: Path
) -> dict[str, Path]:
    """A directory of each kind, as the stages write them."""
    root = tmp_path_factory.mktemp("models")
    settings = TextEncoderSection(language_model=str(tiny_llm), max_length_tokens=64)
    encoder = TextEncoder.from_section(settings, "cpu")
    encoder.save_pretrained(root / "text_encoder")
    tower = load_vision_tower(str(tiny_clip))
    pair = LLM2CLIPModel.from_vision_tower(
        tower.model, text_embed_dim=encoder.hidden_size, projection_dim=16
    )
    pair.save_pretrained(root / "pair")
    tower.image_processor.save_pretrained(root / "pair")
    export_vision_tower(pair, tower.image_processor, root / "tower")
    shutil.copytree(tiny_clip, root / "clip")
    vlm, processor = build_vlm(str(tiny_clip), str(tiny_llm), vision_feature_layer=-2)
    save_vlm(vlm, processor, root / "vlm")
    return {
        "text encoder": root / "text_encoder",
        "llm2clip": root / "pair",
        "tower": root / "tower",
        "clip": root / "clip",
        "llava": root / "vlm",
    }


@pytest.mark.parametrize("kind", ["text encoder", "llm2clip", "tower", "clip", "llava"])
def test_the_lines_of_use_run(
    models: dict[str, Path],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = models[kind]
    assert kind_of(folder) == kind
    assert write_card(folder, "train x", parents={"clip": "openai/clip"}, versions={"torch": "9"})
    card = ModelCard.load(folder / CARD_NAME)
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    name = card.data.model_name
    (tmp_path / name).symlink_to(folder)
    (tmp_path / "TEXT_ENCODER").symlink_to(models["text encoder"])
    write_image(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert card.data.base_model == ["openai/clip"]
    assert "torch 9" in card.text


def test_a_card_says_what_was_measured_and_hides_where_it_was_made(tmp_path: Path) -> None:
    parent = tmp_path / "somebody" / "parents" / "llm"
    parent.mkdir(parents=True)
    (parent / CARD_NAME).write_text("---\nlicense: apache-2.0\nbase_model: org/llm\n---\ntext\n")
    folder = tmp_path / "run" / "vision_tower"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "image_size": 32}))
    made = write_card(
        folder,
        "train stage2b_vision_encoder",
        parents={"language_model": str(parent)},
        versions={},
        recipe={"train": [{"path": str(tmp_path / "data" / "a.jsonl")}], "seed": 0, "notes": ""},
        results={"retrieval": {"long": {"i2t": {"r1": 12.34, "r5": 40.0, "images": 10}}}},
        parity={
            "opened_with": "timm",
            "checks": {"logits": {"max_difference": 1e-7, "largest_value": 2.0}},
        },
    )
    assert made is not None
    text = made.read_text()
    assert str(tmp_path) not in text
    assert "parents/llm" in text
    assert "data/a.jsonl" in text
    assert "| retrieval long i2t r1 | 12.3 |" in text
    assert "opened with timm, largest difference 1e-07" in text
    data = ModelCard.load(made).data
    assert (data.license, data.base_model) == ("apache-2.0", ["org/llm"])
    assert [row.metric_value for row in data.eval_results] == [12.34, 40.0]
    made.write_bytes(
        "---\n{}\n---\nsomebody's own words, as é stands in Latin-1\n".encode("latin-1")
    )
    assert write_card(folder, "train x", parents={}, versions={}) is None
    assert b"own words" in made.read_bytes()


def test_what_somebody_wrote_into_a_card_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "image_size": 32}))
    for made in ("train x", "train y"):
        card = write_card(tmp_path, made, parents={}, versions={})
        assert card is not None and f"made by {made}" in card.read_text()
    card.write_text(card.read_text().replace("## Use", "Not for aeroplanes.\n\n## Use"))
    assert write_card(tmp_path, "train z", parents={}, versions={}) is None
    assert "Not for aeroplanes." in card.read_text() and "it stays; delete it" in caplog.text
    card.unlink()
    assert write_card(tmp_path, "train z", parents={}, versions={})


def test_what_is_measured_later_goes_into_the_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    add_scores(tmp_path, {"DAQUAR": ("accuracy", 20.0)})  # no card, nothing to do
    card = write_card(tmp_path, "train x", parents={"a": "us/b"}, versions={"torch": "9"})
    assert card is not None and "None is recorded" in card.read_text()
    written = card.stat().st_mtime_ns
    add_scores(tmp_path, {})  # such as a suite of the first questions alone
    assert card.stat().st_mtime_ns == written
    for scores in ({"DAQUAR": 20.0, "POPE": 81.25}, {"DAQUAR": 22.5}):
        add_scores(tmp_path, {title: ("exact_match", score) for title, score in scores.items()})
        assert is_unchanged(card)
    text, data = card.read_text(), ModelCard.load(card).data
    assert "| DAQUAR | 22.5 |\n| POPE | 81.2 |\n\n## Not tested" in text
    assert "None is recorded" not in text and "torch 9" in text and text.count("## ") == 5
    assert [row.metric_value for row in data.eval_results] == [22.5, 81.25]
    assert {row.metric_type for row in data.eval_results} == {"exact_match"}
    assert data.base_model == ["us/b"]
    card.write_text(f"{text} mine")
    add_scores(tmp_path, {"DAQUAR": ("exact_match", 1.0)})
    assert card.read_text() == f"{text} mine"
