"""The adaptor between the frozen LLM's caption embeddings and the joint space."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class InvertedBottleneck(nn.Module):
    """A pre-norm residual block that widens before it narrows: `x + W2 GELU(W1 LN(x))`.

    Args:
        dim: Width of input and output.
        expansion: Hidden width over `dim`.
    """

    def __init__(self, dim: int, expansion: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, expansion * dim)
        self.fc2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Args: x: `[b, d]`. Returns: `[b, d]`."""
        residual: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + residual


class TextAdaptor(nn.Module):
    """Unit-norm input, residual inverted-bottleneck blocks, LayerNorm, linear head with bias.

    With `dim=2048`, `out_dim=1280` and four blocks it has 69,776,640 parameters (67,149,824 of
    them in the blocks, the paper's "67.1M").

    Args:
        dim: Width of the text encoder's embeddings (8B: 4096, 1B: 2048).
        out_dim: Width of the joint space (1280).
        num_blocks: Residual blocks; 0 leaves LayerNorm and the head.
        expansion: Hidden width of a block over `dim`.

    Raises:
        ValueError: A size is not positive.

    Example:
        >>> TextAdaptor(8, 4)(torch.randn(2, 8)).shape
        torch.Size([2, 4])

    Paper: LLM2CLIP v6 section 3.2, table 8; released code `llm2clip/eva_clip/model.py:217-253`
    (whose dropout is always 0 and left out here).
    """

    def __init__(self, dim: int, out_dim: int, num_blocks: int = 4, expansion: int = 2) -> None:
        super().__init__()
        if min(dim, out_dim, expansion) < 1 or num_blocks < 0:
            raise ValueError(
                "expected dim, out_dim, expansion >= 1 and num_blocks >= 0, got "
                f"dim={dim}, out_dim={out_dim}, expansion={expansion}, num_blocks={num_blocks}"
            )
        self.blocks = nn.ModuleList(InvertedBottleneck(dim, expansion) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, text_features: Float[Tensor, "b d"]) -> Float[Tensor, "b out"]:
        """Map caption embeddings to the joint space.

        Args:
            text_features: `[b, dim]` of any norm (each row is normalised first) and any floating
                dtype (the adaptor computes in its own dtype).

        Returns:
            `[b, out_dim]`, **not** normalised.
        """
        x = F.normalize(text_features.to(self.head.weight.dtype), p=2.0, dim=-1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
