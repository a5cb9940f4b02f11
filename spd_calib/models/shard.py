"""A rank's share of a block: contiguous query heads, the KV heads that serve them, contiguous neurons."""

import copy
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import HeadCounts, LayerParts
from .mlp import activations


@dataclass(frozen=True)
class RankSlices:
    """Rows or columns of the dense weights that one rank owns (docs/design.md, section 2, "Heads")."""

    q: slice
    kv: slice
    neurons: slice

    @classmethod
    def of(cls, counts: HeadCounts, rank: int, tp: int) -> "RankSlices":
        heads, neurons = counts.heads // tp, counts.neurons // tp
        first_kv = rank * counts.kv_heads // tp
        kv_heads = max(counts.kv_heads // tp, 1)  # with more ranks than KV heads, ranks share one
        d = counts.head_dim
        return cls(
            q=slice(rank * heads * d, (rank + 1) * heads * d),
            kv=slice(first_kv * d, (first_kv + kv_heads) * d),
            neurons=slice(rank * neurons, (rank + 1) * neurons),
        )


ALL = slice(None)


def linear_slices(parts: LayerParts, slices: RankSlices) -> list[tuple[nn.Linear, slice, slice]]:
    """Return each linear layer of a block with the output rows and the input columns of it that a rank owns."""
    return [
        (parts.q, slices.q, ALL),
        (parts.k, slices.kv, ALL),
        (parts.v, slices.kv, ALL),
        (parts.o, ALL, slices.q),
        *((linear, slices.neurons, ALL) for linear in parts.mlp_in),
        (parts.down, ALL, slices.neurons),
    ]


def vocabulary_slice(vocab_size: int, rank: int, tp: int) -> slice:
    """Return the rows of the output head that a rank owns: equal, contiguous parts, the last ones shorter or empty."""
    part = -(-vocab_size // tp)
    return slice(min(rank * part, vocab_size), min((rank + 1) * part, vocab_size))


def is_cut(linear: nn.Linear) -> bool:
    """Tell whether the layer holds one rank's slice only, as shard_load.py reads it; in_features and out_features then
    still are the dense layer's.
    """
    return linear.weight.shape != (linear.out_features, linear.in_features)


class RankLinear(nn.Module):
    """Some output rows, or some input columns, of a dense linear layer whose weight it shares.

    Of a layer that is cut to the rank's slice already, all of it.
    """

    def __init__(self, linear: nn.Linear, rows: slice, columns: slice, with_bias: bool = True):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias if with_bias else None
        self.rows, self.columns = (ALL, ALL) if is_cut(linear) else (rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.rows]
        return F.linear(x, self.weight[self.rows, self.columns], bias)


def rank_attention(parts: LayerParts, slices: RankSlices, layer_idx: int) -> nn.Module:
    """Return the layer's own attention module on one rank's heads; it shares the dense layer's weights.

    The module turns n1(x) into a partial sum [B, T, d], o_proj's bias left out. `layer_idx` is the rank's own place in
    the KV cache.
    """
    shard = copy.copy(parts.attention)
    shard._modules = dict(parts.attention._modules)
    for name, module in parts.attention.named_children():
        for linear, rows, columns in linear_slices(parts, slices):
            if module is linear:
                setattr(shard, name, RankLinear(linear, rows, columns, with_bias=linear is not parts.o))
    heads = (slices.q.stop - slices.q.start) // (slices.kv.stop - slices.kv.start)
    counts = {
        "num_key_value_groups": heads,
        "num_heads": (slices.q.stop - slices.q.start) // shard.head_dim,
        "num_key_value_heads": (slices.kv.stop - slices.kv.start) // shard.head_dim,
        "layer_idx": layer_idx,
    }
    for name, value in counts.items():
        if hasattr(shard, name):
            setattr(shard, name, value)
    return shard


class RankMLP(nn.Module):
    """One rank's neurons: n2(h) to a partial sum [B, T, d], down_proj's bias left out."""

    def __init__(self, parts: LayerParts, slices: RankSlices):
        super().__init__()
        self.mlp_in = nn.ModuleList(RankLinear(linear, slices.neurons, ALL) for linear in parts.mlp_in)
        self.activation = parts.activation
        self.down = RankLinear(parts.down, ALL, slices.neurons, with_bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(activations(list(self.mlp_in), self.activation, u))
