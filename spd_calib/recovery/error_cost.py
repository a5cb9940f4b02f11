"""Measuring what an error at a block's output costs in KL, to second order: so recovery fits, and judges.

An error e at a token costs 1/2 E<g, e>^2, g the gradient of -log p of tokens drawn from the model itself. E[g g^T] is
taken as a size, E|g|^2, times a direction, [d, d]. The size depends on the token: the first of a sequence, and a few
others with a norm many times that of the rest (attention sinks), are read by all that follow, and an error there, as a
share of their norm, costs 100 to 1000 times that at others. It is averaged over tokens of like norm, the first apart,
and bounded: most of an error at such a token lies along y itself, which the norms behind take no notice of.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.parallel.block import Block
from spd_calib.parallel.model import TensorParallelLM
from spd_calib.parallel.streams import Streams

from .feed import Batch, Feed
from .moments import widened

METRIC_BYTES = 4 * 2**30  # of all blocks' directions: at d = 8192 half a gigabyte a block, float64
QUANTILES = (0.5, 0.9, 0.97, 0.985, 0.993, 0.997)  # of |y|, between classes of tokens
MOST = 64.0
PRIOR = 4  # tokens of average size that each class is taken to have beside its own
ORDINARY = 2  # the last class whose gradients make up the direction


@dataclass(frozen=True)
class ErrorCost:
    """The cost of errors at one block's output: their direction [d, d], and the size of each class of tokens.

    `edges` [classes - 2] are the norms between classes; the last class is that of first tokens. `typical` is the median
    of what an error as a share of |y| costs.
    """

    direction: Tensor
    edges: Tensor
    sizes: Tensor
    typical: Tensor

    def token_weights(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return E|g|^2 of each real token [N], y [B, T, d] the dense output, in any unit.

        Bounded: of an error as a share of |y| none costs more than MOST times what is typical.
        """
        squares = _mean_squares(y[mask])
        relative = self.sizes.to(squares)[_classes(y, self.edges)[mask]] * squares  # float32: float16 would lose them
        return (relative / self.typical.to(squares)).clamp(max=MOST) / squares


def token_weights(cost: ErrorCost | None, y: Tensor, batch: Batch) -> Tensor:
    """Return the weights of a batch's tokens [N] under `cost`; without one, 1 / mean(y^2): norms read y."""
    if cost is not None:
        return batch.weight * cost.token_weights(y, batch.mask)
    return batch.weight / _mean_squares(y[batch.mask])


def bounded(weights: Tensor, error: Tensor, *, of: Tensor) -> Tensor:
    """Return the weights of tokens [N], lowered where their error [N, d] is larger than what it is an error of, [N, d].

    Such a token costs what one without anything right does. A token that becomes an attention sink in the planned model
    alone is 10,000 times as wrong: a regression would be of that token, and a judgement, too.
    """
    return weights / (error.square().sum(-1) / of.square().sum(-1).clamp(min=1e-12)).clamp(min=1)


def fits_in_memory(feed: Feed) -> bool:
    """Say whether the error costs of all blocks may be held."""
    d, n = feed.batches[0].dense.shape[-1], feed.model.lm.num_blocks
    return d * d * 8 * n <= METRIC_BYTES


def error_costs(feed: Feed, batches: Iterable[Batch], *, seed: int = 0) -> list[ErrorCost]:
    """Return the cost of errors at every block's output; the first batch says where the classes of tokens part.

    A direction has a mean diagonal of 1 and is shrunk by a tenth towards the identity, for few tokens; float64.
    The feed must not have moved yet.
    """
    lm, batches = feed.model.lm, list(batches)
    outputs: list[list[Tensor]] = []  # of every block, of every batch: a block is run on all of them at once
    with torch.no_grad():
        entered = [batch.dense for batch in batches]
        for index, block in enumerate(lm.blocks):
            entered = [_through(block, x, b.kwargs[index]) for x, b in zip(entered, batches, strict=True)]
            outputs.append(entered)
    generator = torch.Generator().manual_seed(seed)
    gradients = [_gradient_behind(lm, y, b, generator) for y, b in zip(outputs[-1], batches, strict=True)]
    sums = [_Sums.between(_edges(ys[0], batches[0].mask), ys[0]) for ys in outputs]
    for index in reversed(range(lm.num_blocks)):
        for y, gradient, batch in zip(outputs[index], gradients, batches, strict=True):
            classes = _classes(y, sums[index].edges)[batch.mask]
            sums[index].add(classes, y[batch.mask], gradient[batch.mask].double())
        if index:
            gradients = [
                _gradient_before(lm.blocks[index], x, gradient, b.kwargs[index])
                for x, gradient, b in zip(outputs[index - 1], gradients, batches, strict=True)
            ]
    return [of_block.cost() for of_block in sums]


