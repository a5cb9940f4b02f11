"""A rank's share of a mixture of experts: some neurons of every expert and of the shared ones; the whole router.

A model's experts lie stacked in two parameters, one slice an expert: `gate_up_proj` [E, 2f, d] holds the gate's rows,
then up's, or one of each in turn; `down_proj` is [E, d, f]. Where transformers' module says `is_transposed` the last
two dimensions change places; where it says `has_bias` both have a bias. The module's own `_apply_gate` computes the
neurons, and who chooses is the model's own router.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import ExpertParts
from .shard import ALL, ALL_ROWS, RankMLP, RankSlices, Rows, of_ranges, times


@dataclass(frozen=True)
class Routing:
    """The experts chosen for N tokens, and their weights, both [N, k]; the logits of all experts, [N, E]."""

    weights: Tensor
    chosen: Tensor
    logits: Tensor

    @classmethod
    def of(cls, parts: ExpertParts, given: Sequence[Tensor]) -> "Routing":
        """Return what the model's own router says with what it gives."""
        names = parts.names
        return cls(given[names.weights], given[names.chosen], given[names.logits])

    def bias(self, parts: ExpertParts, like: Tensor) -> Tensor | None:
        """Return what the chosen experts' biases add to `like` [B, T, d], which all ranks know; None without any."""
        if not parts.has_bias:
            return None
        of_chosen = parts.experts.get_parameter("down_proj_bias")[self.chosen]  # [N, k, d]
        return (self.weights[..., None] * of_chosen).sum(1).to(like.dtype).view(like.shape)


def route(parts: ExpertParts, u: Tensor) -> Routing:
    """Return what the model's own router chooses where it reads u [B, T, d]."""
    return Routing.of(parts, parts.router(u.flatten(0, -2)))


def expert_slices(parts: ExpertParts, slices: RankSlices) -> dict[str, tuple[Rows, slice]]:
    """Return what a rank owns of each parameter of the stacked experts, by its name in their module.

    (rows, columns) are ranges of the last two dimensions. What is not named is whole on every rank.
    """
    rows, own = gate_up_rows(parts, slices.neurons), slices.neurons
    cut: dict[str, tuple[Rows, slice]] = {"gate_up_proj": (rows, ALL), "down_proj": (ALL_ROWS, own)}
    if parts.transposed:
        cut = {"gate_up_proj": (ALL_ROWS, rows[0]), "down_proj": ((own,), ALL)}
    return cut | ({"gate_up_proj_bias": (ALL_ROWS, rows[0])} if parts.has_bias else {})


def gate_up_rows(parts: ExpertParts, own: slice) -> Rows:
    """Return the rows of gate_up_proj [2f, d] that belong to the neurons `own`."""
    if parts.interleaved:
        return (times(own, 2),)
    return (own, slice(own.start + parts.neurons, own.stop + parts.neurons))


class RankExperts(nn.Module):
    """One rank's neurons of every expert: n2(h) and the experts chosen to a partial sum [B, T, d], times `scale`.

    The biases of down_proj are left out: see Routing.bias.
    """

    def __init__(self, parts: ExpertParts, slices: RankSlices, *, scale: float):
        super().__init__()
        self.experts: Any = parts.experts
        self.parts, self.shared_gate, self.scale = parts, parts.shared_gate, scale
        cut = parts.weight("down_proj", 0).shape[1] != parts.neurons  # to the rank's slice already, by shard_load.py
        self.gate_up = ALL_ROWS if cut else gate_up_rows(parts, slices.neurons)
        self.down = ALL if cut else slices.neurons
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
        neurons = expert_neurons(self.parts, expert, x, rows=self.gate_up)
        return of_ranges(neurons, self.parts.weight("down_proj", expert), rows=ALL_ROWS, columns=self.down)


def expert_neurons(parts: ExpertParts, expert: int, x: Tensor, *, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the activations [n, neurons] of one expert for the tokens x [n, d]; `rows` are those of gate_up_proj."""
    weight, bias = parts.weight("gate_up_proj", expert), parts.bias("gate_up_proj", expert)
    experts: Any = parts.experts
    return experts._apply_gate(of_ranges(x, weight, rows=rows, columns=ALL, bias=bias))
