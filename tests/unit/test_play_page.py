"""What `llm2clip-vlm app` shows, and how it is served, without a browser."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip_vlm import cli
from llm2clip_vlm.evaluation.encoder.segmentation import patch_embeds
from llm2clip_vlm.play import page
from llm2clip_vlm.play.finished import finished_runs
from llm2clip_vlm.play.photo_index import load_dual_encoder
from llm2clip_vlm.play.shelf import Chat, Shelf
from llm2clip_vlm.play.similarity import SHOWN_PX, _seen, similarity_maps
from tests.play_fixtures import write_finished, write_stage
from tests.tiny import write_image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    return write_finished(tmp_path_factory.mktemp("page"), tiny_llm)


@pytest.fixture
def shelf(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Shelf(str(run), votes=str(tmp_path / "votes.jsonl"), device="cpu")


def test_finished_runs_are_found_by_their_manifests(tmp_path: Path) -> None:
    for age, (name, stage) in enumerate([("new", "stage4_instruction"), ("a/b", "clip_baseline")]):
        folder = write_stage(tmp_path / name, stage, evaluation=[{"path": "data/x.jsonl"}])
        os.utime(folder / "manifest.json", (1000 - age, 1000 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with (tmp_path / "new" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": null}\n')  # it was NaN
    (tmp_path / "a/b/metrics.jsonl").write_text("damaged\n{}\n")
    new, old = finished_runs(tmp_path)
    assert (new.name, new.stage, new.seconds) == ("new", "stage4_instruction", 90.0)
    assert (old.name, old.photos) == ("a/b", "data")
    assert new.losses == [(step, 4.0 / step) for step in range(1, 6)] and old.losses == []


def test_a_shelf_holds_models_and_photographs_of_a_run_and_named_ones(
    run: Path, shelf: Shelf, tmp_path: Path
) -> None:
    assert sorted(shelf.vlms) == ["vlm/mine", "vlm/rival"]
    assert sorted(shelf.encoders) == ["towers/mine", "towers/rival"]
    assert shelf.photos == [str(run.parent / "photos")]
    more = Shelf(str(run), ["my/vlm"], ["my/clip"], [str(tmp_path)])
    assert more.vlms["my/vlm"] == "my/vlm" and len(more.encoders) == 3
    assert more.photos == [str(tmp_path)] and more.votes == run / "votes.jsonl"
    assert shelf.index("towers/mine", shelf.photos[0]).num_new == 8
    assert shelf.encoder("towers/mine") is shelf.encoder("towers/mine")


def test_votes_are_kept_and_told_with_their_exact_interval(shelf: Shelf) -> None:
    assert shelf.tally(["b", "a"]) == "no decided vote yet, 0 tied"
    for vote in ("left", "left", "left", "right", "tie"):
        shelf.vote(["b", "a"], vote)
    shelf.vote(["a", "b"], "right")
    shelf.vote(["a", "other"], "left")
    told = shelf.tally(["a", "b"])  # Clopper-Pearson of 1 in 5
    assert told == (
        "**a** preferred to **b** in 1 of 5 decided votes: 20 % [1, 72] (exact 95 % interval), "
        "1 tied"
    )
    kept = json.loads(shelf.votes.read_text().splitlines()[0])
    assert (kept["left"], kept["right"], kept["vote"]) == ("b", "a", "left")


def test_a_model_trained_anew_begins_without_votes(shelf: Shelf, tmp_path: Path) -> None:
    shelf.vlms = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    for folder in shelf.vlms.values():
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
    shelf.vote(["a", "b"], "left")
    assert "**a** preferred to **b** in 1 of 1" in shelf.tally(["b", "a"])
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert shelf.tally(["a", "b"]) == "no decided vote yet, 0 tied"


def test_a_vote_is_for_the_weights_that_answered(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not for those of a training that has ended since."""
    monkeypatch.setattr(Chat, "load", lambda *_, **__: object())
    shelf.vlms = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    for name, folder in shelf.vlms.items():
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
        shelf.chat(name)
    (tmp_path / "b" / "config.json").write_text("{ }")
    shelf.vote(["a", "b"], "left")
    again = Shelf(str(shelf.run), votes=str(shelf.votes), device="cpu")
    again.vlms = shelf.vlms
    assert again.tally(["a", "b"]) == "no decided vote yet, 0 tied"


