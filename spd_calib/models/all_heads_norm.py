"""Norms over the queries, or the keys, of all heads together (OLMo 2 and 3, OLMoE): a sync inside the attention.

Such a norm divides by the root mean square over all heads, of which a rank has its own. So the ranks add up their sums
of squares first, two numbers a token: a sync point of its own, which cannot be dropped. A KV head that several ranks
hold counts by the mean of their squares.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .parts import LayerParts, Projection


def all_heads_norms(parts: LayerParts) -> dict[str, Projection]:
    """Return the attention's norms over all heads, by name in the attention: the projection, q or k, that they norm."""
    if not parts.by_kv_head or parts.convolution is not None:
        return {}
    normed = {"q": parts.by_head[0], "k": parts.by_kv_head[0]}
    return {
        name: projection
        for name, module in parts.attention.named_children()
        if "norm" in name
        and (projection := normed.get(name[0])) is not None
        and projection.out_features != parts.attention.head_dim
        and [p.shape for p in module.parameters()] == [(projection.out_features,)]
    }


class AllHeadsNorm(nn.Module):
    """A rank's part of a root-mean-square norm over all heads; it shares the whole norm's weight.

    `project` gives the rank's queries or keys, `rows` are their places among all `width`, and `held_by` ranks hold
    them. `mean_square` [B, T, 1], of all heads, is set before each use (Block.attend).
    """

    mean_square: Tensor

    def __init__(self, norm: nn.Module, project: nn.Module, rows: slice, *, width: int, held_by: int):
        super().__init__()
        self.weight: Any = norm.weight
        self.rows, self.width, self.held_by = rows, width, held_by
        self.project = [project]  # in a list: it is the attention's module, not this one's
        self.eps = float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)

    def squares(self, u: Tensor) -> Tensor:
        """Return the rank's share of the sum of squares where the attention reads u [B, T, d]: float32 [B, T, 1]."""
        return self.project[0](u).float().square().sum(-1, keepdim=True) / self.held_by

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(self.mean_square + self.eps)
        return (self.weight[self.rows] * normed).to(x.dtype)
