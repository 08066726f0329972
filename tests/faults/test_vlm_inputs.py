"""Bad input to stages 3 and 4: one clear error or a counted skip each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm2clip_vlm.data
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation import instruction
from llm2clip_vlm.data.conversation.instruction import InstructionDataset
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.recipe.vlm import InstructionSource
from tests.image_corpus import BROKEN, GOOD
from tests.tiny import write_image
from tests.vlm_fixtures import write_llava

TURNS = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
GOOD_RECORD = {"id": "good", "image": "a.png", "conversations": TURNS}
BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "two images, one placeholder": ({**GOOD_RECORD, "image": ["a.png", "a.png"]}, "2 image"),
    "placeholder without image": ({"id": "x", "conversations": TURNS}, "1 <image>"),
    "image without placeholder": (
        {**GOOD_RECORD, "conversations": [{"from": "human", "value": "what ?"}, TURNS[1]]},
        "0 <image>",
    ),
    "missing image": ({**GOOD_RECORD, "image": "b.png"}, "no such file"),
    "path leaves the root": ({**GOOD_RECORD, "image": "../a.png"}, "leave the image root"),
    "absolute path": ({**GOOD_RECORD, "image": "/etc/hostname"}, "absolute"),
    "URL": ({**GOOD_RECORD, "image": "https://host/a.png"}, "URL"),
    "image is a number": ({**GOOD_RECORD, "image": 3}, "neither a name nor a list"),
    "no conversation": ({"id": "x", "image": "a.png"}, "no `conversations`"),
    "empty answer": (
        {**GOOD_RECORD, "conversations": [TURNS[0], {"from": "gpt", "value": ""}]},
        "answer is empty",
    ),
    "a part of another kind": (
        {
            **GOOD_RECORD,
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
            **GOOD_RECORD,
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
    "an answer that is not to be trained": (
        {**GOOD_RECORD, "conversations": [TURNS[0], {**TURNS[1], "weight": 0}]},
        "turn 2: an answer that is marked",
    ),
    "a call of a tool": (
        {**GOOD_RECORD, "conversations": [TURNS[0], {**TURNS[1], "tool_calls": [{"id": 1}]}]},
        "calls a tool",
    ),
    "unknown role": (
        {**GOOD_RECORD, "conversations": [{"from": "robot", "value": "a"}, TURNS[1]]},
        "role 'robot'",
    ),
}


def write(folder: Path, *rows: Any) -> InstructionSource:
    write_image(folder / "a.png")
    (folder / "a.json").write_text(json.dumps(rows))
    return InstructionSource(path=str(folder / "a.json"))


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_llm: Path) -> Any:
    from llm2clip_vlm.models.vlm.building import build_vlm

    return build_vlm(tiny_clip, tiny_llm)[1]


def dataset(source: InstructionSource, processor: Any, bad: BadRecords) -> InstructionDataset:
    return InstructionDataset([source], processor, max_length_tokens=64, bad=bad)


@pytest.mark.parametrize("name", list(BAD_RECORDS))
def test_t60_t62_a_bad_record_is_named_or_counted(
    tmp_path: Path, processor: Any, name: str
) -> None:
    record, reason = BAD_RECORDS[name]
    source = write(tmp_path, GOOD_RECORD, {**record, "id": "faulty"}, GOOD_RECORD)
    with pytest.raises(ValueError, match=f"a.json:faulty.*{reason}"):
        dataset(source, processor, BadRecords(0))
    bad = BadRecords(1)
    assert len(dataset(source, processor, bad)) == 2
    assert bad.count == 1


def test_t60_an_unreadable_image_is_named_or_counted(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    source = write(tmp_path, GOOD_RECORD, {**GOOD_RECORD, "id": "faulty", "image": "b.png"})
    bad = BadRecords(1)
    assert (len(dataset(source, processor, bad)), bad.count) == (1, 1)
    with pytest.raises(ValueError, match=r"faulty: image 'b.png' .* does not decode"):
        dataset(source, processor, BadRecords(0))


@pytest.mark.parametrize("kind", [*GOOD, "one pixel", "1 x N strip", "strip of 50 : 1"])
def test_t64_odd_pictures_are_taken(
    tmp_path: Path, processor: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, GOOD_RECORD)
    (tmp_path / "a.png").write_bytes((GOOD.get(kind) or BROKEN[kind][0])())
    for kept_bytes in (0, 2**20):
        monkeypatch.setattr(instruction, "PRELOAD_LIMIT_BYTES", kept_bytes)
        data = dataset(source, processor, BadRecords(0))
        assert data[0]["pixel_values"].shape == (1, 3, 32, 32)
        assert data[0]["labels"].max() > 0


@pytest.mark.parametrize(
    "kind", sorted(BROKEN.keys() - {"one pixel", "1 x N strip", "strip of 50 : 1"})
)
def test_t64_t60_what_is_no_picture_is_counted(tmp_path: Path, processor: Any, kind: str) -> None:
    if "JPEG" in kind:
        pytest.importorskip("simplejpeg")  # Pillow alone shows damage as grey areas
    source = write(tmp_path, GOOD_RECORD, {**GOOD_RECORD, "id": "faulty", "image": "b.png"})
    make, reason = BROKEN[kind]
    (tmp_path / "b.png").write_bytes(make())
    bad = BadRecords(1)
    assert (len(dataset(source, processor, bad)), bad.count) == (1, 1)
    assert reason in bad.examples[0]
    with pytest.raises(ValueError, match=r"a\.json:faulty"):
        dataset(source, processor, BadRecords(0))


@pytest.mark.parametrize("text_only", [(), range(8)], ids=["images", "text"])
def test_t52_t07_one_modality_and_nothing_trained(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path, text_only: Any
) -> None:
    """Packed batches of one modality; where all labels are ignored, loss and gradient are 0."""
    from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
    from llm2clip_vlm.models.vlm.building import build_vlm

    model, processor = build_vlm(tiny_clip, tiny_llm)
    source = InstructionSource(path=str(write_llava(tmp_path, 8, text_only=text_only)))
    data = dataset(source, processor, BadRecords())
    batches = PackedBatches(
        data.lengths, data.image_counts, global_batch_size=4, max_tokens=64, world_size=2
    )
    batch = PackedCollator()([data[i] for i in next(iter(batches))])
    assert ("pixel_values" in batch) == (not text_only)
    batch.pop("sample_ids")
    assert model.train()(**batch, use_cache=False).loss.item() > 0
    batch["labels"][:] = IGNORE_INDEX
    loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().sum() == 0 for p in model.parameters() if p.grad is not None)


def test_t04_the_loss_of_five_tokens_by_hand(tiny_clip: Path, tiny_llm: Path) -> None:
    """Labels are shifted once: token t is predicted from those before it."""
    from llm2clip_vlm.models.vlm.building import build_vlm

    model, _ = build_vlm(tiny_clip, tiny_llm)
    ids = torch.tensor([[2, 9, 11, 13, 3]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 11, 13, 3]])
    out = model(input_ids=ids, labels=labels, use_cache=False)
    log_probs = out.logits.log_softmax(-1)[0]
    by_hand = -(log_probs[1, 11] + log_probs[2, 13] + log_probs[3, 3]) / 3
    torch.testing.assert_close(out.loss, by_hand)


def test_t54_nothing_sleeps_in_the_data_path() -> None:
    for path in Path(llm2clip_vlm.data.__file__).parent.rglob("*.py"):
        assert "sleep(" not in path.read_text(), path


def test_a_language_model_is_no_tower(tiny_llm: Path) -> None:
    from llm2clip_vlm.models.vlm.building import build_vlm

    with pytest.raises(ValueError, match="model_type 'llama' is not a known vision tower"):
        build_vlm(tiny_llm, tiny_llm)


def test_a_tower_is_no_language_model(tiny_clip: Path) -> None:
    from llm2clip_vlm.models.vlm.building import build_vlm

    with pytest.raises(ValueError, match="AutoModelForCausalLM has no class for 'clip'"):
        build_vlm(tiny_clip, tiny_clip)


def test_a_bidirectional_text_encoder_is_no_decoder(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llm2clip_vlm.models.vlm.building import build_vlm

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

    from llm2clip_vlm.models.vlm.building import build_vlm

    AutoModel.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing or of another shape"):
        build_vlm(tiny_clip, tmp_path)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist(tiny_clip: Path, tiny_llm: Path, layer: int) -> None:
    from llm2clip_vlm.models.vlm.building import build_vlm

    with pytest.raises(ValueError, match="4 hidden states"):
        build_vlm(tiny_clip, tiny_llm, vision_feature_layer=layer)


def test_only_a_llava_is_a_vlm_checkpoint(tmp_path: Path, tiny_clip: Path) -> None:
    from llm2clip_vlm.models.vlm.building import load_vlm

    with pytest.raises(ValueError, match="model_type 'clip', expected llava or llava_next"):
        load_vlm(tiny_clip)
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        load_vlm(tmp_path)
