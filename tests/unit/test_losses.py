"""Contrastive losses: values, gradients, masking, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.losses import caption_contrastive_loss, contrastive_loss


def embeds(seed: int, rows: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=-1)


def reference(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """The definition, one row at a time, in the dtype of its arguments."""
    total = image.new_zeros(())
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            logits = scale * (b @ a[i])
            total = total + torch.logsumexp(logits, 0) - logits[i]
    return total / (2 * len(image))


def test_value_and_gradient_match_the_definition_in_float64() -> None:
    image, text = embeds(0).requires_grad_(), embeds(1).requires_grad_()
    expected = torch.autograd.grad(reference(image, text, 100.0), (image, text))
    loss = contrastive_loss(image, text, 100.0)
    assert loss.dtype == torch.float32
    # measured worst case 1.4e-6 at scale 100
    torch.testing.assert_close(loss.double(), reference(image, text, 100.0), atol=5e-6, rtol=0)
    for got, want in zip(torch.autograd.grad(loss, (image, text)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_logits_are_fp32_for_bf16_embeddings_and_under_autocast() -> None:
    image, text = embeds(0, 64, 32, torch.float32), embeds(1, 64, 32, torch.float32)
    exact = contrastive_loss(image, text, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(image, text, 100.0)
    assert torch.equal(exact, inside)
    rounded = contrastive_loss(image.bfloat16(), text.bfloat16(), 100.0)
    again = contrastive_loss(image.bfloat16().float(), text.bfloat16().float(), 100.0)
    assert torch.equal(rounded, again)


def test_gradient_reaches_the_scale() -> None:
    scale = torch.tensor(10.0, requires_grad=True)
    contrastive_loss(embeds(0), embeds(1), scale).backward()
    assert scale.grad is not None and scale.grad.abs() > 0


def test_equal_captions_are_no_negatives() -> None:
    image, text = embeds(0), embeds(1)
    text[3] = text[0]
    ids = torch.tensor([7, 1, 2, 7, 4, 5])
    plain = contrastive_loss(image, text, 20.0)
    masked = contrastive_loss(image, text, 20.0, caption_ids=ids)
    assert masked < plain
    assert torch.equal(plain, contrastive_loss(image, text, 20.0, caption_ids=torch.arange(6)))
    # row 0 as if sample 3 were not there
    keep = [0, 1, 2, 4, 5]
    logits = 20.0 * (image[0] @ text[keep].T)
    want = torch.logsumexp(logits, 0) - logits[0]
    gradient_free = 20.0 * (image @ text.T)
    gradient_free[0, 3] = gradient_free[3, 0] = float("-inf")
    torch.testing.assert_close(-F.log_softmax(gradient_free, -1)[0, 0], want)
    by_hand = (
        F.cross_entropy(gradient_free, torch.arange(6))
        + F.cross_entropy(gradient_free.T, torch.arange(6))
    ) / 2
    torch.testing.assert_close(masked.double(), by_hand, atol=1e-5, rtol=0)


def test_a_batch_of_one_caption_has_zero_loss_and_finite_gradient() -> None:
    image = embeds(0).requires_grad_()
    loss = contrastive_loss(
        image, embeds(1), 20.0, caption_ids=torch.zeros(6, dtype=torch.long), label_smoothing=0.1
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert image.grad is not None and torch.isfinite(image.grad).all()


def test_label_smoothing_matches_torch() -> None:
    image, text = embeds(0), embeds(1)
    logits = 10.0 * (image @ text.T)
    target = torch.arange(6)
    want = (
        F.cross_entropy(logits, target, label_smoothing=0.2)
        + F.cross_entropy(logits.T, target, label_smoothing=0.2)
    ) / 2
    got = contrastive_loss(image, text, 10.0, label_smoothing=0.2)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_caption_loss_normalises_and_takes_one_or_both_directions() -> None:
    query, positive = embeds(0), embeds(1)
    both = caption_contrastive_loss(3 * query, 0.2 * positive, 50.0, True)
    assert both.item() == pytest.approx(contrastive_loss(query, positive, 50.0).item(), abs=1e-5)
    logits = 50.0 * (query @ positive.T)
    one = caption_contrastive_loss(query, positive, 50.0, symmetric=False)
    assert one.item() == pytest.approx(F.cross_entropy(logits, torch.arange(6)).item(), abs=1e-5)
    assert one.item() != pytest.approx(both.item(), abs=1e-3)


def test_caption_loss_masks_equal_ids() -> None:
    query, positive = embeds(0), embeds(1)
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    free = caption_contrastive_loss(query, positive, 50.0)
    assert caption_contrastive_loss(query, positive, 50.0, ids=ids) < free


@pytest.mark.parametrize(
    "shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((0, 3), (0, 3)), ((4,), (4,))]
)
def test_wrong_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="equal shape"):
        contrastive_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), 1.0)
