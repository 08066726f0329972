"""Image-text records, the caption draw, and the two ways of holding images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.data.image_text import dataset as image_text
from llm2clip_vlm.data.image_text.dataset import ImageTextDataset, caption_galleries, collate
from llm2clip_vlm.data.image_text.index import (
    ImageTextRecord,
    ImageTextRecords,
    read_image_text,
    read_sources,
)
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.images import ImageError
from llm2clip_vlm.data.text.caption_draw import (
    caption_id,
    draw,
    draw_one,
    draw_several,
    weighted_captions,
)
from llm2clip_vlm.data.text.captions import EpochSampler
from llm2clip_vlm.recipe.base import AugmentationSection, ImageTextSource, ZeroShotSource
from llm2clip_vlm.training.encoder.encoder_eval import HeldOut, logged, training_images
from tests.image_corpus import encode, photo
from tests.image_text_files import Samples, write_folder
from tests.tiny import write_image


def processor(size_px: int = 32) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size_px}, crop_size={"height": size_px, "width": size_px}
    )


def picture(i: int, size_px: int = 40) -> bytes:
    return encode(photo(size_px, size_px, seed=i), "PNG")


def read(path: Path, samples: Samples) -> ImageTextRecords:
    return read_image_text(write_folder(path, samples), BadRecords())


@pytest.fixture
def records(tmp_path: Path) -> ImageTextRecords:
    kinds = [{"short": [f"s{i}"], "long": [f"l{i}a", f"l{i}b", f"l{i}c"]} for i in range(20)]
    return read(tmp_path / "pairs.jsonl", [(str(i), picture(i), kinds[i]) for i in range(20)])


def write_rows(folder: Path, rows: list[dict[str, object]]) -> ImageTextSource:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ImageTextSource(path=str(path))


def test_reads_lists_and_mappings_of_captions(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path,
        [
            {"id": "a", "image": "x/a.png", "captions": ["one", "two"]},
            {"id": "b", "image": "b.png", "captions": {"short": ["s"], "long": ["l", "m"]}},
        ],
    )
    first, second = read_image_text(source, BadRecords())
    assert (first.key, first.image, first.root) == ("a", "x/a.png", tmp_path)
    assert first.captions == {"captions": ["one", "two"]}
    assert second.captions == {"short": ["s"], "long": ["l", "m"]}


def test_image_root_fields_grouping_and_limit(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path,
        [{"n": f"{i // 2}.png", "image_id": i // 2, "text": f"caption {i}"} for i in range(6)],
    )
    changed = source.model_copy(
        update={
            "image_root": str(tmp_path / "root"),
            "image_field": "n",
            "fields": ["text"],
            "group_by": "image_id",
            "limit": 2,
        }
    )
    found = read_image_text(changed, BadRecords())
    assert [record.key for record in found] == ["0", "1"]
    assert (found[1].image, found[1].root) == ("1.png", tmp_path / "root")
    assert found[1].captions == {"text": ["caption 2", "caption 3"]}


def test_captions_of_another_image_are_not_joined_to_the_first(tmp_path: Path) -> None:
    rows = [{"of": f"{i // 2}", "image": f"{i % 3}.png", "captions": [f"c {i}"]} for i in range(2)]
    rows += [{"of": "2", "image": "2.png", "captions": [f"c {i}"]} for i in range(2)]
    source, bad = write_rows(tmp_path, rows).model_copy(update={"group_by": "of"}), BadRecords(1)
    (kept,) = read_image_text(source, bad)
    assert (kept.image, kept.captions) == ("2.png", {"captions": ["c 0", "c 1"]})
    assert "rows of one 'of' have different images" in bad.examples[0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": "b", "image": None, "captions": ["x"]}, "expected a path"),
        ({"id": "b", "image": "b.png", "captions": ["  "]}, "empty caption"),
        ({"id": "b", "image": "b.png", "captions": []}, "no caption"),
        ({"id": "a", "image": "b.png", "captions": ["x"]}, "occurs twice"),
    ],
)
def test_bad_rows_are_counted_under_the_limit(
    tmp_path: Path, row: dict[str, object], why: str
) -> None:
    source = write_rows(tmp_path, [{"id": "a", "image": "a.png", "captions": ["x"]}, row])
    bad = BadRecords(limit=1)
    assert len(read_image_text(source, bad)) == 1
    assert bad.count == 1 and why in bad.summary()
    with pytest.raises(RecordError, match=why):
        read_image_text(source, BadRecords())


def test_sources_are_joined_and_take_no_weight(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [{"id": "a", "image": "a.png", "captions": ["x"]}])
    assert [r.key for r in read_sources([source, source], BadRecords())] == ["a", "a"]
    heavy = source.model_copy(update={"weight": 2.0})
    with pytest.raises(ValueError, match="image-text sources take none"):
        read_sources([source, heavy], BadRecords())
    with pytest.raises(ValueError, match="image-text sources take none"):
        read_image_text(heavy, BadRecords())  # held-out ones neither


def test_memory_and_disk_give_the_same_batches_to_the_bit(records: ImageTextRecords) -> None:
    memory = ImageTextDataset(records, processor(), seed=3)
    disk = ImageTextDataset(records, processor(), seed=3, preload_limit_bytes=0)
    assert memory._pixels is not None and memory._pixels.dtype == torch.uint8
    assert disk._pixels is None
    order = [5, 0, 19, 7]
    got, want = memory.__getitems__(order), disk.__getitems__(order)
    assert got["pixel_values"].dtype == torch.uint8  # a quarter of the bytes
    pixels = memory.to_float(got["pixel_values"])
    assert torch.equal(pixels, disk.to_float(want["pixel_values"]))
    assert got["captions"] == want["captions"]
    direct = processor()(images=[records[i].open() for i in order], return_tensors="pt")
    assert torch.equal(pixels, direct["pixel_values"])
    assert torch.equal(memory[7]["pixel_values"], got["pixel_values"][3])


def test_a_set_above_the_limit_stays_on_disk(
    records: ImageTextRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llm2clip_vlm.data.image_text.dataset.PRELOAD_LIMIT_BYTES", 20 * 3 * 32 * 32
    )
    assert ImageTextDataset(records, processor())._pixels is None
    monkeypatch.setattr(
        "llm2clip_vlm.data.image_text.dataset.PRELOAD_LIMIT_BYTES", 20 * 3 * 32 * 32 + 1
    )
    assert ImageTextDataset(records, processor())._pixels is not None


def test_a_processor_that_the_table_cannot_mimic_is_asked_each_time(
    records: ImageTextRecords,
) -> None:
    class Odd(CLIPImageProcessorPil):  # adds what no table of pixel values holds
        def __call__(self, *args: object, **kwargs: object) -> object:
            out = super().__call__(*args, **kwargs)
            if kwargs.get("do_normalize") is not False:
                out["pixel_values"] = (
                    out["pixel_values"] + torch.linspace(0, 1, 32)[: out["pixel_values"].shape[-1]]
                )
            return out

    odd = Odd(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    dataset = ImageTextDataset(records, odd)
    assert dataset._pixels is None
    want = odd(images=[records[4].open()], return_tensors="pt")["pixel_values"]
    assert torch.equal(dataset.readable([4], BadRecords())[1], want)


def test_a_processor_that_the_table_mimics_for_some_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fractions(CLIPImageProcessorPil):  # what is resized is no whole number
        def __call__(self, images: list[Image.Image], **kwargs: object) -> object:
            out = super().__call__(images, **kwargs)
            if kwargs.get("do_normalize") is False and images[0].size != (32, 32):
                out["pixel_values"] = out["pixel_values"] + 0.25
            return out

    monkeypatch.setattr("llm2clip_vlm.data.image_text.dataset._CHUNK", 2)
    samples = [(str(i), picture(i, 32 + 8 * (i > 1)), "c") for i in range(4)]
    records = read(tmp_path / "pairs.jsonl", samples)
    odd = Fractions(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    want = odd([record.open() for record in records], return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageTextDataset(records, odd).readable(range(4), BadRecords())[1], want)


def test_a_resume_looks_at_pictures_from_all_over(
    records: ImageTextRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ImageTextDataset(records, processor())
    assert len({file.read_bytes() for file in dataset.some_pictures()}) == 20
    monkeypatch.setattr(image_text, "LOOKED_AT", 3)
    assert dataset.some_pictures() == [records[row].root / records[row].image for row in (0, 7, 14)]


def test_draw_depends_on_seed_epoch_and_index_alone(records: ImageTextRecords) -> None:
    def drawn(seed: int, epoch: int) -> list[str]:
        dataset = ImageTextDataset(records, processor(), seed=seed)
        dataset.set_epoch(epoch)
        assert [dataset.caption(i) for i in reversed(range(20))][::-1] == [
            dataset.caption(i) for i in range(20)
        ]
        return [dataset.caption(i) for i in range(20)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)
    values = torch.tensor([draw(0, epoch, index) for epoch in range(50) for index in range(50)])
    counts = torch.histc(values, 10, 0, 1)
    assert ((counts - 250) ** 2 / 250).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


def test_caption_weights(records: ImageTextRecords) -> None:
    def shares(weights: dict[str, float]) -> Counter[str]:
        dataset = ImageTextDataset(records, processor(), weights)
        kinds: Counter[str] = Counter()
        for epoch in range(100):
            dataset.set_epoch(epoch)
            kinds.update(dataset.caption(i)[0] for i in range(20))
        return kinds

    assert shares({})["s"] == pytest.approx(500, abs=75)  # 1 of 4 captions; s.e. 19
    assert shares({"short": 1, "long": 1})["s"] == pytest.approx(1000, abs=90)
    assert shares({"short": 3, "long": 1})["s"] == pytest.approx(1500, abs=80)
    assert shares({"long": 1})["s"] == 0
    assert ImageTextDataset(records, processor(), {"short": 1}).captions() == [
        f"s{i}" for i in range(20)
    ]


def test_unknown_kind_and_record_without_a_weighted_kind(
    records: ImageTextRecords, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\['lnog'\].*\['long', 'short'\]"):
        ImageTextDataset(records, processor(), {"lnog": 1})
    (tmp_path / "some").mkdir()
    kinds = [{"short": ["s"], "long": ["l"]}] * 3 + [{"short": ["only"]}]
    samples = [(str(i), picture(i), own) for i, own in enumerate(kinds)]
    some = read(tmp_path / "some" / "pairs.jsonl", samples)
    bad = BadRecords(limit=1)
    assert len(ImageTextDataset(some, processor(), {"long": 1}, bad=bad)) == 3
    assert bad.count == 1


@pytest.mark.parametrize("limit_bytes", [2**20, 0])
def test_images_that_do_not_decode_are_counted(records: ImageTextRecords, limit_bytes: int) -> None:
    (records[2].root / records[2].image).write_bytes(b"<html>not found</html>")
    with pytest.raises(RecordError, match="does not decode"):
        ImageTextDataset(records, processor(), preload_limit_bytes=limit_bytes).__getitems__([2])
    bad = BadRecords(limit=1)
    dataset = ImageTextDataset(records, processor(), bad=bad, preload_limit_bytes=limit_bytes)
    want = processor()(images=[records[3].open()], return_tensors="pt")["pixel_values"][0]
    for _ in range(2):  # counted once, and the next image stands in with its own caption
        sample = dataset[2]
        assert torch.equal(dataset.to_float(sample["pixel_values"][None])[0], want)
        assert sample["captions"][1] == "3"
    assert bad.count == 1
    assert len(dataset) == (19 if limit_bytes else 20)


def test_an_image_outside_its_root_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        root = tmp_path / "root"
        record = ImageTextRecord("a", name, {"c": ["x"]}, root)
        with pytest.raises(ImageError):
            record.open()


def test_the_order_of_an_epoch_is_that_of_a_random_sampler_under_accelerate(
    records: ImageTextRecords,
) -> None:
    dataset = ImageTextDataset(records, processor(), seed=3)
    sampler = SeedableRandomSampler(dataset, data_seed=3)  # type: ignore[no-untyped-call]
    orders = []
    for epoch in (0, 5):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        orders.append([*EpochSampler(dataset)])
        assert orders[-1] == [*sampler] and type(orders[-1][0]) is int
    assert orders[0] != orders[1]
    dataset.order_seed = 4
    assert [*EpochSampler(dataset)] != orders[1]


def test_loader_workers_see_the_epoch(records: ImageTextRecords) -> None:
    dataset = ImageTextDataset(
        records,
        processor(),
        text_inputs=lambda texts: {"n": torch.tensor([ord(t[-1]) for t in texts])},
    )
    loader: DataLoader[dict[str, object]] = DataLoader(
        dataset, batch_size=10, num_workers=1, persistent_workers=True, collate_fn=collate
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        got = torch.cat([batch["caption_ids"] for batch in loader])
        assert got.tolist() == [caption_id(dataset.caption(i)) for i in range(20)]


def test_galleries_keep_kinds_apart(records: ImageTextRecords) -> None:
    _, galleries = caption_galleries(records[:2])
    assert galleries["short"] == (["s0", "s1"], [0, 1])
    assert galleries["long"] == (["l0a", "l0b", "l0c", "l1a", "l1b", "l1c"], [0, 0, 0, 1, 1, 1])


def test_non_rgb_images(tmp_path: Path) -> None:
    grey = encode(Image.new("L", (32, 32), 7), "PNG")
    records = read(tmp_path / "pairs.jsonl", [("g", grey, "grey")])
    assert ImageTextDataset(records, processor())[0]["pixel_values"].shape == (3, 32, 32)


def test_each_image_draws_for_itself(records: ImageTextRecords) -> None:
    """Images do not all take the same place in their lists, with one caption an image or two."""
    for count in (1, 2):
        dataset = ImageTextDataset(records, processor(), captions_per_image=count)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            taken = {
                tuple(text[0] + text[-1:] * (text[0] == "l") for text in texts)
                for texts in map(dataset._draw, range(20))
            }
            assert len(taken) > 3, (count, epoch)


def test_two_captions_an_image_come_by_their_weights() -> None:
    """Drawn without replacement: the exact probability of every ordered pair."""
    texts, shares = weighted_captions({"s": ["s"], "l": ["a", "b", "c"]}, {"s": 3, "l": 1})
    assert (texts, shares) == (["s", "a", "b", "c"], [3, 1 / 3, 1 / 3, 1 / 3])
    total, trials = sum(shares), 4000
    pairs = Counter(tuple(draw_several(texts, shares, 2, seed, 0)) for seed in range(trials))
    assert all(first != second for first, second in pairs)
    for i, first in enumerate(texts):
        for j, second in enumerate(texts):
            if i != j:
                p = shares[i] / total * shares[j] / (total - shares[i])
                error = (p * (1 - p) / trials) ** 0.5
                assert abs(pairs[first, second] / trials - p) < 4.5 * error, (first, second)
    assert (
        draw_several(["x", "y"], [1, 1], 3, 0, 0)[2] == draw_several(["x", "y"], [1, 1], 1, 0, 0)[0]
    )
    twice = [draw_several(["x", "x", "y"], [1, 1, 1], 2, seed, 0) for seed in range(20)]
    assert all(sorted(drawn) == ["x", "y"] for drawn in twice)


def test_one_caption_falls_where_chance_says() -> None:
    texts, shares = ["a", "b", "c"], [1.0, 2.0, 1.0]
    drawn = [draw_one(texts, shares, chance) for chance in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0)]
    assert drawn == ["a", "a", "b", "b", "c", "c"]
    assert weighted_captions({"s": ["s"], "l": ["a", "b"]}, {}) == (["s", "a", "b"], [1.0] * 3)
    assert weighted_captions({"s": ["s"], "l": ["a", "b"]}, {"s": 1}) == (["s"], [1.0])


def test_two_captions_depend_on_the_seed_and_the_epoch(records: ImageTextRecords) -> None:
    def drawn(seed: int, epoch: int) -> list[list[str]]:
        dataset = ImageTextDataset(records, processor(), seed=seed, captions_per_image=2)
        dataset.set_epoch(epoch)
        return [dataset._draw(i) for i in range(20)]

    first = drawn(0, 0)
    assert first == drawn(0, 0)
    assert first != drawn(1, 0) and first != drawn(0, 1)


def test_a_kind_without_weight_is_no_caption_and_the_limit_is_below_it(
    records: ImageTextRecords, tmp_path: Path
) -> None:
    (tmp_path / "some").mkdir()
    kinds = [{"short": ["s"], "long": ["l"]}, {"short": ["only"]}]
    samples = [(str(i), picture(i), own) for i, own in enumerate(kinds)]
    some = read(tmp_path / "some" / "pairs.jsonl", samples)
    weights = {"long": 1, "short": 0}
    assert len(ImageTextDataset(some, processor(), weights, bad=BadRecords(limit=1))) == 1
    nbytes = 20 * 3 * 32 * 32
    for limit, held in ((nbytes, False), (nbytes + 1, True)):
        dataset = ImageTextDataset(records, processor(), preload_limit_bytes=limit)
        assert (dataset._pixels is not None) == held


def test_ids_of_captions_are_63_bits_of_blake2b() -> None:
    texts = [f"caption {i}" for i in range(64)]
    ids = [caption_id(text) for text in texts]
    assert all(0 <= number < 2**63 for number in ids) and len(set(ids)) == 64
    assert caption_id("a dog") == caption_id("A  Dog") != caption_id("a dogma")


def test_a_text_side_says_which_captions_are_equal(records: ImageTextRecords) -> None:
    class Tokens:
        def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
            return {}

        def caption_id(self, text: str) -> int:
            return len(text)

    dataset = ImageTextDataset(records, processor(), text_inputs=Tokens())
    want = [len(dataset.caption(index)) for index in (0, 1)]
    assert dataset.__getitems__([0, 1])["caption_ids"].tolist() == want


def test_choices_of_a_recipe_reach_the_training_images(
    records: ImageTextRecords, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"train": [ImageTextSource(path=str(tmp_path / "pairs.jsonl"))]}
    values |= {"caption_weights": {"short": 1.0}, "seed": 5, "image_decoding": "fast"}
    values["augmentation"] = AugmentationSection(crop_scale_min=0.5)
    for decoding in ("fast", "exact"):
        recipe: Any = SimpleNamespace(**values | {"image_decoding": decoding})
        data = training_images(recipe, processor(), BadRecords(), None, captions_per_image=2)
        assert (data.seed, data.caption_weights, data.captions_per_image) == (5, {"short": 1.0}, 2)
        training = data._training
        assert training is not None and (training.seed, training.scaled) == (5, decoding == "fast")
        assert training.augmentation.crop_scale_min == 0.5


def test_a_caption_a_row_of_one_picture_is_told_in_training(
    records: ImageTextRecords, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such captions are each other's negatives where a batch draws both rows."""
    path = tmp_path / "pairs.jsonl"
    recipe: Any = SimpleNamespace(
        train=[ImageTextSource(path=str(path))],
        caption_weights={},
        seed=0,
        image_decoding="exact",
        augmentation=None,
    )
    training_images(recipe, processor(), BadRecords(), None)
    assert not caplog.records
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    more = [row | {"id": f"{row['id']}-again"} for row in rows[:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    training_images(recipe, processor(), BadRecords(), None)
    assert f"2 of the first {len(rows) + 2} records name a picture" in caplog.text


def test_held_out_images_are_measured_by_hand(tmp_path: Path) -> None:
    """Zero-shot by loops over classes and templates; no gradient; what the log keeps."""
    samples = [(f"{i}", picture(i, 32), {"label": [("ab", "c", "de")[i % 3]]}) for i in range(9)]
    read(tmp_path / "pairs.jsonl", samples)
    source = ZeroShotSource(
        path=str(tmp_path / "pairs.jsonl"), fields=["captions"], templates=["a {}", "the {}", "{}"]
    )
    plain = ImageTextSource(path=str(tmp_path / "pairs.jsonl"))
    recipe: Any = SimpleNamespace(evaluation=[plain], zero_shot=[source])
    graph: set[bool] = set()

    def of_text(text: str) -> torch.Tensor:
        vector = torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, text))))
        return vector / vector.norm()

    def texts(some: list[str]) -> torch.Tensor:
        graph.add(torch.is_grad_enabled())
        return torch.stack([of_text(text) for text in some])

    def images(pixels: torch.Tensor) -> torch.Tensor:
        graph.add(torch.is_grad_enabled())
        found = pixels[:, 0, 4, :8] - pixels[:, 1, 9, :8]
        return found / found.norm(dim=1, keepdim=True)

    held_out = HeldOut(recipe, processor(), BadRecords())
    found = held_out(images, texts)
    assert graph == {False}
    hits = 0
    embeds = images(held_out._zero_shot[""][1].readable(range(9), BadRecords())[1])
    for i, (_, _, captions) in enumerate(samples):
        scores = {}
        for name in ("ab", "c", "de"):
            mean = sum(of_text(form.replace("{}", name)) for form in source.templates)
            scores[name] = float(embeds[i] @ mean / mean.norm())
        hits += max(scores, key=lambda name: scores[name]) == captions["label"][0]
    (row,) = found["zero_shot"].values()
    assert row == {"top1": pytest.approx(100 * hits / 9), "images": 9, "classes": 3}
    (name,) = found["zero_shot"]
    recalls = {way: found["retrieval"]["label"][way]["r1"] for way in ("i2t", "t2i")}
    assert logged(found) == {
        "label_i2t_r1": recalls["i2t"],
        "label_t2i_r1": recalls["t2i"],
        f"{name}_zero_shot": pytest.approx(100 * hits / 9),
    }
    # Embeddings that collapsed to one point know nothing: a tie is a miss.
    collapsed = held_out(
        lambda pixels: torch.ones(len(pixels), 1), lambda some: torch.ones(len(some), 1)
    )
    assert collapsed["zero_shot"][name]["top1"] == 0.0


