"""Stages 3 and 4 in one process: what trains, what is written, what is refused, resuming."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip_vlm.constants import SEAL_NAME
from tests.vlm_fixtures import losses, run_here, write_llava, write_recipe

PROJECTOR = {"multi_modal_projector": 1e-2}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage34")
    write_llava(folder)
    return folder


@pytest.fixture(scope="module")
def stage3(work: Path, tiny_clip: Path, tiny_llm: Path) -> tuple[Path, Path, str]:
    """Recipe, output and printed text of a stage 3 run."""
    import contextlib
    import io

    recipe = write_recipe(
        work / "stage3.yaml",
        output_dir=str(work / "three"),
        vlm={"vision_tower": str(tiny_clip), "language_model": str(tiny_llm)},
        data=[{"path": str(work / "llava.json")}],
        trainable=PROJECTOR,
    )
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run_here("stage3_projector", recipe)
    return recipe, work / "three", text.getvalue()


def stage4_recipe(work: Path, name: str, **values: Any) -> tuple[Path, Path]:
    recipe = write_recipe(
        work / f"{name}.yaml",
        data=[{"path": str(work / "llava.json")}],
        **{
            "output_dir": str(work / name),
            "checkpoint": str(work / "three" / "model"),
            "trainable": PROJECTOR,
            **values,
        },
    )
    return recipe, work / name


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def changed_parts(before: Path, after: Path) -> set[str]:
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


def test_stage3_trains_the_projector_alone(
    stage3: tuple[Path, Path, str], tmp_path: Path, tiny_clip: Path, tiny_llm: Path
) -> None:
    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm

    _, out, _ = stage3
    save_vlm(*build_vlm(tiny_clip, tiny_llm, seed=0), tmp_path / "model")
    assert changed_parts(tmp_path, out) == {"multi_modal_projector"}


def test_stage3_says_what_it_does(stage3: tuple[Path, Path, str]) -> None:
    _, _, text = stage3
    assert "multi_modal_projector       2,112      2,112  0.01" in text
    assert "<s> [<image> x16] «red </s>»" in text


def test_stage3_leaves_a_manifest_and_no_scratch(
    stage3: tuple[Path, Path, str], tiny_clip: Path, tiny_llm: Path
) -> None:
    from llm2clip_vlm.runs.manifest import fingerprint_dir, read_manifest

    _, out, _ = stage3
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["stage"] == "stage3_projector"
    assert manifest["fingerprints"] == {
        "vision_tower": fingerprint_dir(tiny_clip),
        "language_model": fingerprint_dir(tiny_llm),
    }
    assert set(manifest["outputs"]) == {"model"}
    assert not (out / "composed").exists()
    assert len(losses(out)) == 4


def test_a_finished_stage_does_nothing(
    stage3: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, _ = stage3
    stamp = (out / "model" / "model.safetensors").stat().st_mtime_ns
    run_here("stage3_projector", recipe)
    assert "is finished, nothing to do" in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_output_is_an_ordinary_checkpoint(stage3: tuple[Path, Path, str]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, out, _ = stage3
    model, info = AutoModelForImageTextToText.from_pretrained(
        out / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(out / "model")
    assert processor.chat_template
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_chat_style_and_plain_style_differ(stage3: tuple[Path, Path, str], work: Path) -> None:
    recipe, out, _ = stage3
    run_here("stage3_projector", recipe, "plain=false", f"output_dir={work / 'chat'}")
    assert losses(work / "chat")[0] != pytest.approx(losses(out)[0], abs=1e-3)


@pytest.mark.parametrize(
    ("key", "value"), [("label_smoothing_factor", 0.1), ("average_tokens_across_devices", False)]
)
def test_another_loss_than_the_mean_over_the_next_tokens_is_refused(
    stage3: tuple[Path, Path, str], work: Path, key: str, value: Any
) -> None:
    recipe, _ = stage4_recipe(work, "loss", trainer={key: value})
    given = (f"trainer.{key}={str(value).lower()}", f"output_dir={work / 'loss3'}")
    for stage, more in (
        ("stage4_instruction", (recipe,)),
        ("stage3_projector", (stage3[0], *given)),
    ):
        with pytest.raises(ValueError, match=f"trainer.{key}: this stage needs"):
            run_here(stage, *more)


def test_stage4_trains_what_the_map_names(stage3: tuple[Path, Path, str], work: Path) -> None:
    recipe, out = stage4_recipe(work, "lm", trainable={"language_model": 1e-2})
    run_here("stage4_instruction", recipe)
    assert changed_parts(stage3[1], out) == {"language_model"}
    recipe, out = stage4_recipe(work, "tower", trainable={"vision_tower": 1e-2})
    run_here("stage4_instruction", recipe)
    assert changed_parts(stage3[1], out) == {"vision_tower"}


def test_stage4_keeps_the_fingerprints_and_the_aspect_ratio(
    stage3: tuple[Path, Path, str], work: Path
) -> None:
    from transformers import AutoProcessor

    from llm2clip_vlm.runs.manifest import read_manifest

    recipe, out = stage4_recipe(work, "pad", image_aspect_ratio="pad")
    run_here("stage4_instruction", recipe)
    assert AutoProcessor.from_pretrained(out / "model").image_processor.do_pad is True
    here, before = read_manifest(out), read_manifest(stage3[1])
    assert here is not None
    assert before is not None
    assert here["fingerprints"] == before["fingerprints"]
    assert "manifest_hash" in here["parents"]["checkpoint"]


def test_a_killed_run_resumes_exactly(stage3: tuple[Path, Path, str], work: Path) -> None:
    trainer = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    lora = {"r": 4, "alpha": 8, "dropout": 0.1}
    packed = {"packing": True, "max_length_tokens": 48}
    for name, extra in (("full", {}), ("lora", {"language_model_lora": lora}), ("packed", packed)):
        recipe, out = stage4_recipe(
            work,
            f"resume-{name}",
            trainable={**PROJECTOR, "language_model": 1e-2},
            trainer=trainer,
            **extra,
        )
        run_here("stage4_instruction", recipe)
        expected, curve = weights(out), losses(out)
        assert json.loads((out / "checkpoints/checkpoint-2" / SEAL_NAME).read_text())["pictures"]
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / "checkpoint-4")
        (out / "manifest.json").unlink()
        run_here("stage4_instruction", recipe)
        assert losses(out) == pytest.approx(curve, abs=1e-6)
        for key, tensor in weights(out).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0, msg=key)


def test_each_part_has_its_learning_rate(stage3: tuple[Path, Path, str], work: Path) -> None:
    from llm2clip_vlm.data.reading.bad_records import BadRecords
    from llm2clip_vlm.models.vlm.building import load_vlm
    from llm2clip_vlm.recipe.reading import load_recipe
    from llm2clip_vlm.recipe.vlm import Stage4Recipe
    from llm2clip_vlm.training.arguments import build_training_arguments
    from llm2clip_vlm.training.vlm.vlm_run import build_vlm_data, prepare_trainable
    from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer

    rates = {
        "vision_tower": {"lr": 1e-5, "weight_decay": 0.3, "last_blocks": 1},
        "multi_modal_projector": 1e-3,
        "language_model": 1e-4,
    }
    path, _ = stage4_recipe(
        work,
        "rates",
        trainable=rates,
        trainer={"weight_decay": 0.1, "train_sampling_strategy": "group_by_length"},
    )
    recipe = load_recipe(path, Stage4Recipe)
    arguments = build_training_arguments(recipe)
    model, processor = load_vlm(recipe.checkpoint)
    parts = prepare_trainable(model, recipe)
    data, collator, _ = build_vlm_data(recipe, processor, BadRecords(), arguments)
    trainer = VlmTrainer(model, arguments, data, collator, processor, parts=parts)
    optimizer = trainer.create_optimizer()
    owner = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {n: owner[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert named["lm_head.weight"]["lr"] == 1e-4
    assert named["model.multi_modal_projector.linear_1.weight"]["lr"] == 1e-3
    assert named["model.multi_modal_projector.linear_1.weight"]["weight_decay"] == 0.1
    assert named["model.multi_modal_projector.linear_1.bias"]["weight_decay"] == 0.0
    tower = {n: g for n, g in named.items() if "vision_tower" in n}
    assert {g["lr"] for g in tower.values()} == {1e-5}
    assert {g["weight_decay"] for g in tower.values()} == {0.3, 0.0}
    # layer -2 of three blocks: the third is not used, the second is the last one that is
    assert all(".layers.1." in name for name in tower)


def test_t73_packing_is_on_by_default_and_computes_the_same_updates(
    stage3: tuple[Path, Path, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step has all 16 samples, so packed in few rows or in many, it is the same step."""
    from llm2clip_vlm.recipe.vlm import VlmRecipe

    assert VlmRecipe.model_fields["packing"].default is True
    everything = {**PROJECTOR, "language_model": 1e-2, "vision_tower": 1e-3}
    curves, rows = {}, {}
    for name, packing, batch in (("padded", False, 4), ("few", True, 16), ("many", True, 1)):
        recipe, out = stage4_recipe(
            work,
            f"packed-{name}",
            packing=packing,
            trainable=everything,
            global_batch_size=16,
            trainer={"per_device_train_batch_size": batch},
        )
        run_here("stage4_instruction", recipe)
        found = re.search(r"16 samples in (\d+) packed rows", capsys.readouterr().out)
        rows[name] = int(found.group(1)) if found else 0
        curves[name] = losses(out), weights(out)
    assert rows["padded"] == 0
    assert 1 == rows["few"] < 4 <= rows["many"] <= 6
    for name in ("few", "many"):
        assert curves[name][0] == pytest.approx(curves["padded"][0], abs=1e-5)
        for key, tensor in curves[name][1].items():
            torch.testing.assert_close(tensor, curves["padded"][1][key], atol=1e-4, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_compiled_model_is_exported_by_its_own_names(
    stage3: tuple[Path, Path, str], work: Path, packing: bool
) -> None:
    from torch._dynamo.utils import counters

    found = {}
    for name, compiled in (
        ("plain", {}),
        ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ):
        counters.clear()
        trainer = {"max_steps": 2, **compiled}
        recipe, out = stage4_recipe(work, f"{name}-{packing}", packing=packing, trainer=trainer)
        run_here("stage4_instruction", recipe)
        found[name] = weights(out)
    assert counters["stats"]["unique_graphs"] > 0
    assert found["compiled"].keys() == found["plain"].keys()
    for key, tensor in found["plain"].items():
        torch.testing.assert_close(found["compiled"][key], tensor, atol=1e-4, rtol=0, msg=key)


def test_packing_refuses_another_sampling(stage3: tuple[Path, Path, str], work: Path) -> None:
    recipe, _ = stage4_recipe(
        work, "sampled", packing=True, trainer={"train_sampling_strategy": "group_by_length"}
    )
    with pytest.raises(ValueError, match="has no meaning with packing"):
        run_here("stage4_instruction", recipe)


def test_a_model_that_would_mix_packed_samples_is_padded_and_resumes(
    stage3: tuple[Path, Path, str], work: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `packing: false` in groups of length, said in one line and kept in the manifest."""
    from llm2clip_vlm.models.vlm.building import build_vlm, save_vlm
    from tests.tiny_llms import build_family

    save_vlm(*build_vlm(tiny_clip, build_family("lfm2", work / "lfm2")), work / "lfm2-vlm")
    grouped = {"train_sampling_strategy": "group_by_length"}
    saving = {"save_strategy": "steps", "save_steps": 2}
    curves, whole = {}, {}
    for name, packing, trainer in (("asked", True, saving), ("padded", False, grouped | saving)):
        recipe, out = stage4_recipe(
            work,
            f"mixing-{name}",
            packing=packing,
            packing_max_images=1,
            checkpoint=str(work / "lfm2-vlm"),
            trainable=BOTH,
            trainer=trainer,
        )
        run_here("stage4_instruction", recipe)
        curves[name], whole[name] = losses(out), weights(out)
    said = [row for row in capsys.readouterr().out.splitlines() if row.startswith("packing: ")]
    assert len(said) == 1
    assert "padded instead" in said[0]
    assert curves["asked"] == curves["padded"]
    out = work / "mixing-asked"
    because = json.loads((out / "manifest.json").read_text())["extra"]["padded_because"]
    assert "depend on the sample before it" in because
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    (out / "manifest.json").unlink()
    note = out / "checkpoints" / "checkpoint-2" / "packing.json"
    assert json.loads(note.read_text()) is False
    run_here("stage4_instruction", work / "mixing-asked.yaml")
    assert losses(out) == pytest.approx(curves["asked"], abs=1e-6)
    for key, tensor in weights(out).items():
        torch.testing.assert_close(tensor, whole["asked"][key], atol=1e-6, rtol=0, msg=key)


LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
BOTH = {**PROJECTOR, "language_model": 1e-2}


def test_a_checkpoint_with_adapters_opens_as_it_lies(
    stage3: tuple[Path, Path, str], work: Path
) -> None:
    """T32: merged, with everything beside it; the adapters are apart, with their base's name."""
    from safetensors import safe_open

    from llm2clip_vlm.models.vlm.building import load_vlm
    from llm2clip_vlm.runs.manifest import fingerprint_dir

    saving = {"save_strategy": "steps", "save_steps": 4}
    recipe, out = stage4_recipe(
        work, "adapted", trainable=BOTH, language_model_lora=LORA, trainer=saving
    )
    run_here("stage4_instruction", recipe)
    folder = out / "checkpoints" / "checkpoint-4"
    opened, final = (load_vlm(f)[0].state_dict() for f in (folder, out / "model"))
    assert all(torch.equal(opened[name], tensor) for name, tensor in final.items())
    names = {file.name for file in folder.iterdir()}
    assert {"lineage.json", "recipe.resolved.yaml", "chat_template.jinja", "files.json"} <= names
    for path in (folder, out / "adapter"):
        with safe_open(str(path / "adapter.safetensors"), "pt") as file:
            assert file.metadata()["base"] == fingerprint_dir(work / "three" / "model")
            assert all("lora_" in n or "projector" in n for n in file.keys())  # noqa: SIM118


def test_neftunes_noise_reaches_a_frozen_embedding(
    stage3: tuple[Path, Path, str], work: Path
) -> None:
    """Its hook adds it in training mode alone, and what is frozen is in evaluation mode."""
    curves = []
    for alpha in (None, 5.0, 5.0):
        trainer = {"max_steps": 2, "neftune_noise_alpha": alpha}
        options = {"trainable": BOTH, "language_model_lora": LORA, "trainer": trainer}
        recipe, out = stage4_recipe(work, f"noise-{len(curves)}", **options)
        run_here("stage4_instruction", recipe)
        curves.append(losses(out))
    assert curves[0] != curves[1] == curves[2]


def test_four_bits_need_an_adapter(stage3: tuple[Path, Path, str], work: Path) -> None:
    recipe, _ = stage4_recipe(work, "four-bits-alone", load_in_4bit=True, trainable=BOTH)
    with pytest.raises(ValueError, match="expected language_model_lora beside it"):
        run_here("stage4_instruction", recipe)


@pytest.mark.parametrize(
    ("stage", "field"),
    [("stage1_text_encoder", "language_model"), ("stage3_projector", "vision_tower")],
)
def test_stage3_refuses_the_output_of_another_stage(
    work: Path, tmp_path: Path, tiny_clip: Path, tiny_llm: Path, stage: str, field: str
) -> None:
    parts = {"vision_tower": tiny_clip, "language_model": tiny_llm}
    wrong = tmp_path / "text_encoder"
    shutil.copytree(parts[field], wrong)
    manifest = {"schema": 1, "stage": stage, "fingerprints": {}, "outputs": {}, "recipe_hash": "x"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    recipe = write_recipe(
        tmp_path / "stage3.yaml",
        output_dir=str(tmp_path / "out"),
        vlm={**{k: str(v) for k, v in parts.items()}, field: str(wrong)},
        data=[{"path": str(work / "llava.json")}],
        trainable=PROJECTOR,
    )
    with pytest.raises(ValueError, match=f"stage: expected .*, got {stage}"):
        run_here("stage3_projector", recipe)
    assert not (tmp_path / "out" / "model").exists()


def test_stage4_refuses_a_changed_checkpoint(
    stage3: tuple[Path, Path, str], work: Path, tmp_path: Path
) -> None:
    shutil.copytree(stage3[1], tmp_path / "three")
    (tmp_path / "three" / "model" / "generation_config.json").unlink()
    config = tmp_path / "three" / "model" / "config.json"
    config.write_text(config.read_text().replace('"default"', '"full"'))
    recipe, _ = stage4_recipe(
        work,
        "tampered",
        checkpoint=str(tmp_path / "three" / "model"),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(ValueError, match=r"outputs\.model: .* changed after stage3_projector"):
        run_here("stage4_instruction", recipe)
