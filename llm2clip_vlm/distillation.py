"""Distillation losses between embeddings, as pure functions; similarities in fp32 like `losses`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llm2clip_vlm.distributed import gather_with_grad, rank


def cosine_distillation(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """One minus the mean cosine: each embedding stays where the teacher has it.

    Negatives: none. Gathered: nothing; the mean over ranks is the global value.

    Args:
        student: Any norm.
        teacher: Any norm; no gradient flows into it.

    Returns:
        A scalar between 0 and 2.

    Raises:
        ValueError: The shapes differ.

    Paper: half the mean squared error of unit vectors, as ProCLIP (2510.18795) uses it.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; embeddings of another space need the relational loss"
        )
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def relational_distillation(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b t"], *, gather: bool = False
) -> Float[Tensor, ""]:
    """Mean squared difference of all pairs' cosines: the embeddings may turn as a whole.

    Negatives: none. Gathered: with `gather` both sides of all ranks, with gradient for the student;
    each rank computes its own rows, so that the mean over ranks is the global value.

    Args:
        student: Any norm.
        teacher: Any norm and width, row i the same input as the student's; no gradient flows in.
        gather: Also pairs across ranks; all ranks need equal shapes.

    Returns:
        A scalar, 0 where the student keeps every angle; the pairs of a row with itself left out.

    Raises:
        ValueError: Different numbers of rows, or fewer than two.

    Paper: ProCLIP (2510.18795), pairwise distances; Park et al. 2019 (1904.05068), equation 1.
    """
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} rows, the teacher {len(teacher)}")
    first = rank() * len(student) if gather else 0
    differences = []
    for embeds, sign in ((student, 1.0), (teacher.detach(), -1.0)):
        with torch.autocast(embeds.device.type, enabled=False):
            unit = F.normalize(embeds.float(), dim=-1)
            differences.append(sign * (unit @ (gather_with_grad(unit) if gather else unit).T))
    difference = torch.add(*differences)
    if difference.shape[1] < 2:
        raise ValueError("relational distillation needs at least two rows, got one")
    own = torch.arange(len(difference), device=difference.device)
    mask = torch.ones_like(difference)
    mask[own, first + own] = 0.0
    return (difference.square() * mask).sum() / mask.sum()
