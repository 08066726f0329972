"""Stage 4 against TRL's `SFTTrainer` and the plain HF Trainer: trained tokens per CPU second.

All three train the same `LlavaForConditionalGeneration` on the same conversations
(`conversation_mix.py`) about pictures in files, in steps of eight, fp32, the tower frozen:

- `ours`: `VlmTrainer` on packed rows, as `stages/stage4_instruction.py` builds it.
- `hf`: `transformers.Trainer` on our dataset and padded batches.
- `trl`: `SFTTrainer` (1.16) on `messages` and `images`, `assistant_only_loss`, without the
  gradient checkpointing that it turns on by itself. It refuses packing for pictures.

Both peers get `group_by_length` as it is over an epoch of 3,200 conversations: transformers' own
function groups them into batches, of which every 18th is trained (with `--random`: batches as they
are shuffled, TRL's default). A round is two of these batches, the same 16 samples for all arms; a
ratio is that of all rounds' CPU time, since their samples differ. Our pictures are opened each
time, as with a set that does not fit into memory.

The model has the widths of SmolLM2-135M with a 15th of its layers and of its vocabulary, so the
shares of blocks and head stay (79 and 21 %); the tower is sized as ViT-B/16 is to it, with its 196
visual tokens. A pass of the whole model would take an hour.

`memory_ratio` (HF) and `memory_ratio_trl`: what a step needs above weights, gradients and optimizer
at a vocabulary of 32,000, a peer's ÷ ours, each in a process of its own. `limit_ratio`: share of
the room of 8 processes (the longest row for each, steps of 128 samples) that holds tokens, over the
whole epoch; one process alone has no padding at all.

    python benchmarks/instruction_tuning.py [--quick] [--random]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import finish, ratio, take_turns, use_peers
from conversation_mix import Turn, draw_conversations, draw_lengths
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.trainer_pt_utils import get_length_grouped_indices

from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.conversation import instruction
from llm2clip_vlm.data.conversation.instruction import InstructionCollator, InstructionDataset
from llm2clip_vlm.data.conversation.packing import PackedBatches, PackedCollator
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.models.trainable import apply_trainable
from llm2clip_vlm.models.vlm.building import build_vlm
from llm2clip_vlm.models.vlm.vlm_gradients import freeze_unused_vision
from llm2clip_vlm.recipe.vlm import InstructionSource, PartTraining
from llm2clip_vlm.training.vlm.vlm_trainer import VlmTrainer

GOALS = {"ratio_trl": 2.0, "ratio_hf": 1.3, "limit_ratio": 0.97}
EPOCH, SIZE, VISUAL, MAX_TOKENS, VOCABULARY = 3200, 8, 196, 2048, 3277
PARTS = {name: PartTraining(lr=1e-6) for name in ("multi_modal_projector", "language_model")}
TEXT: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": MAX_TOKENS,
}
VISION: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2} | {
    "num_attention_heads": 8,
    "image_size": 224,
    "patch_size": 16,
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ '<|user|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The shape of the demo's template: roles, marked answers."""


