"""Deciding which rank gets which MLP neurons. The dense function stays the same; what dropping does to it does not.

Neuron n costs E[(act_n(u_r) - act_n(u))^2] |down_n|^2 on rank r, with u what the MLP should read and u_r what rank r
reads. The assignment is the balanced one of least cost (assignment.py). Up to PAIRS, swaps then take into account that
errors of neurons add up or cancel.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spd_calib.models.mlp import activations
from spd_calib.parallel.streams import keep

from .assignment import balanced, order_of
from .feed import Batch, Feed
from .permute import permute_neurons
from .reads import mlp_reads
from .student import Student

PAIRS = 4096  # ranks * neurons up to which errors are taken together, pair by pair; beyond, each neuron by itself


def group_neurons(student: Student, feed: Feed, batches: Sequence[Batch], *, metric: Tensor | None = None) -> None:
    """Reorder the student's neurons: each rank gets those it distorts least, over some of the feed's batches.

    `metric` [d, d] is the one in which an error of the MLP's output is measured; by default the plain one.
    """
    ranks, n = student.block.comm.size, student.counts.neurons
    if ranks == 1:
        return
    if ranks * n <= PAIRS:
        gram = _error_gram(student, feed, batches, metric)
        owner = swap_neurons(gram, balanced(np.diagonal(gram).reshape(ranks, n)))
    else:
        owner = balanced(neuron_costs(student, feed, batches, metric=metric))
    permute_neurons(student.parts, torch.from_numpy(order_of(owner, ranks)).to(student.parts.down.weight.device))


def neuron_costs(student: Student, feed: Feed, batches: Iterable[Batch], *, metric: Tensor | None = None) -> np.ndarray:
    """Return the cost [R, neurons] of each neuron on each rank: E[error^2] |down_n|^2, the norm taken in `metric`."""
    total = sum(e.double().square().sum(1) for e in neuron_errors(student, feed, batches))
    assert isinstance(total, Tensor)
    return (total * _down_products(student, metric).diagonal()).cpu().numpy()


@torch.no_grad()
def neuron_errors(student: Student, feed: Feed, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield act(u_r) - act(u) of each neuron on each rank, [R, N, neurons] a batch, under the student's predictors."""
    block = student.block
    for batch in batches:
        s = feed.inputs(batch)
        partials, heads = block.attend(s, **feed.kwargs(batch))
        whole, partly = keep(s, partials, block.o_bias, block.comm), mlp_reads(student, s, partials, heads)
        right: Tensor | None = None
        errors = []
        for rank in range(block.comm.size):
            if right is None or not whole.agree:
                right = _neurons(student, whole.read(rank)[batch.mask])
            errors.append(_neurons(student, partly.read(rank)[batch.mask]) - right)
        yield torch.stack(errors)


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
        dropped = student.run(s, **kwargs).shared
        kept = block.run(s, with_attention_kept, **kwargs).shared
        wrong += (dropped - kept)[batch.mask].double().square().sum().item()
        right += (kept - s.shared)[batch.mask].double().square().sum().item()
    return wrong / max(right, 1e-30)


def _neurons(student: Student, h: Tensor) -> Tensor:
    """Return all neurons' activations [N, neurons] where the MLP's norm reads h [N, d]."""
    parts = student.parts
    return activations(parts.mlp_in, parts.activation, parts.norm2(h), neurons=parts.down.in_features)


def _down_products(student: Student, metric: Tensor | None) -> Tensor:
    """Return <down_n, down_m> for all pairs of neurons, float64."""
    down = student.parts.down.weight.double()
    return down.T @ (down if metric is None else metric.to(down) @ down)


def _error_gram(student: Student, feed: Feed, batches: Iterable[Batch], metric: Tensor | None) -> np.ndarray:
    """Return E<e_{r,n}, e_{s,m}>, [R * neurons] squared, of the errors that neurons bring into the MLP's output."""
    ranks = student.block.comm.size
    gram: Tensor | float = 0.0
    for errors in neuron_errors(student, feed, batches):
        x = errors.transpose(1, 2).flatten(0, 1)
        gram = gram + (x @ x.T).double()
    assert isinstance(gram, Tensor)
    return (gram * _down_products(student, metric).repeat(ranks, ranks)).cpu().numpy()
