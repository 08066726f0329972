"""AnyRes: tokens counted from headers are those of the model, packed, saved, trained, scored."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import ExifTags, Image
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from llm2clip_vlm.chat.template import ConversationError
from llm2clip_vlm.constants import IMAGE_TOKEN
from llm2clip_vlm.data.conversation.instruction import InstructionCollator, InstructionDataset
from llm2clip_vlm.data.conversation.messages import VisualTokens, build_labels
from llm2clip_vlm.data.conversation.packing import PackedCollator
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.export import export
from llm2clip_vlm.models.vision.image_mode import set_image_aspect_ratio
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm, save_vlm
from llm2clip_vlm.models.vlm.lineage import weights_of
from llm2clip_vlm.recipe.vlm import InstructionSource, Stage4Recipe, VlmSection
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.adapters import merged_state, save_adapter, unquantized_state
from llm2clip_vlm.training.vlm.vlm_flops import VlmFlops
from llm2clip_vlm.training.vlm.vlm_run import prepare_processor, prepare_trainable
from tests.image_text_files import add
from tests.tiny_towers import PREFIX_TOKENS, build_tower
from tests.vlm_fixtures import COLOURS, lora_recipe, losses, run_here, write_recipe

TOWERS = [kind for kind, prefix in PREFIX_TOKENS.items() if prefix < 2]
STRIPS = [(1, 1), (1, 60), (60, 1), (3, 50), (50, 3)]
SIZES = [(32, 32), (90, 30), (30, 90), (64, 48), (200, 60), (33, 31), (9, 150), (61, 64)]
"""Widths and heights."""


@pytest.fixture
def anyres(tiny_clip: Path, tiny_llm: Path) -> tuple[Any, Any]:
    return build_vlm(tiny_clip, tiny_llm, image_aspect_ratio="anyres")


def picture(width: int, height: int) -> Image.Image:
    draw = torch.Generator().manual_seed(width * 1000 + height)
    noise = torch.randint(0, 256, (height, width, 3), generator=draw)
    return Image.fromarray(noise.to(torch.uint8).numpy())


def write_photos(folder: Path, *, text_only: bool = True) -> Path:
    """A LLaVA file with a picture of each size, one of two pictures, one of text."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i, size in enumerate(SIZES):
        picture(*size).save(folder / "images" / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is it ?"},
            {"from": "gpt", "value": " and ".join(COLOURS[: 1 + i % 3])},
        ]
        records.append({"id": f"r{i}", "image": f"images/{i}.png", "conversations": turns})
    two = [
        {"from": "human", "value": "<image> <image> what color ?"},
        records[0]["conversations"][1],
    ]
    records.append({"id": "two", "image": ["images/1.png", "images/2.png"], "conversations": two})
    if text_only:
        turns = [{"from": "human", "value": "is it big ?"}, {"from": "gpt", "value": "yes ."}]
        records.append({"id": "text", "conversations": turns})
    path = folder / "llava.json"
    path.write_text(json.dumps(records))
    return path


def read(path: Path, processor: Any, **more: Any) -> InstructionDataset:
    source = InstructionSource(path=str(path), **more)
    return InstructionDataset([source], processor, max_length_tokens=512, bad=BadRecords())


@pytest.mark.parametrize("grids", [None, [[32, 96], [96, 64]]])
@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_counted_from_the_header_are_those_of_the_model(
    tmp_path: Path, tiny_llm: Path, tower: str, grids: list[list[int]] | None
) -> None:
    folder = build_tower(tower, tmp_path / "tower")
    model, processor = build_vlm(
        folder, tiny_llm, image_aspect_ratio="anyres", image_grid_pinpoints=grids
    )
    visual = VisualTokens(processor)
    assert visual.grids == model.config.image_grid_pinpoints
    seen = set()
    for width, height in SIZES + STRIPS:
        given = processor(images=picture(width, height), text=IMAGE_TOKEN, return_tensors="pt")
        with torch.no_grad():
            features = model.model.get_image_features(given.pixel_values, given.image_sizes)
        tokens, crops = visual.of(height, width)
        seen.add(tokens)
        assert len(features.pooler_output[0]) == tokens
        assert int((given.input_ids == model.config.image_token_id).sum()) == tokens
        assert given.pixel_values.shape[1] == crops
    assert len(seen) > 3


