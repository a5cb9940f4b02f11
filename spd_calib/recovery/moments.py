"""Second moments at a block, over the text that is fitted on: of its head outputs, and of gradients at its output.

Let z [D] be the outputs of all heads at one token, O [D, d] o_proj's weight (transposed). The attention output is
a = z O, a rank's partial sum z_S O_S over its own columns S; every covariance among these follows from that of z. It is
all that grouping heads and fitting predictors need: one pass over the text, D^2 numbers a block, never the activations
themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.parallel.streams import Streams

from .feed import Batch, Feed
from .student import Student

METRIC_BYTES = 4 * 2**30  # of the gradients' moments: at d = 8192 half a gigabyte a block, float64


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
    """Return O [D, d], float64."""
    return student.parts.o.weight.detach().double().T


def rank_columns(student: Student) -> list[Tensor]:
    """Return, rank by rank, the entries of z that the rank owns, contiguous."""
    width = student.parts.o.in_features
    return list(torch.arange(width, device=student.parts.o.weight.device).chunk(student.block.comm.size))


def output_gradient_moments(feed: Feed, batches: Iterable[Batch], *, seed: int = 0) -> list[Tensor]:
    """Return E[g g^T] [d, d] at every block's output, g the gradient of -log p of a token drawn from the model itself.

    An error e there costs KL 1/2 E<g, e>^2 (docs/design.md, section 4): the metric in which neurons' errors should be
    small. Each is scaled to a mean diagonal of 1 and shrunk by a tenth towards the identity, for few tokens; float64.
    The feed must not have moved yet.
    """
    lm = feed.model.lm
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor | float] = [0.0] * lm.num_blocks
    for batch in batches:
        outputs: list[Tensor] = []
        with torch.enable_grad():
            x = batch.dense
            for block, kwargs in zip(lm.blocks, batch.kwargs, strict=True):
                x = block.run(Streams(x), NOTHING_DROPPED, **kwargs).shared
                x = x if outputs else x.detach().requires_grad_()
                outputs.append(x)
            logits = lm.head(lm.final_norm(Streams(x)))[batch.mask].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            nll = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            for i, g in enumerate(torch.autograd.grad(nll, outputs)):
                g = g[batch.mask].double()
                sums[i] = sums[i] + g.T @ g
    return [_shrunk(f) for f in sums if isinstance(f, Tensor)]


def fits_in_memory(feed: Feed) -> bool:
    """Say whether the gradients' moments of all blocks may be held."""
    d, n = feed.batches[0].dense.shape[-1], feed.model.lm.num_blocks
    return d * d * 8 * n <= METRIC_BYTES


def _shrunk(f: Tensor) -> Tensor:
    f = f / f.diagonal().mean().clamp(min=1e-300)
    return 0.9 * f + 0.1 * torch.eye(len(f), dtype=f.dtype, device=f.device)
