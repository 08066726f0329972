"""Batches of the world's text for the base language model, and its text-only examination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip_vlm.config_base import TextPhase
from llm2clip_vlm.constants import IGNORE_INDEX
from llm2clip_vlm.data.world import draw_scene, long_caption, questions
from llm2clip_vlm.data.world_text import Segments, document


def _encode(segments: Segments, tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in segments:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if trained else [IGNORE_INDEX] * len(part)
    return ids, labels


class TextBatches(Dataset[dict[str, Tensor]]):
    """Item `i` is the whole batch of step `i`, the same however often it is asked for.

    Args:
        phases: The curriculum.
        tokenizer: A tokenizer that knows the world's words.
        seed: Seed of scenes and wording.
    """

    def __init__(self, phases: Sequence[TextPhase], tokenizer: Any, seed: int) -> None:
        """Args: see the class."""
        self.tokenizer, self.seed = tokenizer, seed
        self.steps = [phase for phase in phases for _ in range(phase.steps)]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` of `[documents, longest]`."""
        phase = self.steps[step]
        rng = np.random.default_rng([self.seed, step])
        kinds = list(phase.mixture)
        weights = np.array([phase.mixture[kind] for kind in kinds], float)
        drawn = rng.choice(len(kinds), phase.documents, p=weights / weights.sum())
        rows = [_encode(document(kinds[i], rng), self.tokenizer) for i in drawn]
        longest = max(len(ids) for ids, _ in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, int(self.tokenizer.pad_token_id)),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for row, (ids, labels) in enumerate(rows):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(labels)] = torch.tensor(labels)
        return batch


@torch.no_grad()
def text_qa_accuracy(
    model: Any, tokenizer: Any, *, scenes: int = 300, seed: int = 1, batch: int = 50
) -> dict[str, dict[str, float]]:
    """Accuracy (%) on questions about the long captions of `test` scenes, each asked on its own.

    The answer is the model's likeliest next word. The `test` split shares no scene with the text
    that the model has read.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer with a chat template.
        scenes: Number of scenes; ten questions each.
        seed: Of scenes and wording.
        batch: Scenes per forward pass.

    Returns:
        `{kind: {"accuracy", "n"}}` with `all` for all kinds together.
    """
    hits: dict[str, list[float]] = {}
    for start in range(0, scenes, batch):
        prompts, answers, kinds = [], [], []
        for index in range(start, min(start + batch, scenes)):
            rng = np.random.default_rng([seed, index])
            scene = draw_scene(rng, "test")
            text = long_caption(scene, rng, "full")
            for question in questions(scene, rng):
                message = {"role": "user", "content": f"{text} {question.question}"}
                prompts.append(
                    tokenizer.apply_chat_template(
                        [message], tokenize=False, add_generation_prompt=True
                    )
                )
                answers.append(tokenizer.convert_tokens_to_ids(question.answer))
                kinds.append(question.kind)
        inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        last = inputs["attention_mask"].sum(1) - 1
        said = logits[torch.arange(len(prompts)), last].argmax(-1).tolist()
        for kind, got, answer in zip(kinds, said, answers, strict=True):
            hits.setdefault(kind, []).append(float(got == answer))
            hits.setdefault("all", []).append(float(got == answer))
    return {
        kind: {"accuracy": 100 * float(np.mean(values)), "n": len(values)}
        for kind, values in sorted(hits.items())
    }
