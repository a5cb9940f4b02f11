"""Communication between the ranks, all-reduce and all-gather: all that simulated and real ranks differ in."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spd_calib.errors import SpdError

from .quantised_sync import (
    ONE_SHOT_AT_MOST,
    grouped,
    in_two_shots,
    pack,
    packed_bytes,
    quantised_sum,
    sum_of_packed,
    ungrouped,
    unpack,
)

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
    bytes: int  # of these messages as they are sent
    one_shot_at_most: int  # bytes of a quantised message

    def all_reduce(self, partials: Iterable[Tensor], *, bits: int | None = None) -> Tensor:
        """Return the sum over all ranks, the same bits on each; the partials stay as they are, each looked at once.

        With `bits` it is what a quantised sync makes of it (quantised_sync.py).
        """

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parts of all ranks, equal in shape, behind one another along the last dimension."""


class SimulatedComm:
    """All ranks in this process."""

    def __init__(self, size: int):
        self.size = size
        self.ranks: Sequence[int] = range(size)
        self.all_reduces = self.elements = self.bytes = 0
        self.one_shot_at_most = ONE_SHOT_AT_MOST

    def all_reduce(self, partials: Iterable[Tensor], *, bits: int | None = None) -> Tensor:
        total, sent = _summed(partials) if bits is None else self._summed_quantised(list(partials), bits)
        self.all_reduces += 1
        self.elements += total.numel()
        self.bytes += sent
        return total

    def _summed_quantised(self, parts: Sequence[Tensor], bits: int) -> tuple[Tensor, int]:
        """Return the sum that a quantised sync gives, and the bytes of a message."""
        sent = packed_bytes(parts[0].shape, bits)
        twice = in_two_shots(sent, self.size, one_shot_at_most=self.one_shot_at_most)
        return quantised_sum(parts, bits, twice=twice), sent

    def all_gather(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=-1)


def _summed(partials: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of one or more messages, added up in their order, and the bytes of one."""
    parts = iter(partials)
    total = next(parts)
    for number, part in enumerate(parts):
        total = total.add_(part) if number else total + part  # in place once it is a tensor of our own
    return total, total.nbytes


class DistributedComm:
    """One rank in this process, the others in theirs: the ranks of the default process group."""

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.ranks: Sequence[int] = [self.rank]
        self.all_reduces = self.elements = self.bytes = 0
        self.gathered_at_most = GATHERED_AT_MOST
        self.one_shot_at_most = ONE_SHOT_AT_MOST

    def all_reduce(self, partials: Iterable[Tensor], *, bits: int | None = None) -> Tensor:
        (own,) = partials
        total, sent = self._summed(own) if bits is None else self._summed_quantised(own, bits)
        self.all_reduces += 1
        self.elements += total.numel()
        self.bytes += sent
        return total

    def _summed(self, own: Tensor) -> tuple[Tensor, int]:
        """Return the sum over all ranks, and the bytes of a message."""
        if own.device.type == "cpu" and own.nbytes <= self.gathered_at_most:
            return _summed(self._gathered(own))  # in the order of the ranks: the same bits on each
        total = own.clone(memory_format=torch.contiguous_format)  # reduced in place
        with self._reaching_all():
            dist.all_reduce(total)
        return total, own.nbytes

    def _summed_quantised(self, own: Tensor, bits: int) -> tuple[Tensor, int]:
        """Return the sum that a quantised sync gives, and the bytes of a message."""
        packed = pack(grouped(own), bits)
        if in_two_shots(packed.nbytes, self.size, one_shot_at_most=self.one_shot_at_most):
            share = pack(sum_of_packed(self._shares(packed), bits), bits)
            total = unpack(torch.cat(self._gathered(share))[: len(packed)], bits)
        else:
            total = sum_of_packed(self._gathered(packed), bits)
        return ungrouped(total, own), packed.nbytes

    def _shares(self, packed: Tensor) -> Sequence[Tensor]:
        """Return this rank's share of the rows of `packed` from all ranks, in their order: one of `size` equal parts.

        The last part is filled up with zeros.
        """
        rows = -(-len(packed) // self.size) * self.size
        own = packed.new_zeros(rows, packed.shape[1])
        own[: len(packed)] = packed
        arrived = torch.empty_like(own)
        with self._reaching_all():
            dist.all_to_all_single(arrived, own)
        return arrived.chunk(self.size)

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