def test_photographs_of_a_running_page_are_those_that_are_there(run: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(run.parent / "photos", tmp_path / "photos"))
    shelf = Shelf(str(run), photos=[str(photos)], device="cpu")
    before = shelf.index("towers/mine", str(photos))
    write_image(photos / "new.png", 77, size_px=64)
    (photos / "0.png").unlink()
    found = shelf.index("towers/mine", str(photos))
    assert {*found.names} == {*before.names} - {"0.png"} | {"new.png"} and found.num_new == 1


def test_names_are_shuffled_and_told_with_the_vote(shelf: Shelf, run: Path) -> None:
    picture = str(run.parent / "photos" / "0.png")
    names = ["vlm/mine", "vlm/rival"]
    orders = {tuple(page._Talk(shelf, picture, names).names) for _ in range(40)}
    assert len(orders) == 2
    talk = page._Talk(shelf, picture, names)
    assert talk.goes_on(picture, names[::-1]) and not talk.goes_on(picture, names[:1])
    assert not talk.goes_on(None, names)
    said = [list(chat.ask("what ?", {"max_new_tokens": 3}))[-1] for chat in talk.chats]
    left, right = talk.shown()
    assert left == [
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": said[0]},
    ]
    assert right[1]["content"] == said[1]
    told = talk.vote(shelf, "right")
    assert told.startswith(f"left: **{talk.names[0]}**, right: **{talk.names[1]}**.")
    kept = json.loads(shelf.votes.read_text())
    assert kept["vote"] == "right" and kept["turns"][1] == [["what ?", said[1]]]
    assert page._Talk(shelf, None, names[:1]).shown() == [[], []]


def test_both_models_of_a_talk_have_the_same_questions(shelf: Shelf) -> None:
    """Also after one that did not fit the second model's window."""
    talk = page._Talk(shelf, None, ["vlm/mine", "vlm/rival"])
    options = {"max_new_tokens": 3}
    talk.chats[1].generator.window = 20
    with pytest.raises(ValueError, match="fewer than the model's window of 20"):
        list(talk.ask("dog " * 30, options))
    talk.chats[1].generator.window = 1000
    assert [side for side, _ in talk.ask("a dog", options)][-1] == 1
    assert [[asked for asked, _ in chat.turns] for chat in talk.chats] == [["a dog"]] * 2


def test_the_box_is_emptied_once_so_that_what_is_typed_meanwhile_stays(shelf: Shelf) -> None:
    gradio = pytest.importorskip("gradio", reason="needs gradio (extra `app`)")
    with gradio.Blocks() as built:
        page._chat_tab(gradio, shelf)
    (ask,) = (f.fn for f in built.fns.values() if getattr(f.fn, "__name__", "") == "ask")
    steps = list(ask(None, None, "vlm/mine", "vlm/rival", "what ?", 0.0, 4))
    boxes = [step[3] for step in steps]
    assert len(boxes) > 2 and boxes[0] == "" and "" not in boxes[1:]
    assert boxes[1:] == [gradio.skip()] * len(boxes[1:])


