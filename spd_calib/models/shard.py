"""A rank's share of a block: contiguous query heads, the KV heads that serve them, contiguous neurons."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .all_heads_norm import AllHeadsNorm, all_heads_norms
from .architecture import HeadCounts, LayerParts, LinearRows, MLPParts
from .mlp import activations


@dataclass(frozen=True)
class RankSlices:
    """Rows or columns of the dense weights that one rank owns (docs/design.md, section 2, "Heads")."""

    q: slice
    kv: slice
    neurons: slice  # of the MLP, or of each expert
    shared_neurons: slice  # of the shared experts; empty without any

    @classmethod
    def of(cls, counts: HeadCounts, rank: int, tp: int) -> "RankSlices":
        heads, neurons, shared = counts.heads // tp, counts.neurons // tp, counts.shared_neurons // tp
        first_kv = rank * counts.kv_heads // tp
        kv_heads = max(counts.kv_heads // tp, 1)  # with more ranks than KV heads, ranks share one
        d = counts.head_dim
        return cls(
            q=slice(rank * heads * d, (rank + 1) * heads * d),
            kv=slice(first_kv * d, (first_kv + kv_heads) * d),
            neurons=slice(rank * neurons, (rank + 1) * neurons),
            shared_neurons=slice(rank * shared, (rank + 1) * shared),
        )


Rows = tuple[slice, ...]
"""Output rows of a linear layer: one range, or in a fused layer one of each projection that it holds, in order."""

ALL = slice(None)
ALL_ROWS: Rows = (ALL,)


def linear_slices(parts: LayerParts, slices: RankSlices) -> list[tuple[nn.Linear, Rows, slice]]:
    """Return each linear layer of a block with the output rows and the input columns of it that a rank owns."""
    rows: dict[nn.Linear, Rows] = {}
    for part, own in ((parts.q, slices.q), (parts.k, slices.kv), (parts.v, slices.kv)):
        linear, start = (part.linear, part.start) if isinstance(part, LinearRows) else (part, 0)
        rows[linear] = (*rows.get(linear, ()), _moved(own, start))
    attention = [*((linear, own, ALL) for linear, own in rows.items()), (parts.o, ALL_ROWS, slices.q)]
    if parts.experts is None:
        return [*attention, *mlp_slices(parts.dense, slices.neurons)]
    shared = parts.experts.shared
    return [*attention, *(mlp_slices(shared, slices.shared_neurons) if shared else [])]


def mlp_slices(mlp: MLPParts, neurons: slice) -> list[tuple[nn.Linear, Rows, slice]]:
    """Return each linear layer of a dense MLP with the output rows and the input columns of it of these neurons."""
    first = [
        (linear, tuple(_moved(neurons, n) for n in range(0, linear.out_features, mlp.down.in_features)), ALL)
        for linear in mlp.mlp_in
    ]
    return [*first, (mlp.down, ALL_ROWS, neurons)]


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def vocabulary_slice(vocab_size: int, *, rank: int, tp: int) -> slice:
    """Return the rows of the output head that a rank owns: equal, contiguous parts, the last ones shorter or empty."""
    part = -(-vocab_size // tp)
    return slice(min(rank * part, vocab_size), min((rank + 1) * part, vocab_size))


def is_cut(linear: nn.Linear) -> bool:
    """Tell whether the layer holds one rank's slice only, as shard_load.py reads it; in_features and out_features then
    still are the dense layer's.
    """
    return linear.weight.shape != (linear.out_features, linear.in_features)


def of_ranges(x: Tensor, weight: Tensor, *, rows: Rows, columns: slice, bias: Tensor | None = None) -> Tensor:
    """Return what ranges of the output rows, and a range of the input columns, of a linear layer make of x."""
    # range by range: to put the rows themselves together would copy weights
    outs = [F.linear(x, weight[r, columns], None if bias is None else bias[r]) for r in rows]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


class RankLinear(nn.Module):
    """Some output rows, or some input columns, of a dense linear layer whose weight it shares; times `scale`.

    Of a layer that is cut to the rank's slice already, all of it.
    """

    def __init__(self, linear: nn.Linear, rows: Rows, columns: slice, *, with_bias: bool = True, scale: float = 1.0):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias if with_bias else None
        self.rows, self.columns = (ALL_ROWS, ALL) if is_cut(linear) else (rows, columns)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out = of_ranges(x, self.weight, rows=self.rows, columns=self.columns, bias=self.bias)
        return out if self.scale == 1.0 else out * self.scale


def rank_attention(parts: LayerParts, slices: RankSlices, layer_idx: int) -> nn.Module:
    """Return the layer's own attention module on one rank's heads; it shares the dense layer's weights.

    The module turns n1(x) into a partial sum [B, T, d] of the attention's output: scaled, where the block scales its
    branches and has no norm in them, and o_proj's bias left out. `layer_idx` is the rank's own place in the KV cache.
    """
    shard = copy.copy(parts.attention)
    shard._modules = dict(parts.attention._modules)
    for name, module in parts.attention.named_children():
        for linear, rows, columns in linear_slices(parts, slices):
            if module is linear:
                is_o = linear is parts.o
                own = RankLinear(linear, rows, columns, with_bias=not is_o, scale=parts.o_scale if is_o else 1.0)
                setattr(shard, name, own)
    ranks = parts.q.out_features // (slices.q.stop - slices.q.start)
    for name, letter in all_heads_norms(parts).items():
        whole, places = (parts.q, slices.q) if letter == "q" else (parts.k, slices.kv)
        project = next(getattr(shard, n) for n, m in parts.attention.named_children() if m is whole)
        held_by = ranks * (places.stop - places.start) // whole.out_features
        norm = parts.attention.get_submodule(name)
        setattr(shard, name, AllHeadsNorm(norm, project, places, width=whole.out_features, held_by=held_by))
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
    if isinstance(parts.q, LinearRows):  # it finds q's end in what the fused layer gives by its configuration
        config: Any = copy.copy(shard.config)
        config.num_attention_heads = counts["num_heads"]
        shard.config = config
    return shard


class RankMLP(nn.Module):
    """Some neurons of an MLP: n2(h) to a partial sum [B, T, d], times `scale`, down_proj's bias left out."""

    def __init__(self, mlp: MLPParts, neurons: slice, *, scale: float):
        super().__init__()
        own = {linear: rows for linear, rows, _ in mlp_slices(mlp, neurons)}
        self.mlp_in = nn.ModuleList(RankLinear(linear, own[linear], ALL) for linear in mlp.mlp_in)
        self.activation = mlp.activation
        self.neurons = neurons.stop - neurons.start
        self.down = RankLinear(mlp.down, ALL_ROWS, neurons, with_bias=False, scale=scale)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(activations(list(self.mlp_in), self.activation, u, neurons=self.neurons))
