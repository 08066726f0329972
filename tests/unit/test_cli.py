"""The command: light to start, exact in its errors, and the doctor's findings."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import shutil
import subprocess
import sys
import textwrap
import time
import types
import warnings
from collections import namedtuple
from pathlib import Path

import pytest

import llm2clip_vlm
from llm2clip_vlm import cli, files
from llm2clip_vlm.pipeline import Pipeline, PipelineError
from llm2clip_vlm.preflight import doctor, starting
from llm2clip_vlm.recipe.pipeline import PipelineRecipe
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.stages import RECIPES
from llm2clip_vlm.recipe.suite import SuiteRecipe
from llm2clip_vlm.runs.ownership import Hold
from llm2clip_vlm.training.stage_run import NEXT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose programs say what they were called with."""
    for folder, name in (("stages", "stage3_projector"), ("eval", "run_lmms"), ("eval", "compare")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(
            textwrap.dedent(f'''\
                """The purpose of {name}."""


                def main(argv=None):
                    print("{name}", argv)
                    if "fail=1" in argv:
                        raise ValueError("the reason")
                    return 3 if "code=3" in argv else None
                ''')
        )
    monkeypatch.setattr(cli, "_require_inputs", lambda *_: None)
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "llm2clip_vlm")
    return tmp_path


def test_train_hands_recipe_and_overrides_to_the_stage(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "stage3_projector", "r.yaml", "a.b=1", "c=-2"]) == 0
    assert capsys.readouterr().out == "stage3_projector ['r.yaml', 'a.b=1', 'c=-2']\n"


def test_a_stages_exit_code_is_the_commands(checkout: Path) -> None:
    assert cli.main(["train", "stage3_projector", "r.yaml", "code=3"]) == 3


def test_a_mendable_error_is_one_message(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    assert cli.main(["train", "stage3_projector", "r.yaml", "fail=1"]) == 2
    err = capsys.readouterr().err
    assert "error: the reason" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LLM2CLIP_DEBUG", "1")
    with pytest.raises(ValueError, match="the reason"):
        cli.main(["train", "stage3_projector", "r.yaml", "fail=1"])


def test_our_own_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> None:
        raise AssertionError("ours")

    assert cli.guard(bug) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "AssertionError: ours" in err and "please report it" in err


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 69248 vs 69136",
        "PytorchStreamWriter failed writing file data/3: file write failed",
    ],
)
def test_a_full_disk_is_told_whoever_meets_it(
    message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)

    def full() -> None:
        raise RuntimeError(message)

    assert cli.guard(full) == 2
    assert "the disk is full: free space, or choose another folder" in capsys.readouterr().err


def test_an_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "stage3_projektor", "r.yaml"]) == 2
    assert "did you mean `stage3_projector`?" in capsys.readouterr().err


def test_a_stage_that_is_not_there_is_named(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "stage4_instruction", "r.yaml"]) == 2
    assert "no program `stage4_instruction`" in capsys.readouterr().err


def test_a_shipped_recipe_is_found_from_anywhere(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = checkout / "llm2clip_vlm" / "recipes" / "demo" / "x.yaml"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("")
    (checkout / "elsewhere").mkdir()
    monkeypatch.chdir(checkout / "elsewhere")
    cli.main(["train", "stage3_projector", "recipes/demo/x.yaml"])
    assert str(shipped) in capsys.readouterr().out
    Path("recipes/demo").mkdir(parents=True)
    Path("recipes/demo/x.yaml").write_text("")
    cli.main(["train", "stage3_projector", "recipes/demo/x.yaml"])
    assert "['recipes/demo/x.yaml']" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "program"), [("eval", "run_lmms"), ("compare", "compare")])
def test_evaluation_commands_are_forwarded_whole(
    checkout: Path, capsys: pytest.CaptureFixture[str], command: str, program: str
) -> None:
    assert cli.main([command, "--help", "--model", "x"]) == 0
    assert capsys.readouterr().out == f"{program} ['--help', '--model', 'x']\n"


