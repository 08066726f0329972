"""Contrastive losses as pure functions.

All of them work on fp32 logits whatever the model's dtype (bf16 logits at scale 100 put 1 % of
noise on the gradient), and count an equal text that is not the pair's own as *no* negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm2clip_vlm.distributed import gather_with_grad, rank


def contrastive_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    caption_ids: Int[Tensor, " b"] | None = None,
    label_smoothing: float = 0.0,
    gather: bool = False,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE between images and texts: the mean of both directions' cross entropies.

    Negatives: every other text of the batch for an image, every other image for a text. Pairs
    whose captions are equal are no negatives of each other (`caption_ids`).
    Gathered: with `gather`, image and text embeddings and ids of all ranks, with gradient; each
    rank computes the rows of its own samples, so that the mean of the returned values over the
    ranks is the global loss (see `gather_with_grad` for why no factor is needed).
    Precision: similarities and softmax in fp32, also under autocast.

    Args:
        image_embeds: Unit-norm image embeddings.
        text_embeds: Unit-norm text embeddings; row i belongs to image i.
        logit_scale: Multiplies the cosines; already exponentiated.
        caption_ids: Equal numbers mean equal captions; none = all captions count as different.
        label_smoothing: Share of the target spread over the candidates (masked ones excluded).
        gather: Take the other ranks' embeddings as negatives.

    Returns:
        The scalar loss.

    Raises:
        ValueError: The embeddings' shapes differ or the batch is empty.

    Paper: LLM2CLIP v6 section 3.2 (CLIP loss); released code `eva_clip/loss.py`, which leaves the
    logits in the model's dtype and masks nothing.
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds)
    image_to_text = _rows_loss(
        image_embeds, text_embeds, logit_scale, caption_ids, label_smoothing, gather
    )
    text_to_image = _rows_loss(
        text_embeds, image_embeds, logit_scale, caption_ids, label_smoothing, gather
    )
    return (image_to_text + text_to_image) / 2


def caption_contrastive_loss(
    query: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    scale: Float[Tensor, ""] | float,
    symmetric: bool = True,
    ids: Int[Tensor, " b"] | None = None,
    *,
    gather: bool = False,
) -> Float[Tensor, ""]:
    """InfoNCE between two captions of the same image (stage 1).

    Negatives: the positives of the batch's other records (symmetric: also their queries), except
    records with an equal id. Gathered and precision: as in :func:`contrastive_loss`.

    Args:
        query: One caption's embedding of each record; normalised here.
        positive: Another caption's embedding of the same record; normalised here.
        scale: Multiplies the cosines (50 is a temperature of 0.02).
        symmetric: Mean of both directions; false = only query to positive, as the released code.
        ids: Record (or image) of each row; rows with equal ids are no negatives of each other.
        gather: Take the other ranks' captions as negatives.

    Returns:
        The scalar loss.

    Raises:
        ValueError: The embeddings' shapes differ or the batch is empty.

    Paper: LLM2CLIP v6 section 3.1; released code `llm_caption_contrastive`, scale 50.
    """
    _check_pair("query", query, "positive", positive)
    query = F.normalize(query.float(), dim=-1)
    positive = F.normalize(positive.float(), dim=-1)
    forward = _rows_loss(query, positive, scale, ids, 0.0, gather)
    if not symmetric:
        return forward
    return (forward + _rows_loss(positive, query, scale, ids, 0.0, gather)) / 2


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape or a.shape[0] == 0:
        raise ValueError(
            f"{name_a} and {name_b} must be matrices of equal shape [batch, width] with at least "
            f"one row, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _rows_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    ids: Tensor | None,
    label_smoothing: float,
    gather: bool,
) -> Tensor:
    """Mean cross entropy of this rank's queries over the keys of all ranks."""
    first = rank() * queries.shape[0] if gather else 0
    all_keys = gather_with_grad(keys) if gather else keys
    targets = torch.arange(first, first + queries.shape[0], device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        logits = (queries.float() @ all_keys.float().T) * scale
        if ids is not None:
            all_ids = gather_with_grad(ids) if gather else ids
            same = ids[:, None] == all_ids[None, :]
            same[torch.arange(len(ids), device=ids.device), targets] = False
            logits = logits.masked_fill(same, float("-inf"))
        log_probs = F.log_softmax(logits, dim=-1)
        loss = -log_probs.gather(1, targets[:, None]).squeeze(1)
        if label_smoothing:
            candidates = torch.isfinite(logits)
            spread = -log_probs.masked_fill(~candidates, 0.0).sum(-1) / candidates.sum(-1)
            loss = (1 - label_smoothing) * loss + label_smoothing * spread
        return loss.mean()
