"""Stage 1's trainer: two captions of one image attract, captions of other images repel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from llm2clip_vlm.data.text.caption_draw import caption_id
from llm2clip_vlm.data.text.captions import CaptionPair, CaptionPairs
from llm2clip_vlm.distributed import gather_with_grad, is_initialized, max_over_ranks, rank
from llm2clip_vlm.losses.contrastive import NO_CANDIDATE, caption_contrastive_loss
from llm2clip_vlm.models.text.caption_tokens import CaptionTokenizer, length_groups, pad_tokens
from llm2clip_vlm.models.text.text_encoder import TextEncoder, pool
from llm2clip_vlm.models.text.text_encoder_settings import Pooling
from llm2clip_vlm.training.encoder.encoder_trainer import ContrastiveTrainer, Measure
from llm2clip_vlm.training.grad_cache import Embeds, cached_loss


class PairCollator:
    """Caption pairs with token ids to padded batches.

    Args:
        tokens: Tokenizer of the text encoder, which made the ids; puts prompts into texts.
        micro_batch_tokens: Tokens of a group at most, padding counted, but for a single longer
            text. None: no limit.
    """

    def __init__(self, tokens: CaptionTokenizer, micro_batch_tokens: int | None = None) -> None:
        self.tokens = tokens
        self.budget_tokens = math.inf if micro_batch_tokens is None else micro_batch_tokens

    def __call__(self, pairs: Sequence[CaptionPair]) -> dict[str, Any]:
        """Groups all texts of a batch by length and pads each group to its own longest.

        Returns:
            `groups`: arguments of the encoder for each group; `order`: int64 `[2b + m]`, where each
            row of `[queries; positives; hard negatives]` stands in the concatenated groups;
            `texts`: int64 `[b, 2]`, the `caption_id` of what is read of them; `negatives`: int64
            `[m]`, that of the hard negatives; `records`: int64 `[b]`.
        """
        hard = [pair for pair in pairs if pair.negative]
        known = {prompt: self.tokens.ids(prompt) for prompt in {pair.prompt for pair in pairs}}
        prompts = [known[pair.prompt] for pair in pairs] + [[]] * (len(pairs) + len(hard))
        given = [(n, pair) for n, part in enumerate((pairs, pairs, hard)) for pair in part]
        rows: list[Any] = [pair.ids[n] for n, pair in given]
        texts = [(pair.query, pair.positive, pair.negative)[n] for n, pair in given]
        numbers = torch.tensor([*map(self._number, texts, rows)])
        rows = [
            self.tokens.add_prompt(ids, prompt) if prompt else ids
            for ids, prompt in zip(rows, prompts, strict=True)
        ]
        parts = length_groups([len(ids) for ids in rows], self.budget_tokens)
        front = self.tokens.num_front_tokens
        groups = [
            pad_tokens(
                [rows[i] for i in part],
                self.tokens.pad_token_id,
                [front + len(prompts[i]) for i in part],
            )
            for part in parts
        ]
        return {
            "groups": groups,
            "order": torch.from_numpy(np.argsort(np.concatenate(parts))),
            "texts": rearrange(numbers[: 2 * len(pairs)], "(two b) -> b two", two=2),
            "negatives": numbers[2 * len(pairs) :],
            "records": torch.tensor([pair.record for pair in pairs]),
        }

    def _number(self, text: str, ids: Any) -> int:
        """Number that texts share which are equal as far as the encoder reads."""
        if len(ids) == self.tokens.max_length_tokens:
            text = str(self.tokens.tokenizer.decode(ids))
        return caption_id(text)


def split_groups(groups: Sequence[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Split into more groups, the texts in the same order: the largest is halved repeatedly.

    Processes whose texts have other lengths have other numbers of groups, but must run equally many
    forward and backward passes. Where every text is alone (another process has more of them), the
    last one is repeated after the others, where no loss asks for it.

    Args:
        groups: Arguments of the encoder, sorted from long to short.
        count: How many groups.
    """
    parts = list(groups)
    while len(parts) < count:
        sizes = [part["input_ids"].shape for part in parts]
        at = max(range(len(parts)), key=lambda i: (sizes[i][0] > 1, sizes[i].numel()))
        if sizes[at][0] == 1:
            parts.append(parts[-1])
            continue
        half = (len(parts[at]["input_ids"]) + 1) // 2
        longest = int(parts[at]["attention_mask"][half:].sum(1).max())
        parts[at : at + 1] = [
            {name: value[:half] for name, value in parts[at].items()},
            {name: value[half:, :longest] for name, value in parts[at].items()},
        ]
    return parts


