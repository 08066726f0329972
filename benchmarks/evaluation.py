"""Evaluation of a VLM through lmms-eval: our adapter against its built-in model classes.

One LLaVA of random weights (ViT with 196 patches, 256 wide, 6 layers each side; random, since only
time is asked for) answers yes/no questions of the drawn world, six about each picture as in POPE,
four tokens each, greedy, fp32. All arms are lmms-eval's own `simple_evaluate` on the same task,
from its call on; the answers must be equal.

- `ours`: `Llm2ClipVlmChat`, 24 prompts a batch.
- `chat`: lmms-eval's `models/chat/huggingface.py` with the same batch size. As installed (0.7.3 and
  transformers 5.23) it answers nothing: it loads LLaVA by `AutoModel`, which cannot generate, and
  passes an empty `audios`, which processors refuse. It is given the model, in fp32 as the others,
  and a processor that ignores `audios`; its own code is untouched. The checkpoint's tokenizer pads
  on the left, which it needs.
- `llava_hf`: lmms-eval's class for LLaVA, which takes one prompt at a time.
- `generation`: `model.generate` on the same prompts as ready tensors, sorted by length, in batches
  of 24, and nothing else: the limit of what answers each prompt by itself.

`ratio_chat` and `ratio_llava_hf` (also `ratio`) are a peer's CPU time ÷ ours, `limit_ratio` is ours
÷ `generation`. `_once`: the same where each picture is asked one question only, so that nothing can
be shared. `process_ratio`: CPU time of `run_suite` as `eval/run_lmms.py` calls it, a process of its
own with its imports, hashing and results on disk, ÷ `generation`.

    python benchmarks/evaluation.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import finish, ratio, take_turns, use_peers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip_vlm.data.reading.images import open_image
from llm2clip_vlm.data.reading.records import iter_rows
from llm2clip_vlm.evaluation.vlm.generation import Generator
from llm2clip_vlm.evaluation.vlm.jobs import run_suite
from llm2clip_vlm.evaluation.vlm.tasks import build_task
from llm2clip_vlm.evaluation.vlm.worker import quiet
from llm2clip_vlm.models.vlm.building import build_vlm, load_checkpoint, save_vlm
from llm2clip_vlm.recipe.suite import LmmsTask, SuiteRecipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from world.files import SIZES, WorldConfig, ensure_world

TASK, BATCH, TOKENS, WIDTH = "l2c_world_exist", 24, 4, 256
TASKS = Path(__file__).resolve().parents[1] / "demo/tasks"
TOKENIZER = Path(__file__).resolve().parents[1] / "recipes/demo/base/models/language_model"
GOALS = {"ratio_chat": 1.3, "ratio_llava_hf": 4.0, "limit_ratio": 1.1}
OPTIONS = {"generation_kwargs": {"max_new_tokens": TOKENS}}


def make_checkpoint(folder: Path) -> Path:
    """A LLaVA with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": WIDTH // 64}
    tower, language = folder.parent / "tower", folder.parent / "language_model"
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=16)).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left")
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=None)
    config.eos_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(language)
    tokenizer.save_pretrained(language)
    save_vlm(*build_vlm(tower, language), folder)
    return folder


def make_questions(folder: Path, pictures: int) -> tuple[Path, Path]:
    """The world's existence questions, and a file with the first about each picture."""
    few = dict.fromkeys(SIZES, 2) | {"exist_test": pictures}
    data = ensure_world(WorldConfig(dir=str(folder / "world")), sizes=few) / "exist_test.jsonl"
    first = {row["image"]: row for row in reversed(list(iter_rows(data)))}
    once = data.with_name("once.jsonl")
    once.write_text("".join(json.dumps(row) + "\n" for row in first.values()))
    return data, once


def ready_batches(model: Any, processor: Any, data: Path) -> Callable[[], None]:
    """Answers the prompts of a file, encoded before."""
    generator = Generator(model, processor, batch_size=BATCH)
    prompts = []
    for row in iter_rows(data):
        picture = {"type": "image", "url": open_image(data.parent, row["image"])}
        content = [picture, {"type": "text", "text": row["question"]}]
        prompts.append(generator.render([{"role": "user", "content": content}]))
    prompts.sort(key=lambda prompt: len(prompt.text))
    batches = [generator._encode(prompts[n : n + BATCH]) for n in range(0, len(prompts), BATCH)]

    @torch.no_grad()
    def answer() -> None:
        for batch in batches:
            model.generate(
                **batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=generator.pad_id
            )

    return answer


class WithoutAudios:
    """A processor that is called with the empty `audios` and `videos` of another version."""

    def __init__(self, processor: Any) -> None:
        """Wraps the processor."""
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, audios: Any = None, videos: Any = None, **inputs: Any) -> Any:
        """Passes on what there is."""
        assert not audios and not videos
        return self._processor(**inputs)


