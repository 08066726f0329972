"""Trainer arguments from a recipe, and the metrics file."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import set_seed

from llm2clip_vlm import distributed
from llm2clip_vlm.recipe.base import RunRecipe
from llm2clip_vlm.recipe.reading import RecipeError, load_recipe
from llm2clip_vlm.recipe.text import Stage1Recipe
from llm2clip_vlm.runs.manifest import HandoffError, read_manifest
from llm2clip_vlm.training import arguments as module
from llm2clip_vlm.training.arguments import (
    build_training_arguments,
    shares_of_a_step,
)
from llm2clip_vlm.training.callbacks import MetricsJsonl, read_metrics
from llm2clip_vlm.training.checkpoints import newest_whole
from llm2clip_vlm.training.stage_run import StageRun, _leave_nothing
from llm2clip_vlm.training.strict_resume import StrictTrainer


def make_recipe(folder: Path, **changes: Any) -> RunRecipe:
    values = {"output_dir": str(folder / "out"), "global_batch_size": 8, "seed": 3, **changes}
    return RunRecipe.model_validate(values)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("learning_rat", 1e-3, "unknown key; did you mean `learning_rate`?"),
        ("qqq", 1, "unknown key; see transformers.TrainingArguments"),
        ("warmup_ratio", 0.1, "unknown key"),
        ("output_dir", "x", "set `output_dir` of the recipe instead"),
        ("gradient_accumulation_steps", 2, "`global_batch_size`"),
        ("max_steps", "ten", "expected int, got 'ten'"),
        ("max_steps", 1.5, "expected int, got 1.5"),
        ("max_steps", 0, "expected more than 0, got 0"),
        ("num_train_epochs", 0, "expected more than 0, got 0"),
        ("save_steps", -1, "expected more than 0, got -1"),
        ("dataloader_num_workers", -1, "expected 0 or more, got -1"),
        ("learning_rate", -1e-4, "expected 0 or more, got -0.0001"),
        ("dataloader_prefetch_factor", 0, "expected more than 0, got 0"),
        ("fsdp", "full_shard", "set `--accelerate zero3`, or zero2 instead"),
        ("accelerator_config", {"split_batches": True}, "`global_batch_size`"),
        ("resume_from_checkpoint", "x", "the same command goes on"),
        ("learning_rate", "1e-4", "expected float, got '1e-4'"),
        ("gradient_checkpointing", "no", "expected bool or null, got 'no'"),
        ("deepspeed", 3, "expected dict or str or null, got 3"),
    ],
)
def test_a_bad_trainer_key_is_named(tmp_path: Path, key: str, value: Any, part: str) -> None:
    """When the recipe is read, so before torch is imported or an earlier stage has run."""
    trainer = {key: value, "max_grad_norm": 1.0}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"output_dir": str(tmp_path / "o"), "trainer": trainer}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, RunRecipe)
    (problem,) = caught.value.problems
    assert problem.startswith(f"trainer.{key}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("train_sampling_strategy", "rand", "expected one of random, sequential, group_by"),
        ("log_level", "loud", "expected one of detail, debug"),
    ],
)
def test_a_word_that_is_not_listed_is_refused(
    tmp_path: Path, key: str, value: Any, part: str
) -> None:
    with pytest.raises(RecipeError, match=rf"trainer\.{key}: {part}"):
        build_training_arguments(make_recipe(tmp_path, trainer={key: value}))


def test_good_trainer_keys_pass(tmp_path: Path) -> None:
    make_recipe(
        tmp_path,
        trainer={
            "learning_rate": 1,
            "max_steps": -1,
            "warmup_steps": 0.1,
            "lr_scheduler_type": "cosine",
            "deepspeed": {"zero_optimization": {"stage": 2}},
            "eval_strategy": "no",
            "bf16": True,
            "optim": "adamw_torch",
        },
    )


def test_defaults_follow_the_recipe(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trainer={"per_device_train_batch_size": 2, "max_steps": 5})
    found = build_training_arguments(recipe)
    assert found.output_dir == str(tmp_path / "out" / "checkpoints")
    assert (found.seed, found.data_seed, found.max_steps) == (3, 3, 5)
    assert found.per_device_train_batch_size == 2
    assert found.gradient_accumulation_steps == 4
    assert found.report_to == []
    assert str(found.save_strategy) == "SaveStrategy.STEPS"
    assert found.save_total_limit == 2
    assert found.remove_unused_columns is False
    cuda = torch.cuda.is_available()
    assert found.use_cpu is (not cuda)
    assert found.dataloader_pin_memory is cuda
    assert found.n_gpu <= 1


def test_the_recipe_overrules_a_default_and_the_stage_adds_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trainer={"save_strategy": "no", "logging_steps": 2})
    found = build_training_arguments(recipe, label_names=["labels"], logging_steps=2)
    assert str(found.save_strategy) == "SaveStrategy.NO"
    assert (found.logging_steps, found.label_names) == (2, ["labels"])
    assert found.gradient_accumulation_steps == 1


def test_what_a_stage_fixes_is_not_overruled_in_silence(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, trainer={"eval_strategy": "steps"})
    with pytest.raises(RecipeError, match=r"trainer\.eval_strategy: this stage needs 'no'"):
        build_training_arguments(recipe, eval_strategy="no")
    # what is resumed would have a fresh optimizer, or other samples
    for key, needed in (
        ("save_only_model", False),
        ("ignore_data_skip", False),
        ("dataloader_in_order", True),
    ):
        with pytest.raises(RecipeError, match=rf"trainer\.{key}: this stage needs {needed}"):
            build_training_arguments(make_recipe(tmp_path, trainer={key: not needed}))


def test_the_global_batch_is_kept_over_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    recipe = make_recipe(tmp_path, trainer={"per_device_train_batch_size": 2})
    assert build_training_arguments(recipe).gradient_accumulation_steps == 2
    odd = make_recipe(tmp_path / "odd", trainer={"per_device_train_batch_size": 3})
    with pytest.raises(RecipeError, match=r"global_batch_size: expected a multiple .*3 x 2, got 8"):
        build_training_arguments(odd)
    large = make_recipe(tmp_path / "large", trainer={"per_device_train_batch_size": 8})
    with pytest.raises(RecipeError, match="got 8"):
        build_training_arguments(large)


def test_a_contrastive_step_is_shared_and_never_accumulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"output_dir": str(tmp_path), "global_batch_size": 48, "text_encoder": {}}
    recipe = Stage1Recipe.model_construct(**values)
    assert shares_of_a_step(recipe, 1) == (48, 1)
    assert shares_of_a_step(recipe, 3) == (16, 1)
    assert shares_of_a_step(make_recipe(tmp_path, global_batch_size=48), 3) == (8, 2)
    with pytest.raises(RecipeError, match="9 x 5, got 48"):
        shares_of_a_step(recipe, 5)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = build_training_arguments(recipe)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (24, 1)
    ordered = recipe.model_copy(update={"trainer": {"train_sampling_strategy": "sequential"}})
    with pytest.raises(ValueError, match="train_sampling_strategy: this stage needs 'random'"):
        build_training_arguments(ordered)


@pytest.mark.parametrize("how", ["environment", "recipe", "off"])
def test_deepspeed_is_prepared_before_the_arguments_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(n_gpu=1, fp16=False)
    monkeypatch.setattr(distributed, "prepare_cpu_deepspeed", lambda: calls.append("prepare"))

    def build(**values: Any) -> SimpleNamespace:
        calls.append("build")
        return fake

    trainer = {"deepspeed": "recipes/accelerate/zero2.json"} if how == "recipe" else {}
    if how == "environment":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name in ("check_choices", "_try_out"):
        monkeypatch.setattr(module, name, lambda _: None)
    monkeypatch.setattr(module, "TrainingArguments", build)
    build_training_arguments(make_recipe(tmp_path, trainer=trainer))
    assert calls == (["build"] if how == "off" else ["prepare", "build"])


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"optim": "lomo"}, "lomo_optim"),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"nope": 1}, "lr_scheduler_type": "cosine"}, "nope"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"adam_beta1": 1.5}, "beta"),
        ({"torch_compile": True, "torch_compile_mode": "nope"}, "nope"),
        ({"torch_compile_backend": "nope"}, "nope"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"no": 1}}, "'no'"),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
        ({"save_strategy": "best"}, "save_strategy: best"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy: best"),
    ],
)
def test_what_would_fail_once_the_models_are_there(
    tmp_path: Path, trainer: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=rf"trainer.*{told}"):
        build_training_arguments(make_recipe(tmp_path, trainer=trainer))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_a_cpu_says_that_it_knows_no_fp16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_training_arguments(make_recipe(tmp_path, trainer={"fp16": True}))
    assert "trainer.fp16: a CPU computes in float32" in caplog.text


ZERO2 = {"zero_optimization": {"stage": 2}}
REFUSED = [
    ({}, "no settings"),
    ({"zero_optimisation": {"stage": 2}}, "ZeRO optimization config"),
    ({"zero_optimization": {"stage": 7}}, "stage"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
    ({"zero_optimization": {"stage": 3}}, "nothing could be exported"),
    ({**ZERO2, "train_micro_batch_size_per_gpu": 99}, "99"),
    ({**ZERO2, "fp16": {"enabled": True}}, "fp16.enabled"),
    ({**ZERO2, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer: the re"),
    ({**ZERO2, "scheduler": {"type": "WarmupLR"}}, "scheduler: the recipe has its own"),
]
TRY = """
import json, sys
from tests.unit.test_arguments import REFUSED, ZERO2, make_recipe
from llm2clip_vlm.training.arguments import build_training_arguments
from pathlib import Path
for settings in (*(given for given, _ in REFUSED), ZERO2):
    try:
        build_training_arguments(make_recipe(Path(sys.argv[1]), trainer={"deepspeed": settings}))
        print(json.dumps("passes"))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_deepspeed_written_in_a_recipe_is_looked_at(tmp_path: Path) -> None:
    """In a process of its own, since DeepSpeed begins a process group."""
    pytest.importorskip("deepspeed")
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert told[-1] == "passes" and len(told) == len(REFUSED) + 1
    for (_, wanted), found in zip(REFUSED, told[:-1], strict=True):
        assert found.startswith("trainer: ") and wanted in found


