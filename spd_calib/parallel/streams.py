"""The residual stream of every rank, and what a sync point does to it (docs/design.md, section 2, the general form).

Rank i reads `shared + written_off_i + debt_i + estimates_i`, written x + w_i + p_i + e_i below. `shared` is computed
from all-reduced sums alone, so it is the same, bit for bit, on all ranks; what a rank knows and the others do not is
kept apart from it, never added in and subtracted out again, which would let rounding pull the ranks apart.

A sub-layer's partial sums join the stream by its `Branch`, A or M of the equation. Where that is linear, sums that were
left for later are one debt, p_i. Where it holds a norm, what joins is known from the whole sum alone, so they wait side
by side, and the next sync point that is kept settles all of them with one all-reduce: [a_i ; m_i] is one message.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .comm import Comm


@dataclass(frozen=True)
class Branch:
    """Takes a sub-layer's output to what is added to the stream: through its bias and, it may be, a norm.

    The output is a sum over ranks of partial sums [B, T, d], `bias` [d] left out. Without a norm a scalar is in them,
    and in the bias, already; with one, `scale` comes behind it: a number, or a tensor [1].
    """

    bias: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    scale: float | Tensor = 1.0

    def __call__(self, total: Tensor) -> Tensor:
        """Return what joins the stream, A(total + bias)."""
        if self.norm is None:
            return _add(total, self.bias)
        out = self.norm(_add(total, self.bias))
        return out if isinstance(self.scale, float) and self.scale == 1.0 else self.scale * out

    def join(self, x: Tensor, total: Tensor) -> Tensor:
        """Return x + A(total + bias)."""
        return _add(x + total, self.bias) if self.norm is None else x + self(total)


LINEAR = Branch()


@dataclass(frozen=True)
class Waiting:
    """Partial sums that wait for the next sync point that is kept, since their branch holds a norm.

    `estimates` are what the ranks read meanwhile in place of A(AR(partial) + bias). One tensor [B, T, d] for each rank
    of this process in both.
    """

    partials: list[Tensor]
    branch: Branch
    estimates: list[Tensor]


@dataclass(frozen=True)
class Streams:
    """Tensors are [B, T, d]; the lists hold one tensor for each rank of this process, or are None for zero."""

    shared: Tensor
    debt: list[Tensor] | None = None  # partial sums of linear branches that the rank still owes the others
    written_off: list[Tensor] | None = None  # what only this rank will ever see
    waiting: tuple[Waiting, ...] = ()  # partial sums of branches with a norm, in the order they join the stream

    @classmethod
    def of(cls, hidden_states: "Tensor | Streams") -> "Streams":
        """Return streams unchanged, and a tensor [B, T, d] as the stream that all ranks share."""
        return hidden_states if isinstance(hidden_states, Streams) else cls(hidden_states)

    @property
    def settled(self) -> bool:
        """Say whether nothing is left for the next sync point."""
        return self.debt is None and len(self.waiting) == 0  # as a compiler can trace it

    @property
    def agree(self) -> bool:
        """Say whether all ranks read the same."""
        return self.settled and self.written_off is None

    def read(self, i: int) -> Tensor:
        """Return what the i-th rank of this process reads."""
        x = self.shared
        if self.written_off is not None:
            x = x + self.written_off[i]
        if self.debt is not None:
            x = x + self.debt[i]
        for part in self.waiting:
            x = x + part.estimates[i]
        return x


def keep(s: Streams, partials: Iterable[Tensor], branch: Branch, comm: Comm, *, bits: int | None = None) -> Streams:
    """Keep the sync point, and settle what waits for it: x <- x + A(AR(partial_i) + bias).

    With `bits` the whole message goes by a quantised sync.

    AR is the all-reduce, the sum over ranks. Linear: x <- x + AR(p_i + partial_i) + bias, p_i <- 0. The parts that wait
    are in the same message, and join in their order: x <- x + A(AR(a_i)), then x <- x + M(AR(m_i)).
    """
    columns: list[tuple[Iterable[Tensor], Branch]] = [(part.partials, part.branch) for part in s.waiting]
    if s.debt is not None and branch.norm is None:
        partials = map(torch.add, s.debt, partials)
    elif s.debt is not None:
        columns.insert(0, (s.debt, LINEAR))
    columns.append((partials, branch))
    message = partials if len(columns) == 1 else map(_side_by_side, *(column for column, _ in columns))
    x = s.shared
    sums = comm.all_reduce(message, bits=bits).split(x.shape[-1], dim=-1)
    for total, (_, to_join) in zip(sums, columns, strict=True):
        x = to_join.join(x, total)
    return Streams(x, None, s.written_off)


def defer(
    s: Streams, partials: Iterable[Tensor], branch: Branch, *, estimates: Iterable[Tensor] | None = None
) -> Streams:
    """Leave the sync point to the next one kept. Linear: p_i <- p_i + partial_i, x <- x + bias.

    Behind a norm the partial sums wait, and each rank reads its estimate of A(AR(partial_i) + bias) for them: by
    default what its own partial sum would give, A(partial_i + bias).
    """
    if branch.norm is None:
        return Streams(_add(s.shared, branch.bias), _sums(s.debt, partials), s.written_off, s.waiting)
    own = list(partials)
    part = Waiting(own, branch, list(map(branch, own) if estimates is None else estimates))
    return Streams(s.shared, s.debt, s.written_off, (*s.waiting, part))


def write_off(s: Streams, partials: Iterable[Tensor], branch: Branch) -> Streams:
    """Drop the sync point for good; its partial sums are never reduced. Linear: w_i <- w_i + partial_i, x <- x + bias.

    Behind a norm w_i <- w_i + A(partial_i + bias).
    """
    if branch.norm is None:
        return Streams(_add(s.shared, branch.bias), s.debt, _sums(s.written_off, partials), s.waiting)
    return Streams(s.shared, s.debt, _sums(s.written_off, map(branch, partials)), s.waiting)


def times(s: Streams, factor: Tensor) -> Streams:
    """Multiply the residual stream, and with it all that is to join it later: factor (x + w_i + p_i + e_i)."""

    def scaled(held: list[Tensor] | None) -> list[Tensor] | None:
        return None if held is None else [factor * h for h in held]

    waiting = tuple(
        replace(part, branch=replace(part.branch, scale=factor * part.branch.scale),
                estimates=[factor * e for e in part.estimates])
        for part in s.waiting
    )  # fmt: skip
    return Streams(factor * s.shared, scaled(s.debt), scaled(s.written_off), waiting)


def in_full(s: Streams) -> Tensor:
    """Return the part that all ranks share once everything that waits is settled, [B, T, d].

    For ranks that are all in this process.
    """
    x = s.shared if s.debt is None else s.shared + sum(s.debt)
    for part in s.waiting:
        x = part.branch.join(x, sum(part.partials[1:], start=part.partials[0]))
    return x


def _side_by_side(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1)


def _sums(held: Sequence[Tensor] | None, partials: Iterable[Tensor]) -> list[Tensor]:
    return list(partials) if held is None else [h + p for h, p in zip(held, partials, strict=True)]


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