def make_models(checkpoint: Path) -> dict[str, Any]:
    """The model classes, which stay alive for the next round."""
    from lmms_eval.models.chat.huggingface import Huggingface
    from lmms_eval.models.chat.llava_hf import LlavaHf

    from llm2clip_vlm.evaluation.vlm.adapter import Llm2ClipVlmChat

    on: dict[str, Any] = {"pretrained": str(checkpoint), "device": "cpu", "device_map": "cpu"}
    model, processor = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")
    models = {
        "ours": Llm2ClipVlmChat(model=model, processor=processor, batch_size=BATCH),
        "chat": Huggingface(**on, batch_size=BATCH),
        "llava_hf": LlavaHf(**on, dtype="float32", batch_size=1),
    }
    models["chat"]._model = load_checkpoint(str(checkpoint), dtype="float32", device="cpu")[0]
    models["chat"].processor = WithoutAudios(models["chat"].processor)
    for built_in in ("chat", "llava_hf"):
        models[built_in].clean = lambda: None  # lmms-eval deletes the model after one evaluation
    return models


def evaluation(model: Any, data: Path) -> Callable[[], list[str]]:
    """One evaluation on a file, from lmms-eval's call on; returns the answers in order."""
    from lmms_eval.evaluator import simple_evaluate

    task = build_task(LmmsTask(task=TASK, overrides=OPTIONS, data_files=str(data)), TASKS)

    def run() -> list[str]:
        found = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=object(),
            bootstrap_iters=0,
            batch_size=getattr(model, "batch_size", BATCH),
            process_docs_parallel=1,
            cli_args=argparse.Namespace(
                output_path=str(data.parent),
                process_with_media=False,
                reasoning_tags=None,
                agentic_trace_mode="basic",
            ),
        )
        samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
        return [str(sample["filtered_resps"][0]).strip() for sample in samples]

    return run


def process_cpu_s(checkpoint: Path, data: Path, output: Path) -> float:
    """CPU time of the runner, its process included."""
    task = LmmsTask(task=TASK, data_files=str(data), overrides=OPTIONS, max_empty=1.0)
    suite = SuiteRecipe(tasks=[task], batch_size=BATCH, dtype="float32", device="cpu")
    before = os.times()
    run_suite(suite, {"m": checkpoint}, output, TASKS)
    return sum(os.times()[:4]) - sum(before[:4])


def main() -> None:
    """Builds the model, runs the arms in turn, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three rounds, fewer questions")
    quick = parser.parse_args().quick
    rounds, pictures = (3, 4) if quick else (11, 8)
    use_peers("decord")
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = make_checkpoint(folder / "model")
        data, once = make_questions(folder, pictures)
        models = make_models(checkpoint)
        model, processor = models["ours"].generator.model, models["ours"].generator.processor
        arms: dict[str, Callable[[], Any]] = {
            "generation": ready_batches(model, processor, data),
            "generation_once": ready_batches(model, processor, once),
        }
        arms |= {name: evaluation(models[name], data) for name in models}
        arms |= {f"{name}_once": evaluation(models[name], once) for name in ("ours", "chat")}
        answers = {name: arm() for name, arm in arms.items()}
        gc.collect()
        gc.freeze()
        seconds = take_turns(arms, rounds)
        process = process_cpu_s(checkpoint, data, folder / "out")
    pairs = {
        "ratio_llava_hf": ("llava_hf", "ours"),
        "ratio_chat": ("chat", "ours"),
        "ratio_chat_once": ("chat_once", "ours_once"),
        "limit_ratio": ("ours", "generation"),
        "limit_ratio_once": ("ours_once", "generation_once"),
    }
    found = {key: ratio(seconds, *names) for key, names in pairs.items()}
    cpu = {name: round(statistics.median(own["cpu"]), 3) for name, own in seconds.items()}
    equal = answers["ours"] == answers["chat"] == answers["llava_hf"]
    questions = len(answers["ours"])
    finish(
        "evaluation",
        ours=round(questions / cpu["ours"], 2),
        baseline=round(questions / cpu["llava_hf"], 2),
        ratio=found["ratio_llava_hf"][0],
        **{key: value for key, (value, _) in found.items()},
        spread={key: spread for key, (_, spread) in found.items()},
        process_ratio=round(process / cpu["generation"], 3),
        equal=equal and answers["ours_once"] == answers["chat_once"],
        goals=GOALS,
        settings={
            "unit": "questions per CPU second",
            "limit": "bare generation of each prompt",
            "cpu_s": cpu,
            "process_cpu_s": round(process, 2),
            "different_answers": len(set(answers["ours"])),
            "questions": questions,
            "pictures": pictures,
            "batch_size": BATCH,
            "max_new_tokens": TOKENS,
            "rounds": rounds,
            "width": WIDTH,
        },
    )


if __name__ == "__main__":
    main()