def _through(block: Block, x: Tensor, kwargs: dict) -> Tensor:
    """Return what leaves a block of the dense model, [B, T, d] like `x`."""
    return block.run(Streams(x), NOTHING_DROPPED, **kwargs).shared


def _gradient_behind(lm: TensorParallelLM, y: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the gradient of -log p of tokens drawn from the model where `y` [B, T, d] leaves the last block."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        logits = lm.logits_with_gradients(lm.final_norm(Streams(y)))[batch.mask].float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        nll = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        return torch.autograd.grad(nll, y)[0]


def _gradient_before(block: Block, x: Tensor, gradient: Tensor, kwargs: dict) -> Tensor:
    """Return the gradient at what enters a block, `x` [B, T, d], where `gradient` is that at what leaves it.

    The block is run once more: so one block's weights and activations are all that is held.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(_through(block, x, kwargs), x, gradient)[0]


def costs_of_errors(cost: ErrorCost | None, error: Tensor, output: Tensor, batch: Batch) -> Tensor:
    """Return what the errors [N, d] of a batch's tokens cost, [N], where the dense block gives `output` [B, T, d].

    No token counts as more than all of it wrong; its gradient leads on as that of a smaller error does.
    """
    direction = None if cost is None else cost.direction
    squares, all_of_it = _squares(error, direction), _squares(output[batch.mask], direction)
    share = all_of_it / squares.detach().clamp(min=1e-30)
    return squares * share.clamp(max=1) * token_weights(cost, output, batch)


def _squares(x: Tensor, direction: Tensor | None) -> Tensor:
    """Return |x|^2 [N] in the metric `direction` [d, d]."""
    x = widened(x)
    return (x * (x if direction is None else x @ direction.to(x))).sum(-1)


@dataclass
class _Sums:
    """Sums over tokens at one block's output: |g|^2 and the number of tokens by class, and g g^T of ordinary ones."""

    edges: Tensor
    squares: Tensor  # [classes]
    number: Tensor  # [classes]
    products: Tensor  # [d, d]
    seen: list[tuple[Tensor, Tensor]]  # the tokens' classes and mean squares of y, [N] each

    @classmethod
    def between(cls, edges: Tensor, y: Tensor) -> "_Sums":
        d, zeros = y.shape[-1], torch.zeros(len(edges) + 2, dtype=torch.float64, device=y.device)
        return cls(edges, zeros, zeros.clone(), zeros.new_zeros(d, d), [])

    def add(self, classes: Tensor, y: Tensor, g: Tensor) -> None:
        """Add tokens: their classes [N], what leaves the dense block at them [N, d], and gradients [N, d]."""
        self.seen.append((classes, _mean_squares(y)))
        self.squares.index_add_(0, classes, g.square().sum(-1))
        self.number += torch.bincount(classes, minlength=len(self.number))
        ordinary = g[classes <= ORDINARY]
        self.products += ordinary.T @ ordinary

    def cost(self) -> ErrorCost:
        mean = (self.squares.sum() / self.number.sum()).clamp(min=1e-300)
        direction = self.products / self.products.diagonal().mean().clamp(min=1e-300)
        identity = torch.eye(len(direction), dtype=direction.dtype, device=direction.device)
        sizes = (self.squares + PRIOR * mean) / (self.number + PRIOR)
        relative = torch.cat([sizes[classes] * squares for classes, squares in self.seen])
        return ErrorCost(0.9 * direction + 0.1 * identity, self.edges, sizes, relative.median().clamp(min=1e-300))


def _edges(y: Tensor, mask: Tensor) -> Tensor:
    """Return the norms at QUANTILES of the real tokens of y [B, T, d] that are not the first of their sequence."""
    norms = _norms(y)[:, 1:][mask[:, 1:]]
    return torch.quantile(norms, norms.new_tensor(QUANTILES)) if len(norms) else norms.new_zeros(1)


def _norms(y: Tensor) -> Tensor:
    return _mean_squares(y).sqrt()


def _mean_squares(y: Tensor) -> Tensor:
    """Return the mean of y^2 at each token, never zero."""
    return widened(y).square().mean(-1).clamp(min=1e-12)


def _classes(y: Tensor, edges: Tensor) -> Tensor:
    """Return the class of each token, [B, T] for y [B, T, d]."""
    classes = torch.bucketize(_norms(y), edges)
    classes[:, 0] = len(edges) + 1
    return classes
