"""A decoder block on its ranks. The one definition behind the simulation and the real ranks."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn
from transformers.cache_utils import Cache

from spd_calib.errors import InputError
from spd_calib.formats.common import Strategy
from spd_calib.models.architecture import HeadCounts, LayerParts
from spd_calib.models.shard import RankMLP, RankSlices, rank_attention

from .comm import Comm
from .compensation import Compensation, check_shapes
from .streams import Streams, defer, keep, write_off


class Block(nn.Module):
    """Takes the place of a transformers decoder layer; hands Streams to the next block.

    `attention_strategy` and `mlp_strategy` may be set between forwards.
    """

    def __init__(self, index: int, num_blocks: int, parts: LayerParts, comm: Comm):
        super().__init__()
        counts = HeadCounts.of(parts)
        slices = [RankSlices.of(counts, rank, comm.size) for rank in comm.ranks]
        self.index, self.num_blocks, self.comm = index, num_blocks, comm
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        # the KV cache holds the blocks of this process's first rank, then those of its second, ...
        self.attentions = nn.ModuleList(
            rank_attention(parts, s, layer_idx=i * num_blocks + index) for i, s in enumerate(slices)
        )
        self.mlps = nn.ModuleList(RankMLP(parts, s) for s in slices)
        self.o_bias, self.down_bias = parts.o.bias, parts.down.bias
        self.attention_strategy = Strategy.KEEP_SYNC
        self.mlp_strategy = Strategy.KEEP_SYNC
        self.read_weights: Callable[[int], None] = lambda index: None  # where they are not always in memory
        self.compensation: nn.ModuleList | None = None  # one predictor for each rank of this process
        name = next(n for n, m in parts.attention.named_children() if m is parts.o)
        self.outs = [getattr(attention, name) for attention in self.attentions]  # each rank's slice of o_proj
        self.d_rank = slices[0].q.stop - slices[0].q.start
        self.width = parts.o.out_features

    def set_compensation(self, predictors: Mapping[int, Compensation] | None) -> None:
        """What each rank's MLP reads under block_drop: `predictors` by rank, or None for its own partial sum."""
        self.compensation = None
        if predictors is not None:
            if missing := set(self.comm.ranks) - set(predictors):
                raise InputError(f"Block {self.index} has no predictor for rank {min(missing)} of {self.comm.size}.")
            check_shapes(self.index, predictors, self.d_rank, self.width)
            like = next(self.mlps.parameters())
            self.compensation = nn.ModuleList(predictors[rank].to(like) for rank in self.comm.ranks)

    def forward(self, hidden_states: Tensor | Streams, **kwargs) -> Streams:
        """hidden_states: [B, T, d] (the embeddings) or the Streams of the block before; kwargs as transformers' own."""
        entered = hidden_states if isinstance(hidden_states, Streams) else Streams(hidden_states)
        if kwargs.get("past_key_values") is not None:
            _a_cache_for_each_rank(kwargs["past_key_values"], self.num_blocks, len(self.attentions))
        s, read = self._after_attention(entered, **kwargs)
        return self._sync_point(self.mlp_strategy, s, self._fed(read), self.down_bias)

    def _after_attention(self, entered: Streams, **kwargs) -> tuple[Streams, Streams]:
        """The streams behind the attention's sync point, and what the MLP reads: the same, but under compensation."""
        partials, heads = self.attend(entered, **kwargs)
        s = self._sync_point(self.attention_strategy, entered, partials, self.o_bias)
        if self.compensation is None or self.attention_strategy != Strategy.BLOCK_DROP:
            return s, s
        predicted = [c(z, p) for c, z, p in zip(self.compensation, heads, partials, strict=True)]
        return s, defer(entered, predicted, self.o_bias)  # the debt stays the exact one

    def feed(self, s: Streams) -> list[Tensor]:
        """Each rank's partial sum of the MLP [B, T, d] (bias left out), without compensation."""
        self.read_weights(self.index)
        return list(self._fed(s))

    def _fed(self, s: Streams) -> Iterator[Tensor]:
        # map, unlike a generator, keeps no tensor of one rank while it makes the next one's
        return map(lambda mlp, u: mlp(u), self.mlps, self._inputs(self.norm2, s))

    def attend(self, s: Streams, **kwargs) -> tuple[list[Tensor], list[Tensor]]:
        """Each rank's partial sum of the attention [B, T, d] (bias left out), and its head outputs [B, T, d_rank]."""
        self.read_weights(self.index)
        heads: list[Tensor] = []
        hooks = [out.register_forward_pre_hook(lambda m, args: heads.append(args[0])) for out in self.outs]
        try:
            inputs = self._inputs(self.norm1, s)
            partials = [attn(hidden_states=u, **kwargs)[0] for attn, u in zip(self.attentions, inputs, strict=True)]
        finally:
            for hook in hooks:
                hook.remove()
        return partials, heads

    def _inputs(self, norm: nn.Module, s: Streams) -> Iterator[Tensor]:
        """What each rank's sub-layer reads, n(x + w_i + p_i), one after the other."""
        ranks = range(len(self.attentions))
        return itertools.repeat(norm(s.shared), len(ranks)) if s.agree else map(norm, map(s.read, ranks))

    def _sync_point(self, strategy: Strategy, s: Streams, partials: Iterable[Tensor], bias: Tensor | None) -> Streams:
        if strategy == Strategy.KEEP_SYNC:
            return keep(s, partials, bias, self.comm)
        if strategy == Strategy.BLOCK_DROP:
            return defer(s, partials, bias)
        return write_off(s, partials, bias)


def _a_cache_for_each_rank(cache: Cache, num_blocks: int, ranks: int) -> None:
    """transformers makes a KV cache for one rank: repeat its still empty layers for the others."""
    if len(cache.layers) == num_blocks and ranks > 1:
        empty = [copy.deepcopy(layer) for layer in cache.layers]
        for layer in empty:
            layer.reset()
        cache.layers.extend(copy.deepcopy(layer) for _ in range(ranks - 1) for layer in empty)
