"""A rank's share of a block: contiguous query heads, the KV heads that serve them, contiguous neurons."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear_attention
from .all_heads_norm import AllHeadsNorm, all_heads_norms
from .architecture import HeadCounts
from .mlp import activations
from .parts import LayerParts, LinearRows, MLPParts


@dataclass(frozen=True)
class RankSlices:
    """The heads and neurons that one rank owns, contiguous ones (docs/design.md, section 2, "Heads")."""

    heads: slice
    kv_heads: slice
    neurons: slice  # of the MLP, or of each expert
    shared_neurons: slice  # of the shared experts; empty without any

    @classmethod
    def of(cls, counts: HeadCounts, rank: int, tp: int) -> "RankSlices":
        heads, neurons, shared = counts.heads // tp, counts.neurons // tp, counts.shared_neurons // tp
        first_kv = rank * counts.kv_heads // tp
        kv_heads = max(counts.kv_heads // tp, 1)  # with more ranks than KV heads, ranks share one
        return cls(
            heads=slice(rank * heads, (rank + 1) * heads),
            kv_heads=slice(first_kv, first_kv + kv_heads),
            neurons=slice(rank * neurons, (rank + 1) * neurons),
            shared_neurons=slice(rank * shared, (rank + 1) * shared),
        )


def num_groups(counts: HeadCounts, tp: int) -> int:
    """Return the number of KV groups: a KV head and the query heads that it serves, or, with more ranks than KV heads,
    the query heads of one rank and the KV head that serves them."""
    return max(counts.kv_heads, tp)


def own_groups(counts: HeadCounts, rank: int, tp: int) -> range:
    """Return the KV groups that a rank owns."""
    each = num_groups(counts, tp) // tp
    return range(rank * each, (rank + 1) * each)


def width_of_heads(counts: HeadCounts, replicated: Sequence[Sequence[int]] | None, tp: int) -> int:
    """Return the width of the head outputs that a rank has: its own, and those of the KV groups that it replicates.

    `replicated` are these groups, as many for every rank; None: it has its own alone.
    """
    width, groups = counts.heads * counts.head_dim, num_groups(counts, tp)
    return width // tp + (len(replicated[0]) if replicated else 0) * width // groups


def slices_of_groups(counts: HeadCounts, groups: Sequence[int], tp: int) -> list[RankSlices]:
    """Return ranges of heads that hold these KV groups, which are in order: as few as one attention each can run.

    In one range every KV head serves as many query heads; no neurons are in it.
    """
    total, found = num_groups(counts, tp), list[RankSlices]()
    for group in groups:
        own, last = RankSlices.of(counts, group, total), found[-1] if found else None
        if last and last.heads.stop == own.heads.start and (total == counts.kv_heads or last.kv_heads == own.kv_heads):
            own = replace(own, heads=_joined(last.heads, own.heads), kv_heads=_joined(last.kv_heads, own.kv_heads))
            found.pop()
        found.append(replace(own, neurons=NONE, shared_neurons=NONE))
    return found


def _joined(a: slice, b: slice) -> slice:
    return slice(a.start, b.stop)


def size(of: slice) -> int:
    """Return the number of heads, neurons, rows or columns in a range."""
    return of.stop - of.start


def times(of: slice, width: int) -> slice:
    """Return the range of the entries of some heads, `width` a head."""
    return slice(of.start * width, of.stop * width)


Rows = tuple[slice, ...]
"""Output rows of a linear layer: one range, or in a fused layer one of each projection that it holds, in order."""

ALL, NONE = slice(None), slice(0, 0)
ALL_ROWS: Rows = (ALL,)


def linear_slices(parts: LayerParts, slices: RankSlices) -> list[tuple[nn.Linear, Rows, slice]]:
    """Return each linear layer of a block that is cut, with the output rows and the input columns that a rank owns."""
    counts, rows = HeadCounts.of(parts), dict[nn.Linear, Rows]()
    of_heads = [(p, slices.heads, counts.heads) for p in parts.by_head]
    for part, own, heads in (*of_heads, *((p, slices.kv_heads, counts.kv_heads) for p in parts.by_kv_head)):
        linear, start = (part.linear, part.start) if isinstance(part, LinearRows) else (part, 0)
        of_part = _moved(times(own, part.out_features // heads), start)
        rows[linear] = tuple(sorted((*rows.get(linear, ()), of_part), key=lambda r: r.start))  # as the layer holds them
    of_o = (parts.o, ALL_ROWS, times(slices.heads, counts.head_dim))
    attention = [*((linear, own, ALL) for linear, own in rows.items()), of_o]
    if parts.experts is None:
        return [*attention, *mlp_slices(parts.dense, slices.neurons)]
    shared = parts.experts.shared
    return [*attention, *(mlp_slices(shared, slices.shared_neurons) if shared else [])]


def channels(parts: LayerParts, slices: RankSlices) -> Rows:
    """Return the channels that a rank owns of the convolution of a linear attention: its q's, its k's and its v's."""
    attention: Any = parts.attention
    keys = times(slices.kv_heads, attention.head_k_dim)
    values = times(head_entries(parts, slices)[0], attention.head_v_dim)
    return (keys, _moved(keys, attention.key_dim), _moved(values, 2 * attention.key_dim))


