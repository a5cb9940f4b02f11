"""Deciding which rank gets which MLP neurons. The dense function stays the same; what dropping does to it does not.

Neuron n costs E[(act_n(u_r) - act_n(u))^2] |down_n|^2 on rank r, with u what the MLP should read and u_r what rank r
reads: as it is, or as a refit of its first layers will correct it. The assignment is the balanced one of least cost
(assignment.py). Up to PAIRS, swaps then take into account that errors of neurons add up or cancel.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spd_calib.formats.drops import KEPT
from spd_calib.models.mlp import activations
from spd_calib.parallel.streams import Streams, in_full

from .assignment import balanced, order_of
from .error_cost import ErrorCost, bounded
from .feed import Batch, Feed
from .moments import widened
from .permute import permute_neurons
from .reads import mlp_reads, settled
from .refit import Fits
from .ridge import RidgeFit
from .student import Student

PAIRS = 4096  # ranks * neurons up to which errors are taken together, pair by pair; beyond, each neuron by itself


def group_neurons(
    student: Student,
    feed: Feed,
    batches: Sequence[Batch],
    *,
    cost: ErrorCost | None = None,
    fits: Fits | None = None,
) -> None:
    """Reorder the student's neurons: each rank gets those it distorts least, over some of the feed's batches.

    `cost` is that of an error at the block's output; by default all are alike. With `fits` (refit.fit_mlp_reads) ranks
    read what these make of it, and should read what the dense model does.
    """
    ranks, n = student.block.comm.size, student.counts.neurons
    if ranks == 1:
        return
    if ranks * n <= PAIRS:
        gram = _error_gram(student, feed, batches, cost, fits)
        owner = swap_neurons(gram, balanced(np.diagonal(gram).reshape(ranks, n)))
    else:
        owner = balanced(neuron_costs(student, feed, batches, cost=cost, fits=fits))
    permute_neurons(student.parts, torch.from_numpy(order_of(owner, ranks)).to(student.parts.down.weight.device))


def neuron_costs(
    student: Student,
    feed: Feed,
    batches: Iterable[Batch],
    *,
    cost: ErrorCost | None = None,
    fits: Fits | None = None,
) -> np.ndarray:
    """Return the cost [R, neurons] of each neuron on each rank: E[error^2] |down_n|^2, as in group_neurons."""
    errors = neuron_errors(student, feed, batches, cost=cost, fits=fits)
    total = sum(e.double().square().sum(1) for e in errors)
    assert isinstance(total, Tensor)
    return (total * _down_products(student, cost).diagonal()).cpu().numpy()


@torch.no_grad()
def neuron_errors(
    student: Student,
    feed: Feed,
    batches: Iterable[Batch],
    *,
    cost: ErrorCost | None = None,
    fits: Fits | None = None,
) -> Iterator[Tensor]:
    """Yield act(u_r) - act(u) of each neuron on each rank, [R, N, neurons] a batch, under the student's predictors.

    With `cost` each token's is multiplied by the root of its weight.
    """
    block, norm = student.block, student.parts.norm2
    for batch in batches:
        s = feed.inputs(batch)
        partials, heads = block.attend(s, **feed.kwargs(batch))
        partly = mlp_reads(student, s, partials, heads, **feed.kwargs(batch))
        kept, _ = block.behind_attention(KEPT, s, partials, heads)
        whole = kept if fits is None else Streams(feed.dense_read(batch))
        right: Tensor | None = None
        errors = []
        for rank in range(block.comm.size):
            if right is None or not whole.agree:
                right = _neurons(student, norm(whole.read(rank)[batch.mask]))
            u = norm(partly.read(rank)[batch.mask])
            errors.append(_neurons(student, u if fits is None else _mapped(u, fits[rank])) - right)
        found = widened(torch.stack(errors))
        if cost is not None:
            should = feed.dense_output(batch)
            error = (settled(student.run(s, **feed.kwargs(batch))) - should)[batch.mask]
            weights = bounded(cost.token_weights(should, batch.mask), error, of=should[batch.mask])
            found *= weights.sqrt()[:, None]
        yield found


def swap_neurons(gram: np.ndarray, owner: np.ndarray, *, most: int = 1000) -> np.ndarray:
    """Return `owner` [n] after swaps of the two neurons of different ranks that lessen E|sum of errors|^2 most.

    gram [R * n, R * n] are the products of the errors. Ends when no swap helps, or after `most`. This is what single
    costs leave out: errors of neurons add up or cancel.
    """
    n, owner = len(owner), owner.copy()
    index = np.arange(n)
    least = -1e-9 * gram[np.ix_(owner * n + index, owner * n + index)].sum()
    for _ in range(most):
        at = owner * n + index  # row of each neuron where it is
        to = owner[None, :] * n + index[:, None]  # to[i, j]: row of neuron i on j's rank
        here = np.broadcast_to(at[:, None], (n, n))
        total = gram[:, at].sum(1)  # <e_{r,n}, sum of all errors>
        one = 2 * (total[to] - total[here]) + gram[to, to] - 2 * gram[to, here] + gram[here, here]
        cross = gram[to, to.T] - gram[to, here.T] - gram[here, to.T] + gram[here, here.T]
        change = one + one.T + 2 * cross
        change[owner[:, None] == owner] = 0.0
        i, j = np.unravel_index(change.argmin(), change.shape)
        if change[i, j] > least:
            break
        owner[[i, j]] = owner[[j, i]]
    return owner


@torch.no_grad()
def distortion(student: Student, feed: Feed, batches: Iterable[Batch]) -> float:
    """Return what dropping the attention's sync point does to the block's output, on the same input.

    That is E |dropped - kept|^2 / E |MLP's output|^2.
    """
    block, wrong, right = student.block, 0.0, 0.0
    with_attention_kept = student.drops.only([block.mlp_point])
    for batch in batches:
        s, kwargs = feed.inputs(batch), feed.kwargs(batch)
        dropped = in_full(student.run(s, **kwargs))
        kept = in_full(block.run(s, with_attention_kept, **kwargs))
        wrong += (dropped - kept)[batch.mask].double().square().sum().item()
        right += (kept - s.shared)[batch.mask].double().square().sum().item()
    return wrong / max(right, 1e-30)


def _neurons(student: Student, u: Tensor) -> Tensor:
    """Return all neurons' activations [N, neurons] where the MLP reads u [N, d], behind its norm."""
    parts = student.parts
    return activations(parts.mlp_in, parts.activation, u, neurons=parts.down.in_features)


def _mapped(u: Tensor, fit: RidgeFit | None) -> Tensor:
    """Return what a fit makes of u [N, d]."""
    if fit is None:
        return u
    change = fit.change.to(u)
    moved = u + u @ change[: u.shape[1]]
    return moved if len(change) == u.shape[1] else moved + change[-1]


def _down_products(student: Student, cost: ErrorCost | None) -> Tensor:
    """Return <down_n, down_m> for all pairs of neurons, float64."""
    down = student.parts.down.weight.double()
    return down.T @ (down if cost is None else cost.direction.to(down) @ down)


def _error_gram(
    student: Student, feed: Feed, batches: Iterable[Batch], cost: ErrorCost | None, fits: Fits | None
) -> np.ndarray:
    """Return E<e_{r,n}, e_{s,m}>, [R * neurons] squared, of the errors that neurons bring into the MLP's output."""
    ranks = student.block.comm.size
    gram: Tensor | float = 0.0
    for errors in neuron_errors(student, feed, batches, cost=cost, fits=fits):
        x = errors.transpose(1, 2).flatten(0, 1)
        gram = gram + (x @ x.T).double()
    assert isinstance(gram, Tensor)
    return (gram * _down_products(student, cost).repeat(ranks, ranks)).cpu().numpy()
