"""Which rank gets which heads and neurons. The dense function stays the same; what a rank misses does not.

Neurons: neuron n costs E[(act_n(u_r) - act_n(u))^2] |down_n|^2 on rank r, with u what the MLP should read and u_r what
rank r reads; a balanced assignment of least cost (assignment.py).
Heads: KV groups (or, with more ranks than KV heads, the query heads of one) are scattered so that alike heads part,
after the paper; or placed by a search on what the ranks miss. Whichever measures better is kept.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spd_calib.formats.common import Strategy
from spd_calib.models.architecture import HeadCounts
from spd_calib.parallel.streams import Streams, defer, keep

from .assignment import balanced, order_of
from .moments import Moments, o_matrix
from .permute import entries, permute_heads, permute_neurons
from .planned import Batch, Feed, Student

PAIRS = 4096  # ranks * neurons up to which errors are taken together, pair by pair; beyond, each neuron by itself


@torch.no_grad()
def neuron_errors(student: Student, feed: Feed, batches: Iterable[Batch], own: bool) -> Iterator[Tensor]:
    """act(u_r) - act(u) of every neuron on every rank, [R, N, neurons] a batch, under the student's predictors."""
    block = student.block
    for batch in batches:
        s = feed.inputs(batch, own)
        partials, heads = block.attend(s, **batch.kwargs[block.index])
        whole, partly = keep(s, partials, block.o_bias, block.comm), mlp_reads(student, s, partials, heads)
        right: Tensor | None = None
        errors = []
        for rank in range(block.comm.size):
            if right is None or not whole.agree:
                right = neurons(student, whole.read(rank)[batch.mask])
            errors.append(neurons(student, partly.read(rank)[batch.mask]) - right)
        yield torch.stack(errors)


def neuron_costs(
    student: Student, feed: Feed, batches: Iterable[Batch], own: bool, metric: Tensor | None = None
) -> np.ndarray:
    """The cost [R, neurons] of each neuron on each rank: E[error^2] |down_n|^2, the norm taken in `metric` [d, d]."""
    total = sum(e.double().square().sum(1) for e in neuron_errors(student, feed, batches, own))
    assert isinstance(total, Tensor)
    return (total * _down_products(student, metric).diagonal()).cpu().numpy()


def _down_products(student: Student, metric: Tensor | None) -> Tensor:
    """<down_n, down_m> for all pairs of neurons, float64."""
    down = student.parts.down.weight.double()
    return down.T @ (down if metric is None else metric.to(down) @ down)


def mlp_reads(student: Student, s: Streams, partials: Sequence[Tensor], heads: Sequence[Tensor]) -> Streams:
    """What each rank's MLP reads (before the norm) with the sync point dropped."""
    block = student.block
    if block.compensation is not None:
        partials = [c(z, p) for c, z, p in zip(block.compensation, heads, partials, strict=True)]
    return defer(s, partials, block.o_bias)


def neurons(student: Student, h: Tensor) -> Tensor:
    """All neurons' activations [N, neurons] where the MLP's norm reads h [N, d]."""
    parts, u = student.parts, student.parts.norm2(h)
    gate = parts.activation(parts.mlp_in[0](u))
    return gate if len(parts.mlp_in) == 1 else gate * parts.mlp_in[1](u)


def group_neurons(
    student: Student, feed: Feed, batches: Sequence[Batch], own: bool, metric: Tensor | None = None
) -> None:
    """Reorder the student's neurons: each rank gets those it distorts least."""
    ranks, n = student.block.comm.size, student.counts.neurons
    if ranks == 1:
        return
    if ranks * n <= PAIRS:
        gram = _error_gram(student, feed, batches, own, metric)
        owner = swap_neurons(gram, balanced(np.diagonal(gram).reshape(ranks, n)))
    else:
        owner = balanced(neuron_costs(student, feed, batches, own, metric))
    permute_neurons(student.parts, torch.from_numpy(order_of(owner, ranks)).to(student.parts.down.weight.device))


def _error_gram(student: Student, feed: Feed, batches: Iterable[Batch], own: bool, metric: Tensor | None) -> np.ndarray:
    """E<e_{r,n}, e_{s,m}>, [R * neurons] squared, of the errors that neurons bring into the MLP's output."""
    ranks = student.block.comm.size
    gram: Tensor | float = 0.0
    for errors in neuron_errors(student, feed, batches, own):
        x = errors.transpose(1, 2).flatten(0, 1)
        gram = gram + (x @ x.T).double()
    assert isinstance(gram, Tensor)
    return (gram * _down_products(student, metric).repeat(ranks, ranks)).cpu().numpy()