def test_samples_give_the_logits_of_the_processors_own_inputs(
    tmp_path: Path, anyres: tuple[Any, Any]
) -> None:
    model, processor = anyres
    samples = read(write_photos(tmp_path), processor)
    assert len(samples) == len(SIZES) + 2
    collate = InstructionCollator(processor.tokenizer.pad_token_id)
    text_of = "<s> <|user|> {} what color is it ? <|assistant|>"
    for i, size in enumerate(SIZES):
        own = collate([samples[i]])
        text = text_of.format(IMAGE_TOKEN)
        theirs = processor(
            images=picture(*size), text=text, add_special_tokens=False, return_tensors="pt"
        )
        length = theirs.input_ids.shape[1]
        assert torch.equal(own["input_ids"][:, :length], theirs.input_ids)
        with torch.no_grad():
            want = model(**theirs).logits
            got = model(**{k: v for k, v in own.items() if k not in ("sample_ids", "labels")})
        torch.testing.assert_close(got.logits[:, :length], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["json", "tar", "parquet"])
def test_a_turned_picture_is_counted_as_it_is_shown(
    tmp_path: Path, anyres: tuple[Any, Any], kind: str
) -> None:
    model, processor = anyres
    turned, data = Image.Exif(), io.BytesIO()
    turned[ExifTags.Base.Orientation] = 6
    picture(90, 30).save(data, "JPEG", exif=turned)
    turns = [{"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        (tmp_path / "a.jpg").write_bytes(data.getvalue())
        path.write_text(json.dumps([{"image": "a.jpg", "conversations": turns}]))
    elif kind == "tar":
        with tarfile.open(path, "w") as shard:
            add(shard, "a.jpg", data.getvalue())
            add(shard, "a.json", json.dumps({"conversations": turns}).encode())
    else:
        cell = {"bytes": data.getvalue(), "path": None}
        parquet.write_table(pa.table({"conversations": [turns], "image": [cell]}), path)
    samples = read(path, processor)
    again = pickle.loads(pickle.dumps(samples))  # as workers that are spawned
    for item in (samples[0], again[0]):
        assert item["image_sizes"].tolist() == [[90, 30]]
        inputs = {name: item[name] for name in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            model(input_ids=item["input_ids"][None], **inputs)
    assert len(samples[0]["input_ids"]) == samples.lengths[0]


def test_packed_equals_padded(tmp_path: Path, anyres: tuple[Any, Any]) -> None:
    model, processor = anyres
    samples = read(write_photos(tmp_path), processor)
    items = [samples[i] for i in range(len(samples))]
    assert samples.lengths == [len(item["input_ids"]) for item in items]
    assert samples.image_counts == [len(item.get("pixel_values", ())) for item in items]
    padded = InstructionCollator(processor.tokenizer.pad_token_id)(items)
    packed = PackedCollator()(items)
    found = []
    for batch in (padded, packed):
        del batch["sample_ids"]
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        newline = model.model.image_newline.grad.clone()
        found.append(
            (loss.detach(), newline, model.model.multi_modal_projector.linear_1.weight.grad)
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert found[0][1].abs().sum() > 0


def test_it_opens_in_transformers_as_it_lies(tmp_path: Path, anyres: tuple[Any, Any]) -> None:
    model, processor = anyres
    save_vlm(model, processor, tmp_path / "model")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    again = AutoProcessor.from_pretrained(tmp_path / "model")
    ours, _ = load_vlm(tmp_path / "model")
    text = f"<s> <|user|> {IMAGE_TOKEN} what color ? <|assistant|>"
    given = {"images": picture(90, 30), "text": text}
    given |= {"add_special_tokens": False, "return_tensors": "pt"}
    with torch.no_grad():
        want = model(**processor(**given)).logits
        assert torch.equal(theirs(**again(**given)).logits, want)
        assert torch.equal(ours(**again(**given)).logits, want)


def test_an_export_has_its_certificate(tmp_path: Path, anyres: tuple[Any, Any]) -> None:
    save_vlm(*anyres, tmp_path / "model")
    certificate = export(tmp_path / "model", "transformers", tmp_path / "out")
    assert certificate["checks"]["logits"]["max_difference"] == 0
    with pytest.raises(ModelError, match="AnyRes VLM"):
        export(tmp_path / "model", "vllm", tmp_path / "served")


def test_t13_the_newline_is_the_projectors(tmp_path: Path, anyres: tuple[Any, Any]) -> None:
    """It trains with it, and is in each file that has what trained."""
    model, processor = anyres
    recipe = lora_recipe(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_trainable(model, recipe)
    with torch.no_grad():
        model.model.image_newline += 1
    state = model.state_dict()
    save_adapter(model, state, tmp_path / "adapter", "base")
    saved = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert torch.equal(saved["model.image_newline"], before["model.image_newline"] + 1)
    four_bits = merged_state(model, unquantized_state(model, state, before))
    assert torch.equal(four_bits["model.image_newline"], before["model.image_newline"] + 1)
    save_vlm(model, processor, tmp_path / "vlm", state_dict=merged_state(model, state))
    again = load_vlm(tmp_path / "vlm")[0].state_dict()
    assert torch.equal(again["model.image_newline"], before["model.image_newline"] + 1)
    one, other = weights_of(before), weights_of(again)
    assert [part for part in one if one[part] != other[part]] == ["multi_modal_projector"]


@pytest.mark.parametrize("trained", ["multi_modal_projector", "vision_tower"])
def test_text_alone_gives_zero_gradients_not_none(anyres: tuple[Any, Any], trained: str) -> None:
    model, processor = anyres
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or "newline" in name)
    ids = processor.tokenizer("is it big ?", return_tensors="pt").input_ids
    plain = model(input_ids=ids, labels=ids).loss
    guarded = model.train()(input_ids=ids, labels=ids).loss
    assert torch.equal(plain, guarded)
    guarded.backward()
    assert model.model.image_newline.grad.abs().sum() == 0
    layer = getattr(model.model, trained)
    assert any(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_stages_three_and_four_train_and_the_result_answers(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    data = [{"path": str(write_photos(tmp_path / "data"))}]
    shared: dict[str, Any] = {"data": data, "max_length_tokens": 512, "packing": True}
    stage3 = write_recipe(
        tmp_path / "stage3.yaml",
        output_dir=str(tmp_path / "three"),
        vlm={
            "vision_tower": str(tiny_clip),
            "language_model": str(tiny_llm),
            "image_aspect_ratio": "anyres",
        },
        trainable={"multi_modal_projector": 1e-2},
        plain=False,
        **shared,
    )
    run_here("stage3_projector", stage3)
    stage4 = write_recipe(
        tmp_path / "stage4.yaml",
        output_dir=str(tmp_path / "four"),
        checkpoint=str(tmp_path / "three" / "model"),
        trainable={"multi_modal_projector": 1e-2, "language_model": 1e-2, "vision_tower": 1e-3},
        **shared,
    )
    run_here("stage4_instruction", stage4)
    assert losses(tmp_path / "four")[-1] < losses(tmp_path / "three")[0]
    before, _ = load_vlm(tmp_path / "three" / "model")
    model, processor = load_vlm(tmp_path / "four" / "model")
    assert not torch.equal(before.model.image_newline, model.model.image_newline)
    generator = Generator(model, processor, batch_size=5, max_new_tokens=4)
    question = {"type": "text", "text": "what color is it ?"}
    images = [{"type": "image", "url": picture(*size)} for size in SIZES]
    prompts = [
        generator.render([{"role": "user", "content": [*shown, question]}])
        for shown in [*([image] for image in images), images[:2]]
    ]
    together = generator.generate(prompts, [{}] * len(prompts))
    alone = [generator.generate([prompt], [{}])[0] for prompt in prompts]
    assert [a.text for a in together] == [a.text for a in alone]

    stage4.write_text(stage4.read_text() + "image_aspect_ratio: pad\n")
    with pytest.raises(ValueError, match="composed for anyres"):
        run_here("stage4_instruction", stage4, f"output_dir={tmp_path / 'padded'}")
    with pytest.raises(HandoffError, match="image_mode"):
        build_vlm(tiny_clip, tiny_llm, projector=tmp_path / "three" / "model")
    other = build_vlm(
        tiny_clip, tiny_llm, image_aspect_ratio="anyres", projector=tmp_path / "three" / "model"
    )[0]
    assert torch.equal(other.model.image_newline, before.model.image_newline)


def test_an_image_that_was_replaced_or_broken_teaches_nothing(
    tmp_path: Path, anyres: tuple[Any, Any]
) -> None:
    bad = BadRecords(9)
    source = InstructionSource(path=str(write_photos(tmp_path)))
    samples = InstructionDataset([source], anyres[1], max_length_tokens=512, bad=bad)
    picture(31, 80).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    batch = PackedCollator()([samples[0], samples[3], samples[1]])
    assert bad.count == 2
    assert "32x32 as when it was indexed" in bad.summary()
    del batch["sample_ids"]
    assert torch.isfinite(anyres[0](**batch, use_cache=False).loss)
    alone = PackedCollator()([samples[1]])
    assert (batch["labels"] != -100).sum() == (alone["labels"] != -100).sum()


def test_a_large_file_keeps_the_sizes(
    tmp_path: Path, anyres: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_photos(tmp_path)
    small = read(path, anyres[1])
    monkeypatch.setattr("llm2clip_vlm.data.reading.table.TABLE_FILE_FROM_BYTES", 0)
    for _ in range(2):  # made, then read
        large = read(path, anyres[1])
        assert large.lengths == small.lengths
        for i in range(len(small)):
            assert torch.equal(large[i]["input_ids"], small[i]["input_ids"])


def test_a_conversation_too_long_is_cut_by_its_own_images(
    tmp_path: Path, anyres: tuple[Any, Any]
) -> None:
    source = InstructionSource(path=str(write_photos(tmp_path)))
    bad = BadRecords(9)
    samples = InstructionDataset([source], anyres[1], max_length_tokens=60, bad=bad)
    visual = VisualTokens(anyres[1])
    kept = [size for size in SIZES if visual.of(size[1], size[0])[0] + 12 <= 60]
    assert 0 < len(kept) < len(SIZES)
    assert all(length <= 60 for length in samples.lengths)
    assert "of them visual" in bad.summary()


def test_flops_count_crops(anyres: tuple[Any, Any]) -> None:
    model, processor = anyres
    flops = VlmFlops(model.requires_grad_(False))
    found = []
    for size in ((32, 32), (33, 90)):
        text = f"{IMAGE_TOKEN} red"
        given = processor(images=picture(*size), text=text, return_tensors="pt")
        labels = torch.full_like(given.input_ids, -100)
        counted = flops({**given, "pixel_values": given.pixel_values[0], "labels": labels})[1]
        found.append(float(counted) / given.pixel_values.shape[1])
    assert 0.3 < found[0] / found[1] < 3


def test_what_anyres_cannot_do_is_refused(
    tmp_path: Path, tiny_clip: Path, tiny_llm: Path, anyres: tuple[Any, Any]
) -> None:
    keep: dict[str, Any] = {"image_aspect_ratio": "anyres"}
    with pytest.raises(ModelError, match="cannot keep their CLS"):
        build_vlm(tiny_clip, tiny_llm, vision_feature_select_strategy="full", **keep)
    with pytest.raises(ModelError, match="multiples of the tower's 32 px"):
        build_vlm(tiny_clip, tiny_llm, image_grid_pinpoints=[[32, 50]], **keep)
    with pytest.raises(ModelError, match="register tokens"):
        build_vlm(build_tower("dinov3", tmp_path / "dino"), tiny_llm, **keep)
    dino = build_tower("dinov2", tmp_path / "dinov2")
    values = json.loads((dino / "preprocessor_config.json").read_text())
    values["crop_size"] = {"height": 24, "width": 24}
    (dino / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="set image_size_px to 32"):
        build_vlm(dino, tiny_llm, **keep)
    build_vlm(dino, tiny_llm, image_size_px=32, **keep)
    with pytest.raises(ValueError, match="image_grid_pinpoints: expected image_aspect_ratio"):
        VlmSection(vision_tower="a", language_model="b", image_grid_pinpoints=[[32, 64]])
    with pytest.raises(ValueError, match="composed for anyres"):
        set_image_aspect_ratio(anyres[1], "square")
    with pytest.raises(ValueError, match="shuffle_images"):
        read(write_photos(tmp_path / "data"), anyres[1], shuffle_images=True)
    shuffled = InstructionSource(path="x.json", shuffle_images=True)
    values = {"output_dir": "x", "checkpoint": "x", "trainable": {"language_model": 1e-3}}
    recipe = Stage4Recipe(data=[shuffled], **values)
    folder = tmp_path / "vlm"
    save_vlm(*anyres, folder)
    (folder / "model.safetensors").write_bytes(b"")  # nobody comes so far
    for wrong, told in (
        (recipe, "shuffle_images"),
        (recipe.model_copy(update={"image_aspect_ratio": "pad"}), "composed for anyres"),
    ):
        with pytest.raises(ValueError, match=told):
            load_vlm(folder, check=partial(prepare_processor, wrong))
    turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "red"}]
    with pytest.raises(ConversationError, match="num_visual_tokens"):
        build_labels(anyres[1], turns)