def make_model(folder: Path, vocabulary: int) -> tuple[Any, Any]:
    """The composed model with random weights, and its processor."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    words = [*special, *(f"w{n}" for n in range(vocabulary - 1 - len(special)))]  # and <image>
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, Any] = dict(
        zip(("pad_token", "unk_token", "bos_token", "eos_token"), special, strict=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=special[4:], **names
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    LlamaForCausalLM(LlamaConfig(**TEXT, **ids, vocab_size=len(words))).save_pretrained(
        folder / "llm"
    )
    tokenizer.save_pretrained(folder / "llm")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "tower")
    edge = VISION["image_size"]
    CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
    ).save_pretrained(folder / "tower")
    model, processor = build_vlm(folder / "tower", folder / "llm")
    apply_trainable(model, PARTS)
    freeze_unused_vision(model)
    return model, processor


def write_conversations(folder: Path, name: str, chosen: list[list[Turn]]) -> list[dict[str, Any]]:
    """LLaVA's JSON with a photograph's worth of noise each; returns the rows."""
    draw, rows = np.random.default_rng(len(chosen)), []
    for number, turns in enumerate(chosen):
        picture = f"{name}-{number}.jpg"
        noise = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(folder / picture)
        said: list[dict[str, str]] = []
        used = VISUAL + 2
        for place, (question, answer) in enumerate(turns):
            if (used := used + question + answer + 3) > MAX_TOKENS:
                break
            ask, reply = (
                " ".join(f"w{n}" for n in draw.integers(0, 3000, size))
                for size in (question, answer)
            )
            said.append({"from": "human", "value": ("<image>\n" if place == 0 else "") + ask})
            said.append({"from": "gpt", "value": reply})
        rows.append({"id": picture, "image": picture, "conversations": said})
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return rows


def trl_dataset(folder: Path, rows: list[dict[str, Any]]) -> Any:
    """The rows as TRL documents them."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    role = {"human": "user", "gpt": "assistant"}
    messages = [
        [
            {"role": role[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
            for turn in row["conversations"]
        ]
        for row in rows
    ]
    features = {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(ImageFeature()),
    }
    images = [[str(folder / row["image"])] for row in rows]
    return Dataset.from_dict({"messages": messages, "images": images}, Features(features))


class PlainCollator(InstructionCollator):
    """Without the names of the samples, which a plain model does not take."""

    def __call__(self, items: Any) -> dict[str, Tensor]:
        """Makes a batch."""
        batch = super().__call__(items)
        batch.pop("sample_ids")
        return batch


class Arms:
    """The three trainers, each with its own copy of the model; a round is a list of samples."""

    def __init__(self, folder: Path, vocabulary: int, names: list[str]) -> None:
        """Builds the trainers that are named."""
        self.folder, self.data = folder, dict[str, dict[str, Any]]()
        model, self.processor = make_model(folder, vocabulary)
        options: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": SIZE,
            "max_steps": 1,
            "learning_rate": 1e-6,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "report_to": [],
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
        }
        first = self.add("first", [[(8, 8)], [(6, 4)]])
        self.trainers: dict[str, Any] = {}
        for name in names:
            own = copy.deepcopy(model)
            if name == "trl":
                trl: Any = importlib.import_module("trl")
                self.trainers[name] = trl.SFTTrainer(
                    own,
                    trl.SFTConfig(**options, assistant_only_loss=True, max_length=MAX_TOKENS),
                    train_dataset=first["trl"],
                    processing_class=self.processor,
                )
                continue
            arguments = TrainingArguments(**options)
            if name == "hf":
                collator = PlainCollator(0)
                self.trainers[name] = Trainer(
                    own, arguments, data_collator=collator, train_dataset=first["ours"]
                )
            else:
                self.trainers[name] = VlmTrainer(
                    own, arguments, first["ours"], PackedCollator(), self.processor,
                    batches=first["batches"], parts=PARTS,
                )  # fmt: skip

    def add(self, name: str, chosen: list[list[Turn]]) -> dict[str, Any]:
        """A round's data in the form that each arm takes."""
        rows = write_conversations(self.folder, name, chosen)
        instruction.PRELOAD_LIMIT_BYTES = 0
        source = InstructionSource(path=str(self.folder / f"{name}.json"))
        bad = BadRecords(0)
        samples = InstructionDataset(
            [source], self.processor, max_length_tokens=MAX_TOKENS, bad=bad
        )
        batches = PackedBatches(
            samples.lengths, samples.image_counts, global_batch_size=min(SIZE, len(rows)),
            max_tokens=SIZE * MAX_TOKENS,
        )  # fmt: skip
        self.data[name] = {"ours": samples, "trl": trl_dataset(self.folder, rows)}
        self.data[name]["batches"] = batches
        return self.data[name]

    def run(self, arm: str, name: str) -> float:
        """Train a round once; returns the loss."""
        trainer, data = self.trainers[arm], self.data[name]
        trainer.train_dataset = data["trl" if arm == "trl" else "ours"]
        trainer.args.max_steps = -(-len(data["ours"]) // SIZE)
        if arm == "ours":
            trainer.batches = data["batches"]
            trainer.args.gradient_accumulation_steps = trainer.batches.accumulation
        return float(trainer.train().training_loss)


def choose_batches(shuffled: bool, count: int) -> tuple[list[list[list[Turn]]], float]:
    """So many batches, spread over the epoch as a peer forms them, and the fill of all of them.

    Of the ways to take every n-th, the one whose fill is nearest to that of the whole epoch.
    """
    conversations = draw_conversations(EPOCH)
    lengths = [length for length, _ in draw_lengths(EPOCH, VISUAL, MAX_TOKENS)]
    order = list(range(EPOCH))
    if not shuffled:
        order = get_length_grouped_indices(lengths, SIZE, generator=torch.manual_seed(0))
    batches = [order[start : start + SIZE] for start in range(0, EPOCH, SIZE)]

    def fill(some: list[list[int]]) -> float:
        held = sum(lengths[i] for batch in some for i in batch)
        return held / sum(SIZE * max(lengths[i] for i in batch) for batch in some)

    every = len(batches) // count
    ways = [batches[first::every][:count] for first in range(every)]
    chosen = min(ways, key=lambda some: abs(fill(some) - fill(batches)))
    return [[conversations[i] for i in batch] for batch in chosen], round(fill(batches), 4)


def fill_of_ours(ranks: int = 8, samples: int = 128, rows: int = 4) -> float:
    """Share of the processes' room that holds tokens, by the plan of the whole epoch."""
    lengths = [length for length, _ in draw_lengths(EPOCH, VISUAL, MAX_TOKENS)]
    batches = PackedBatches(
        lengths, [1] * EPOCH, global_batch_size=samples, max_tokens=rows * MAX_TOKENS,
        world_size=ranks,
    )  # fmt: skip
    room = 0
    for step in batches.steps(0):
        held = [sum(lengths[i] for i in row) for row in batches.rows(step)]
        room += sum(ranks * max(held[n : n + ranks]) for n in range(0, len(held), ranks))
    return round(sum(lengths) / room, 4)


def weights_of(model: Any) -> dict[str, int]:
    """Weights of the parts that multiply."""

    def size(part: Any) -> int:
        return sum(weight.numel() for weight in part.parameters())

    llava = model.model
    return {
        "tower": size(llava.vision_tower),
        "projector": size(llava.multi_modal_projector),
        "blocks": size(llava.language_model.layers),
        "head": size(model.lm_head),
    }


def memory_mib(arm: str) -> float:
    """Memory that a step of one batch needs on top, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the ratios of speed and of memory, and whether the losses agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds of 8 samples")
    parser.add_argument("--random", action="store_true", help="peers' batches are shuffled")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    use_peers("trl")
    count = 3 if given.quick else 11
    batches, peers_fill = choose_batches(given.random, 2 * count)
    with tempfile.TemporaryDirectory() as scratch:
        if given.memory_of:
            arms = Arms(Path(scratch), 32_000, [given.memory_of])
            arms.add("batch", choose_batches(False, 22)[0][5])
            arms.run(given.memory_of, "first")  # gradients and optimizer are there
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            arms.run(given.memory_of, "batch")
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
            return
        memory = {name: round(memory_mib(name), 1) for name in ("ours", "hf", "trl")}
        names = ["ours", "hf", "trl"]
        arms = Arms(Path(scratch), VOCABULARY, names)
        arms.add("warm", batches[1])
        losses = {name: arms.run(name, "warm") for name in names}
        for n in range(count):
            arms.add(str(n), batches[n] if given.quick else batches[n] + batches[n + count])
        turns = {name: iter(range(count)) for name in names}
        timed = {name: lambda name=name: arms.run(name, str(next(turns[name]))) for name in names}
        gc.collect()
        gc.freeze()  # a Trainer collects at each start, here at each round
        seconds = take_turns(timed, count)
        sets = [arms.data[str(n)]["ours"] for n in range(count)]
        lengths = [samples.lengths for samples in sets]
        count_samples, tokens = sum(map(len, sets)), sum(map(sum, lengths))
        trained = sum(int((item["labels"] != IGNORE_INDEX).sum()) for own in sets for item in own)
        weights = weights_of(arms.trainers["hf"].model)
    padded = sum(SIZE * max(own[n : n + SIZE]) for own in lengths for n in range(0, len(own), SIZE))
    # multiplications: the same for all arms, then of blocks and of logits, forward and backward
    same = count_samples * (VISUAL * (2 * weights["tower"] + 6 * weights["projector"]))
    of_peers = same + 6 * padded * (weights["blocks"] + weights["head"])
    of_ours = same + 6 * (tokens * weights["blocks"] + trained * weights["head"])
    total = {name: sum(seconds[name]["cpu"]) for name in names}
    speed = {name: round(total[name] / total["ours"], 4) for name in ("trl", "hf")}
    spread = {f"ratio_{name}": ratio(seconds, name, "ours")[1] for name in speed}
    rates = {name: round(trained / total[name], 2) for name in names}
    apart = max(abs(losses[name] - losses["ours"]) for name in ("hf", "trl"))
    finish(
        "instruction_tuning",
        ours=rates["ours"],
        baseline=rates["trl"],
        baseline_hf=rates["hf"],
        ratio=speed["trl"],
        ratio_trl=speed["trl"],
        ratio_hf=speed["hf"],
        spread=spread,
        memory_ratio=round(memory["hf"] / memory["ours"], 2),
        memory_ratio_trl=round(memory["trl"] / memory["ours"], 2),
        memory_mib=memory,
        equal=apart < 1e-4,
        loss_difference=apart,
        limit_ratio=fill_of_ours(),
        goals=GOALS,
        settings={
            "unit": "trained tokens per CPU second",
            "limit": "share of 8 processes' room that holds tokens",
            "cpu_s": {name: round(own, 2) for name, own in total.items()},
            "rounds": count,
            "samples": count_samples,
            "mean_tokens": round(tokens / count_samples),
            "trained": round(trained / tokens, 4),
            "ratio_by_multiplications": round(of_peers / of_ours, 4),
            "peers_batches": "shuffled" if given.random else "grouped by length",
            "peers_fill": round(tokens / padded, 4),
            "peers_fill_of_epoch": peers_fill,
            "text": TEXT | {"vocabulary": VOCABULARY},
            "vision": VISION,
        },
    )


if __name__ == "__main__":
    main()
