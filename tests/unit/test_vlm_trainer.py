"""Stages 3 and 4's Trainer: exact token mean, what is watched, what is kept of a failure."""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation.instruction import InstructionCollator
from llm2clip_vlm.data.conversation.packing import PackedCollator
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.models.equal import difference, vlm_difference, vlm_outputs
from llm2clip_vlm.models.trainable import apply_trainable, set_precision
from llm2clip_vlm.models.vlm import vlm_loss
from llm2clip_vlm.models.vlm.building import build_vlm, load_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.recipe.vlm import PartTraining
from llm2clip_vlm.runs.manifest import HandoffError
from llm2clip_vlm.training.adapters import merged_state
from llm2clip_vlm.training.step_guard import Watchdog, replay_batch
from llm2clip_vlm.training.vlm import picture_gain, vlm_run
from llm2clip_vlm.training.vlm import vlm_trainer as trainers
from llm2clip_vlm.training.vlm.vlm_flops import VlmFlops
from llm2clip_vlm.training.vlm.vlm_trainer import PaddedBatches, VlmTrainer

ALL = ("vision_tower", "multi_modal_projector", "language_model")


def samples(count: int = 8, *, text_only: tuple[int, ...] = (), seed: int = 0) -> list[Any]:
    """Of unequal lengths and unequal numbers of trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        images = 0 if i in text_only else 1
        text = torch.randint(8, 20, (6 + 3 * (i % 4),), generator=generator)
        ids = torch.cat([torch.full((16 * images,), IMAGE), text])
        labels = ids.clone()
        labels[: 16 * images + 3 + i % 3] = IGNORE_INDEX
        item: dict[str, Any] = {"input_ids": ids, "labels": labels, "sample_id": f"s{i}"}
        if images:
            item["pixel_values"] = torch.randn(1, 3, 32, 32, generator=generator)
        found.append(item)
    return found


IMAGE = 7


@pytest.fixture
def model(tiny_clip: Path, tiny_llm: Path) -> Any:
    built: Any = build_vlm(tiny_clip, tiny_llm)[0]
    assert built.config.image_token_id == IMAGE
    return built


def trainer(
    model: Any,
    folder: Path,
    data: list[Any],
    *,
    parts: tuple[str, ...] = ALL,
    packed: bool = False,
    size: int = 2,
    accumulation: int = 1,
    report: Any = lambda table: None,
    **arguments: Any,
) -> VlmTrainer:
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        **{"max_steps": 1, "optim": "sgd", **arguments},
    )
    apply_trainable(model, parts)
    freeze_unused_vision(model)
    collator: Any = PackedCollator() if packed else InstructionCollator(0)
    rates = {part: PartTraining(lr=0.1) for part in parts}
    return VlmTrainer(model, args, data, collator, None, parts=rates, report=report)


@pytest.mark.parametrize("sliced", [False, True], ids=["whole-logits", "sliced-logits"])
def test_the_same_batch_in_any_pieces_is_the_same_step(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sliced: bool
) -> None:
    """T70: 1 x 8 = 8 x 1 = 4 x 2, padded or packed (2 processes: integration/test_zero.py)."""
    if sliced:
        monkeypatch.setattr(vlm_loss, "SMALL_VOCABULARY", 0)
        monkeypatch.setattr(vlm_loss, "CHUNK_LOGITS", 2**10)
    states, losses = [], []
    for size, accumulation, packed in ((8, 1, False), (1, 8, False), (2, 4, False), (4, 2, True)):
        model = build_vlm(tiny_clip, tiny_llm)[0]
        run = trainer(
            model, tmp_path, samples(), packed=packed, size=size, accumulation=accumulation
        )
        losses.append(run.train().training_loss)
        states.append(model.state_dict())
    assert losses[1:] == pytest.approx([losses[0]] * 3, abs=1e-5)
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], atol=1e-5, rtol=0, msg=name)


def test_the_first_steps_gradients_are_reported(model: Any, tmp_path: Path) -> None:
    told: list[str] = []
    run = trainer(model, tmp_path, samples(), report=told.append)
    run.train()
    assert run.audit is None
    (table,) = told
    for part in ALL:
        assert f"  {part}: " in table
    assert "multi_modal_projector: 4 of 4 tensors" in table


def test_a_part_that_gets_no_gradient_stops_the_run(model: Any, tmp_path: Path) -> None:
    """T27: LLaVA's `no_grad` around the tower made unfreezing do nothing."""
    run = trainer(model, tmp_path, samples())
    model.model.vision_tower.forward = torch.no_grad()(model.model.vision_tower.forward)
    with pytest.raises(ValueError, match=r"parts without any: \['vision_tower'\]"):
        run.train()