def test_the_next_command_is_one_that_reads_what_a_stage_wrote() -> None:
    for stage, command in NEXT.items():
        assert stage in cli.STAGES
        verb, *words = command.format("OUT").split()
        if verb == "train":
            keys, fields = words[-1].partition("=")[0].split("."), RECIPES[words[0]].model_fields
            assert words[:2] == [words[0], "RECIPE"] and keys[0] in fields, command


def test_a_terminal_that_does_not_know_a_character_ends_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.guard(lambda: print("a caption: \u732b")) == 0
    assert written.getvalue() == b"a caption: \\u732b\n"


def test_help_alone_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    assert "doctor" in capsys.readouterr().out


def test_help_shows_the_stages_docstring_and_keys(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", "stage3_projector"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The purpose of stage3_projector.\n\nRecipe keys (Stage3Recipe):")
    assert 24 <= len(out.splitlines()) <= 40
    assert cli.main(["help", "stage3", "--all"]) == 0
    assert "vlm.language_model: str (required)" in capsys.readouterr().out
    assert cli.main(["help", "stage3", "vlm.language_model"]) == 0
    assert capsys.readouterr().out.startswith("vlm.language_model: str (required)\n")
    (checkout / "eval" / "run_encoder.py").write_text('"""Judge an encoder."""')
    assert cli.main(["help", "eval"]) == 0
    assert "(EncoderEvalRecipe)" in (out := capsys.readouterr().out) and "bootstrap" in out


def test_a_stage_may_be_cut_where_it_is_the_only_one(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "stage3", "r.yaml"]) == 0
    assert capsys.readouterr().out == "stage3_projector ['r.yaml']\n"
    assert cli.main(["train", "stage2", "r.yaml"]) == 2
    assert "which of stage2a_cache_text, stage2b_vision_encoder?" in capsys.readouterr().err


def test_a_suite_is_no_encoders_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "llava15"]) == 2
    assert "a suite for VLMs is given as `eval --suite llava15`" in capsys.readouterr().err
    assert cli.main(["eval", "nano/stage4"]) == 2
    assert ": `train stage4_instruction nano/stage4` runs it" in capsys.readouterr().err
    assert cli.main(["eval", "recipes/eval/wrld.yaml"]) == 2
    assert "did you mean `recipes/eval/world.yaml`?" in capsys.readouterr().err


