"""`llm2clip-vlm plan`: what a run needs and costs, before anything is downloaded but configs."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from torch._subclasses.fake_tensor import FakeTensorMode

from llm2clip_vlm.chat.template import find_chat_template, render
from llm2clip_vlm.models.loading import read_tokenizer
from llm2clip_vlm.models.trainable import trainable_table
from llm2clip_vlm.preflight.footprint import Footprint, Work, footprint
from llm2clip_vlm.preflight.lengths import Lengths, guessed, measured
from llm2clip_vlm.preflight.machines import GPUS, Machine
from llm2clip_vlm.preflight.works import build, text_model
from llm2clip_vlm.recipe.reading import overridden
from llm2clip_vlm.runs.inputs import InputsError, missing_inputs

CONTEXT_BYTES = 1.2e9
"""CUDA context, cuBLAS and what the allocator cannot use (a guess: measured nowhere here)."""
_USABLE = 0.95
_NF4 = 0.5 + 4 / 64  # bytes of a weight, with a scale for each 64
_BUCKET, _LIVE = 5e8, 1e9  # DeepSpeed's bucket and live elements


def memory(work: Work, seen: Footprint, machine: Machine, recipe: Any) -> Counter[str]:
    """Bytes on each GPU by cause, at the peak of a step.

    Args:
        work: Pass with fake weights.
        seen: Its footprint.
        machine: Processes and ZeRO.
        recipe: Its precision and optimizer.
    """
    trainer, world, zero = recipe.trainer, machine.gpus, machine.zero
    half = bool(trainer.get("bf16") or trainer.get("fp16"))
    four = getattr(recipe, "load_in_4bit", False)
    named = list(work.model.named_parameters())
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    gradients = sum(p.nbytes for _, p in named if p.requires_grad)
    gradients //= world if zero >= 2 else 1
    optim = str(trainer.get("optim", "adamw_torch_fused"))
    states = trained * (2 if re.search("8bit|bnb", optim) else 0.1 if "adafactor" in optim else 8)
    found = Counter(dict(seen.held))
    if work.trains and gradients > sum(found.values()):  # the peak is the optimizer's step
        found = Counter(gradients=gradients)
    nf4 = {name for name, p in named if four and _is_nf4(name, p)}
    weights = sum(p.numel() * (_NF4 if name in nf4 else p.element_size()) for name, p in named)
    found["weights"] = work.beside_bytes + int(weights / (world if zero == 3 else 1))
    masters = 4 * trained if zero and half else 0
    kept = 0 if machine.offload and zero else (states + masters) / (world if zero else 1)
    found["optimizer"] = int(kept) if work.trains else 0
    if zero:
        live = min(sum(p.numel() for _, p in named), _LIVE) if zero == 3 else 0
        found["communication"] = int((2 if half else 4) * (2 * min(trained, _BUCKET) + live))
    elif world > 1:  # DDP's buckets
        found["communication"] = gradients
    return found


def _is_nf4(name: str, parameter: Any) -> bool:
    """The linear layers of a language model, but for its head and adapters."""
    other = "lora_" in name or "vision" in name
    return parameter.ndim == 2 and ".layers." in name and not other


@dataclass
class Plan:
    """What a run needs and costs."""

    stage: str
    machine: Machine
    parts: str
    held: Counter[str]
    room: float
    steps: int
    samples: float
    tokens: float
    flops: float
    """Operations of the whole run."""
    told: str
    """Where the data's lengths are from."""
    disk: dict[str, float]
    changes: list[str]
    """Single changes with which it fits."""
    missing: list[str]

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return self.held.total() + CONTEXT_BYTES

    @property
    def fits(self) -> bool:
        """Whether the step goes into a GPU."""
        return self.total <= self.room

    def hours(self, mfu: float) -> float:
        """Hours of the run, at a share of the GPUs' dense bf16 rate."""
        return self.flops / (mfu * GPUS[self.machine.gpu][1] * 1e12 * self.machine.gpus) / 3600