def test_the_audit_waits_for_a_picture(model: Any, tmp_path: Path) -> None:
    told: list[str] = []
    data = samples(4, text_only=(0, 1))
    run = trainer(model, tmp_path, data, report=told.append, max_steps=2)
    run.train()
    assert len(told) == 1
    run = trainer(model, tmp_path, samples(4, text_only=(0, 1, 2, 3)), report=told.append)
    run.train()
    assert len(told) == 1
    assert run.audit is not None


def test_t42_text_alone_leaves_optimizer_state_for_all_that_trains(
    model: Any, tmp_path: Path
) -> None:
    data = samples(2, text_only=(0, 1))
    run = trainer(model, tmp_path, data, optim="adamw_torch")
    run.train()
    states = run.optimizer.state
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert all("exp_avg" in states[parameter] for parameter in trained)


def test_a_loss_that_is_not_finite_keeps_the_batch(model: Any, tmp_path: Path) -> None:
    """T06."""
    data = samples()
    data[3]["pixel_values"] = data[3]["pixel_values"] * float("nan")
    with pytest.raises(ValueError, match=r"finite loss, got nan; .* samples \['s2', 's3'\], the"):
        trainer(model, tmp_path, data, max_steps=4).train()
    folder = tmp_path / "failures" / "step-2-rank-0"
    facts = json.loads((folder / "batch.json").read_text())
    assert (facts["step"], facts["sample_ids"]) == (2, ["s2", "s3"])
    assert facts["reason"] == "loss not finite"
    assert facts["shapes"]["pixel_values"] == [2, 3, 32, 32]
    assert str(replay_batch(folder, model)) == "nan"


def test_a_kept_batch_gives_the_same_loss_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model, tmp_path, samples())
    seen: list[float] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        seen.append(float(step(*args, **kwargs)))
        raise torch.OutOfMemoryError("no memory left")

    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    folder = tmp_path / "failures" / "step-1-rank-0"
    assert json.loads((folder / "batch.json").read_text())["reason"] == "out of memory"
    assert replay_batch(folder, model) == pytest.approx(seen[0], abs=1e-6)


def test_who_stands_still_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T53: LLaVA-NeXT waits for a year."""
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    dog = Watchdog(0.05)
    with caplog.at_level(logging.CRITICAL):
        dog.beat("step 7, samples ['a', 'b']")
        assert ended.wait(10)
    assert codes == [1]
    assert "rank 3 of 8 has stood still for 0.05 s in step 7, samples ['a', 'b']" in caplog.text
    patient = Watchdog(0.05)
    patient.beat("x")
    patient.stop()
    Watchdog(None).beat("y")
    ended.clear()
    assert not ended.wait(0.2)


def test_who_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of the launcher holds a sign of rank 1 that never changes, and none of rank 2."""
    port = get_free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    store.set("llm2clip_vlm/1", "7\nbox1, last seen in step 3,")
    dog = Watchdog(60)
    dog._interval_s = 0.05
    dog.beat("step 4")
    told = dog.missing()
    dog.stop()
    assert told == (
        "rank 1 on box1, last seen in step 3, is gone or stopped; rank 2 on no host is gone or "
        "stopped"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Watchdog(0.2).missing() == ""


def test_an_error_because_of_a_lost_process_names_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model, tmp_path, samples())
    monkeypatch.setattr(Trainer, "train", Mock(side_effect=RuntimeError("Connection closed\nby")))
    with pytest.raises(RuntimeError, match="Connection closed"):
        run.train()
    monkeypatch.setattr(run.watchdog, "missing", lambda: "rank 1 on box1 is gone")
    with pytest.raises(ConnectionError, match=r"rank 1 on box1 is gone; start .* \(Connection cl"):
        run.train()