def test_fsdp_of_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP: expected `--accelerate zero3`"):
        build_training_arguments(make_recipe(tmp_path))


@pytest.mark.parametrize("given", ["bf16", "fp16", "fp8"])
def test_the_precision_of_a_launcher_is_refused_where_the_recipe_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
    with pytest.raises(ValueError, match=f"launcher says mixed_precision: {given}, the recipe no"):
        build_training_arguments(make_recipe(tmp_path))
    # what the recipe names is what counts
    found = build_training_arguments(make_recipe(tmp_path, trainer={"bf16": True}))
    assert found.mixed_precision == "bf16"


@pytest.mark.parametrize(
    "trainer",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"optim": "sgd", "dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
        {"optim": "adafactor", "lr_scheduler_type": "polynomial", "push_to_hub": False},
        {"torch_compile": True, "torch_compile_mode": "max-autotune"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
)
def test_what_can_be_made_passes(tmp_path: Path, trainer: dict[str, Any]) -> None:
    build_training_arguments(make_recipe(tmp_path, trainer=trainer))


class Line(torch.nn.Module):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": ((self.w * x - 1) ** 2).mean()}


def train(recipe: RunRecipe, metrics: Path) -> int:
    found = build_training_arguments(recipe)
    trainer = StrictTrainer(
        model=Line(),
        args=found,
        train_dataset=[{"x": torch.ones(1)} for _ in range(32)],  # type: ignore[arg-type]
        callbacks=[MetricsJsonl(metrics)],
    )
    trainer.train(resume_from_checkpoint=newest_whole(str(found.output_dir)))
    return trainer.state.global_step


def test_metrics_survive_a_resume_without_double_rows(tmp_path: Path) -> None:
    trainer = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 0.1,
        "disable_tqdm": True,
    }
    recipe = make_recipe(tmp_path, trainer=trainer)
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"step": 1, "seconds": 5.0, "loss": 9.0}) + "\n")
    assert newest_whole(str(build_training_arguments(recipe).output_dir)) is None
    train(recipe, metrics)
    first = read_metrics(metrics)
    assert [row["step"] for row in first if "loss" in row] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "seconds", "grad_norm"} <= set(first[0])

    # Killed after step 3: the last checkpoint is that of step 2, the last line is unfinished.
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    rows = [{**row, "seconds": 100.0 + row["step"]} for row in first[:3]]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    train(recipe, metrics)
    again = read_metrics(metrics)
    assert [row["step"] for row in again if "loss" in row] == [1, 2, 3, 4]
    assert again[0] == rows[0]
    assert all(row["seconds"] >= 102.0 for row in again[2:])


