"""The bytes that a forward moves and the FLOPs it computes on one rank, from a model's sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spd_calib.formats.plan import Plan
from spd_calib.models.architecture import HeadCounts, LayerParts
from spd_calib.models.plan_files import predictor_forms
from spd_calib.models.predictor import predictor_shapes
from spd_calib.models.probe import find_layers

from .latency import Step


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, weights in elements; biases and norms are left out. Those of MLPs are the mean over blocks."""

    blocks: int
    width: int
    counts: HeadCounts
    query_weights: int  # of a block, what is divided by query head: q and o
    kv_weights: int  # of k and v, a block
    mlp_weights: float  # of a block: its MLP, or what every token goes through of a mixture of experts
    head_weights: int  # what makes logits of the last hidden state; the embedding is looked up, not read
    expert_weights: float = 0  # of a block, all its experts
    expert_share: float = 1.0  # of the experts, those that one token goes through
    latent_weights: int = 0  # of a block, what every rank has whole of its attention
    latents: int = 0  # numbers that the cache holds for a token and block, on every rank; 0: keys and values
    key_dim: int = 0  # the width of one head's keys
    side_by_side: bool = False  # partial sums that wait take room of their own in a message: behind norms

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelSizes":
        """Return the sizes of any supported model; its weights may be on the meta device."""
        layers = find_layers(model)
        parts = layers[0]
        return cls(
            blocks=len(layers),
            width=parts.o.out_features,
            counts=HeadCounts.of(parts),
            query_weights=sum(p.weight.numel() for p in (*parts.by_head, parts.o)),
            kv_weights=sum(p.weight.numel() for p in parts.by_kv_head),
            latent_weights=sum(linear.weight.numel() for linear in parts.latents),
            latents=parts.latents[-1].out_features if parts.latents else 0,
            key_dim=parts.by_head[0].out_features // HeadCounts.of(parts).heads,
            mlp_weights=sum(linear.weight.numel() for p in layers for linear in p.ffn.linears) / len(layers),
            head_weights=model.get_output_embeddings().weight.numel(),
            **_of_experts(layers),
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


def _of_experts(layers: Sequence[LayerParts]) -> dict[str, float]:
    """Return the fields of ModelSizes that speak of experts, which without any keep their defaults."""
    mixtures = [p.experts for p in layers if p.experts]
    if not mixtures:
        return {}
    weights = sum(w.numel() for m in mixtures for w in m.experts.parameters() if w.dim() == 3)
    router: Any = mixtures[0].router
    return {"expert_weights": weights / len(layers), "expert_share": router.top_k / router.num_experts}


def bytes_moved(sizes: ModelSizes, step: Step, *, tp: int) -> float:
    """Return the bytes that a rank reads or writes: its weights, and the cache, read (decode) or written (prefill)."""
    cache = sizes.blocks * sizes.cached(tp) * step.batch * step.context
    experts = sizes.expert_weights / tp * sizes.experts_met(step.new_tokens)
    return (sizes.blocks * (sizes.block_weights(tp) + experts) + sizes.head_weights / tp + cache) * step.itemsize


def flops(sizes: ModelSizes, step: Step, *, tp: int) -> float:
    """Return a rank's FLOPs: two for each weight and new token, the head's for the last token alone, and attention."""
    weights = sizes.block_weights(tp) + sizes.expert_weights / tp * sizes.expert_share
    linear = 2 * step.new_tokens * sizes.blocks * weights + 2 * step.batch * sizes.head_weights / tp
    keys = step.context if step.phase == "decode" else step.context / 2  # a token attends to, on average: it is causal
    of_head = 2 * (sizes.key_dim + sizes.counts.head_dim)  # a key and a value of one head
    return linear + sizes.blocks * sizes.counts.heads / tp * of_head * step.new_tokens * keys


def predictor_weights(plan: Plan, sizes: ModelSizes) -> int:
    """Return the elements that the predictors of a recovered plan add to a rank, all blocks together."""
    of_heads = sizes.counts.heads // plan.tensor_parallel.size * sizes.counts.head_dim
    added = 0
    for point, owners, form in predictor_forms(plan):
        # an attention's read the rank's head outputs; a router's, and those of an MLP, a whole hidden state
        d_rank = of_heads if point.sync_point == "attention" and "router" not in owners else sizes.width
        shapes = predictor_shapes(form.kind, form.rank, d_rank=d_rank, d=sizes.width, scaled=form.scaled)
        added += sum(map(math.prod, shapes.values()))
    return added
