"""Contrastive losses: values, gradients, masking, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_vlm.losses import contrastive as losses
from llm2clip_vlm.losses.contrastive import (
    caption_contrastive_loss,
    contrastive_loss,
    cosine_loss,
    sigmoid_loss,
)


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
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)  # measured 3.4e-5


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


IDS = torch.tensor([7, 1, 2, 7, 4, 5])
K_IDS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 2, 2])  # two texts an image


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("chunk_rows", [1, 4, 5])
@pytest.mark.parametrize("ids", [None, "ids", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("k", [1, 2])
def test_chunks_change_neither_value_nor_gradient(
    chunk_rows: int, ids: str | None, smoothing: float, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = embeds(0).requires_grad_(), embeds(1, 6 * k).requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    given = None if ids is None else torch.zeros(6 * k, dtype=torch.long)
    if ids == "ids":
        given = IDS if k == 1 else K_IDS
    options = {"caption_ids": given, "label_smoothing": smoothing}
    whole = contrastive_loss(image, text, scale, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_rows * len(text))
    parts = contrastive_loss(image, text, scale, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(parts, whole, atol=2e-6, rtol=1e-6)
    inputs = (image, text, scale)
    for got, want in zip(gradients(parts, *inputs), gradients(whole, *inputs), strict=True):
        torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)


def test_chunked_gradient_is_that_of_float64_at_scale_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 64 * 300)
    image, text = embeds(0, 300, 16).requires_grad_(), embeds(1, 300, 16).requires_grad_()
    logits = 100.0 * image @ text.T
    exact = (2 * logits.diagonal().neg() + logits.logsumexp(0) + logits.logsumexp(1)).mean() / 2
    loss = contrastive_loss(image.float(), text.float(), 100.0)
    for got, want in zip(gradients(loss, image, text), gradients(exact, image, text), strict=True):
        assert ((got - want).norm() / want.norm()).item() < 5e-6


def test_several_texts_an_image_match_the_definition() -> None:
    image, text = embeds(0), embeds(1, 12)
    logits = 10.0 * image @ text.T
    by_image, by_text = F.log_softmax(logits, 1), F.log_softmax(logits, 0)
    owner = torch.arange(6).repeat_interleave(2)
    own = owner == torch.arange(6)[:, None]
    want = -(by_image[own].mean() + by_text[own].mean()) / 2
    torch.testing.assert_close(
        contrastive_loss(image, text, 10.0).double(), want, atol=1e-5, rtol=0
    )
    # text 6 (of image 3) equals text 0 (of image 0): neither is the other's negative
    masked = logits.masked_fill(
        torch.zeros(6, 12, dtype=torch.bool).index_put(
            (torch.tensor([0, 3, 1, 1, 5]), torch.tensor([6, 0, 10, 11, 2])), torch.tensor(True)
        ),
        float("-inf"),
    )
    want = -(F.log_softmax(masked, 1)[own].mean() + F.log_softmax(masked, 0)[own].mean()) / 2
    got = contrastive_loss(image, text, 10.0, caption_ids=K_IDS)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chunk_logits", [losses.CHUNK_LOGITS, 4 * 9])
def test_hard_negatives_join_the_queries_candidates(
    symmetric: bool, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_logits)
    query, positive, negatives = embeds(0), embeds(1), embeds(2, 3)
    forward = 20.0 * query @ torch.cat([positive, negatives]).T
    # hard negative 1 is another caption of record 7 (rows 0 and 3)
    forward[[0, 3], 7] = float("-inf")
    forward[0, 3] = forward[3, 0] = float("-inf")
    target = torch.arange(6)
    want = F.cross_entropy(forward, target)
    if symmetric:
        want = (want + F.cross_entropy(forward[:, :6].T, target)) / 2
    got = caption_contrastive_loss(
        query,
        positive,
        20.0,
        symmetric,
        IDS,
        negatives=3 * negatives,
        negative_ids=torch.tensor([-1, 7, -1]),
    )
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    free = caption_contrastive_loss(query, positive, 20.0, symmetric, IDS)
    assert free < got


@pytest.mark.parametrize("chunk_rows", [6, 1, 4])
@pytest.mark.parametrize("k", [1, 2])
def test_sigmoid_loss_matches_the_definition(
    chunk_rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_rows * 6 * k)
    image, text = embeds(0).requires_grad_(), embeds(1, 6 * k).requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    ids = IDS if k == 1 else K_IDS
    signs = -torch.ones(6, 6 * k, dtype=torch.float64)
    signs[torch.arange(6).repeat_interleave(k), torch.arange(6 * k)] = 1
    same = (ids.view(6, k, 1) == ids).any(1) & (signs < 0)
    want = -F.logsigmoid(signs * (image @ text.T * scale + bias))[~same].sum() / 6
    got = sigmoid_loss(image, text, scale, bias, caption_ids=ids)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    inputs = (image, text, scale, bias)
    for a, b in zip(gradients(got, *inputs), gradients(want, *inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    free = sigmoid_loss(image, text, scale, bias)
    assert free > got


def test_cosine_loss() -> None:
    a, b = embeds(0), embeds(1)
    want = 1 - (a * b).sum(-1).mean()
    torch.testing.assert_close(cosine_loss(3 * a, b.float()).double(), want, atol=1e-6, rtol=0)
    assert cosine_loss(a, 2 * a).item() == pytest.approx(0.0, abs=1e-6)


def test_texts_that_no_image_owns_are_refused() -> None:
    with pytest.raises(ValueError, match="k rows for each"):
        contrastive_loss(embeds(0), embeds(1, 9), 1.0)
    with pytest.raises(ValueError, match="query and positive"):
        caption_contrastive_loss(embeds(0), embeds(1, 12), 1.0)
    with pytest.raises(ValueError, match="embeds and target"):
        cosine_loss(embeds(0), embeds(1, 3))


def dense(
    rows: Tensor, keys: Tensor, scale: float, own: list[list[int]], excluded: Tensor, smooth: float
) -> Tensor:
    """Mean over rows of the mean over a row's own keys of their cross entropy, in float64 loops."""
    total = rows.new_zeros(())
    for i, mine in enumerate(own):
        candidates = [j for j in range(len(keys)) if j in mine or not excluded[i, j]]
        logits = scale * (keys[candidates] @ rows[i])
        logs = logits - torch.logsumexp(logits, 0)
        for j in mine:
            own_term = -(1 - smooth) * logs[candidates.index(j)] - smooth * logs.mean()
            total = total + own_term / len(mine)
    return total / len(rows)


