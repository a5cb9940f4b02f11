"""The one thing in which simulated and real ranks differ: how partial sums and logits come together."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Comm(Protocol):
    """`ranks` are those this process runs; lists of tensors hold one entry for each of them."""

    size: int
    ranks: Sequence[int]
    all_reduces: int  # made so far

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """The sum over all ranks, the same bits on each; the partials stay as they are."""

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts of all ranks, equal in shape, behind one another along the last dimension."""


class Simulated:
    """All ranks in this process."""

    def __init__(self, size: int):
        self.size = size
        self.ranks: Sequence[int] = range(size)
        self.all_reduces = 0

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        self.all_reduces += 1
        total = partials[0]
        for partial in partials[1:]:
            total = total + partial
        return total

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=-1)
