"""Communication between the ranks, all-reduce and all-gather: all that simulated and real ranks differ in."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spd_calib.errors import SpdError

# Bytes of a message up to which, on gloo, an all-gather and a sum that each rank makes itself take the place of the
# all-reduce: the former wait for two one-way delays, the latter for four. Measured with 2 ranks (benchmarks/link.py):
# half the time over a link with a delay, two thirds on loopback up to 16 KiB; at 128 KiB the all-reduce wins on
# loopback. With n ranks the former move n / 2 times the bytes of the latter.
GATHERED_AT_MOST = 2**15


class Comm(Protocol):
    """Brings the ranks together. `ranks` are those this process runs; there is one tensor for each of them."""

    size: int
    ranks: Sequence[int]
    all_reduces: int  # made so far
    elements: int  # in their messages, together

    def all_reduce(self, partials: Iterable[Tensor]) -> Tensor:
        """Return the sum over all ranks, the same bits on each; the partials stay as they are, each looked at once."""

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parts of all ranks, equal in shape, behind one another along the last dimension."""


class SimulatedComm:
    """All ranks in this process."""

    def __init__(self, size: int):
        self.size = size
        self.ranks: Sequence[int] = range(size)
        self.all_reduces = self.elements = 0

    def all_reduce(self, partials: Iterable[Tensor]) -> Tensor:
        parts = iter(partials)
        total = next(parts)
        for number, part in enumerate(parts):
            total = total.add_(part) if number else total + part  # in place once it is a tensor of our own
        self.all_reduces += 1
        self.elements += total.numel()
        return total

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=-1)


class DistributedComm:
    """One rank in this process, the others in theirs: the ranks of the default process group."""

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.ranks: Sequence[int] = [self.rank]
        self.all_reduces = self.elements = 0
        self.gathered_at_most = GATHERED_AT_MOST

    def all_reduce(self, partials: Iterable[Tensor]) -> Tensor:
        (own,) = partials
        if own.device.type == "cpu" and own.nbytes <= self.gathered_at_most:
            total, *others = self._gathered(own)
            for part in others:  # in the order of the ranks: the same bits on each
                total = total + part
        else:
            total = own.clone(memory_format=torch.contiguous_format)  # reduced in place
            with self._reaching_all():
                dist.all_reduce(total)
        self.all_reduces += 1
        self.elements += total.numel()
        return total

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(self._gathered(parts[0]), dim=-1)

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """Return the parts of all ranks, in their order."""
        part = part.contiguous()
        gathered = [torch.empty_like(part) for _ in range(self.size)]
        with self._reaching_all():
            dist.all_gather(gathered, part)
        return gathered

    @contextmanager
    def _reaching_all(self) -> Iterator[None]:
        """Raise SpdError where another rank has gone."""
        try:
            yield
        except RuntimeError as e:
            if not isinstance(e, dist.DistError) and "onnection" not in str(e):
                raise
            raise SpdError(
                f"Rank {self.rank} has lost another rank, which ended without a word: killed, perhaps for its memory."
            ) from e
