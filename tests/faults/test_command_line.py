"""A corpus of odd records through the command line: right counts, right names, no crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip_vlm.cli import main
from llm2clip_vlm.runs.manifest import read_manifest
from tests.image_corpus import BROKEN, encode, jpeg, photo
from tests.tiny import WORDS

GOOD = 16
CAPTION = "a red star"
ODD_CAPTIONS: list[Any] = [
    None, "", [], "nan", 7, True, ["fine", 3], [["nested"]], {"short": {"x": "y"}}, "x " * 9000,
    "https://host/a.jpg", "\u200b", "half \ud83d",
]  # fmt: skip
ODD_IMAGES: list[Any] = [
    None, "", 3, "/etc/hostname", "../p.jsonl", "https://h/a.jpg", "pipe:cat a", "absent.jpg",
    "folder.jpg", "link.jpg", "broken.jpg", "cut.jpg",
]  # fmt: skip
ODD_LINES = [b"[1]", b"null", b'{"id": 1,}', b"\xff\xfe", b'{"id": "cut", "image": "g']


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """`p.jsonl` with broken captions, images, lines and keys among good records."""
    for i in range(GOOD):
        (tmp_path / f"g{i}.jpg").write_bytes(encode(photo(64 + i, 64, seed=i)))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("/etc/hostname")
    (tmp_path / "broken.jpg").write_bytes(BROKEN["HTML saved as .jpg"][0]())
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:900])
    rows = [
        {"id": i, "image": f"g{i}.jpg", "captions": [" ".join(WORDS[i : i + 5]), f"{CAPTION} {i}"]}
        for i in range(GOOD)
    ]
    rows += [{"id": f"c{i}", "image": "g0.jpg", "captions": c} for i, c in enumerate(ODD_CAPTIONS)]
    rows += [{"id": f"i{i}", "image": n, "captions": CAPTION} for i, n in enumerate(ODD_IMAGES)]
    rows += [{"id": 3, "image": "g0.jpg", "captions": CAPTION}]  # again
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"", *ODD_LINES]))
    return tmp_path / "p.jsonl"


def run(folder: Path, command: list[str], recipe: dict[str, Any]) -> tuple[int, list[str], Any]:
    """Exit code, what `dropped.jsonl` names, and the manifest's extra."""
    out = folder / str(recipe["stage"])
    path = folder / "recipe.yaml"
    trainer = {"per_device_train_batch_size": 8, "max_steps": 2, "disable_tqdm": True}
    if recipe["stage"] != "stage2a_cache_text":
        recipe = {"global_batch_size": 8, "trainer": trainer, **recipe}
    path.write_text(yaml.safe_dump({"output_dir": str(out), **recipe}))
    code = main([*command, str(path)])
    dropped = [json.loads(line)["where"] for line in (out / "dropped.jsonl").open()]
    manifest = read_manifest(out)
    return (
        code,
        [name.removeprefix(f"{folder}/") for name in dropped],
        (manifest or {}).get("extra"),
    )


def test_stages_2a_and_2b_count_each_odd_record_once(
    corpus: Path, tiny_llm: Path, tiny_clip: Path
) -> None:
    source = {"path": str(corpus)}
    first = GOOD + 1
    captions = [f"p.jsonl:{first + i}" for i in range(len(ODD_CAPTIONS))]
    after = first + len(ODD_CAPTIONS)
    images = [f"p.jsonl:{after + i}" for i in range(len(ODD_IMAGES))]
    last = after + len(ODD_IMAGES)
    again, lines = f"p.jsonl:{last}", [f"p.jsonl:{last + 2 + i}" for i in range(len(ODD_LINES))]
    recipe: dict[str, Any] = {
        "stage": "stage2a_cache_text",
        "text_encoder": {"language_model": str(tiny_llm)},
        "sources": [source],
        "max_bad_fraction": 0.8,
    }
    code, dropped, extra = run(corpus.parent, ["embed", "build"], recipe)
    named = sorted(":".join(name.split(":")[:2]) for name in dropped)
    assert (code, named) == (0, sorted([*captions, *lines]))
    assert extra["bad_records"] == len(dropped)
    recipe = {
        "stage": "stage2b_vision_encoder",
        "vision_tower": str(tiny_clip),
        "embedding_cache": str(corpus.parent / "stage2a_cache_text"),
        "projection_dim": 8,
        "train": [source],
        "max_bad_fraction": 0.8,
    }
    command = ["train", "stage2b_vision_encoder"]
    code, dropped, extra = run(corpus.parent, command, recipe)
    named = sorted(":".join(name.split(":")[:2]) for name in dropped)
    assert (code, named) == (0, sorted([*captions, *images, again, *lines]))
    assert (extra["bad_records"], extra["pairs"]) == (len(dropped), GOOD)


def test_stage_1_bears_a_hundredth(
    tmp_path: Path, tiny_llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"captions": [WORDS[i % 20], f"{CAPTION} {i}"]} for i in range(198)]
    recipe: dict[str, Any] = {
        "stage": "stage1_text_encoder",
        "text_encoder": {"language_model": str(tiny_llm)},
        "train": [{"path": str(tmp_path / "p.jsonl")}],
    }
    odd: list[dict[str, Any]] = [{"captions": ["one", "one"]}, {"captions": ["one"]}]
    for more, code in ((odd, 0), ([*odd, {"captions": "alone"}], 2)):
        rows = "".join(json.dumps(row) + "\n" for row in [*good, *more])
        (tmp_path / "p.jsonl").write_text(rows)
        name = f"run{code}"
        changed = recipe | {"output_dir": str(tmp_path / name)}
        path = tmp_path / "recipe.yaml"
        trainer = {"per_device_train_batch_size": 8, "max_steps": 1, "disable_tqdm": True}
        path.write_text(yaml.safe_dump({"global_batch_size": 8, "trainer": trainer, **changed}))
        assert main(["train", "stage1_text_encoder", str(path)]) == code
        assert len((tmp_path / name / "dropped.jsonl").read_text().splitlines()) == len(more)
    assert "3 bad record(s), 2 allowed of 201 records" in capsys.readouterr().err
