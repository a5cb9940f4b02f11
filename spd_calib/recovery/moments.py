"""Second moments of a block's head outputs: all that grouping heads and fitting predictors need.

Let z [D] be the outputs of all heads at one token, O [D, d] o_proj's weight (transposed). The attention output is
a = z O, a rank's partial sum z_S O_S over its own columns S; every covariance among these follows from that of z. One
pass over the text, D^2 numbers a block, never the activations themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .planned import Batch, Feed, Student


@dataclass
class Moments:
    """Mean [D] and covariance [D, D] of z over `count` tokens, float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    def permuted(self, order: Tensor) -> "Moments":
        """Of z[order]."""
        return Moments(self.count, self.mean[order], self.covariance[order][:, order])


@torch.no_grad()
def moments(student: Student, feed: Feed, batches: Iterable[Batch], own: bool) -> Moments:
    """Of all heads, rank after rank, over the real tokens of `batches`."""
    width = student.parts.o.in_features
    device = student.parts.o.weight.device
    count, total = 0, torch.zeros(width, dtype=torch.float64, device=device)
    squares = torch.zeros(width, width, dtype=torch.float64, device=device)
    shift: Tensor | None = None  # the first batch's mean: keeps the difference of large numbers small
    for batch in batches:
        _, heads = student.block.attend(feed.inputs(batch, own), **batch.kwargs[student.block.index])
        z = torch.cat(heads, dim=-1)[batch.mask].double()
        shift = z.mean(0) if shift is None else shift
        z = z - shift
        count += len(z)
        total += z.sum(0)
        squares += z.T @ z
    assert shift is not None
    mean = total / count
    return Moments(count, mean + shift, squares / count - torch.outer(mean, mean))


def o_matrix(student: Student) -> Tensor:
    """O [D, d], float64."""
    return student.parts.o.weight.detach().double().T


def rank_columns(student: Student, tp: int) -> list[Tensor]:
    """Which entries of z each rank owns, contiguous."""
    width = student.parts.o.in_features
    return list(torch.arange(width, device=student.parts.o.weight.device).chunk(tp))
