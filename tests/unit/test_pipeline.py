"""Pipelines: order, skipping, failing, stopping and going on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import llm2clip_vlm
from llm2clip_vlm.pipeline import (
    OUTPUTS_NAME,
    Pipeline,
    PipelineError,
    expand,
    finished,
    progress_of,
)
from llm2clip_vlm.recipe.pipeline import PipelineRecipe, PipelineStep
from llm2clip_vlm.recipe.reading import load_recipe
from llm2clip_vlm.recipe.text import Stage2aRecipe
from llm2clip_vlm.runs import supervise
from llm2clip_vlm.runs.cores import usable_cores
from llm2clip_vlm.runs.inputs import require_steps
from llm2clip_vlm.runs.manifest import write_manifest
from llm2clip_vlm.runs.ownership import MARKER_NAME, Hold, OwnershipError
from llm2clip_vlm.runs.shown import Seen, Shown

WORK = """
import os, sys, time
from pathlib import Path
name, output, *rest = sys.argv[1:]
with open("order.txt", "a") as handle:
    handle.write(name + "\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
print(" 40%|####      |", flush=True)
if "fail" in rest:
    print("the reason\\r 99%|###", flush=True)
    sys.exit(3)
if "launcher" in rest:
    print("error: the batch\\n  does not divide")
    print("error: another rank has lost its connection")
    print("Traceback of the launcher\\n" * 20, flush=True)
    sys.exit(1)
if "stopped" in rest:
    print("stopped by SIGTERM: step 3 is saved, the same command goes on", flush=True)
    sys.exit(0)
if "wait" in rest and not Path("go").exists():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(60)
if "count" in rest:
    Path(name + ".start").touch()
    at_once = len(list(Path(".").glob("*.start"))) - len(list(Path(".").glob("*.end")))
    Path(name + ".saw").write_text(str(at_once))
    time.sleep(0.6)
    Path(name + ".end").touch()
Path(output).write_text(name)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one program, `work`: NAME OUTPUT [fail | wait | count]."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "work.py").write_text(textwrap.dedent(WORK))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pipeline(*steps: dict[str, Any], **more: Any) -> PipelineRecipe:
    return PipelineRecipe.model_validate({"output_dir": "runs", "steps": list(steps), **more})


def step(name: str, *words: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "program": "work",
        "arguments": [name, f"{name}.out", *words],
        "outputs": [f"{name}.out"],
        **more,
    }


def order(root: Path) -> list[str]:
    return (root / "order.txt").read_text().split()


# --- expanding ----------------------------------------------------------------------------------


def test_for_each_makes_a_step_of_every_combination() -> None:
    jobs = expand(
        pipeline(
            {
                "name": "{tower}-s{seed}",
                "program": "work",
                "recipe": "recipes/{tower}.yaml",
                "for_each": {"seed": [0, 1], "tower": ["a", "b"]},
                "overrides": {"seed": "{seed}", "out": "runs/{tower}"},
                "arguments": ["--name={tower}"],
            },
        )
    )
    assert [job.name for job in jobs] == ["a-s0", "b-s0", "a-s1", "b-s1"]
    assert jobs[1].recipe == ["recipes/b.yaml", "seed=0", "out=runs/b"]
    assert jobs[1].arguments == ["--name=b"]


def test_braces_that_are_no_variable_stay() -> None:
    (job,) = expand(pipeline({"name": "x", "program": "work", "overrides": {"a": "[{p: 1}]"}}))
    assert job.recipe == ["a=[{p: 1}]"]


def test_needs_take_variables_and_stars() -> None:
    jobs = expand(
        pipeline(
            step("t{seed}", for_each={"seed": [0, 1]}),
            step("u{seed}", needs=["t{seed}"], for_each={"seed": [0, 1]}),
            step("all", needs=["t*", "u1"]),
        )
    )
    needs = {job.name: job.needs for job in jobs}
    assert needs == {"t0": [], "t1": [], "u0": ["t0"], "u1": ["t1"], "all": ["t0", "t1", "u1"]}


def test_common_overrides_go_to_steps_with_a_recipe_only() -> None:
    with_recipe, without = expand(
        pipeline(
            {"name": "a", "program": "work", "recipe": "r.yaml"},
            {"name": "b", "program": "work"},
            common={"variables.data": "w", "seed": 7},
        )
    )
    assert with_recipe.recipe == ["r.yaml", "variables.data=w", "seed=7"]
    assert without.recipe == []


def test_a_need_that_is_no_step_is_refused() -> None:
    with pytest.raises(PipelineError, match="step 'b' needs 'x', which is no step"):
        expand(pipeline(step("a"), step("b", needs=["x"])))


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(PipelineError, match="step 'a' stands twice"):
        expand(pipeline(step("a", for_each={"seed": [0, 1]})))


def test_the_command_line_is_launcher_program_recipe_overrides_arguments(root: Path) -> None:
    (job,) = expand(
        pipeline(
            {
                "name": "a",
                "program": "work",
                "recipe": "r.yaml",
                "launch": ["accelerate", "launch"],
                "overrides": {"k": 1},
                "arguments": ["--flag"],
            }
        )
    )
    program = str(root / "stages" / "work.py")
    assert job.command() == ["accelerate", "launch", program, "r.yaml", "k=1", "--flag"]


def test_a_step_may_be_a_command_of_the_package(root: Path) -> None:
    say = {"name": "a", "program": "llm2clip-vlm", "arguments": ["--version"]}
    Pipeline(pipeline(say)).run()
    assert (root / "runs" / "logs" / "a.log").read_text().strip() == llm2clip_vlm.__version__


def test_a_program_that_is_not_there_is_named(root: Path) -> None:
    (job,) = expand(pipeline({"name": "a", "program": "stage9", "outputs": []}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"stage9.*work"):
        job.command()


def stage(name: str, recipe: str, needs: list[str] | None = None) -> dict[str, Any]:
    return {"name": name, "program": "stage2a_cache_text", "recipe": recipe, "needs": needs or []}


def write_stage2a(path: str, text_encoder: str, source: str, **more: Any) -> None:
    Path("llm").mkdir(exist_ok=True)
    Path("llm/config.json").write_text("{}")
    Path("there.jsonl").write_text("{}")
    values = {"stage": "stage2a_cache_text", "output_dir": f"out/{Path(path).stem}"}
    values |= {"text_encoder": text_encoder, "sources": [{"path": source}], **more}
    Path(path).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (("llm", "none.jsonl"), r"1 thing is missing; .*\n  b: sources\.0\.path: none\.jsonl"),
        (("./nothing", "there.jsonl"), r"b: text_encoder: \./nothing: no such folder"),
        (("llm", "there.jsonl", {"sede": 1}), "sede: unknown key; did you mean `seed`"),
        (("llm", "there.jsonl", {"trainer": {"bf61": True}}), r"trainer\.bf61: unknown key; did"),
        (None, "b.yaml.*no such file"),
    ],
)
def test_what_a_later_step_lacks_is_told_before_the_first(
    root: Path, last: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stage2a("a.yaml", "llm", "there.jsonl")
    if last:
        write_stage2a("b.yaml", last[0], last[1], **(last[2] if len(last) > 2 else {}))
    with pytest.raises(ValueError, match=rf"(?s){told}"):
        Pipeline(pipeline(stage("a", "a.yaml"), stage("b", "b.yaml", ["a"]))).run()
    assert not Path("runs").exists() and not Path("out").exists()


def test_a_full_disk_is_told_though_no_log_has_room_for_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PipelineError, match=r"(?s)99%.*no space is left below runs/logs"):
        Pipeline(pipeline(step("a", "fail"))).run()


