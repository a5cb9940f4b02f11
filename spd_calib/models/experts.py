"""A rank's share of a mixture of experts: some neurons of every expert and of the shared ones; the whole router.

A model's experts lie stacked in two parameters, one slice an expert: `gate_up_proj` [E, 2f, d] holds the gate's rows,
then up's, `down_proj` [E, d, f]. What transformers says of its module's layout (`is_transposed`, `has_bias`) is taken
into account, and the module's own `_apply_gate` computes the neurons. Who chooses is the model's own router.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import ExpertParts
from .shard import ALL, ALL_ROWS, RankMLP, RankSlices, Rows, of_ranges


@dataclass(frozen=True)
class Routing:
    """The experts chosen for N tokens, and their weights: both [N, k]."""

    weights: Tensor
    chosen: Tensor


def route(parts: ExpertParts, u: Tensor) -> Routing:
    """Return what the model's own router chooses where it reads u [B, T, d]."""
    given = parts.router(u.flatten(0, -2))
    return Routing(given[parts.weights], given[parts.chosen])


def expert_slices(parts: ExpertParts, slices: RankSlices) -> dict[str, tuple[Rows, slice]]:
    """Return what a rank owns of each parameter of the stacked experts, by its name in their module.

    (rows, columns) are ranges of the last two dimensions.
    """
    own, all_neurons = slices.neurons, parts.neurons
    return {
        "gate_up_proj": ((own, slice(own.start + all_neurons, own.stop + all_neurons)), ALL),
        "down_proj": (ALL_ROWS, own),
    }


class RankExperts(nn.Module):
    """One rank's neurons of every expert: n2(h) and the experts chosen to a partial sum [B, T, d], times `scale`."""

    def __init__(self, parts: ExpertParts, slices: RankSlices, *, scale: float):
        super().__init__()
        self.experts: Any = parts.experts
        self.shared_gate, self.scale = parts.shared_gate, scale
        # to the rank's slice already, by shard_load.py
        cut = parts.experts.get_parameter("down_proj").shape[-1] != parts.neurons
        own = expert_slices(parts, slices)
        self.own = {name: (ALL_ROWS, ALL) if cut else own[name] for name in own}
        shared = parts.shared
        self.shared = RankMLP(shared, slices.shared_neurons, scale=scale) if shared else None

    def forward(self, u: Tensor, routing: Routing) -> Tensor:
        """u is [B, T, d]; `routing` speaks of its B * T tokens in their order."""
        tokens = u.flatten(0, -2)
        outs = tokens.new_zeros(*routing.chosen.shape, tokens.shape[-1])  # [N, k, d]
        for expert in routing.chosen.unique().tolist():
            token, place = torch.where(routing.chosen == expert)
            out = self._expert(expert, tokens[token]) * routing.weights[token, place, None]
            outs[token, place] = out.to(outs.dtype)
        y = outs.sum(1).view(u.shape)
        y = y if self.scale == 1.0 else y * self.scale
        if self.shared is None:
            return y
        shared = self.shared(u)
        return y + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(u)) * shared)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        """Return the partial sum [n, d] of one expert for the tokens x [n, d] that chose it."""
        (gate_up, columns), (all_rows, own) = self.own["gate_up_proj"], self.own["down_proj"]
        first = of_ranges(x, self.experts.gate_up_proj[expert], rows=gate_up, columns=columns)
        neurons = self.experts._apply_gate(first)
        return of_ranges(neurons, self.experts.down_proj[expert], rows=all_rows, columns=own)