def test_metrics_are_json_even_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    writer = MetricsJsonl(tmp_path / "m.jsonl")
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0)
    writer.on_train_begin(None, state, None)  # type: ignore[arg-type]
    writer.on_log(None, state, None, {"loss": float("nan"), "n": torch.tensor(2.0)})  # type: ignore[arg-type]
    other: Any = SimpleNamespace(is_world_process_zero=False, global_step=7)
    writer.on_train_begin(None, other, None)  # type: ignore[arg-type]
    writer.on_log(None, other, None, {"loss": 1.0})  # type: ignore[arg-type]
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [(row["step"], row["loss"], row["n"]) for row in rows] == [(0, None, 2.0)]


def test_a_broken_metrics_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:1 is not JSON"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_run_is_not_finished_where_its_pictures_have_changed(tmp_path: Path) -> None:
    out, file, picture = tmp_path / "out", tmp_path / "recipe.yaml", tmp_path / "a.png"
    file.write_text(f"output_dir: {out}\ntrainer: {{use_cpu: true}}\n")
    picture.write_bytes(b"one")
    run = StageRun([str(file)], RunRecipe, None)
    run.arguments()
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1)
    loader = SimpleNamespace(dataset=SimpleNamespace(some_pictures=lambda: [picture]))
    for callback in run.callbacks[:1]:
        callback.on_train_begin(None, state, None, train_dataloader=loader)  # type: ignore[arg-type]
    run.finish({})
    for content, same in ((b"one", True), (b"two", False), (b"one", True), (None, True)):
        if content is None:  # deleted after its use
            picture.unlink()
        else:
            picture.write_bytes(content)
        assert StageRun([str(file)], RunRecipe, None).finished() is same