def test_maps_are_the_cosines_of_patches(run: Path) -> None:
    encoder = load_dual_encoder(str(run / "towers" / "mine"), device="cpu")
    picture = Image.open(run.parent / "photos" / "1.png").convert("RGB").resize((60, 40))
    texts = ["dog", "a red circle"]
    maps = similarity_maps(encoder, picture, texts)
    patches = patch_embeds(encoder, encoder.pixels(picture), last_values=True)[0]
    cosines = patches @ encoder.embed_texts(texts).T
    whole = encoder.embed_pixels(encoder.pixels(picture)) @ encoder.embed_texts(texts).T
    for row, (image, told) in enumerate(maps):
        assert image.size == (SHOWN_PX, SHOWN_PX)
        best = float(cosines[..., row].max())
        assert told == f"{texts[row]} {float(whole[0, row]):.2f} / {best:.2f}"
    place = int(torch.stack([cosines[..., 0], cosines[..., 1]]).flatten().argmax())
    which, at = divmod(place, cosines.shape[0] ** 2)
    y, x = divmod(at, cosines.shape[0])
    step = SHOWN_PX // cosines.shape[0]
    heat = np.asarray(maps[which][0].convert("L"), np.float32)
    patch = heat[y * step : (y + 1) * step, x * step : (x + 1) * step]
    assert patch.mean() > heat.mean() + 20  # the best of all patches is the brightest


def test_without_the_demo_or_gradio_the_command_says_what_makes_them(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--vlm", "runs/none/model"], ["--encoder", "./x"], ["--photos", "nowhere"]):
        assert cli.main(["app", *words]) == 2
        assert f"{words[1]}: no such" in capfd.readouterr().err
    assert cli.main(["app"]) == 2
    assert (
        "runs/demo: no finished stage with a model; `make demo` makes it" in capfd.readouterr().err
    )
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert cli.main(["app", str(run)]) == 2
    assert "pip install 'llm2clip-vlm[app]'" in capfd.readouterr().err


def test_the_page_is_for_this_machine_alone(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gradio = pytest.importorskip("gradio", reason="needs the extra `app` (gradio)")
    seen: dict[str, Any] = {}

    def launch(self: Any, **options: Any) -> Any:
        seen.update(options, analytics=self.analytics_enabled, kept=os.environ["GRADIO_TEMP_DIR"])
        assert Path(seen["kept"]).stat().st_mode & 0o077 == 0
        return None, "http://127.0.0.1:1/", None

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    page.serve(shelf, 7000)
    assert (seen["server_name"], seen["server_port"]) == ("127.0.0.1", 7000)
    assert not any(seen[name] for name in ("share", "analytics", "run_history", "mcp_server"))
    assert seen["strict_cors"] and seen["max_file_size"] == "20mb" and "allowed_paths" not in seen
    assert not Path(seen["kept"]).exists()  # uploads go with the page
    assert capfd.readouterr().out.startswith("http://127.0.0.1:1/ shows")


def test_a_report_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text('<script>"x"</script>')
    framed = page._framed(tmp_path / "r.html")
    assert 'sandbox=""' in framed and "<script>" not in framed and "&quot;x&quot;" in framed
    assert page._framed(None) == ""


def test_two_arms_of_one_stage_stand_side_by_side() -> None:
    shown: list[str] = []

    class Gradio:
        def Dropdown(self, names: list[str], value: str, label: str) -> None:
            shown.append(value)

    names = ["towers/mine", "heads/mine", "heads/rival", "towers/rival"]
    for given in (names, names[:3], names[:1]):
        page._two(Gradio(), given, "encoder")
    assert shown[1::2] == ["towers/rival", "heads/mine", page._NOBODY]


@pytest.mark.parametrize("values", [{"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_the_picture_below_a_map_is_what_the_tower_sees(run: Path, values: Any) -> None:
    encoder = load_dual_encoder(str(run / "towers" / "mine"), device="cpu")
    for name, value in values.items():
        setattr(encoder.tower.image_processor, name, value)
    picture = Image.new("RGB", (60, 40), (200, 100, 50))
    seen = np.asarray(_seen(encoder, encoder.pixels(picture)[0]))
    assert np.abs(seen.astype(int) - (200, 100, 50)).max() <= 1
