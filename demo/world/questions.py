"""Batches of the world's text for the base language model, and its text-only test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llm2clip_vlm.constants import IGNORE_INDEX
from world.recipe import TextPhase
from world.scenes import Question, draw_scene, long_caption, questions
from world.texts import Segments, document

_SCENES_AT_ONCE = 50


def _encode(segments: Segments, tokenizer: Any) -> tuple[Tensor, Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in segments:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if trained else [IGNORE_INDEX] * len(part)
    return torch.tensor(ids), torch.tensor(labels)


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
        pad = partial(pad_sequence, batch_first=True)
        return {
            "input_ids": pad([ids for ids, _ in rows], padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows]),
            "labels": pad([labels for _, labels in rows], padding_value=IGNORE_INDEX),
        }


@torch.no_grad()
def text_qa_accuracy(
    model: Any, tokenizer: Any, *, scenes: int = 300
) -> dict[str, dict[str, float]]:
    """Accuracy (%) on questions about the long captions of `test` scenes, each asked on its own.

    The answer is the model's likeliest next word. The `test` split shares no scene with the text
    that the model has read.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer with a chat template.
        scenes: Number of scenes; ten questions each.

    Returns:
        `{kind: {"accuracy", "n"}}` with `all` for all kinds together.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, scenes, _SCENES_AT_ONCE):
        prompts: list[str] = []
        asked: list[Question] = []
        for index in range(start, min(start + _SCENES_AT_ONCE, scenes)):
            rng = np.random.default_rng([1, index])
            scene = draw_scene(rng, "test")
            text = long_caption(scene, rng, "full")
            for question in questions(scene, rng):
                message = {"role": "user", "content": f"{text} {question.question}"}
                prompt = tokenizer.apply_chat_template(
                    [message], tokenize=False, add_generation_prompt=True
                )
                prompts.append(prompt)
                asked.append(question)
        inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        last = inputs["attention_mask"].sum(1) - 1
        said = logits[torch.arange(len(prompts)), last].argmax(-1).tolist()
        for question, got in zip(asked, said, strict=True):
            right = got == tokenizer.convert_tokens_to_ids(question.answer)
            for kind in (question.kind, "all"):
                hits[kind].append(right)
    return {
        kind: {"accuracy": 100 * float(np.mean(values)), "n": len(values)}
        for kind, values in sorted(hits.items())
    }