def test_a_run_is_seeded_and_says_what_it_left(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    file.write_text(f"output_dir: {out}\nseed: 7\nmax_bad_records: 1\ntrainer: {{use_cpu: true}}\n")
    run = StageRun([str(file)], RunRecipe, None)
    assert not run.finished()
    assert run.arguments(max_steps=3).max_steps == 3
    drawn = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    set_seed(7)
    assert drawn == [torch.rand(2).tolist(), random.random(), np.random.rand()]
    with pytest.raises(HandoffError, match="lies in output_dir"):
        run.parent("model", str(out / "model"))
    run.bad.add("a:1", "broken")
    run.finish({"tower": "hash"}, {"score": 1.5}, pairs=3)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["extra"] == {"bad_records": 1, "pairs": 3}
    assert (manifest["fingerprints"], manifest["seeds"]) == ({"tower": "hash"}, {"seed": 7})
    assert json.loads((out / "results.json").read_text()) == {"score": 1.5}
    assert StageRun([str(file)], RunRecipe, None).finished("results.json")
    assert not StageRun([str(file)], RunRecipe, None).finished("other.json")
    assert not StageRun([str(file), "seed=8"], RunRecipe, None).finished()


def test_what_comes_next_is_told_with_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "first.yaml", tmp_path / "out"
    file.write_text(f"output_dir: {out}\ntrainer: {{use_cpu: true}}\n")
    following = f"stage: stage2a_cache_text\ntext_encoder: {out}/text_encoder\n"
    for name, text in (("RECIPE", None), (f"{tmp_path}/second.yaml", following)):
        if text:
            Path(name).write_text(text)
        run = StageRun([str(file)], RunRecipe, None)
        run.stage = "stage1_text_encoder"
        run.arguments()
        run.finish({})
        words = (
            f"next: llm2clip-vlm train stage2a_cache_text {name} text_encoder={out}/text_encoder"
        )
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_that_others_share_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A slice of stage 2a that came to nothing leaves the others their folder."""
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *words: at_exit.append(words))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"output_dir: {tmp_path / 'out'}\ntrainer: {{use_cpu: true}}\n")
    run = StageRun([str(file)], RunRecipe, None)
    run.hold(shared=shared)
    run._release()
    assert at_exit == [(_leave_nothing, tmp_path / "out")] * (not shared)


def test_what_another_parent_gave_is_measured_again(tmp_path: Path) -> None:
    """Before the first checkpoint a run may begin anew with a parent that was made anew."""
    llm, file, weights = tmp_path / "llm", tmp_path / "recipe.yaml", []
    file.write_text(f"output_dir: {tmp_path / 'out'}\ntrainer: {{use_cpu: true}}\n")
    llm.mkdir()
    (llm / "config.json").write_text("{}")
    for content in ("one", "one", "two"):
        (llm / "model.safetensors").write_text(content)
        run = StageRun([str(file)], RunRecipe, None)
        run.parent("language_model", str(llm))
        run.arguments()
        assert run.measured("raw", lambda c=content: weights.append(c) or c) == content
    assert weights == ["one", "two"]
