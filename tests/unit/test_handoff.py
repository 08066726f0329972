"""Manifests: written last, verified by name, and what makes a stage count as finished."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm2clip_vlm.constants import MANIFEST_NAME, SEAL_NAME
from llm2clip_vlm.recipe.base import RunRecipe, TextEncoderSection
from llm2clip_vlm.recipe.text import Stage1Recipe
from llm2clip_vlm.remote.addresses import FileState
from llm2clip_vlm.runs import hashes as fingerprint
from llm2clip_vlm.runs import manifest
from llm2clip_vlm.runs.hashes import changed_files, file_states
from llm2clip_vlm.runs.manifest import (
    PARENTS_NAME,
    RESOLVED_NAME,
    HandoffError,
    claim_output_dir,
    claim_parents,
    fingerprint_dir,
    fingerprint_file,
    is_complete,
    parent_state,
    read_manifest,
    recipe_hash,
    refuse_bidirectional,
    refuse_changed_outputs,
    verify_parent,
    write_manifest,
)


def make_recipe(output_dir: Path | str = "runs/x", **changes: object) -> RunRecipe:
    return RunRecipe.model_validate({"output_dir": str(output_dir), **changes})


def make_model(folder: Path, weights: str = "w", config: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "config.json").write_text(config)
    return folder


def finish(folder: Path, recipe: RunRecipe | None = None, **changes: object) -> Path:
    values: dict[str, object] = {
        "stage": "stage1_text_encoder",
        "recipe": recipe or make_recipe(folder),
        "parents": {},
        "fingerprints": {"text_encoder": "abc"},
        "seconds": 1.23456,
        **changes,
    }
    return write_manifest(folder, **values)  # type: ignore[arg-type]


def test_the_manifest_holds_what_the_next_stage_asks_for(tmp_path: Path) -> None:
    make_model(tmp_path / "out" / "model")
    make_model(tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "logs").mkdir()
    (weights := tmp_path / "out" / "model" / "model.safetensors").chmod(0o600)
    recipe = make_recipe(tmp_path / "out", seed=7)
    path = finish(tmp_path / "out", recipe, extra={"cut": 2})
    assert path == tmp_path / "out" / MANIFEST_NAME
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["schema"] == 1
    assert manifest["stage"] == "stage1_text_encoder"
    assert manifest["recipe"]["seed"] == 7
    assert manifest["recipe_hash"] == recipe_hash(recipe)
    assert manifest["fingerprints"] == {"text_encoder": "abc"}
    assert manifest["outputs"] == {"model": fingerprint_dir(tmp_path / "out" / "model")}
    assert manifest["seeds"] == {"seed": 7}
    assert manifest["seconds"] == 1.235
    assert weights.stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666
    assert manifest["extra"] == {"cut": 2}
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert [item.name for item in (tmp_path / "out").glob(".*")] == []


def test_a_folder_without_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert verify_parent(tmp_path / "model", "x") is None


@pytest.mark.parametrize(
    ("text", "part"), [("{", "not JSON"), ('{"schema": 9}', "schema"), ("[]", "schema")]
)
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(HandoffError, match=part):
        read_manifest(tmp_path)


def test_the_recipe_hash_follows_what_is_computed_only() -> None:
    first = make_recipe("a", trainer={"max_steps": 3, "logging_steps": 1})
    same = make_recipe(
        "b",
        notes="n",
        deviations={"x": "y"},
        trainer={"save_steps": 9, "max_steps": 3, "per_device_train_batch_size": 1},
    )
    assert recipe_hash(first) == recipe_hash(same)
    assert recipe_hash(first) != recipe_hash(make_recipe("a", trainer={"max_steps": 4}))
    assert recipe_hash(first) != recipe_hash(make_recipe("a", seed=1, trainer={"max_steps": 3}))
    ordered = make_recipe("a", trainer={"max_steps": 1, "weight_decay": 2})
    turned = make_recipe("a", trainer={"weight_decay": 2, "max_steps": 1})
    assert recipe_hash(ordered) == recipe_hash(turned)
    # a full disk or too little memory: the run goes on with tables elsewhere and fewer workers
    few = {"train": [{"path": "x"}], "trainer": {"dataloader_num_workers": 0}}
    elsewhere = {"path": "x", "index_dir": "/b", "cache_dir": "/c", "cache_gib": 1.0}
    many = {"train": [elsewhere], "trainer": {"dataloader_num_workers": 4}}
    assert recipe_hash(few) == recipe_hash(many) != recipe_hash({**many, "train": [{"path": "y"}]})
    assert recipe_hash({"b": [1, 2.5, None], "a": "ü"}) == recipe_hash(
        {"a": "ü", "b": [1, 2.5, None]}
    )


def test_a_models_fingerprint_follows_its_weights_and_configs_only(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    first = fingerprint_dir(model)
    (model / "README.md").write_text("words")
    (model / "training_args.json").write_text("{}")
    assert fingerprint_dir(model) == first
    assert fingerprint_dir(make_model(tmp_path / "copy")) == first
    assert fingerprint_dir(make_model(tmp_path / "w", weights="v")) != first
    assert fingerprint_dir(make_model(tmp_path / "c", config="[]")) != first
    (model / "tokenizer.json").write_text("{}")
    assert fingerprint_dir(model) != first


def test_a_fingerprint_is_taken_anew_when_a_file_changes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", weights="one")
    first = fingerprint_dir(model)
    (model / "model.safetensors").write_text("two")
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert fingerprint_dir(model) != first


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    first = fingerprint_file(file)
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert fingerprint_file(file) == first
    os.utime(file, ns=(2, 2))
    assert fingerprint_file(file) != first


def test_a_data_folder_is_known_by_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("a")
    (tmp_path / "rows.jsonl").write_text("r")
    first = fingerprint_dir(tmp_path)
    (tmp_path / ".hidden").write_text("h")
    assert fingerprint_dir(tmp_path) == first
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "b.png")
    assert fingerprint_dir(tmp_path) != first


def test_nothing_to_fingerprint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="found none to take"):
        fingerprint_dir(tmp_path)
    with pytest.raises(HandoffError, match="expected a directory"):
        fingerprint_dir(tmp_path / "absent")


def test_a_parents_state_is_manifest_then_fingerprint_then_name(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    model = make_model(stage / "model")
    manifest = finish(stage)
    assert parent_state(stage)["manifest_hash"] == fingerprint_file(manifest)
    assert parent_state(model) == {**parent_state(stage), "path": str(model)}
    foreign = make_model(tmp_path / "foreign" / "model")
    assert parent_state(foreign) == {"path": str(foreign), "fingerprint": fingerprint_dir(foreign)}
    weights = foreign / "model.safetensors"
    stat = weights.stat()
    state = [stat.st_size, stat.st_mtime_ns, fingerprint_file(weights)]
    assert parent_state(weights)["files"] == {str(weights): state}
    shards = str(tmp_path / "*.tar")
    (tmp_path / "0.tar").write_bytes(b"a")
    one = parent_state(shards)
    (tmp_path / "1.tar").write_bytes(b"b")
    assert parent_state(shards)["files"].keys() - one["files"].keys() == {str(tmp_path / "1.tar")}
    assert parent_state("openai/clip-vit-large-patch14") == {
        "path": "openai/clip-vit-large-patch14"
    }


def test_verify_accepts_the_stage_and_its_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    finish(tmp_path)
    for folder in (tmp_path, model):
        found = verify_parent(folder, "stage1_text_encoder", "other")
        assert found is not None
        assert found["stage"] == "stage1_text_encoder"


def test_verify_names_the_field(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    finish(tmp_path)
    with pytest.raises(
        HandoffError, match="stage: expected stage3_projector, got stage1_text_encoder"
    ):
        verify_parent(model, "stage3_projector")
    make_model(model, weights="another tower")
    with pytest.raises(HandoffError, match=r"outputs\.model"):
        verify_parent(model)


def test_verify_knows_settings_that_are_no_part_of_the_weights(tmp_path: Path) -> None:
    """A text encoder's own settings (pooling, prompt) are in no file that makes a model."""
    model = make_model(tmp_path / "text_encoder")
    settings = model / "text_encoder.json"
    settings.write_text('{"pooling": "mean"}')
    finish(tmp_path)
    (model / "README.md").write_text("a card is the user's")
    verify_parent(model)
    settings.write_text('{"pooling": "last"}')
    with pytest.raises(
        HandoffError, match=r"text_encoder/text_encoder\.json changed after stage1_"
    ):
        verify_parent(model)