def test_a_cost_that_cannot_be_written_hides_nothing(root: Path) -> None:
    command = [sys.executable, supervise.__file__, "1", sys.executable, "-c", "print('my words')"]
    environment = {**os.environ, "LLM2CLIP_VLM_COST": str(root / "none" / "cost.json")}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"my words\n"
        assert process.wait() == 1


def test_room_for_a_later_step_is_asked_for_before_the_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stage2a("a.yaml", "llm", "there.jsonl")
    write_stage2a("b.yaml", "llm", "there.jsonl")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"(?s)2 things are missing.*b: output_dir: .* are free"):
        require_steps(expand(pipeline(stage("a", "a.yaml"), stage("b", "b.yaml", ["a"]))), "runs")


def test_what_an_earlier_step_may_make_is_not_missed(root: Path) -> None:
    write_stage2a("a.yaml", "llm", "there.jsonl")
    write_stage2a("b.yaml", "out/a/text_encoder", "runs/data.jsonl")
    require_steps(expand(pipeline(stage("a", "a.yaml"), stage("b", "b.yaml", ["a"]))), "runs")
    write_stage2a("b.yaml", "made/somewhere", "made/data.jsonl")  # a program may write anything
    steps = step("a", "a"), stage("b", "b.yaml", ["a"]), stage("c", "runs/c.yaml", ["b"])
    require_steps(expand(pipeline(*steps)), "runs")