@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_equal_captions_with_several_prompts_are_no_negatives(smooth: float) -> None:
    """Three images of which two share a caption, two prompts each: the definition by loops."""
    image, text = embeds(0, 3), embeds(1, 6)
    ids = torch.tensor([7, 7, 8, 8, 7, 7])
    own = [[0, 1], [2, 3], [4, 5]]
    excluded = torch.tensor([[(ids[j] == ids[2 * i]).item() for j in range(6)] for i in range(3)])
    forward = dense(image, text, 10.0, own, excluded, smooth)
    back = dense(text, image, 10.0, [[j // 2] for j in range(6)], excluded.T, smooth)
    got = contrastive_loss(image, text, 10.0, caption_ids=ids, label_smoothing=smooth)
    torch.testing.assert_close(got.double(), (forward + back) / 2, atol=5e-6, rtol=0)
    apart = contrastive_loss(image, text, 10.0, label_smoothing=smooth)
    assert (got - apart).abs() > 1e-3


@pytest.mark.parametrize("limit", [2**22, 8])
def test_hard_negatives_that_fill_up_are_candidates_for_no_query(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", limit)
    query, positive, extra = embeds(0, 4), embeds(1, 4), embeds(2, 3)
    ids = torch.tensor([0, 1, 2, 1])
    negative_ids = torch.tensor([2, losses.NO_CANDIDATE, -1])
    keys = torch.cat([positive, extra])
    excluded = torch.zeros(4, 7, dtype=torch.bool)
    excluded[1, 3] = excluded[3, 1] = True  # equal ids
    excluded[2, 4] = True  # the hard negative that is record 2's own text
    excluded[:, 5] = True  # the slot that only fills up
    want = dense(query, keys, 20.0, [[i] for i in range(4)], excluded, 0.0)
    got = caption_contrastive_loss(
        query, positive, 20.0, False, ids, negatives=extra, negative_ids=negative_ids
    )
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=0)
    moved = torch.cat([extra[:1], -extra[1:2], extra[2:]])
    again = caption_contrastive_loss(
        query, positive, 20.0, False, ids, negatives=moved, negative_ids=negative_ids
    )
    assert torch.equal(again, got), "what fills up has a value"


def test_sigmoid_loss_by_loops() -> None:
    image, text = embeds(0, 3), embeds(1, 6)
    ids = torch.tensor([7, 7, 8, 8, 7, 7])
    total = image.new_zeros(())
    for i in range(3):
        for j in range(6):
            own = j // 2 == i
            if own or ids[j] != ids[2 * i]:
                logit = 10.0 * image[i] @ text[j] - 3.0
                total = total - F.logsigmoid(logit if own else -logit)
    got = sigmoid_loss(image, text, 10.0, -3.0, caption_ids=ids)
    torch.testing.assert_close(got.double(), total / 3, atol=5e-6, rtol=0)
