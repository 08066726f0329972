"""What `plan` says of a training step beside what the step takes: FLOPs and peak memory.

Stages 1, 2b, 3 and 4, each with a tiny model and with SmolLM2-135M and EfficientNet-Lite0 (what
`make real` leaves in `runs/real`; left out where it or timm is not there). A process of its own
runs the stage's own program up to its third optimizer step: FLOPs by torch's counter inside of
`Trainer.training_step`, memory as the largest resident set (VmHWM, set back as the second step
begins). Both are of one process on the CPU, whose C library gives each freed tensor back at once
(MALLOC_MMAP_THRESHOLD_): otherwise it keeps holes between tensors (with SmolLM2 20 to 27 % more
than `plan` says), which are its allocator's and not the step's. Such a process holds 0.6 GB beside
the model (imported libraries, tokenizer, tables), which is added to what `plan` says.

    python benchmarks/plan_check.py [--only stage3_projector] [--size tiny | --quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
PROCESS_BYTES = 0.6e9
GOALS = {"flops": 0.05, "memory": 0.15}
STAGES = ("stage1_text_encoder", "stage2b_vision_encoder", "stage3_projector", "stage4_instruction")


def tiny_recipes(folder: Path) -> dict[str, list[str]]:
    """Recipes of tiny models, written with their data into a folder."""
    from tests.tiny import WORDS, build_clip, build_llm
    from tests.vlm_fixtures import write_llava

    clip, llm = build_clip(folder / "clip"), build_llm(folder / "llm")
    llava = write_llava(folder, count=64)
    rows = [
        {"id": str(n), "image": f"images/{n}.png"}
        | {"captions": [" ".join(WORDS[n % 40 + k : n % 40 + k + 6 + n % 5]) for k in (0, 9)]}
        for n in range(64)
    ]
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"trainer": {"max_steps": STEPS + 1, "per_device_train_batch_size": 16}}
    common |= {"global_batch_size": 32}
    vlm = common | {"data": [{"path": str(llava)}], "max_length_tokens": 64}
    once = {"trainer": {**common["trainer"], "per_device_train_batch_size": 32}}
    parts = {"vision_tower": str(clip), "language_model": str(llm)}
    recipes: dict[str, dict[str, Any]] = {
        "stage1_text_encoder": common
        | once
        | {"text_encoder": {"language_model": str(llm)}, "train": [{"path": str(captions)}]},
        "stage2b_vision_encoder": common
        | once
        | {"vision_tower": str(clip), "train": [{"path": str(captions)}]}
        | {"embedding_cache": str(folder / "stage2a_cache_text"), "projection_dim": 32},
        "stage2a_cache_text": {"text_encoder": {"language_model": str(llm)}}
        | {"sources": [{"path": str(captions)}]},
        "stage3_projector": vlm | {"vlm": parts, "trainable": {"multi_modal_projector": 1e-3}},
        "stage4_instruction": vlm
        | {"checkpoint": str(folder / "stage3_projector" / "model")}
        | {"trainable": {"multi_modal_projector": 1e-3, "language_model": 1e-3}},
    }
    for stage, recipe in recipes.items():
        recipe |= {"stage": stage, "output_dir": str(folder / stage)}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return {stage: [str(folder / f"{stage}.yaml")] for stage in STAGES}


def real_recipes(folder: Path) -> dict[str, list[str]]:
    """`make real`'s recipes, with steps of fewer samples."""
    built = importlib.util.find_spec("timm") is not None  # what `make real` builds its tower with
    if not built or not Path("runs/real/vlm/llm2clip/stage3/model").is_dir():
        return {}
    files = dict(zip(STAGES, ("stage1", "stage2b", "stage3", "stage4"), strict=True))
    few = {"stage1_text_encoder": 32, "stage2b_vision_encoder": 64}
    return {
        stage: [
            f"recipes/real/{name}.yaml",
            f"output_dir={folder / 'real' / stage}",
            f"global_batch_size={few.get(stage, 8)}",
            f"trainer.max_steps={STEPS + 1}",
            *(["evaluation=[]"] if stage in few else []),
        ]
        for stage, name in files.items()
    }


def run_stage(stage: str, words: list[str]) -> None:
    """Run a stage's program and print, at its last step, what its steps took. Does not return."""
    import deepspeed  # noqa: F401  (what the Trainer imports)
    import peft  # noqa: F401
    import transformers

    from llm2clip_vlm.files import find_program, load_program
    from llm2clip_vlm.models.flops import flop_counter

    program = load_program(find_program(stage))
    step = transformers.Trainer.training_step
    flops: list[float] = []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and len(flops) and not flops.count(-1):
            Path("/proc/self/clear_refs").write_text("5")
            flops.append(-1)
        if self.state.global_step == STEPS:
            found = sum(n for n in flops if n > 0) / STEPS
            print(json.dumps({"flops": found, "memory": _resident("VmHWM")}), flush=True)
            os._exit(0)
        with flop_counter() as counter:
            loss = step(self, *args, **kwargs)
        flops.append(counter.get_total_flops())
        return loss

    transformers.Trainer.training_step = counted
    program.main(words)


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def planned(words: list[str]) -> dict[str, float]:
    """What `plan` says of the same steps."""
    from llm2clip_vlm.preflight.machines import Machine
    from llm2clip_vlm.preflight.plan import make_plan
    from llm2clip_vlm.recipe.reading import load_recipe
    from llm2clip_vlm.recipe.stages import RECIPES
    from llm2clip_vlm.runs.inputs import stage_and_output

    stage = stage_and_output(Path(words[0]))[0]
    recipe = load_recipe(words[0], RECIPES[str(stage)], words[1:])
    plan = make_plan(recipe, words[0], Machine())
    return {"flops": plan.flops / plan.steps, "memory": PROCESS_BYTES + plan.held.total()}


def main() -> None:
    """Print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STAGES)
    parser.add_argument("--size", choices=("tiny", "real"))
    parser.add_argument("--quick", action="store_const", const="tiny", dest="size")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_stage(args.run[0], args.run[1:])
    sys.path.insert(0, str(ROOT))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, recipes in (("tiny", tiny_recipes(folder)), ("real", real_recipes(folder))):
            for stage, words in recipes.items():
                if args.size not in (None, size) or args.only not in (None, stage):
                    continue
                needed = {STAGES[1]: "stage2a_cache_text", STAGES[3]: STAGES[2]}.get(stage)
                if size == "tiny" and needed:
                    train = ["-m", "llm2clip_vlm.cli", "train", needed]
                    _run([*train, str(folder / f"{needed}.yaml")])
                told = planned(words)
                found = json.loads(_run([__file__, "--run", stage, *words]).splitlines()[-1])
                row: dict[str, Any] = {"stage": stage, "size": size}
                for figure, unit in (("flops", 1e9), ("memory", 1e6)):
                    row[figure] = round(told[figure] / unit, 2)
                    row[f"{figure}_measured"] = round(found[figure] / unit, 2)
                    row[f"{figure}_off"] = round(told[figure] / found[figure] - 1, 4)
                rows.append(row)
                print(
                    f"{size:5}{stage:24}GFLOP {row['flops']:>10} {row['flops_measured']:>10} "
                    f"{row['flops_off']:>+7.1%}  MB {row['memory']:>8} {row['memory_measured']:>8} "
                    f"{row['memory_off']:>+7.1%}",
                    flush=True,
                )
    print(json.dumps({"name": "plan_check", "rows": rows, "goals": GOALS}))


def _run(words: list[str]) -> str:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{ended.stderr[-3000:]}")
    return ended.stdout


if __name__ == "__main__":
    main()
