"""Contrastive and distillation losses as pure functions.

All of them work on fp32 logits whatever the model's dtype (bf16 logits at scale 100 put 1 % of
noise on the gradient), and count an equal text that is not the pair's own as *no* negative.
Logits are computed in chunks of rows, and again in the backward pass: memory grows with the batch
instead of its square.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm2clip_vlm.distributed import gather_with_grad, rank
from llm2clip_vlm.losses.chunked import Excluded, LogSumExp

CHUNK_LOGITS = 2**22
"""Logits of a chunk, about (16 MiB in fp32)."""

NO_CANDIDATE = -(2**63)
"""Id of a hard negative that fills up: a candidate for no query."""


def contrastive_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    caption_ids: Int[Tensor, " n"] | None = None,
    label_smoothing: float = 0.0,
    gather: bool = False,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE between images and texts: the mean of both directions' cross entropies.

    Negatives: every other image's texts for an image, every other image for a text. Pairs whose
    captions are equal are no negatives of each other (`caption_ids`).
    Several positives: with k texts an image, the image's term is the mean over its k texts of
    their cross entropy among all texts.
    Gathered: with `gather`, the embeddings and ids of all ranks, with gradient; each rank computes
    the rows of its own samples, so that the mean of the returned values over the ranks is the
    global loss (see `gather_with_grad` for why no factor is needed).
    Precision: similarities and softmax in fp32, also under autocast.

    Args:
        image_embeds: Unit-norm image embeddings.
        text_embeds: Unit-norm text embeddings, `n = k * b`; rows `k*i .. k*i + k - 1` belong to
            image i.
        logit_scale: Multiplies the cosines; already exponentiated.
        caption_ids: Equal numbers mean equal captions. None: all captions count as different.
        label_smoothing: Share of the target spread over the candidates (masked ones excluded).
        gather: Take the other ranks' embeddings as negatives; all ranks need equal shapes.

    Returns:
        The scalar loss.

    Raises:
        ValueError: The embeddings' shapes do not fit or the batch is empty.

    Paper: LLM2CLIP v6 section 3.2 (CLIP loss); released code `eva_clip/loss.py`, which leaves the
    logits in the model's dtype and masks nothing. Several positives: DreamLIP (arXiv 2403.17007),
    as the "out" form of SupCon (arXiv 2004.11362, equation 2).
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds, several=True)
    return _info_nce(
        image_embeds,
        text_embeds,
        logit_scale,
        ids=caption_ids,
        label_smoothing=label_smoothing,
        gather=gather,
    )


def caption_contrastive_loss(
    query: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    scale: Float[Tensor, ""] | float,
    symmetric: bool = True,
    ids: Int[Tensor, " b"] | None = None,
    *,
    negatives: Float[Tensor, "m d"] | None = None,
    negative_ids: Int[Tensor, " m"] | None = None,
    label_smoothing: float = 0.0,
    gather: bool = False,
) -> Float[Tensor, ""]:
    """InfoNCE between two captions of the same image (stage 1).

    Negatives: the positives of the batch's other records (symmetric: also their queries), except
    records with an equal id, and every hard negative of the batch (queries only).
    Gathered and precision: as in :func:`contrastive_loss`.

    Args:
        query: One caption's embedding of each record; normalised here.
        positive: Another caption's embedding of the same record; normalised here.
        scale: Multiplies the cosines (50 is a temperature of 0.02).
        symmetric: Mean of both directions; false = only query to positive, as the released code.
        ids: Record (or image) of each row; rows with equal ids are no negatives of each other.
        negatives: Hard negatives, any number, shared by all queries; normalised here.
        negative_ids: Id of each hard negative, which is no negative of rows with an equal id, or
            `NO_CANDIDATE`.
        label_smoothing: See :func:`contrastive_loss`.
        gather: Take the other ranks' captions as negatives; all ranks need equal shapes.

    Returns:
        The scalar loss.

    Raises:
        ValueError: The embeddings' shapes do not fit or the batch is empty.

    Paper: LLM2CLIP v6 section 3.1; released code `llm_caption_contrastive`, scale 50.
    """
    _check_pair("query", query, "positive", positive)
    return _info_nce(
        F.normalize(query.float(), dim=-1),
        F.normalize(positive.float(), dim=-1),
        scale,
        ids=ids,
        symmetric=symmetric,
        label_smoothing=label_smoothing,
        negatives=None if negatives is None else F.normalize(negatives.float(), dim=-1),
        negative_ids=negative_ids,
        gather=gather,
    )


def sigmoid_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
    *,
    caption_ids: Int[Tensor, " n"] | None = None,
    gather: bool = False,
) -> Float[Tensor, ""]:
    """SigLIP's loss: a yes or no for every image with every text, summed and divided by the images.

    Negatives, gathered and precision: as in :func:`contrastive_loss`; only texts are gathered.

    Args:
        image_embeds: Unit-norm image embeddings.
        text_embeds: Unit-norm text embeddings; k consecutive rows belong to each image.
        logit_scale: Multiplies the cosines; already exponentiated (SigLIP starts at 10).
        logit_bias: Added to the logits (SigLIP starts at -10: most pairs are negatives).
        caption_ids: Equal numbers mean equal captions, which are no negatives.
        gather: Take the other ranks' texts as negatives; all ranks need equal shapes.

    Returns:
        The scalar loss.

    Raises:
        ValueError: The embeddings' shapes do not fit or the batch is empty.

    Paper: SigLIP (arXiv 2303.15343) algorithm 1; the authors trained LLM2CLIP's SigLIP2 towers
    with it (issue 51 of their repository), the released code has the softmax loss alone.
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds, several=True)
    rows, keys = image_embeds, gather_with_grad(text_embeds) if gather else text_embeds
    own = _own_columns(rows, len(text_embeds) // len(rows), gather)
    key_ids = gather_with_grad(caption_ids) if gather and caption_ids is not None else caption_ids
    row_ids = None if caption_ids is None else rearrange(caption_ids, "(n k) -> n k", n=len(rows))
    excluded = _exclusion(row_ids, key_ids, own)

    def chunk_loss(start: int, end: int) -> Tensor:
        logits = (rows[start:end].float() @ keys.float().T) * logit_scale + logit_bias
        signs = torch.full_like(logits, -1.0).scatter_(1, own[start:end], 1.0)
        terms = F.softplus(-signs * logits)
        mask = excluded(start, end)
        return (terms if mask is None else terms.masked_fill(mask, 0.0)).sum()

    step = max(1, CHUNK_LOGITS // len(keys))
    total = rows.new_zeros((), dtype=torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), step):
            part = (start, min(start + step, len(rows)))
            total = total + checkpoint(
                chunk_loss, *part, use_reentrant=False, preserve_rng_state=False
            )
    return total / len(rows)


def cosine_loss(embeds: Float[Tensor, "b d"], target: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """One minus the mean cosine of each row with its target (distillation).

    No negatives, nothing gathered: the mean over ranks is the global value. Computed in fp32.

    Args:
        embeds: Embeddings of any norm.
        target: What each row should point at, of any norm; no gradient flows into it.

    Returns:
        The scalar loss, 0 to 2.

    Raises:
        ValueError: The shapes differ or the batch is empty.

    Paper: half the mean squared error of unit vectors, as ProCLIP (2510.18795) uses it.
    """
    _check_pair("embeds", embeds, "target", target)
    return 1 - F.cosine_similarity(embeds.float(), target.detach().float(), dim=-1).mean()


def relational_distillation(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b t"], *, gather: bool = False
) -> Float[Tensor, ""]:
    """Mean squared difference of all pairs' cosines: the embeddings may turn as a whole.

    Negatives: none. Gathered: with `gather` both sides of all ranks, with gradient for the student;
    each rank computes its own rows, so that the mean over ranks is the global value.

    Args:
        student: Embeddings of any norm.
        teacher: Embeddings of any norm and width, of the same inputs; no gradient flows in.
        gather: Also pairs across ranks; all ranks need equal shapes.

    Returns:
        A scalar, 0 where the student keeps every angle; pairs of a row with itself are left out.

    Raises:
        ValueError: Different numbers of rows, or fewer than two.

    Paper: ProCLIP (2510.18795), pairwise distances; Park et al. 2019 (1904.05068), equation 1.
    """
    if len(student) != len(teacher) or len(student) < 2 - gather:
        raise ValueError(
            f"expected as many rows on both sides, at least two, got {len(student)}, {len(teacher)}"
        )
    differences = []
    for embeds, sign in ((student, 1.0), (teacher.detach(), -1.0)):
        with torch.autocast(embeds.device.type, enabled=False):
            unit = F.normalize(embeds.float(), dim=-1)
            differences.append(sign * (unit @ (gather_with_grad(unit) if gather else unit).T))
    difference = torch.add(*differences)
    mask = torch.ones_like(difference).scatter_(1, _own_columns(student, 1, gather), 0.0)
    return (difference.square() * mask).sum() / mask.sum()


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor, several: bool = False) -> None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and len(a) > 0 < len(b)
    if not fits or (len(b) % len(a) if several else len(a) != len(b)):
        more = f", or {name_b} with k rows for each of the other's" if several else ""
        raise ValueError(
            f"{name_a} and {name_b} must be matrices of equal shape [batch, width] with at least "
            f"one row{more}; got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _own_columns(rows: Tensor, k: int, gather: bool) -> Tensor:
    """Positions of each row's k keys among the keys of all ranks, `[b, k]`."""
    first = rank() * len(rows) if gather else 0
    owners = torch.arange(first, first + len(rows), device=rows.device)
    return owners[:, None] * k + torch.arange(k, device=rows.device)


def _exclusion(row_ids: Tensor | None, key_ids: Tensor | None, own: Tensor) -> Excluded:
    """Keys that share an id with a row and are not its own; ids of a row or key may be several."""

    def excluded(start: int, end: int) -> Tensor | None:
        if row_ids is None or key_ids is None:
            return None
        columns = own[start:end]
        row_part = rearrange(row_ids, "n ... -> n (...)")[start:end]
        key_part = rearrange(key_ids, "n ... -> n (...)")
        same = torch.zeros(len(row_part), len(key_part), dtype=torch.bool, device=own.device)
        for a in row_part.T:
            for b in key_part.T:
                same |= (a[:, None] == b) | (b == NO_CANDIDATE)
        return same.scatter_(1, columns, False)

    return excluded


def _info_nce(
    rows: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    ids: Tensor | None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
    gather: bool,
) -> Tensor:
    """Cross entropy of rows over keys and negatives, and (symmetric) of keys over rows.

    `keys` has k rows for each of `rows`; `ids` has one id a key, and a row has those of its k keys.
    """
    # Example, two images with k = 2 texts each: keys are t0 t1 t2 t3, and `own` of image 0 is
    # [0, 1]. Its term is -(log p(t0) + log p(t1)) / 2, where p is one softmax over the four texts.
    # If t2 reads as t0 does (equal ids), t2 leaves the softmax of image 0, and image 0 that of t2:
    # pushing a right answer away would teach the opposite. With several ranks `own` starts after
    # the lower ranks' keys, since `together` puts the ranks' keys one after the other.
    if negative_ids is not None and ids is None:
        raise ValueError("negative_ids are given and ids are not; expected both, or none")
    together: Callable[[Tensor], Tensor] = gather_with_grad if gather else lambda tensor: tensor
    k, first = len(keys) // len(rows), rank() * len(keys) if gather else 0
    candidates = together(keys)
    columns = len(candidates) if symmetric else 0
    row_ids = None if ids is None else rearrange(ids, "(n k) -> n k", k=k)
    candidate_ids = None if ids is None else together(ids)
    if negatives is not None:
        candidates = torch.cat([candidates, together(negatives)])
        if candidate_ids is not None:
            if negative_ids is None:
                negative_ids = candidate_ids.new_full((len(negatives),), -1)
            candidate_ids = torch.cat([candidate_ids, together(negative_ids)])
    # A row's cross entropy is its log-sum-exp less its own scores, and one pass over chunks of rows
    # finds the log-sum-exp of both axes. A rank has only its rows of a column, so a column's value
    # is the log-sum-exp of what all ranks found.
    with torch.autocast(rows.device.type, enabled=False):
        scale = torch.as_tensor(scale, dtype=torch.float32, device=rows.device)
        row_lse, row_sum, row_count, *of_columns = LogSumExp.apply(
            rows.float(),
            candidates.float(),
            scale,
            _exclusion(row_ids, candidate_ids, _own_columns(rows, k, gather)),
            columns,
            max(1, CHUNK_LOGITS // len(candidates)),
            label_smoothing > 0,
        )
        own_keys = rearrange(keys, "(n k) d -> n k d", k=k)
        scores = (rows[:, None].float() * own_keys.float()).sum(-1) * scale
        own, other = 1 - label_smoothing, label_smoothing
        loss = (row_lse - own * scores.mean(1) - other * row_sum / row_count).mean()
        if not symmetric:
            return loss
        lse, total, count = (
            together(part[None])[:, first : first + len(keys)] for part in of_columns
        )
        spread = total.sum(0) / count.sum(0)
        backward = lse.logsumexp(0) - own * rearrange(scores, "n k -> (n k)") - other * spread
        return (loss + backward.mean()) / 2
