"""Stage 1's trainer: two captions of one image attract, captions of other images repel."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from llm2clip_vlm.config import LoraSection
from llm2clip_vlm.data.captions import CaptionPair, CaptionPairs, EpochSampler
from llm2clip_vlm.distributed import gather_with_grad, is_initialized, rank
from llm2clip_vlm.losses import caption_contrastive_loss
from llm2clip_vlm.models.caption_tokens import CaptionTokenizer, pad_tokens
from llm2clip_vlm.models.text_encoder import Pooling, TextEncoder, pool
from llm2clip_vlm.training.encoder_trainer import check_contrastive_arguments
from llm2clip_vlm.training.strict_resume import StrictResumeMixin

logger = logging.getLogger(__name__)

LENGTH_GROUPS = 4
"""Forward passes of a batch, each over captions of like length. One pass over short and long
captions mixed would spend more than half of its tokens on padding."""
_ROWS_PER_GROUP = 16
_BLOCK = 16384


class TokenTable:
    """Token ids of many texts, made once and kept in two arrays.

    Args:
        texts: In the order by which rows are asked for.
        tokenizer: Of the text encoder.
    """

    def __init__(self, texts: Sequence[str], tokenizer: CaptionTokenizer) -> None:
        flat: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        for start in range(0, len(texts), _BLOCK):
            tokens = tokenizer(texts[start : start + _BLOCK])
            lengths.extend(map(len, tokens))
            flat.append(np.fromiter((i for ids in tokens for i in ids), dtype=np.int32))
        self._flat = np.concatenate(flat)
        self._starts = np.cumsum([0, *lengths])

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of a text."""
        return self._flat[self._starts[row] : self._starts[row + 1]]


class PairCollator:
    """Caption pairs to padded batches.

    Args:
        table: Token ids of the pairs' texts.
        pad_token_id: Fills up.
        num_front_tokens: Tokens at the start of each text that are not pooled.
    """

    def __init__(self, table: TokenTable, pad_token_id: int, num_front_tokens: int) -> None:
        self.table = table
        self.pad_token_id = pad_token_id
        self.num_front_tokens = num_front_tokens

    def __call__(self, pairs: Sequence[CaptionPair]) -> dict[str, Any]:
        """Pads each of up to :data:`LENGTH_GROUPS` groups to its own longest caption.

        The number of groups depends on the number of pairs alone: all processes run equally many
        forward passes.

        Returns:
            `groups`: arguments of the encoder for each group; `order`: int64 `[2b]`, where each
            row of `[queries; positives]` stands in the concatenated groups; `texts`: int64
            `[b, 2]`; `records`: int64 `[b]`.
        """
        rows = [pair.query for pair in pairs] + [pair.positive for pair in pairs]
        tokens = [self.table[row] for row in rows]
        by_length = np.argsort([-len(ids) for ids in tokens], kind="stable")
        count = max(1, min(LENGTH_GROUPS, len(rows) // _ROWS_PER_GROUP))
        groups = [
            pad_tokens([tokens[i] for i in part], self.pad_token_id, self.num_front_tokens)
            for part in np.array_split(by_length, count)
        ]
        return {
            "groups": groups,
            "order": torch.from_numpy(np.argsort(by_length)),
            "texts": torch.tensor([[pair.query, pair.positive] for pair in pairs]),
            "records": torch.tensor([pair.record for pair in pairs]),
        }


def alike_ids(texts: Int[Tensor, "n 2"], records: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One number a pair, equal where two pairs must not be each other's negatives.

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


def add_adapter(backbone: PreTrainedModel, lora: LoraSection) -> Any:
    """A PEFT model that trains a LoRA adapter and freezes the rest.

    Args:
        backbone: The decoder.
        lora: Rank, scaling, dropout and the layers to adapt.

    Returns:
        A `peft.PeftModel`; its Trainer checkpoints hold the adapter alone.

    Paper: LLM2CLIP v6 appendix C.1 (r = 16, alpha = 32).
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        task_type=TaskType.FEATURE_EXTRACTION,
    )
    return get_peft_model(backbone, config)


class CaptionContrastiveTrainer(StrictResumeMixin, Trainer):
    """`transformers.Trainer` for pairs of captions, contrasted over the global batch.

    Embeddings are gathered over all ranks with gradient: n processes compute the loss and the
    gradient of one with the same global batch (dropout apart). Pairs of equal records or texts
    are no negatives of each other.

    Args:
        model: The encoder's backbone, or an adapter on it (:func:`add_adapter`).
        args: Training arguments; incomplete batches must be dropped.
        train_dataset: Caption pairs.
        encoder: Gives tokenizer and pooling.
        scale: Multiplies cosine similarities.
        symmetric: Both directions.
        callbacks: More callbacks.

    Raises:
        ValueError: Gradient accumulation, incomplete batches, fewer pairs than one batch, or
            DeepSpeed ZeRO-3.

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
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_contrastive_arguments(args)
        if len(train_dataset) < args.per_device_train_batch_size * args.world_size:
            raise ValueError(
                f"an epoch has {len(train_dataset)} pairs, fewer than one global batch of "
                f"{args.per_device_train_batch_size * args.world_size}; lower global_batch_size "
                "and trainer.per_device_train_batch_size"
            )
        self.pairs = train_dataset
        self.pooling: Pooling = encoder.settings.pooling
        self.scale = scale
        self.symmetric = symmetric
        tokens = encoder.tokens
        table = TokenTable(train_dataset.texts, tokens)
        logger.info(
            "%d different captions, %d cut at %d tokens",
            len(train_dataset.texts),
            tokens.num_truncated,
            encoder.settings.max_length_tokens,
        )
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=PairCollator(table, tokens.pad_token_id, tokens.num_front_tokens),
            callbacks=callbacks,
        )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        return EpochSampler(self.pairs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of all groups of a batch (an estimate, as transformers makes it)."""
        return sum(int(Trainer.floating_point_ops(self, group)) for group in _groups(inputs))

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
            return_outputs: Also return the embeddings.
            num_items_in_batch: Not used: the batch is the unit, and nothing is accumulated.

        Returns:
            The loss, or the loss and `{"query", "positive"}`.
        """
        embeds = torch.cat([self._embed(model, **group) for group in _groups(inputs)])
        query, positive = embeds[inputs["order"]].chunk(2)
        records, texts = gather_with_grad(inputs["records"]), gather_with_grad(inputs["texts"])
        first = rank() * len(query) if is_initialized() else 0
        loss = caption_contrastive_loss(
            query,
            positive,
            self.scale,
            self.symmetric,
            ids=alike_ids(texts, records)[first : first + len(query)],
            gather=is_initialized(),
        )
        return (loss, {"query": query, "positive": positive}) if return_outputs else loss

    def _embed(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor
    ) -> Tensor:
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return pool(output.last_hidden_state, pool_mask, self.pooling)


def _groups(inputs: dict[str, Any]) -> Iterable[dict[str, Tensor]]:
    groups: Iterable[dict[str, Tensor]] = inputs["groups"]
    return groups
