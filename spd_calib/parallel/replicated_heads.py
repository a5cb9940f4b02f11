"""Replicated heads: a rank computes heads of other ranks, too, for what its MLP reads where the sync is dropped.

With a_i the partial sum of the rank's own heads and r_i that of the heads it replicates, in place of block_drop's
m_i = mlp_i(n2(x + a_i + b_o)):

    m_i = mlp_i(n2(x + a_i + r_i + b_o)) ; y = x + AR(a_i + m_i) + b_o + b_d

The residual stream takes each head once. With all heads of the others replicated m_i is what the dense block computes,
where the ranks' streams agree as they enter it; the price is their weights, their share of the KV cache and their work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.errors import InputError
from spd_calib.formats.drops import Groups
from spd_calib.models.all_heads_norm import all_heads_norms
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.parts import LayerParts
from spd_calib.models.shard import is_cut, num_groups, o_of, own_groups, rank_attention, slices_of_groups

from .attention import attended


@dataclass(frozen=True)
class Replicated:
    """Holds what replicated heads give on each rank of this process: partial sums [B, T, d], and their outputs."""

    partials: list[Tensor]
    heads: list[Tensor]

    def beside(self, partials: Sequence[Tensor]) -> list[Tensor]:
        """Return the partial sums of all the heads that each rank has, given those of its own."""
        return list(map(torch.add, partials, self.partials))

    def heads_beside(self, heads: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of all the heads that each rank has, given those of its own, which come first."""
        return [torch.cat(pair, -1) for pair in zip(heads, self.heads, strict=True)]


class ReplicatedHeads:
    """The attentions by which the ranks of this process compute KV groups of others; they share the block's weights.

    `groups` are those of each rank of this process. In the KV cache they come after all the ranks' own heads.
    """

    def __init__(self, parts: LayerParts, groups: Sequence[Sequence[int]], *, tp: int, block: int, num_blocks: int):
        counts, place = HeadCounts.of(parts), len(groups)
        self.attentions = list[list[torch.nn.Module]]()
        for own in groups:
            self.attentions.append([])
            for slices in slices_of_groups(counts, own, tp):
                self.attentions[-1].append(rank_attention(parts, slices, layer_idx=place * num_blocks + block))
                place += 1
        self.outs = [[o_of(parts, attention) for attention in of_rank] for of_rank in self.attentions]

    def attend(self, inputs: Iterable[Tensor], **kwargs) -> Replicated:
        """Return what each rank's replicated heads give where it reads its own of `inputs`, [B, T, d] each."""
        partials, heads = list[Tensor](), list[Tensor]()
        for attentions, outs, u in zip(self.attentions, self.outs, inputs, strict=True):
            found = [attended(attention, o, u, **kwargs) for attention, o in zip(attentions, outs, strict=True)]
            partials.append(sum((partial for partial, _ in found[1:]), start=found[0][0]))
            heads.append(torch.cat([z for _, z in found], -1))
        return Replicated(partials, heads)


def check_replicated(block: int, parts: LayerParts, groups: Groups, *, tp: int) -> None:
    """Raise InputError unless each of `tp` ranks can compute these KV groups of a block beside its own."""
    way_out = "leave `replicate` out, or keep the block's sync"
    if parts.experts is not None:
        raise InputError(
            f"Block {block} is a mixture of experts, whose router reads only what all ranks share, so replicated heads "
            f"do not make it exact; {way_out}."
        )
    if parts.convolution is not None:
        raise InputError(f"Block {block} has a linear attention, whose heads cannot be replicated; {way_out}.")
    if all_heads_norms(parts):
        raise InputError(
            f"Block {block} norms its queries and keys over the heads of all ranks, which takes a sync of its own, so "
            f"heads cannot be replicated; {way_out}."
        )
    counts = HeadCounts.of(parts)
    total = num_groups(counts, tp)
    if len(groups) != tp or any(group not in range(total) for own in groups for group in own):
        raise InputError(
            f"The replicated heads of block {block} do not fit {total} KV groups on {tp} ranks; plan anew."
        )
    twice = [rank for rank, own in enumerate(groups) if set(own) & set(own_groups(counts, rank, tp))]
    if twice:
        raise InputError(f"Block {block} replicates heads on rank {twice[0]} that are its own; plan anew.")
    if is_cut(parts.o):
        raise InputError(
            f"Block {block} was loaded without the heads that are to be replicated; load the model for this plan."
        )
