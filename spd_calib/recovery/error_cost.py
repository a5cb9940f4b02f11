"""What an error at a block's output costs in KL, to second order: the measure in which recovery fits and judges.

An error e at a token costs 1/2 E<g, e>^2, g the gradient of -log p of tokens drawn from the model itself. E[g g^T] is
taken as a size, E|g|^2, times a direction, [d, d]. The size depends on the token: the first of a sequence, and a few
others with a norm many times that of the rest (attention sinks), are read by all that follow, and an error there, as a
share of their norm, costs 100 to 1000 times that at others. It is averaged over tokens of like norm, the first apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_calib.formats.drops import NOTHING_DROPPED
from spd_calib.parallel.streams import Streams

from .feed import Batch, Feed

METRIC_BYTES = 4 * 2**30  # of all blocks' directions: at d = 8192 half a gigabyte a block, float64
QUANTILES = (0.5, 0.9, 0.97, 0.985, 0.993, 0.997)  # of |y|, between classes of tokens
PRIOR = 4  # tokens of average size that each class is taken to have beside its own
ORDINARY = 2  # the last class whose gradients make up the direction


@dataclass(frozen=True)
class ErrorCost:
    """The cost of errors at one block's output: their direction [d, d], and the size of each class of tokens.

    `edges` [classes - 2] are the norms between classes; the last class is that of first tokens.
    """

    direction: Tensor
    edges: Tensor
    sizes: Tensor

    def token_weights(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return E|g|^2 of each real token [N], relative to the commonest class, y [B, T, d] the dense output."""
        return (self.sizes / self.sizes[0]).to(y)[_classes(y, self.edges)[mask]]


def token_weights(cost: ErrorCost | None, y: Tensor, mask: Tensor) -> Tensor:
    """Return the weights of the real tokens [N] under `cost`; without one, 1 / mean(y^2), for the norms that read y."""
    if cost is not None:
        return cost.token_weights(y, mask)
    return 1 / y[mask].square().mean(-1).clamp(min=1e-12)


def fits_in_memory(feed: Feed) -> bool:
    """Say whether the error costs of all blocks may be held."""
    d, n = feed.batches[0].dense.shape[-1], feed.model.lm.num_blocks
    return d * d * 8 * n <= METRIC_BYTES


def error_costs(feed: Feed, batches: Iterable[Batch], *, seed: int = 0) -> list[ErrorCost]:
    """Return the cost of errors at every block's output; all gradients of `batches` are held meanwhile.

    A direction has a mean diagonal of 1 and is shrunk by a tenth towards the identity, for few tokens; float64.
    The feed must not have moved yet.
    """
    lm = feed.model.lm
    generator = torch.Generator().manual_seed(seed)
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(lm.num_blocks)]
    for batch in batches:
        outputs: list[Tensor] = []
        with torch.enable_grad():
            x = batch.dense
            for block, kwargs in zip(lm.blocks, batch.kwargs, strict=True):
                x = block.run(Streams(x), NOTHING_DROPPED, **kwargs).shared
                x = x if outputs else x.detach().requires_grad_()
                outputs.append(x)
            logits = lm.logits_with_gradients(lm.final_norm(Streams(x)))[batch.mask].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            nll = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(nll, outputs)
        first = torch.zeros_like(batch.mask)
        first[:, 0] = True
        for of_block, y, g in zip(found, outputs, gradients, strict=True):
            of_block.append((_norms(y.detach())[batch.mask], g[batch.mask].float(), first[batch.mask]))
    return [_cost(*(torch.cat(column) for column in zip(*of_block, strict=True))) for of_block in found]


def _cost(norms: Tensor, gradients: Tensor, first: Tensor) -> ErrorCost:
    """Return the cost for tokens' norms [N], gradients [N, d], and which are first ones [N]."""
    later = norms[~first]
    edges = torch.quantile(later[: 2**24], norms.new_tensor(QUANTILES)) if len(later) else norms.new_zeros(1)
    classes = torch.bucketize(norms, edges)
    classes[first] = len(edges) + 1
    squares = gradients.double().square().sum(-1)
    number = torch.bincount(classes, minlength=len(edges) + 2)
    sums = torch.zeros(len(number), dtype=squares.dtype, device=squares.device).index_add(0, classes, squares)
    mean = squares.mean().clamp(min=1e-300)
    g = gradients[classes <= ORDINARY].double()
    direction = g.T @ g
    direction = direction / direction.diagonal().mean().clamp(min=1e-300)
    shrunk = 0.9 * direction + 0.1 * torch.eye(len(direction), dtype=direction.dtype, device=direction.device)
    return ErrorCost(shrunk, edges, (sums + PRIOR * mean) / (number + PRIOR))


def _norms(y: Tensor) -> Tensor:
    return y.float().square().mean(-1).sqrt()


def _classes(y: Tensor, edges: Tensor) -> Tensor:
    """Return the class of each token, [B, T] for y [B, T, d]."""
    classes = torch.bucketize(_norms(y), edges)
    classes[:, 0] = len(edges) + 1
    return classes
