"""Second moments of a block's head outputs, over the text that is fitted on.

Let z [D] be the outputs of all heads at one token, O [D, d] o_proj's weight (transposed, and times what the block
scales its branches by). The attention output is a = z O, a rank's partial sum z_S O_S over its own columns S; every
covariance among these follows from that of z. It is all that grouping heads and fitting predictors need: one pass over
the text, D^2 numbers a block, never the activations themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.models.shard import num_groups

from .feed import Batch, Feed
from .student import Student


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of z over `count` tokens, float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    def permuted(self, order: Tensor) -> "Moments":
        """Return the moments of z[order]."""
        return Moments(self.count, self.mean[order], self.covariance[order][:, order])


@dataclass(frozen=True)
class HeadMoments:
    """Moments of a block's head outputs over the tokens to fit on and over those to choose by."""

    fitting: Moments
    choosing: Moments

    @classmethod
    def of(cls, student: Student, feed: Feed) -> "HeadMoments":
        return cls(*(moments(student, feed, part) for part in (feed.fitting, feed.choosing)))

    def permuted(self, order: Tensor) -> "HeadMoments":
        return HeadMoments(self.fitting.permuted(order), self.choosing.permuted(order))


def widened(x: Tensor) -> Tensor:
    """Return x in float32 where its dtype is narrower: what is summed over tokens would be rounded to that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def moments(student: Student, feed: Feed, batches: Iterable[Batch]) -> Moments:
    """Return the moments of all heads' outputs, rank after rank, over the real tokens of some of the feed's batches."""
    width = student.parts.o.in_features
    device = student.parts.o.weight.device
    count, total = 0, torch.zeros(width, dtype=torch.float64, device=device)
    squares = torch.zeros(width, width, dtype=torch.float64, device=device)
    shift: Tensor | None = None  # the first batch's mean: keeps the difference of large numbers small
    for batch in batches:
        _, heads = student.block.attend(feed.inputs(batch), **feed.kwargs(batch))
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
    """Return O [D, d], float64, scaled where the block scales what its attention adds to the residual stream."""
    return student.parts.o_scale * student.parts.o.weight.detach().double().T


def rank_columns(student: Student) -> list[Tensor]:
    """Return, rank by rank, the entries of z that the rank has: those it owns, contiguous, then replicated ones."""
    ranks, counts, device = student.block.comm.size, student.counts, student.parts.o.weight.device
    all_columns = torch.arange(student.parts.o.in_features, device=device)
    own = list(all_columns.chunk(ranks))
    if student.replicated is None:
        return own
    groups = all_columns.chunk(num_groups(counts, ranks))
    return [torch.cat([o, *(groups[g] for g in more)]) for o, more in zip(own, student.replicated, strict=True)]
