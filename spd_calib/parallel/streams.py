"""The residual stream of every rank, and what a sync point does to it (docs/design.md, section 2, the general form).

Rank i reads `shared + written_off_i + debt_i`, written x + w_i + p_i below. `shared` is computed from
all-reduced sums alone, so it is the same, bit for bit, on all ranks; what a rank knows and the others do not is kept
apart from it, never added in and subtracted out again, which would let rounding pull the ranks apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import Comm


@dataclass(frozen=True)
class Streams:
    """Tensors are [B, T, d]; the lists hold one tensor for each rank of this process, or are None for zero."""

    shared: Tensor
    debt: list[Tensor] | None = None  # partial sums the rank still owes the others
    written_off: list[Tensor] | None = None  # partial sums only this rank will ever see

    @classmethod
    def of(cls, hidden_states: "Tensor | Streams") -> "Streams":
        """Return streams unchanged, and a tensor [B, T, d] as the stream that all ranks share."""
        return hidden_states if isinstance(hidden_states, Streams) else cls(hidden_states)

    @property
    def agree(self) -> bool:
        """Say whether all ranks read the same."""
        return self.debt is None and self.written_off is None

    def read(self, i: int) -> Tensor:
        """Return what the i-th rank of this process reads."""
        x = self.shared
        if self.written_off is not None:
            x = x + self.written_off[i]
        if self.debt is not None:
            x = x + self.debt[i]
        return x


def keep(s: Streams, partials: Iterable[Tensor], bias: Tensor | None, comm: Comm) -> Streams:
    """Keep the sync point: x <- x + AR(p_i + partial_i) + bias, p_i <- 0; AR is the all-reduce, the sum over ranks."""
    owed = partials if s.debt is None else map(torch.add, s.debt, partials)
    return Streams(_add(s.shared + comm.all_reduce(owed), bias), None, s.written_off)


def defer(s: Streams, partials: Iterable[Tensor], bias: Tensor | None) -> Streams:
    """Leave the sync point to the next one kept: p_i <- p_i + partial_i, x <- x + bias."""
    return Streams(_add(s.shared, bias), _sums(s.debt, partials), s.written_off)


def write_off(s: Streams, partials: Iterable[Tensor], bias: Tensor | None) -> Streams:
    """Drop the sync point for good; its partial sums are never reduced: w_i <- w_i + partial_i, x <- x + bias."""
    return Streams(_add(s.shared, bias), s.debt, _sums(s.written_off, partials))


def _sums(held: list[Tensor] | None, partials: Iterable[Tensor]) -> list[Tensor]:
    return list(partials) if held is None else [h + p for h, p in zip(held, partials, strict=True)]


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