def alike_ids(texts: Int[Tensor, "n 2"], records: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One number a pair, equal for two pairs that must not be negatives of each other.

    Pairs are alike that come from one record or share a text, and those that are linked through
    others (two images whose captions are partly equal).

    Args:
        texts: Query and positive of each pair.
        records: Record of each pair.
    """
    alike = records[:, None] == records[None, :]
    for own in texts.T:
        for other in texts.T:
            alike |= own[:, None] == other[None, :]
    ids = torch.arange(len(records), device=records.device)
    while True:
        smallest = torch.where(alike, ids[None, :], len(ids)).amin(dim=1)
        if torch.equal(smallest, ids):
            return ids
        ids = smallest


class CaptionContrastiveTrainer(ContrastiveTrainer):
    """`transformers.Trainer` for pairs of captions, contrasted over the global batch.

    Embeddings are gathered over all ranks with gradient: n processes compute the loss and the
    gradient of one with the same global batch (dropout apart). Pairs of equal records or texts
    are no negatives of each other. A pair's hard negative counts for all queries of the batch.
    `args.label_smoothing_factor` applies.

    Args:
        model: The encoder's backbone, or an adapter on it (`add_adapter`).
        args: Training arguments; incomplete batches must be dropped.
        train_dataset: Caption pairs with token ids, made by the encoder's tokenizer.
        encoder: Gives tokenizer and pooling.
        scale: Multiplies cosine similarities.
        symmetric: Both directions.
        micro_batch_tokens: Tokens per forward pass, padding counted; more go through GradCache
            (:func:`~llm2clip_vlm.training.grad_cache.cached_loss`). None: all at once.
        measure: See :class:`ContrastiveTrainer`.
        callbacks: More callbacks.

    Raises:
        ValueError: See :class:`ContrastiveTrainer`.

    Paper: LLM2CLIP v6 section 3.1 (supervised SimCSE); released code `llm_caption_contrastive`,
    which adds a random third caption as a negative and keeps equal captions as negatives.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: CaptionPairs,
        *,
        encoder: TextEncoder,
        scale: float,
        symmetric: bool = True,
        micro_batch_tokens: int | None = None,
        measure: Measure | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.pooling: Pooling = encoder.settings.pooling
        self.scale = scale
        self.symmetric = symmetric
        self.micro_batch_tokens = micro_batch_tokens
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.requires_grad &= ".pooler." not in f".{name}"  # of BERT: makes no vector
        self._flops_per_token = sum(
            (6 if p.requires_grad else 4) * p.numel()
            for name, p in model.named_parameters()
            if p.ndim == 2 and "embed" not in name
        )
        super().__init__(
            model,
            args,
            train_dataset,
            unit="tokens",
            measure=measure,
            callbacks=callbacks,
            data_collator=PairCollator(encoder.tokens, micro_batch_tokens),
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the linear layers on a batch's tokens, forward and backward."""
        return self._flops_per_token * _num_tokens(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Contrastive loss of this rank's pairs against the global batch.

        Args:
            model: The (wrapped) model.
            inputs: A batch of :class:`PairCollator`.
            return_outputs: Also return an (empty) output.
            num_items_in_batch: Not used: the batch is the unit, and nothing is accumulated.

        Returns:
            The loss, or loss and output.
        """
        self.throughput.add(_num_tokens(inputs), self.floating_point_ops(inputs))
        groups: list[dict[str, Tensor]] = list(inputs["groups"])
        count, slots = max_over_ranks(
            len(groups), len(inputs["negatives"]), device=self.args.device
        )
        groups = split_groups(groups, count)

        def embed(parts: Sequence[dict[str, Tensor]]) -> Embeds:
            return Embeds((torch.cat([self._embed(model, **part) for part in parts]),))

        def loss(embeds: Embeds) -> Tensor:
            return self._loss(embeds.rows[0][inputs["order"]], inputs, slots)

        cached = self.micro_batch_tokens is not None and torch.is_grad_enabled()
        chunks = [[group] for group in groups] if cached else [groups]
        value = cached_loss(self.accelerator, model, chunks, embed, loss)
        return (value, {}) if return_outputs else value

    def _loss(self, embeds: Tensor, inputs: dict[str, Any], slots: int) -> Tensor:
        """Loss of `[queries; positives; hard negatives]`; all ranks fill as many negative slots."""
        texts, records = inputs["texts"], inputs["records"]
        query, positive, negatives = embeds.split(
            [len(records), len(records), len(embeds) - 2 * len(records)]
        )
        first = rank() * len(records) if is_initialized() else 0
        all_texts = gather_with_grad(texts)
        ids = alike_ids(all_texts, gather_with_grad(records))
        negative_ids = None
        if slots:
            empty = slots - len(negatives)
            # A hard negative equal to a pair's text is no negative of that pair and those like it.
            same = (inputs["negatives"][:, None, None] == all_texts).any(-1)
            found = torch.where(same.any(1), ids[same.int().argmax(1)], -1)
            negative_ids = F.pad(found, (0, empty), value=NO_CANDIDATE)
            negatives = F.pad(negatives, (0, 0, 0, empty))
        return caption_contrastive_loss(
            query,
            positive,
            self.scale,
            self.symmetric,
            ids=ids[first : first + len(query)],
            negatives=negatives if slots else None,
            negative_ids=negative_ids,
            label_smoothing=self.args.label_smoothing_factor,
            gather=is_initialized(),
        )

    def _embed(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor
    ) -> Tensor:
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return pool(output.last_hidden_state, pool_mask, self.pooling)


def _num_tokens(inputs: dict[str, Any]) -> int:
    return sum(int(group["attention_mask"].sum()) for group in inputs["groups"])