def test_a_model_given_to_eval_is_told_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was `cannot read this file: expected a plain file, got a folder`."""
    assert cli.main(["eval", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"`eval RECIPE model={tmp_path}`" in told
    assert f"`eval --suite SUITE --checkpoint NAME={tmp_path}`" in told


def test_eval_help_names_both_roads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert told.startswith("usage: llm2clip-vlm eval [-h] [--suite SUITE]")
    assert "llm2clip-vlm eval recipes/eval/world.yaml model=DIR" in told
    assert "`llm2clip-vlm help eval`" in told
    with pytest.raises(SystemExit):
        cli.main(["eval"])
    assert "--suite FILE to score VLMs, or a recipe to judge an enc" in capsys.readouterr().err


def test_compare_says_which_folder_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(tmp_path), "/nonexistent"]) == 2
    assert "error: /nonexistent: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_completes_words(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "stage3_projector" in script and "--gpus" in script and "compare" in script
    if shell == "bash":
        ask = f"{script}\nCOMP_WORDS=(llm2clip-vlm train st); COMP_CWORD=2; COMP_LINE=x\n"
        ask += "_shtab_llm2clip_vlm; echo ${COMPREPLY[@]}\n"
        ask += "COMP_WORDS=(llm2clip-vlm init d --recipe n); COMP_CWORD=4\n"
        ask += "_shtab_llm2clip_vlm; echo ${COMPREPLY[@]}; _l2c_recipe recipes/llava15/stage3_e\n"
        for words in ("chat --top", "export --to op", "eval --su", "embed ver", "compare --fi"):
            ask += f"COMP_WORDS=(llm2clip-vlm {words}); COMP_CWORD={len(words.split())}\n"
            ask += "_shtab_llm2clip_vlm; echo ${COMPREPLY[@]}\n"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
        first, family, *files = done.stdout.splitlines()
        assert files[-5:] == ["--top-p", "open_clip", "--suite", "verify", "--fixed"], done
        assert family == "nano", done
        assert first.split() == [name for name in cli.STAGES if name.startswith("st")], done
        assert files[0] == "recipes/llava15/stage3_eva02.yaml"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_itself_completes_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    (tmp_path / "_llm2clip-vlm").write_text(capsys.readouterr().out)
    terminal, side = os.openpty()
    streams = {"stdin": side, "stdout": side, "stderr": side}
    zsh = subprocess.Popen(["zsh", "-f", "-i"], **streams, cwd=tmp_path, start_new_session=True)  # type: ignore[call-overload]
    start = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy\n"
    for typed, shown in (
        (start, "ready"),
        ("llm2clip-vlm tra\t", "train"),
        ("stage3\t", "stage3_projector"),
        ("recipes/llava15/stage3_e\t", "stage3_eva02.yaml"),
    ):
        os.write(terminal, typed.encode())
        seen, deadline = "", time.monotonic() + 60
        while shown not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        assert shown in seen
    zsh.kill()
    zsh.wait()
    os.close(terminal)
    os.close(side)


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "help", "doctor", "eval", "compare"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in cli.STAGES)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == llm2clip_vlm.__version__


def test_doctor_exits_by_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = doctor.Finding("a", "note", "absent")
    monkeypatch.setattr(doctor, "examine", lambda: iter([fine]))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == ["  note  a: absent", "nothing broken"]
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("b", "broken", "x")]))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "1 broken"


def fail(error: Exception) -> object:
    def load(name: str) -> object:
        raise error

    return load


def test_doctor_tells_an_absent_torchvision_from_a_broken_one() -> None:
    present, absent = (lambda _: object()), (lambda _: None)
    broken = fail(RuntimeError("operator torchvision::nms does not exist\nmore"))
    assert doctor.torchvision_state(broken, absent).state == "ok"  # type: ignore[arg-type]
    found = doctor.torchvision_state(broken, present)  # type: ignore[arg-type]
    assert found.state == "broken"
    assert "RuntimeError: operator torchvision::nms does not exist; pip uninstall" in found.detail
    assert doctor.torchvision_state(lambda _: object(), present).state == "ok"


def test_doctor_names_a_torch_that_does_not_import() -> None:
    found = doctor.torch_state(fail(OSError("libcudart.so.13: not found")))  # type: ignore[arg-type]
    assert found.state == "broken"
    assert "libcudart" in found.detail


@pytest.mark.parametrize(("built", "advice"), [(None, "torch for CUDA"), ("13.0", "a driver for")])
def test_doctor_says_what_a_gpu_would_need(
    monkeypatch: pytest.MonkeyPatch, built: str | None, advice: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    found = doctor.torch_state()
    assert found.state == "note" and f"if there is one, install {advice}" in found.detail


@pytest.mark.parametrize(
    ("token", "status", "state", "told"),
    [
        (None, None, "note", "does not answer"),
        (None, 200, "note", "hf auth login"),
        ("hf_secret", 200, "ok", "knows the token"),
        ("hf_secret", 401, "broken", "refuses the token (401): hf auth login"),
    ],
)
def test_doctor_asks_the_hub_and_shows_no_token(
    monkeypatch: pytest.MonkeyPatch, token: str | None, status: int | None, state: str, told: str
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(doctor, "ask_hub", lambda _: status)
    found = doctor.hub_access_state()
    assert found.state == state and told in found.detail and "hf_secret" not in found.detail


def test_doctor_sees_little_space_and_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(1e9))
    assert doctor.disk_state().state == "note" and "1 GB free here" in doctor.disk_state().detail
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(1e12))
    assert doctor.disk_state().state == "ok"
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("OMP_NUM_THREADS", "8,2")
    for load, state, told in ((0.1, "ok", "8 idle"), (6.0, "note", "export OMP_NUM_THREADS=2")):
        monkeypatch.setattr(doctor.os, "getloadavg", lambda load=load: (load, 0, 0))
        found = doctor.threads_state()
        assert found.state == state and told in found.detail


def test_doctor_checks_the_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    assert doctor.hub_folder_state().state == "ok"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert doctor.hub_folder_state().state == "broken"


def test_starting_the_command_and_the_package_is_light() -> None:
    code = """
        import sys
        import llm2clip_vlm
        assert "pydantic" not in sys.modules
        import llm2clip_vlm.cli, llm2clip_vlm.recipe.base
        heavy = {"torch", "transformers", "numpy", "peft", "deepspeed", "lmms_eval"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_lazy_and_complete() -> None:
    assert set(llm2clip_vlm.__all__) <= set(dir(llm2clip_vlm))
    for name in llm2clip_vlm.__all__:
        assert getattr(llm2clip_vlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm2clip_vlm.nothing


def test_what_recipes_name_is_found_as_shipped(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed wheel: suites, recipes of a pipeline, accelerate's files, frozen models."""
    package = checkout / "llm2clip_vlm"
    texts = {
        "recipes/accelerate/ddp.yaml": "{}",
        "recipes/demo/stage3.yaml": "{}",
        "recipes/demo/base/model.safetensors": "weights",
        "recipes/demo/pipeline.yaml": """
output_dir: runs/x
frozen: {recipes/demo/base/model.safetensors: "0000"}
steps:
  - {name: "s-{a}", program: stage3_projector, recipe: "recipes/demo/{a}.yaml",
     launch: [accelerate, launch, --config_file, recipes/accelerate/ddp.yaml],
     for_each: {a: [stage3]}, overrides: {vlm.vision_tower: recipes/demo/base}}
""",
        "eval_assets/suites/s.yaml": "tasks: [{task: gqa}]",
    }
    for name, text in texts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (checkout / "elsewhere").mkdir()
    monkeypatch.chdir(checkout / "elsewhere")
    assert load_recipe("eval/suites/s.yaml", SuiteRecipe).tasks[0].task == "gqa"
    started = Pipeline(load_recipe("recipes/demo/pipeline.yaml", PipelineRecipe))
    (job,) = started.jobs
    assert job.recipe[0] == str(package / "recipes/demo/stage3.yaml")
    assert job.recipe[1] == f"vlm.vision_tower={package / 'recipes/demo/base'}"
    assert (job.step.launch or [])[-1] == str(package / "recipes/accelerate/ddp.yaml")
    with pytest.raises(PipelineError, match=r"expected SHA-256 0000, got [0-9a-f]{64}"):
        started.run()
    for name in ("recipes/none.yaml", "recipes/../x", "eval/" + "a" * 5000, "recipes/a\0b"):
        assert files.find_shipped(name) == name


def test_gpus_start_accelerate_with_the_stages_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    started: list[list[str]] = []
    monkeypatch.setattr(cli, "_require_inputs", lambda *_: None)
    monkeypatch.setattr(starting.os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for words, file in (
        (["stage3", "llava15/stage3"], "zero2"),
        (["stage4", "llava15/stage4"], "zero3"),
        (["stage4", "llava15/stage4_7b_24gb"], "ddp"),
        (["stage2b", "paper_v6/stage2b", "seed=1"], "ddp"),
        (["stage3", "llava15/stage3", "--accelerate", "zero2", "seed=2"], "zero2"),
        (["stage4", "llava15/stage4", "--accelerate", "zero2"], "zero2"),
    ):
        assert cli.main(["train", *words, "--gpus", "4"]) is not None
        command = started.pop()
        assert command[1:3] == ["-m", "accelerate.commands.launch"]
        assert command[command.index("--config_file") + 1].endswith(
            f"recipes/accelerate/{file}.yaml"
        )
        assert command[command.index("--num_processes") + 1] == "4"
        program, recipe = (Path(word) for word in command[9:11])
        assert program.is_file() and program.stem.startswith(words[0]) and recipe.is_file()
        assert command[11:] == [word for word in words if "=" in word]
    for words, told in (
        (["stage3", "llava15/stage3", "--gpus", "8"], "torch sees 4 of them"),
        (["stage3", "llava15/stage3", "--gpus", "2", "--accelerate", "zeor3"], "mean `zero3`"),
        (["pipeline", "demo/pipeline", "--gpus", "2"], "name their launcher themselves"),
    ):
        assert cli.main(["train", *words]) == 2 and not started
        assert told in capsys.readouterr().err


def test_a_word_that_no_command_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "stage3", "r.yaml", "--gpu", "2", "--nope"], ["doctor", "now"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trian stage3 r.yaml", "did you mean `train`?"),
        ("train stage3 nano/stage3 --gpsu 2", "train: error: unrecognized arguments: --gpsu 2; "),
        ("train stage3 nano/stage3 --gpsu 2", "did you mean `--gpus`?"),
        ("train stage3 nano/stage3 --gpus 0", "expected a whole number from 1 on, got 0"),
        ("plan nano/stage3 --price -2", "expected a number from 0 on, got -2"),
        ("export a --to tim b", "did you mean `timm`?"),
        ("convert a --partail b", "did you mean `--partial`?"),
        ("convert a --set image_size b", "--set: expected KEY=VALUE, got image_size"),
        ("convert a --image-size x b", "expected a whole number from 1 on, got x"),
        ("push a b/c --pubic", "did you mean `--public`?"),
        ("embed verfy d", "did you mean `verify`?"),
        ("compare a b --fixd c", "did you mean `--fixed`?"),
        ("eval --suite nano --limit 0", "expected a whole number from 1 on, got 0"),
        ("app --port 99999", "--port: expected a whole number from 1 to 65535, got 99999"),
        ("chat m --max-new-tokens 0", "expected a whole number from 1 on, got 0"),
        ("chat m --temperature nan", "expected a number from 0 on, got nan"),
        ("chat m --top-p 3", "--top-p: expected a number from 0.001 to 1, got 3"),
        ("chat m --seed -1", "--seed: expected a whole number from 0 to 4294967295"),
        ("chat m --repetition-penalty nan", "expected a number from 0.001 on, got nan"),
        ("search m f -n 0", "--count: expected a whole number from 1 on, got 0"),
    ],
)
def test_the_parser_names_the_nearest_word_and_the_bounds(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_help_takes_keys_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "stage4", "--all", "checkpoint", "seed"]) == 0
    told = capsys.readouterr().out
    assert "checkpoint" in told and "seed" in told and "Recipe keys" not in told


def test_what_is_required_is_named_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "stage3"], ["plan"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert capsys.readouterr().err.endswith("arguments are required: RECIPE\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "nano/stage33"], "there is no such file; did you mean `nano/stage3`?"),
        (["plan", "demo/pipeline"], "got none; of a pipeline, plan the recipes of its steps"),
        (["plan", "nano/stage3", "--gpus", "0"], "--gpus: expected a whole number from 1 on, got"),
        (["plan", "nano/stage3", "--mfu", "35"], "--mfu: expected a number from 0.001 to 1"),
        (["plan", "nano/stage3", "plane=1"], "plane: unknown key; did you mean `plain`?"),
        (["train", "stage4", "nano/stage3", "--dry-run"], "stage: expected stage4_instruction, go"),
        (["train", "stage4", "nano/stage4", "--accelerate", "zero3"], "expected --gpus beside it"),
    ],
)
def test_a_plan_of_something_wrong_is_refused_before_torch_is_imported(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llm2clip_vlm.preflight.plan", None)
    try:
        code: int | str | None = cli.main(words)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2 and told in capsys.readouterr().err


def test_eval_ends_as_the_other_commands_do(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra `eval`)")
    assert cli.main(["eval", "--suite", "nano", "--prefetch", "tasks.0.tusk=1"]) == 2
    assert "error: " in (told := capsys.readouterr().err) and "tusk" in told


def test_a_dry_run_plans_the_gpus_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, int, bool]] = []
    plan = types.ModuleType("plan")
    note = lambda *given: asked.append((given[-1].gpus, given[-1].zero, given[-1].offload))  # noqa: E731
    monkeypatch.setattr(plan, "main", note, raising=False)
    monkeypatch.setitem(sys.modules, "llm2clip_vlm.preflight.plan", plan)
    assert cli.main(["train", "stage3", "nano/stage3", "--gpus", "8", "--dry-run"]) == 0
    assert cli.main(["train", "stage3", "nano/stage3", "--dry-run", "seed=1"]) == 0
    # split as it would be started, not as a launch line in the recipe's comments has it
    assert cli.main(["train", "stage4", "nano/stage4", "--gpus", "2", "--dry-run"]) == 0
    own = tmp_path / "own.yaml"
    own.write_text("deepspeed_config: {zero_stage: 2, offload_optimizer_device: cpu}\n")
    for file in ("ddp", str(own)):
        words = ["train", "stage4", "nano/stage4", "--gpus", "2", "--accelerate", file]
        assert cli.main([*words, "--dry-run"]) == 0
    shards = [(8, 2, False), (1, 0, False), (2, 3, False), (2, 0, False), (2, 2, True)]
    assert asked == shards