def swap_neurons(gram: np.ndarray, owner: np.ndarray, most: int = 1000) -> np.ndarray:
    """Swap the two neurons of different ranks that lessen E|sum of errors|^2 most, until none does.

    gram [R * n, R * n]; owner [n]. What single costs leave out: errors of neurons add up or cancel.
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


def fisher(feed: Feed, batches: Iterable[Batch], seed: int = 0) -> list[Tensor]:
    """E[g g^T] [d, d] at every block's output, g the gradient of -log p of a token drawn from the model itself.

    An error e there costs KL 1/2 E<g, e>^2 (DESIGN section 4): the metric in which neurons' errors should be small.
    Shrunk by a tenth towards the plain one, for few tokens. Call it before the feed moves on.
    """
    lm = feed.model.lm
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor | float] = [0.0] * lm.num_blocks
    for batch in batches:
        outputs: list[Tensor] = []
        with torch.enable_grad():
            x = batch.dense
            for block, kwargs in zip(lm.blocks, batch.kwargs, strict=True):
                x = block(x, **kwargs).shared
                x = x if outputs else x.detach().requires_grad_()
                outputs.append(x)
            logits = lm.head(lm.final_norm(Streams(x)))[batch.mask].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            nll = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            for i, g in enumerate(torch.autograd.grad(nll, outputs)):
                g = g[batch.mask].double()
                sums[i] = sums[i] + g.T @ g
    return [_shrunk(f) for f in sums if isinstance(f, Tensor)]


def _shrunk(f: Tensor) -> Tensor:
    f = f / f.diagonal().mean().clamp(min=1e-300)
    return 0.9 * f + 0.1 * torch.eye(len(f), dtype=f.dtype, device=f.device)


@torch.no_grad()
def distortion(student: Student, feed: Feed, batches: Iterable[Batch], own: bool) -> float:
    """What dropping does to the block's output: E |dropped - kept|^2 / E |MLP's output|^2 on the same input."""
    block, wrong, right = student.block, 0.0, 0.0
    strategy = block.attention_strategy
    for batch in batches:
        s, kwargs = feed.inputs(batch, own), batch.kwargs[block.index]
        dropped = block(s, **kwargs).shared
        block.attention_strategy = Strategy.KEEP_SYNC
        kept = block(s, **kwargs).shared
        block.attention_strategy = strategy
        wrong += (dropped - kept)[batch.mask].double().square().sum().item()
        right += (kept - s.shared)[batch.mask].double().square().sum().item()
    return wrong / max(right, 1e-30)


def group_heads(student: Student, order: Tensor) -> None:
    permute_heads(student.parts, student.counts, order)


def head_orders(student: Student, m: Moments, seed: int = 0) -> dict[str, Tensor]:
    """Candidate orders of the query heads: as they are, the paper's (alike heads scattered), and by a search."""
    counts, ranks = student.counts, student.block.comm.size
    orders = {"as it is": torch.arange(counts.heads)}
    units, cells = _units(counts, ranks)
    if all(cell_count == len(members) or cell_count == 1 for members, cell_count in cells):
        return orders  # one unit a rank, or one rank: nothing to place
    gram, alike = _gram(units, m, o_matrix(student), counts.head_dim)
    generator = np.random.default_rng(seed)
    orders["scattered"] = _order(units, cells, alike, generator)  # least likeness among heads of one rank
    # E|a - partial|^2 summed over ranks = const - sum over ranks of (2 <partial, a> - |partial|^2): only pairs on
    # one rank count, so the least error has the least sum of products within ranks as well
    orders["searched"] = _order(units, cells, gram, generator)
    return orders


def _units(counts: HeadCounts, ranks: int) -> tuple[list[list[int]], list[tuple[list[int], int]]]:
    """The smallest sets of query heads that can be placed, and (units, number of ranks) that share them among them."""
    group = counts.heads // counts.kv_heads
    if ranks <= counts.kv_heads:
        units = [list(range(g * group, (g + 1) * group)) for g in range(counts.kv_heads)]
        return units, [(list(range(counts.kv_heads)), ranks)]
    units = [[h] for h in range(counts.heads)]
    share = ranks // counts.kv_heads
    return units, [(list(range(g * group, (g + 1) * group)), share) for g in range(counts.kv_heads)]


def _gram(units: list[list[int]], m: Moments, o: Tensor, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """E <h_i, h_j> of the units' contributions to the attention output (centred), and their correlation."""
    n = len(units)
    gram = torch.zeros(n, n, dtype=torch.float64)
    index = [entries(torch.tensor(u), head_dim) for u in units]
    for i in range(n):
        for j in range(i, n):
            c = m.covariance[index[i]][:, index[j]]
            gram[i, j] = gram[j, i] = torch.einsum("id,id->", o[index[i]], c @ o[index[j]]).cpu()
    scale = gram.diagonal().clamp(min=1e-30).sqrt()
    return gram.numpy(), (gram / scale / scale[:, None]).abs().numpy()


def _order(units: list, cells: list, affinity: np.ndarray, generator: np.random.Generator, starts: int = 8) -> Tensor:
    """The units so placed that the sum of `affinity` over pairs on one rank is least: swaps from several starts."""
    order: list[int] = []
    for members, ranks in cells:
        a = affinity[np.ix_(members, members)].copy()
        np.fill_diagonal(a, 0.0)
        found = [_swap_search(a, _start(len(members), ranks, generator, first=t == 0)) for t in range(starts)]
        best = min(found, key=lambda owner: _within(a, owner))
        order += [members[i] for i in order_of(best, ranks)]
    return torch.tensor([head for unit in order for head in units[unit]])


def _start(n: int, ranks: int, generator: np.random.Generator, first: bool) -> np.ndarray:
    owner = np.repeat(np.arange(ranks), n // ranks)
    return owner if first else generator.permutation(owner)


def _within(a: np.ndarray, owner: np.ndarray) -> float:
    return float(a[owner[:, None] == owner].sum())


def _swap_search(a: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Swap the two units that help most, until none helps."""
    n, owner = len(owner), owner.copy()
    while True:
        to = np.stack([a[:, owner == r].sum(1) for r in range(owner.max() + 1)], axis=1)  # [n, R]
        at = to[np.arange(n), owner]
        across = to[:, owner]  # across[i, j]: affinity of i with j's rank
        gain = at[:, None] + at - across - across.T + 2 * a
        gain[owner[:, None] == owner] = -np.inf
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-12 * max(abs(at).max(), 1e-30):
            return owner
        owner[[i, j]] = owner[[j, i]]
