"""Bad input to stages 3 and 4: one clear error or a counted skip each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2clip_vlm.config_vlm import InstructionSource
from llm2clip_vlm.data.bad_records import BadRecords
from llm2clip_vlm.data.instruction import InstructionDataset
from tests.tiny import write_image

TURNS = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
GOOD = {"id": "good", "image": "a.png", "conversations": TURNS}
BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "two images, one placeholder": ({**GOOD, "image": ["a.png", "a.png"]}, "2 image"),
    "placeholder without image": ({"id": "x", "conversations": TURNS}, "1 <image>"),
    "image without placeholder": (
        {**GOOD, "conversations": [{"from": "human", "value": "what ?"}, TURNS[1]]},
        "0 <image>",
    ),
    "missing image": ({**GOOD, "image": "b.png"}, "no such file"),
    "path leaves the root": ({**GOOD, "image": "../a.png"}, "leave the image root"),
    "absolute path": ({**GOOD, "image": "/etc/hostname"}, "absolute"),
    "URL": ({**GOOD, "image": "https://host/a.png"}, "URL"),
    "image is a number": ({**GOOD, "image": 3}, "neither a name nor a list"),
    "no conversation": ({"id": "x", "image": "a.png"}, "no `conversations`"),
    "empty answer": (
        {**GOOD, "conversations": [TURNS[0], {"from": "gpt", "value": ""}]},
        "answer is empty",
    ),
    "a part of another kind": (
        {
            **GOOD,
            "conversations": [
                {"role": "user", "content": [{"type": "image"}, {"type": "audio"}]},
                {"role": "assistant", "content": "red"},
            ],
        },
        "expected text or image",
    ),
    "an image's name that is a URL in a part": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": "https://host/a.png"}]},
                {"role": "assistant", "content": "red"},
            ]
        },
        "URL",
    ),
    "<image> inside a part": (
        {
            **GOOD,
            "conversations": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "<image>"}],
                },
                {"role": "assistant", "content": "red"},
            ],
        },
        "2 <image> tokens after tokenisation, expected 1",
    ),
    "unknown role": (
        {**GOOD, "conversations": [{"from": "robot", "value": "a"}, TURNS[1]]},
        "role 'robot'",
    ),
}


def write(folder: Path, *rows: Any) -> InstructionSource:
    write_image(folder / "a.png")
    (folder / "a.json").write_text(json.dumps(rows))
    return InstructionSource(path=str(folder / "a.json"))


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_llm: Path) -> Any:
    from llm2clip_vlm.models.vlm import build_vlm

    return build_vlm(tiny_clip, tiny_llm)[1]


def dataset(source: InstructionSource, processor: Any, bad: BadRecords) -> InstructionDataset:
    return InstructionDataset([source], processor, max_length_tokens=64, bad=bad)


@pytest.mark.parametrize("name", list(BAD_RECORDS))
def test_t60_t62_a_bad_record_is_named_or_counted(
    tmp_path: Path, processor: Any, name: str
) -> None:
    record, reason = BAD_RECORDS[name]
    source = write(tmp_path, GOOD, {**record, "id": "faulty"}, GOOD)
    with pytest.raises(ValueError, match=f"a.json:faulty.*{reason}"):
        dataset(source, processor, BadRecords(0))
    bad = BadRecords(1)
    assert len(dataset(source, processor, bad)) == 2
    assert bad.count == 1


def test_t60_an_unreadable_image_is_named_or_counted(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    source = write(tmp_path, GOOD, {**GOOD, "id": "faulty", "image": "b.png"})
    bad = BadRecords(1)
    assert (len(dataset(source, processor, bad)), bad.count) == (1, 1)
    with pytest.raises(ValueError, match=r"faulty: image 'b.png' .* does not decode"):
        dataset(source, processor, BadRecords(0))


def test_a_language_model_is_no_tower(tiny_llm: Path) -> None:
    from llm2clip_vlm.models.vlm import build_vlm

    with pytest.raises(ValueError, match="model_type 'llama' is not a known vision tower"):
        build_vlm(tiny_llm, tiny_llm)


def test_a_tower_is_no_language_model(tiny_clip: Path) -> None:
    from llm2clip_vlm.models.vlm import build_vlm

    with pytest.raises(ValueError, match="cannot be loaded as AutoModelForCausalLM"):
        build_vlm(tiny_clip, tiny_clip)


def test_a_bidirectional_text_encoder_is_no_decoder(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llm2clip_vlm.models.vlm import build_vlm

    config = AutoConfig.from_pretrained(tiny_llm)
    config.is_causal = False
    AutoModelForCausalLM.from_pretrained(tiny_llm, config=config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_causal: expected a causal decoder"):
        build_vlm(tiny_clip, tmp_path)


def test_a_language_model_without_head_is_refused(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    from llm2clip_vlm.models.vlm import build_vlm

    AutoModel.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing or of another shape"):
        build_vlm(tiny_clip, tmp_path)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist(tiny_clip: Path, tiny_llm: Path, layer: int) -> None:
    from llm2clip_vlm.models.vlm import build_vlm

    with pytest.raises(ValueError, match="4 hidden states"):
        build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layer)


def test_only_a_llava_is_a_vlm_checkpoint(tmp_path: Path, tiny_clip: Path) -> None:
    from llm2clip_vlm.models.vlm import load_vlm

    with pytest.raises(ValueError, match="model_type 'clip', expected 'llava'"):
        load_vlm(tiny_clip)
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        load_vlm(tmp_path)