def test_of_many_changed_files_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    """A copy that lost its dates and some bytes listed hundreds of shards on one line."""
    model = make_model(tmp_path / "model")
    for number in range(300):
        (model / f"shard-{number:03}.safetensors").write_bytes(b"as written")
    finish(tmp_path)
    for number in range(300):
        (model / f"shard-{number:03}.safetensors").write_bytes(b"cut")
    with pytest.raises(HandoffError, match=r"model/shard-007\.safetensors and 292 more") as told:
        verify_parent(model)
    assert "shard-008" not in str(told.value) and len(str(told.value)) < 800


def test_a_bidirectional_model_is_no_decoder() -> None:
    with pytest.raises(HandoffError, match=r"models/x: is_causal"):
        refuse_bidirectional(SimpleNamespace(is_causal=False), "models/x")
    refuse_bidirectional(SimpleNamespace(is_causal=True), "models/x")
    refuse_bidirectional(SimpleNamespace(), "models/x")


def test_complete_needs_manifest_recipe_outputs_and_unchanged_parents(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    make_model(parent / "model")
    finish(parent)
    foreign = make_model(tmp_path / "foreign")
    out = tmp_path / "out"
    recipe = make_recipe(out, seed=1)
    make_model(out / "model")
    assert not is_complete(out, recipe)
    parents = {"model": parent / "model", "llm": foreign, "hub": "a/b"}
    finish(out, recipe, parents=parents)
    assert is_complete(out, recipe)
    assert is_complete(out, make_recipe(out, seed=1, notes="other"))
    assert not is_complete(out, make_recipe(out, seed=2))

    (out / "model").rename(out / "moved")
    assert not is_complete(out, recipe)
    (out / "moved").rename(out / "model")
    assert is_complete(out, recipe)

    finish(parent, seconds=99.0)
    assert not is_complete(out, recipe)
    finish(out, recipe, parents=parents)
    assert is_complete(out, recipe)
    make_model(foreign, weights="new weights")
    assert not is_complete(out, recipe)


def test_an_output_dir_belongs_to_one_recipe(tmp_path: Path) -> None:
    def recipe(**changes: object) -> Stage1Recipe:
        section = TextEncoderSection(language_model="m", pooling=changes.pop("pooling", "mean"))  # type: ignore[arg-type]
        values = {
            "output_dir": str(tmp_path / "o"),
            "train": [],
            "text_encoder": section,
            **changes,
        }
        return Stage1Recipe.model_validate(values)

    assert claim_output_dir(recipe()) == tmp_path / "o"
    # a run that stopped at too many bad records goes on with a larger budget
    assert claim_output_dir(recipe(max_bad_records=5)) == tmp_path / "o"
    assert claim_output_dir(recipe(notes="again")) == tmp_path / "o"
    assert "again" in (tmp_path / "o" / RESOLVED_NAME).read_text()
    # neither did one that was refused, or killed, before it had made anything
    claim_output_dir(recipe(pooling="last"))
    claim_output_dir(recipe())
    (tmp_path / "o" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    claim_output_dir(recipe())
    (tmp_path / "o" / "checkpoints" / "checkpoint-1" / SEAL_NAME).touch()
    with pytest.raises(
        HandoffError, match=r"text_encoder\.pooling: was 'mean', is now 'last'.*delete"
    ):
        claim_output_dir(recipe(pooling="last"))
    with pytest.raises(HandoffError, match=r"scale: was 50\.0, is now 20\.0"):
        claim_output_dir(recipe(scale=20.0))
    (tmp_path / "o" / RESOLVED_NAME).write_text("of_old: 1")
    with pytest.raises(HandoffError, match="this version does not read"):
        claim_output_dir(recipe())


def test_a_run_goes_on_from_its_own_parents_only(tmp_path: Path) -> None:
    tower = make_model(tmp_path / "stage2b" / "tower")
    cache, out = tmp_path / "cache", tmp_path / "out"
    finish(cache, fingerprints={"text_weights": "a"})
    parents = {"tower": tower, "cache": cache, "llm": "a/b", "rows": tmp_path / "none.jsonl"}
    claim_parents(out, parents, resumes=False)
    finish(cache, fingerprints={"text_weights": "a"}, extra={"rows": 9})  # it has grown
    finish(tower.parent, seconds=9.0)
    claim_parents(out, parents, resumes=True)
    make_model(tower, weights="other")
    with pytest.raises(HandoffError, match=r"another tower: .*stage2b/tower has been made"):
        claim_parents(out, parents, resumes=True)
    claim_parents(out, parents, resumes=False)  # nothing is there yet
    finish(cache, fingerprints={"text_weights": "b"})
    with pytest.raises(HandoffError, match="began with another cache"):
        claim_parents(out, parents, resumes=True)


def test_what_was_written_must_still_lie_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = make_recipe(out)
    weights = make_model(out / "model") / "model.safetensors"
    (out / "results.json").write_text("{}")
    (out / "dropped.jsonl").write_text("")
    finish(out, recipe)
    assert is_complete(out, recipe)
    (out / "notes.txt").write_text("mine")  # more is no matter
    os.utime(weights, ns=(5, 5))  # nor is a date
    assert is_complete(out, recipe)
    refuse_changed_outputs(out)
    shutil.copytree(out, tmp_path / "copy")
    assert is_complete(tmp_path / "copy", recipe)
    for change in ("v", "ww", ""):
        weights.write_text(change)
        assert not is_complete(out, recipe)
        with pytest.raises(HandoffError, match=r"model/model.safetensors was changed after stage1"):
            refuse_changed_outputs(out)
    weights.unlink()
    assert not is_complete(out, recipe)
    refuse_changed_outputs(out)  # it may be made again
    make_model(out / "model")
    assert is_complete(out, recipe)
    (out / "results.json").write_text("[]")
    assert not is_complete(out, recipe)


@pytest.mark.parametrize("how", ["changed", "shrunk", "gone", "added"])
def test_data_are_parents(tmp_path: Path, how: str) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.jsonl").write_text("row\nrow\n")
    parents = {"train.0": str(data / "*.jsonl")}
    recipe = make_recipe(out)
    states = claim_parents(out, parents, resumes=False)
    finish(out, recipe, parents={**parents, **states})
    assert is_complete(out, recipe)
    for file in data.iterdir():
        os.utime(file, ns=(5, 5))
    assert is_complete(out, recipe)
    changed = data / ("c.jsonl" if how == "added" else "b.jsonl")
    if how == "gone":
        changed.unlink()
    else:
        changed.write_text({"changed": "row\nrew\n", "shrunk": "row\n", "added": "row\n"}[how])
    assert not is_complete(out, recipe)
    for resumes in (False, True):  # of a finished run, and of a killed one
        with pytest.raises(HandoffError, match=rf"data \(train.0\): {changed} has been changed"):
            claim_parents(out, parents, resumes=resumes)
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    claim_parents(out, parents, resumes=False)  # nothing was made of them


def test_a_large_data_file_is_known_by_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 100)
    file = tmp_path / "0.tar"
    file.write_bytes(b"a" * 2000)
    states = file_states([file])
    assert states[str(file)][2].startswith("pieces:")
    os.utime(file, ns=(5, 5))
    assert list(changed_files(states)) == []
    file.write_bytes(b"a" * 1999 + b"b")
    assert list(changed_files(states)) == [str(file)]
    whole = file_states([file], whole=True)
    assert whole[str(file)][2] == fingerprint_file(file)


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    path = finish(tmp_path, extra={"rows": 1})
    whole, found, chance = path.read_bytes(), read_manifest(tmp_path), random.Random(0)
    assert found is not None
    del found["sha256"]
    for _ in range(300):
        content = bytearray(whole)
        bit = chance.randrange(8 * len(whole))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            manifest = read_manifest(tmp_path) or {}
        except HandoffError as error:
            said = str(error)
            assert str(path) in said
        else:
            assert {key: manifest.get(key) for key in found} == found


def test_a_damaged_note_of_parents_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", "\0\0"):
        (tmp_path / PARENTS_NAME).write_text(text)
        with pytest.raises(HandoffError, match=r"parents.json is damaged"):
            claim_parents(tmp_path, {}, resumes=True)


def test_the_manifest_is_json_without_surprises(tmp_path: Path) -> None:
    path = finish(tmp_path)
    assert json.loads(path.read_text())["parents"] == {}


def test_data_at_an_address_are_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, out, tags = "s3://bucket/{0..1}.tar", tmp_path / "out", ["a", "b"]
    found = lambda path: [FileState(f"{path}{n}", 9, tag) for n, tag in enumerate(tags)]  # noqa: E731
    monkeypatch.setattr(manifest, "look_up", found)
    states = claim_parents(out, {"train.0": address}, resumes=False)
    assert claim_parents(out, {"train.0": address}, resumes=True) == states
    tags[1] = "c"
    with pytest.raises(HandoffError, match=r"another train\.0: s3://bucket"):
        claim_parents(out, {"train.0": address}, resumes=True)
    claim_parents(out, {"train.0": address}, resumes=False)
