"""Answers from a vision-language checkpoint: batched, left-padded, through its own chat template.

Evaluation follows training: a prompt is what the checkpoint's template makes of the messages, and
nothing is added to it. Failures raise; an answer is never replaced by an empty one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, ProcessorMixin

from llm2clip_vlm.chat.labels import prompt_text
from llm2clip_vlm.chat.template import render, template_of
from llm2clip_vlm.chat.text_tokens import TextTokens, text_tokens
from llm2clip_vlm.constants import IMAGE_TOKEN
from llm2clip_vlm.data.reading.images import upright_rgb
from llm2clip_vlm.evaluation.vlm.shared_prefix import PrefixSharing, places
from llm2clip_vlm.evaluation.vlm.task_helpers import pixel_hash, strip_control
from llm2clip_vlm.evaluation.vlm.token_queue import Closed, TokenQueue

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k")
_IGNORED = frozenset({"image_aspect_ratio"})
_KNOWN = frozenset({"max_new_tokens", "until", "do_sample", "num_beams", "repetition_penalty"})
"""Options that a task may ask for, beside `_SAMPLING`; another one is refused, since leaving it out
would change the score. `image_aspect_ratio` (of LLaVA's code) is left to the image processor."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the checkpoint's template writes it."""

    text: str
    """One placeholder for each image; it ends where the answer begins."""
    images: tuple[Image.Image, ...] = ()
    """Images in the order of their placeholders."""
    shown: Mapping[int, str] = field(default_factory=dict)
    """Characters of :attr:`text` that stand for others, where a text in it has a control token's
    name, and stays text."""

    @cached_property
    def pictures(self) -> str:
        """Hash of the images' pixels."""
        return pixel_hash(self.images)


class _TextStays:
    """A processor's tokenizer, for the texts of prompts with :attr:`Prompt.shown`.

    The processor puts visual tokens into a text as always; then what the template and the
    processor wrote is control, and the messages' text is not.
    """

    def __init__(self, tokenizer: Any, known: TextTokens, prompts: Sequence[Prompt]) -> None:
        self._tokenizer, self._known, self._prompts = tokenizer, known, prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(
        self, text: Sequence[str], add_special_tokens: bool = True, **options: Any
    ) -> BatchEncoding:
        named = [
            (self._known.named(one).translate(dict(prompt.shown)), one)
            for one, prompt in zip(text, self._prompts, strict=True)
        ]
        rows = [self._known.encode(t, add_special_tokens=add_special_tokens) for t, _ in named]
        padding = {k: v for k, v in options.items() if k in ("padding", "padding_side")}
        padded = self._tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows]},
            return_tensors=options.get("return_tensors"),
            **padding,
        )

        def token_at(row: int, char: int) -> int:
            at = len(self._known.named(named[row][1][: char + 1])) - 1
            ids, offsets = rows[row]
            before = len(padded["input_ids"][row]) - len(ids)  # padding is on the left
            return before + next(i for i, (begin, end) in enumerate(offsets) if begin <= at < end)

        padded.char_to_token = token_at
        return padded


@dataclass(frozen=True)
class Answer:
    """Answer of the model."""

    text: str
    """Decoded, cut at the first stop string, without control characters, stripped."""
    num_tokens: int
    """Tokens generated, the end token included."""
    cut: bool = False
    """Neither the end token nor a stop string came before the limit of tokens."""


