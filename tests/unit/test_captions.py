"""Caption records, and the pairs that stage 1 draws from them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.table import arrow_table
from llm2clip_vlm.data.text.captions import (
    COLUMNS,
    CaptionPairs,
    CaptionRecord,
    CaptionTable,
    EpochSampler,
    caption_rows,
    read_captions,
)
from llm2clip_vlm.metrics.separability import caption_separability, caption_task
from llm2clip_vlm.recipe.base import CaptionPairSource, CaptionSource

LENGTHS = ("short", "long")
ANY = CaptionPairSource(path="x")


def source_of(path: Path, rows: list[dict[str, Any]], **keys: Any) -> CaptionSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return CaptionSource(path=str(path), **keys)


def table_of(found: list[CaptionRecord], tokens: Any = None) -> CaptionTable:
    rows = partial(caption_rows, lambda _: iter(found), tokens)
    return CaptionTable(arrow_table([], None, list, COLUMNS, rows))


def records(count: int, captions: int = 3, name: str = "r") -> CaptionTable:
    return table_of(
        [
            CaptionRecord(f"{name}{i}", {"captions": [f"{name} {i} {j}" for j in range(captions)]})
            for i in range(count)
        ]
    )


def test_reads_all_shapes(tmp_path: Path) -> None:
    rows = [
        {"id": "x", "captions": ["a", "b", "a"]},
        {"id": 5, "captions": {"short": ["c"], "long": ["d", "e"]}},
    ]
    found = read_captions(source_of(tmp_path / "a.jsonl", rows), BadRecords())
    assert [record.key for record in found] == ["x", "5"]
    assert found[0].texts == ["a", "b"]
    assert found[1].captions == {"short": ["c"], "long": ["d", "e"]}
    assert found[1].texts == ["c", "d", "e"]


def test_groups_rows_of_one_image(tmp_path: Path) -> None:
    rows = [
        {"image_id": 4, "id": 1, "caption": "a"},
        {"image_id": 5, "id": 2, "caption": "b"},
        {"image_id": 4, "id": 3, "caption": "c"},
    ]
    source = source_of(tmp_path / "a.jsonl", rows, fields=["caption"], group_by="image_id")
    found = read_captions(source, BadRecords())
    assert [(record.key, record.texts) for record in found] == [("4", ["a", "c"]), ("5", ["b"])]


def test_dreamlip_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('short_caption,long_caption\n"a dog","a dog, on a beach"\n')
    source = CaptionSource(path=str(tmp_path / "a.csv"), fields=["short_caption", "long_caption"])
    (found,) = read_captions(source, BadRecords(), min_captions=2)
    assert found.captions == {"short_caption": ["a dog"], "long_caption": ["a dog, on a beach"]}


def test_bad_captions_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"captions": ["a", "b"]},
        {"captions": ["a", " "]},
        {"captions": ["a", "a"]},
    ]
    source = source_of(tmp_path / "a.jsonl", rows)
    bad = BadRecords(limit=2)
    assert len(read_captions(source, bad, min_captions=2)) == 1
    assert bad.count == 2
    assert "a.jsonl:2: an empty caption" in bad.summary()
    assert "a.jsonl:3: 1 different caption(s), expected at least 2" in bad.summary()
    with pytest.raises(RecordError, match="2 bad record"):
        read_captions(source, BadRecords(limit=1), min_captions=2)
    assert len(read_captions(source, BadRecords(limit=1))) == 2  # one caption is enough here


def test_pairs_are_two_captions_of_one_record() -> None:
    pairs = CaptionPairs([records(5)], [ANY], seed=0)
    assert len(pairs) == 5
    for item in EpochSampler(pairs):
        pair = pairs[item]
        assert pair.query != pair.positive
        assert pair.query.split()[:2] == pair.positive.split()[:2] == ["r", str(pair.record)]


def test_every_ordered_pair_is_equally_likely() -> None:
    pairs = CaptionPairs([records(1)], [ANY], seed=0)
    seen = Counter(pairs[epoch, 0][1:] for epoch in range(1200))
    assert len(seen) == 6
    assert min(seen.values()) > 140


def test_draws_depend_on_seed_epoch_and_record_alone() -> None:
    def drawn(seed: int, epoch: int) -> list[Any]:
        pairs = CaptionPairs([records(20)], [ANY], seed=seed)
        pairs.set_epoch(epoch)
        return [pairs[item] for item in EpochSampler(pairs)]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)


def test_weights_mix_sources() -> None:
    heavy = CaptionPairSource(path="x", weight=2.0)
    pairs = CaptionPairs([records(10), records(8, name="s")], [heavy, ANY], seed=0)
    assert len(pairs) == 14
    first = Counter(int(r) >= 10 for r in pairs.order(0))
    assert first == {False: 10, True: 4}
    assert set(pairs.order(0)) != set(pairs.order(1))  # another half of the lighter source
    assert len(set(pairs.order(0))) == 14
    heavier = CaptionPairs([records(10), records(8, name="s")], [ANY, ANY], seed=0)
    assert len(heavier) == 18


def test_caption_task_is_first_against_all_others() -> None:
    found = [
        CaptionRecord("k", {"short": ["a", "a"], "long": ["b", "c"]}),
        CaptionRecord("l", {"short": ["d"], "long": ["b"]}),
        CaptionRecord("m", {"short": ["e", "a"]}),
    ]
    queries, gallery, positives, left_out = caption_task([record.texts for record in found])
    assert (queries, gallery) == (["a", "d", "e"], ["b", "c", "b", "a"])
    # Texts equal to a right answer are right wherever they stand; the query's own is no answer.
    assert positives == [{0, 1, 2}, {0, 2}, {3}] and left_out == [(0, 3)]
    at = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, -0.6], [0.8, 0.6]]
    vectors = dict(zip("abcde", at, strict=True))

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.tensor([vectors[text] for text in texts])

    # "a" finds "c", being neither helped nor beaten by itself; without "c" it finds "b" last.
    captions = [["a", "c"], ["d", "b"], ["e", "a"]]
    assert caption_separability(captions, embed).hits[1].tolist() == [True, False, False]
    captions = [["a", "b"], ["e", "c"], ["d", "a"]]
    assert caption_separability(captions, embed).hits[1].tolist() == [False, True, True]


def pair_rows() -> list[dict[str, Any]]:
    return [
        {"anchor": "q0", "positive": "p0", "negative": "n0"},
        {"anchor": "q1", "positive": ["p1", "o1"], "negative": None},
    ]


def test_directed_pairs_keep_anchor_positive_and_negative(tmp_path: Path) -> None:
    path = source_of(tmp_path / "a.jsonl", pair_rows()).path
    rule = CaptionPairSource(
        path=path, fields=["anchor", "positive", "negative"], directed=True, prompts={"*": "find "}
    )
    found = read_captions(rule, BadRecords(), min_captions=2)
    pairs = CaptionPairs([found], [rule], seed=0)
    drawn = [pairs[epoch, record] for epoch in range(20) for record in range(2)]
    texts = {(p.query, p.positive, p.negative) for p in drawn}
    assert texts == {("q0", "p0", "n0"), ("q1", "p1", ""), ("q1", "o1", "")}
    assert {p.prompt for p in drawn} == {"find "}
    loose = CaptionPairs([found], [ANY], seed=0)
    assert {loose[epoch, 0].query for epoch in range(40)} == {"q0", "p0", "n0"}


def test_prompts_follow_the_direction() -> None:
    found = table_of([CaptionRecord("r", {"short": ["a"], "long": ["b"], "raw": ["c"]})])
    prompts = {"short->long": "longer: ", "long -> short": "shorter: ", "*": "any: "}
    rule = CaptionPairSource(path="x", fields=["short", "long", "raw"], prompts=prompts)
    pairs = CaptionPairs([found, records(1)], [rule, ANY], 0)
    seen = {(p.query, p.positive, p.prompt) for p in (pairs[epoch, 0] for epoch in range(80))}
    assert seen >= {("a", "b", "longer: "), ("b", "a", "shorter: "), ("a", "c", "any: ")}
    assert len(seen) == 6
    assert pairs[0, 1].prompt == ""  # the other source has none
    wrong = rule.model_copy(update={"prompts": {"long->raww": "x"}})
    with pytest.raises(ValueError, match="'long->raww': no caption is of kind 'raww'"):
        CaptionPairs([found], [wrong], 0)
    other = table_of([CaptionRecord("o", {"raw": ["a", "b"]})])
    mixed = rule.model_copy(update={"prompts": {"raw->raw": "x"}})
    CaptionPairs([found, other], [rule, mixed], 0)
    with pytest.raises(ValueError, match=r"no caption is of kind 'short'; the kinds of x are"):
        CaptionPairs([found, other], [rule, rule], 0)  # the first source's kinds
    rule = CaptionPairSource(
        path="x", fields=["short", "long"], directed=True, prompts={"long->short": "y"}
    )
    with pytest.raises(ValueError, match=r"no pair is so; the kinds .*'long'\] in this order"):
        CaptionPairs([found], [rule], 0)


def test_rules_do_not_change_what_is_drawn() -> None:
    rule = CaptionPairSource(path="x", prompts={"*": "p"})
    plain, ruled = (CaptionPairs([records(9)], [own], 0) for own in (ANY, rule))
    assert [plain[1, i][:4] for i in range(9)] == [ruled[1, i][:4] for i in range(9)]


def test_a_pair_of_equal_texts_is_bad(tmp_path: Path) -> None:
    rows = [*pair_rows(), {"anchor": "q", "positive": "q", "negative": "n"}, {"anchor": "q"}]
    path = source_of(tmp_path / "a.jsonl", rows).path
    rule = CaptionPairSource(path=path, fields=["anchor", "positive", "negative"], directed=True)
    bad = BadRecords(limit=2)
    assert len(read_captions(rule, bad, min_captions=2)) == 2
    assert "a.jsonl:3: no text in 'positive' beside that in 'anchor'" in bad.summary()
    with pytest.raises(ValueError, match=r"directed is true; expected \[anchor, positive\]"):
        CaptionPairSource(path="x", directed=True)
    with pytest.raises(ValueError, match="'to long': expected `query->positive`"):
        CaptionPairSource(path="x", prompts={"to long": "p"})


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_dreamlips_seven_columns(tmp_path: Path, kind: str) -> None:
    names = ["raw_caption", *(f"{n}{m}_captions" for m in ("IB", "SV", "LLA") for n in LENGTHS)]
    row = {name: f"{name} of a dog, on a beach" for name in names}
    path = tmp_path / f"cc3m.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["Image Path", *names])
            writer.writeheader()
            writer.writerow({"Image Path": "http://localhost/a.jpg", **row})
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        content = json.dumps({**row, "url": "http://localhost/a.jpg"}).encode()
        with tarfile.open(path, "w") as shard:
            member = tarfile.TarInfo("000000001.json")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    source = CaptionSource(path=str(path), fields=names)
    (found,) = read_captions(source, BadRecords(), min_captions=2)
    assert found.texts == list(row.values())


def test_order_and_captions_each_depend_on_seed_and_epoch() -> None:
    def of(seed: int, epoch: int) -> tuple[list[int], list[Any]]:
        pairs = CaptionPairs([records(12), records(12, name="s")], [ANY, ANY], seed=seed)
        return pairs.order(epoch).tolist(), [pairs[epoch, i][1:3] for i in range(24)]

    pairs = CaptionPairs([records(12)], [ANY], seed=0)
    before = pairs.order(0).tolist(), [pairs[0, i] for i in range(12)]
    pairs.order_seed = 1  # `trainer.data_seed`
    assert pairs.order(0).tolist() != before[0] and [pairs[0, i] for i in range(12)] == before[1]
    order, drawn = of(0, 1)
    assert sorted(order) == list(range(24)) != order
    assert 0 < sum(record < 12 for record in order[:12]) < 12  # shuffled over the sources, too
    for seed, epoch in ((0, 2), (1, 1)):
        other = of(seed, epoch)
        assert other[0] != order and other[1] != drawn
    assert (
        len({(a.split()[2], b.split()[2]) for a, b in drawn}) == 6
    )  # records do not all take the same places


def test_two_directed_columns_have_no_negative_and_the_first_kind_names_a_text() -> None:
    found = table_of([CaptionRecord("r", {"anchor": ["q"], "positive": ["q", "p"]})])
    rule = CaptionPairSource(path="x", fields=["anchor", "positive"], directed=True)
    pairs = CaptionPairs([found], [rule], seed=0)
    for epoch in range(8):
        pair = pairs[epoch, 0]
        assert (pair.query, pair.positive, pair.negative) == ("q", "p", "")