@pytest.mark.parametrize(("noted", "dealt"), [(8, 12), (8, 0), (False, 8), (True, 0)])
def test_samples_that_would_be_dealt_otherwise_are_refused(
    model: Any, tmp_path: Path, noted: int, dealt: int
) -> None:
    """Packed steps deal 8 samples at a time on 1, 2 or 4 processes, 12 on 3, and none unpacked."""
    run = trainer(model, tmp_path, samples())
    (tmp_path / "packing.json").write_text(json.dumps(noted))
    run.batches = SimpleNamespace(dealt=dealt) if dealt else None
    with pytest.raises(HandoffError, match="would come in another order"):
        run._init_training_state(4, 1, 1, str(tmp_path))


def test_workers_start_as_the_recipe_says(model: Any, tmp_path: Path) -> None:
    way = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    loader = trainer(model, tmp_path, samples(), **way).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_the_watchdog_hears_every_micro_step(model: Any, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, samples(), accumulation=2)
    beats: list[str] = []
    run.watchdog.beat = beats.append  # type: ignore[method-assign]
    run.train()
    assert beats == ["step 1, samples ['s0', 's1']", "step 1, samples ['s2', 's3']"]


def logged(run: VlmTrainer) -> list[dict[str, float]]:
    """Train, and give the lines of the log that have a loss."""
    rows: list[dict[str, float]] = []

    class Record(TrainerCallback):
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            rows.extend([dict(logs)] if "loss" in logs else [])

    run.add_callback(Record())
    run.train()
    return rows


def test_each_log_line_says_how_fast(model: Any, tmp_path: Path) -> None:
    rows = logged(trainer(model, tmp_path, samples(), max_steps=2))
    assert len(rows) == 2
    for row in rows:
        assert {"tokens_per_s", "tflops", "data_wait", "fill"} <= set(row)
    lengths = [len(item["input_ids"]) for item in samples()]
    assert rows[0]["fill"] == pytest.approx(sum(lengths[:2]) / (2 * max(lengths[:2])))