# --- running ------------------------------------------------------------------------------------


def test_steps_run_after_what_they_need(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = pipeline(step("c", needs=["b"]), step("b", needs=["a"]), step("a"))
    seconds = Pipeline(recipe).run()
    assert order(root) == ["a", "b", "c"]
    assert set(seconds) == {"a", "b", "c"}
    assert set(json.loads((root / "runs" / "costs.json").read_text())) == {"a", "b", "c"}
    costs = json.loads((root / "runs" / "costs.json").read_text())
    assert set(costs) == {"a", "b", "c"}
    assert all(
        0 <= cost["cpu_seconds"] < 60 and cost["peak_memory_gb"] < 10 for cost in costs.values()
    )
    assert "[3/3] c: done in" in capsys.readouterr().out
    assert " 40%" in (root / "runs" / "logs" / "a.log").read_text()


def test_what_is_finished_is_skipped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = pipeline(step("a"), step("b", needs=["a"]))
    Pipeline(recipe).run()
    before = json.loads((root / "runs" / "costs.json").read_text())
    assert Pipeline(recipe).run() == {}
    assert order(root) == ["a", "b"]
    assert "b: finished before, skipped" in capsys.readouterr().out
    assert json.loads((root / "runs" / "costs.json").read_text()) == before


def test_what_needs_a_fresh_step_is_run_again(root: Path) -> None:
    recipe = pipeline(step("a"), step("b", needs=["a"]), step("c"))
    Pipeline(recipe).run()
    (root / "a.out").unlink()
    assert set(Pipeline(recipe).run()) == {"a", "b"}


def test_what_is_asked_something_else_is_run_again(root: Path) -> None:
    (root / "parent.yaml").write_text("{notes: one, rows: 3}")
    (root / "rows.yaml").write_text("{base: parent.yaml}")
    recipe = pipeline(step("a"), step("b", needs=["a"]))
    recipe.steps[0].recipe = "rows.yaml"
    recipe.steps[0].arguments[:] = ["a.out"]
    Pipeline(recipe).run()
    assert Pipeline(recipe).run() == {}
    (root / "parent.yaml").write_text("{notes: another, rows: 3}")
    assert Pipeline(recipe).run() == {}, "notes change nothing"
    (root / "parent.yaml").write_text("{notes: another, rows: 4}")
    assert set(Pipeline(recipe).run()) == {"a", "b"}
    recipe.steps[1].arguments.append("more")
    assert set(Pipeline(recipe).run()) == {"b"}
    (root / "runs/logs/asked.json").unlink()  # as earlier versions left it
    recipe.steps[1].arguments.remove("more")
    assert Pipeline(recipe).run() == {}


def test_files_that_a_recipe_names_by_its_values_and_in_any_letters_are_known(root: Path) -> None:
    for name in ("föto.json", "values.json", "given.json"):
        (root / name).write_text("1")
    text = "{variables: {kind: none}, a: föto.json, b: '${variables.kind}.json'}"
    (root / "rows.yaml").write_text(text)
    recipe = pipeline(step("a"), common={"variables.kind": "values"})
    recipe.steps[0].recipe, recipe.steps[0].arguments[:] = "rows.yaml", ["x=given.json"]
    recipe.steps[0].outputs[:] = ["variables.kind=values"]  # what the program writes to
    for name in ("föto.json", "values.json", "given.json"):
        Pipeline(recipe).run()
        assert Pipeline(recipe).run() == {}
        (root / name).write_text("2")
        assert set(Pipeline(recipe).run()) == {"a"}, name


def test_what_a_recipe_among_the_options_is_made_of_and_names_is_known(root: Path) -> None:
    """`llm2clip-vlm eval RECIPE` and `--suite FILE`."""
    (root / "val.jsonl").write_text("1")
    (root / "parent.yaml").write_text("{tasks: [{data: val.jsonl}]}")
    (root / "suite.yaml").write_text("{base: parent.yaml}")
    recipe = pipeline(step("a", "--suite", "suite.yaml", "--to", "not_there.yaml"))
    Pipeline(recipe).run()
    assert Pipeline(recipe).run() == {}
    (root / "val.jsonl").write_text("2")
    assert set(Pipeline(recipe).run()) == {"a"}
    (root / "parent.yaml").write_text("{tasks: [{data: val.jsonl, limit: 3}]}")
    assert set(Pipeline(recipe).run()) == {"a"}
    assert Pipeline(recipe).run() == {}


def test_what_was_made_by_other_code_or_of_another_file_is_made_again(root: Path) -> None:
    """A program that was edited, a file that a step names, a stage that somebody ran by hand."""
    (root / "captions.txt").write_text("one")
    (root / "stage").mkdir()
    (root / "stage/manifest.json").write_text("{}")
    (root / "stage/model").mkdir()
    recipe = pipeline(
        step("a", "source=captions.txt", "x" * 5000), step("b", "x=stage/model"), step("c"), jobs=1
    )
    Pipeline(recipe).run()
    assert Pipeline(recipe).run() == {}
    (root / "captions.txt").write_text("two")
    assert set(Pipeline(recipe).run()) == {"a"}
    (root / "stage/manifest.json").write_text('{"seconds": 2}')
    assert set(Pipeline(recipe).run()) == {"b"}
    (root / "stages/work.py").write_text(WORK + "# mended")
    assert set(Pipeline(recipe).run()) == {"a", "b", "c"}
    assert Pipeline(recipe).run() == {}


def test_what_was_made_of_an_earlier_output_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline ends after a step has run again, before what needs it has."""
    recipe, start = pipeline(step("a"), step("b", needs=["a"]), jobs=1), Pipeline._start
    Pipeline(recipe).run()
    Path("a.out").unlink()

    def killed(self: Pipeline, job: Any) -> None:
        if job.name == "b":
            raise KeyboardInterrupt
        start(self, job)

    monkeypatch.setattr(Pipeline, "_start", killed)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(recipe).run()
    monkeypatch.undo()
    monkeypatch.chdir(root)
    assert set(Pipeline(recipe).run()) == {"b"}
    assert Pipeline(recipe).run() == {}


def test_a_model_card_may_change_after_its_step(root: Path) -> None:
    """`eval` writes scores into it, and people what they know."""
    recipe = pipeline(step("a", outputs=["a.out", "model"]))
    Path("model").mkdir()
    Path("model/README.md").write_text("a card")
    Path("model/config.json").write_text("{}")
    Pipeline(recipe).run()
    Path("model/README.md").write_text("a card with scores")
    assert Pipeline(recipe).run() == {}
    Path("model/config.json").write_text('{"other": 1}')
    with pytest.raises(PipelineError, match=r"model/config\.json was changed"):
        Pipeline(recipe).run()


def test_a_step_that_ended_after_it_wrote_goes_on(root: Path) -> None:
    recipe = pipeline(step("a"))
    Pipeline(recipe).run()
    recipe.steps[0].arguments.append("late")
    more = "write_text(name * 2); sys.exit(5)"
    Path("stages/work.py").write_text(WORK.replace("write_text(name)", more))
    with pytest.raises(PipelineError, match="exit code 5"):
        Pipeline(recipe).run()
    Path("stages/work.py").write_text(WORK)
    assert set(Pipeline(recipe).run()) == {"a"}


def test_a_step_without_outputs_runs_each_time(root: Path) -> None:
    recipe = pipeline(step("a", outputs=[]))
    Pipeline(recipe).run()
    Pipeline(recipe).run()
    assert order(root) == ["a", "a"]


def test_a_failing_step_stops_the_pipeline_and_shows_its_log(root: Path) -> None:
    recipe = pipeline(step("a"), step("b", "fail", needs=["a"]), step("c", needs=["b"]), jobs=1)
    with pytest.raises(PipelineError, match=r"step 'b' ended with exit code 3") as error:
        Pipeline(recipe).run()
    assert "the end of runs/logs/b.log" in str(error.value)
    assert order(root) == ["a", "b"]
    recipe.steps[1].arguments.remove("fail")
    assert set(Pipeline(recipe).run()) == {"b", "c"}, "a is not run again"


def test_what_follows_does_not_hide_the_error_of_the_program(root: Path) -> None:
    words = r"error: the batch\n +does not divide\n +error: another"
    with pytest.raises(PipelineError, match=words):
        Pipeline(pipeline(step("a", "launcher"))).run()


def test_a_later_look_does_not_replace_what_a_step_cost(root: Path) -> None:
    recipe = pipeline(step("a", outputs=[]), step("b"), step("c", needs=["b"]))
    Pipeline(recipe).run()
    costs = json.loads((root / "runs" / "costs.json").read_text())
    costs["a"] = {"seconds": 900.0, "cpu_seconds": 800.0, "peak_memory_gb": 3.0}
    costs["b"] = costs["c"] = dict(costs["a"])
    (root / "runs" / "costs.json").write_text(json.dumps(costs))
    (root / "b.out").unlink()
    again = Pipeline(recipe)
    again.run()
    assert all(cost["cpu_seconds"] < 60 for cost in again.costs.values()), "what it took this time"
    after = json.loads((root / "runs" / "costs.json").read_text())
    assert after["a"] == costs["a"], "asked again, and nothing was to do"
    assert after["b"]["cpu_seconds"] < 60, "made again"
    assert after["c"] == costs["c"], "was complete, and asked again for the sake of b"


@pytest.mark.parametrize(
    ("jobs", "all_cores", "expected"), [(2, False, 2), (1, False, 1), (2, True, 1)]
)
def test_jobs_at_a_time(root: Path, jobs: int, all_cores: bool, expected: int) -> None:
    steps = [step(name, "count", all_cores=all_cores) for name in ("a", "b")]
    Pipeline(pipeline(*steps, jobs=jobs)).run()
    assert max(int(path.read_text()) for path in root.glob("*.saw")) == expected


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [("", {"a": "8", "b": "2"}), ("4,2", {"a": "4", "b": "2"}), ("1", {"a": "1", "b": "1"})],
)
def test_threads_are_shared(
    root: Path, monkeypatch: pytest.MonkeyPatch, allowed: str, expected: dict[str, str]
) -> None:
    """No step gets more threads than the user's own OMP_NUM_THREADS allows."""
    monkeypatch.setattr("llm2clip_vlm.pipeline.usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    recipe = pipeline(step("a", all_cores=True), step("b", needs=["a"]), jobs=4)
    Pipeline(recipe).run()
    threads = {
        name: (root / "runs" / "logs" / f"{name}.log").read_text().split()[1] for name in "ab"
    }
    assert threads == expected


def test_progress_is_the_last_bar_of_this_run(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert progress_of(log) is None
    log.write_text(" 10%|#  |\r 70%|### |")
    seen = progress_of(log)
    assert seen is not None and seen.percent == 70
    start = log.stat().st_size
    assert progress_of(log, start) is None
    with log.open("a") as handle:
        handle.write("\r 20%|##")
    seen = progress_of(log, start)
    assert seen is None, "a bar that is being written"
    with log.open("a") as handle:
        handle.write("  | 12/60 [00:10<1:02:03,  1.20it/s]\n{'loss': '1.5e-01', 'epoch': '0.1'}\n")
    seen = progress_of(log, start)
    assert seen == Seen("", 20, "12", "60", "1:02:03", "1.5e-01")
    assert str(seen) == "12/60, loss 0.15, 1:02:03 left"
    with log.open("a") as handle:
        handle.write("\rfrozen tower:   4%|4  | 3/75 [00:01<?, ?img/s]")
    assert str(progress_of(log, start)) == "frozen tower 3/75"


def kinds(**names: str) -> dict[str, PipelineStep]:
    """Steps by name, of one kind where their step of the recipe has one name."""
    return {job: PipelineStep(name=kind, program="work") for job, kind in names.items()}


def test_a_bar_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it stand at the end because the weights were loaded, or a validation is through."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_interactive=True, width=100, highlight=False)
    monkeypatch.setattr("llm2clip_vlm.runs.shown.Console", lambda **given: console)
    shown = Shown(kinds(a="t", b="t", c="u"), {"c": 60.0}, jobs=1)
    with shown.bars:
        shares = []
        for seen in (
            Seen("Loading weights", 100, "294", "294", "00:00"),
            Seen("", 10, "5", "50", "01:30"),
            Seen("", 100, "8", "8", "00:00"),
            Seen("", 8, "4", "50", "01:32"),
            Seen("", 40, "20", "50", "01:00", "2.125"),
        ):
            shown.update({"a": seen})
            shares.append(next(t.completed for t in shown.bars.tasks if t.description == "a"))
        assert shares == [0.0, 0.1, 0.1, 0.1, 0.4]
        whole, step = shown.bars.tasks
        assert step.fields["state"] == "20/50, loss 2.125, 01:00 left"
        assert whole.completed == pytest.approx(0.4) and whole.fields["state"] == ""
        shown.end("a", "done in 100 s", 100.0)
        shown.update({"b": Seen("", 50, "25", "50", "00:50")})
        assert whole.fields["state"] == "about 0:01:50 left"  # 50 s, and c's earlier 60
    assert "[1/3] a: done in 100 s" in drawn.getvalue()


def test_without_a_terminal_there_is_a_plain_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm2clip_vlm.runs.shown._PLAIN_EVERY_S", -1.0)
    shown = Shown(kinds(a="t", b="t"), {"b": 3600.0}, jobs=1)
    with shown.bars:
        shown.update({"a": None})
        shown.update({"a": Seen("", 40, "20", "50", "01:00", "2.125")})
        shown.end("a", "done in [100] s " + "x" * 90, 100.0)
    assert capsys.readouterr().out.splitlines() == [
        "[0/2] a; all: about 2:00:00 left",
        "[0/2] a 20/50, loss 2.125, 01:00 left; all: about 1:01:00 left",
        "[1/2] a: done in [100] s " + "x" * 90,
    ]


def test_the_time_left_is_guessed_from_another_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of every core follow each other; the others share, and none ends before the longest."""
    monkeypatch.setattr("llm2clip_vlm.runs.shown._PLAIN_EVERY_S", -1.0)
    sizes = {"a": 100, "b": 200, "c": 30, "d": 40}
    steps = {
        name: PipelineStep(name=name, program="work", seconds=size, all_cores=name in "ab")
        for name, size in sizes.items()
    }
    shown = Shown(steps, {}, jobs=2)
    with shown.bars:
        shown.update({})
        shown.end("a", "done", 50.0)
        shown.update({})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[0/4] all: about 0:05:40 left"
    assert lines[2] == "[1/4] all: about 0:02:00 left", "twice as fast as where it was measured"


# --- finished, by manifest ----------------------------------------------------------------------


def test_a_stage_is_finished_by_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"captions": ["a"]}\n')
    path = tmp_path / "stage2a.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\ntext_encoder: some/encoder\n"
        f"sources:\n  - path: {tmp_path}/captions.jsonl\n"
    )

    def job(**overrides: Any) -> Any:
        given = {"name": "a", "program": "stage2a_cache_text", "recipe": str(path)}
        return expand(pipeline({**given, "overrides": overrides}))[0]

    assert not finished(job())
    write_manifest(
        tmp_path / "out",
        stage="stage2a_cache_text",
        recipe=load_recipe(path, Stage2aRecipe),
        parents={"source": str(tmp_path / "captions.jsonl")},
        fingerprints={},
        seconds=1.0,
    )
    assert finished(job())
    assert finished(job(notes="another text")), "notes change nothing"
    assert not finished(job(batch_tokens=7)), "another recipe"
    (tmp_path / "captions.jsonl").write_text('{"captions": ["b"]}\n')
    assert not finished(job()), "another parent"


# --- stopping -----------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # an orphan that nobody waits for is dead, too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_stopped_pipeline_stops_its_steps_and_goes_on(root: Path, repo_root: Path) -> None:
    recipe = {
        "output_dir": "runs",
        "steps": [step("a"), step("b", "wait", needs=["a"]), step("c", needs=["b"])],
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, str(repo_root / "stages" / "pipeline.py"), "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}

    running = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, pid = time.monotonic() + 120, root / "pid"
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    child = int((root / "pid").read_text())
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; the same command goes on where it was" in errors
    assert not alive(child)
    assert order(root) == ["a", "b"]

    (root / "go").touch()
    again = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "a: finished before, skipped" in again.stdout
    assert order(root) == ["a", "b", "b", "c"]


def test_a_changed_frozen_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    frozen = tmp_path / "weights.bin"
    frozen.write_bytes(b"as it was")
    digest = hashlib.sha256(b"as it was").hexdigest()
    recipe = PipelineRecipe(
        output_dir=str(tmp_path / "out"), steps=[], frozen={str(frozen): digest}
    )
    assert Pipeline(recipe).run() == {}
    frozen.write_bytes(b"changed")
    with pytest.raises(PipelineError, match=r"frozen file .*weights\.bin"):
        Pipeline(recipe).run()


def test_steps_that_need_each_other_are_refused() -> None:
    steps = [
        {"name": "a", "program": "x", "needs": ["b"]},
        {"name": "b", "program": "x", "needs": ["a"]},
    ]
    recipe = PipelineRecipe.model_validate({"output_dir": "out", "steps": steps})
    with pytest.raises(PipelineError, match="in a circle"):
        expand(recipe)


def test_outputs_are_filled_in_for_each_value(root: Path) -> None:
    many = step("{x}", outputs=["{x}.out"], for_each={"x": ["a", "b"]})
    assert [job.outputs for job in expand(pipeline(many))] == [["a.out"], ["b.out"]]


DAUGHTERS = """
import os, subprocess, sys, time
from pathlib import Path
if "leaf" not in sys.argv:  # in a session of its own, as torch's launcher has its workers
    subprocess.Popen([sys.executable, __file__, "leaf"], start_new_session=True)
else:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
Path(f"pid-{os.getpid()}").touch()
time.sleep(120)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_dying_pipeline_takes_its_steps_along(root: Path, number: int) -> None:
    (root / "stages" / "daughters.py").write_text(textwrap.dedent(DAUGHTERS))
    values = {"output_dir": "runs", "steps": [{"name": "a", "program": "daughters"}]}
    (root / "p.yaml").write_text(json.dumps(values))
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    command = [sys.executable, str(here / "stages" / "pipeline.py"), "p.yaml"]
    # A shell starts what it has in the background deaf to SIGINT, and so are these tests then.
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGINT, heard)
    deadline = time.monotonic() + 60
    while len(found := list(root.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    steps = [int(path.name.removeprefix("pid-")) for path in found]
    assert len(steps) == 2 and all(map(alive, steps))
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, steps)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, steps))


def test_a_step_that_was_stopped_is_not_finished(root: Path) -> None:
    """A stage that SIGTERM ends has saved its step, and ends with exit code 0."""
    recipe = pipeline(step("a", "stopped"), step("b", needs=["a"]))
    with pytest.raises(PipelineError, match="step 'a' was stopped by SIGTERM; the same command"):
        Pipeline(recipe).run()
    assert (root / "order.txt").read_text() == "a\n"


def test_a_second_pipeline_is_refused(root: Path) -> None:
    recipe = pipeline(step("a", "wait"))
    hold = Hold(Path("runs/logs"), "a pipeline", ["a.log"])
    path = Path("runs/logs") / MARKER_NAME
    content = json.loads(path.read_text())
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    hold.release()
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    path.write_text(json.dumps({**content, "holder": {**content["holder"], "process": holder.pid}}))
    with pytest.raises(OwnershipError, match=f"a pipeline, process {holder.pid} on"):
        Pipeline(recipe).run()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert not (root / "order.txt").exists()


HOLD = """
import fcntl, sys, time
handle = open(sys.argv[1], "r+")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_outputs_must_be_what_they_were(root: Path) -> None:
    recipe = pipeline(step("a"), step("b"))
    Pipeline(recipe).run()
    os.utime("a.out", ns=(5, 5))
    assert Pipeline(recipe).run() == {}
    Path("a.out").unlink()
    assert set(Pipeline(recipe).run()) == {"a"}
    Path("b.out").write_text("edited")
    with pytest.raises(PipelineError, match=r"b\.out was changed after step 'b' wrote it"):
        Pipeline(recipe).run()
    assert Path("b.out").read_text() == "edited"
    (root / "runs" / "logs" / OUTPUTS_NAME).unlink()  # not known: existing is enough
    assert Pipeline(recipe).run() == {}


def test_foreign_files_are_no_pipelines(root: Path) -> None:
    recipe = pipeline(step("a"))
    (root / "runs" / "logs").mkdir(parents=True)
    (root / "runs" / "logs" / "a.log").write_text("mine")
    with pytest.raises(OwnershipError, match=r"a\.log"):
        Pipeline(recipe).run()
    assert (root / "runs" / "logs" / "a.log").read_text() == "mine"
    (root / "runs" / "logs" / "a.log").unlink()
    for text in ("[1]", "{", '{"a": 5}', '{"a": {"seconds": 1}}'):
        (root / "runs" / "costs.json").write_text(text)
        with pytest.raises(OwnershipError, match=r"costs\.json is no file of a pipeline"):
            Pipeline(recipe).run()
    assert not (root / "order.txt").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_step_gets_the_cores_that_the_pipeline_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


SAVES = """
import signal, time
from pathlib import Path
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
Path("waits").touch()
while not stopped:
    time.sleep(0.05)
time.sleep(1.5)
Path("saved").touch()
"""


@pytest.mark.parametrize("grace_s", [1, 60])
def test_a_step_has_its_grace_to_save(root: Path, grace_s: int) -> None:
    (root / "stages" / "saves.py").write_text(SAVES)
    made = Pipeline(pipeline({"name": "a", "program": "saves"}, grace_s=grace_s))
    made.logs.mkdir(parents=True)
    made._start(made.jobs[0])
    while not (root / "waits").exists():
        time.sleep(0.05)
    began = time.monotonic()
    made._stop_all()
    assert (root / "saved").exists() is (grace_s > 1)
    assert time.monotonic() - began < 10