def make_plan(
    recipe: Any,
    source: str,
    machine: Machine,
    *,
    samples: int | None = None,
    tokens: int | None = None,
) -> Plan:
    """Plan a recipe's run.

    Args:
        recipe: A stage's recipe.
        source: Its file.
        machine: Where it would go.
        samples: Instead of the data's.
        tokens: Tokens of a text (a conversation without its pictures), instead of the data's.

    Raises:
        InputsError: A config is not here; the message says which `hf download` gets it.
    """
    missing = list(missing_inputs(recipe, source))
    lengths = _lengths(recipe, source, missing)
    if samples is not None:
        lengths.samples, lengths.told = samples, f"{samples:,} samples as given"
    if tokens is not None:
        lengths.texts, lengths.told = [tokens], f"{lengths.told}, {tokens} tokens a text as given"
        lengths.conversations = []
    measure = partial(_measure, source, lengths)
    try:
        work, seen, held = measure(recipe, machine)
    except (ImportError, ValueError) as error:
        raise InputsError([*missing, f"plan: {error}"]) from error
    if work.trains:
        epochs, count = recipe.trainer.get("num_train_epochs", 3), float(lengths.samples)
        if recipe.stage == "stage0_mntp":  # texts are joined into rows
            count *= lengths.captions * lengths.mean / recipe.max_length_tokens
        whole, rest = divmod(round(count), recipe.global_batch_size)
        drops = recipe.contrastive or recipe.trainer.get("dataloader_drop_last", False)
        steps = math.ceil(max(1, whole + (rest > 0 and not drops)) * epochs)
        steps = max(recipe.trainer.get("max_steps", 0), 0) or steps
    else:  # each caption once, and once with each prompt
        work.passes = 1
        texts = lengths.samples * lengths.captions * (1 + len(recipe.prompts))
        steps = math.ceil(texts / work.samples / machine.gpus)
    pass_flops = seen.flops + (seen.forward_flops if work.cached else 0)
    done = steps * work.passes * machine.gpus
    plan = Plan(
        recipe.stage,
        machine,
        trainable_table(work.model),
        held,
        _USABLE * GPUS[machine.gpu][0] * 1e9,
        steps,
        done * work.samples,
        done * work.tokens,
        done * pass_flops,
        lengths.told,
        _disk(recipe, work, lengths),
        [],
        missing,
    )
    for kind in [] if plan.fits else _changes(recipe, machine):
        tried = ((told, measure(*other)[2]) for told, *other in kind if len(plan.changes) < 2)
        plan.changes += islice((told for told, held in tried if replace(plan, held=held).fits), 1)
    return plan


def _measure(
    source: str, lengths: Lengths, recipe: Any, machine: Machine
) -> tuple[Work, Footprint, Counter[str]]:
    """A recipe's pass on fake weights."""
    half = recipe.trainer.get("bf16") and not machine.zero
    work = build(recipe, source, lengths, machine.gpus, machine.zero)
    with FakeTensorMode():
        work.fake()
        autocast = partial(torch.autocast, "cpu", torch.bfloat16) if half else nullcontext
        seen = footprint(work, autocast, kept=1 / machine.gpus if machine.zero >= 2 else 1.0)
    return work, seen, memory(work, seen, machine, recipe)


def _lengths(recipe: Any, source: str, missing: Sequence[str]) -> Lengths:
    if any(problem.startswith(("data.", "train.", "sources.")) for problem in missing):
        return guessed(recipe)
    count, a_turn = None, 2.0
    with suppress(ValueError, OSError):  # a guess needs no tokenizer
        count, a_turn = _ruler(recipe, source)
    return measured(recipe, count, a_turn)


def _ruler(recipe: Any, source: str) -> tuple[Callable[[str], int], float]:
    """Counts a text's tokens; and those that a turn, or a caption, has beside its text."""
    tokenizer = read_tokenizer(text_model(recipe, source))

    def count(text: str, special: bool = False) -> int:
        return len(tokenizer(text, add_special_tokens=special).input_ids)

    if not hasattr(recipe, "data") or getattr(recipe, "plain", False):
        return count, count("a", special=True) - count("a") + hasattr(recipe, "data")
    vlm = getattr(recipe, "vlm", None)
    template = find_chat_template(vlm and vlm.chat_template, tokenizer)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    return count, count(render(turns, template, tokenizer)) / 2 - count("a")


