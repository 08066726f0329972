"""The lmms-eval model class: a thin layer over :class:`~.generation.Generator`.

Importing this module imports lmms-eval's `api`, without the side effects of its evaluator; nothing
else in the library does at import. `lmms-eval --model llm2clip_vlm --model_args pretrained=DIR`
finds the class by the entry point in :mod:`llm2clip_vlm.evaluation.vlm`.

Where lmms-eval 0.7 and its documents disagree, the code below follows what runs:

* chat requests carry six arguments, `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`;
* `clean()` deletes every module attribute after one evaluation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from llm2clip_vlm.evaluation.vlm.generation import Answer, Generator, Prompt
from llm2clip_vlm.models.vlm.building import load_checkpoint

_BATCHES_AT_ONCE = 8


class Llm2ClipVlmChat(lmms):
    """Answers chat requests, in which a task hands over messages: lmms-eval's default."""

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        batch_size: int | str = 64,
        max_new_tokens: int = 512,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        """Take a checkpoint, or a live model.

        Args:
            pretrained: Directory or hub id.
            model: A live model instead; `clean()` then leaves it alone.
            processor: Its processor.
            batch_size: Prompts a forward pass. In half precision it can flip single answers.
            max_new_tokens: Upper limit whatever a task asks for.
            dtype: `auto`, `float32` or `bfloat16` (with `pretrained`).
            device: Where to run (with `pretrained`).

        Raises:
            ValueError: Neither or both of `pretrained` and `(model, processor)` are given.
        """
        super().__init__()
        self._live = model is not None
        if (pretrained is None) == (model is None) or (model is None) != (processor is None):
            raise ValueError(
                "expected either `pretrained` or both `model` and `processor`, got "
                f"pretrained={pretrained!r}, model={type(model).__name__}, "
                f"processor={type(processor).__name__}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            device = str(self.accelerator.device)
        if model is None or processor is None:
            model, processor = load_checkpoint(str(pretrained), dtype=dtype, device=device)
        self.generator: Generator | None = Generator(
            model, processor, batch_size=int(batch_size), max_new_tokens=int(max_new_tokens)
        )
        self.prompt_example: str = ""
        """The first prompt of the last task, as the template wrote it."""
        self.pictures: dict[int, str] = {}
        """Hash of the pictures' pixels by document of the last task; text alone has no entry."""
        self.num_cut = 0
        """Answers of the last task that the limit of tokens cut."""
        self.other_pictures = False
        """Show each question the picture of another document; :attr:`pictures` keeps its own."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._generator().model.device

    def clean(self) -> None:
        """Free a model that this object loaded; a live one stays usable for the next task."""
        if not self._live:
            self.generator = None
            super().clean()

    def _generator(self) -> Generator:
        if self.generator is None:
            raise RuntimeError(
                "this adapter was cleaned after an evaluation; pass a live model and processor to "
                "evaluate several times"
            )
        return self.generator

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer chat requests, in their order."""
        started, answers, generator = time.perf_counter(), list[Answer](), self._generator()
        self.pictures = {}
        # A few batches at a time: the pictures of a large task do not fit into memory together.
        step = _BATCHES_AT_ONCE * generator.batch_size
        with tqdm(
            total=len(requests), disable=self.rank != 0, desc="answering", unit="question"
        ) as bar:
            for start in range(0, len(requests), step):
                asked = [request.args for request in requests[start : start + step]]
                prompts = [
                    generator.render(doc_to_messages(self.task_dict[task][split][doc]))
                    for _, doc_to_messages, _, doc, task, split in asked
                ]
                if not answers:
                    self.prompt_example = prompts[0].text
                for row, (_, doc_to_messages, _, doc, task, split) in enumerate(asked):
                    if (prompt := prompts[row]).images:
                        self.pictures[doc] = prompt.pictures
                        if self.other_pictures:
                            documents = self.task_dict[task][split]
                            prompts[row] = self._elsewhere(prompt, doc_to_messages, documents, doc)
                answers += generator.generate(prompts, [given[2] for given in asked], bar.update)
        self.num_cut = sum(answer.cut for answer in answers)
        tokens = sum(answer.num_tokens for answer in answers)
        seconds = time.perf_counter() - started
        log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=tokens / seconds)
        return [
            GenerationResult(answer.text, TokenCounts(output_tokens=answer.num_tokens))
            for answer in answers
        ]

    def _elsewhere(
        self, prompt: Prompt, doc_to_messages: Callable[..., Any], documents: Any, doc: int
    ) -> Prompt:
        """Put as many pictures of documents half the task further on into a prompt."""
        number, found = len(prompt.images), tuple[Any, ...]()
        for further in range(len(documents) // 2, len(documents) // 2 + 2 * len(documents)):
            messages = doc_to_messages(documents[(doc + further) % len(documents)])
            found = (*found, *self._generator().render(messages).images)[-number:]
            other = replace(prompt, images=found)
            if len(found) == number and other.pictures != prompt.pictures:
                return other
        raise ValueError(
            f"other_pictures: expected documents with different pictures, got {len(documents)} "
            f"without another one for document {doc}; leave the key out for this task"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """Refuse: no task of the suites here asks for it."""
        raise NotImplementedError("llm2clip_vlm answers single-round generation tasks only")

    generate_until_multi_round = loglikelihood
