"""What scoring costs beside generating: our lmms-eval runner, and lmms-eval's built-in `llava_hf`.

One LLaVA of random weights (ViT with 49 patches, 256 wide, 6 layers each side; random, since only
time is asked for), 1,000 yes/no questions of the drawn world, four tokens an answer, fp32.

- `generation`: `Generator.generate` on the same prompts, model and batches, nothing else.
- `runner`: `run_suite` as `eval/run_lmms.py` calls it: hashing, a process of its own, the import of
  lmms-eval, loading, pictures, prompts, generation, scoring, samples and results on disk.
- `evaluation`: the part of it from the call of `simple_evaluate` on.
- `builtin`: lmms-eval's `llava_hf` (chat) in a process of its own, at the only batch size that it
  takes (1), on the first documents, from the call of `simple_evaluate` on. `decord`, which it
  imports for videos, is replaced by an empty module.

`ours` is runner ÷ generation in wall time; `ratio` the questions per second of `evaluation` ÷ those
of `builtin`. The first shrinks with the size of the model, whose generation is all that grows.

    python benchmarks/lmms_overhead.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from arms import finish
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm2clip_vlm.data.reading.images import open_image
from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.evaluation.vlm.jobs import own_tasks, run_suite, task_yaml
from llm2clip_vlm.evaluation.vlm.worker import build_task, quiet
from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint, save_vlm
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from world.files import SIZES, WorldConfig, ensure_world

TASK, BATCH, TOKENS, WIDTH = "l2c_world_exist", 64, 4, 256
TOKENIZER = Path(__file__).resolve().parents[1] / "recipes/demo/base/models/language_model"
GOALS = {"ours": 1.25, "ratio": 3.0}


def main() -> None:
    """Builds the model, runs the arms in turn, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, fewer questions")
    parser.add_argument("--builtin", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.builtin:
        checkpoint, data, number = given.builtin
        print(json.dumps(builtin_seconds(checkpoint, Path(data), int(number))))
        return
    rounds, number, asked = (1, 200, 20) if given.quick else (5, 1000, 100)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = make_checkpoint(folder / "model")
        few = dict.fromkeys(SIZES, 2) | {"exist_test": SIZES["exist_test"]}
        world = ensure_world(WorldConfig(dir=str(folder / "world")), sizes=few)
        data = world / "exist_test.jsonl"
        task = LmmsTask(
            task=TASK,
            data_files=str(data),
            overrides={"generation_kwargs": {"max_new_tokens": TOKENS}},
            max_empty=1.0,
        )
        suite = SuiteRecipe(tasks=[task], batch_size=BATCH, dtype="float32", device="cpu")
        generate = pure_generation(checkpoint, data, number)
        generate(BATCH)
        wall: dict[str, list[float]] = {
            "generation": [],
            "runner": [],
            "evaluation": [],
            "builtin": [],
        }
        for turn in range(rounds):
            started = time.perf_counter()
            generate(number)
            wall["generation"].append(time.perf_counter() - started)
            started = time.perf_counter()
            found = run_suite(suite, {"m": checkpoint}, folder / f"out{turn}", limit=number)
            wall["runner"].append(time.perf_counter() - started)
            wall["evaluation"].append(found["m"][TASK]["seconds"])
            command = [sys.executable, __file__, "--builtin", str(checkpoint), str(data)]
            done = subprocess.run(
                [*command, str(asked)], capture_output=True, text=True, check=True
            )
            wall["builtin"].append(json.loads(done.stdout.splitlines()[-1]))
    overhead = [a / b for a, b in zip(wall["runner"], wall["generation"], strict=True)]
    rates = [
        (number / a) / (asked / b) for a, b in zip(wall["evaluation"], wall["builtin"], strict=True)
    ]
    finish(
        "lmms_overhead",
        ours=round(statistics.median(overhead), 3),
        baseline=1.0,
        ratio=round(statistics.median(rates), 2),
        spread={"ours": span(overhead), "ratio": span(rates)},
        equal="tests/parity/test_lmms_llava_hf.py: the same answers as the built-in",
        wall_s={name: round(statistics.median(times), 2) for name, times in wall.items()},
        goals=GOALS,
        settings={"questions": number, "builtin_questions": asked, "batch_size": BATCH}
        | {"max_new_tokens": TOKENS, "rounds": rounds, "width": WIDTH},
    )


def span(values: list[float]) -> list[float]:
    """Least and largest."""
    return [round(min(values), 3), round(max(values), 3)]


def make_checkpoint(folder: Path) -> Path:
    """A LLaVA with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6}
    heads = {"num_attention_heads": WIDTH // 64}
    tower, language = folder.parent / "tower", folder.parent / "language_model"
    CLIPVisionModel(
        CLIPVisionConfig(**sizes, **heads, image_size=224, patch_size=32)
    ).save_pretrained(tower)
    CLIPImageProcessor().save_pretrained(tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer), bos_token_id=None)
    config.eos_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(language)
    tokenizer.save_pretrained(language)
    save_vlm(*build_vlm(tower, language), folder)
    return folder


def pure_generation(checkpoint: Path, data: Path, number: int) -> Any:
    """The runner's prompts, rendered and with open pictures, ready to be answered."""
    model, processor = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
    generator = Generator(model, processor, batch_size=BATCH)
    prompts = []
    for row in list(iter_rows(data))[:number]:
        content = [
            {"type": "image", "url": open_image(data.parent, row["image"])},
            {"type": "text", "text": row["question"]},
        ]
        prompts.append(generator.render([{"role": "user", "content": content}]))
    options = {"max_new_tokens": TOKENS}
    return lambda count: generator.generate(prompts[:count], [options] * count)


def builtin_seconds(checkpoint: str, data: Path, number: int) -> float:
    """Wall time of lmms-eval's own model class on the first documents."""
    decord: Any = types.ModuleType("decord")
    decord.VideoReader = decord.cpu = None
    sys.modules["decord"] = decord
    quiet()
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.chat.llava_hf import LlavaHf

    options = {"generation_kwargs": {"max_new_tokens": TOKENS}}
    spec = LmmsTask(task=TASK, overrides=options)
    task = build_task(spec, task_yaml(TASK, own_tasks()), data)
    model = LlavaHf(pretrained=checkpoint, device="cpu", device_map="cpu", dtype="float32")
    started = time.perf_counter()
    simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=object(),
        limit=number,
        bootstrap_iters=0,
        batch_size=1,
        process_docs_parallel=1,
        cli_args=argparse.Namespace(
            output_path=str(data.parent),
            process_with_media=False,
            reasoning_tags=None,
            agentic_trace_mode="basic",
        ),
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
