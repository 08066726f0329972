"""GradCache: the gradient of a contrastive batch that does not fit into memory at once.

The loss of a contrastive batch needs all of its embeddings, but the gradient splits: once the
loss's gradient with respect to each embedding is known, every chunk of the batch can be embedded
and differentiated by itself. Each chunk but the last is therefore embedded twice, first without a
graph and then, with the same random numbers, with one. The last chunk's graph is kept instead and
used first, so that at no time there is more than one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Chunk = TypeVar("Chunk")


class Embeds(NamedTuple):
    """A model's output for a chunk."""

    rows: tuple[Tensor, ...]
    """Embeddings, `[n, d]` each; those of all chunks are joined."""
    shared: tuple[Tensor, ...] = ()
    """Parameters of the model that the loss uses directly (`logit_scale`)."""


def cached_loss(
    accelerator: Any,
    model: nn.Module,
    chunks: Sequence[Chunk],
    embed: Callable[[Chunk], Embeds],
    loss: Callable[[Embeds], Tensor],
) -> Tensor:
    """The loss of all chunks as one batch, to be passed to `accelerator.backward` once.

    All chunks but one are differentiated here, without communication under plain data parallelism;
    the caller's backward pass does the last and synchronises. Under DeepSpeed every chunk's
    gradients are reduced, so all ranks need equally many chunks.

    Args:
        accelerator: Accelerator of the Trainer; accumulates nothing else.
        model: The wrapped model that `embed` calls.
        chunks: Parts of this rank's batch, each with at least one row.
        embed: Embeds a chunk.
        loss: Takes the embeddings of all chunks; gathers over ranks where it has to.

    Returns:
        A scalar whose value is the loss and whose gradient is what is missing.

    Paper: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
    (arXiv 2101.06983), which keeps no graph and replays no random numbers in its first version.
    """
    # Example, chunks a, b and c: the loss needs all three embeddings, but three graphs do not fit.
    # So a and b are embedded without a graph and c with one, and the loss of the detached
    # embeddings gives dL/da, dL/db and dL/dc. By the chain rule the weights' gradient is that of
    # `(a * dL/da).sum() + (b * dL/db).sum() + (c * dL/dc).sum()`, and each term (a surrogate of
    # the loss) needs the graph of one chunk only: c goes first, its graph is there; a is embedded
    # again and goes; b is embedded again, and the caller's backward pass, the one that
    # synchronises the ranks, does it.
    *others, kept = chunks
    if not others:
        return loss(embed(kept))
    first_pass: list[Embeds] = []
    random: list[_RandomState] = []
    with _without_sync(model):
        for chunk in others:
            random.append(_RandomState(accelerator.device))
            with torch.no_grad():
                first_pass.append(embed(chunk))
        graph = embed(kept)
    joined = list(zip(*(part.rows for part in (*first_pass, graph)), strict=True))
    leaves = Embeds(
        tuple(torch.cat(parts).detach().requires_grad_() for parts in joined),
        tuple(value.detach().requires_grad_() for value in graph.shared),
    )
    value = loss(leaves)
    grads = torch.autograd.grad(value, (*leaves.rows, *leaves.shared), materialize_grads=True)
    of_rows = [
        grad.split([len(part) for part in parts])
        for grad, parts in zip(grads, joined, strict=False)
    ]
    of_shared = grads[len(joined) :]
    del first_pass, joined

    def surrogate(part: Embeds, number: int) -> Tensor:
        """A scalar whose gradient is the chunk's share of the loss's gradient."""
        pairs = [(rows, grad[number]) for rows, grad in zip(part.rows, of_rows, strict=True)]
        if number == len(others) - 1:  # the one that synchronises reaches every parameter
            pairs += zip(part.shared, of_shared, strict=True)
        return torch.stack([(a.float() * b.float()).sum() for a, b in pairs]).sum()

    synchronise = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(False)
    with _without_sync(model):
        accelerator.backward(surrogate(graph, len(others)))
        del graph
        for number, chunk in enumerate(others[:-1]):
            with random[number].replayed():
                part = embed(chunk)
            accelerator.backward(surrogate(part, number))
    accelerator.gradient_state._set_sync_gradients(synchronise)
    with random[-1].replayed():
        part = embed(others[-1])
    rest = surrogate(part, len(others) - 1)
    return rest + (value - rest).detach()  # the value of the loss, the gradient of b's surrogate


def _without_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Add up gradients on this rank alone (DeepSpeed has its own bookkeeping)."""
    alone = isinstance(model, DistributedDataParallel)
    return model.no_sync() if alone else contextlib.nullcontext()  # type: ignore[operator]


class _RandomState:
    """The state of the random generators of the CPU and a device at one moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the numbers that followed that moment; afterwards go on as if none were drawn."""
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
