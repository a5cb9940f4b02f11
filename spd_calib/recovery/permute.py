"""Reordering the heads and neurons of a block: the same dense function, other neighbours on a rank."""

from typing import Any

import torch
from torch import Tensor

from spd_calib.models.all_heads_norm import all_heads_norms
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.parts import LayerParts


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
    """Make query head `heads[i]` the i-th; what else is divided by head, KV heads and norms over all heads, follows.

    Other norms of q and k are shared by all heads.

    Raises ValueError unless `heads` keeps the query heads of one KV head together.
    """
    group = counts.heads // counts.kv_heads
    kv = heads.view(counts.kv_heads, group)[:, 0] // group
    if not torch.equal(heads.view(counts.kv_heads, group) // group, kv[:, None].expand(-1, group)):
        raise ValueError("query heads of one KV head are torn apart")
    rows = {part: entries(heads, part.out_features // counts.heads) for part in parts.by_head}
    rows |= {part: entries(kv, part.out_features // counts.kv_heads) for part in parts.by_kv_head}
    for part, order in rows.items():
        part.weight.copy_(part.weight[order])
        if part.bias is not None:
            part.bias.copy_(part.bias[order])
    of_parameters = heads
    if parts.convolution is not None:
        attention: Any = parts.attention
        of_parameters = entries(heads, attention.num_v_heads // counts.heads)  # heads of v
        keys, values = entries(kv, attention.head_k_dim), entries(of_parameters, attention.head_v_dim)
        weight = parts.convolution.weight  # its channels: q's, k's, v's
        weight.copy_(weight[torch.cat([keys, attention.key_dim + keys, 2 * attention.key_dim + values])])
    for name, projection in all_heads_norms(parts).items():
        (weight,) = parts.attention.get_submodule(name).parameters()
        weight.copy_(weight[rows[projection]])
    for name in parts.head_parameters:
        parameter = parts.attention.get_parameter(name)
        parameter.copy_(parameter[of_parameters])
    parts.o.weight.copy_(parts.o.weight[:, entries(heads, counts.head_dim)])


def entries(heads: Tensor, head_dim: int) -> Tensor:
    """Return the indices of these heads' entries among those of all heads, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()