def test_held_out_captions_a_row_each_are_of_one_picture(tmp_path: Path) -> None:
    rows = [{"image": f"{n // 2}.png", "caption": f"{n // 2} {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(3):
        Image.new("RGB", (32, 32), (100 * n, 0, 0)).save(tmp_path / f"{n}.png")
    source = ImageTextSource(path=str(tmp_path / "rows.jsonl"), fields=["caption"])
    recipe: Any = SimpleNamespace(evaluation=[source], zero_shot=[])

    def images(pixels: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[torch.argsort(torch.argsort(pixels[:, 0, 0, 0])) // 2]

    found = HeldOut(recipe, processor(), BadRecords())(
        images, lambda texts: torch.eye(3)[[int(text.split()[0]) for text in texts]]
    )["retrieval"]["caption"]
    assert [found[way]["r1"] for way in ("i2t", "t2i")] == [100, 100]
    assert (found["i2t"]["queries"], found["t2i"]["gallery"]) == (3, 3)


def test_held_out_images_of_two_classes_are_refused_at_once(tmp_path: Path) -> None:
    samples = [
        ("0", picture(0, 32), {"label": ["cat"]}),
        ("1", picture(1, 32), {"label": ["a", "b"]}),
    ]
    read(tmp_path / "pairs.jsonl", samples)
    source = ZeroShotSource(path=str(tmp_path / "pairs.jsonl"), fields=["captions"])
    recipe: Any = SimpleNamespace(evaluation=[], zero_shot=[source])
    with pytest.raises(ValueError, match=r"1: expected one label an image, got 2: \['a', 'b'\]"):
        HeldOut(recipe, processor(), BadRecords())