def head_entries(parts: LayerParts, slices: RankSlices) -> tuple[slice, int]:
    """Return the numbers that a rank owns of a parameter with one a head (LayerNames), and how many there are."""
    heads = HeadCounts.of(parts).heads
    of: Any = heads if parts.convolution is None else parts.attention.num_v_heads
    return times(slices.heads, of // heads), of


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
    counts = HeadCounts.of(parts)
    ranks = counts.heads // size(slices.heads)
    for name, projection in all_heads_norms(parts).items():
        of_q = projection is parts.by_head[0]
        held, heads = (slices.heads, counts.heads) if of_q else (slices.kv_heads, counts.kv_heads)
        project = next(getattr(shard, n) for n, m in parts.attention.named_children() if m is projection)
        places, held_by = times(held, counts.head_dim), ranks * size(held) // heads
        norm = parts.attention.get_submodule(name)
        setattr(shard, name, AllHeadsNorm(norm, project, places, width=projection.out_features, held_by=held_by))
    own_counts = {
        "num_key_value_groups": size(slices.heads) // size(slices.kv_heads),
        "num_heads": size(slices.heads),
        "num_key_value_heads": size(slices.kv_heads),
        "layer_idx": layer_idx,
    }
    if parts.convolution is not None:
        v_heads, _ = head_entries(parts, slices)
        own_counts |= linear_attention.counts(shard, heads=size(v_heads), kv_heads=size(slices.kv_heads))
    for name, value in own_counts.items():
        if hasattr(shard, name):
            setattr(shard, name, value)
    if parts.convolution is not None:
        linear_attention.cut(shard, parts.convolution, channels(parts, slices))
    elif isinstance(
        parts.by_head[0], LinearRows
    ):  # it finds q's end in what the fused layer gives by its configuration
        config: Any = copy.copy(shard.config)
        config.num_attention_heads = own_counts["num_heads"]
        shard.config = config
    for name in parts.head_parameters:
        entries, of = head_entries(parts, slices)
        _cut_parameter(shard, name, entries, of=of)
    return shard


def _cut_parameter(shard: nn.Module, name: str, own: slice, *, of: int) -> None:
    """Have `shard` read its own heads' entries of a parameter that holds `of` of them.

    They are taken anew in each forward, since the parameter, which stays whole, may be trained or moved.
    """
    whole = f"{name}_of_all_heads"
    shard._parameters = {whole if n == name else n: p for n, p in shard._parameters.items()}
    shard._forward_pre_hooks = OrderedDict(shard._forward_pre_hooks)  # a copy shares them with what it is a copy of

    def cut(module: nn.Module, args: tuple) -> None:
        held = module.get_parameter(whole)
        setattr(module, name, held[own] if len(held) == of else held)  # it may be cut already (shard_load.py)

    shard.register_forward_pre_hook(cut)


def o_of(parts: LayerParts, attention: nn.Module) -> nn.Module:
    """Return o_proj of a copy of the layer's attention that `rank_attention` returned."""
    return attention.get_submodule(next(n for n, m in parts.attention.named_children() if m is parts.o))


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