@pytest.mark.parametrize("name", ["llava15", "real", "nano", "webdataset"])
def test_init_makes_a_folder_that_holds_all_it_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", str(tmp_path / "mine"), "--recipe", name]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    assert Path("README.md").read_text().startswith("# ")
    for file in Path().rglob("*.yaml"):
        text = file.read_text()
        for named in re.findall(r"\b(?:recipes|eval)/[\w./-]+\.(?:yaml|jinja)\b", text):
            assert Path(named).is_file(), f"{file} names {named}"
        for beside in re.findall(r"(?m)(?:\$schema=|^base: *)(\S+)", text):
            assert (file.parent / beside).is_file(), f"{file} names {beside}"
    assert cli.main(["init", str(tmp_path / "mine"), "--recipe", name]) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/x/y", "/proc/y", sys.executable + "/y"])
def test_a_place_that_cannot_be_written_is_named_with_what_to_do(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", place, "--recipe", "nano"]) == 2
    told = capsys.readouterr().err
    assert f"{place}: cannot be written (" in told and "choose another place" in told
    assert "Errno" not in told
    with pytest.raises(OSError, match="choose another place"):
        Hold(place, "test", {"a"})


def test_init_knows_which_families_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", str(tmp_path / "mine"), "--recipe", "lava15"]) == 2
    assert "did you mean `llava15`?" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_warnings_that_only_we_can_act_on_are_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program() -> None:
        for module in ("transformers.modeling_utils", "mine"):
            warnings.warn_explicit(f"of {module}", FutureWarning, "x.py", 1, module)
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
        logging.getLogger("DeepSpeed").warning("something else")

    monkeypatch.setattr(sys, "warnoptions", [])
    heard: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    logging.getLogger("DeepSpeed").addHandler(handler)
    try:
        with pytest.warns(FutureWarning) as told:
            assert cli.guard(program) == 0
    finally:
        logging.getLogger("DeepSpeed").removeHandler(handler)
    assert [str(warning.message) for warning in told] == ["of mine"]
    assert heard == ["something else"]