def _changes(recipe: Any, machine: Machine) -> Iterator[list[tuple[str, Any, Machine]]]:
    """Changes that save memory: of each kind those that cost least first."""
    batch = recipe.trainer.get("per_device_train_batch_size", 8)
    size, saving = "trainer.per_device_train_batch_size", "trainer.gradient_checkpointing=true"
    saves = recipe.trainer.get("gradient_checkpointing", False)
    whole = ["trainer.gradient_checkpointing=false"] * saves  # refused beside micro-batches
    lora = "lora" if recipe.contrastive else "language_model_lora"
    four = ["load_in_4bit=true", saving] + [f"{size}=1"] * (not recipe.contrastive)
    four += [f"{lora}={{r: 16}}"] * (getattr(recipe, lora, None) is None)
    kinds = [
        [[saving]],
        [[f"micro_batch_size={n}", *whole] for n in (256, 64, 16)],
        [[f"micro_batch_tokens={n}", *whole] for n in (16384, 4096)],
        [[f"{size}={batch >> n}"] for n in (1, 2, 4) if batch >> n and not recipe.contrastive],
        [four] * (getattr(recipe, "load_in_4bit", True) is False),
    ]
    for kind in kinds:
        found = []
        for words in kind:
            with suppress(ValueError):  # it has no such key
                changed = overridden(recipe, words)
                found += [(" ".join(words), changed, machine)] if changed != recipe else []
        yield found
    if machine.gpus > 1 and not recipe.contrastive:
        for zero in range(max(2, machine.zero + 1), 4):
            told = f"accelerate launch --config_file recipes/accelerate/zero{zero}.yaml"
            yield [(told, recipe, replace(machine, zero=zero))]


def _disk(recipe: Any, work: Work, lengths: Lengths) -> dict[str, float]:
    """Bytes that the run writes, and those of the hub's models that it loads."""
    every = list(work.model.parameters())
    model = float(sum(p.nbytes for p in every))
    trained = sum(p.numel() for p in every if p.requires_grad)
    if not work.trains:
        rows = lengths.samples * lengths.captions * (1 + len(recipe.prompts))
        row = 2 * work.model.config.hidden_size + 32  # fp16, and a key
        return {"embedding cache (all captions different)": rows * row}
    found = {"model": model}
    if recipe.stage == "stage3_projector":
        found["composed/ (removed at the end)"] = model
    if recipe.trainer.get("save_strategy", "steps") != "no":
        adapted = any("lora_" in name for name, _ in work.model.named_parameters())
        weights = 4 * trained if adapted else model
        found["checkpoints"] = recipe.trainer.get("save_total_limit", 2) * (weights + 8.0 * trained)
    return found


def shown(plan: Plan, mfu: float, price: float | None) -> str:
    """A plan as text of at most 100 columns."""
    file = Path(__file__).parent / "templates" / "plan.txt.jinja"
    page = Template(file.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    facts = {"plan": plan, "hours": plan.hours(mfu), "mfu": mfu, "price": price}
    causes = [*plan.held.most_common(), ("context and fragments", CONTEXT_BYTES)]
    return page.render(facts, causes=causes).rstrip()


def main(given: argparse.Namespace, recipe: Any, source: str, machine: Machine) -> int:
    """Run `llm2clip-vlm plan` (or `train --dry-run`).

    Args:
        given: The command line.
        recipe: A stage's recipe.
        source: Its file.
        machine: Where the run would go.

    Returns:
        2 where something is missing or does not fit.
    """
    plan = make_plan(recipe, source, machine, samples=given.samples, tokens=given.tokens)
    if given.json:
        found = {**vars(plan), "machine": vars(machine), "total": plan.total, "fits": plan.fits}
        print(json.dumps(found | {"hours": plan.hours(given.mfu), "mfu": given.mfu}, indent=1))
    else:
        print(shown(plan, given.mfu, given.price))
    return 2 if plan.missing or not plan.fits else 0