def test_what_the_pictures_are_worth_is_logged_and_changes_nothing(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(text_only=(1, 2))

    def run(name: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        found = trainer(copy.deepcopy(model), tmp_path / name, data, size=4, max_steps=6)
        return logged(found), found.model.state_dict()

    model.model.language_model.layers[0].self_attn.attention_dropout = 0.5
    without, weights = run("without")
    monkeypatch.setattr(picture_gain, "APART", 2)
    measured, same = run("measured")
    assert [("picture_gain" in row) for row in measured] == [False, True] * 3
    assert not any("picture_gain" in row for row in without)
    assert [row["loss"] for row in measured] == [row["loss"] for row in without]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert "other samples' pictures" not in caplog.text, "too few for a mean"


class Looks(nn.Module):
    """A model whose loss is how far the pictures are from their own sample's number."""

    def forward(self, pixel_values: Tensor, labels: Tensor, **_: Any) -> Any:
        noise = torch.rand(())  # the same for both
        return SimpleNamespace(loss=(pixel_values - torch.arange(4.0)).abs().mean() + noise)


@pytest.mark.parametrize("worth", [True, False])
def test_the_gain_is_the_loss_with_other_pictures_minus_that_with_their_own(
    caplog: pytest.LogCaptureFixture, worth: bool
) -> None:
    said: list[str] = []
    gain = picture_gain.PictureGain(said.append)
    state = TrainerState(logging_steps=10, max_steps=160)
    inputs = {"pixel_values": torch.arange(4.0) if worth else torch.ones(4)}
    inputs["labels"] = torch.ones(1, 9, dtype=torch.long)
    for state.global_step in range(160):
        gain.on_step_begin(None, state, None)
        before = torch.random.get_rng_state()
        gain.see(Looks(), inputs)
        assert torch.equal(torch.random.get_rng_state(), before)
        state.log_history.append({"loss": 1.0})
        gain.on_log(None, state, None, logs={"loss": 1.0})
    rows = [(number + 1, row) for number, row in enumerate(state.log_history)]
    gains = {number: row["picture_gain"] for number, row in rows if "picture_gain" in row}
    assert gains == pytest.approx(dict.fromkeys(range(20, 161, 20), 2.0 if worth else 0.0))
    gain.on_train_end(None, state, None)
    assert said == (["pictures: " + told(2.0) + " higher"] if worth else [])
    assert (told(0.0) + " higher: it is not shown that" in caplog.text) != worth


def told(gain: float) -> str:
    return f"with other samples' pictures the loss is {gain:.3f} +- 0.000 nats a token"


@pytest.mark.parametrize("parts", [("multi_modal_projector",), ALL[1:], ALL], ids=len)
def test_flops_are_those_that_torch_counts(
    model: Any, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products alone; attention is counted in full by torch, by half (causal) here."""
    monkeypatch.setattr(vlm_loss, "SMALL_VOCABULARY", 0)
    vlm_loss.install_supervised_loss(model)
    apply_trainable(model, parts)
    freeze_unused_vision(model)
    batch = InstructionCollator(0)([samples()[3]])
    batch.pop("sample_ids")
    counter = VlmFlops(model)
    tokens, flops = counter(batch)
    assert tokens == batch["input_ids"].numel()
    with FlopCounterMode(display=False) as torchs:
        model.train()(**batch, use_cache=False).loss.backward()
    assert float(flops) == pytest.approx(torchs.get_total_flops(), rel=0.25)


def padded(count: int = 13, rank: int = 0, world: int = 1, **values: Any) -> PaddedBatches:
    """Of `count` samples with 3, 6, ... tokens in steps of eight, two at a time."""
    args: Any = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 4 // world,
        "world_size": world,
        "process_index": rank,
        "dataloader_drop_last": False,
        "train_sampling_strategy": "random",
        "seed": 3,
        "data_seed": None,
    }

    class Samples(list[int]):
        lengths = [3 * (1 + n) for n in range(count)]

    return PaddedBatches(Samples(range(count)), SimpleNamespace(**args | values))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_padded_samples_come_once_on_any_number_of_processes(
    strategy: str, drop_last: bool
) -> None:
    found = []
    for world in (1, 2, 4):
        values = {"train_sampling_strategy": strategy, "dataloader_drop_last": drop_last}
        ranks = [padded(rank=n, world=world, **values) for n in range(world)]
        for each in ranks:
            each.set_epoch(1)
        order = ranks[0].order()
        rows = [[*each] for each in ranks]
        assert all(len(own) == len(each) for own, each in zip(rows, ranks, strict=True))
        few = 4 // world
        steps = [
            [n for own in rows for batch in own[k : k + few] for n in batch]
            for k in range(0, len(rows[0]), few)
        ]
        found.append([sorted(step) for step in steps])
        assert found[-1] == [sorted(order[:8]), sorted(order[8:])][: 1 if drop_last else 2]
        assert sorted(order) == list(range(13))
    assert found[0] == found[1] == found[2]


def test_the_order_of_padded_samples() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    for data_seed, seed in ((None, 3), (9, 9)):
        batches, as_accelerate = (
            padded(data_seed=data_seed),
            SeedableRandomSampler(range(13), data_seed=seed),
        )
        for epoch in range(2):
            batches.set_epoch(epoch)
            as_accelerate.set_epoch(epoch)
            assert batches.order() == list(as_accelerate)
    grouped = padded(64, train_sampling_strategy="group_by_length")
    first, order = [*grouped], grouped.order()
    groups = [order[k : k + 8] for k in range(0, 64, 8)]
    assert sum(max(group) - min(group) for group in groups) / 8 < 40 and len({*order}) == 64
    torch.manual_seed(1)
    assert [*grouped] == first
    assert first != [*padded(64, train_sampling_strategy="group_by_length", seed=4)]
    grouped.set_epoch(1)
    assert [*grouped] != first
    with pytest.raises(ValueError, match="7 samples, fewer than one step of 8"):
        padded(7, dataloader_drop_last=True)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_resumed_epoch_of_padded_samples_keeps_its_order(
    strategy: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what transformers does to a loader; of a sampler accelerate's shards hid the epoch."""
    from accelerate import skip_first_batches

    class Samples(list[Any]):
        lengths = [*range(16)]

    run = trainer(model, tmp_path, Samples(samples(16)), size=2, accumulation=2)
    run.args.train_sampling_strategy = strategy
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda _: 1))

    def epoch(skipped: int) -> list[Any]:
        loader = run.get_train_dataloader()
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(1)
        inner = getattr(loader.batch_sampler, "batch_sampler", None)
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(1)
        return [batch["sample_ids"] for batch in loader]

    whole = epoch(0)
    assert [len(names) for names in whole] == [2] * 4
    assert epoch(1) == whole[1:]


def test_flops_are_those_of_tokens_not_of_padding(model: Any) -> None:
    apply_trainable(model, ALL)
    items, counter = samples(4, text_only=(1,)), VlmFlops(model)

    def of(batch: dict[str, Any]) -> tuple[float, float]:
        batch.pop("sample_ids")
        tokens, flops = counter(batch)
        return float(tokens), float(flops)

    padded, packed = (of(c(items)) for c in (InstructionCollator(0), PackedCollator()))
    tokens = sum(len(item["input_ids"]) for item in items)
    assert padded[0] == packed[0] == tokens
    assert padded[1] == pytest.approx(packed[1], rel=1e-9)
    # A sample and a micro-batch add up; a picture more costs what a picture costs.
    alone = [of(InstructionCollator(0)([item]))[1] for item in items]
    assert sum(alone) == pytest.approx(padded[1], rel=1e-9)
    doubled = InstructionCollator(0)([items[0]])
    doubled["pixel_values"] = doubled["pixel_values"].repeat(2, 1, 1, 1)
    assert of(doubled)[1] - alone[0] == pytest.approx(counter._image)


def test_a_packed_plan_is_made_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 samples in steps of 8, over one and a half epochs or nine steps."""
    given: dict[str, Any] = {}
    read: dict[str, Any] = {}

    class Samples:
        lengths, image_counts = [5] * 25, [1] * 25

        def __init__(self, *args: Any, **values: Any) -> None:
            read.update(values)

        def __len__(self) -> int:
            return 25

    def plan(lengths: Any, images: Any, **values: Any) -> Any:
        given.update(values)
        return SimpleNamespace(accumulation=7)

    monkeypatch.setattr(vlm_run, "InstructionDataset", Samples)
    monkeypatch.setattr(vlm_run, "PackedBatches", plan)
    recipe: Any = SimpleNamespace(
        data=[], max_length_tokens=64, packing=True, seed=11, global_batch_size=8,
        packing_max_images=6,
    )  # fmt: skip
    args: Any = SimpleNamespace(
        train_sampling_strategy="random", dataloader_drop_last=False, max_steps=-1,
        num_train_epochs=1.5, per_device_train_batch_size=2, process_index=1, world_size=4,
        seed=11, data_seed=None,
    )  # fmt: skip
    wanted = {"global_batch_size": 8, "max_tokens": 128, "max_images": 6, "seed": 11}
    wanted |= {"epochs": 2, "rank": 1, "world_size": 4, "drop_last": False}

    def build() -> dict[str, Any]:
        vlm_run.build_vlm_data(recipe, None, BadRecords(), args, plain=True)
        return given

    assert build() == wanted and args.gradient_accumulation_steps == 7
    assert (read["max_length_tokens"], read["plain"], read["seed"]) == (64, True, 11)
    args.max_steps = 9
    assert build() == wanted | {"epochs": 3}
    args.max_steps = 8
    assert build() == wanted
    args.dataloader_drop_last = True
    assert build() == wanted | {"epochs": 3, "drop_last": True}
    args.data_seed = 5
    assert build() == wanted | {"epochs": 3, "drop_last": True, "seed": 5}
    assert read["seed"] == 11


@pytest.mark.parametrize("part", ["language_model.layers.0", "vision_tower", "lm_head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_that_lost_something_stops(
    dtype: str,
    part: str,
    tiny_clip: Path,
    tiny_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = build_vlm(tiny_clip, tiny_llm, dtype=dtype)
    run = trainer(model, tmp_path, samples())
    run.processor, run.dtype = processor, set_precision(model, run.args)
    run.train()
    run.export(tmp_path / "whole")
    untrained = build_vlm(tiny_clip, tiny_llm, dtype=dtype)[0].state_dict()

    def lost(model: Any, state: Any, *more: Any) -> dict[str, Any]:
        merged = merged_state(model, state, *more)
        return {n: untrained[n] * 0.5 if part in n else t for n, t in merged.items()}

    monkeypatch.setattr(trainers, "merged_state", lost)
    with pytest.raises(ModelError, match="loaded again it computes something else: they differ by"):
        run.export(tmp_path / "lost")


def test_an_export_that_cannot_be_compared_says_so(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(model, tmp_path, samples())
    monkeypatch.setattr(trainers, "is_deepspeed_zero3_enabled", lambda: True)
    assert run._outputs() is None
    monkeypatch.undo()
    model.is_quantized = True
    assert run._outputs() is None
    assert ["ZeRO-3" in caplog.text, "four bits" in caplog.text] == [True, True]


@pytest.mark.parametrize("mixed", [False, True])
def test_what_autocast_rounds_is_not_taken_for_another_model(
    tiny_clip: Path, tiny_llm: Path, tmp_path: Path, mixed: bool
) -> None:
    """The projector's large numbers cancel: in bf16 its tokens are noise, its weights are right."""
    model, processor = build_vlm(tiny_clip, tiny_llm, dtype="float32")
    run = trainer(model, tmp_path, samples(), bf16=True)
    run.processor = processor
    run.train()
    first, second = (getattr(model.model.multi_modal_projector, f"linear_{n}") for n in (1, 2))
    with torch.no_grad():
        first.bias.fill_(1000.0)
        second.bias.copy_(-1000.0 * second.weight.sum(1))
    if mixed:
        model.model.vision_tower.bfloat16()
    run.export(tmp_path / "model")
    want = run._outputs()
    assert want is not None
    assert (want.dtype == torch.float32) != mixed
    if not mixed:
        saved = load_vlm(tmp_path / "model")[0]
        assert difference(want, vlm_outputs(saved)) is None
        with torch.autocast("cpu", torch.bfloat16):
            rounded = vlm_outputs(saved)
        assert difference(want, rounded, 0.1) is not None
        assert vlm_difference(rounded, saved) is None


def test_half_precision_is_asked_how_much_it_rounds(tiny_clip: Path, tiny_llm: Path) -> None:
    """A mixture of experts may take another expert: by its own measure, not by a fixed one."""
    model = build_vlm(tiny_clip, tiny_llm, dtype="bfloat16")[0]
    want = vlm_outputs(model)
    model.lm_head.register_forward_hook(  # a model that is badly off in 16 bits
        lambda module, args, logits: logits * (1.2 if logits.dtype == torch.bfloat16 else 1.0)
    )
    assert vlm_difference(want, copy.deepcopy(model)) is None
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert "differ by" in str(vlm_difference(want, model))
