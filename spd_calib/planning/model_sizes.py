"""The bytes that a forward moves and the FLOPs it computes on one rank, from a model's sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spd_calib.formats.drops import Groups
from spd_calib.formats.plan import Plan
from spd_calib.models.architecture import HeadCounts
from spd_calib.models.parts import LayerParts
from spd_calib.models.plan_files import predictor_forms
from spd_calib.models.predictor import predictor_shapes
from spd_calib.models.probe import find_layers
from spd_calib.models.shard import size, slices_of_groups, width_of_heads

from .latency import Step


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, weights in elements; biases and norms are left out.

    Those of a block are the mean over blocks; `counts` and `key_dim` are those of softmax attention, if there is any.
    """

    blocks: int
    width: int
    counts: HeadCounts
    query_weights: float  # of a block, what is divided by query head: q and o; all of a linear attention's
    kv_weights: float  # of k and v, a block
    mlp_weights: float  # of a block: its MLP, or what every token goes through of a mixture of experts
    head_weights: int  # what makes logits of the last hidden state; the embedding is looked up, not read
    expert_weights: float = 0  # of a block, all its experts
    expert_share: float = 1.0  # of the experts, those that one token goes through
    latent_weights: int = 0  # of a block, what every rank has whole of its attention
    latents: int = 0  # numbers that the cache holds for a token and block, on every rank; 0: keys and values
    key_dim: int = 0  # the width of one head's keys
    attending: float = 1.0  # of the blocks, those whose cache grows with every token: all but linear attentions
    states: float = 0  # numbers of a block's recurrent state, of all heads
    side_by_side: bool = False  # partial sums that wait take room of their own in a message: behind norms

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelSizes":
        """Return the sizes of any supported model; its weights may be on the meta device."""
        layers = find_layers(model)
        linear = [p for p in layers if p.convolution is not None]
        softmax = [p for p in layers if p.convolution is None]
        parts = (softmax or layers)[0]
        counts = HeadCounts.of(parts)
        of_heads = [p for layer in layers for p in (*layer.by_head, layer.o)]
        of_heads += [p for layer in linear for p in layer.by_kv_head]
        of_kv = [p for layer in softmax for p in layer.by_kv_head]
        keys = (parts.by_kv_head[0], counts.kv_heads) if parts.by_kv_head else (parts.by_head[0], counts.heads)
        return cls(
            blocks=len(layers),
            width=parts.o.out_features,
            counts=counts,
            query_weights=sum(p.weight.numel() for p in of_heads) / len(layers),
            kv_weights=sum(p.weight.numel() for p in of_kv) / len(layers),
            latent_weights=sum(linear.weight.numel() for linear in parts.latents),
            latents=parts.latents[-1].out_features if parts.latents else 0,
            key_dim=keys[0].out_features // keys[1],
            mlp_weights=sum(linear.weight.numel() for p in layers for linear in p.ffn.linears) / len(layers),
            head_weights=model.get_output_embeddings().weight.numel(),
            **_of_experts(layers),
            attending=1 - len(linear) / len(layers),
            states=sum(map(_state, linear)) / len(layers),
            side_by_side=parts.attention_out_norm is not None,
        )

    def kv_heads(self, tp: int) -> int:
        """Return the KV heads of a rank: with more ranks than KV heads each holds one of them."""
        return max(self.counts.kv_heads // tp, 1)

    def block_weights(self, tp: int) -> float:
        """Return the weights of one block on a rank that every token goes through."""
        kv_share = self.kv_heads(tp) / self.counts.kv_heads
        return (self.query_weights + self.mlp_weights) / tp + self.kv_weights * kv_share + self.latent_weights

    def cached(self, tp: int) -> int:
        """Return the numbers that a rank's cache holds for a token and block."""
        return self.latents or 2 * self.kv_heads(tp) * self.counts.head_dim

    def experts_met(self, tokens: int) -> float:
        """Return the share of the experts that at least one of `tokens` goes through, were the choice even."""
        return 1 - (1 - self.expert_share) ** tokens


def _state(parts: LayerParts) -> int:
    """Return the numbers in a linear attention's recurrent state: a head's is a matrix, its key by its value."""
    attention: Any = parts.attention
    return int(attention.num_v_heads * attention.head_k_dim * attention.head_v_dim)


def _of_experts(layers: Sequence[LayerParts]) -> dict[str, float]:
    """Return the fields of ModelSizes that speak of experts, which without any keep their defaults."""
    mixtures = [p.experts for p in layers if p.experts]
    if not mixtures:
        return {}
    weights = sum(w.numel() for m in mixtures for w in m.experts.parameters() if w.dim() == 3)
    router: Any = mixtures[0].router
    return {"expert_weights": weights / len(layers), "expert_share": router.top_k / router.num_experts}


@dataclass(frozen=True)
class Added:
    """Holds what a plan adds to what a rank does in a forward: its predictors, and the heads that it replicates."""

    weights: float = 0.0
    cached: float = 0.0  # numbers that the cache holds for a token
    heads: float = 0.0  # query heads that attend

    def __add__(self, other: "Added") -> "Added":
        """Return both together."""
        return Added(self.weights + other.weights, self.cached + other.cached, self.heads + other.heads)


NOTHING_ADDED = Added()


def weights_read(sizes: ModelSizes, *, tp: int) -> float:
    """Return the weights of the dense model that a rank reads for a token, but for experts."""
    return sizes.blocks * sizes.block_weights(tp) + sizes.head_weights / tp


def bytes_moved(sizes: ModelSizes, step: Step, *, tp: int, added: Added = NOTHING_ADDED) -> float:
    """Return the bytes that a rank reads or writes: its weights, and the cache, read (decode) or written (prefill)."""
    cache = sizes.attending * sizes.cached(tp) * step.context + 2 * sizes.states / tp  # a state is read, and written
    experts = sizes.blocks * sizes.expert_weights / tp * sizes.experts_met(step.new_tokens)
    cached = sizes.blocks * cache + added.cached * step.context
    return (weights_read(sizes, tp=tp) + experts + added.weights + step.batch * cached) * step.itemsize


def flops(sizes: ModelSizes, step: Step, *, tp: int, added: Added = NOTHING_ADDED) -> float:
    """Return a rank's FLOPs: two for each weight and new token, the head's for the last token alone, and attention."""
    weights = sizes.block_weights(tp) + sizes.expert_weights / tp * sizes.expert_share
    linear = 2 * step.new_tokens * (sizes.blocks * weights + added.weights) + 2 * step.batch * sizes.head_weights / tp
    keys = step.context if step.phase == "decode" else step.context / 2  # a token attends to, on average: it is causal
    of_head = 2 * (sizes.key_dim + sizes.counts.head_dim)  # a key and a value of one head
    of_states = 6 * sizes.blocks * sizes.states / tp * step.new_tokens  # read, written to and asked, once a token
    heads = sizes.attending * sizes.blocks * sizes.counts.heads / tp + added.heads
    attended = heads * of_head * step.new_tokens * keys
    return linear + attended + of_states


def predictor_weights(plan: Plan, sizes: ModelSizes) -> int:
    """Return the elements that the predictors of a recovered plan add to a rank, all blocks together."""
    added = 0
    for point, owners, form in predictor_forms(plan):
        d_rank = sizes.width  # a router's read a whole hidden state, and so do those of an MLP
        if point.sync_point == "attention" and "router" not in owners:
            d_rank = width_of_heads(sizes.counts, plan.blocks[point.block].replicated, plan.tensor_parallel.size)
        shapes = predictor_shapes(form.kind, form.rank, d_rank=d_rank, d=sizes.width, scaled=form.scaled)
        added += sum(map(math.prod, shapes.values()))
    return added


def added_by_heads(sizes: ModelSizes, groups: Groups, *, tp: int) -> Added:
    """Return what the replicated KV groups of one block, by rank, add to the rank that they add most to.

    As it is run: each range of heads reads the KV heads that serve it, and has them in a cache of its own.
    """
    counts = sizes.counts
    of_ranks = []
    for own in groups:
        ranges = slices_of_groups(counts, own, tp)
        heads, kv = (
            sum(size(part) for part in parts) for parts in zip(*((s.heads, s.kv_heads) for s in ranges), strict=True)
        )
        weights = sizes.query_weights * heads / counts.heads + sizes.kv_weights * kv / counts.kv_heads
        cached = len(ranges) * sizes.latents or 2 * kv * counts.head_dim
        of_ranks.append(Added(weights + len(ranges) * sizes.latent_weights, cached, heads))
    return max(of_ranks, key=lambda added: (added.weights, added.cached))


def added_by(plan: Plan, sizes: ModelSizes) -> Added:
    """Return what the predictors and the replicated heads of a plan add to a rank, all blocks together."""
    heads = (added_by_heads(sizes, b.replicated, tp=plan.tensor_parallel.size) for b in plan.blocks if b.replicated)
    return sum(heads, start=Added(predictor_weights(plan, sizes)))
