"""Log-sum-exp of a similarity matrix along both axes, without the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Excluded = Callable[[int, int], Tensor | None]
"""Mask of the logits of rows `start:end` that are no negatives, `[end - start, keys]`."""


class LogSumExp(torch.autograd.Function):
    """Log-sum-exp of `scale * rows @ keys.T` along both axes, in one pass over chunks of rows.

    Returns of each row, then of each of the first `columns` keys (over these rows only): the
    log-sum-exp, and with `sums` the sum of the logits and their number (else 0 and 1). Excluded
    logits take part in none. Memory: two chunks of logits beside what goes in and comes out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor,
        scale: Tensor,
        excluded: Excluded,
        columns: int,
        step: int,
        sums: bool,
    ) -> tuple[Tensor, ...]:
        """See the class; `rows` `[b, d]` and `keys` `[n, d]` are fp32, `step` the rows a chunk."""
        ctx.excluded, ctx.step, ctx.sums = excluded, step, sums
        row_lse, row_sum, row_count = rows.new_empty(len(rows)), *_nothing(rows, len(rows))
        col_lse = rows.new_full((columns,), -torch.inf)
        col_sum, col_count = _nothing(rows, columns)
        if sums:
            row_count.zero_()
            col_count.zero_()
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            logits = (rows[part] * scale) @ keys.T
            if (mask := excluded(part.start, part.stop)) is not None:
                logits.masked_fill_(mask, -torch.inf)
            row_lse[part] = logits.logsumexp(1)
            if columns:
                col_lse = torch.logaddexp(col_lse, logits[:, :columns].logsumexp(0))
            if sums:
                counted = torch.ones_like(logits)
                if mask is not None:
                    logits.masked_fill_(mask, 0.0)
                    counted.masked_fill_(mask, 0.0)
                row_sum[part], row_count[part] = logits.sum(1), counted.sum(1)
                col_sum += logits[:, :columns].sum(0)
                col_count += counted[:, :columns].sum(0)
        ctx.save_for_backward(rows, keys, scale, row_lse, col_lse)
        ctx.mark_non_differentiable(row_count, col_count)
        return row_lse, row_sum, row_count, col_lse, col_sum, col_count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax of both axes, chunk by chunk, from the log-sum-exp that forward found."""
        rows, keys, scale, row_lse, col_lse = ctx.saved_tensors
        by_row, by_row_sum, _, by_col, by_col_sum, _ = grads
        columns = len(col_lse)
        # A key all of whose rows here are excluded has no log-sum-exp; exp(-inf - inf) is 0.
        col_lse = col_lse.masked_fill(col_lse.isneginf(), torch.inf)
        of_scaled, of_keys = torch.empty_like(rows), torch.zeros_like(keys)
        for start in range(0, len(rows), ctx.step):
            part = slice(start, min(start + ctx.step, len(rows)))
            scaled = rows[part] * scale
            logits = scaled @ keys.T
            if (mask := ctx.excluded(part.start, part.stop)) is not None:
                logits.masked_fill_(mask, -torch.inf)
            grad = (logits - row_lse[part, None]).exp_().mul_(by_row[part, None])
            if columns:
                logits = logits[:, :columns]
                grad[:, :columns] += logits.sub_(col_lse).exp_().mul_(by_col)
            if ctx.sums:
                grad += by_row_sum[part, None]
                grad[:, :columns] += by_col_sum
                if mask is not None:
                    grad.masked_fill_(mask, 0.0)
            torch.mm(grad, keys, out=of_scaled[part])
            of_keys.addmm_(grad.T, scaled)
        of_scale = (of_scaled * rows).sum()
        return of_scaled * scale, of_keys, of_scale, None, None, None, None


def _nothing(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sum and number of no logits; the number is what the sum is divided by."""
    return like.new_zeros(size), like.new_ones(size)
