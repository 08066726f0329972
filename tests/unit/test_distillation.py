"""Distillation losses: values by hand, no gradient to the teacher, equal at any world size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.losses import contrastive as losses
from llm2clip_vlm.losses.contrastive import cosine_loss, relational_distillation


def embeds(seed: int, rows: int = 6, width: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_cosine_is_half_the_squared_distance_of_unit_vectors() -> None:
    a, b = embeds(0), embeds(1)
    want = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean() / 2
    torch.testing.assert_close(cosine_loss(a, b), want)
    torch.testing.assert_close(cosine_loss(a, 3 * a), torch.tensor(0.0))
    with pytest.raises(ValueError, match="equal shape"):
        cosine_loss(a, embeds(1, width=5))


def test_relational_compares_angles_only() -> None:
    a, b = embeds(0), embeds(1, width=7)
    want = 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                one, two = (F.cosine_similarity(x[i], x[j], dim=0) for x in (a, b))
                want += float((one - two) ** 2) / 30
    assert relational_distillation(a, b).item() == pytest.approx(want, rel=1e-5)
    turn = torch.linalg.qr(embeds(2, 4)).Q
    assert relational_distillation(2 * a @ turn, a).item() == pytest.approx(0.0, abs=1e-10)
    assert cosine_loss(a @ turn, a).item() > 0.1
    with pytest.raises(ValueError, match="got 6, 5"):
        relational_distillation(a, b[:5])
    with pytest.raises(ValueError, match="at least two, got 1"):
        relational_distillation(a[:1], b[:1])


@pytest.mark.parametrize("loss", [cosine_loss, relational_distillation])
def test_no_gradient_to_the_teacher_and_fp32_inside(loss: object) -> None:
    student, teacher = embeds(0).requires_grad_(), embeds(1).requires_grad_()
    value = loss(student.bfloat16(), teacher.bfloat16())  # type: ignore[operator]
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_mean_over_ranks_is_the_global_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = embeds(0), embeds(1)
    whole = relational_distillation(student, teacher)
    unit = [F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)]
    parts = []
    for rank in (0, 1):
        gathered = iter(unit)
        monkeypatch.setattr(losses, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(losses, "gather_with_grad", lambda _, g=gathered: next(g))
        rows = slice(3 * rank, 3 * rank + 3)
        parts.append(relational_distillation(student[rows], teacher[rows], gather=True))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
