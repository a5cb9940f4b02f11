"""A decoder block on its ranks. The one definition behind the simulation and the real ranks."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from spd_calib.formats.drops import Drop, Drops, Groups, Point, Strategy
from spd_calib.formats.phases import NOTHING_DROPPED_IN_BOTH, ByPhase
from spd_calib.models.all_heads_norm import AllHeadsNorm
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.experts import RankExperts, Routing, route
from spd_calib.models.parts import LayerParts
from spd_calib.models.shard import RankMLP, RankSlices, o_of, rank_attention, width_of_heads

from .attention import attended
from .comm import Comm
from .replicated_heads import Replicated, ReplicatedHeads, check_replicated
from .streams import Branch, Streams, defer, keep, times, write_off


@dataclass
class Present:
    """Holds what a model drops at the moment; TensorParallelLM.running alone sets it.

    `replicas` is the most attentions on replicated heads (ReplicatedHeads) that a block has in this process.
    """

    drops: ByPhase = NOTHING_DROPPED_IN_BOTH
    replicas: int = 0


@dataclass(frozen=True)
class Fed:
    """Holds what a block's MLP gives: each rank's partial sum [B, T, d], and the bias left out, [d] or [B, T, d]."""

    partials: Iterable[Tensor]
    bias: Tensor | None


class Block(nn.Module):
    """Takes the place of a transformers decoder layer; hands Streams to the next block."""

    def __init__(self, index: int, num_blocks: int, *, parts: LayerParts, comm: Comm, present: Present):
        super().__init__()
        counts = HeadCounts.of(parts)
        slices = [RankSlices.of(counts, rank, comm.size) for rank in comm.ranks]
        self.index, self.num_blocks, self.comm, self.present = index, num_blocks, comm, present
        self.parts, self._replicas = parts, dict[Groups, ReplicatedHeads]()
        self.attention_point, self.mlp_point = Point(index, "attention"), Point(index, "mlp")
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        # the KV cache holds the blocks of this process's first rank, then of its second, ...; then of replicated heads
        self.attentions = nn.ModuleList(
            rank_attention(parts, s, layer_idx=i * num_blocks + index) for i, s in enumerate(slices)
        )
        self.all_heads_norms = [[m for m in a.children() if isinstance(m, AllHeadsNorm)] for a in self.attentions]
        self.experts = parts.experts
        self.mlps = nn.ModuleList(_rank_mlp(parts, s) for s in slices)
        self.attention_out_norm, self.mlp_out_norm = parts.attention_out_norm, parts.mlp_out_norm
        self.scale, self.stream_scale, self.o_bias = parts.scale, parts.stream_scale, parts.o.bias
        self.down_bias = None if parts.experts else parts.down.bias
        self.read_weights: Callable[[int], None] | None = None  # by the block's place, if on disk
        self.outs = [o_of(parts, attention) for attention in self.attentions]  # each rank's slice of o_proj
        self.d_rank = width_of_heads(counts, None, comm.size)
        self.width = parts.o.out_features

    @property
    def attention_branch(self) -> Branch:
        """Return what the attention's output goes through before it joins the residual stream, A of the equation."""
        return _branch(self.o_bias, self.attention_out_norm, self.scale)

    @property
    def mlp_branch(self) -> Branch:
        """Return what the MLP's output goes through before it joins the residual stream, M of the equation.

        Without the biases of experts, which depend on the token (Fed.bias).
        """
        return _branch(self.down_bias, self.mlp_out_norm, self.scale)

    def forward(self, hidden_states: Tensor | Streams, per_layer_input: None = None, **kwargs) -> Streams:
        """Run the block as transformers calls it, under what the model runs at present.

        hidden_states: [B, T, d] (the embeddings) or the Streams of the block before; kwargs as transformers' own. Gemma
        4's second argument is None in all models that are not refused.
        """
        if kwargs.get("past_key_values") is not None:
            places = len(self.attentions) + self.present.replicas
            _a_cache_for_each_rank(kwargs["past_key_values"], self.num_blocks, places)
        s = Streams.of(hidden_states)
        return self.run(s, self.present.drops.of_forward(s.shared.shape[1]), **kwargs)

    def run(self, s: Streams, drops: Drops, **kwargs) -> Streams:
        """Run the block under `drops` (docs/design.md, section 2), of which it looks up its own two sync points.

        The predictors of `drops` must be on the model's device (TensorParallelLM.fitted).
        """
        attention, mlp = drops.at(self.attention_point), drops.at(self.mlp_point)
        h, mlps_read = self.behind_attention(
            attention, s, *self.attend(s, **kwargs), self.attend_replicated(attention, s, **kwargs)
        )
        routing = self.route(h.shared, self.expected(attention, s)) if self.experts else None
        return self.behind_mlp(mlp, h, Fed(self._partials(mlps_read, routing), self._bias(routing, h)))

    def attend(self, s: Streams, **kwargs) -> tuple[list[Tensor], list[Tensor]]:
        """Run the attention on every rank of this process; kwargs as transformers hands them to the layer.

        Returns each rank's partial sum [B, T, d] of the attention's output, o_proj's bias left out, and its head
        outputs [B, T, d_rank].
        """
        self.hold_weights()
        inputs = self._sharing_squares(self._inputs(self.norm1, s))
        own = zip(self.attentions, self.outs, inputs, strict=True)
        found = [attended(attention, o, u, **kwargs) for attention, o, u in own]
        return [partial for partial, _ in found], [z for _, z in found]

    def replicas(self, groups: Groups) -> ReplicatedHeads:
        """Return the KV groups, by rank, that the ranks of this process compute beside their own.

        They share the block's weights, and are made once. Raises InputError where they cannot be replicated.
        """
        if groups not in self._replicas:
            check_replicated(self.index, self.parts, groups, tp=self.comm.size)
            own = [groups[rank] for rank in self.comm.ranks]
            self._replicas[groups] = ReplicatedHeads(
                self.parts, own, tp=self.comm.size, block=self.index, num_blocks=self.num_blocks
            )
        return self._replicas[groups]

    def seen_by_a_rank(self, drop: Drop) -> int:
        """Return the width of the head outputs that a rank has: its own, and those of heads that it replicates."""
        return width_of_heads(HeadCounts.of(self.parts), drop.replicated, self.comm.size)

    def attend_replicated(self, drop: Drop, s: Streams, **kwargs) -> Replicated | None:
        """Return what the replicated heads of `drop` give on every rank; None where it has none. As `attend`."""
        if drop.replicated is None:
            return None
        self.hold_weights()
        return self.replicas(drop.replicated).attend(self._inputs(self.norm1, s), **kwargs)

    def _sharing_squares(self, inputs: Iterable[Tensor]) -> Iterable[Tensor]:
        """Return what each rank's attention reads; tell its norms over all heads, if any, the mean squares: a sync."""
        if not any(self.all_heads_norms):
            return inputs
        own = list(inputs)
        shares = (
            torch.cat([n.squares(u) for n in norms], -1) for norms, u in zip(self.all_heads_norms, own, strict=True)
        )
        total = self.comm.all_reduce(shares)
        for norms in self.all_heads_norms:
            for norm, squares in zip(norms, total.split(1, dim=-1), strict=True):
                norm.mean_square = squares / norm.width
        return own

    def behind_attention(
        self,
        drop: Drop,
        s: Streams,
        partials: list[Tensor],
        heads: list[Tensor],
        replicated: Replicated | None = None,
    ) -> tuple[Streams, Streams]:
        """Treat the attention's sync point; return the streams behind it, and what the ranks' MLPs read.

        Both are the same but where predictors, or `replicated` heads (attend_replicated), stand in for what a linear
        branch owes: for the MLPs' input alone, the residual stream takes the exact partial sums, each head's once.
        """
        branch = self.attention_branch
        if drop.predictors is None and replicated is None:
            h = self._sync_point(drop, s, partials, branch)
            return h, h
        known = partials if replicated is None else replicated.beside(partials)
        z = heads if replicated is None else replicated.heads_beside(heads)
        estimates = self._estimates(drop, branch, partials=known, z=z)
        if branch.norm is not None:
            h = defer(s, partials, branch, estimates=estimates)
            return h, h
        return defer(s, partials, branch), defer(s, estimates, branch)

    def behind_mlp(self, drop: Drop, s: Streams, fed: Fed) -> Streams:
        """Treat the MLP's sync point; return the streams behind it, which are those behind the block."""
        branch = _branch(fed.bias, self.mlp_out_norm, self.scale)
        if drop.predictors is None:
            y = self._sync_point(drop, s, fed.partials, branch)
        else:
            own = list(fed.partials)
            y = defer(s, own, branch, estimates=self._estimates(drop, branch, partials=own, z=own))
        return y if self.stream_scale is None else times(y, self.stream_scale())

    def _estimates(self, drop: Drop, branch: Branch, *, partials: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        """Return what each rank's predictor gives, where its share is its partial sum, or a norm's branch of it.

        Without predictors, its share.
        """
        shares = partials if branch.norm is None else map(branch, partials)
        if drop.predictors is None:
            return list(shares)
        of_ranks = [drop.predictors[rank] for rank in self.comm.ranks]
        return [predict(own, share) for predict, own, share in zip(of_ranks, z, shares, strict=True)]

    def route(self, shared: Tensor, expected: Tensor | None = None) -> Routing:
        """Return the experts chosen for each token, the same on all ranks: the router reads only what they share.

        That is n2(shared + expected), both [B, T, d]: the stream that all ranks share behind the attention, and what
        the shared predictor of a dropped sync point expects to be missing there, if there is one.
        """
        assert self.experts is not None
        self.hold_weights()
        return route(self.experts, self.norm2(shared if expected is None else shared + expected))

    def expected(self, drop: Drop, s: Streams) -> Tensor | None:
        """Return what the router's predictor expects the attention to add to the stream, [B, T, d]; None without one.

        It reads n1(x), x the stream that all ranks share before the attention.
        """
        if drop.router is None:
            return None
        u = self.norm1(s.shared)
        return drop.router(u, torch.zeros_like(u))

    def feed(self, s: Streams) -> Fed:
        """Return what the ranks' MLPs give where they read `s`.

        Experts are chosen by the part of `s` that all ranks share.
        """
        self.hold_weights()
        routing = self.route(s.shared) if self.experts else None
        return Fed(list(self._partials(s, routing)), self._bias(routing, s))

    def _bias(self, routing: Routing | None, s: Streams) -> Tensor | None:
        """Return the bias of the MLP, or of the chosen experts for each token of `s`."""
        if routing is None:
            return self.down_bias
        assert self.experts is not None
        return routing.bias(self.experts, s.shared)

    def _partials(self, s: Streams, routing: Routing | None) -> Iterator[Tensor]:
        more = () if routing is None else (routing,)
        # map, unlike a generator, keeps no tensor of one rank while it makes the next one's
        return map(lambda mlp, u: mlp(u, *more), self.mlps, self._inputs(self.norm2, s))

    def _inputs(self, norm: nn.Module, s: Streams) -> Iterator[Tensor]:
        """Yield what each rank's sub-layer reads, norm(x + w_i + p_i) as in streams.py, one after the other."""
        ranks = range(len(self.attentions))
        return itertools.repeat(norm(s.shared), len(ranks)) if s.agree else map(norm, map(s.read, ranks))

    def _sync_point(self, drop: Drop, s: Streams, partials: Iterable[Tensor], branch: Branch) -> Streams:
        if drop.strategy == Strategy.KEEP_SYNC:
            return keep(s, partials, branch, self.comm, bits=drop.bits)
        if drop.strategy == Strategy.BLOCK_DROP:
            return defer(s, partials, branch)
        return write_off(s, partials, branch)

    def hold_weights(self) -> None:
        """Bring the weights into memory, where they are read from disk; whatever uses them here does so first."""
        if self.read_weights is not None:
            self.read_weights(self.index)


def _branch(bias: Tensor | None, norm: nn.Module | None, scale: float) -> Branch:
    """Return a branch; without a norm its scalar is in the partial sums already, and is put into the bias here."""
    if norm is not None:
        return Branch(bias, norm, scale)
    return Branch(bias if bias is None or scale == 1.0 else scale * bias)


def _rank_mlp(parts: LayerParts, slices: RankSlices) -> nn.Module:
    """Return a rank's neurons of the layer's MLP, or of its mixture of experts."""
    if parts.experts is not None:
        return RankExperts(parts.experts, slices, scale=parts.down_scale)
    return RankMLP(parts.dense, slices.neurons, scale=parts.down_scale)


def _a_cache_for_each_rank(cache: Cache, num_blocks: int, places: int) -> None:
    """Repeat the still empty layers of a KV cache that transformers made for one rank, until they have `places`."""
    if len(cache.layers) == num_blocks and places > 1:
        empty = [copy.deepcopy(layer) for layer in cache.layers]
        for layer in empty:
            layer.reset()
        cache.layers.extend(copy.deepcopy(layer) for _ in range(places - 1) for layer in empty)
