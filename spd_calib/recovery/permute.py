"""Reordering the heads and neurons of a block: the same dense function, other neighbours on a rank."""

import torch
from torch import Tensor

from spd_calib.models.all_heads_norm import all_heads_norms
from spd_calib.models.architecture import HeadCounts, LayerParts


@torch.no_grad()
def permute_neurons(parts: LayerParts, order: Tensor) -> None:
    """Make neuron `order[i]` the i-th: rows of gate, up or fc1 with their biases, columns of down or fc2."""
    for linear in parts.mlp_in:
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                pieces = tensor.view(-1, len(order), *tensor.shape[1:])  # a fused layer holds gate and up
                pieces.copy_(pieces[:, order])
    parts.down.weight.copy_(parts.down.weight[:, order])


@torch.no_grad()
def permute_heads(parts: LayerParts, counts: HeadCounts, heads: Tensor) -> None:
    """Make query head `heads[i]` the i-th, and let the KV heads follow, and norms over all heads.

    Other norms of q and k are shared by all heads.

    Raises ValueError unless `heads` keeps the query heads of one KV head together.
    """
    group = counts.heads // counts.kv_heads
    kv = heads.view(counts.kv_heads, group)[:, 0] // group
    if not torch.equal(heads.view(counts.kv_heads, group) // group, kv[:, None].expand(-1, group)):
        raise ValueError("query heads of one KV head are torn apart")
    rows = {parts.q: entries(heads, counts.head_dim)}
    rows |= {linear: entries(kv, counts.head_dim) for linear in (parts.k, parts.v)}
    for linear, order in rows.items():
        linear.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])
    for name, letter in all_heads_norms(parts).items():
        (weight,) = parts.attention.get_submodule(name).parameters()
        weight.copy_(weight[rows[parts.q if letter == "q" else parts.k]])
    parts.o.weight.copy_(parts.o.weight[:, rows[parts.q]])


def entries(heads: Tensor, head_dim: int) -> Tensor:
    """Return the indices of these heads' entries among those of all heads, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()