class Generator:
    """Generates with one model and its processor.

    Attributes:
        model: A `LlavaForConditionalGeneration` or another image-text-to-text model.
        processor: Its processor, with a chat template.
        batch_size: Prompts a forward pass.
        max_new_tokens: Upper limit whatever a task asks for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 512,
    ) -> None:
        """Keep the model as it is; it is put into evaluation mode only while it generates.

        Raises:
            ValueError: A size is below 1, or the processor has no chat template (a checkpoint is
                evaluated with the template that it was trained with).
        """
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(
                "batch_size and max_new_tokens: expected at least 1, got "
                f"{batch_size} and {max_new_tokens}"
            )
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.image_token: str = getattr(processor, "image_token", IMAGE_TOKEN)
        self.template = template_of(processor)
        self._known = text_tokens(self.tokenizer, self.template)
        own: Any = model.generation_config
        eos = self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        self.eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
        pad = self.tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id
        self.pad_id: int = pad if pad is not None else (self.eos_ids or [0])[0]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.window: int | None = limit
        self._sharing = PrefixSharing(model, self.pad_id)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Apply the chat template.

        Args:
            messages: `{"role", "content": [{"type": "text", "text"} | {"type": "image", "url"}]}`;
                `url` holds a PIL image. Control tokens' names and `<image>` inside a text stay
                text; where the tokenizer cannot do that (a slow one), `<image>` is removed, which
                would be taken for a picture.

        Returns:
            The prompt, ending with the template's generation prompt.

        Raises:
            ValueError: A part is neither text nor a PIL image, or the template lost an image.
        """
        images: list[Image.Image] = []
        plain: list[dict[str, Any]] = []
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": strip_control(self._said(part["text"]))})
                elif part["type"] == "image" and isinstance(part["url"], Image.Image):
                    images.append(upright_rgb(part["url"]))
                    parts.append({"type": "image"})
                else:
                    raise ValueError(
                        f"message part {part['type']!r}: expected text or a PIL image, got "
                        f"{type(part.get('url')).__name__}; video and audio are not supported"
                    )
            plain.append({"role": message["role"], "content": parts})
        if self.tokenizer.is_fast:
            text, shown = prompt_text(plain, self.template, self.tokenizer)
        else:
            text, shown = render(plain, self.template, self.tokenizer, prompt=True), {}
        if (found := text.count(self.image_token)) != len(images):
            raise ValueError(
                f"chat template: expected {len(images)} {self.image_token} in the prompt, got "
                f"{found}: {text[:200]!r}"
            )
        return Prompt(text, tuple(images), shown)

    def _said(self, text: str) -> str:
        """Remove from a message's text what would be taken for a picture all the same."""
        if self.image_token not in text or (
            self.tokenizer.is_fast and self.image_token in self._known.tokens
        ):
            return text
        logger.warning("%s in a question would be taken for a picture; removed", self.image_token)
        return text.replace(self.image_token, "")

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: Sequence[Mapping[str, Any]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answer each prompt.

        Prompts with equal options, and with or without images, are batched together, sorted by
        length so that little is padded; or by picture, if many ask about the same one.

        Args:
            prompts: Result of :meth:`render`.
            options: Generation arguments of lmms-eval for each prompt (`max_new_tokens`, `until`,
                `do_sample`, `temperature`, `top_p`, `num_beams`). A temperature of 0 is greedy.
            progress: Called with the number of prompts done after each batch.

        Returns:
            Answers in the order of `prompts`.

        Raises:
            ValueError: An unknown option, or a prompt that does not fit the model's window.
        """
        if len(prompts) != len(options):
            raise ValueError(f"options: expected {len(prompts)} entries, got {len(options)}")
        groups: dict[tuple[Any, ...], list[int]] = {}
        settings = [self._settings(given) for given in options]
        for index, (prompt, (key, _, _)) in enumerate(zip(prompts, settings, strict=True)):
            groups.setdefault((key, bool(prompt.images)), []).append(index)
        answers: dict[int, Answer] = {}
        for members in groups.values():
            members.sort(key=lambda i: (len(prompts[i].images), len(prompts[i].text), i))
            place = places([prompts[i].pictures for i in members])
            members.sort(key=lambda i: (len(prompts[i].images), place[prompts[i].pictures]))
            _, config, until = settings[members[0]]
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                found = self._generate_batch([prompts[i] for i in batch], config, until)
                answers.update(zip(batch, found, strict=True))
                if progress is not None:
                    progress(len(batch))
        return [answers[index] for index in range(len(prompts))]

    def _settings(self, given: Mapping[str, Any]) -> tuple[str, GenerationConfig, tuple[str, ...]]:
        unknown = set(given) - _KNOWN - _IGNORED - set(_SAMPLING)
        if unknown:
            raise ValueError(
                f"generation_kwargs: {sorted(unknown)} not supported; expected some of "
                f"{sorted(_KNOWN | set(_SAMPLING))}"
            )
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature = given.get("temperature")
        sample = bool(given.get("do_sample", bool(temperature))) and temperature != 0
        names = (*(_SAMPLING if sample else ()), "repetition_penalty")
        extra = {name: given[name] for name in names if given.get(name)}
        asked = int(given.get("max_new_tokens") or self.max_new_tokens)
        config = GenerationConfig(
            do_sample=sample,
            max_new_tokens=min(asked, self.max_new_tokens),
            num_beams=int(given.get("num_beams") or 1),
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            **extra,
        )
        key = repr((sample, config.max_new_tokens, config.num_beams, sorted(extra.items()), until))
        return key, config, until

    def _encode(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        # As apply_chat_template in transformers: a template that writes bos gets no second one.
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        written = bos is not None and prompts[0].text.startswith(bos)
        images = [image for prompt in prompts for image in prompt.images]
        if any(prompt.shown for prompt in prompts):
            self.processor.tokenizer = _TextStays(self.tokenizer, self._known, prompts)
        try:
            encoded = self.processor(
                text=[prompt.text for prompt in prompts],
                images=images or None,
                padding=True,
                padding_side="left",
                add_special_tokens=not written,
                return_tensors="pt",
            )
        finally:
            self.processor.tokenizer = self.tokenizer
        ids = encoded["input_ids"]
        if not written and eos is not None and bool((ids[:, -1] == eos).all()):
            # The tokenizer closed the prompt; the model would have nothing left to say.
            for name, value in encoded.items():
                encoded[name] = value[:, :-1] if value.shape == ids.shape else value
        length = encoded["input_ids"].shape[1]
        if self.window is not None and length >= self.window:
            raise ValueError(
                f"prompt of {length} tokens: expected fewer than the model's window of "
                f"{self.window}; begins {prompts[-1].text[:80]!r}"
            )
        inputs = {name: value.to(self.model.device) for name, value in encoded.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _generate_batch(
        self, prompts: Sequence[Prompt], config: GenerationConfig, until: tuple[str, ...]
    ) -> list[Answer]:
        inputs = self._encode(prompts)
        length = inputs["input_ids"].shape[1]
        fitting = self._within_window(config, length)
        if fitting is not config and len(prompts) > 1:  # the longest shortens no other's answer
            return [self._generate_batch([prompt], config, until)[0] for prompt in prompts]
        with _evaluating(self.model):
            if config.num_beams == 1 and all(len(prompt.images) == 1 for prompt in prompts):
                inputs = self._sharing(inputs, [prompt.pictures for prompt in prompts])
            output = self.model.generate(**inputs, generation_config=fitting)  # type: ignore[operator]
        return [self._answer(row.tolist(), until) for row in output[:, length:]]

    def _within_window(self, config: GenerationConfig, length: int) -> GenerationConfig:
        if self.window is None or length + config.max_new_tokens <= self.window:
            return config
        room = self.window - length
        logger.warning("answers cut to %d tokens by the model's window", room)
        return GenerationConfig(**{**config.to_dict(), "max_new_tokens": room})

    def stream(self, prompt: Prompt, options: Mapping[str, Any]) -> Iterator[Answer]:
        """Answer one prompt while somebody watches.

        Closing the iterator ends the generation.

        Args:
            prompt: Result of :meth:`render`.
            options: Those of :meth:`generate`, without beams.

        Yields:
            The answer so far after each token; the last one is what :meth:`generate` returns.

        Raises:
            ValueError: See :meth:`generate`.
        """
        _, config, until = self._settings(options)
        inputs = self._encode([prompt])
        config = self._within_window(config, inputs["input_ids"].shape[1])
        tokens, kept = TokenQueue(), list[int]()

        def generate() -> None:
            try:
                with suppress(Closed), _evaluating(self.model):
                    self.model.generate(  # type: ignore[operator]
                        **inputs, generation_config=config, streamer=tokens
                    )
            finally:
                tokens.end()

        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(generate)
            try:
                while (token := tokens.found.get()) is not None:
                    kept.append(token)
                    yield self._answer(kept, until)
            finally:
                tokens.closed = True
            done.result()

    def _answer(self, ids: Sequence[int], until: tuple[str, ...]) -> Answer:
        ends = [place for place, token in enumerate(ids) if token in self.eos_ids]
        kept = ids[: ends[0]] if ends else ids  # an end token need be no special one
        # Some templates put a newline before the answer, or thoughts (Qwen3: none) between marks:
        # a stop string counts after the first word of what is said.
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode(kept, **plain).lstrip()
        _, thought, said = text.rpartition("</think>")
        text = whole = said.lstrip() if thought or not text.startswith("<think>") else ""
        for stop in filter(None, until):
            text = text.split(stop, 1)[0]
        length = len(kept) + bool(ends)
        return Answer(strip_control(text).strip(), length, not ends and text == whole)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; a live model gets its training mode back.

    Nor do settings of its own act, such as the repetition penalty of Qwen2.5, with which
    transformers would fill up the options: greedy would not be the likeliest word.
    """
    was_training, own = model.training, model.generation_config
    model.eval().generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training).generation_config = own
